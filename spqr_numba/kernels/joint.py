"""Joint fit: the scales and zeros of a stats block, as codes and statistics that suit each other.

Min-max (fit.py) makes scale and zero bilevel (bilevel.py) each for itself, blind to what that does
to the weights. Here what counts is what the block will cost, each weight T at most, since beyond
that it becomes an outlier:

    cost = sum_ik min(((w_ik - w'_ik) / U_kk)^2, T)

    start     second-level statistics of the min-max fits
    choose    for every row, of all pairs of a scale code and a zero code the one that costs least
    refit     the statistics, all codes held, by least squares over what is no outlier:
              first those of the scales, then those of the zeros
    again     choose, among the 16 pairs around a row's last, and refit, as long as the cost falls,
              three times at most
    check     walk the columns on the grids found and on those of min-max made bilevel, propagating
              errors as columns.py will, and keep the latter where they cost less

The check is for small weights: the cost above knows nothing of the errors that move a weight before
its turn comes. What that adds averages out over many stats blocks, but not over one, and where
inputs correlate strongly it can be several times the rest.

    weights     fp32 [columns, rows]   a group of columns in one stats block, rows fastest
    importance  fp32 [columns]         1 / U_kk^2
    upper       fp32 [b, b]            U from the group's first column on, as far as it is at hand
    scale       fp32 [rows]            in: the min-max fit; out: what its code decodes to
    zero        fp32 [rows]            the same
    *_codes     uint8 [rows]           out
    levels      4 x fp32               step and base of the scales and of the zeros: fp16 values

The cost is that of statistics as they are stored, and a refit that does not lower it is dropped, so
that one that degenerates does no harm. Sums are fp32, over columns, then over rows, each in order.
A refit moves statistics little, so that a search of all pairs behind it finds next to nothing more.
Lanes of a CPU are pairs of codes. Source of the two levels: section 4.2 of arXiv 2306.03078; the
paper fits by min-max.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .bilevel import second_level, statistic_code, storable
from .launch import compiled
from .scalars import FP16_MAX, decoded_statistic, product

__all__ = ["Levels", "choose_reference", "fit_jointly"]

REFITS = 3
WINDOW_BITS = 2  # of either code, in a search around a pair: 4 x 4 pairs
REACH = 64  # columns among which the check propagates: any block of columns holds so many
TO_INTEGER = np.float32(2**23)  # added and taken away, rounds: a GPU has few units for rounding
LEAST_SPREAD = np.float32(1e-3)  # of codes among rows: below it, step and base are one unknown


class Window(NamedTuple):
    """The pairs that a row may choose from: `size` of them, zero codes, 2^zero_bits, fastest."""

    first_scale: Any
    first_zero: Any
    zero_bits: Any
    size: Any


class Levels(NamedTuple):
    """Second-level statistics of one stats block and group."""

    scale_step: Any
    scale_base: Any
    zero_step: Any
    zero_base: Any


def choose_reference(
    weights: np.ndarray, importance: np.ndarray, threshold: float, max_code: int, grids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """NumPy spec of the choice: pair [rows] and its cost [rows]; grids [3, pairs] as below."""
    scale, inverse, zero = grids[:, None, None]  # each [1, 1, pairs]
    codes = np.clip(np.rint(weights[..., None] * inverse + zero), 0, max_code)
    errors = weights[..., None] - scale * (codes - zero)
    terms = np.minimum(errors**2 * importance[:, None, None], np.float32(threshold))
    costs = np.where(grids[0] < 0, np.inf, terms.sum(0))
    return costs.argmin(1), costs.min(1)


@compiled()
def fit_jointly(weights, importance, upper, threshold, scale, zero, scale_codes, zero_codes, bits):
    """The CPU twin; bits are those of a weight's, a scale's and a zero's code. Returns Levels."""
    max_code = np.float32((1 << bits[0]) - 1)
    plain = levels = starting_levels(scale.min(), scale.max(), zero.min(), zero.max(), bits)
    plain_pairs, pairs, other_pairs = np.empty((3, scale.size), np.uint32)
    for row in range(scale.size):
        plain_pairs[row] = plain_pair(scale[row], zero[row], plain, bits)
    plain_grids = grids = grids_of(levels, bits)
    cost = choose(weights, importance, threshold, max_code, grids, bits, True, pairs)
    for _ in range(REFITS):
        moments = moments_of(weights, importance, threshold, max_code, grids, pairs)
        others = refitted(levels, moments, pairs, np.uint32(0), np.uint32(scale.size), bits)
        other_grids = grids_of(others, bits)
        other_pairs[:] = pairs
        other_cost = choose(
            weights, importance, threshold, max_code, other_grids, bits, False, other_pairs
        )
        if not other_cost < cost:
            break
        levels, grids, cost = others, other_grids, other_cost
        pairs, other_pairs = other_pairs, pairs
    cost = walked_cost(weights, importance, upper, threshold, max_code, grids, pairs)
    if (
        walked_cost(weights, importance, upper, threshold, max_code, plain_grids, plain_pairs)
        < cost
    ):
        levels, grids, pairs = plain, plain_grids, plain_pairs
    for row in range(scale.size):
        scale[row], zero[row] = grids[0, pairs[row]], grids[2, pairs[row]]
        scale_codes[row], zero_codes[row] = codes_of_pair(pairs[row], bits)
    return levels


@compiled()
def grids_of(levels, bits):
    """[3, pairs]: scale, 1 / scale and zero of every pair of codes."""
    grids = np.empty((3, 1 << (bits[1] + bits[2])), np.float32)
    for pair in range(grids.shape[1]):
        grids[0, pair], grids[1, pair], grids[2, pair] = grid_of_pair(pair, levels, bits)
    return grids


@compiled()
def choose(weights, importance, threshold, max_code, grids, bits, everywhere, pairs):
    """Make `pairs` the cheapest of every row, the first of equals; returns the sum of costs.

    Of all pairs where `everywhere`, else of those around the one that a row has.
    """
    columns, rows = weights.shape
    costs = np.empty(grids.shape[1], np.float32)
    own = np.empty_like(grids)
    total = np.float32(0)
    for row in range(rows):
        window = whole_window(bits) if everywhere else window_around(pairs[row], bits)
        for i in range(window.size):
            pair = pair_in_window(np.uint32(i), window, bits)
            for part in range(3):
                own[part, i] = grids[part, pair]
            costs[i] = cost_of_nothing(own[0, i])
        for k in range(columns):
            weight, factor = weights[k, row], importance[k]
            for i in range(window.size):
                term = error_term(weight, own[0, i], own[1, i], own[2, i], factor, max_code)[0]
                costs[i] += min(term, threshold)
        best = np.argmin(costs[: window.size])
        pairs[row] = pair_in_window(np.uint32(best), window, bits)
        total += costs[best]
    return total


@compiled()
def moments_of(weights, importance, threshold, max_code, grids, pairs):
    """`row_moments` of every row on the grid of its pair: fp32 [5, rows]."""
    columns, rows = weights.shape
    moments = np.empty((5, rows), np.float32)
    for row in range(rows):
        scale, inverse, zero = grids[0, pairs[row]], grids[1, pairs[row]], grids[2, pairs[row]]
        found = row_moments(
            weights, 0, row, columns, importance, 0, threshold, scale, inverse, zero, max_code
        )
        for i in range(5):
            moments[i, row] = found[i]
    return moments


@compiled()
def walked_cost(weights, importance, upper, threshold, max_code, grids, pairs):
    """What the group costs on the grids of `pairs` where errors are propagated."""
    columns, rows = weights.shape
    scale, inverse, zero = grids[0][pairs], grids[1][pairs], grids[2][pairs]
    weights = weights.copy()
    costs, errors = np.zeros(rows, np.float32), np.empty(rows, np.float32)
    reach = min(columns, REACH, upper.shape[0])
    for k in range(columns):
        column, factor = weights[k], importance[k]
        diagonal = upper[k, k] if k < reach else np.float32(1)
        for row in range(rows):
            term, error, _ = error_term(
                column[row], scale[row], inverse[row], zero[row], factor, max_code
            )
            costs[row] += min(term, threshold)
            errors[row] = error_passed_on(term, threshold, error, diagonal)
        for behind in range(k + 1, reach):
            factor, column = upper[k, behind], weights[behind]
            for row in range(rows):
                column[row] -= product(errors[row], factor)
    total = np.float32(0)
    for row in range(rows):
        total += costs[row]
    return total


# --- Shared with CUDA. The weights of a row are weights[first + k, lane], k < count, and `column`
# is the place of the first in `importance`.


@njit(inline="always")
def starting_levels(low_scale, high_scale, low_zero, high_zero, bits):
    """Levels that span the min-max fits of a stats block."""
    scale_step, scale_base = second_level(low_scale, high_scale, np.float32((1 << bits[1]) - 1))
    zero_step, zero_base = second_level(low_zero, high_zero, np.float32((1 << bits[2]) - 1))
    return Levels(scale_step, scale_base, zero_step, zero_base)


@njit(inline="always")
def plain_pair(scale, zero, levels, bits):
    """The pair of codes nearest to a scale and a zero, each for itself."""
    max_scale, max_zero = np.float32((1 << bits[1]) - 1), np.float32((1 << bits[2]) - 1)
    scale_code = statistic_code(scale, levels.scale_step, levels.scale_base, max_scale)
    zero_code = statistic_code(zero, levels.zero_step, levels.zero_base, max_zero)
    return (np.uint32(scale_code) << np.uint32(bits[2])) | np.uint32(zero_code)


@njit(inline="always")
def whole_window(bits):
    """All pairs of codes."""
    return Window(
        np.uint32(0), np.uint32(0), np.uint32(bits[2]), np.uint32(1 << (bits[1] + bits[2]))
    )


@njit(inline="always")
def window_around(pair, bits):
    """The 4 x 4 pairs around one: from one code below to two above, where there are such."""
    scale_code, zero_code = codes_of_pair(pair, bits)
    return Window(
        first_around(scale_code, bits[1]),
        first_around(zero_code, bits[2]),
        np.uint32(WINDOW_BITS),
        np.uint32(1 << (2 * WINDOW_BITS)),
    )


@njit(inline="always")
def first_around(code, bits):
    """The first of four codes around one, of 2^bits, four at least."""
    return np.uint32(min(max(code, 1) - 1, (1 << bits) - (1 << WINDOW_BITS)))


@njit(inline="always")
def pair_in_window(i, window, bits):
    """The pair i < size of a window; rising with i."""
    scale_code = window.first_scale + (i >> window.zero_bits)
    zero_code = window.first_zero + (i & ((np.uint32(1) << window.zero_bits) - np.uint32(1)))
    return np.uint32((scale_code << np.uint32(bits[2])) | zero_code)


@njit(inline="always")
def error_passed_on(term, threshold, error, diagonal):
    """err of columns.py; next to nothing of it is left where the weight becomes an outlier."""
    return np.float32(0) if term > threshold else error / diagonal


@njit(inline="always")
def codes_of_pair(pair, bits):
    """Scale code and zero code of a pair: zero codes run fastest."""
    return np.uint8(pair >> bits[2]), np.uint8(pair & ((1 << bits[2]) - 1))


@njit(inline="always")
def grid_of_pair(pair, levels, bits):
    """Scale, 1 / scale (0 where there is none) and zero of a pair of codes."""
    scale_code, zero_code = codes_of_pair(pair, bits)
    scale = decoded_statistic(np.float32(scale_code), levels.scale_step, levels.scale_base)
    zero = decoded_statistic(np.float32(zero_code), levels.zero_step, levels.zero_base)
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    return scale, inverse, zero


@njit(inline="always")
def cost_of_nothing(scale):
    """Where a sum of costs begins: no row may choose a scale below 0."""
    return np.float32(np.inf) if scale < np.float32(0) else np.float32(0)


@njit(inline="always")
def error_term(weight, scale, inverse, zero, importance, max_code):
    """((w - w') / U_kk)^2, w - w', and code - zero, of which w' is scale times."""
    code = min(max(product(weight, inverse) + zero, np.float32(0)), max_code)
    step = ((code + TO_INTEGER) - TO_INTEGER) - zero
    error = weight - product(scale, step)
    return product(product(error, error), importance), error, step


@njit
def row_moments(
    weights, first, lane, count, importance, column, threshold, scale, inverse, zero, max_code
):
    """Sums of v, v x, v x^2, v e and v x e: v = 1 / U_kk^2, x = code - zero, e = w - w'."""
    v = vx = vxx = ve = vxe = np.float32(0)
    for k in range(count):
        weight, factor = weights[np.uint32(first + k), lane], importance[np.uint32(column + k)]
        term, error, step = error_term(weight, scale, inverse, zero, factor, max_code)
        if not term > threshold:
            v += factor
            vx += product(factor, step)
            vxx += product(product(factor, step), step)
            ve += product(factor, error)
            vxe += product(product(factor, step), error)
    return v, vx, vxx, ve, vxe


@njit
def refitted(levels, moments, pairs, first, last, bits):
    """Levels that fit rows first ... last - 1 best while all their codes stay.

    Another scale, by d, makes e - d x of an error e; another zero makes e + scale d of it.
    """
    sums = Sums(*NO_SUMS)
    row = first
    while row < last:
        code = np.float32(codes_of_pair(pairs[row], bits)[0])
        sums = with_row(sums, code, moments[2, row], moments[4, row])
        row = np.uint32(row + 1)
    step, base = moved(levels.scale_step, levels.scale_base, sums)
    sums = Sums(*NO_SUMS)
    row = first
    while row < last:
        scale_code, zero_code = codes_of_pair(pairs[row], bits)
        code = np.float32(scale_code)
        scale = decoded_statistic(code, step, base)
        change = scale - decoded_statistic(code, levels.scale_step, levels.scale_base)
        error = moments[3, row] - product(change, moments[1, row])
        square = product(product(scale, scale), moments[0, row])
        sums = with_row(sums, np.float32(zero_code), square, -product(scale, error))
        row = np.uint32(row + 1)
    return Levels(step, base, *moved(levels.zero_step, levels.zero_base, sums))


class Sums(NamedTuple):
    """Of the normal equations of a line through codes c: sums of a, a c, a c^2, b and b c."""

    a: Any
    ac: Any
    acc: Any
    b: Any
    bc: Any


NO_SUMS = (np.float32(0),) * 5


@njit(inline="always")
def with_row(sums, code, a, b):
    """The sums with one more row."""
    ac = product(a, code)
    return Sums(
        sums.a + a,
        sums.ac + ac,
        sums.acc + product(ac, code),
        sums.b + b,
        sums.bc + product(b, code),
    )


@njit(inline="always")
def moved(step, base, sums):
    """Step and base after the change that solves the normal equations, as they can be stored."""
    if not sums.a > np.float32(0):
        return step, base
    mean, more_step = sums.ac / sums.a, np.float32(0)
    spread = sums.acc - product(mean, sums.ac)
    if spread > product(LEAST_SPREAD, sums.acc):
        more_step = (sums.bc - product(mean, sums.b)) / spread
    more_base = sums.b / sums.a - product(mean, more_step)
    if not abs(more_step) + abs(more_base) < FP16_MAX:
        return step, base
    return storable(step + more_step, base + more_base)
