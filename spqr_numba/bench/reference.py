"""The same work one column at a time, in plain torch: what the kernels are measured against.

All rows at once and one launch an operation, as published implementations of the algorithm do it:
leave-one-out fits the grid of a group once for each of its columns.
"""

from __future__ import annotations

import torch

from ..config import SpqrConfig
from ..quantize.hessian import Factorization
from ..quantize.outliers import outlier_threshold

__all__ = ["quantize_by_column"]

BLOCK_COLUMNS = 128


def quantize_by_column(
    weight: torch.Tensor, factor: Factorization, config: SpqrConfig
) -> torch.Tensor:
    """W' [n, m], columns in the order of `factor`, of a weight [m, n] on any device.

    With leave-one-out, quantized statistics and groups that divide a block of 128 columns.
    """
    upper = factor.upper
    if upper is None or config.group_size is None:
        raise ValueError("the reference needs U and groups shorter than a row")
    columns = weight.to(torch.float32).T[factor.order]
    columns[factor.dead] = 0
    threshold = outlier_threshold(columns.T, upper, config.outlier_threshold)
    for start in range(0, len(columns), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            if j % config.group_size == 0:
                group = slice(j, min(j + config.group_size, len(columns)))
                scale, zero = fit(columns[group], upper.diagonal()[group], threshold, config)
            column, diagonal = columns[j].clone(), upper[j, j]
            columns[j] = nearest(column, scale, zero, config.bits)
            error = (column - columns[j]) / diagonal
            outlier = (column - columns[j]).half().float()
            columns[j] += torch.where(error.square() > threshold, outlier, 0)
            errors[j - start] = (column - columns[j]) / diagonal
            columns[j + 1 : stop] -= upper[j, j + 1 : stop, None] * errors[j - start]
        columns[stop:] -= upper[start:stop, stop:].T @ errors
    return columns


def fit(
    group: torch.Tensor, diagonal: torch.Tensor, threshold: float, config: SpqrConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [m] of a group [columns, m], as they will be decoded."""
    low, high = group.aminmax(dim=0)
    base = error_of(group, diagonal, low, high, config.bits).sum(0)
    kept = torch.ones_like(group, dtype=torch.bool)
    for j in range(len(group) if len(group) > 1 else 0):
        others = torch.cat([group[:j], group[j + 1 :]])
        at = torch.cat([diagonal[:j], diagonal[j + 1 :]])
        kept[j] = (
            base - error_of(others, at, *others.aminmax(dim=0), config.bits).sum(0) <= threshold
        )
    low = torch.where(kept, group, torch.inf).amin(0)
    high = torch.where(kept, group, -torch.inf).amax(0)
    scale, zero = grid(
        torch.where(kept.any(0), low, 0), torch.where(kept.any(0), high, 0), config.bits
    )
    return (
        second_level(scale, config.scale_bits, config.stats_group_size),
        second_level(zero, config.zero_bits, config.stats_group_size),
    )


def error_of(
    group: torch.Tensor, diagonal: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int
) -> torch.Tensor:
    """((w - w') / U_kk)^2 [columns, m] on the grids of [low, high]."""
    scale, zero = grid(low, high, bits)
    return ((group - nearest(group, scale, zero, bits)) / diagonal[:, None]).square()


def grid(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [m] of the ranges [low, high]."""
    scale = (high - low) / (2**bits - 1)
    return scale, torch.where(scale > 0, -low / scale, 0)


def nearest(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """The number of the grid that is nearest to each weight."""
    codes = torch.where(scale > 0, (weight / scale + zero).round(), 0).clamp(0, 2**bits - 1)
    return scale * (codes - zero)


def second_level(statistics: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """What scales or zeros [m] decode to once quantized in stats blocks of `rows` rows."""
    padded = torch.cat([statistics, statistics[-1:].expand(-len(statistics) % rows)])
    blocks = padded.reshape(-1, rows)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    base, step = low.half().float(), ((high - low) / (2**bits - 1)).half().float()
    codes = torch.where(step > 0, ((blocks - base) / step).round(), 0).clamp(0, 2**bits - 1)
    return (codes * step + base).half().float().reshape(-1)[: len(statistics)]
