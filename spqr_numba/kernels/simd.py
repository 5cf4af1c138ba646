"""Eight rows at a time on a CPU: the few LLVM vector operations that Numba lacks.

The Numba type F32x8 lives in vector registers inside `njit` code; lane r is row r of eight. Where
the machine's registers have fewer lanes LLVM uses several.

    load_floats load_halves store_floats   flat array, offset
    load_window                            32 bits from any byte on
    splat                                  one number in every lane
    chunk_dot chunk_codes                  32 packed codes of eight rows
    spread_codes                           one packed code a lane
    round_to_half                          to fp16 and back
    + - * on F32x8, multiply_add           multiply_add rounds once

The chunk operations are written out code by code when they are compiled, for `bits` fixed: every
word, shift and mask is a constant, and nothing is left of the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from ..format.layout import CODES_PER_CHUNK

__all__ = [
    "LANES",
    "chunk_codes",
    "chunk_dot",
    "load_floats",
    "load_halves",
    "load_window",
    "multiply_add",
    "round_to_half",
    "splat",
    "spread_codes",
    "store_floats",
]

LANES = 8
WORD_BITS = 32
I32 = ir.VectorType(ir.IntType(32), LANES)
F16 = ir.VectorType(ir.HalfType(), LANES)
F32 = ir.VectorType(ir.FloatType(), LANES)
FOUR = ir.Constant(ir.IntType(64), 4)


class Vector(types.Type):
    """Eight lanes of one LLVM type."""

    def __init__(self, name: str, llvm_type: ir.Type) -> None:
        super().__init__(name=name)
        self.llvm_type = llvm_type


f32x8 = Vector("F32x8", F32)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector is passed in registers, as the LLVM vector it is."""

    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm_type)


def constant(llvm_type: ir.Type, value: float) -> ir.Constant:
    """The vector with `value` in every lane."""
    return ir.Constant(llvm_type, [value] * LANES)


def splat_value(builder: ir.IRBuilder, value: ir.Value, llvm_type: ir.Type) -> ir.Value:
    """The vector with the scalar `value` in every lane."""
    zero = ir.Constant(ir.IntType(32), 0)
    one_lane = builder.insert_element(ir.Constant(llvm_type, ir.Undefined), value, zero)
    return builder.shuffle_vector(
        one_lane, ir.Constant(llvm_type, ir.Undefined), constant(I32, 0)
    )


def vector_pointer(
    context: Any, builder: ir.IRBuilder, array_type: types.Array, array: Any, offset: Any, lanes: Any
) -> ir.Value:
    """Pointer to the eight elements of a flat array that start at element `offset`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), lanes.as_pointer())


def fused_multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c in one rounding."""
    signature = ir.FunctionType(F32, [F32, F32, F32])
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), (a, b, c))


@intrinsic
def load_floats(typingctx, array, offset):
    """array[offset : offset + 8] of a flat float32 array."""

    def codegen(context, builder, signature, arguments):
        pointer = vector_pointer(context, builder, signature.args[0], *arguments, F32)
        return builder.load(pointer, align=4)

    return f32x8(array, types.intp), codegen


@intrinsic
def load_halves(typingctx, array, offset):
    """array[offset : offset + 8] of a flat uint16 array of fp16 bits, as float32."""

    def codegen(context, builder, signature, arguments):
        pointer = vector_pointer(context, builder, signature.args[0], *arguments, F16)
        return builder.fpext(builder.load(pointer, align=2), F32)

    return f32x8(array, types.intp), codegen


@intrinsic
def load_window(typingctx, words, byte):
    """The 32 bits from byte `byte` of a flat uint32 array on; past its end, undefined bits."""

    def codegen(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        last = builder.sub(builder.mul(array.nitems, ir.Constant(ir.IntType(64), 4)), FOUR)
        inside = builder.icmp_signed("<", arguments[1], last)
        start = builder.select(inside, arguments[1], last)
        data = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        pointer = builder.bitcast(builder.gep(data, [start]), ir.IntType(32).as_pointer())
        skipped = builder.trunc(builder.sub(arguments[1], start), ir.IntType(32))
        bits = builder.mul(skipped, ir.Constant(ir.IntType(32), 8))
        return builder.lshr(builder.load(pointer, align=1), bits)

    return types.uint32(words, types.intp), codegen


@intrinsic
def store_floats(typingctx, array, offset, vector):
    """array[offset : offset + 8] = vector."""

    def codegen(context, builder, signature, arguments):
        target, start, value = arguments
        pointer = vector_pointer(context, builder, signature.args[0], target, start, F32)
        builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, f32x8), codegen


@intrinsic
def splat(typingctx, value):
    """A float32 in every lane."""

    def codegen(context, builder, signature, arguments):
        return splat_value(builder, arguments[0], F32)

    return f32x8(types.float32), codegen


@intrinsic
def round_to_half(typingctx, floats):
    """Each lane rounded to the nearest fp16 (half to even), as float32 again."""

    def codegen(context, builder, signature, arguments):
        return builder.fpext(builder.fptrunc(arguments[0], F16), F32)

    return f32x8(f32x8), codegen


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a * b + c in one rounding."""

    def codegen(context, builder, signature, arguments):
        return fused_multiply_add(builder, *arguments)

    return f32x8(f32x8, f32x8, f32x8), codegen


def arithmetic(python_operator: Callable, method: str) -> None:
    """Give F32x8 one arithmetic operator."""

    def emit(typingctx, a, b):
        def codegen(context, builder, signature, arguments):
            return getattr(builder, method)(*arguments)

        return f32x8(f32x8, f32x8), codegen

    emitted = intrinsic(emit)

    @overload(python_operator)
    def operate(a, b):
        if a == f32x8 and b == f32x8:
            return lambda a, b: emitted(a, b)
        return None


arithmetic(operator.add, "fadd")
arithmetic(operator.sub, "fsub")
arithmetic(operator.mul, "fmul")


@cache
def spread_codes(bits: int) -> Callable:
    """An intrinsic (uint32 window) -> F32x8: lane r is the code at bit r * bits of the window."""

    def emit(typingctx, window):
        def codegen(context, builder, signature, arguments):
            shifts = ir.Constant(I32, [lane * bits for lane in range(LANES)])
            shifted = builder.lshr(splat_value(builder, arguments[0], I32), shifts)
            return builder.sitofp(builder.and_(shifted, constant(I32, (1 << bits) - 1)), F32)

        return f32x8(types.uint32), codegen

    return intrinsic(emit)


@cache
def chunk_codes(bits: int) -> Callable:
    """An intrinsic (words, offset, stride, out): the 32 codes of a chunk of eight rows, as floats.

    words (flat uint32) holds the chunk's word b of row r at offset + b * stride + r; out (flat
    float32, 256 long) takes code k of row r at 8 * k + r.
    """

    def emit(typingctx, words, offset, stride, out):
        def codegen(context, builder, signature, arguments):
            rows = chunk_words(context, builder, signature.args[0], arguments[:3], bits)
            for k in range(CODES_PER_CHUNK):
                start = ir.Constant(ir.IntType(64), LANES * k)
                pointer = vector_pointer(
                    context, builder, signature.args[3], arguments[3], start, F32
                )
                builder.store(code(builder, rows, k, bits), pointer, align=4)
            return context.get_dummy_value()

        return types.none(words, types.intp, types.intp, out), codegen

    return intrinsic(emit)


@cache
def chunk_dot(bits: int, pieces: int) -> Callable:
    """An intrinsic (words, offset, stride, x, x_offset) -> `pieces` F32x8 partial sums.

    words as in `chunk_codes`; x is flat float32. Sum p of row r is sum_k code_k * x[x_offset + k]
    over the p-th of `pieces` equal parts of the chunk's 32 columns.
    """

    def emit(typingctx, words, offset, stride, x, x_offset):
        def codegen(context, builder, signature, arguments):
            rows = chunk_words(context, builder, signature.args[0], arguments[:3], bits)
            array, start = arguments[3:]
            data = context.make_array(signature.args[3])(context, builder, array).data
            inputs = builder.gep(data, [start])
            length = CODES_PER_CHUNK // pieces
            sums = [
                piece_dot(builder, rows, inputs, range(p * length, (p + 1) * length), bits)
                for p in range(pieces)
            ]
            return context.make_tuple(builder, signature.return_type, sums)

        result = types.UniTuple(f32x8, pieces)
        return result(words, types.intp, types.intp, x, types.intp), codegen

    return intrinsic(emit)


def chunk_words(context, builder, array_type, arguments, bits: int) -> list[ir.Value]:
    """The `bits` words of a chunk, each a vector over eight rows."""
    array, offset, stride = arguments
    words = []
    for b in range(bits):
        start = builder.add(offset, builder.mul(stride, ir.Constant(stride.type, b)))
        pointer = vector_pointer(context, builder, array_type, array, start, I32)
        words.append(builder.load(pointer, align=4))
    return words


def code(builder: ir.IRBuilder, words: list[ir.Value], k: int, bits: int) -> ir.Value:
    """Code k of a chunk, eight rows of it, as floats."""
    word, shift = divmod(k * bits, WORD_BITS)
    field = builder.lshr(words[word], constant(I32, shift))
    if shift + bits > WORD_BITS:
        top = builder.shl(words[word + 1], constant(I32, WORD_BITS - shift))
        field = builder.or_(field, top)
    # signed: without AVX-512 there is no conversion from unsigned
    return builder.sitofp(builder.and_(field, constant(I32, (1 << bits) - 1)), F32)


def piece_dot(builder, words: list[ir.Value], inputs: ir.Value, ks: range, bits: int) -> ir.Value:
    """sum over ks of code_k * inputs[k], in two chains so that one need not wait for the other."""
    sums = [constant(F32, 0.0), constant(F32, 0.0)]
    for k in ks:
        element = builder.load(builder.gep(inputs, [ir.Constant(ir.IntType(64), k)]))
        x = splat_value(builder, element, F32)
        sums[k % 2] = fused_multiply_add(builder, code(builder, words, k, bits), x, sums[k % 2])
    return builder.fadd(*sums)
