"""Many settings on one model: bits and perplexity of each, with every Hessian made once.

Each linear is calibrated on what the dense model gives it. `compress` calibrates it on what the
compressed blocks before it give, which needs a pass a setting, so its numbers differ a little and
have the last word. The model and all its Hessians are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import SpqrConfig
from ..evaluate.perplexity import perplexity
from ..model.integration import load_model
from ..quantize.hessian import Factorization, factorize
from ..quantize.solver import quantize_weight
from .layers import CalibratedLayer, calibrated_layers

__all__ = ["SweepPoint", "sweep"]


@dataclass(frozen=True)
class SweepPoint:
    """What one setting is worth.

    bits            bits a weight of the compressed linears, from the bytes of their buffers
    outlier_share   outliers a weight
    perplexity      of the whole model
    """

    name: str
    bits: float
    outlier_share: float
    perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def sweep(
    model: str | None,
    configs: Mapping[str, SpqrConfig],
    windows: torch.Tensor,
    *,
    dataset: str | None = None,
    nsamples: int = 32,
    seqlen: int | None = None,
    seed: int = 0,
) -> Iterator[SweepPoint]:
    """The point of each named setting, one by one, in order.

    windows are int64 [N, L] tokens to measure on, other keywords are those of `compress`. `skip`,
    `overrides`, `true_sequential` and `asymmetric` are not followed: all linears are treated alike.
    Raises as `calibrated_layers`, `quantize_weight` and `perplexity` do.
    """
    layers = list(
        calibrated_layers(model, dataset=dataset, nsamples=nsamples, seqlen=seqlen, seed=seed)
    )
    loaded, _ = load_model(model)
    known: dict[tuple, Factorization] = {}
    for name, config in configs.items():
        weights = nbytes = outliers = 0
        for layer in layers:
            factor = _factorization(layer, config, known) if config.use_hessian else None
            result = quantize_weight(layer.weight, factor, config)
            with torch.no_grad():
                loaded.get_submodule(layer.name).weight.copy_(result.weight)
            weights += layer.weight.numel()
            nbytes += result.matrix.nbytes
            outliers += result.matrix.outliers or 0
        measured = perplexity(loaded, windows)
        yield SweepPoint(name, 8 * nbytes / weights, outliers / weights, measured)


def _factorization(
    layer: CalibratedLayer, config: SpqrConfig, known: dict[tuple, Factorization]
) -> Factorization:
    """That of an earlier setting, where it has the same order and damping."""
    key = (layer.name, config.permutation, config.damping, config.on_failed_factorization)
    if key not in known:
        known[key] = factorize(layer.hessian, config, layer.weight)
    return known[key]
