"""Compressed buffers to numbers on a CPU, eight rows at a time: what dequantize and matmul share.

    Buffers                                            NumPy view that kernels see, all flat
    codes               words of the weight codes      uint32 [chunks, bits, m]
    scale_values        words of statistics codes      uint32 [groups, row_chunks, bits]
    and zero_values     or, not quantized, fp16 bits   uint16 [groups, m]
    *_step, *_base      second level, fp16 bits        uint16 [groups, stats_groups]
    outlier_*           CSR; values as fp16 bits       int32, uint16 or int32, uint16
    permutation         empty if identity              uint16 or int32 [n]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import njit

from ..format.layout import CODES_PER_CHUNK, UNQUANTIZED_BITS
from ..format.matrix import SpqrMatrix
from .scalars import decoded_statistic, half_to_float
from .simd import (
    load_halves,
    load_window,
    multiply_add,
    round_to_half,
    splat,
    spread_codes,
)

__all__ = [
    "Buffers",
    "buffers_of",
    "scales_in",
    "statistic_decoders",
    "weight_code",
    "zeros_in",
]


class Statistic(NamedTuple):
    """The scales or the zeros of a matrix."""

    values: np.ndarray
    step: np.ndarray
    base: np.ndarray
    rows: int
    groups: int
    stats_groups: int
    stats_shift: int


class Buffers(NamedTuple):
    """NumPy views of a matrix's tensors, and its sizes (flat: parallel loops take no nesting)."""

    codes: np.ndarray
    scale_values: np.ndarray
    scale_step: np.ndarray
    scale_base: np.ndarray
    zero_values: np.ndarray
    zero_step: np.ndarray
    zero_base: np.ndarray
    outlier_row_offsets: np.ndarray
    outlier_columns: np.ndarray
    outlier_values: np.ndarray
    permutation: np.ndarray
    rows: int
    columns: int
    groups: int
    group_size: int
    stats_groups: int
    stats_shift: int  # log2 of stats_group_size: a division would cost as much as eight weights


_VIEWS: WeakKeyDictionary[SpqrMatrix, Buffers] = WeakKeyDictionary()


def buffers_of(matrix: SpqrMatrix) -> Buffers:
    """The views of a matrix on the CPU; made once, they share its memory."""
    if matrix not in _VIEWS:
        _VIEWS[matrix] = _make_views(matrix)
    return _VIEWS[matrix]


def _make_views(matrix: SpqrMatrix) -> Buffers:
    spec = matrix.spec
    return Buffers(
        _view(matrix, "codes", np.uint32),
        *_statistic_views(matrix, "scale", spec.scale_bits),
        *_statistic_views(matrix, "zero", spec.zero_bits),
        *_outlier_views(matrix),
        _index_view(matrix, "permutation"),
        spec.out_features,
        spec.in_features,
        spec.groups,
        spec.group_size,
        spec.stats_groups,
        spec.stats_group_size.bit_length() - 1,
    )


def _view(matrix: SpqrMatrix, name: str, dtype: type) -> np.ndarray:
    tensor = matrix[name].reshape(-1)
    if tensor.dtype == torch.float16:
        tensor = tensor.view(torch.int16)
    return tensor.numpy().view(dtype)


def _statistic_views(matrix: SpqrMatrix, name: str, bits: int) -> tuple[np.ndarray, ...]:
    if bits == UNQUANTIZED_BITS:
        empty = np.empty(0, np.uint16)
        return _view(matrix, f"{name}s", np.uint16), empty, empty
    return (
        _view(matrix, f"{name}_codes", np.uint32),
        _view(matrix, f"{name}_scale", np.uint16),
        _view(matrix, f"{name}_zero", np.uint16),
    )


def _outlier_views(matrix: SpqrMatrix) -> tuple[np.ndarray, ...]:
    if matrix.outliers is None:
        offsets = np.zeros(matrix.spec.out_features + 1, np.int32)
        return offsets, np.empty(0, np.uint16), np.empty(0, np.uint16)
    return (
        _view(matrix, "outlier_row_offsets", np.int32),
        _index_view(matrix, "outlier_columns"),
        _view(matrix, "outlier_values", np.uint16),
    )


def _index_view(matrix: SpqrMatrix, name: str) -> np.ndarray:
    if name not in matrix.tensors:
        return np.empty(0, np.uint16)
    return _view(matrix, name, np.uint16 if matrix[name].dtype == torch.uint16 else np.int32)


@njit(inline="always")
def scales_in(buffers):
    """The scales of a matrix, for `statistic_decoders`."""
    return Statistic(
        buffers.scale_values,
        buffers.scale_step,
        buffers.scale_base,
        buffers.rows,
        buffers.groups,
        buffers.stats_groups,
        buffers.stats_shift,
    )


@njit(inline="always")
def zeros_in(buffers):
    """The zeros of a matrix, for `statistic_decoders`."""
    return Statistic(
        buffers.zero_values,
        buffers.zero_step,
        buffers.zero_base,
        buffers.rows,
        buffers.groups,
        buffers.stats_groups,
        buffers.stats_shift,
    )


@njit(inline="always")
def packed_code(words, bits, first, stride, k):
    """Code k of a chunk whose words lie at first, first + stride, ..., as float32."""
    word, shift = divmod(k * bits, 32)
    field = np.uint64(words[first + word * stride])
    if shift + bits > 32:
        field |= np.uint64(words[first + (word + 1) * stride]) << np.uint64(32)
    return np.float32((field >> np.uint64(shift)) & np.uint64((1 << bits) - 1))


@njit(inline="always")
def weight_code(buffers, bits, column, row):
    """The code of one weight, as float32."""
    chunk, k = divmod(column, CODES_PER_CHUNK)
    return packed_code(buffers.codes, bits, chunk * bits * buffers.rows + row, buffers.rows, k)


@cache
def statistic_decoders(bits: int) -> tuple[Callable, Callable]:
    """Two `njit` functions that decode a scale or zero of `bits` bits.

    Both take (Statistic, group, row); the first returns the statistic of one row as float32, the
    second those of eight rows from `row` (a multiple of 8) on as F32x8.
    """
    if bits == UNQUANTIZED_BITS:
        return _stored_statistic, _stored_statistics
    spread = spread_codes(bits)

    @njit(inline="always")
    def one_row(statistic, group, row):
        at = group * statistic.stats_groups + (row >> statistic.stats_shift)
        chunk, k = divmod(row, CODES_PER_CHUNK)
        first = (group * row_chunks(statistic.rows) + chunk) * bits
        code = packed_code(statistic.values, bits, first, 1, k)
        return decoded_statistic(
            code, half_to_float(statistic.step[at]), half_to_float(statistic.base[at])
        )

    @njit(inline="always")
    def eight_rows(statistic, group, row):
        at = group * statistic.stats_groups + (row >> statistic.stats_shift)
        byte = (group * row_chunks(statistic.rows) * 32 + row) * bits // 8
        code = spread(load_window(statistic.values, byte))
        step = splat(half_to_float(statistic.step[at]))
        return round_to_half(multiply_add(code, step, splat(half_to_float(statistic.base[at]))))

    return one_row, eight_rows


@njit(inline="always")
def _stored_statistic(statistic, group, row):
    return half_to_float(statistic.values[group * statistic.rows + row])


@njit(inline="always")
def _stored_statistics(statistic, group, row):
    return load_halves(statistic.values, group * statistic.rows + row)


@njit(inline="always")
def row_chunks(rows):
    """Runs of 32 rows, the last one ragged."""
    return (rows + CODES_PER_CHUNK - 1) // CODES_PER_CHUNK
