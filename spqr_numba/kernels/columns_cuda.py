"""The column loop on a GPU: the CUDA twin of columns.py, which has the formulas and the shapes.

A block of threads takes one tile of rows: threadIdx.x is the row in the tile (`lane`), and the
threads of one row (threadIdx.y, `part`) share its columns between them. All that a block touches
again and again is in shared memory:

    tile      fp32 [b, width]   W of the block's columns, updated so far
    totals    fp32 [3, width]   error of a group on three grids: whole, without its low, its high
    scales    fp32 [width]      of the group at hand, before they are made bilevel
    zeros     fp32 [width]

For each column all parts find the same code and error from the same numbers, so that nothing needs
handing over; part 0 stores them, and each part updates every parts-th column behind. That is one
barrier a column, and two more where a group begins. Rows beyond the last are walked as copies of
it, since barriers wait for all threads, and not stored. Indices are unsigned: of a signed one Numba
asks at each access whether it is negative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from ..format.layout import UNQUANTIZED_BITS
from .bilevel import second_level, statistic_code
from .columns import BLOCK_COLUMNS, ColumnLoop, Settings, quantize_element
from .fit import error_sum, extremes, grid_of, kept_range
from .joint_cuda import joint_function
from .launch import array_of, numba_cuda, prepared_launch
from .scalars import (
    decoded_statistic,
    float_to_half,
    product,
    round_through_half,
    round_to_even,
)

__all__ = ["columns_in_shared_memory", "prepared_walk", "walk_kernel"]

cuda = numba_cuda()  # only those who have tensors on a GPU import this module

THREADS = 256
GRIDS = np.uint32(3)
SHARED_FLOATS = 10 * 1024  # of the tile: with the rest, below what every GPU gives a block (48 KB)


def columns_in_shared_memory(width: int) -> int:
    """How many columns a tile of `width` rows may have: a power of two."""
    return min(BLOCK_COLUMNS, 1 << (SHARED_FLOATS // width).bit_length() - 1)


def prepared_walk(
    loop: ColumnLoop, upper: torch.Tensor | None, settings: Settings, tiles: int
) -> Callable[[int, int], None]:
    """walk(start, stop) of all tiles, on what is torch's current stream now."""
    width, device = settings.tile_rows, loop.weight.device
    if upper is None:
        upper = torch.empty(0, 0, device=device)
    return prepared_launch(
        partial(walk_kernel, width, settings.joint, fits_inside(width, settings.group_size)),
        tiles,
        (width, THREADS // width),
        device,
        loop.arrays(),
        array_of(upper),
        settings,
        more=2,
    )


def fits_inside(width: int, group_size: int) -> bool:
    """Whether a block of columns holds whole groups; else a group begins only where one does."""
    return columns_in_shared_memory(width) % group_size == 0


@cache
def walk_kernel(width: int, joint: bool, inside: bool) -> Any:
    """kernel(loop, upper, settings, start, stop), for tiles of `width` rows and other settings.

    upper is all of U, or empty where nothing is propagated. Each variant holds the fit once: with
    another inlined beside it, the code outgrows the instruction cache.
    """
    fit = (joint_fit_function if joint else fit_function)(width, group_function(inside))
    propagate, block_columns = propagate_function(width), columns_in_shared_memory(width)
    tile_rows, parts = np.uint32(width), np.uint32(THREADS // width)

    @cuda.jit
    def kernel(loop, upper, settings, start, stop):
        columns, rows = np.uint32(loop.weight.shape[0]), np.uint32(loop.weight.shape[1])
        begin, stop = np.uint32(start), np.uint32(stop)
        propagated = min(stop, np.uint32(upper.shape[0]))
        lane, part = np.uint32(cuda.threadIdx.x), np.uint32(cuda.threadIdx.y)
        own_row = np.uint32(cuda.blockIdx.x * tile_rows + lane)
        row, stores = min(own_row, np.uint32(rows - 1)), part == 0 and own_row < rows
        group_size = np.uint32(settings.group_size)
        max_code = np.float32((1 << settings.bits) - 1)
        tile = cuda.shared.array((block_columns, width), np.float32)
        for j in range(np.uint32(begin + part), stop, parts):
            tile[np.uint32(j - begin), lane] = loop.weight[j, row]
        # where the block begins inside a group, that group's grid is known
        group = np.uint32(begin // group_size)
        next_group = begin if begin % group_size == 0 else columns
        scale, zero = loop.scale[row], loop.zero[row]
        sum_before, sum_after = np.float32(0), np.float32(0)
        cuda.syncthreads()
        for j in range(begin, stop):
            at = np.uint32(j - begin)
            if j == next_group:
                next_group = min(np.uint32(j + group_size), columns)
                scale, zero = fit(
                    loop, tile, upper, at, row, j, next_group, stop, group, settings, max_code,
                    stores,
                )  # fmt: skip
                group = np.uint32(group + 1)
            code, outlier, quantized, error, before = quantize_element(
                tile[at, lane], scale, zero, loop.diagonal[j], settings.threshold, max_code
            )
            if stores:
                loop.codes[j, row] = np.uint8(code)
                loop.outliers[j, row] = float_to_half(outlier)
                loop.errors[j, row] = error
                loop.weight[j, row] = quantized
                sum_before += product(before, before)
                sum_after += product(error, error)
            propagate(tile, upper, j, begin, propagated, error)
            cuda.syncthreads()
        if stores:
            loop.scale[row] = scale
            loop.zero[row] = zero
            loop.sums[row, 0] += sum_before
            loop.sums[row, 1] += sum_after

    return kernel


def propagate_function(width: int) -> Any:
    """propagate(...): this part's share of the columns behind j, up to `stop`, of its row."""
    parts = np.uint32(THREADS // width)

    @cuda.jit(device=True)
    def propagate(tile, upper, j, begin, stop, error):
        lane, behind = np.uint32(cuda.threadIdx.x), np.uint32(j + 1 + cuda.threadIdx.y)
        while behind < stop:  # not range, whose steps libNVVM does not see through
            tile[np.uint32(behind - begin), lane] -= product(error, upper[j, behind])
            behind = np.uint32(behind + parts)

    return propagate


def group_function(inside: bool) -> Any:
    """find_group(...) -> array, first, lane: the weights of a group are array[first + k, lane]."""

    @cuda.jit(device=True)
    def in_tile(loop, tile, at, row, j):
        return tile, at, np.uint32(cuda.threadIdx.x)

    @cuda.jit(device=True)
    def in_weight(loop, tile, at, row, j):  # which is as the block found it, where the group began
        return loop.weight, j, row

    return in_tile if inside else in_weight


def fit_function(width: int, find_group: Any) -> Any:
    """fit(...) -> scale, zero of this thread's row for the group of columns j ... end - 1."""
    start, store = start_function(width), store_function(width)

    @cuda.jit(device=True)
    def fit(loop, tile, upper, at, row, j, end, stop, group, settings, max_code, stores):
        scales = cuda.shared.array(width, np.float32)
        zeros = cuda.shared.array(width, np.float32)
        weights, first, lane = find_group(loop, tile, at, row, j)
        start(loop, weights, first, lane, j, end, settings, max_code, scales, zeros)
        rows, block_rows = np.uint32(loop.weight.shape[1]), np.uint32(settings.stats_group_size)
        scale = store(
            scales,
            rows,
            settings.scale_bits,
            block_rows,
            loop.scale_codes[group],
            loop.scale_step[group],
            loop.scale_base[group],
            loop.scale_values[group],
            stores,
        )
        zero = store(
            zeros,
            rows,
            settings.zero_bits,
            block_rows,
            loop.zero_codes[group],
            loop.zero_step[group],
            loop.zero_base[group],
            loop.zero_values[group],
            stores,
        )
        return scale, zero

    return fit


def joint_fit_function(width: int, find_group: Any) -> Any:
    """fit(...), as that of `fit_function`, of scales and zeros that are chosen together."""
    start, fit_jointly = start_function(width), joint_function(width, THREADS // width)
    tile_rows = np.uint32(width)

    @cuda.jit(device=True)
    def fit(loop, tile, upper, at, row, j, end, stop, group, settings, max_code, stores):
        scales = cuda.shared.array(width, np.float32)
        zeros = cuda.shared.array(width, np.float32)
        weights, first, lane = find_group(loop, tile, at, row, j)
        start(loop, weights, first, lane, j, end, settings, max_code, scales, zeros)
        rows = np.uint32(loop.weight.shape[1] - np.uint32(cuda.blockIdx.x * tile_rows))
        return fit_jointly(
            loop, weights, upper, first, lane, j, np.uint32(end - j), group, settings, scales,
            zeros, rows, stop, stores,
        )  # fmt: skip

    return fit


def start_function(width: int) -> Any:
    """start(...): the min-max fit of every row of the tile, into scales and zeros [width]."""
    range_of = range_function(width)

    @cuda.jit(device=True)
    def start(loop, weights, first, lane, j, end, settings, max_code, scales, zeros):
        low, high = range_of(weights, first, lane, loop.diagonal, j, end, settings, max_code)
        scale, zero = grid_of(low, high, max_code)
        if settings.round_zero:
            zero = round_to_even(zero)
        scales[np.uint32(cuda.threadIdx.x)] = scale
        zeros[np.uint32(cuda.threadIdx.x)] = zero
        cuda.syncthreads()

    return start


def range_function(width: int) -> Any:
    """range_of(...) -> minimum and maximum of a group, without outliers.

    The group is weights[first + k, lane], columns j ... end - 1. The parts share the three grids
    between them, and then know all three sums.
    """
    parts = np.uint32(THREADS // width)

    @cuda.jit(device=True)
    def range_of(weights, first, lane, diagonal, j, end, settings, max_code):
        totals = cuda.shared.array((3, width), np.float32)
        thread, count = np.uint32(cuda.threadIdx.x), np.uint32(end - j)
        threshold = settings.fit_threshold
        found = extremes(weights, first, lane, count)
        low, low_at, next_low, high, high_at, next_high = found
        if not threshold < np.float32(np.inf):
            return low, high
        for grid in range(np.uint32(cuda.threadIdx.y), GRIDS, parts):
            lowest, highest, left_out = low, high, count
            if grid == 1:
                lowest, left_out = next_low, low_at
            elif grid == 2:
                highest, left_out = next_high, high_at
            totals[grid, thread] = error_sum(
                weights, first, lane, count, diagonal, j, lowest, highest, left_out, max_code
            )
        cuda.syncthreads()
        total = totals[np.uint32(0), thread]
        gain_low = total - totals[np.uint32(1), thread]
        gain_high = total - totals[np.uint32(2), thread]
        return kept_range(
            weights,
            first,
            lane,
            count,
            diagonal,
            j,
            found,
            gain_low,
            gain_high,
            threshold,
            max_code,
        )

    return range_of


def store_function(width: int) -> Any:
    """store(...): keep this row's of the statistics [width] of a tile -> what it decodes to."""
    tile_rows = np.uint32(width)

    @cuda.jit(device=True)
    def store(statistics, rows, bits, block_rows, codes, steps, bases, values, stores):
        lane, first = np.uint32(cuda.threadIdx.x), np.uint32(cuda.blockIdx.x * tile_rows)
        row = np.uint32(first + lane)
        if bits == UNQUANTIZED_BITS:
            decoded = round_through_half(statistics[lane])
            if stores:
                values[row] = float_to_half(decoded)
            return decoded
        begin = np.uint32(lane - lane % block_rows)
        end = min(np.uint32(begin + block_rows), np.uint32(rows - first))
        low = high = statistics[begin]
        for other in range(np.uint32(begin + 1), end):
            low = min(low, statistics[other])
            high = max(high, statistics[other])
        max_code = np.float32((1 << bits) - 1)
        step, base = second_level(low, high, max_code)
        code = statistic_code(statistics[lane], step, base, max_code)
        if stores:
            codes[row] = np.uint8(code)
            if lane == begin:
                steps[np.uint32(row // block_rows)] = float_to_half(step)
                bases[np.uint32(row // block_rows)] = float_to_half(base)
        return decoded_statistic(code, step, base)

    return store
