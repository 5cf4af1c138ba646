"""What outliers of a run (runs.py) give with eight or sixteen inputs, as instructions.

mma.m16n8k16 takes x' of 16 entries' columns, [16 inputs, 16 entries], which ldmatrix gathers, each
lane with the address of an entry's column; and of an entry its value in its own row and zero in the
others, [16 entries, 8 rows]. A lane holds four entries' values for one row, g: since a run's rows
ascend, the entries of its row are side by side, and bits of a word say which they are. So no lane
waits for a longer row than its own.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from .ptx import Ptx, i32, packed, unpacked
from .runs import HALF_MASK
from .unit_cuda import LOAD_BYTES, WORD_BYTES, UnitSpec
from .unit_several_cuda import AT_ONCE

__all__ = ["Entries", "entries_multiplier"]

TO_SIGNS = 0x10204080  # times four bits: each the highest of a byte
ALL = 0xFFFFFFFF


def entries_multiplier(spec: UnitSpec) -> Any:
    """multiply_entries(place, own, lane, x, x_step, totals) -> totals, grown by 32 entries.

    place: shared address of the first entry, which 16 divides; own: int32 [3], counted from there:
    the first entry of the lane's row, the end of its entries, and the end of all that are there.
    x and x_step as in run_several_cuda.py.
    """

    @intrinsic
    def multiply_entries(typingctx, place, own, lane, x, x_step, totals):
        def codegen(context, builder, signature, arguments):
            place, own, lane, x, x_step, totals = arguments
            entries = Entries(Ptx(builder), spec, place, unpacked(builder, own), lane)
            return packed(builder, entries.add_to(unpacked(builder, totals), x, x_step))

        return totals(place, own, lane, x, x_step, totals), codegen

    return multiply_entries


class Entries:
    """Writes the instructions of 32 entries' product."""

    def __init__(
        self, ptx: Ptx, spec: UnitSpec, place: ir.Value, own: list[ir.Value], lane: ir.Value
    ) -> None:
        """As `entries_multiplier`."""
        self.ptx, self.spec, self.builder, self.place = ptx, spec, ptx.builder, place
        self.own, self.lane = own, lane
        self.in_quad = self.builder.and_(lane, i32(3))

    def add_to(self, totals: list[ir.Value], x: ir.Value, x_step: ir.Value) -> list[ir.Value]:
        """The totals with the entries' products added."""
        row = self.builder.add(x, self.place_of_column())
        first, second = self.ptx.load_matrices(row, 4), [i32(0)] * 4
        if self.spec.inputs > AT_ONCE:
            second = self.ptx.load_matrices(self.builder.add(row, x_step), 4)
        bits = self.bits_of_row()
        for some in range(2):
            a = [part[2 * some + k] for k in range(2) for part in (first, second)]
            totals = self.ptx.mma(totals, a, self.values(bits, some))
        return totals

    def place_of_column(self) -> ir.Value:
        """How far behind x' of the segment's first column that of the lane's entry lies."""
        number = in_order_of_depth(self.builder, self.lane, spread=False)
        entry = self.ptx.load_shared(self.place_of(number), 1)[0]
        column = self.builder.and_(entry, i32(HALF_MASK))
        if self.spec.group_size > AT_ONCE:
            column = in_order_of_depth(self.builder, column, spread=True)
        return self.builder.mul(column, i32(LOAD_BYTES))

    def place_of(self, number: ir.Value) -> ir.Value:
        """The address of an entry; of one that is not there, that of the first."""
        there = self.builder.icmp_signed("<", number, self.own[2])
        number = self.builder.select(there, number, i32(0))
        return self.builder.add(self.place, self.builder.mul(number, i32(WORD_BYTES)))

    def bits_of_row(self) -> ir.Value:
        """A bit for each entry of the lane's row, from the lane's first entry on."""
        behind = []
        for end in self.own[:2]:
            positive = self.builder.icmp_signed(">", end, i32(0))
            places = self.builder.select(positive, end, i32(0))
            behind.append(self.ptx.shifted_left(i32(ALL), places))
        of_row = self.builder.and_(behind[0], self.builder.xor(behind[1], i32(ALL)))
        return self.builder.lshr(of_row, self.builder.mul(self.in_quad, i32(4)))

    def values(self, bits: ir.Value, some: int) -> list[ir.Value]:
        """The second operand of one of the two products: the lane's four values, or zeros."""
        first = self.builder.add(self.builder.mul(self.in_quad, i32(4)), i32(16 * some))
        words = self.ptx.load_shared(self.place_of(first))
        own = self.builder.and_(self.builder.lshr(bits, i32(16 * some)), i32(15))
        signs = self.builder.mul(own, i32(TO_SIGNS))
        return [
            self.builder.and_(
                self.ptx.upper_halves(words[i], words[i + 1]), self.ptx.signs(signs, i)
            )
            for i in (0, 2)
        ]


def in_order_of_depth(builder: ir.IRBuilder, number: ir.Value, *, spread: bool) -> ir.Value:
    """Of 16 things, of which the lane t of a quad has 4t ... 4t + 3, at the depths 2t, 2t + 1,
    2t + 8 and 2t + 9 of a product: the depth of one, or (not `spread`) which one is at a depth."""
    moved = builder.and_(number, i32(0xFFFFFFF1))
    if spread:
        parts = (12, 1, builder.lshr), (2, 2, builder.shl)
    else:
        parts = (6, 1, builder.shl), (8, 2, builder.lshr)
    for bits, places, shift in parts:
        moved = builder.or_(moved, shift(builder.and_(number, i32(bits)), i32(places)))
    return moved
