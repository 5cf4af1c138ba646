"""What a warp does with a unit of a prepared weight (prepared.py): 16 rows, 32 groups, one input.

The multiply-adds are the tensor cores': mma.m16n8k16 multiplies codes [16 rows, 16] by x' [16, 8].
The four lanes of a row's quad hold codes of eight groups, so the eight columns of the second
operand, of which one input would need one, take a group each: column c is x' in the places of group
c and zero elsewhere. Then sums [16 rows, 8 groups] come out, four to a lane, and the lane decodes
the four scales and zeros that belong to them::

    total[row] += scale * (sums[row, group] - zero * X[group])        X: the sum of x' over a group

A code needs no conversion: masked out of its word it is a subnormal half, code * 2^(place - 24),
which tensor cores multiply exactly. Sums of codes at other places are kept apart and scaled as they
are put together; the 2^-24 stays in (X is given in the same unit) until the very end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .prepared import (
    BLOCK_COLUMNS,
    LANES,
    MANTISSA_BITS,
    OCTET,
    PAIRS,
    QUARTERS,
    UNIT_GROUPS,
    UNIT_OCTETS,
    pair_places,
    shift_and_place,
)
from .ptx import Ptx, f32, i32

__all__ = ["HALF_BYTES", "SUBNORMAL_UNIT", "UnitSpec", "group_summer", "unit_multiplier"]

HALF_BYTES = 2
LOAD_BYTES = 16
MAGIC = 0x64006400  # two halves of 2^MANTISSA_BITS, whose last bit is worth 1
SUBNORMAL_UNIT = 2.0**-24  # what the last bit of a half is worth by itself


@dataclass(frozen=True)
class UnitSpec:
    """The settings on which the instructions depend."""

    bits: int
    stat_bits: int
    group_size: int

    @property
    def octets(self) -> int:
        """Of a block."""
        return BLOCK_COLUMNS // (OCTET * self.group_size)

    @property
    def blocks(self) -> int:
        """Of a unit."""
        return UNIT_OCTETS // self.octets

    @property
    def pairs(self) -> int:
        """Of a quarter of a group."""
        return self.group_size // OCTET

    @property
    def columns(self) -> int:
        """Of a unit."""
        return UNIT_GROUPS * self.group_size

    @property
    def octet_bytes(self) -> int:
        """Of x'."""
        return OCTET * self.group_size * HALF_BYTES

    @property
    def block_bytes(self) -> int:
        """Of a block's codes in a tile."""
        return self.bits * LANES * LOAD_BYTES

    @property
    def stat_bytes(self) -> int:
        """Of a unit's statistics codes in a tile."""
        return self.stat_bits * LANES * 4

    @property
    def second_bytes(self) -> int:
        """Of a unit's second level in a tile."""
        return UNIT_OCTETS * 4 * LOAD_BYTES

    @property
    def record_bytes(self) -> int:
        """Of a unit in a tile, without its second level."""
        return self.blocks * self.block_bytes + self.stat_bytes

    @property
    def bytes(self) -> int:
        """Of a unit in a tile: its record, its second level."""
        return self.record_bytes + self.second_bytes


@cache
def unit_multiplier(spec: UnitSpec) -> Any:
    """multiply(unit, low, low_step, high, high_step, x_sums, total_low, total_high) -> totals.

    The totals are float32, of rows g and g + 8 and the lane's groups. All others are shared
    addresses, int32: of the unit's bytes; low, high: of x' for the operand's first and second
    register, in the unit's first octet, and the steps from octet to octet; x_sums: of X of the
    group 2t there. `lane` is the thread's place in its warp.
    """

    @intrinsic
    def multiply(
        typingctx, unit, lane, low, low_step, high, high_step, x_sums, total_low, total_high
    ):
        result = types.UniTuple(types.float32, 2)

        def codegen(context, builder, signature, arguments):
            totals = Unit(Ptx(builder), spec, *arguments[:7]).add_to(list(arguments[7:]))
            value = ir.Constant(context.get_value_type(result), ir.Undefined)
            for i, total in enumerate(totals):
                value = builder.insert_value(value, total, i)
            return value

        return result(*(types.int32,) * 7, *(types.float32,) * 2), codegen

    return multiply


class Unit:
    """Writes the instructions of one unit's product."""

    def __init__(
        self,
        ptx: Ptx,
        spec: UnitSpec,
        unit: ir.Value,
        lane: ir.Value,
        low: ir.Value,
        low_step: ir.Value,
        high: ir.Value,
        high_step: ir.Value,
        x_sums: ir.Value,
    ) -> None:
        self.ptx, self.spec, self.builder = ptx, spec, ptx.builder
        self.codes = self.builder.add(unit, self.times(lane, LOAD_BYTES))
        statistics = spec.blocks * spec.block_bytes
        self.statistics = self.at(self.builder.add(unit, self.times(lane, 4)), statistics)
        in_quad = self.builder.and_(lane, i32(3))
        second = self.builder.add(unit, self.times(in_quad, LOAD_BYTES))
        self.second = self.at(second, statistics + spec.stat_bytes)
        self.inputs = (low, low_step), (high, high_step)
        self.x_sums = x_sums

    def at(self, address: ir.Value, distance: int) -> ir.Value:
        """address + distance."""
        return self.builder.add(address, i32(distance)) if distance else address

    def times(self, value: ir.Value, factor: int) -> ir.Value:
        """value * factor."""
        return self.builder.mul(value, i32(factor))

    def add_to(self, totals: list[ir.Value]) -> list[ir.Value]:
        """The totals of rows g and g + 8, with this unit's products added."""
        words = [
            self.ptx.load_shared_word(self.at(self.statistics, word * LANES * 4))
            for word in range(self.spec.stat_bits)
        ]
        for block in range(self.spec.blocks):
            for i, sums in enumerate(self.block_sums(block)):
                octet = block * self.spec.octets + i
                codes = exact_codes(self.ptx, words, range(4 * octet, 4 * octet + 4))
                totals = self.scaled(totals, sums, codes, octet)
        return totals

    def block_sums(self, block: int) -> list[list[ir.Value]]:
        """The sums of code * x' of each octet of a block, in units of SUBNORMAL_UNIT."""
        spec = self.spec
        loaded = [
            self.ptx.load_shared(
                self.at(self.codes, block * spec.block_bytes + word * LANES * LOAD_BYTES)
            )
            for word in range(spec.bits)
        ]
        chains = [[f32(0)] * 4 for _ in range(4)]  # one for each operand of a quarter
        inputs: list[list[list[ir.Value]]] = []
        for quarter in range(QUARTERS):
            pairs = masked_codes(self.ptx, [words[quarter] for words in loaded])
            first = quarter * spec.pairs
            if first % 4 == 0:
                inputs = [
                    self.load_inputs(block * spec.octets + octet, first)
                    for octet in range(spec.octets)
                ]
            for operand in range(4):
                octet, pair = divmod(operand, spec.pairs)
                b = [part[(first + pair) % 4] for part in inputs[octet]]
                a = pairs[4 * operand : 4 * operand + 4]
                chains[operand] = self.ptx.mma(chains[operand], a, b, "f16")
        return [
            self.joined(chains, range(octet * spec.pairs, (octet + 1) * spec.pairs))
            for octet in range(spec.octets)
        ]

    def joined(self, chains: list[list[ir.Value]], operands: Iterable[int]) -> list[ir.Value]:
        """The sum of some operands' chains, each brought back from its codes' place."""
        sums: list[ir.Value] = []
        for i in range(4):
            total = None
            for operand in operands:
                factor = 2.0 ** -code_place(self.spec.bits, operand, row=i // 2)
                value = chains[operand][i]
                if total is not None:
                    total = self.builder.fma(value, f32(factor), total)
                else:
                    total = self.builder.fmul(value, f32(factor)) if factor < 1 else value
            sums.append(total)
        return sums

    def load_inputs(self, octet: int, word: int) -> list[list[ir.Value]]:
        """Four words of x' from `word` of the group on, for both registers of the operand."""
        return [
            self.ptx.load_shared(
                self.at(self.builder.add(start, self.times(step, octet)), 4 * word)
            )
            for start, step in self.inputs
        ]

    def scaled(
        self, totals: list[ir.Value], sums: list[ir.Value], codes: list[ir.Value], octet: int
    ) -> list[ir.Value]:
        """totals + scale * (sums - zero * X) over the lane's two groups of an octet, both rows."""
        ptx, builder = self.ptx, self.builder
        second = ptx.load_shared(self.at(self.second, 4 * LOAD_BYTES * octet))
        x_sums = ptx.load_shared_floats(self.at(self.x_sums, 4 * OCTET * octet))
        grown = []
        for row, total in enumerate(totals):
            scale, zero = codes[2 * row : 2 * row + 2]
            scales = ptx.floats(ptx.fma_halves(scale, second[0], second[1]))
            zeros = ptx.floats(ptx.fma_halves(zero, second[2], second[3]))
            for group in range(2):
                minus = builder.fsub(f32(-0.0), zeros[group])
                centred = builder.fma(minus, x_sums[group], sums[2 * row + group])
                total = builder.fma(scales[group], centred, total)
            grown.append(total)
        return grown


@cache
def group_summer(group_size: int) -> Any:
    """sum_group(address) -> float32 sum of a group's x' in shared memory, in SUBNORMAL_UNIT."""

    @intrinsic
    def sum_group(typingctx, address):
        def codegen(context, builder, signature, arguments):
            return group_sum(Ptx(builder), arguments[0], group_size)

        return types.float32(types.int32), codegen

    return sum_group


def group_sum(ptx: Ptx, address: ir.Value, group_size: int) -> ir.Value:
    """What `group_summer` sums."""
    total = f32(0)
    for start in range(0, group_size * HALF_BYTES, LOAD_BYTES):
        for word in ptx.load_shared(ptx.builder.add(address, i32(start))):
            for value in ptx.floats(word):
                total = ptx.builder.fadd(total, value)
    return ptx.builder.fmul(total, f32(SUBNORMAL_UNIT))


# --- Codes out of words


def masked_codes(ptx: Ptx, words: list[ir.Value]) -> list[ir.Value]:
    """Sixteen pairs of codes, as subnormal halves; `code_place` says how large they came out."""
    word_of = Shifted(ptx, words)
    pairs = []
    for pair in range(PAIRS):
        value = None
        for word, places, mask in fields(len(words), pair):
            moved = word_of(word, places)
            if value is None:
                value = ptx.builder.and_(moved, i32(mask))
            else:
                value = ptx.masked_or(moved, mask, value)
        pairs.append(value)
    return pairs


def exact_codes(ptx: Ptx, words: list[ir.Value], which: Iterable[int]) -> list[ir.Value]:
    """Some of the pairs, as halves of the codes' values.

    A code in the last bits of 2^MANTISSA_BITS adds its value to it; one multiply-add takes the
    power away, and the code's place.
    """
    bits, word_of, pairs = len(words), Shifted(ptx, words), []
    for pair in which:
        value: ir.Value = i32(MAGIC)
        for word, places, mask in fields(bits, pair):
            value = ptx.masked_or(word_of(word, places), mask, value)
        operand, register = divmod(pair, 4)
        place = code_place(bits, operand, row=register % 2)
        factor, minus = 2.0**-place, -(2.0 ** (MANTISSA_BITS - place))
        pairs.append(ptx.fma_halves(value, both(factor), both(minus)))
    return pairs


class Shifted:
    """Words moved to the right, each distance once."""

    def __init__(self, ptx: Ptx, words: list[ir.Value]) -> None:
        self.ptx, self.words = ptx, words
        self.known: dict[tuple[int, int], ir.Value] = {}

    def __call__(self, word: int, places: int) -> ir.Value:
        """A word moved by so many places."""
        if not places:
            return self.words[word]
        if (word, places) not in self.known:
            self.known[word, places] = self.ptx.builder.lshr(self.words[word], i32(places))
        return self.known[word, places]


def fields(bits: int, pair: int) -> list[tuple[int, int, int]]:
    """(word, how far it moves to the right, mask of both halves) of a pair's one or more parts."""
    found = []
    for word, shift, part, width in pair_places(bits, pair):
        if width < bits:
            places, place = shift - part, part
        else:
            places, place = shift_and_place(bits, shift)
        mask = ((1 << width) - 1) << place
        found.append((word, places, mask | mask << 16))
    return found


def code_place(bits: int, operand: int, row: int) -> int:
    """The bit at which the codes of row g (0) or g + 8 (1) begin in an operand's halves."""
    places = set()
    for register in (row, row + 2):
        for _, shift, _, width in pair_places(bits, 4 * operand + register):
            places.add(0 if width < bits else shift_and_place(bits, shift)[1])
    [place] = places
    return place


def both(value: float) -> ir.Constant:
    """A word whose halves are `value`."""
    bits = int(np.float16(value).view(np.uint16))
    return i32(bits | bits << 16)
