"""The joint fit on a GPU: the CUDA twin of joint.py, a device function of columns_cuda.py.

A block of threads holds one tile of rows, that is one stats block or several: threadIdx.x is the
row in the tile (`lane`), and the threads of one row (threadIdx.y, `part`) share the pairs of codes
between them. In shared memory:

    part_costs  fp32 [parts, width]     of the cheapest pair that each part found
    part_pairs  uint32 [parts, width]   and that pair
    costs       fp32 [width]            of the pair that each row takes
    pairs       uint32 [width]
    moments     fp32 [5, width]         what a refit knows of each row
    walked      fp32 [2, width]         costs of the check: of what was found, of min-max

Sums run over the same terms in the same order as on a CPU, and the threads of a stats block all
come to the same statistics from the same numbers. Barriers wait for all threads, so a stats block
whose refit was dropped tries it again, and drops it again, while the others of its tile go on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .joint import (
    REACH,
    REFITS,
    codes_of_pair,
    cost_of_nothing,
    error_passed_on,
    error_term,
    grid_of_pair,
    pair_in_window,
    plain_pair,
    refitted,
    row_moments,
    starting_levels,
    whole_window,
    window_around,
)
from .launch import numba_cuda
from .scalars import float_to_half, product

__all__ = ["joint_function"]

cuda = numba_cuda()

MOMENTS = np.uint32(5)
FOUR = np.uint32(4)
SEARCHES = REFITS + 1


def joint_function(width: int, parts: int) -> Any:
    """fit_jointly(...) -> scale, zero of this thread's row; codes and levels are stored.

    The group is weights[first + k, column], k < count, from column j of the weight on. scales and
    zeros [width] are the min-max fits of the tile's rows, rows the number of those there are.
    """
    choose, remember = choose_function(width, parts), remember_function()
    plain_is_cheaper, store = check_function(width), store_function(width)

    @cuda.jit(device=True)
    def fit_jointly(
        loop, weights, upper, first, column, j, count, group, settings, scales, zeros, rows, stop,
        stores,
    ):  # fmt: skip
        moments = cuda.shared.array((5, width), np.float32)
        pairs = cuda.shared.array(width, np.uint32)
        block_rows = np.uint32(settings.stats_group_size)
        lane = np.uint32(cuda.threadIdx.x)
        begin = np.uint32(lane - lane % block_rows)
        end = min(np.uint32(begin + block_rows), rows)
        bits = settings.bits, settings.scale_bits, settings.zero_bits
        importance, threshold = loop.importance, settings.threshold
        low_scale, high_scale = bounds(scales, begin, end)
        low_zero, high_zero = bounds(zeros, begin, end)
        plain = levels = starting_levels(low_scale, high_scale, low_zero, high_zero, bits)
        pair_of_plain = plain_pair(scales[lane], zeros[lane], plain, bits)
        others, cost, pair = levels, np.float32(np.inf), pair_of_plain
        for refits in range(SEARCHES):  # one `choose` for all: two would not fit the cache
            first_search = refits == 0
            window = whole_window(bits) if first_search else window_around(pair, bits)
            other_cost, other_pair = choose(
                weights, first, column, j, count, importance, threshold, others, bits, window,
                begin, end,
            )  # fmt: skip
            if first_search or other_cost < cost:
                levels, cost, pair = others, other_cost, other_pair
            if refits < REFITS:
                remember(
                    weights, first, column, j, count, importance, threshold, levels, bits, pair,
                    moments, pairs,
                )  # fmt: skip
                others = refitted(levels, moments, pairs, begin, end, bits)
        # Without U nothing is propagated: 0 - j would be a large unsigned number.
        known = max(np.uint32(j), min(np.uint32(stop), np.uint32(upper.shape[0])))
        reach = min(count, np.uint32(REACH), np.uint32(known - j))
        found = grid_of_pair(pair, levels, bits)
        of_plain = grid_of_pair(pair_of_plain, plain, bits)
        if plain_is_cheaper(
            loop, weights, upper, first, column, j, count, reach, threshold, found, of_plain, bits,
            begin, end, stores,
        ):  # fmt: skip
            levels, pair = plain, pair_of_plain
        if stores:
            store(loop, group, pair, levels, bits, block_rows)
        scale, _, zero = grid_of_pair(pair, levels, bits)
        return scale, zero

    return fit_jointly


@cuda.jit(device=True)
def bounds(statistics, begin, end):
    """Least and greatest of statistics[begin ... end - 1]."""
    low = high = statistics[begin]
    row = np.uint32(begin + 1)
    while row < end:
        low = min(low, statistics[row])
        high = max(high, statistics[row])
        row = np.uint32(row + 1)
    return low, high


@cuda.jit(device=True)
def sum_of(numbers, begin, end):
    """numbers[begin] + ... + numbers[end - 1], in order."""
    total, row = np.float32(0), begin
    while row < end:
        total += numbers[row]
        row = np.uint32(row + 1)
    return total


def choose_function(width: int, parts: int) -> Any:
    """choose(...) -> what the stats block begin ... end - 1 costs, and the pair of this row."""
    part_of, stride = cheapest_function(parts), np.uint32(parts)

    @cuda.jit(device=True)
    def choose(
        weights, first, column, j, count, importance, threshold, levels, bits, window, begin, end
    ):
        part_costs = cuda.shared.array((parts, width), np.float32)
        part_pairs = cuda.shared.array((parts, width), np.uint32)
        costs = cuda.shared.array(width, np.float32)
        lane, part = np.uint32(cuda.threadIdx.x), np.uint32(cuda.threadIdx.y)
        best, best_pair = part_of(
            weights, first, column, j, count, importance, threshold, levels, bits, window
        )
        part_costs[part, lane] = best
        part_pairs[part, lane] = best_pair
        cuda.syncthreads()
        best, best_pair = part_costs[np.uint32(0), lane], part_pairs[np.uint32(0), lane]
        for other in range(np.uint32(1), stride):
            cost, pair = part_costs[other, lane], part_pairs[other, lane]
            if cost < best or (cost == best and pair < best_pair):
                best, best_pair = cost, pair
        costs[lane] = best
        cuda.syncthreads()
        return sum_of(costs, begin, end), best_pair

    return choose


def cheapest_function(parts: int) -> Any:
    """cheapest(...) -> the least cost of this row among the pairs of this part, and its pair.

    Pairs part, part + parts, ... of the window are tried four at once: one sum alone would wait for
    its own adds.
    """
    stride = np.uint32(parts)

    @cuda.jit(device=True)
    def cheapest(weights, first, column, j, count, importance, threshold, levels, bits, window):
        part = np.uint32(cuda.threadIdx.y)
        max_code = np.float32((1 << bits[0]) - 1)
        best, best_pair = np.float32(np.inf), pair_in_window(part, window, bits)
        for first_of_four in range(part, window.size, FOUR * stride):
            at_one = np.uint32(first_of_four)
            at_two = np.uint32(at_one + stride)
            at_three = np.uint32(at_two + stride)
            at_four = np.uint32(at_three + stride)
            one = pair_in_window(at_one, window, bits)
            two = pair_in_window(at_two, window, bits)
            three = pair_in_window(at_three, window, bits)
            four = pair_in_window(at_four, window, bits)
            grid_one = grid_of_pair(one, levels, bits)
            grid_two = grid_of_pair(two, levels, bits)
            grid_three = grid_of_pair(three, levels, bits)
            grid_four = grid_of_pair(four, levels, bits)
            cost_one = cost_at_first(at_one, window.size, grid_one)
            cost_two = cost_at_first(at_two, window.size, grid_two)
            cost_three = cost_at_first(at_three, window.size, grid_three)
            cost_four = cost_at_first(at_four, window.size, grid_four)
            k = np.uint32(0)
            while k < count:  # not range, whose steps libNVVM does not see through
                weight = weights[np.uint32(first + k), column]
                factor = importance[np.uint32(j + k)]
                cost_one += capped(weight, grid_one, factor, threshold, max_code)
                cost_two += capped(weight, grid_two, factor, threshold, max_code)
                cost_three += capped(weight, grid_three, factor, threshold, max_code)
                cost_four += capped(weight, grid_four, factor, threshold, max_code)
                k = np.uint32(k + 1)
            best, best_pair = cheaper(best, best_pair, cost_one, one)
            best, best_pair = cheaper(best, best_pair, cost_two, two)
            best, best_pair = cheaper(best, best_pair, cost_three, three)
            best, best_pair = cheaper(best, best_pair, cost_four, four)
        return best, best_pair

    return cheapest


@cuda.jit(device=True)
def cost_at_first(at, size, grid):
    """Where the sum of a pair begins; one beyond a window's last never gets cheap."""
    return cost_of_nothing(grid[0]) if at < size else np.float32(np.inf)


@cuda.jit(device=True)
def capped(weight, grid, importance, threshold, max_code):
    """What one weight adds to the cost of a grid."""
    scale, inverse, zero = grid
    return min(error_term(weight, scale, inverse, zero, importance, max_code)[0], threshold)


@cuda.jit(device=True)
def cheaper(best, best_pair, cost, pair):
    """The cheaper of two, the first of equals."""
    return (cost, pair) if cost < best else (best, best_pair)


def remember_function() -> Any:
    """remember(...): fill moments [5, width] and pairs [width] for a refit."""

    @cuda.jit(device=True)
    def remember(
        weights, first, column, j, count, importance, threshold, levels, bits, pair, moments, pairs
    ):
        lane = np.uint32(cuda.threadIdx.x)
        if cuda.threadIdx.y == 0:
            scale, inverse, zero = grid_of_pair(pair, levels, bits)
            max_code = np.float32((1 << bits[0]) - 1)
            found = row_moments(
                weights, first, column, count, importance, j, threshold, scale, inverse, zero,
                max_code,
            )  # fmt: skip
            for i in range(MOMENTS):
                moments[i, lane] = found[i]
            pairs[lane] = pair
        cuda.syncthreads()

    return remember


def check_function(width: int) -> Any:
    """plain_is_cheaper(...): of the stats block begin ... end - 1, errors propagated.

    found and plain are the grids of this thread's row; part 0 walks both.
    """

    @cuda.jit(device=True)
    def plain_is_cheaper(
        loop, weights, upper, first, column, j, count, reach, threshold, found, plain, bits, begin,
        end, stores,
    ):  # fmt: skip
        walked = cuda.shared.array((2, width), np.float32)
        lane, max_code = np.uint32(cuda.threadIdx.x), np.float32((1 << bits[0]) - 1)
        if stores:
            walked[np.uint32(0), lane] = walked_cost(
                loop, weights, upper, first, column, j, count, reach, threshold, found, max_code
            )
            walked[np.uint32(1), lane] = walked_cost(
                loop, weights, upper, first, column, j, count, reach, threshold, plain, max_code
            )
        cuda.syncthreads()
        cost = sum_of(walked[np.uint32(0)], begin, end)
        cost_of_plain = sum_of(walked[np.uint32(1)], begin, end)
        cuda.syncthreads()
        return cost_of_plain < cost

    return plain_is_cheaper


@cuda.jit(device=True)
def walked_cost(
    loop, weights, upper, first, column, j, count, reach, threshold, grid, max_code
):  # fmt: skip
    """What the group costs this row on a grid where errors are propagated among `reach` columns.

    `errors` of the group's columns is scratch until they are quantized.
    """
    scale, inverse, zero = grid
    row = np.uint32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
    cost = np.float32(0)
    for k in range(count):
        at = np.uint32(j + k)
        weight = weights[np.uint32(first + k), column]
        if k < reach:
            before = np.uint32(j)
            while before < at:
                weight -= product(loop.errors[before, row], upper[before, at])
                before = np.uint32(before + 1)
        term, error, _ = error_term(weight, scale, inverse, zero, loop.importance[at], max_code)
        cost += min(term, threshold)
        if k < reach:
            loop.errors[at, row] = error_passed_on(term, threshold, error, upper[at, at])
    return cost


def store_function(width: int) -> Any:
    """store(...): keep the codes of this row and the levels of its stats block."""

    @cuda.jit(device=True)
    def store(loop, group, pair, levels, bits, block_rows):
        lane = np.uint32(cuda.threadIdx.x)
        row = np.uint32(cuda.blockIdx.x * np.uint32(width) + lane)
        scale_code, zero_code = codes_of_pair(pair, bits)
        loop.scale_codes[group, row] = scale_code
        loop.zero_codes[group, row] = zero_code
        if lane % block_rows == 0:
            block = np.uint32(row // block_rows)
            loop.scale_step[group, block] = float_to_half(levels.scale_step)
            loop.scale_base[group, block] = float_to_half(levels.scale_base)
            loop.zero_step[group, block] = float_to_half(levels.zero_step)
            loop.zero_base[group, block] = float_to_half(levels.zero_base)

    return store
