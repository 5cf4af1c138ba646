"""The matrix product of SpQR: y = x W_hat^T (+ bias), straight from the compressed weight.

    y[b, i] = sum_g scale[i, g] * (sum_{j in g} code[i, j] x'[b, j] - zero[i, g] * X[b, g])
              + sum_outliers value * x'[b, column],
    where x' = x[:, permutation] and X[b, g] = sum_{j in g} x'[b, j]

    x         fp32, fp16 or bf16 [..., n]
    W_hat     SpqrMatrix (format/layout.py)
    y         like x, [..., m]; sums in fp32

Scale and zero are applied to the sums of a group and not to its weights: exact, and 1/group_size
of the work. Source of the idea: section 4.3 of arXiv 2306.03078 (dense part and CSR part at once).

On a CPU a thread takes a run of rows and walks the chunks of 32 columns; within a chunk it takes
eight rows at a time, one a lane, so that the reduction over columns never leaves a lane. From
`GEMM_FROM` inputs on, dequantizing once and calling BLAS is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import get_num_threads, njit, prange

from ..errors import InputError
from ..format.layout import CODES_PER_CHUNK
from ..format.matrix import SpqrMatrix
from .dequantize import dequantize_reference, dequantize_stored, stored_order
from .scalars import half_to_float, weight_of
from .simd import LANES, chunk_dot, load_floats, multiply_add, splat, store_floats
from .unpack import buffers_of, scales_in, statistic_decoders, weight_code, zeros_in

__all__ = ["matmul", "matmul_reference"]

GEMM_FROM = 16
TASKS_PER_THREAD = 4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def matmul_reference(x: np.ndarray, matrix: SpqrMatrix) -> np.ndarray:
    """NumPy spec of `matmul` in float64: x [..., n] -> [..., m]."""
    return x.astype(np.float64) @ dequantize_reference(matrix).astype(np.float64).T


@cache
def cpu_kernel(bits: int, piece_columns: int, scale_bits: int, zero_bits: int) -> Callable:
    """The CPU twin for one input: (Buffers, x', X, tasks, y).

    piece_columns is how many columns of a chunk share a group: 8, 16 or all 32. x' fp32
    [chunks * 32] (zeros behind the last column), X fp32 [chunks, pieces] the sums of x' over each
    piece, y fp32 [m].
    """
    pieces = CODES_PER_CHUNK // piece_columns
    scale_of, scales_of = statistic_decoders(scale_bits)
    zero_of, zeros_of = statistic_decoders(zero_bits)
    dot = chunk_dot(bits, pieces)

    @njit(parallel=True)
    def kernel(buffers, x, x_sums, tasks, y):
        blocks = buffers.rows // LANES
        for task in prange(tasks):
            first = blocks * task // tasks * LANES
            last = blocks * (task + 1) // tasks * LANES
            dense_rows(buffers, first, last, x, x_sums, y)
            sparse_rows(buffers, first, last, x, y)
        ragged_rows(buffers, blocks * LANES, x, y)
        sparse_rows(buffers, blocks * LANES, buffers.rows, x, y)

    @njit(_nrt=False)
    def dense_rows(buffers, first, last, x, x_sums, y):
        codes, scales, zeros = buffers.codes, scales_in(buffers), zeros_in(buffers)
        rows, group_size, last_group = buffers.rows, buffers.group_size, buffers.groups - 1
        for row in range(first, last):
            y[row] = np.float32(0)
        for chunk in range(x_sums.shape[0]):
            start = chunk * CODES_PER_CHUNK
            first_group = start // group_size
            for row in range(first, last, LANES):
                sums = dot(codes, chunk * bits * rows + row, rows, x, start)
                total = load_floats(y, row)
                for piece in range(pieces):
                    group = min(first_group + piece, last_group)
                    zero = zeros_of(zeros, group, row)
                    centred = sums[piece] - zero * splat(x_sums[chunk, piece])
                    total = multiply_add(scales_of(scales, group, row), centred, total)
                store_floats(y, row, total)

    @njit
    def ragged_rows(buffers, first, x, y):
        scales, zeros = scales_in(buffers), zeros_in(buffers)
        for row in range(first, buffers.rows):
            y[row] = np.float32(0)
            for column in range(buffers.columns):
                group = column // buffers.group_size
                code = weight_code(buffers, bits, column, row)
                scale = scale_of(scales, group, row)
                y[row] += weight_of(code, scale, zero_of(zeros, group, row)) * x[column]

    return kernel


@njit(_nrt=False)
def sparse_rows(buffers, first, last, x, y):
    """y[row] += sum over the outliers of a row of value * x'[column]."""
    for row in range(first, last):
        total = np.float32(0)
        for at in range(buffers.outlier_row_offsets[row], buffers.outlier_row_offsets[row + 1]):
            total += half_to_float(buffers.outlier_values[at]) * x[buffers.outlier_columns[at]]
        y[row] += total


@njit
def stage_input(x, permutation, out, sums):
    """out[j] = x[permutation[j]] and, padded with zeros, the sums over its pieces: one input."""
    for j in range(x.size):
        out[j] = x[permutation[j]] if permutation.size else x[j]
    out[x.size :] = np.float32(0)
    piece_columns = out.size // sums.size
    flat = sums.reshape(-1)
    for piece in range(flat.size):
        total = np.float32(0)
        for j in range(piece * piece_columns, (piece + 1) * piece_columns):
            total += out[j]
        flat[piece] = total


def matmul(
    x: torch.Tensor, matrix: SpqrMatrix, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W_hat^T + bias.

    x fp32, fp16 or bf16 [..., in_features], bias [out_features] or None -> like x
    [..., out_features]. Raises InputError for another shape, dtype or device.
    """
    check_input(x, matrix, bias)
    flat = x.reshape(-1, matrix.spec.in_features).to(torch.float32)
    y = gemm(flat, matrix) if len(flat) >= GEMM_FROM else matvecs(flat, matrix)
    if bias is not None:
        y += bias
    return y.to(x.dtype).reshape(*x.shape[:-1], matrix.spec.out_features)


def matvecs(x: torch.Tensor, matrix: SpqrMatrix) -> torch.Tensor:
    """fp32 [batch, n] -> [batch, m], one input after another through the fused kernel."""
    spec, buffers = matrix.spec, buffers_of(matrix)
    piece_columns = min(spec.group_size, CODES_PER_CHUNK) if spec.groups > 1 else CODES_PER_CHUNK
    kernel = cpu_kernel(spec.bits, piece_columns, spec.scale_bits, spec.zero_bits)
    staged = np.empty(spec.chunks * CODES_PER_CHUNK, np.float32)
    sums = np.empty((spec.chunks, CODES_PER_CHUNK // piece_columns), np.float32)
    y = torch.empty(len(x), spec.out_features)
    tasks = get_num_threads() * TASKS_PER_THREAD
    for one_x, one_y in zip(x.detach().contiguous().numpy(), y.numpy(), strict=True):
        stage_input(one_x, buffers.permutation, staged, sums)
        kernel(buffers, staged, sums, tasks, one_y)
    return y


def gemm(x: torch.Tensor, matrix: SpqrMatrix) -> torch.Tensor:
    """fp32 [batch, n] -> [batch, m] through the dequantized weight and BLAS."""
    return x[:, stored_order(matrix)] @ dequantize_stored(matrix)


def check_input(x: torch.Tensor, matrix: SpqrMatrix, bias: torch.Tensor | None) -> None:
    """Raise InputError unless x and bias fit the weight."""
    spec = matrix.spec
    if x.dtype not in DTYPES:
        raise InputError(f"x is {x.dtype}; it must be float32, float16 or bfloat16")
    if x.ndim < 1 or x.shape[-1] != spec.in_features:
        raise InputError(
            f"x has shape {list(x.shape)}; its last axis must be in_features ({spec.in_features})"
        )
    if x.device != matrix.device:
        raise InputError(f"x is on {x.device}, the weight on {matrix.device}")
    if x.device.type != "cpu":
        raise InputError(f"there is no matmul kernel for device {x.device} yet")
    if bias is not None and tuple(bias.shape) != (spec.out_features,):
        raise InputError(f"bias has shape {list(bias.shape)}; it must be [{spec.out_features}]")
