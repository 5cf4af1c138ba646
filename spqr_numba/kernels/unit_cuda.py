"""What a warp does with a unit of a prepared weight (prepared.py): 16 rows, 32 groups.

Here with one input; unit_several_cuda.py has what eight or sixteen inputs do otherwise.

The multiply-adds are the tensor cores': mma.m16n8k16 multiplies codes [16 rows, 16] by x' [16, 8].
The four lanes of a row's quad hold codes of eight groups, so the eight columns of the second
operand, of which one input would need one, take a group each: column c is x' in the places of group
c and zero elsewhere. One mma takes four codes of a row from each of four groups, or two from each
of eight where a quarter of a group is no more. Then sums [16 rows, 8 groups] come out, four to a
lane, and the lane decodes the four scales and zeros that belong to them::

    total[row] += scale * (sums[row, group] - zero * X[group])        X: the sum of x' over a group

Codes are subnormal halves (codes_cuda.py). Sums of codes at other places are kept apart and scaled
as they are put together; the 2^-24 stays in (X is given in the same unit) until the very end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..format.layout import MatrixSpec
from .codes_cuda import SUBNORMAL_UNIT, code_place, exact_codes, masked_codes
from .prepared import BLOCK_COLUMNS, LANES, OCTET, QUAD, QUARTERS, UNIT_GROUPS, UNIT_OCTETS
from .ptx import Ptx, f32, i32, packed, unpacked

__all__ = [
    "HALF_BYTES",
    "LOAD_BYTES",
    "WORD_BYTES",
    "Unit",
    "UnitOfOne",
    "UnitSpec",
    "add_to_shared",
    "group_summer",
    "put_floats",
    "unit_multiplier",
]

HALF_BYTES = 2
WORD_BYTES = 4
LOAD_BYTES = 16


@dataclass(frozen=True)
class UnitSpec:
    """The settings on which the instructions depend."""

    bits: int
    stat_bits: int
    group_size: int
    inputs: int = 1

    @classmethod
    def of(cls, spec: MatrixSpec, inputs: int = 1) -> UnitSpec:
        """Those of a weight, and so many inputs."""
        return cls(spec.bits, spec.scale_bits, spec.group_size, inputs)

    @property
    def totals(self) -> int:
        """Of a lane."""
        return 2 if self.inputs == 1 else self.inputs // 2

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
def unit_multiplier(spec: UnitSpec, kind: type[Unit]) -> Any:
    """multiply(places, totals) -> totals, grown by what a unit gives.

    places: int32 tuple, what Unit and after it the `kind` of unit begin with; totals: float32
    tuple.
    """

    @intrinsic
    def multiply(typingctx, places, totals):
        def codegen(context, builder, signature, arguments):
            places, totals = (unpacked(builder, value) for value in arguments)
            return packed(builder, kind(Ptx(builder), spec, *places).add_to(totals))

        return totals(places, totals), codegen

    return multiply


class Unit:
    """Writes the instructions of one unit's product; what is the same for any number of inputs."""

    def __init__(self, ptx: Ptx, spec: UnitSpec, unit: ir.Value, lane: ir.Value) -> None:
        """unit: shared address of its bytes, lane: the thread's place in its warp, both i32."""
        self.ptx, self.spec, self.builder = ptx, spec, ptx.builder
        self.unit, self.lane = unit, lane
        self.in_quad = self.builder.and_(lane, i32(3))
        statistics = spec.blocks * spec.block_bytes
        own = self.at(self.builder.add(unit, self.times(lane, 4)), statistics)
        self.words = [
            self.ptx.load_shared(self.at(own, word * LANES * 4), 1)[0]
            for word in range(spec.stat_bits)
        ]
        second = self.builder.add(unit, self.times(self.in_quad, LOAD_BYTES))
        self.second = self.at(second, statistics + spec.stat_bytes)

    def at(self, address: ir.Value, distance: int) -> ir.Value:
        """address + distance."""
        return self.builder.add(address, i32(distance)) if distance else address

    def times(self, value: ir.Value, factor: int) -> ir.Value:
        """value * factor."""
        return self.builder.mul(value, i32(factor))

    def load_of(self, t: ir.Value) -> ir.Value:
        """Bytes from a block's first codes to those of the lane t of the own row
        (`place_of_lane`)."""
        lane = self.builder.or_(self.builder.and_(self.lane, i32(-QUAD)), t)
        place = self.builder.xor(lane, self.builder.lshr(self.lane, i32(3)))
        return self.times(place, LOAD_BYTES)

    def add_to(self, totals: list[ir.Value]) -> list[ir.Value]:
        """The totals with this unit's products added."""
        for block in range(self.spec.blocks):
            totals = self.add_block(totals, block)
        return totals

    def add_block(self, totals: list[ir.Value], block: int) -> list[ir.Value]:
        """The totals with a block's products added."""
        raise NotImplementedError

    def decoded(self, octet: int) -> list[tuple[ir.Value, ir.Value]]:
        """Scales and zeros of rows g and g + 8: halves, of the groups 2t and 2t + 1."""
        codes = exact_codes(self.ptx, self.words, range(4 * octet, 4 * octet + 4))
        second = self.ptx.load_shared(self.at(self.second, 4 * LOAD_BYTES * octet))
        return [
            (
                self.ptx.fma_halves(scale, second[0], second[1]),
                self.ptx.fma_halves(zero, second[2], second[3]),
            )
            for scale, zero in (codes[:2], codes[2:])
        ]

    def grown(
        self, total: ir.Value, scale: ir.Value, value: ir.Value, zero: ir.Value, x_sum: ir.Value
    ) -> ir.Value:
        """total + scale * (value - zero * x_sum)."""
        minus = self.builder.fsub(f32(-0.0), zero)
        return self.builder.fma(scale, self.builder.fma(minus, x_sum, value), total)


class UnitOfOne(Unit):
    """A unit and one input; two totals, of rows g and g + 8 and the lane's groups."""

    def __init__(self, ptx, spec, unit, lane, low, low_step, high, high_step, x_sums) -> None:
        """low, high: of x' for the groups t and t + 4 of the unit's first octet, or of zeros, and
        the steps from octet to octet; x_sums: of X of the group 2t there."""
        super().__init__(ptx, spec, unit, lane)
        self.codes = self.builder.add(unit, self.load_of(self.in_quad))
        self.inputs = (low, low_step), (high, high_step)
        self.x_sums = x_sums

    def add_block(self, totals: list[ir.Value], block: int) -> list[ir.Value]:
        """Octet by octet."""
        for i, sums in enumerate(self.block_sums(block)):
            totals = self.scaled(totals, sums, block * self.spec.octets + i)
        return totals

    def block_sums(self, block: int) -> list[list[ir.Value]]:
        """The sums of code * x' in units of SUBNORMAL_UNIT, four of each octet: of row g and of row
        g + 8, the groups 2t and 2t + 1."""
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
                octet, place = divmod(operand, spec.pairs)
                b = self.second_operand(inputs[octet], first, place)
                a = pairs[4 * operand : 4 * operand + 4]
                chains[operand] = self.ptx.mma(chains[operand], a, b)
        return [
            self.joined(chains, range(octet * spec.pairs, (octet + 1) * spec.pairs))
            for octet in range(spec.octets)
        ]

    def second_operand(
        self, inputs: list[list[ir.Value]], first: int, place: int
    ) -> list[ir.Value]:
        """For the place-th operand of an octet in a quarter, whose words of x' begin at `first`:
        two words for the same groups, which no instruction need bring side by side; one for each
        half of the groups where a quarter has no more."""
        if self.spec.pairs == 1:
            return [words[first % 4] for words in inputs]
        half, step = divmod(place, self.spec.pairs // 2)
        word = (first + 2 * step) % 4
        return inputs[half][word : word + 2]

    def joined(self, chains: list[list[ir.Value]], operands: Iterable[int]) -> list[ir.Value]:
        """The sum of some operands' chains, each brought back from its codes' place."""
        sums: list[ir.Value] = []
        for i in range(4):
            total = None
            for operand in operands:
                factor = 2.0 ** -code_place(self.spec.bits, 4 * operand + i // 2)
                value = chains[operand][i]
                if total is not None:
                    total = self.builder.fma(value, f32(factor), total)
                else:
                    total = self.builder.fmul(value, f32(factor)) if factor < 1 else value
            sums.append(total)
        return sums

    def load_inputs(self, octet: int, word: int) -> list[list[ir.Value]]:
        """Four words of x' from `word` of the group on, for the groups t and t + 4."""
        return [
            self.ptx.load_shared(
                self.at(self.builder.add(start, self.times(step, octet)), 4 * word)
            )
            for start, step in self.inputs
        ]

    def scaled(self, totals: list[ir.Value], sums: list[ir.Value], octet: int) -> list[ir.Value]:
        """totals + scale * (sums - zero * X) over the lane's two groups of an octet."""
        x_sums = self.ptx.load_shared_floats(self.at(self.x_sums, 4 * OCTET * octet), 2)
        grown = []
        for row, words in enumerate(self.decoded(octet)):
            total, (scales, zeros) = totals[row], (self.ptx.floats(word) for word in words)
            for group in range(2):
                value = sums[2 * row + group]
                total = self.grown(total, scales[group], value, zeros[group], x_sums[group])
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


@intrinsic
def add_to_shared(typingctx, address, totals):
    """Add 2 or 4k float32 to shared memory, at an int32 address that their size or 16 divides."""

    def codegen(context, builder, signature, arguments):
        add_floats(Ptx(builder), arguments[0], unpacked(builder, arguments[1]))
        return context.get_dummy_value()

    return types.none(address, totals), codegen


@intrinsic
def put_floats(typingctx, address, values):
    """Four float32 to shared memory, at an int32 address that 16 divides."""

    def codegen(context, builder, signature, arguments):
        Ptx(builder).store_shared_floats(arguments[0], unpacked(builder, arguments[1]))
        return context.get_dummy_value()

    return types.none(address, values), codegen


def add_floats(ptx: Ptx, address: ir.Value, values: list[ir.Value]) -> None:
    """What `add_to_shared` does."""
    at_once = min(len(values), 4)
    for first in range(0, len(values), at_once):
        place = ptx.builder.add(address, i32(4 * first))
        there = ptx.load_shared_floats(place, at_once)
        some = zip(there, values[first : first + at_once], strict=True)
        ptx.store_shared_floats(place, [ptx.builder.fadd(*pair) for pair in some])
