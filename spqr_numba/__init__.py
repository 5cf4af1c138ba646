"""SpQR weight compression of language models, in Python that anyone can read."""

from __future__ import annotations

__version__ = "0.1.0"
