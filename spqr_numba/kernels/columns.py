"""The column loop: quantize a block of columns, one after another, and propagate the errors.

For each column j, in permuted order, and every row i:

    where a group begins    fit scale and zero (fit.py), make them bilevel (bilevel.py), or choose
                            both together (joint.py)
    code  = clamp(round(w / scale + zero)),  w' = scale * (code - zero),  err = (w - w') / U_jj
    err^2 > T               outlier = fp16(w - w'),  w' += outlier,  err = (w - w') / U_jj
    for k > j in the block  w_ik -= err_i * U_jk

    weight     fp32 [n, m]      rows fastest; in: W (permuted, updated so far); out: W' in the block
    diagonal   fp32 [n]         U_jj
    importance fp32 [n]         1 / U_jj^2
    upper      fp32 [b, b]      U of the block
    errors     fp32 [n, m]      out: err, for the one matrix product that updates the columns behind
    codes      uint8 [n, m]     out
    outliers   uint16 [n, m]    out: fp16 bits, 0 where there is none
    *_codes    uint8 [groups, m], *_step, *_base uint16 [groups, stats_groups]   out, or, for 16
    *_values   uint16 [groups, m]                                                bits, these
    sums       [., 2]           += err^2 before and after outliers: fp64 a tile, on a GPU fp32 a row

Rows know nothing of each other but their stats block, so a thread takes a tile of rows (a multiple
of a stats block) and walks the columns with the tile in its cache, rows in the lanes of its vector
registers. The CUDA twin is columns_cuda.py. Source: section 4.1 of arXiv 2306.03078, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange

from ..format.layout import UNQUANTIZED_BITS, MatrixSpec
from .bilevel import quantize_statistics
from .fit import fit_group
from .joint import fit_jointly
from .launch import array_of, compiled
from .scalars import code_of, float_to_half, product, round_through_half, round_to_even, weight_of

__all__ = ["ColumnLoop", "block_columns", "column_walk", "describe_walk"]

BLOCK_COLUMNS = 128  # a multiple of every group size but the whole row's
TILE_ROWS = 32


class ColumnLoop(NamedTuple):
    """All that the column loop of one weight reads and writes; the table above has the shapes.

    Tensors, or the arrays of a backend over their memory.
    """

    weight: Any
    diagonal: Any
    importance: Any
    errors: Any
    codes: Any
    outliers: Any
    scale_codes: Any
    scale_step: Any
    scale_base: Any
    scale_values: Any
    zero_codes: Any
    zero_step: Any
    zero_base: Any
    zero_values: Any
    scale: Any  # fp32 [m], of the group at hand
    zero: Any
    sums: Any

    @classmethod
    def start(cls, weight: torch.Tensor, diagonal: torch.Tensor, spec: MatrixSpec) -> ColumnLoop:
        """Buffers for quantizing `weight` [n, m], which is overwritten."""
        n, m = weight.shape
        halves, of_stats = torch.uint16, (spec.groups, spec.stats_groups)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        statistics: dict[str, torch.Tensor] = {}
        for name in ("scale", "zero"):
            statistics |= {
                f"{name}_codes": zeros(spec.groups, m, dtype=torch.uint8),
                f"{name}_step": zeros(*of_stats, dtype=halves),
                f"{name}_base": zeros(*of_stats, dtype=halves),
                f"{name}_values": zeros(spec.groups, m, dtype=halves),
            }
        on_cpu = weight.device.type == "cpu"
        return cls(
            weight=weight,
            diagonal=diagonal,
            importance=diagonal.square().reciprocal(),
            errors=torch.empty_like(weight),
            codes=zeros(n, m, dtype=torch.uint8),
            outliers=zeros(n, m, dtype=halves),
            scale=zeros(m),
            zero=zeros(m),
            sums=zeros(tiles(spec), 2, dtype=torch.float64) if on_cpu else zeros(m, 2),
            **statistics,
        )

    def arrays(self) -> ColumnLoop:
        """The arrays that kernels take, over the memory of these tensors."""
        return ColumnLoop(*map(array_of, self))


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
    joint: bool


def tile_rows(spec: MatrixSpec) -> int:
    """Rows that a thread of a CPU, or a block of threads of a GPU, walks together."""
    return max(TILE_ROWS, spec.stats_group_size)


def tiles(spec: MatrixSpec) -> int:
    """Tiles of rows, the last one ragged."""
    return -(-spec.out_features // tile_rows(spec))


def block_columns(spec: MatrixSpec, device: torch.device) -> int:
    """How many columns `column_walk` shall take at once."""
    if device.type == "cpu":
        return BLOCK_COLUMNS
    from .columns_cuda import columns_in_shared_memory

    return columns_in_shared_memory(tile_rows(spec))


def describe_walk(spec: MatrixSpec, device: torch.device) -> str:
    """Which way `column_walk` takes, in words."""
    columns = block_columns(spec, device)
    walk = f"{tile_rows(spec)} rows x {columns} columns at once"
    if device.type == "cpu" or spec.group_size <= columns:
        return f"{walk}, groups fitted there"
    return f"{walk}, groups of {spec.group_size} fitted in global memory (the general path)"


def column_walk(
    loop: ColumnLoop,
    spec: MatrixSpec,
    upper: torch.Tensor | None,
    *,
    fit_threshold: float,
    threshold: float,
    round_zero: bool,
    joint: bool = False,
) -> Callable[[int, int], None]:
    """walk(start, stop): quantize columns start ... stop - 1 in place, `block_columns` at most.

    upper is U, fp32 [n, n], or None where nothing is propagated. fit_threshold is T for the fit
    (inf: leave nothing out), threshold T for the columns (inf: no outliers). joint chooses scales
    and zeros together. Columns behind `stop` are left to the caller.
    """
    settings = Settings(
        spec.bits,
        spec.scale_bits,
        spec.zero_bits,
        spec.group_size,
        spec.stats_group_size,
        tile_rows(spec),
        round_zero,
        np.float32(fit_threshold),
        np.float32(threshold),
        joint,
    )
    if loop.weight.is_cuda:
        from .columns_cuda import prepared_walk

        return prepared_walk(loop, upper, settings, tiles(spec))
    arrays = loop.arrays()

    def walk(start: int, stop: int) -> None:
        walk_tiles(arrays, diagonal_block(upper, start, stop).numpy(), start, settings)

    return walk


def diagonal_block(upper: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    """The square of U on the diagonal, the identity where there is no U."""
    if upper is None:
        return torch.eye(stop - start)
    return upper[start:stop, start:stop].contiguous()


@compiled(parallel=True)
def walk_tiles(loop, upper, start, settings):
    """The CPU twin."""
    for tile in prange(loop.sums.shape[0]):
        walk_tile(loop, upper, start, tile * settings.tile_rows, settings, loop.sums[tile])


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
            if settings.joint:
                store_jointly(loop, j, group, upper[at:, at:], first, settings, scale, zero)
            else:
                store_statistics(loop, j // group_size, first, settings, scale, zero)
        codes, outliers = loop.codes[j, first:last], loop.outliers[j, first:last]
        errors, diagonal = loop.errors[j, first:last], loop.diagonal[j]
        threshold = settings.threshold
        quantize_column(
            tile[at], scale, zero, diagonal, threshold, max_code, codes, outliers, errors, sums
        )
        propagate(errors, upper[at, at + 1 :], tile[at + 1 : stop - start])
    for j in range(start, stop):
        for row in range(first, last):
            loop.weight[j, row] = tile[j - start, row - first]


@compiled()
def store_statistics(loop, group, first, settings, scale, zero):
    """Make the statistics of one group and tile bilevel, in place, and store their codes."""
    if settings.round_zero:
        for row in range(zero.size):
            zero[row] = round_to_even(zero[row])
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
def store_jointly(loop, column, weights, upper, first, settings, scale, zero):
    """Choose the statistics of one group and tile together, in place, and store their codes."""
    group, importance = column // settings.group_size, loop.importance[column:]
    for row in range(0, scale.size, settings.stats_group_size):
        end = min(row + settings.stats_group_size, scale.size)
        block = (first + row) // settings.stats_group_size
        levels = fit_jointly(
            weights[:, row:end],
            importance,
            upper,
            settings.threshold,
            scale[row:end],
            zero[row:end],
            loop.scale_codes[group, first + row : first + end],
            loop.zero_codes[group, first + row : first + end],
            (settings.bits, settings.scale_bits, settings.zero_bits),
        )
        loop.scale_step[group, block] = float_to_half(levels.scale_step)
        loop.scale_base[group, block] = float_to_half(levels.scale_base)
        loop.zero_step[group, block] = float_to_half(levels.zero_step)
        loop.zero_base[group, block] = float_to_half(levels.zero_base)


@compiled()
def store_statistic(statistics, bits, codes, step, base, values):
    """One stats block: statistics become what is stored, and what is stored is written."""
    if bits == UNQUANTIZED_BITS:
        for row in range(statistics.size):
            statistics[row] = round_through_half(statistics[row])
            values[row] = float_to_half(statistics[row])
    else:
        step[0], base[0] = quantize_statistics(statistics, bits, codes)


@njit(inline="always")
def quantize_element(weight, scale, zero, diagonal, threshold, max_code):
    """(code, outlier, w', err, err before the outlier) of one weight, all float32."""
    code = code_of(weight, scale, zero, max_code)
    quantized = weight_of(code, scale, zero)
    before = error = (weight - quantized) / diagonal
    outlier = np.float32(0)
    if product(error, error) > threshold:
        outlier = round_through_half(weight - quantized)
        quantized += outlier
        error = (weight - quantized) / diagonal
    return code, outlier, quantized, error, before


@compiled()
def quantize_column(
    weights, scale, zero, diagonal, threshold, max_code, codes, outliers, errors, sums
):
    """One column: weights [rows] become W'; codes, outliers (fp16 bits), errors are filled."""
    sum_before = sum_after = np.float64(0)
    for row in range(weights.size):
        code, outlier, quantized, error, before = quantize_element(
            weights[row], scale[row], zero[row], diagonal, threshold, max_code
        )
        sum_before += np.float64(product(before, before))
        sum_after += np.float64(product(error, error))
        codes[row] = np.uint8(code)
        outliers[row] = float_to_half(outlier)
        errors[row] = error
        weights[row] = quantized
    sums[0] += sum_before
    sums[1] += sum_after


@compiled()
def propagate(errors, upper, weights):
    """weights [columns, rows] -= upper [columns] outer errors [rows]."""
    for k in range(upper.size):
        factor = upper[k]
        for row in range(errors.size):
            weights[k, row] -= errors[row] * factor
