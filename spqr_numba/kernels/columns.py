"""The column loop: quantize a block of columns, one after another, and propagate the errors.

For each column j, in permuted order, and every row i:

    where a group begins    fit scale and zero (fit.py), make them bilevel (bilevel.py)
    code  = clamp(round(w / scale + zero)),  w' = scale * (code - zero),  err = (w - w') / U_jj
    err^2 > T               outlier = fp16(w - w'),  w' += outlier,  err = (w - w') / U_jj
    for k > j in the block  w_ik -= err_i * U_jk

    weight     fp32 [n, m]      rows fastest; in: W (permuted, updated so far); out: W' in the block
    diagonal   fp32 [n]         U_jj
    upper      fp32 [b, b]      U of the block
    errors     fp32 [n, m]      out: err, for the one matrix product that updates the columns behind
    codes      uint8 [n, m]     out
    outliers   uint16 [n, m]    out: fp16 bits, 0 where there is none
    *_codes    uint8 [groups, m], *_step, *_base uint16 [groups, stats_groups]   out, or, for 16
    *_values   uint16 [groups, m]                                                bits, these

Rows know nothing of each other but their stats block, so a thread takes a tile of rows (a multiple
of a stats block) and walks the columns with the tile in its cache, rows in the lanes of its vector
registers. Source: section 4.1 of arXiv 2306.03078, algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from ..format.layout import UNQUANTIZED_BITS, MatrixSpec
from .bilevel import quantize_statistics
from .fit import fit_group
from .launch import compiled
from .scalars import code_of, float_to_half, half_to_float, round_through_half, weight_of

__all__ = ["ColumnLoop", "quantize_columns"]

TILE_ROWS = 32


class ColumnLoop(NamedTuple):
    """All that the column loop of one weight reads and writes; the table above has the shapes."""

    weight: np.ndarray
    diagonal: np.ndarray
    errors: np.ndarray
    codes: np.ndarray
    outliers: np.ndarray
    scale_codes: np.ndarray
    scale_step: np.ndarray
    scale_base: np.ndarray
    scale_values: np.ndarray
    zero_codes: np.ndarray
    zero_step: np.ndarray
    zero_base: np.ndarray
    zero_values: np.ndarray
    scale: np.ndarray  # fp32 [m], of the group at hand
    zero: np.ndarray

    @classmethod
    def start(cls, weight: np.ndarray, diagonal: np.ndarray, spec: MatrixSpec) -> ColumnLoop:
        """Buffers for quantizing `weight` [n, m], which is overwritten."""
        n, m = weight.shape
        statistics: list[np.ndarray] = []
        for _ in ("scale", "zero"):
            statistics += [
                np.zeros((spec.groups, m), np.uint8),
                np.zeros((spec.groups, spec.stats_groups), np.uint16),
                np.zeros((spec.groups, spec.stats_groups), np.uint16),
                np.zeros((spec.groups, m), np.uint16),
            ]
        return cls(
            weight,
            diagonal,
            np.empty((n, m), np.float32),
            np.empty((n, m), np.uint8),
            np.empty((n, m), np.uint16),
            *statistics,
            np.empty(m, np.float32),
            np.empty(m, np.float32),
        )


class Settings(NamedTuple):
    """What the column loop of one weight is told."""

    bits: int
    scale_bits: int
    zero_bits: int
    group_size: int
    stats_group_size: int
    tile_rows: int
    round_zero: bool
    fit_threshold: np.float32
    threshold: np.float32


def quantize_columns(
    loop: ColumnLoop,
    spec: MatrixSpec,
    upper: np.ndarray,
    start: int,
    fit_threshold: float,
    threshold: float,
    round_zero: bool,
) -> tuple[float, float]:
    """Quantize columns start, start + 1, ... in place, as many as `upper` has.

    Columns behind them are left to the caller. fit_threshold is T for the fit (inf: leave nothing out), threshold T for the columns (inf: no
    outliers). Returns the sums of err^2 before and after outliers are taken out.
    """
    tile_rows = max(TILE_ROWS, spec.stats_group_size)
    sums = np.zeros((-(-spec.out_features // tile_rows), 2))
    settings = Settings(
        spec.bits,
        spec.scale_bits,
        spec.zero_bits,
        spec.group_size,
        spec.stats_group_size,
        tile_rows,
        round_zero,
        np.float32(fit_threshold),
        np.float32(threshold),
    )
    walk_tiles(loop, upper, start, settings, sums)
    before, after = sums.sum(0)
    return float(before), float(after)


@compiled(parallel=True)
def walk_tiles(loop, upper, start, settings, sums):
    """The CPU twin; sums fp64 [tiles, 2] takes err^2 before and after outliers."""
    for tile in prange(sums.shape[0]):
        walk_tile(loop, upper, start, tile * settings.tile_rows, settings, sums[tile])


@compiled()
def walk_tile(loop, upper, start, first, settings, sums):
    """All columns of the block for the rows from `first` on."""
    columns, rows = loop.weight.shape
    group_size, max_code = settings.group_size, np.float32((1 << settings.bits) - 1)
    last = min(first + settings.tile_rows, rows)
    stop = start + upper.shape[0]
    # a group longer than the block is fitted on the columns behind it too
    behind = min((stop + group_size - 1) // group_size * group_size, columns)
    tile = loop.weight[start:behind, first:last].copy()
    scale, zero = loop.scale[first:last], loop.zero[first:last]
    for j in range(start, stop):
        at = j - start
        if j % group_size == 0:
            end = min(j + group_size, columns)
            group = tile[at : end - start]
            threshold = settings.fit_threshold
            fit_group(group, loop.diagonal[j:end], threshold, max_code, scale, zero)
            store_statistics(loop, j // group_size, first, settings, scale, zero)
        codes, outliers = loop.codes[j, first:last], loop.outliers[j, first:last]
        errors, diagonal = loop.errors[j, first:last], loop.diagonal[j]
        threshold = settings.threshold
        quantize_column(
            tile[at], scale, zero, diagonal, threshold, max_code, codes, outliers, errors, sums
        )
        propagate(errors, upper[at, at + 1 :], tile[at + 1 : stop - start])
    loop.weight[start:stop, first:last] = tile[: stop - start]


@compiled()
def store_statistics(loop, group, first, settings, scale, zero):
    """Make the statistics of one group and tile bilevel, in place, and store their codes."""
    if settings.round_zero:
        zero[:] = np.rint(zero)
    for row in range(0, scale.size, settings.stats_group_size):
        end = min(row + settings.stats_group_size, scale.size)
        block = (first + row) // settings.stats_group_size
        here = slice(first + row, first + end)
        store_statistic(
            scale[row:end],
            settings.scale_bits,
            loop.scale_codes[group, here],
            loop.scale_step[group, block : block + 1],
            loop.scale_base[group, block : block + 1],
            loop.scale_values[group, here],
        )
        store_statistic(
            zero[row:end],
            settings.zero_bits,
            loop.zero_codes[group, here],
            loop.zero_step[group, block : block + 1],
            loop.zero_base[group, block : block + 1],
            loop.zero_values[group, here],
        )


@compiled()
def store_statistic(statistics, bits, codes, step, base, values):
    """One stats block: statistics become what is stored, and what is stored is written."""
    if bits == UNQUANTIZED_BITS:
        for row in range(statistics.size):
            statistics[row] = round_through_half(statistics[row])
            values[row] = float_to_half(statistics[row])
    else:
        step[0], base[0] = quantize_statistics(statistics, bits, codes)


@compiled()
def quantize_column(
    weights, scale, zero, diagonal, threshold, max_code, codes, outliers, errors, sums
):
    """One column: weights [rows] become W'; codes, outliers (fp16 bits), errors are filled."""
    before = after = np.float64(0)
    for row in range(weights.size):
        code = code_of(weights[row], scale[row], zero[row], max_code)
        quantized = weight_of(code, scale[row], zero[row])
        error = (weights[row] - quantized) / diagonal
        before += np.float64(error * error)
        outlier = np.float32(0)
        if error * error > threshold:
            outlier = round_through_half(weights[row] - quantized)
            quantized += outlier
            error = (weights[row] - quantized) / diagonal
        after += np.float64(error * error)
        codes[row] = np.uint8(code)
        outliers[row] = float_to_half(outlier)
        errors[row] = error
        weights[row] = quantized
    sums[0] += before
    sums[1] += after


@compiled()
def propagate(errors, upper, weights):
    """weights [columns, rows] -= upper [columns] outer errors [rows]."""
    for k in range(upper.size):
        factor = upper[k]
        for row in range(errors.size):
            weights[k, row] -= errors[row] * factor
