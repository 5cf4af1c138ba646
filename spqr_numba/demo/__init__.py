"""The bundled model: a small Llama that has read Python's manual, and how it was trained.

``corpus`` collects the text from the running interpreter, ``train`` makes the model folder
at ``MODEL_PATH``; README.md beside this file has the command and what was measured.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_PATH"]

MODEL_PATH = Path(__file__).parent / "model"
"""Folder of the bundled model: safetensors, config, generation config and tokenizer."""
