"""A unit of a prepared weight (prepared.py) as numbers: what a warp writes of it.

A lane owns whole groups of the rows g and g + 8, t and t + 4 of each octet. It takes their scales
and zeros from the lane of the quad that has decoded them, and writes 16 bytes at a time to shared
memory, to pass through it, since global memory takes whole rows of an octet better. Each weight is
scale * (code - zero) in float32, bit for bit as elsewhere, and rounded to its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .codes_cuda import SUBNORMAL_UNIT, code_place, masked_pair
from .prepared import LANES, OCTET, QUAD, QUARTERS, group_pairs
from .ptx import Ptx, f32, i32, i64
from .runs import TILE_ROWS
from .unit_cuda import LOAD_BYTES, WORD_BYTES, Unit, UnitSpec

__all__ = ["Copying", "loaded_words", "owners", "part_writer", "taken_words"]

LOAD_WORDS = LOAD_BYTES // WORD_BYTES
MOST_COLUMNS = 128  # of which a warp copies a row, or more, at once


@dataclass(frozen=True)
class Copying:
    """How numbers go from shared to global memory: 16 bytes a lane, row by row, an octet at once,
    or half of one where groups are large."""

    spec: UnitSpec
    dtype: torch.dtype

    @property
    def halves(self) -> int:
        """Of an octet, that go at once."""
        return 2 if OCTET * self.spec.group_size <= MOST_COLUMNS else 1

    @property
    def columns(self) -> int:
        """That go at once."""
        return self.halves * QUAD * self.spec.group_size

    @property
    def parts(self) -> int:
        """Of a unit, that go one after the other."""
        return self.spec.columns // self.columns

    @property
    def loads(self) -> int:
        """Of a row."""
        return self.columns * self.dtype.itemsize // LOAD_BYTES

    @property
    def rows(self) -> int:
        """That a warp copies at once."""
        return LANES // self.loads

    @property
    def row_bytes(self) -> int:
        """In shared memory: one load more, so that rows begin at banks of their own."""
        return (self.loads + 1) * LOAD_BYTES

    @property
    def bytes(self) -> int:
        """Of shared memory."""
        return TILE_ROWS * self.row_bytes


@cache
def part_writer(spec: UnitSpec, dtype: torch.dtype, part: int, patched: bool) -> Any:
    """write_part(unit, lane, patch, between, out, step, rows, columns): to global memory, of a unit
    what goes at once for the `part`-th time.

    unit, patch, between: shared addresses of its bytes, of what is added where `patched` says so
    (patch_cuda.py; all zeros behind it), and of what numbers pass through; out: address of the
    first 16 bytes of the unit that the lane copies; step: bytes from there to the next; rows,
    columns: how many there are from these on.
    """

    @intrinsic
    def write_part(typingctx, unit, lane, patch, between, out, step, rows, columns):
        def codegen(context, builder, signature, arguments):
            unit, lane, patch, *rest = arguments
            given = unit, lane, patch if patched else None, *rest
            UnitOfNumbers(Ptx(builder), Copying(spec, dtype), *given).write(part)
            return context.get_dummy_value()

        words, addresses = types.int32, types.int64
        return types.none(*(words,) * 4, addresses, addresses, words, words), codegen

    return write_part


class UnitOfNumbers(Unit):
    """A unit, to global memory."""

    def __init__(self, ptx, copying, unit, lane, patch, between, out, step, rows, columns) -> None:
        super().__init__(ptx, copying.spec, unit, lane)
        self.codes = self.builder.add(unit, self.load_of(self.in_quad))
        own = self.times(lane, LOAD_BYTES)
        self.patch = None if patch is None else self.builder.add(patch, own)
        self.copying, self.out, self.step = copying, out, step
        self.rows, self.columns = rows, columns
        row, place = self.builder.lshr(lane, i32(2)), self.times(self.in_quad, self.group_bytes)
        self.to = self.builder.add(
            between, self.builder.add(self.times(row, copying.row_bytes), place)
        )
        copied = self.builder.lshr(lane, i32(copying.loads.bit_length() - 1))
        load = self.builder.and_(lane, i32(copying.loads - 1))
        place = self.builder.add(
            self.times(copied, copying.row_bytes), self.times(load, LOAD_BYTES)
        )
        self.back = self.builder.add(between, place)
        self.sources, odd = owners(self)
        self.shift = self.times(odd, 16)

    @property
    def group_bytes(self) -> int:
        """Of a row."""
        return self.copying.spec.group_size * self.copying.dtype.itemsize

    def write(self, part: int) -> None:
        """What goes at once for the part-th time."""
        halves = self.copying.halves
        number, half = divmod(part * halves, 2)
        block, octet = divmod(number, self.spec.octets)
        words = loaded_words(self, self.at(self.codes, block * self.spec.block_bytes))
        self.put_halves(words, octet, range(half, half + halves), self.decoded(number))
        self.ptx.meet_warp()
        self.copy(part)
        self.ptx.meet_warp()

    def put_halves(self, words: list, octet: int, halves: range, statistics: list) -> None:
        """To shared memory, a group of a row at a time."""
        for half in halves:
            for row in range(2):
                scale, zero = (self.own(word, half) for word in statistics[row])
                numbers = self.numbers(words, octet, half, row, scale, zero)
                place = half - halves[0]
                numbers = self.rounded(self.patched(numbers, place, row))
                first = 8 * row * self.copying.row_bytes + 4 * place * self.group_bytes
                for i in range(0, len(numbers), LOAD_WORDS):
                    at = self.at(self.to, first + i * WORD_BYTES)
                    self.ptx.store_shared(at, numbers[i : i + LOAD_WORDS])

    def patched(self, numbers: list[ir.Value], half: int, row: int) -> list[ir.Value]:
        """float32 weights of a group with its outliers, which are taken: zeros are there then."""
        if self.patch is None:
            return numbers
        sums, parts = [], len(numbers) // OCTET
        for part in range(parts):
            words = taken_words(self, self.patch, half * parts + part, row)
            outliers = [value for word in words for value in self.ptx.floats(word)]
            own = numbers[part * OCTET : (part + 1) * OCTET]
            sums += [self.builder.fadd(*pair) for pair in zip(own, outliers, strict=True)]
        return sums

    def copy(self, number: int) -> None:
        """To global memory, what is there of what goes at once."""
        copying, out = self.copying, self.out
        column = i32(number * copying.columns)
        in_unit = self.builder.icmp_signed(">", self.columns, column)
        out = self.builder.add(out, i64(number * copying.loads * LOAD_BYTES))
        for row in range(0, TILE_ROWS, copying.rows):
            words = self.ptx.load_shared(self.at(self.back, row * copying.row_bytes))
            there = self.builder.icmp_signed(">", self.rows, i32(row))
            self.ptx.store_global_where(self.builder.and_(there, in_unit), out, words)
            out = self.builder.add(out, self.step)

    def own(self, word: ir.Value, half: int) -> ir.Value:
        """The float32 of the group t or t + 4, from the lane that has two groups in a word."""
        word = self.ptx.of_quad_lane(word, self.sources[half])
        return self.ptx.floats(self.builder.lshr(word, self.shift))[0]

    def numbers(
        self, words: list, octet: int, half: int, row: int, scale: ir.Value, zero: ir.Value
    ) -> list[ir.Value]:
        """float32 weights of a group of a row."""
        spec, found = self.spec, []
        minus_zero = self.builder.fsub(f32(-0.0), zero)
        for quarter in range(QUARTERS):
            of_quarter = [word[quarter] for word in words]
            for pair in group_pairs(spec.pairs, octet, half)[row::2]:
                place = code_place(spec.bits, pair)
                codes = masked_pair(self.ptx, of_quarter, pair)
                for code in self.ptx.floats(codes):
                    unit = f32(2.0**-place / SUBNORMAL_UNIT)
                    steps = self.builder.fma(code, unit, minus_zero)
                    found.append(self.builder.fmul(scale, steps))
        return found

    def rounded(self, numbers: list[ir.Value]) -> list[ir.Value]:
        """Words of numbers of the dtype."""
        if self.copying.dtype == torch.float32:
            return [self.ptx.word_of(number) for number in numbers]
        kind = "bf16" if self.copying.dtype == torch.bfloat16 else "f16"
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return [self.ptx.rounded_pair(low, high, kind) for low, high in pairs]


def owners(unit: Unit) -> tuple[tuple[ir.Value, ir.Value], ir.Value]:
    """Lanes of the quad that decode the groups t and t + 4, and whether as the second of two."""
    low = unit.builder.lshr(unit.in_quad, i32(1))
    return (low, unit.builder.add(low, i32(2))), unit.builder.and_(unit.in_quad, i32(1))


def taken_words(unit: Unit, patch: ir.Value, part: int, row: int) -> list[ir.Value]:
    """What a patch (patch_spec.py) has for eight weights of row g or g + 8, by twos; zeros are
    there then. patch: shared address of the lane's 16 bytes."""
    place = unit.at(patch, (part * TILE_ROWS + row * OCTET) * QUAD * LOAD_BYTES)
    words = unit.ptx.load_shared(place)
    unit.ptx.store_shared(place, [i32(0)] * LOAD_WORDS)
    return words


def loaded_words(unit: Unit, block: ir.Value) -> list[list[ir.Value]]:
    """The lane's words of a block, by quarters."""
    step = LANES * LOAD_BYTES
    return [unit.ptx.load_shared(unit.at(block, word * step)) for word in range(unit.spec.bits)]
