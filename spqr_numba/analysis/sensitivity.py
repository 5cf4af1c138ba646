"""How much each weight's rounding hurts, which weights become outliers, what that leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import SpqrConfig
from ..errors import InputError, NumericsError
from ..format.matrix import SpqrMatrix
from ..kernels.dequantize import statistic_reference
from ..quantize.hessian import factorize
from ..quantize.solver import WeightReport, quantize_weight
from .layers import CalibratedLayer
from .structure import StructureScores, structure_scores

__all__ = [
    "LayerAnalysis",
    "StatisticsEffect",
    "analyze",
    "decode_statistics",
    "error_share",
    "outlier_mask",
    "second_level_effect",
    "sensitivity",
]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LayerAnalysis:
    """What quantizing one layer shows.

    sensitivity   fp32 [m, n], of rounding each weight alone, columns in the layer's own order
    outliers      bool [m, n], likewise
    structure     shares of the outliers by pattern
    report        loss, sums of err^2 before and after outliers, and so on
    matrix        what would be stored
    """

    name: str
    sensitivity: Floats
    outliers: NDArray[np.bool_]
    structure: StructureScores
    report: WeightReport
    matrix: SpqrMatrix

    @property
    def kind(self) -> str:
        """What the model calls such linears: "q_proj"."""
        return self.name.rpartition(".")[2]


def analyze(layer: CalibratedLayer, config: SpqrConfig) -> LayerAnalysis:
    """Everything about one layer under `config`. Raises as `quantize_weight`."""
    result = quantize_weight(layer.weight, layer.hessian, config)
    mask = outlier_mask(result.matrix)
    return LayerAnalysis(
        name=layer.name,
        sensitivity=sensitivity(layer.weight, layer.hessian, config),
        outliers=mask,
        structure=structure_scores(mask, layer.heads),
        report=result.report,
        matrix=result.matrix,
    )


def sensitivity(weight: torch.Tensor, hessian: torch.Tensor, config: SpqrConfig) -> Floats:
    """(w - w')^2 / (2 [H^-1]_jj): the loss by rounding one weight, when all others adapt to it.

    weight [m, n] and hessian [n, n], fp32 -> fp32 [m, n]. w' is rounded to nearest at the bits of
    `config`, H damped as it says. One grid spans a row: in a group of 16 the largest weight lies on
    the grid that it stretched, has no error of its own, and would look harmless. Raises
    NumericsError where H cannot be factorised. Source: equation 2 of arXiv 2306.03078.
    """
    factor = factorize(hessian, replace(config, permutation="identity"))
    if factor.upper is None:
        raise NumericsError("the Hessian cannot be factorised, so no sensitivity is known")
    inverse_diagonal = factor.upper.square().sum(0)  # of H^-1 = U^T U
    rounded = quantize_weight(weight, None, SpqrConfig.rtn(config.bits)).weight
    return ((weight - rounded).square() / (2 * inverse_diagonal)).numpy()


def outlier_mask(matrix: SpqrMatrix) -> NDArray[np.bool_]:
    """Which weights are outliers: bool [m, n], columns in the layer's own order."""
    spec = matrix.spec
    mask = np.zeros((spec.out_features, spec.in_features), dtype=bool)
    if not matrix.outliers:
        return mask
    columns = matrix["outlier_columns"].cpu().numpy()
    if "permutation" in matrix.tensors:
        columns = matrix["permutation"].cpu().numpy()[columns]
    offsets = matrix["outlier_row_offsets"].cpu().numpy()
    mask[np.repeat(np.arange(spec.out_features), np.diff(offsets)), columns] = True
    return mask


def error_share(sensitivities: Floats, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of the total sensitivity that the most sensitive `shares` of all weights carry.

    shares lie in 0 ... 1; raises InputError for others. 0 everywhere where nothing is sensitive.
    """
    if ((shares < 0) | (shares > 1)).any():
        raise InputError("shares of weights must lie between 0 and 1")
    falling = np.sort(sensitivities, axis=None)[::-1].astype(np.float64)
    carried = np.concatenate([[0.0], np.cumsum(falling)])
    counts = np.round(shares * falling.size).astype(np.int64)
    return carried[counts] / carried[-1] if carried[-1] > 0 else np.zeros(len(shares))


def decode_statistics(matrix: SpqrMatrix, name: str) -> Floats:
    """The "scale" or the "zero" (`name`) of each group and row, as kernels decode it.

    fp32 [groups, m], groups in permuted order.
    """
    return statistic_reference(matrix.to("cpu"), name, getattr(matrix.spec, f"{name}_bits"))


@dataclass(frozen=True)
class StatisticsEffect:
    """Scales and zeros of one weight as fitted and as stored: four fp32 [groups, m].

    loss_before, loss_after   squared error of the weight, rounded to nearest with either
    """

    scales_before: Floats
    scales_after: Floats
    zeros_before: Floats
    zeros_after: Floats
    loss_before: float
    loss_after: float


def second_level_effect(weight: torch.Tensor, config: SpqrConfig) -> StatisticsEffect:
    """What quantizing scales and zeros does to a weight [m, n] that is rounded to nearest.

    "before" has them in fp16, "after" with the bits of `config`; all else is equal.
    """
    plain = SpqrConfig.rtn(config.bits, config.group_size)
    stored = replace(
        plain,
        stats_group_size=config.stats_group_size,
        scale_bits=config.scale_bits,
        zero_bits=config.zero_bits,
    )
    before, after = (quantize_weight(weight, None, settings) for settings in (plain, stored))
    return StatisticsEffect(
        scales_before=decode_statistics(before.matrix, "scale"),
        scales_after=decode_statistics(after.matrix, "scale"),
        zeros_before=decode_statistics(before.matrix, "zero"),
        zeros_after=decode_statistics(after.matrix, "zero"),
        loss_before=before.report.loss,
        loss_after=after.report.loss,
    )
