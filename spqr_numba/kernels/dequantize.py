"""Dequantize: a compressed weight back to numbers.

    W_hat[i, permutation[j]] = scale[i, g] * (code[i, j] - zero[i, g]) + outlier[i, j]
                               with g = j // group_size

    in    SpqrMatrix (format/layout.py)
    out   fp32 [n, m], columns in stored order, rows fastest: what a matrix product wants on a CPU
          fp32, fp16 or bf16 [m, n], columns in the layer's own order: `dequantize`

On a CPU the rows go in blocks of 256, whose weights stay in a cache. A thread takes chunks of 32
columns; in a chunk, the scales and zeros of a group are decoded once, then column after column is
written in one run, 32 rows a vector. The CUDA twin is dequantize_cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import njit

from ..errors import InputError
from ..format.layout import CODES_PER_CHUNK, UNQUANTIZED_BITS
from ..format.matrix import SpqrMatrix
from ..format.packing import csr_to_outliers, unpack_codes, unpack_statistics
from .parallel import tasks_for
from .scalars import weight_of
from .simd import (
    FLOAT_BYTES,
    float_at,
    half_at,
    int32_at,
    load_floats,
    multiply,
    stack_floats,
    store_float,
    store_floats,
    subtract,
)
from .unpack import (
    WORD_BYTES,
    column_codes,
    groups_of,
    index_at,
    packed_matrix,
    statistic_at,
    statistics_at,
    weight_code,
)

__all__ = ["dequantize", "dequantize_reference", "dequantize_rows", "row_blocks", "stored_order"]

LANES = 32
BLOCK_ROWS = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dequantize_reference(matrix: SpqrMatrix) -> np.ndarray:
    """NumPy spec of `dequantize`: fp32 [m, n]."""
    spec = matrix.spec
    codes = unpack_codes(matrix["codes"], spec.bits, spec.in_features).numpy()
    scales, zeros = (
        statistic_reference(matrix, name, bits).repeat(spec.group_size, 0)[: spec.in_features]
        for name, bits in (("scale", spec.scale_bits), ("zero", spec.zero_bits))
    )
    weight = (scales * (codes.astype(np.float32) - zeros)).T
    if matrix.outliers is not None:
        outliers = csr_to_outliers(dict(matrix.tensors), spec.in_features)
        weight = weight + outliers.numpy().astype(np.float32)
    return weight[:, np.argsort(stored_order(matrix).numpy())]


def statistic_reference(matrix: SpqrMatrix, name: str, bits: int) -> np.ndarray:
    """The decoded scales (name "scale") or zeros ("zero"): fp32 [groups, m]."""
    if bits == UNQUANTIZED_BITS:
        return matrix[f"{name}s"].numpy().astype(np.float32)
    rows = matrix.spec.out_features
    codes = unpack_statistics(matrix[f"{name}_codes"], bits, rows).numpy().astype(np.float64)
    step, base = (
        matrix[f"{name}_{part}"].numpy().repeat(matrix.spec.stats_group_size, 1)[:, :rows]
        for part in ("scale", "zero")
    )
    return (codes * step + base).astype(np.float32).astype(np.float16).astype(np.float32)


def stored_order(matrix: SpqrMatrix) -> torch.Tensor:
    """int64 [n]: the layer's input that each stored column belongs to."""
    if "permutation" in matrix.tensors:
        return matrix["permutation"].to(torch.int64)
    return torch.arange(matrix.spec.in_features, device=matrix.device)


def dequantize_columns(task, tasks, matrix, out, first, last):
    """The CPU twin, a kernel: rows [first, last) to out fp32 [chunks * 32, last - first]."""
    width = last - first
    whole = last - width % matrix.lanes
    for chunk in range(matrix.chunks * task // tasks, matrix.chunks * (task + 1) // tasks):
        groups = groups_of(matrix, chunk)
        for piece in range(matrix.pieces):
            decode_piece(matrix, chunk, piece, groups[piece], first, whole, out, width)
        ragged_rows(matrix, chunk, whole, last, out, width)


@njit
def decode_piece(matrix, chunk, piece, group, first, last, out, width):
    """The dense part of rows [first, last) of the columns of one piece, whole vectors of rows."""
    scales, zeros = stack_floats(BLOCK_ROWS), stack_floats(BLOCK_ROWS)
    decode_statistics(matrix.scale, group, first, last, scales)
    decode_statistics(matrix.zero, group, first, last, zeros)
    words = matrix.codes + WORD_BYTES * chunk * matrix.bits * matrix.rows
    length = CODES_PER_CHUNK // matrix.pieces
    for k in range(piece * length, (piece + 1) * length):
        column = out + FLOAT_BYTES * (chunk * CODES_PER_CHUNK + k) * width
        for row in range(first, last, matrix.lanes):
            code = column_codes(matrix, words + WORD_BYTES * row, k)
            scale = load_floats(scales, row - first, matrix.lanes)
            zero = load_floats(zeros, row - first, matrix.lanes)
            store_floats(column, row - first, multiply(scale, subtract(code, zero)))


@njit
def decode_statistics(statistic, group, first, last, decoded):
    """The statistics of rows [first, last) of a group, to memory."""
    for row in range(first, last, statistic.lanes):
        store_floats(decoded, row - first, statistics_at(statistic, group, row))


@njit
def ragged_rows(matrix, chunk, first, last, out, width):
    """The dense part of the last rows of a chunk, too few for a vector."""
    for column in range(chunk * CODES_PER_CHUNK, (chunk + 1) * CODES_PER_CHUNK):
        group = min(column // matrix.group_size, matrix.groups - 1)
        for row in range(first, last):
            scale = statistic_at(matrix.scale, group, row)
            zero = statistic_at(matrix.zero, group, row)
            weight = weight_of(weight_code(matrix, column, row), scale, zero)
            store_float(out, (column + 1) * width + row - last, weight)


def add_outliers(task, tasks, matrix, out, first, last):
    """A kernel: out fp32 [columns, last - first] += the sparse part of rows [first, last)."""
    width = last - first
    for row in range(first + width * task // tasks, first + width * (task + 1) // tasks):
        begin = int32_at(matrix.outlier_row_offsets, row)
        for at in range(begin, int32_at(matrix.outlier_row_offsets, row + 1)):
            index = index_at(matrix, matrix.outlier_columns, at) * width + row - first
            store_float(out, index, float_at(out, index) + half_at(matrix.outlier_values, at))


# --- The weight


def row_blocks(matrix: SpqrMatrix) -> Iterator[tuple[int, int]]:
    """The rows [first, last) of each block."""
    rows = matrix.spec.out_features
    for first in range(0, rows, BLOCK_ROWS):
        yield first, min(first + BLOCK_ROWS, rows)


def dequantize_rows(matrix: SpqrMatrix, first: int, last: int) -> torch.Tensor:
    """W_hat of one of `row_blocks`, transposed as stored: fp32 [n, last - first], n permuted.

    On a CPU; raises InputError for another device.
    """
    if matrix.device.type != "cpu":
        raise InputError(f"there is no dequantize kernel for device {matrix.device}")
    shape = matrix.spec.chunks * CODES_PER_CHUNK, last - first
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    packed = packed_matrix(matrix, LANES, inputs=0)
    for kernel in (dequantize_columns, add_outliers) if matrix.outliers else (dequantize_columns,):
        packed.run(kernel, tasks_for(out.numel()), out.data_ptr(), first, last)
    return out[: matrix.spec.in_features]


def dequantize(matrix: SpqrMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W_hat: [out_features, in_features], columns in the layer's own order.

    In fp32, bit for bit the weight that error propagation used; in fp16 or bf16 that, rounded once.
    Raises InputError for another dtype, or a device without a kernel.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}; it must be float32, float16 or bfloat16")
    shape = matrix.spec.out_features, matrix.spec.in_features
    weight = torch.empty(shape, dtype=dtype, device=matrix.device)
    if matrix.device.type == "cuda":
        from .dequantize_cuda import launch_dequantize

        launch_dequantize(matrix, weight)
        return weight
    columns = stored_order(matrix).argsort()
    for first, last in row_blocks(matrix):
        weight[first:last] = dequantize_rows(matrix, first, last)[columns].T
    return weight
