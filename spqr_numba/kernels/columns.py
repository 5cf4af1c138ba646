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

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ..format.layout import UNQUANTIZED_BITS, MatrixSpec
from .bilevel import quantize_statistics
from .fit import fit_group
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
    kernel = cpu_kernel(spec.bits, spec.scale_bits, spec.zero_bits, round_zero)
    tile_rows = max(TILE_ROWS, spec.stats_group_size)
    sums = np.zeros((-(-spec.out_features // tile_rows), 2))
    thresholds = np.float32(fit_threshold), np.float32(threshold)
    sizes = spec.group_size, spec.stats_group_size, tile_rows
    kernel(loop, upper, start, sizes, thresholds, sums)
    before, after = sums.sum(0)
    return float(before), float(after)


@cache
def cpu_kernel(bits: int, scale_bits: int, zero_bits: int, round_zero: bool) -> Callable:
    """The CPU twin: (ColumnLoop, upper, start, (group_size, stats_group_size, tile_rows),
    (fit_threshold, threshold), sums fp64 [tiles, 2])."""
    max_code = np.float32((1 << bits) - 1)
    store_scales = statistics_writer(scale_bits)
    store_zeros = statistics_writer(zero_bits)

    @njit(parallel=True)
    def kernel(loop, upper, start, sizes, thresholds, sums):
        for tile in prange(sums.shape[0]):
            walk(loop, upper, start, tile * sizes[2], sizes, thresholds, sums[tile])

    @njit
    def walk(loop, upper, start, first, sizes, thresholds, sums):
        group_size, stats_group_size, tile_rows = sizes
        columns, rows = loop.weight.shape
        stop = start + upper.shape[0]
        last = min(first + tile_rows, rows)
        # a group longer than the block is fitted on the columns behind it too
        behind = min((stop + group_size - 1) // group_size * group_size, columns)
        tile = loop.weight[start:behind, first:last].copy()
        scale, zero = loop.scale[first:last], loop.zero[first:last]
        for j in range(start, stop):
            if j % group_size == 0:
                end = min(j + group_size, columns)
                group = tile[j - start : end - start]
                fit_group(group, loop.diagonal[j:end], thresholds[0], max_code, scale, zero)
                store(loop, j // group_size, first, stats_group_size, scale, zero)
            errors = loop.errors[j, first:last]
            quantize_column(
                tile[j - start],
                scale,
                zero,
                loop.diagonal[j],
                thresholds[1],
                max_code,
                loop.codes[j, first:last],
                loop.outliers[j, first:last],
                errors,
                sums,
            )
            at = j - start
            propagate(errors, upper[at, at + 1 :], tile[at + 1 : stop - start])
        loop.weight[start:stop, first:last] = tile[: stop - start]

    @njit
    def store(loop, group, first, stats_group_size, scale, zero):
        if round_zero:
            zero[:] = np.rint(zero)
        for row in range(0, scale.size, stats_group_size):
            end = min(row + stats_group_size, scale.size)
            block = (first + row) // stats_group_size
            store_scales(
                scale[row:end],
                loop.scale_codes[group, first + row : first + end],
                loop.scale_step[group, block : block + 1],
                loop.scale_base[group, block : block + 1],
                loop.scale_values[group, first + row : first + end],
            )
            store_zeros(
                zero[row:end],
                loop.zero_codes[group, first + row : first + end],
                loop.zero_step[group, block : block + 1],
                loop.zero_base[group, block : block + 1],
                loop.zero_values[group, first + row : first + end],
            )

    return kernel


@cache
def statistics_writer(bits: int) -> Callable:
    """An `njit` function (statistics, codes, step, base, values) for one stats block: statistics
    become what is stored, and what is stored is written."""

    @njit
    def write_codes(statistics, codes, step, base, values):
        step[0], base[0] = quantize_statistics(statistics, bits, codes)

    @njit
    def write_values(statistics, codes, step, base, values):
        for row in range(statistics.size):
            statistics[row] = round_through_half(statistics[row])
            values[row] = float_to_half(statistics[row])

    return write_values if bits == UNQUANTIZED_BITS else write_codes


@njit
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


@njit
def propagate(errors, upper, weights):
    """weights [columns, rows] -= upper [columns] outer errors [rows]."""
    for k in range(upper.size):
        factor = upper[k]
        for row in range(errors.size):
            weights[k, row] -= errors[row] * factor
