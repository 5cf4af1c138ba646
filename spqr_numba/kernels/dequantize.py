"""Dequantize: a compressed weight back to numbers.

    W_hat[i, permutation[j]] = scale[i, g] * (code[i, j] - zero[i, g]) + outlier[i, j]
                               with g = j // group_size

    in    SpqrMatrix (format/layout.py)
    out   fp32 [n, m], columns in stored order, rows fastest: what a matrix product wants
          fp32 [m, n], columns in the layer's own order: `dequantize`

On a CPU a thread takes chunks of 32 columns, eight rows at a time; codes become floats in a scratch
of one chunk, then scale and zero are applied column by column.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import njit, prange

from ..errors import InputError
from ..format.layout import CODES_PER_CHUNK, UNQUANTIZED_BITS
from ..format.matrix import SpqrMatrix
from ..format.packing import csr_to_outliers, unpack_codes, unpack_statistics
from .scalars import half_to_float, weight_of
from .simd import LANES, chunk_codes, load_floats, splat, store_floats
from .unpack import buffers_of, scales_in, statistic_decoders, weight_code, zeros_in

__all__ = ["dequantize", "dequantize_reference", "dequantize_stored", "stored_order"]

PIECE_COLUMNS = 8  # columns that surely share a group


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


@cache
def cpu_kernel(bits: int, scale_bits: int, zero_bits: int) -> Callable:
    """The CPU twin: (Buffers, out fp32 [chunks * 32, m]) fills out, padding columns included."""
    scale_of, scales_of = statistic_decoders(scale_bits)
    zero_of, zeros_of = statistic_decoders(zero_bits)
    codes_of = chunk_codes(bits)

    @njit(parallel=True)
    def kernel(buffers, out):
        flat = out.reshape(-1)
        whole = buffers.rows - buffers.rows % LANES
        for chunk in prange(out.shape[0] // CODES_PER_CHUNK):
            scratch = np.empty(CODES_PER_CHUNK * LANES, np.float32)
            lane_rows(buffers, chunk, whole, scratch, flat)
            ragged_rows(buffers, chunk, whole, flat)

    @njit(_nrt=False)
    def lane_rows(buffers, chunk, last, scratch, flat):
        codes, scales, zeros = buffers.codes, scales_in(buffers), zeros_in(buffers)
        rows, group_size, groups = buffers.rows, buffers.group_size, buffers.groups
        for row in range(0, last, LANES):
            codes_of(codes, chunk * bits * rows + row, rows, scratch)
            for piece in range(0, CODES_PER_CHUNK, PIECE_COLUMNS):
                column = chunk * CODES_PER_CHUNK + piece
                group = min(column // group_size, groups - 1)
                scale = scales_of(scales, group, row)
                zero = zeros_of(zeros, group, row)
                for k in range(PIECE_COLUMNS):
                    weight = scale * (load_floats(scratch, (piece + k) * LANES) - zero)
                    store_floats(flat, (column + k) * rows + row, weight)

    @njit
    def ragged_rows(buffers, chunk, first, flat):
        scales, zeros = scales_in(buffers), zeros_in(buffers)
        for column in range(chunk * CODES_PER_CHUNK, (chunk + 1) * CODES_PER_CHUNK):
            group = min(column // buffers.group_size, buffers.groups - 1)
            for row in range(first, buffers.rows):
                code = weight_code(buffers, bits, column, row)
                scale = scale_of(scales, group, row)
                weight = weight_of(code, scale, zero_of(zeros, group, row))
                flat[column * buffers.rows + row] = weight

    return kernel


@njit(parallel=True)
def add_outliers(buffers, out):
    """out [n, m] += the sparse part."""
    for row in prange(out.shape[1]):
        for at in range(buffers.outlier_row_offsets[row], buffers.outlier_row_offsets[row + 1]):
            out[buffers.outlier_columns[at], row] += half_to_float(buffers.outlier_values[at])


def dequantize_stored(matrix: SpqrMatrix) -> torch.Tensor:
    """W_hat transposed, as stored: fp32 [in_features, out_features], columns permuted."""
    if matrix.device.type != "cpu":
        raise InputError(f"there is no dequantize kernel for device {matrix.device} yet")
    spec = matrix.spec
    out = torch.empty(spec.chunks * CODES_PER_CHUNK, spec.out_features)
    buffers = buffers_of(matrix)
    cpu_kernel(spec.bits, spec.scale_bits, spec.zero_bits)(buffers, out.numpy())
    if matrix.outliers:
        add_outliers(buffers, out.numpy())
    return out[: spec.in_features]


def dequantize(matrix: SpqrMatrix) -> torch.Tensor:
    """W_hat: fp32 [out_features, in_features], columns in the layer's own order.

    Bit for bit the weight that error propagation used. Raises InputError for a device without a
    kernel.
    """
    stored = dequantize_stored(matrix)
    weight = torch.empty_like(stored)
    weight[stored_order(matrix)] = stored
    return weight.T.contiguous()
