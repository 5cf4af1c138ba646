"""Fit: the scale and zero of one group of columns, for every row, by min-max without outliers.

    scale = (max - min) / (2^bits - 1),   zero = -min / scale,   code = clamp(round(w/scale + zero))

A weight is left out where the group's error falls by more than T when it is (leave-one-out,
section 4.2 of arXiv 2306.03078): base - loo_j > T with base = sum_k ((w_k - w'_k) / U_kk)^2 and
loo_j the same sum over k != j on a grid fitted without w_j. Leaving out j changes the grid only
where j is the group's one minimum or one maximum; for all others base - loo_j is j's own term, so
three grids a row say everything.

    weights    fp32 [columns, rows]   a group, rows fastest
    diagonal   fp32 [columns]         U_kk
    scale      fp32 [rows]            out
    zero       fp32 [rows]            out

A group whose zero would pass 2048, up to where fp16 tells integers apart, has no spread to speak
of: its range is taken from 0 to its value of the largest magnitude, and a group of zeros gets
scale 0, which every kernel decodes to exact zeros.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .launch import compiled
from .scalars import ZERO_LIMIT, code_of, product, weight_of

__all__ = ["error_sum", "extremes", "fit_group", "fit_reference", "grid_of", "kept_range"]


def fit_reference(
    weights: np.ndarray, diagonal: np.ndarray, threshold: float, max_code: int
) -> tuple[np.ndarray, np.ndarray]:
    """NumPy spec: weights [columns, rows] -> scale [rows], zero [rows], float32."""
    kept = np.ones(weights.shape, bool)
    if np.isfinite(threshold):
        error = group_error_reference(weights, weights, diagonal, max_code)
        for j in range(len(weights)):
            others = np.delete(weights, j, 0)
            left = group_error_reference(others, others, np.delete(diagonal, j), max_code)
            kept[j] = ~(error - left > threshold)
    low = np.where(kept, weights, np.inf).min(0)
    high = np.where(kept, weights, -np.inf).max(0)
    nothing_kept = ~kept.any(0)
    return grid_reference(np.where(nothing_kept, 0, low), np.where(nothing_kept, 0, high), max_code)


def group_error_reference(
    weights: np.ndarray, fitted_on: np.ndarray, diagonal: np.ndarray, max_code: int
) -> np.ndarray:
    """sum_k ((w_k - w'_k) / U_kk)^2 of each row, on the grid that min-max fits."""
    if not len(weights):
        return np.zeros(weights.shape[1], np.float32)
    scale, zero = grid_reference(fitted_on.min(0), fitted_on.max(0), max_code)
    safe = np.where(scale > 0, scale, 1)
    codes = np.clip(np.rint(weights / safe + zero), 0, max_code) * (scale > 0)
    return (((weights - scale * (codes - zero)) / diagonal[:, None]) ** 2).sum(0)


def grid_reference(
    low: np.ndarray, high: np.ndarray, max_code: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of the range [low, high] of each row."""
    no_spread = ~((high - low) * ZERO_LIMIT > np.abs(low) * np.float32(max_code))
    largest = np.where(np.abs(high) >= np.abs(low), high, low)
    low = np.where(no_spread, np.minimum(largest, 0), low).astype(np.float32)
    high = np.where(no_spread, np.maximum(largest, 0), high).astype(np.float32)
    scale = (high - low) / np.float32(max_code)
    return scale, np.where(scale > 0, -low / np.where(scale > 0, scale, 1), 0).astype(np.float32)


@njit(inline="always")
def grid_of(low, high, max_code):
    """Scale and zero (float32) of the range [low, high]."""
    if not (high - low) * ZERO_LIMIT > abs(low) * max_code:
        largest = high if abs(high) >= abs(low) else low
        low = min(largest, np.float32(0))
        high = max(largest, np.float32(0))
    scale = (high - low) / max_code
    return scale, (-low / scale if scale > np.float32(0) else np.float32(0))


@njit(inline="always")
def error_term(weight, scale, zero, diagonal, max_code):
    """((w - w') / U_kk)^2 of one weight."""
    code = code_of(weight, scale, zero, max_code)
    error = (weight - weight_of(code, scale, zero)) / diagonal
    return product(error, error)


@compiled()
def fit_group(weights, diagonal, threshold, max_code, scale, zero):
    """The CPU twin of `fit_reference`; threshold inf leaves nothing out."""
    if threshold < np.float32(np.inf):
        kept_low, kept_high = range_without_outliers(weights, diagonal, threshold, max_code)
    else:
        kept_low, kept_high = range_of(weights)
    for row in range(scale.size):
        scale[row], zero[row] = grid_of(kept_low[row], kept_high[row], max_code)


@compiled()
def range_of(weights):
    """Minimum and maximum of each row."""
    low, high = weights[0].copy(), weights[0].copy()
    for k in range(1, weights.shape[0]):
        for row in range(low.size):
            low[row] = min(low[row], weights[k, row])
            high[row] = max(high[row], weights[k, row])
    return low, high


@compiled()
def range_without_outliers(weights, diagonal, threshold, max_code):
    """Minimum and maximum of each row over the weights that leave-one-out keeps."""
    low, low_at, next_low = two_smallest(weights, np.float32(1))
    high, high_at, next_high = two_smallest(weights, np.float32(-1))
    columns, rows = weights.shape
    own = np.empty((columns, rows), np.float32)
    for k in range(columns):
        error_terms(weights[k], low, high, diagonal[k], max_code, own[k])
    without_low = error_without(weights, next_low, high, low_at, diagonal, max_code)
    without_high = error_without(weights, low, next_high, high_at, diagonal, max_code)
    base = np.zeros(rows, np.float32)
    for k in range(columns):
        for row in range(rows):
            base[row] += own[k, row]
    kept_low = np.full(rows, np.inf, np.float32)
    kept_high = np.full(rows, -np.inf, np.float32)
    for k in range(columns):
        for row in range(rows):
            gain = own[k, row]
            if k == low_at[row]:
                gain = base[row] - without_low[row]
            elif k == high_at[row]:
                gain = base[row] - without_high[row]
            if not gain > threshold:
                kept_low[row] = min(kept_low[row], weights[k, row])
                kept_high[row] = max(kept_high[row], weights[k, row])
    for row in range(rows):
        if kept_low[row] > kept_high[row]:
            kept_low[row] = kept_high[row] = np.float32(0)
    return kept_low, kept_high


@compiled()
def two_smallest(weights, sign):
    """Smallest sign * weight of each row, its column and the next one (each times sign again)."""
    columns, rows = weights.shape
    least = np.full(rows, np.inf, np.float32)
    following = np.full(rows, np.inf, np.float32)
    column = np.zeros(rows, np.int32)
    for k in range(columns):
        for row in range(rows):
            value = sign * weights[k, row]
            smaller = value < least[row]
            following[row] = least[row] if smaller else min(following[row], value)
            column[row] = np.int32(k) if smaller else column[row]
            least[row] = value if smaller else least[row]
    for row in range(rows):
        least[row], following[row] = sign * least[row], sign * following[row]
        if columns == 1:
            following[row] = least[row]
    return least, column, following


@compiled()
def error_terms(weights, low, high, diagonal, max_code, terms):
    """((w - w') / U_kk)^2 of one column on the grids of [low, high]."""
    for row in range(terms.size):
        scale, zero = grid_of(low[row], high[row], max_code)
        terms[row] = error_term(weights[row], scale, zero, diagonal, max_code)


@compiled()
def error_without(weights, low, high, left_out, diagonal, max_code):
    """sum of the error terms of each row without its column left_out[row]."""
    columns, rows = weights.shape
    total = np.zeros(rows, np.float32)
    terms = np.empty(rows, np.float32)
    for k in range(columns):
        error_terms(weights[k], low, high, diagonal[k], max_code, terms)
        for row in range(rows):
            total[row] += np.float32(0) if k == left_out[row] else terms[row]
    return total


# --- CUDA: one row a thread. The group's weights are weights[first + k, lane], k < count, and
# `column` is the first one's place in `diagonal`. Sums run over the same terms in the same order
# as on a CPU, so the two agree to the last bit.


@njit
def extremes(weights, first, lane, count):
    """(low, its k, next low, high, its k, next high) of one row's group."""
    low = next_low = np.float32(np.inf)
    high = next_high = np.float32(-np.inf)
    low_at = high_at = np.uint32(0)
    for k in range(count):
        weight = weights[np.uint32(first + k), lane]
        if weight < low:
            next_low, low, low_at = low, weight, np.uint32(k)
        else:
            next_low = min(next_low, weight)
        if weight > high:
            next_high, high, high_at = high, weight, np.uint32(k)
        else:
            next_high = max(next_high, weight)
    if count == 1:
        next_low = next_high = low
    return low, low_at, next_low, high, high_at, next_high


@njit
def error_sum(weights, first, lane, count, diagonal, column, low, high, left_out, max_code):
    """Error of the group on the grid of [low, high], without its weight k = left_out < count."""
    scale, zero = grid_of(low, high, max_code)
    total = np.float32(0)
    for k in range(count):
        if k != left_out:
            weight = weights[np.uint32(first + k), lane]
            total += error_term(weight, scale, zero, diagonal[np.uint32(column + k)], max_code)
    return total


@njit
def kept_range(
    weights, first, lane, count, diagonal, column, found, gain_low, gain_high, threshold, max_code
):
    """Minimum and maximum over what is kept; gain_low, gain_high are those of the extremes."""
    low, low_at, _, high, high_at, _ = found
    scale, zero = grid_of(low, high, max_code)
    kept_low, kept_high = np.float32(np.inf), np.float32(-np.inf)
    for k in range(count):
        weight = weights[np.uint32(first + k), lane]
        if k == low_at:
            gain = gain_low
        elif k == high_at:
            gain = gain_high
        else:
            gain = error_term(weight, scale, zero, diagonal[np.uint32(column + k)], max_code)
        if not gain > threshold:
            kept_low = min(kept_low, weight)
            kept_high = max(kept_high, weight)
    if kept_low > kept_high:
        return np.float32(0), np.float32(0)
    return kept_low, kept_high
