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
from ..format.packing import csr_to_outliers, unpack_codes
from .scalars import half_to_float, weight_of
from .simd import LANES, chunk_codes, load_floats, splat, store_floats
from .unpack import Buffers, buffers_of, packed_code, statistic_decoders

__all__ = ["dequantize", "dequantize_reference", "dequantize_stored"]


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
    codes = unpack_codes(matrix[f"{name}_codes"], bits, rows).numpy().T.astype(np.float64)
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
        for chunk in prange(out.shape[0] // CODES_PER_CHUNK):
            scratch = np.empty(CODES_PER_CHUNK * LANES, np.float32)
            for row in range(0, buffers.rows - LANES + 1, LANES):
                eight_rows(buffers, chunk, row, scratch, flat)
            for row in range(buffers.rows - buffers.rows % LANES, buffers.rows):
                one_row(buffers, chunk, row, flat)

    @njit
    def eight_rows(buffers, chunk, row, scratch, flat):
        rows = buffers.rows
        codes_of(buffers.codes, chunk * bits * rows + row, rows, scratch)
        group = -1
        scale = zero = splat(np.float32(0))
        for k in range(CODES_PER_CHUNK):
            column = chunk * CODES_PER_CHUNK + k
            if min(column // buffers.group_size, buffers.groups - 1) != group:
                group = min(column // buffers.group_size, buffers.groups - 1)
                scale = scales_of(
                    buffers.scale, buffers.scale_step, buffers.scale_base, group, row, buffers
                )
                zero = zeros_of(
                    buffers.zero, buffers.zero_step, buffers.zero_base, group, row, buffers
                )
            weight = scale * (load_floats(scratch, k * LANES) - zero)
            store_floats(flat, column * rows + row, weight)

    @njit
    def one_row(buffers, chunk, row, flat):
        rows = buffers.rows
        for column in range(chunk * CODES_PER_CHUNK, (chunk + 1) * CODES_PER_CHUNK):
            group = min(column // buffers.group_size, buffers.groups - 1)
            scale = scale_of(
                buffers.scale, buffers.scale_step, buffers.scale_base, group, row, buffers
            )
            zero = zero_of(buffers.zero, buffers.zero_step, buffers.zero_base, group, row, buffers)
            code = packed_code(buffers.codes, bits, rows, column, row)
            flat[column * rows + row] = weight_of(code, scale, zero)

    return kernel


@njit(parallel=True)
def add_outliers(buffers, out):
    """out [n, m] += the sparse part."""
    for row in prange(buffers.rows):
        for at in range(buffers.outlier_row_offsets[row], buffers.outlier_row_offsets[row + 1]):
            out[buffers.outlier_columns[at], row] += half_to_float(buffers.outlier_values[at])


def dequantize_stored(matrix: SpqrMatrix) -> torch.Tensor:
    """W_hat transposed, as stored: fp32 [in_features, out_features], columns permuted."""
    if matrix.device.type != "cpu":
        raise InputError(f"there is no dequantize kernel for device {matrix.device} yet")
    spec = matrix.spec
    out = torch.empty(spec.chunks * CODES_PER_CHUNK, spec.out_features)
    buffers: Buffers = buffers_of(matrix)
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
