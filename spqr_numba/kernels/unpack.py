"""Compressed buffers to numbers on a CPU, eight rows at a time: what dequantize and matmul share.

    array        what                                        NumPy view that kernels see
    codes        words of the weight codes                   uint32, flat: [chunks, bits, m]
    scale, zero  words of statistics codes, or fp16 bits     uint32, flat: [row_chunks, bits, groups]
                                                             uint16, flat: [groups, m]
    *_step       scale_scale, zero_scale                     uint16 (fp16 bits), flat:
    *_base       scale_zero, zero_zero                       [groups, stats_groups]
    outlier_*    CSR                                         int32, uint16 or int32, uint16 (fp16)
    permutation                                              uint16 or int32, empty if identity
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
from .simd import load_halves, multiply_add, round_to_half, splat, spread_codes

__all__ = ["Buffers", "buffers_of", "packed_code", "statistic_decoders"]


class Buffers(NamedTuple):
    """NumPy views of a matrix's tensors, and its sizes; the table above has dtypes and shapes."""

    codes: np.ndarray
    scale: np.ndarray
    scale_step: np.ndarray
    scale_base: np.ndarray
    zero: np.ndarray
    zero_step: np.ndarray
    zero_base: np.ndarray
    outlier_row_offsets: np.ndarray
    outlier_columns: np.ndarray
    outlier_values: np.ndarray
    permutation: np.ndarray
    rows: int
    columns: int
    group_size: int
    groups: int
    stats_group_size: int
    stats_groups: int


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
        spec.group_size,
        spec.groups,
        spec.stats_group_size,
        spec.stats_groups,
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
def packed_code(words, bits, width, index, position):
    """Code `index` of the packed axis at `position` of the fastest one (`width` long), float32."""
    chunk, k = divmod(index, CODES_PER_CHUNK)
    word, shift = divmod(k * bits, 32)
    first = (chunk * bits + word) * width + position
    field = np.uint64(words[first])
    if shift + bits > 32:
        field |= np.uint64(words[first + width]) << np.uint64(32)
    return np.float32((field >> np.uint64(shift)) & np.uint64((1 << bits) - 1))


@cache
def statistic_decoders(bits: int) -> tuple[Callable, Callable]:
    """Two `njit` functions that decode a scale or zero of `bits` bits.

    Both take (values, step, base, group, row, sizes) with `sizes` a Buffers; the first returns the
    statistic of one row as float32, the second those of eight rows from `row` (a multiple of 8) on
    as F32x8.
    """
    if bits == UNQUANTIZED_BITS:
        return _stored_statistic, _stored_statistics
    spread = spread_codes(bits)

    @njit(inline="always")
    def one_row(values, step, base, group, row, sizes):
        at = group * sizes.stats_groups + row // sizes.stats_group_size
        code = packed_code(values, bits, sizes.groups, row, group)
        return decoded_statistic(code, half_to_float(step[at]), half_to_float(base[at]))

    @njit(inline="always")
    def eight_rows(values, step, base, group, row, sizes):
        at = group * sizes.stats_groups + row // sizes.stats_group_size
        code = spread(code_window(values, bits, sizes.groups, row, group))
        return round_to_half(
            multiply_add(code, splat(half_to_float(step[at])), splat(half_to_float(base[at])))
        )

    return one_row, eight_rows


@njit(inline="always")
def _stored_statistic(values, step, base, group, row, sizes):
    return half_to_float(values[group * sizes.rows + row])


@njit(inline="always")
def _stored_statistics(values, step, base, group, row, sizes):
    return load_halves(values, group * sizes.rows + row)


@njit(inline="always")
def code_window(words, bits, width, row, group):
    """The packed codes of eight rows from `row` (a multiple of 8) on, in the low 8 * bits bits."""
    chunk, lane = divmod(row, CODES_PER_CHUNK)
    word, shift = divmod(lane * bits, 32)
    first = (chunk * bits + word) * width + group
    window = np.uint64(words[first])
    if shift + 8 * bits > 32:
        window |= np.uint64(words[first + width]) << np.uint64(32)
    return np.uint32(window >> np.uint64(shift))
