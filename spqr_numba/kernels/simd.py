"""Vectors over rows on a CPU: the few LLVM operations that Numba lacks.

Lane r of a vector is row r of a run of rows, so that a reduction over columns never leaves its
lane. The Numba type Floats(n) lives in registers inside compiled code; where the machine's have
fewer than n lanes, LLVM uses several. Memory is an address and an index.

In kernels
    float_at half_at word_at ...    one number of memory
    load_floats, store_floats       a vector
    store_float                     one number
    stack_floats, heap_floats, free memory for a while
    add subtract multiply           a float32 stands for itself in every lane
    multiply_add                    in one rounding
    zeros, lane                     a vector of nothing; one of its numbers

In intrinsics, which write LLVM's instructions one by one
    load pointer prefetch broadcast concatenate literals i64
    fused_multiply_add through_half
    halves                          fp16 numbers, each several times
    spread                          packed codes, one a lane
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = [
    "F32",
    "FLOAT_BYTES",
    "I32",
    "I64",
    "Floats",
    "add",
    "broadcast",
    "float_at",
    "free",
    "fused_multiply_add",
    "half_at",
    "halves",
    "heap_floats",
    "i64",
    "int32_at",
    "lane",
    "literals",
    "load",
    "load_floats",
    "multiply",
    "multiply_add",
    "pointer",
    "prefetch",
    "spread",
    "stack_floats",
    "store_float",
    "store_floats",
    "subtract",
    "through_half",
    "uint16_at",
    "word_at",
    "zeros",
]

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
FLOAT_BYTES = 4
LINE_BYTES = 64  # of a cache
OCTET = 8  # codes of at most 4 bits that one word holds

shaped = intrinsic(prefer_literal=True)  # an argument that gives a shape must be a constant


class Floats(types.Type):
    """`lanes` float32 numbers in vector registers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"F32x{lanes}")


@register_model(Floats)
class FloatsModel(models.PrimitiveModel):
    """A vector is passed as the LLVM vector it is."""

    def __init__(self, dmm: Any, fe_type: Floats) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(F32, fe_type.lanes))


# --- Emitting instructions


def i64(value: int) -> ir.Constant:
    """A 64-bit constant."""
    return ir.Constant(I64, value)


def literals(element: ir.Type, values: list) -> ir.Constant:
    """The vector of these numbers."""
    return ir.Constant(ir.VectorType(element, len(values)), values)


def broadcast(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every lane; a vector as it is."""
    if isinstance(value.type, ir.VectorType):
        return value
    empty = ir.Constant(ir.VectorType(value.type, 1), ir.Undefined)
    single = builder.insert_element(empty, value, ir.Constant(I32, 0))
    return repeat(builder, single, lanes)


def repeat(builder: ir.IRBuilder, vector: ir.Value, lanes: int) -> ir.Value:
    """Each element of a short vector as often as it takes to fill all lanes."""
    each = lanes // vector.type.count
    order = literals(I32, [number // each for number in range(lanes)])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


def concatenate(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """One vector of several, whose number is a power of two."""
    while len(vectors) > 1:
        order = literals(I32, list(range(2 * vectors[0].type.count)))
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.shuffle_vector(low, high, order) for low, high in pairs]
    return vectors[0]


def pointer(
    builder: ir.IRBuilder, address: ir.Value, index: ir.Value, kind: ir.Type, element_bytes: int
) -> ir.Value:
    """Where a `kind` lies that starts `index` elements behind an address."""
    at = builder.add(address, builder.mul(index, i64(element_bytes)))
    return builder.inttoptr(at, kind.as_pointer())


def load(
    builder: ir.IRBuilder, address: ir.Value, index: ir.Value, kind: ir.Type, element_bytes: int
) -> ir.Value:
    """What lies there; no more aligned than an element."""
    place = pointer(builder, address, index, kind, element_bytes)
    return builder.load(place, align=element_bytes)


def prefetch(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> None:
    """Ask for the cache line of a 4-byte element, which may lie outside any memory."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, second_level, data = (ir.Constant(I32, value) for value in (0, 2, 1))
    builder.call(function, [pointer(builder, address, index, I8, 4), read, second_level, data])


def fused_multiply_add(builder: ir.IRBuilder, *operands: ir.Value) -> ir.Value:
    """a * b + c in one rounding, of vectors."""
    kind = operands[0].type
    name = f"llvm.fma.v{kind.count}f32"
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(fma, operands)


def through_half(builder: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """Each lane rounded to the nearest fp16 (half to even), as float32 again."""
    rounded = builder.fptrunc(floats, ir.VectorType(F16, floats.type.count))
    return builder.fpext(rounded, floats.type)


def halves(
    builder: ir.IRBuilder, address: ir.Value, index: ir.Value, count: int, lanes: int
) -> ir.Value:
    """`count` consecutive fp16 numbers as float32, each as often as it takes to fill all lanes."""
    stored = load(builder, address, index, ir.VectorType(F16, count), 2)
    return repeat(builder, builder.fpext(stored, ir.VectorType(F32, count)), lanes)


def spread(builder: ir.IRBuilder, address: ir.Value, bits: int, lanes: int) -> ir.Value:
    """Packed codes of 2 to 4 bits from an address on, one a lane (of 16 or more), as float32."""
    octets = [octet(builder, address, number, bits, lanes) for number in range(lanes // OCTET)]
    return builder.sitofp(concatenate(builder, octets), ir.VectorType(F32, lanes))


def octet(builder: ir.IRBuilder, address: ir.Value, number: int, bits: int, lanes: int) -> ir.Value:
    """Codes 8 * number and on: from one word that does not reach past the last lane's code."""
    byte = min(number * bits, lanes * bits // 8 - 4)
    skipped_bits = 8 * (number * bits - byte)
    word = load(builder, builder.add(address, i64(byte)), i64(0), I32, 1)
    shifts = literals(I32, [skipped_bits + bits * code for code in range(OCTET)])
    fields = builder.lshr(broadcast(builder, word, OCTET), shifts)
    return builder.and_(fields, literals(I32, [(1 << bits) - 1] * OCTET))


# --- Memory


def scalar_loader(
    kind: ir.Type, element_bytes: int, result: types.Type, convert: Callable | None = None
) -> Callable:
    """An intrinsic (address, index) -> the number there."""

    def emit(typingctx, address, index):
        def codegen(context, builder, signature, arguments):
            address, index = arguments
            value = load(builder, address, index, kind, element_bytes)
            return convert(builder, value) if convert else value

        return result(types.intp, types.intp), codegen

    return intrinsic(emit)


float_at = scalar_loader(F32, FLOAT_BYTES, types.float32)
half_at = scalar_loader(F16, 2, types.float32, lambda builder, value: builder.fpext(value, F32))
int32_at = scalar_loader(I32, 4, types.intp, lambda builder, value: builder.sext(value, I64))
uint16_at = scalar_loader(I16, 2, types.intp, lambda builder, value: builder.zext(value, I64))
word_at = scalar_loader(I32, 4, types.uint64, lambda builder, value: builder.zext(value, I64))


@shaped
def load_floats(typingctx, address, index, lanes):
    """`lanes` consecutive float32."""
    kind = Floats(lanes.literal_value)

    def codegen(context, builder, signature, arguments):
        address, index, _ = arguments
        return load(builder, address, index, ir.VectorType(F32, kind.lanes), FLOAT_BYTES)

    return kind(types.intp, types.intp, lanes), codegen


def write(context, builder, signature, arguments):
    """Write a float32, or a vector of them."""
    address, index, value = arguments
    place = pointer(builder, address, index, value.type, FLOAT_BYTES)
    builder.store(value, place, align=FLOAT_BYTES)
    return context.get_dummy_value()


@intrinsic
def store_float(typingctx, address, index, value):
    """Write one float32."""
    return types.none(types.intp, types.intp, types.float32), write


@intrinsic
def store_floats(typingctx, address, index, vector):
    """Write a vector to consecutive float32."""
    return types.none(types.intp, types.intp, vector), write


@shaped
def stack_floats(typingctx, count):
    """The address of `count` float32 that last until the calling function returns."""

    def codegen(context, builder, signature, arguments):
        room = cgutils.alloca_once(builder, ir.ArrayType(F32, count.literal_value))
        room.align = LINE_BYTES
        return builder.ptrtoint(room, I64)

    return types.intp(count), codegen


@intrinsic
def heap_floats(typingctx, count):
    """The address of `count` float32 that last until they are given to `free`."""

    def codegen(context, builder, signature, arguments):
        size = builder.mul(arguments[0], i64(FLOAT_BYTES))
        return builder.ptrtoint(context.nrt.allocate(builder, size), I64)

    return types.intp(types.intp), codegen


@intrinsic
def free(typingctx, address):
    """Give back what `heap_floats` gave."""

    def codegen(context, builder, signature, arguments):
        context.nrt.free(builder, builder.inttoptr(arguments[0], I8.as_pointer()))
        return context.get_dummy_value()

    return types.none(types.intp), codegen


# --- Arithmetic


def elementwise(operation: Callable[..., ir.Value], *operands: types.Type) -> Any:
    """Typing and code of an operation on vectors, and scalars broadcast; None without a vector."""
    kind = next((operand for operand in operands if isinstance(operand, Floats)), None)
    if kind is None:
        return None

    def codegen(context, builder, signature, arguments):
        return operation(builder, *(broadcast(builder, value, kind.lanes) for value in arguments))

    return kind(*operands), codegen


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a * b + c in one rounding."""
    return elementwise(fused_multiply_add, a, b, c)


@intrinsic
def multiply(typingctx, a, b):
    """a * b."""
    return elementwise(ir.IRBuilder.fmul, a, b)


@intrinsic
def subtract(typingctx, a, b):
    """a - b."""
    return elementwise(ir.IRBuilder.fsub, a, b)


@intrinsic
def add(typingctx, a, b):
    """a + b."""
    return elementwise(ir.IRBuilder.fadd, a, b)


@shaped
def zeros(typingctx, lanes):
    """0 in every lane."""
    kind = Floats(lanes.literal_value)

    def codegen(context, builder, signature, arguments):
        return literals(F32, [0.0] * kind.lanes)

    return kind(lanes), codegen


@intrinsic
def lane(typingctx, vector, number):
    """The number in one lane."""

    def codegen(context, builder, signature, arguments):
        vector, number = arguments
        return builder.extract_element(vector, number)

    return types.float32(vector, types.intp), codegen
