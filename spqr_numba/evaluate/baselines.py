"""What SpQR is measured against: the dense model, round to nearest (RTN) and GPTQ.

The baselines are settings of the same machinery, compressed, stored, loaded and read back in the
same way, so that a row differs from another by its settings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import SpqrConfig
from ..nn import SpqrLinear
from .perplexity import perplexity

__all__ = ["Measurement", "baseline_configs", "measure"]

DENSE_BITS = 16


@dataclass(frozen=True)
class Measurement:
    """One row of a comparison.

    bits         bits a weight of the compressed linears, measured from their bytes; 16 where the
                 model is dense
    nbytes       bytes of all weights, those that are not compressed at 16 bits each
    perplexity   name of a text -> perplexity
    """

    name: str
    bits: float
    nbytes: int
    perplexity: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def baseline_configs(bits: int = 3) -> dict[str, SpqrConfig]:
    """RTN and GPTQ at `bits` and, for GPTQ, one bit more: about what SpQR at `bits` stores."""
    configs = {
        f"RTN {bits} bit, group 16": SpqrConfig.rtn(bits, 16),
        f"GPTQ {bits} bit": SpqrConfig.gptq(bits),
    }
    if bits < 8:
        configs[f"GPTQ {bits + 1} bit"] = SpqrConfig.gptq(bits + 1)
    return configs


def measure(
    name: str,
    model: Any,
    windows: Mapping[str, torch.Tensor],
    progress: Callable[[int], object] | None = None,
) -> Measurement:
    """Size and perplexity of a model on windows {name: int64 [N, L]}.

    `progress` is called with the number of windows done since the last call. Raises as
    `perplexity`.
    """
    return Measurement(
        name,
        _bits_per_weight(model),
        _stored_bytes(model),
        {text: perplexity(model, batch, progress) for text, batch in windows.items()},
    )


def _compressed(model: Any) -> list[SpqrLinear]:
    return [module for module in model.modules() if isinstance(module, SpqrLinear)]


def _bits_per_weight(model: Any) -> float:
    matrices = [linear.matrix for linear in _compressed(model)]
    if not matrices:
        return float(DENSE_BITS)
    weights = sum(matrix.spec.out_features * matrix.spec.in_features for matrix in matrices)
    return 8 * sum(matrix.nbytes for matrix in matrices) / weights


def _stored_bytes(model: Any) -> int:
    dense = sum(parameter.numel() for parameter in model.parameters()) * DENSE_BITS // 8
    return dense + sum(linear.matrix.nbytes for linear in _compressed(model))
