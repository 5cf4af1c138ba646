"""What outliers of a run (runs.py) give, as instructions: run_cuda.py says which, and of what.

An entry is a column in the segment and a value; it is multiplied by that column of x' of each input
that the lane has. Totals are float32, in units of 1.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .codes_cuda import SUBNORMAL_UNIT
from .ptx import Ptx, f32, i32
from .runs import HALF_MASK
from .unit_cuda import HALF_BYTES, add_floats, packed, unpacked

__all__ = ["add_entry", "entries_adder", "pairs_adder"]


@intrinsic
def add_entry(typingctx, entry, x, step, totals):
    """The totals, grown by an entry's products.

    x: shared address of the segment's x' of the first input; step: bytes from an input to the next.
    """

    def codegen(context, builder, signature, arguments):
        entry, x, step, totals = arguments
        grown = grown_by_entry(Ptx(builder), entry, x, step, unpacked(builder, totals))
        return packed(builder, grown)

    return totals(*(types.int32,) * 3, totals), codegen


def entries_adder(at_once: int, stride: int) -> Any:
    """add_entries(place, behind, zeros, x, step, totals), as `add_entry`, of some entries.

    They lie `stride` bytes apart from the shared address `place` on; those from `behind` on are
    none. zeros: of a word that is 0.
    """

    @intrinsic
    def add_entries(typingctx, place, behind, zeros, x, step, totals):
        def codegen(context, builder, signature, arguments):
            place, behind, zeros, x, step, totals = arguments
            ptx, totals = Ptx(builder), unpacked(builder, totals)
            grown = grown_by_entries(ptx, at_once, stride, place, behind, zeros, x, step, totals)
            return packed(builder, grown)

        return totals(*(types.int32,) * 5, totals), codegen

    return add_entries


def grown_by_entries(
    ptx: Ptx, at_once: int, stride: int, place, behind, zeros, x, step, totals: list[ir.Value]
) -> list[ir.Value]:
    """What `entries_adder` adds up."""
    entries = []
    for i in range(at_once):
        own = ptx.builder.add(place, i32(i * stride))
        there = ptx.builder.icmp_signed("<", own, behind)
        entries += ptx.load_shared(ptx.builder.select(there, own, zeros), 1)
    for entry in entries:
        totals = grown_by_entry(ptx, entry, x, step, totals)
    return totals


def grown_by_entry(ptx: Ptx, entry, x, step, totals: list[ir.Value]) -> list[ir.Value]:
    """What `add_entry` adds up."""
    column = ptx.builder.and_(entry, i32(HALF_MASK))
    place = ptx.builder.add(x, ptx.builder.mul(column, i32(HALF_BYTES)))
    value, grown = ptx.floats(entry)[1], []
    for i, total in enumerate(totals):
        if i:
            place = ptx.builder.add(place, step)
        grown.append(ptx.builder.fma(value, ptx.load_shared_half(place), total))
    return grown


def pairs_adder(lane_bytes: int) -> Any:
    """add_pairs(place, totals): to float32 in shared memory, in units of SUBNORMAL_UNIT there.

    Two of them side by side, and the next two `lane_bytes` on.
    """

    @intrinsic
    def add_pairs(typingctx, place, totals):
        def codegen(context, builder, signature, arguments):
            place, totals = arguments
            add_scaled_pairs(Ptx(builder), lane_bytes, place, unpacked(builder, totals))
            return context.get_dummy_value()

        return types.none(types.int32, totals), codegen

    return add_pairs


def add_scaled_pairs(ptx: Ptx, lane_bytes: int, place, totals: list[ir.Value]) -> None:
    """What `pairs_adder` does."""
    scaled = [ptx.builder.fmul(total, f32(SUBNORMAL_UNIT)) for total in totals]
    for first in range(0, len(scaled), 2):
        own = ptx.builder.add(place, i32(first // 2 * lane_bytes))
        add_floats(ptx, own, scaled[first : first + 2])
