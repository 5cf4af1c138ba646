"""A unit of a prepared weight (prepared.py) and eight or sixteen inputs.

The eight columns of an mma's second operand are inputs, and the columns of one group its depth::

    mma.m16n8k16    groups of 16        mma.m16n8k8    groups of 8

x' lies as [columns, 8 inputs], so ldmatrix brings it to the lanes; the columns of a group are in
the order in which the first operand has them (several_inputs_cuda.py). For that operand the lanes
of a quad must all hold codes of the same group, and the lane t takes its quarter t: each of the
four reads a word of the loads of all (prepared.py). Sums over one group come out, of rows g and
g + 8 and the inputs 2t and 2t + 1, and take the scale of their row. One lane of the quad has
decoded that, and left it as float32 where the codes were, which all lanes have in registers by
then.

What the zeros take away, the sum of scale * zero * X over an octet, is a product of matrices too:
mma.m16n8k8 of tf32 has eleven bits of a factor, so a factor is two, and the lower parts of both are
not multiplied with each other, which leaves out less than 2^-22 of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .codes_cuda import group_codes, group_places
from .prepared import LANES, OCTET, group_pairs
from .ptx import Ptx, f32, i32, packed
from .unit_cuda import LOAD_BYTES, Unit

__all__ = ["AT_ONCE", "UnitOfSeveral", "pair_summer"]

AT_ONCE = 8  # inputs of an mma
OCTETS_TOGETHER = 2  # whose scales have room where a block's codes were
SCALE_BYTES = 4 * 2 * AT_ONCE * OCTET  # of an octet
MINUS_ONES = 0x80018001  # two subnormal halves, whose products are in units of SUBNORMAL_UNIT


class UnitOfSeveral(Unit):
    """A unit and some eights of inputs; four totals for each eight: of row g and the inputs 2t and
    2t + 1, of row g + 8 and the same."""

    def __init__(self, ptx, spec, unit, lane, x, x_step, x_sums, sums_step) -> None:
        """x: shared address of x' of the unit's first column and the first eight inputs, and
        x_step: bytes from there to the next eight; so x_sums, of -X of its first octet."""
        super().__init__(ptx, spec, unit, lane)
        row = self.builder.lshr(lane, i32(2))
        own = self.builder.add(unit, self.times(self.in_quad, 4))
        self.codes = [self.builder.add(own, self.load_of(i32(quad_lane))) for quad_lane in range(4)]
        x = self.builder.add(x, self.place_of_matrix_row())
        own = self.builder.add(self.times(self.in_quad, 8 * AT_ONCE), self.times(row, 8))
        self.inputs, self.x_sums = [x], [self.builder.add(x_sums, own)]
        for _ in range(1, spec.inputs // AT_ONCE):
            self.inputs.append(self.builder.add(self.inputs[-1], x_step))
            self.x_sums.append(self.builder.add(self.x_sums[-1], sums_step))
        odd, upper = self.builder.and_(lane, i32(1)), self.builder.and_(lane, i32(2))
        put = self.builder.add(self.times(odd, 2 * 4 * LANES), self.times(upper, 4))
        self.row_place = self.builder.add(unit, self.times(row, LOAD_BYTES))
        self.scale_place = self.builder.add(self.row_place, put)

    def place_of_matrix_row(self) -> ir.Value:
        """Where the row of x' is whose address the lane has: of a group, then of that four on."""
        rows = self.spec.group_size
        other = self.builder.and_(self.lane, i32(rows))
        row = self.builder.and_(self.lane, i32(rows - 1))
        return self.times(self.builder.add(row, self.times(other, 4)), LOAD_BYTES)

    def add_block(self, totals: list[ir.Value], block: int) -> list[ir.Value]:
        """Some octets at a time; each lane of the quad has groups in every octet."""
        words = [self.words_of(block, quad_lane) for quad_lane in range(4)]
        for first in range(0, self.spec.octets, OCTETS_TOGETHER):
            octets = range(first, min(first + OCTETS_TOGETHER, self.spec.octets))
            totals = self.prepare_octets(totals, block, octets)
            for quad_lane in range(4):
                if quad_lane and self.spec.inputs > AT_ONCE:
                    self.ptx.meet_warp()  # so less is loaded ahead: registers are scarce
                pairs = group_codes(self.ptx, words[quad_lane], self.spec.group_size)
                for place, octet in enumerate(octets):
                    scales = self.scales_of(place, quad_lane)
                    totals = self.add_groups(totals, pairs, scales, block, octet, quad_lane)
        return totals

    def words_of(self, block: int, quad_lane: int) -> list[ir.Value]:
        """Code pairs of the groups of a lane of the quad, of the own lane's quarter."""
        first, step = block * self.spec.block_bytes, LANES * LOAD_BYTES
        return [
            self.ptx.load_shared(self.at(self.codes[quad_lane], first + word * step), 1)[0]
            for word in range(self.spec.bits)
        ]

    def prepare_octets(self, totals: list[ir.Value], block: int, octets: range) -> list[ir.Value]:
        """The totals less the zeros of some octets of a block, whose scales are there then."""
        numbers = [block * self.spec.octets + octet for octet in octets]
        statistics = [self.decoded(number) for number in numbers]
        self.ptx.meet_warp()
        for place, (number, rows) in enumerate(zip(numbers, statistics, strict=True)):
            scales = [self.ptx.floats(scale) for scale, _ in rows]
            self.leave(scales, place, octets[place])
            zeros = [self.ptx.floats(zero) for _, zero in rows]
            totals = self.less_zeros(totals, scales, zeros, number)
        self.ptx.meet_warp()
        return totals

    def leave(self, scales: list[list[ir.Value]], place: int, octet: int) -> None:
        """The lane's scales of an octet for the others: float32 [4 lanes of a quad, 8 rows, 2
        groups of the lane, row g or g + 8], as the lanes own groups in prepared.py; over what
        codes are larger by at their place."""
        spec = self.spec
        places = group_places(spec.bits, spec.group_size)[2 * octet : 2 * octet + 2]
        for group in range(2):
            at = self.at(self.scale_place, place * SCALE_BYTES + group * 4 * LANES)
            scaled = [
                self.builder.fmul(scales[row][group], f32(2.0 ** -places[row]))
                if places[row]
                else scales[row][group]
                for row in range(2)
            ]
            self.ptx.store_shared_floats(at, scaled)

    def scales_of(self, place: int, quad_lane: int) -> list[ir.Value]:
        """Of both groups of a lane of the quad, the rows g and g + 8."""
        at = self.at(self.row_place, place * SCALE_BYTES + quad_lane * 4 * LANES)
        return self.ptx.load_shared_floats(at, 4)

    def add_groups(
        self,
        totals: list[ir.Value],
        pairs: list[ir.Value],
        scales: list[ir.Value],
        block: int,
        octet: int,
        quad_lane: int,
    ) -> list[ir.Value]:
        """The totals with both groups of a lane in an octet of a block."""
        spec = self.spec
        columns = ((block * spec.octets + octet) * OCTET + quad_lane) * spec.group_size
        inputs = [
            self.ptx.load_matrices(self.at(x, columns * LOAD_BYTES), 2 * spec.pairs)
            for x in self.inputs
        ]
        for half in range(2):
            a = [pairs[pair] for pair in group_pairs(spec.pairs, octet, half)]
            b = [part[half * spec.pairs : (half + 1) * spec.pairs] for part in inputs]
            sums = [value for part in b for value in self.ptx.mma([f32(0)] * 4, a, part)]
            totals = [
                self.builder.fma(scales[2 * half + i // 2 % 2], sums[i], total)
                for i, total in enumerate(totals)
            ]
        return totals

    def less_zeros(
        self, totals: list[ir.Value], scales: list[Any], zeros: list[Any], octet: int
    ) -> list[ir.Value]:
        """totals - the sum of scale * zero * X over an octet."""
        parts = []
        for group in range(2):
            for row in range(2):
                taken = self.builder.fmul(scales[row][group], zeros[row][group])
                parts.append(self.ptx.tf32_parts(taken))
        high, low = ([part[i] for part in parts] for i in range(2))
        grown: list[ir.Value] = []
        for first, address in enumerate(self.x_sums):
            x_sums = self.ptx.load_shared_floats(self.at(address, 8 * AT_ONCE * 4 * octet), 2)
            x_parts = [self.ptx.tf32_parts(x_sum) for x_sum in x_sums]
            x_high, x_low = ([part[i] for part in x_parts] for i in range(2))
            sums = totals[4 * first : 4 * first + 4]
            for a, b in ((high, x_low), (low, x_high), (high, x_high)):
                sums = self.ptx.mma_tf32(sums, a, b)
            grown += sums
        return grown


@cache
def pair_summer(group_size: int) -> Any:
    """sum_pair(address, lane) -> float32 [4]: -X of the inputs 2t and 2t + 1, of a group and the
    next, input by input.

    address: shared, of x' of the first group's first column and eight inputs.
    """

    @intrinsic
    def sum_pair(typingctx, address, lane):
        def codegen(context, builder, signature, arguments):
            return packed(builder, pair_sums(Ptx(builder), group_size, *arguments))

        return types.UniTuple(types.float32, 4)(types.int32, types.int32), codegen

    return sum_pair


def pair_sums(ptx: Ptx, group_size: int, address: ir.Value, lane: ir.Value) -> list[ir.Value]:
    """What `pair_summer` sums: a product with -1."""
    row = ptx.builder.and_(lane, i32(2 * group_size - 1))
    place = ptx.builder.add(address, ptx.builder.mul(row, i32(LOAD_BYTES)))
    pairs = group_size // OCTET
    columns = ptx.load_matrices(place, 2 * pairs)
    ones = [i32(MINUS_ONES)] * (2 * pairs)
    first, second = (
        ptx.mma([f32(0)] * 4, ones, columns[i * pairs : (i + 1) * pairs]) for i in range(2)
    )
    return [first[0], second[0], first[1], second[1]]
