"""Arithmetic on one weight: what every backend computes, to the last rounding.

Plain Python functions over float32 scalars; each backend compiles them (`njit` here, device
functions on a GPU). Nothing may be reordered or contracted: the stored codes decode to exactly the
numbers that error propagation used.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = [
    "FP16_MAX",
    "ZERO_LIMIT",
    "code_of",
    "decoded_statistic",
    "float_to_half",
    "half_to_float",
    "round_through_half",
    "weight_of",
]

FP16_MAX = np.float32(65504)
ZERO_LIMIT = np.float32(2048)  # fp16 tells integers apart up to here


@intrinsic
def half_to_float(typingctx, half_bits):
    """The float32 value of fp16 bits (uint16)."""

    def codegen(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx, value):
    """The bits (uint16) of the fp16 number nearest to a float32, half to even."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@njit(inline="always")
def round_through_half(value):
    """A float32 rounded to the nearest finite fp16, as float32."""
    return half_to_float(float_to_half(min(max(value, -FP16_MAX), FP16_MAX)))


@njit(inline="always")
def decoded_statistic(code, step, base):
    """The scale or zero that a second-level code stands for: fp16(code * step + base)."""
    exact = np.float64(code) * np.float64(step) + np.float64(base)
    return half_to_float(float_to_half(np.float32(exact)))


@njit(inline="always")
def code_of(weight, scale, zero, max_code):
    """The code (as float32) nearest to a weight on the grid scale * (code - zero)."""
    if not scale > np.float32(0):
        return np.float32(0)
    return min(max(np.float32(np.rint(weight / scale + zero)), np.float32(0)), max_code)


@njit(inline="always")
def weight_of(code, scale, zero):
    """The weight that a code (float32) stands for."""
    return scale * (code - zero)
