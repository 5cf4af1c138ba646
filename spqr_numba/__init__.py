"""SpQR weight compression of language models, in Python that anyone can read."""

from __future__ import annotations

from .model.registration import install as _install

__version__ = "0.1.0"

_install()  # AutoModelForCausalLM.from_pretrained finds compressed models
