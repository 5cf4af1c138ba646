"""What a block of the product with many inputs (many_cuda.py) has found, to memory.

The sums of all warps lie in shared memory as float32 [inputs, rows + 4]. Where the columns are
split between several blocks, each writes its *share*, and `shares_kernel` adds them up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types

from .launch import numba_cuda
from .many_spec import ManySpec
from .ptx import (
    let_dependents_start,
    load_float,
    load_uint16,
    shared_float,
    store_float,
    store_uint16,
    wait_for_dependencies,
)
from .scalars import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from .unit_cuda import HALF_BYTES, WORD_BYTES

__all__ = ["SHARES", "SHARES_THREADS", "result_writer", "shares_kernel"]

cuda = numba_cuda()

int32: Any = np.int32

SHARES_THREADS = 256
SHARES = (*(types.int64,) * 4, *(types.int32,) * 3)
"""The signature of `shares_kernel`'s."""


def result_writer(spec: ManySpec) -> Any:
    """write(..., results): a block's sums, from their shared address, as y or as shares of it; a
    thread has a row and every other input."""
    inputs, put, bias_of = spec.inputs, number_writer(spec.kind), bias_reader(spec.kind)
    rows, row_shift = spec.rows, spec.rows.bit_length() - 1
    at_once, input_bytes = spec.threads // rows, WORD_BYTES * spec.result_floats
    step_bytes = at_once * input_bytes

    @cuda.jit(device=True, forceinline=True)
    def write(weight, factors, y, bias, shares, count, input_block, row_block, split, results):
        thread, column = int32(cuda.threadIdx.x), int32(input_block * inputs)
        in_block, i = int32(thread & (rows - 1)), int32(thread >> row_shift)
        at = int32(results + i * input_bytes + in_block * WORD_BYTES)
        row, i = int32(row_block * rows + in_block), int32(column + i)
        end = int32(min(count, column + inputs))
        place = np.int64(i) * weight.rows + row
        if row < weight.rows and shares:
            place = shares + WORD_BYTES * (np.int64(split) * count * weight.rows + place)
            while i < end:
                store_float(place, shared_float(at))
                i, at = int32(i + at_once), int32(at + step_bytes)
                place = place + WORD_BYTES * at_once * np.int64(weight.rows)
        elif row < weight.rows:
            place, more = y + HALF_BYTES * place, bias_of(bias, row)
            while i < end:
                factor = load_float(factors + WORD_BYTES * np.int64(i))
                put(place, shared_float(at) * factor + more)
                i, at = int32(i + at_once), int32(at + step_bytes)
                place = place + HALF_BYTES * at_once * np.int64(weight.rows)

    return write


def number_writer(kind: torch.dtype) -> Any:
    """put(address, value): rounded to fp16 or bf16."""
    rounded = float_to_bfloat if kind == torch.bfloat16 else float_to_half

    @cuda.jit(device=True, forceinline=True)
    def put(address, value):
        store_uint16(address, rounded(value))

    return put


def bias_reader(kind: torch.dtype) -> Any:
    """bias_of(bias, row) -> float32; 0 where there is none."""
    widened = bfloat_to_float if kind == torch.bfloat16 else half_to_float

    @cuda.jit(device=True, forceinline=True)
    def bias_of(bias, row):
        return widened(load_uint16(bias + HALF_BYTES * np.int64(row))) if bias else np.float32(0)

    return bias_of


@cache
def shares_kernel(kind: torch.dtype) -> Any:
    """kernel(shares, factors, y, bias, count, rows, splits): y from the shares of all splits."""
    put, bias_of = number_writer(kind), bias_reader(kind)

    @cuda.jit(launch_bounds=(SHARES_THREADS, 1))
    def kernel(shares, factors, y, bias, count, rows, splits):
        let_dependents_start()
        wait_for_dependencies()
        step = np.int64(count) * rows
        own = np.int64(cuda.blockIdx.x) * SHARES_THREADS + cuda.threadIdx.x
        if own < step:
            total, place = np.float32(0), shares + WORD_BYTES * own
            for _ in range(splits):
                total += load_float(place)
                place += WORD_BYTES * step
            i = own // rows
            factor = load_float(factors + WORD_BYTES * i)
            put(y + HALF_BYTES * own, total * factor + bias_of(bias, own - i * rows))

    return kernel
