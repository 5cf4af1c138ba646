"""A compressed matrix as kernels on a CPU see it: addresses, sizes, and how codes become numbers.

`matrix` in a kernel is a Struct (parallel.py) with these fields, and as constants `bits`, `pieces`
(of a chunk of 32 columns, none in two groups), `wide` (indices), `lanes` (rows a vector) and
`inputs`.

    rows columns chunks groups group_size             sizes
    codes                 words of the weight codes   uint32 [chunks, bits, rows]
    scale, zero           the statistics, Structs:
      values              words of their codes        uint32 [groups, row_chunks, bits]
                          or, not quantized, numbers  fp16 [groups, rows]
      group_bytes         from one group's values to the next
      step, base          second level                fp16 [groups, stats_groups]
      stats_groups
    outlier_row_offsets   address 0 without outliers  int32 [rows + 1]
    outlier_columns                                   uint16 or, if wide, int32 [outliers]
    outlier_values                                    fp16 [outliers]
    permutation           address 0 if identity       uint16 or, if wide, int32 [columns]
"""

from __future__ import annotations

from math import gcd
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from ..format.layout import CODES_PER_CHUNK, UNQUANTIZED_BITS, MatrixSpec, ceil_div, index_dtype
from ..format.matrix import SpqrMatrix
from .parallel import Fields, Packed
from .scalars import decoded_statistic
from .simd import (
    F32,
    I32,
    Floats,
    broadcast,
    fused_multiply_add,
    half_at,
    halves,
    i64,
    int32_at,
    literals,
    load,
    prefetch,
    spread,
    through_half,
    uint16_at,
    word_at,
)

__all__ = [
    "WORD_BYTES",
    "ChunkWords",
    "column_codes",
    "decoded_rows",
    "groups_of",
    "index_at",
    "input_unit",
    "packed_matrix",
    "statistic_at",
    "statistics_at",
    "weight_code",
]

WORD_BITS, WORD_BYTES = 32, 4
LINE_WORDS = 16  # of a cache line
MOST_EXPONENT = 6

_PACKED: WeakKeyDictionary[SpqrMatrix, dict[tuple[int, int, int], Packed]] = WeakKeyDictionary()


def packed_matrix(matrix: SpqrMatrix, lanes: int, inputs: int) -> Packed:
    """The fields of a matrix on the CPU, for kernels of `lanes` rows a vector and `inputs` inputs.

    Made once, and again where its tensors have moved.
    """
    known = _PACKED.setdefault(matrix, {})
    key = lanes, inputs, matrix.tensors["codes"].data_ptr()
    if key not in known:
        known[key] = _pack_matrix(matrix, lanes, inputs)
    return known[key]


def _pack_matrix(matrix: SpqrMatrix, lanes: int, inputs: int) -> Packed:
    spec = matrix.spec
    constants = {
        "bits": spec.bits,
        "pieces": pieces_of(spec),
        "wide": int(index_dtype(spec.in_features) == torch.int32),
        "lanes": lanes,
        "inputs": inputs,
    }
    fields: dict[str, int | Packed] = {
        "rows": spec.out_features,
        "columns": spec.in_features,
        "chunks": spec.chunks,
        "groups": spec.groups,
        "group_size": spec.group_size,
        "scale": _pack_statistic(matrix, "scale", spec.scale_bits, lanes),
        "zero": _pack_statistic(matrix, "zero", spec.zero_bits, lanes),
    }
    outliers = ("outlier_row_offsets", "outlier_columns", "outlier_values")
    for name in ("codes", *outliers, "permutation"):
        fields[name] = _address(matrix, name)
    return Packed("Matrix", constants, fields)


def _pack_statistic(matrix: SpqrMatrix, name: str, bits: int, lanes: int) -> Packed:
    spec = matrix.spec
    constants = {"bits": bits, "lanes": lanes, "stats_group_size": spec.stats_group_size}
    if bits == UNQUANTIZED_BITS:
        fields = {"values": _address(matrix, f"{name}s"), "group_bytes": 2 * spec.out_features}
        return Packed("Statistic", constants, fields)
    fields = {
        "values": _address(matrix, f"{name}_codes"),
        "group_bytes": ceil_div(spec.out_features, CODES_PER_CHUNK) * bits * WORD_BYTES,
        "step": _address(matrix, f"{name}_scale"),
        "base": _address(matrix, f"{name}_zero"),
        "stats_groups": spec.stats_groups,
    }
    return Packed("Statistic", constants, fields)


def _address(matrix: SpqrMatrix, name: str) -> int:
    return matrix[name].data_ptr() if name in matrix.tensors else 0


def pieces_of(spec: MatrixSpec) -> int:
    """In how many equal pieces a chunk falls so that none lies in two groups."""
    columns = gcd(spec.group_size, CODES_PER_CHUNK) if spec.groups > 1 else CODES_PER_CHUNK
    return CODES_PER_CHUNK // columns


def unit_exponent(k: int, bits: int) -> int:
    """The power of two in whose units `ChunkWords.code` gives code k.

    A code that is masked where it stands needs no shift of its own. The inputs are multiplied by
    2^-exponent instead: exactly, but for numbers near 2^-120.
    """
    bit = k * bits % WORD_BITS
    if bit + bits >= WORD_BITS:  # in two words, or where the sign would be
        return 0
    return bit % (bits * (MOST_EXPONENT // bits + 1))


INPUT_UNITS = np.array(
    [[2.0 ** -unit_exponent(k, bits) for k in range(CODES_PER_CHUNK)] for bits in range(1, 9)],
    np.float32,
)


@njit
def input_unit(bits, k):
    """What the input of code k of a chunk is multiplied by."""
    return INPUT_UNITS[bits - 1, k]


# --- One number


def index_at(matrix, address, index):
    """A column index (in kernels only)."""
    raise NotImplementedError


@overload(index_at)
def _index_at(matrix, address, index):
    if matrix.constants["wide"]:
        return lambda matrix, address, index: int32_at(address, index)
    return lambda matrix, address, index: uint16_at(address, index)


@njit
def packed_code(words, bits, stride, k):
    """Code k of a chunk whose words lie `stride` words apart, as float32."""
    word, shift = divmod(k * bits, WORD_BITS)
    field = word_at(words, word * stride)
    if shift + bits > WORD_BITS:
        field |= word_at(words, (word + 1) * stride) << np.uint64(WORD_BITS)
    return np.float32((field >> np.uint64(shift)) & np.uint64((1 << bits) - 1))


@njit
def weight_code(matrix, column, row):
    """The code of one weight, as float32."""
    chunk, k = divmod(column, CODES_PER_CHUNK)
    words = matrix.codes + WORD_BYTES * (chunk * matrix.bits * matrix.rows + row)
    return packed_code(words, matrix.bits, matrix.rows, k)


def statistic_at(statistic, group, row):
    """The scale or zero of one row, as float32 (in kernels only)."""
    raise NotImplementedError


@overload(statistic_at)
def _statistic_at(statistic, group, row):
    def stored(statistic, group, row):
        return half_at(statistic.values + group * statistic.group_bytes, row)

    def decoded(statistic, group, row):
        chunk, k = divmod(row, CODES_PER_CHUNK)
        chunk_bytes = statistic.bits * WORD_BYTES
        words = statistic.values + group * statistic.group_bytes + chunk * chunk_bytes
        at = group * statistic.stats_groups + row // statistic.stats_group_size
        code = packed_code(words, statistic.bits, 1, k)
        return decoded_statistic(code, half_at(statistic.step, at), half_at(statistic.base, at))

    return stored if statistic.constants["bits"] == UNQUANTIZED_BITS else decoded


# --- A vector of rows


@intrinsic
def statistics_at(typingctx, statistic, group, row):
    """The scales or zeros of `lanes` rows from `row`, a multiple of lanes, on."""

    def codegen(context, builder, signature, arguments):
        address, group, row = arguments
        return decoded_rows(Fields(context, builder, statistic, address), group, row)

    return Floats(statistic.constants["lanes"])(statistic, types.intp, types.intp), codegen


def decoded_rows(statistic: Fields, group: ir.Value, row: ir.Value) -> ir.Value:
    """What `statistics_at` emits."""
    builder, bits, lanes = statistic.builder, statistic.bits, statistic.lanes
    values = builder.add(statistic.values, builder.mul(group, statistic.group_bytes))
    if bits == UNQUANTIZED_BITS:
        return halves(builder, values, row, lanes, lanes)
    byte = builder.udiv(builder.mul(row, i64(bits)), i64(8))
    codes = spread(builder, builder.add(values, byte), bits, lanes)
    block = builder.udiv(row, i64(statistic.stats_group_size))
    at = builder.add(builder.mul(group, statistic.stats_groups), block)
    blocks = max(lanes // statistic.stats_group_size, 1)
    step = halves(builder, statistic.step, at, blocks, lanes)
    base = halves(builder, statistic.base, at, blocks, lanes)
    return through_half(builder, fused_multiply_add(builder, codes, step, base))


@intrinsic
def groups_of(typingctx, matrix, chunk):
    """The group of each piece of a chunk; behind the last column, the last group."""
    pieces = matrix.constants["pieces"]
    result = types.UniTuple(types.intp, pieces)

    def codegen(context, builder, signature, arguments):
        fields = Fields(context, builder, matrix, arguments[0])
        start = builder.mul(arguments[1], i64(CODES_PER_CHUNK))
        last = builder.sub(fields.groups, i64(1))
        groups = []
        for piece in range(pieces):
            column = builder.add(start, i64(piece * CODES_PER_CHUNK // pieces))
            group = builder.udiv(column, fields.group_size)
            groups.append(builder.select(builder.icmp_signed("<", group, last), group, last))
        return context.make_tuple(builder, result, groups)

    return result(matrix, types.intp), codegen


class ChunkWords:
    """The words of a chunk, each a vector over rows and loaded where it is first used.

    address: of the first word of the first of the rows.
    """

    def __init__(self, matrix: Fields, address: ir.Value) -> None:
        self.builder, self.bits, self.lanes = matrix.builder, matrix.bits, matrix.lanes
        self._address, self._stride = address, matrix.rows
        self._words: dict[int, ir.Value] = {}
        self._shifted: dict[tuple[int, int], ir.Value] = {}

    def code(self, k: int) -> ir.Value:
        """Code k of each row as float32, times 2^unit_exponent(k, bits)."""
        number, bit = divmod(k * self.bits, WORD_BITS)
        exponent = unit_exponent(k, self.bits)
        field = self.shifted(number, bit - exponent)
        if bit + self.bits > WORD_BITS:
            top = self.builder.shl(self.word(number + 1), self._splat(WORD_BITS - bit))
            field = self.builder.or_(field, top)
        return self.masked(field, exponent)

    def code_at(self, k: ir.Value) -> ir.Value:
        """Code k of each row as float32, k known at run time: of two words, needed or not."""
        builder = self.builder
        bit = builder.mul(k, i64(self.bits))
        number, shift = builder.udiv(bit, i64(WORD_BITS)), builder.urem(bit, i64(WORD_BITS))
        last = i64(self.bits - 1)
        next_number = builder.select(
            builder.icmp_signed("<", number, last), builder.add(number, i64(1)), last
        )
        shift = builder.trunc(shift, I32)
        rest = builder.sub(ir.Constant(I32, WORD_BITS - 1), shift)  # and one: 32 at once is too far
        low = builder.lshr(self._load(number), broadcast(builder, shift, self.lanes))
        high = builder.shl(self._load(next_number), broadcast(builder, rest, self.lanes))
        return self.masked(builder.or_(low, builder.shl(high, self._splat(1))))

    def shifted(self, number: int, bits: int) -> ir.Value:
        """Word `number` of each row, shifted down."""
        if (number, bits) not in self._shifted:
            word = self.builder.lshr(self.word(number), self._splat(bits))
            self._shifted[number, bits] = word
        return self._shifted[number, bits]

    def word(self, number: int) -> ir.Value:
        """Word `number` of each row. The same word of the next chunk is asked for: a tile is too
        narrow for the hardware to foresee where the next chunk begins."""
        if number not in self._words:
            self._words[number] = self._load(i64(number))
            ahead = self.builder.mul(self._stride, i64(number + self.bits))
            for row in range(0, self.lanes, LINE_WORDS):
                prefetch(self.builder, self._address, self.builder.add(ahead, i64(row)))
        return self._words[number]

    def masked(self, field: ir.Value, exponent: int = 0) -> ir.Value:
        """The `bits` bits from `exponent` on as float32: signed, as only AVX-512 has the other."""
        codes = self.builder.and_(field, self._splat(((1 << self.bits) - 1) << exponent))
        return self.builder.sitofp(codes, ir.VectorType(F32, self.lanes))

    def _load(self, number: ir.Value) -> ir.Value:
        index = self.builder.mul(self._stride, number)
        return load(self.builder, self._address, index, ir.VectorType(I32, self.lanes), WORD_BYTES)

    def _splat(self, value: int) -> ir.Constant:
        return literals(I32, [value] * self.lanes)


@intrinsic
def column_codes(typingctx, matrix, words, k):
    """Code k of a chunk as float32, of `lanes` rows; words: address of the first row's first."""

    def codegen(context, builder, signature, arguments):
        address, words, k = arguments
        return ChunkWords(Fields(context, builder, matrix, address), words).code_at(k)

    return Floats(matrix.constants["lanes"])(matrix, types.intp, types.intp), codegen
