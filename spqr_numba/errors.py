"""Every error this package raises on purpose.

SpqrError
├── ConfigError      (ValueError)       settings out of range or at odds with each other
├── InputError       (ValueError)       a tensor of the wrong shape, dtype or device
├── FormatError      (ValueError)       buffers that do not make a compressed matrix
├── NumericsError    (ArithmeticError)  NaN or inf, a Hessian that cannot be factorised
├── ModelError                          a model, or a module of it, that cannot be handled
├── DataError                           calibration or evaluation text
└── CheckpointError                     reading or writing a model folder

A message says which rule was broken, by what value, and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FormatError",
    "InputError",
    "ModelError",
    "NumericsError",
    "SpqrError",
]


class SpqrError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(SpqrError, ValueError):
    """Settings out of range or at odds with each other."""


class InputError(SpqrError, ValueError):
    """A tensor of the wrong shape, dtype or device."""


class FormatError(SpqrError, ValueError):
    """Buffers that do not make a compressed matrix."""


class NumericsError(SpqrError, ArithmeticError):
    """NaN or inf where numbers were needed, or a Hessian that cannot be factorised."""


class ModelError(SpqrError):
    """A model, or a module of it, that cannot be handled."""


class DataError(SpqrError):
    """Calibration or evaluation text that is missing, unreadable or too short."""


class CheckpointError(SpqrError):
    """A model folder that cannot be read or written."""
