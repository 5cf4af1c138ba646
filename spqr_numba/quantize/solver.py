"""SpQR on one weight: order, factor, threshold, then the columns, block by block.

    permute W and H  ->  U  ->  T  ->  for each block of columns:
                                           the column loop          kernels/columns.py
                                           W_behind -= errors U     one matrix product
    ->  pack                                                        format/

Rounding to nearest is the same walk with U = 1 and nothing to propagate; GPTQ is the same walk with
fp16 statistics and no outliers. Source: section 4 of arXiv 2306.03078.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ..config import SpqrConfig
from ..errors import InputError, NumericsError
from ..format.layout import UNQUANTIZED_BITS, MatrixSpec, index_dtype
from ..format.matrix import SpqrMatrix
from ..format.packing import outliers_to_csr, pack_codes, pack_statistics
from ..kernels.columns import ColumnLoop, block_columns, column_walk
from .drift import aimed_at
from .hessian import Factorization, factorize, is_finite, tensor_cores
from .outliers import outlier_threshold
from .permutation import column_order

__all__ = [
    "QuantizedWeight",
    "WeightReport",
    "check_weight",
    "quantize_weight",
    "squared_output",
    "walk_columns",
]

PART = 4096  # columns of an error that are float64 at once


@dataclass(frozen=True)
class WeightReport:
    """What quantizing one weight did.

    loss              tr((W - W_hat) H (W - W_hat)^T), also where W_hat aims at another weight
                      (drift.py) and so is farther from W; without H, the squared error
    relative_loss     loss / tr(W H W^T)
    threshold         T on err^2, inf where no outliers are kept
    error_before      sum of err^2 as quantized, before outliers are taken out
    error_after       the same after
    damping           share of mean(diag H) added, 0 without H
    rounded_to_nearest  True where there is no U: by setting, or because H could not be factorised
    """

    loss: float
    relative_loss: float
    outlier_share: float
    threshold: float
    error_before: float
    error_after: float
    damping: float
    rounded_to_nearest: bool
    bits_per_weight: float
    seconds: float


@dataclass(frozen=True)
class QuantizedWeight:
    """A compressed weight; `weight` fp32 [m, n] is what it decodes to, bit for bit."""

    matrix: SpqrMatrix
    weight: torch.Tensor
    report: WeightReport


@dataclass(frozen=True)
class ColumnWalk:
    """A finished walk over all columns: its buffers, T, and the sums of err^2."""

    loop: ColumnLoop
    threshold: float
    error_before: float
    error_after: float


def quantize_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor | Factorization | None,
    config: SpqrConfig,
) -> QuantizedWeight:
    """Compress one weight.

    weight   [m, n], any float dtype; not changed
    hessian  fp32 [n, n], or its Factorization (layers with the same inputs share one; made with the
             same permutation, damping and shrinkage), or None where config.use_hessian is False

    Raises InputError for shapes that do not fit, NumericsError for NaN or inf, weights beyond fp16,
    or a Hessian that cannot be factorised.
    """
    started = time.perf_counter()
    check_weight(weight, hessian, config)
    weight = weight.detach().to(torch.float32)
    factor = as_factorization(weight, hessian, config)
    spec = MatrixSpec.from_config(config, *weight.shape)
    columns = weight.T[factor.order]
    walk = walk_columns(aimed_at(columns, factor), factor, spec, config)
    matrix = pack(walk.loop, spec, factor.order, config)
    quantized = walk.loop.weight
    loss = squared_output(columns - quantized, factor.hessian).item()
    size = squared_output(columns, factor.hessian).item()
    report = WeightReport(
        loss=loss,
        relative_loss=loss / size if size > 0 else 0.0,
        outlier_share=matrix.outlier_share,
        threshold=walk.threshold,
        error_before=walk.error_before,
        error_after=walk.error_after,
        damping=factor.damping,
        rounded_to_nearest=factor.upper is None,
        bits_per_weight=matrix.bits_per_weight,
        seconds=time.perf_counter() - started,
    )
    return QuantizedWeight(matrix, in_layer_order(quantized, factor.order), report)


def check_weight(
    weight: torch.Tensor, hessian: torch.Tensor | Factorization | None, config: SpqrConfig
) -> None:
    """Raise InputError or NumericsError for what cannot be quantized."""
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise InputError(
            f"the weight is {weight.dtype} {list(weight.shape)}; it must be a float matrix with at"
            " least one element"
        )
    if not is_finite(weight):
        raise NumericsError("the weight holds NaN or inf")
    matrix = hessian.hessian if isinstance(hessian, Factorization) else hessian
    if matrix is None:
        if config.use_hessian:
            raise InputError("the settings ask for a Hessian (use_hessian=True); give one")
        return
    n = weight.shape[1]
    if tuple(matrix.shape) != (n, n):
        raise InputError(f"the Hessian has shape {list(matrix.shape)}; it must be [{n}, {n}]")
    if not is_finite(matrix):
        raise NumericsError("the Hessian holds NaN or inf")


def as_factorization(
    weight: torch.Tensor, hessian: torch.Tensor | Factorization | None, config: SpqrConfig
) -> Factorization:
    """What to quantize with; without a Hessian all inputs count alike."""
    if isinstance(hessian, Factorization):
        return hessian
    if hessian is not None and config.use_hessian:
        return factorize(hessian.to(torch.float32), config, weight)
    alike = torch.ones(weight.shape[1], device=weight.device)
    order = column_order(config.permutation, alike, weight)
    return Factorization(order, None, None, torch.zeros_like(alike, dtype=torch.bool), 0.0)


def walk_columns(
    columns: torch.Tensor, factor: Factorization, spec: MatrixSpec, config: SpqrConfig
) -> ColumnWalk:
    """Quantize permuted columns [n, m] block by block. Raises NumericsError beyond fp16."""
    current = columns.clone()
    current[factor.dead] = 0
    n = spec.in_features
    diagonal = torch.ones_like(current[:, 0])
    if factor.upper is not None:
        diagonal = factor.upper.diagonal().contiguous()
    threshold = math.inf
    if factor.upper is not None:
        threshold = outlier_threshold(current.T, factor.upper, config.outlier_threshold)
    fit_threshold = threshold if config.outlier_search == "leave-one-out" else math.inf
    loop = ColumnLoop.start(current, diagonal, spec)
    walk = column_walk(
        loop,
        spec,
        factor.upper,
        fit_threshold=fit_threshold,
        threshold=threshold,
        round_zero=config.round_zero,
        joint=config.fit == "joint",
    )
    width = block_columns(spec, current.device)
    for start in range(0, n, width):
        stop = min(start + width, n)
        walk(start, stop)
        if factor.upper is not None:
            behind = factor.upper[start:stop, stop:]
            current[stop:].addmm_(behind.T, loop.errors[start:stop], alpha=-1)
    if not is_finite(loop.weight):
        raise NumericsError("the weight is too large: its scales pass the largest fp16 number")
    before, after = loop.sums.sum(0, dtype=torch.float64).tolist()
    return ColumnWalk(loop, threshold, before, after)


def pack(loop: ColumnLoop, spec: MatrixSpec, order: torch.Tensor, config: SpqrConfig) -> SpqrMatrix:
    """The compressed matrix of a finished column loop."""
    tensors = {"codes": pack_codes(loop.codes, spec.bits)}
    tensors |= pack_statistic(loop, "scale", spec.scale_bits)
    tensors |= pack_statistic(loop, "zero", spec.zero_bits)
    if config.outlier_threshold is not None:
        tensors |= outliers_to_csr(loop.outliers.view(torch.float16).T)
    if config.permutation != "identity":
        tensors["permutation"] = order.to(index_dtype(spec.in_features))
    return SpqrMatrix(spec, tensors)


def pack_statistic(loop: ColumnLoop, name: str, bits: int) -> dict[str, torch.Tensor]:
    """The buffers of the scales or of the zeros."""
    step, base, values = (
        getattr(loop, f"{name}_{part}").view(torch.float16) for part in ("step", "base", "values")
    )
    if bits == UNQUANTIZED_BITS:
        return {f"{name}s": values}
    codes = pack_statistics(getattr(loop, f"{name}_codes"), bits)
    return {f"{name}_codes": codes, f"{name}_scale": step, f"{name}_zero": base}


def in_layer_order(columns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Permuted columns [n, m] -> weight [m, n] in the layer's own order."""
    weight = torch.empty_like(columns)
    weight[order] = columns
    return weight.T.contiguous()


def squared_output(columns: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """tr(D H D^T) of permuted columns D^T [n, m], fp64 []; the sum of squares without H.

    In TF32 on a GPU: it is only reported, and 11 bits of each factor leave four digits of the sum.
    """
    with tensor_cores(columns.is_cuda):
        weighed = columns if hessian is None else hessian @ columns
    parts = zip(columns.split(PART), weighed.split(PART), strict=True)
    return torch.stack([torch.sum(part.double() * other) for part, other in parts]).sum()
