"""Bilevel statistics: the scales (or zeros) of a stats block become codes of a few bits.

    base = fp16(min),  step = fp16((max - min) / (2^bits - 1)),  code = round((s - base) / step)

    statistics  fp32 [rows]   in: scales (or zeros) of one group; out: what their codes decode to
    codes       uint8 [rows]  out
    step, base  fp16 bits     returned, one each a stats block

On a GPU each thread of a stats block finds step and base for itself (columns.py).
Everything after uses the decoded statistics, so what is fitted is what is stored. Of step and base
the smaller is dropped where it could not matter: then decoding is exact up to its last rounding on
every backend (format/layout.py). Source: section 4.2 of arXiv 2306.03078.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .launch import compiled
from .scalars import decoded_statistic, float_to_half, round_through_half, round_to_even

__all__ = ["bilevel_reference", "quantize_statistics", "second_level", "statistic_code", "storable"]

STEP_BELOW_BASE = np.float32(2.0**-12)
BASE_BELOW_STEP = np.float32(2.0**-8)


def bilevel_reference(
    statistics: np.ndarray, bits: int
) -> tuple[np.ndarray, np.float16, np.float16, np.ndarray]:
    """NumPy spec of one stats block: fp32 [rows] -> codes [rows], step, base, decoded [rows]."""
    low, high = statistics.min(), statistics.max()
    base = low.astype(np.float16)
    step = ((high - low) / np.float32(2**bits - 1)).astype(np.float16)
    if step < STEP_BELOW_BASE * abs(np.float32(base)):
        step = np.float16(0)
    elif abs(np.float32(base)) < BASE_BELOW_STEP * np.float32(step):
        base = np.float16(0)
    codes = np.zeros(statistics.shape, np.float32)
    if step > 0:
        positions = (statistics - np.float32(base)) / np.float32(step)
        codes = np.clip(np.rint(positions), 0, 2**bits - 1)
    decoded = (codes.astype(np.float64) * np.float64(step) + np.float64(base)).astype(np.float32)
    return codes.astype(np.uint8), step, base, decoded.astype(np.float16).astype(np.float32)


@compiled()
def quantize_statistics(statistics, bits, codes):
    """The CPU twin: codes filled, statistics replaced by what they decode to; fp16 (step, base)."""
    max_code = np.float32((1 << bits) - 1)
    low = high = statistics[0]
    for row in range(1, statistics.size):
        low = min(low, statistics[row])
        high = max(high, statistics[row])
    step, base = second_level(low, high, max_code)
    for row in range(statistics.size):
        code = statistic_code(statistics[row], step, base, max_code)
        codes[row] = np.uint8(code)
        statistics[row] = decoded_statistic(code, step, base)
    return float_to_half(step), float_to_half(base)


@njit(inline="always")
def second_level(low, high, max_code):
    """Step and base (float32 values of fp16 numbers) of statistics in [low, high]."""
    return storable((high - low) / max_code, low)


@njit(inline="always")
def storable(step, base):
    """Step and base rounded to fp16, without the smaller where it could not matter."""
    step, base = round_through_half(step), round_through_half(base)
    if step < STEP_BELOW_BASE * abs(base):
        step = np.float32(0)
    elif abs(base) < BASE_BELOW_STEP * step:
        base = np.float32(0)
    return step, base


@njit(inline="always")
def statistic_code(statistic, step, base, max_code):
    """The code (as float32) whose value is nearest to a statistic."""
    if not step > np.float32(0):
        return np.float32(0)
    return min(max(round_to_even((statistic - base) / step), np.float32(0)), max_code)
