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

__all__ = ["Measurement", "baseline_configs", "describe", "is_compressed", "measure"]

DENSE_BITS = 16
MAX_BITS = 8


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


def baseline_configs(bits: int = 3) -> list[SpqrConfig]:
    """RTN at `bits` for each row and each 16 columns; GPTQ at `bits` and, if there is one, a bit
    more, which is about what SpQR at `bits` stores."""
    configs = [SpqrConfig.rtn(bits), SpqrConfig.rtn(bits, 16), SpqrConfig.gptq(bits)]
    return configs if bits == MAX_BITS else [*configs, SpqrConfig.gptq(bits + 1)]


def describe(config: SpqrConfig) -> str:
    """A config in a few words: "GPTQ 3 bit", "SpQR 3 bit, group 16", "SpQR by layer"."""
    if not config.use_hessian:
        method = "RTN"
    elif config.outlier_threshold is None and config.scale_bits == config.zero_bits == DENSE_BITS:
        method = "GPTQ"
    else:
        method = "SpQR"
    if any({"bits", "group_size"} & set(values) for _, values in config.overrides):
        return f"{method} by layer"
    group = "" if config.group_size is None else f", group {config.group_size}"
    return f"{method} {config.bits} bit{group}"


def is_compressed(model: Any) -> bool:
    """Whether any linear of a loaded model is."""
    return bool(_compressed(model))


def measure(
    model: Any,
    windows: Mapping[str, torch.Tensor],
    name: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Measurement:
    """Size and perplexity of a loaded model on windows {name: int64 [N, L]}.

    `progress` is called with the number of windows done since the last call. Raises as
    `perplexity`.
    """
    return Measurement(
        name or _describe_model(model),
        _bits_per_weight(model),
        _stored_bytes(model),
        {text: perplexity(model, batch, progress) for text, batch in windows.items()},
    )


def _describe_model(model: Any) -> str:
    if is_compressed(model):
        return describe(model.config.quantization_config.config)
    return "fp16"


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
