"""Arithmetic on one weight: what every backend computes, to the last rounding.

Plain Python functions over float32 scalars; each backend compiles them (`njit` here, and Numba
makes device functions of the same for a GPU). Nothing may be reordered or contracted: the stored
codes decode to exactly the numbers that error propagation used. So a product that meets a sum is
`product`, or, where it shall be fused, `multiply_add`.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .ptx import emit, targets_gpu

__all__ = [
    "FP16_MAX",
    "ZERO_LIMIT",
    "bfloat_to_float",
    "code_of",
    "decoded_statistic",
    "float_to_bfloat",
    "float_to_half",
    "funnel_shift",
    "half_to_float",
    "integer_to_float",
    "power_of_two",
    "product",
    "round_through_half",
    "round_to_even",
    "weight_of",
]

FP16_MAX = np.float32(65504)
ZERO_LIMIT = np.float32(2048)  # fp16 tells integers apart up to here


FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
HALF_BITS, WORD = ir.IntType(16), ir.IntType(32)


@intrinsic
def half_to_float(typingctx, half_bits):
    """The float32 value of fp16 bits (uint16)."""

    def codegen(context, builder, signature, arguments):
        if targets_gpu(builder):
            return emit(builder, "cvt.f32.f16 $0, $1", "=f,h", FLOAT, arguments)
        return builder.fpext(builder.bitcast(arguments[0], HALF), FLOAT)

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx, value):
    """The bits (uint16) of the fp16 number nearest to a float32, half to even."""

    def codegen(context, builder, signature, arguments):
        if targets_gpu(builder):
            return emit(builder, "cvt.rn.f16.f32 $0, $1", "=h,f", HALF_BITS, arguments)
        return builder.bitcast(builder.fptrunc(arguments[0], HALF), HALF_BITS)

    return types.uint16(types.float32), codegen


@intrinsic
def bfloat_to_float(typingctx, bfloat_bits):
    """The float32 value of bf16 bits (uint16)."""

    def codegen(context, builder, signature, arguments):
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(word.type, 16)), FLOAT)

    return types.float32(types.uint16), codegen


@intrinsic
def power_of_two(typingctx, exponent):
    """2^exponent (int32, -126 ... 127) as float32."""

    def codegen(context, builder, signature, arguments):
        biased = builder.add(arguments[0], ir.Constant(arguments[0].type, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(biased.type, 23)), FLOAT)

    return types.float32(types.int32), codegen


@intrinsic
def float_to_bfloat(typingctx, value):
    """The bits (uint16) of the bf16 number nearest to a float32 that is no NaN, half to even."""

    def codegen(context, builder, signature, arguments):
        if targets_gpu(builder):
            return emit(builder, "cvt.rn.bf16.f32 $0, $1", "=h,f", HALF_BITS, arguments)
        bits = builder.bitcast(arguments[0], WORD)
        odd = builder.and_(builder.lshr(bits, WORD(16)), WORD(1))
        rounded = builder.add(bits, builder.add(odd, WORD(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, WORD(16)), HALF_BITS)

    return types.uint16(types.float32), codegen


@intrinsic
def funnel_shift(typingctx, low, high, bits):
    """The lower word of (high, low), 64 bits, shifted down by 0 to 31 bits: uint32 all."""

    def codegen(context, builder, signature, arguments):
        if targets_gpu(builder):
            return emit(builder, "shf.r.wrap.b32 $0, $1, $2, $3", "=r,r,r,r", WORD, arguments)
        low, high, bits = arguments
        words = ir.FunctionType(WORD, [WORD] * 3)
        shift = builder.module.declare_intrinsic("llvm.fshr", [WORD], words)
        return builder.call(shift, [high, low, bits])

    word = types.uint32
    return word(word, word, word), codegen


@intrinsic
def integer_to_float(typingctx, value):
    """A uint32 below 2^23 as float32, by arithmetic: a GPU converts at a quarter of that speed."""

    def codegen(context, builder, signature, arguments):
        bits = builder.or_(arguments[0], WORD(0x4B000000))  # of 2^23 + value
        return builder.fsub(builder.bitcast(bits, FLOAT), FLOAT(2.0**23))

    return types.float32(types.uint32), codegen


@intrinsic
def round_to_even(typingctx, value):
    """The integer (as float32) nearest to a float32, half to even."""

    def codegen(context, builder, signature, arguments):
        if targets_gpu(builder):
            return emit(builder, "cvt.rni.f32.f32 $0, $1", "=f,f", FLOAT, arguments)
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [FLOAT]), arguments)

    return types.float32(types.float32), codegen


@intrinsic
def product(typingctx, one, other):
    """one * other in float32, rounded before anything is added to it."""

    def codegen(context, builder, signature, arguments):
        if targets_gpu(builder):
            return emit(builder, "mul.rn.f32 $0, $1, $2", "=f,f,f", FLOAT, arguments)
        return builder.fmul(*arguments)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def multiply_add(typingctx, one, other, added):
    """float32(one * other + added) of fp16 numbers, rounded once.

    A CPU without fused multiply-add is exact in float64: such products and sums fit into it.
    """

    def codegen(context, builder, signature, arguments):
        if targets_gpu(builder):
            return emit(builder, "fma.rn.f32 $0, $1, $2, $3", "=f,f,f,f", FLOAT, arguments)
        one, other, added = (builder.fpext(argument, DOUBLE) for argument in arguments)
        return builder.fptrunc(builder.fadd(builder.fmul(one, other), added), FLOAT)

    return types.float32(types.float32, types.float32, types.float32), codegen


@njit(inline="always")
def round_through_half(value):
    """A float32 rounded to the nearest finite fp16, as float32."""
    return half_to_float(float_to_half(min(max(value, -FP16_MAX), FP16_MAX)))


@njit(inline="always")
def decoded_statistic(code, step, base):
    """The scale or zero that a second-level code stands for: fp16(code * step + base)."""
    return half_to_float(float_to_half(multiply_add(code, step, base)))


@njit(inline="always")
def code_of(weight, scale, zero, max_code):
    """The code (as float32) nearest to a weight on the grid scale * (code - zero)."""
    if not scale > np.float32(0):
        return np.float32(0)
    return min(max(round_to_even(weight / scale + zero), np.float32(0)), max_code)


@njit(inline="always")
def weight_of(code, scale, zero):
    """The weight that a code (float32) stands for."""
    return product(scale, code - zero)
