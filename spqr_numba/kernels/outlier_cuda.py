"""What outliers of a run (runs.py) give with one input, as instructions: run_cuda.py says which.

An entry is a column in the segment and a value; it is multiplied by that column of x'. The total is
float32, in units of 1.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .ptx import Ptx, i32
from .runs import HALF_MASK
from .unit_cuda import HALF_BYTES

__all__ = ["add_entry", "entries_adder"]


@intrinsic
def add_entry(typingctx, entry, x, total):
    """The total, grown by an entry's product. x: shared address of the segment's x'."""

    def codegen(context, builder, signature, arguments):
        return grown_by_entry(Ptx(builder), *arguments)

    return types.float32(types.int32, types.int32, types.float32), codegen


def entries_adder(at_once: int, stride: int) -> Any:
    """add_entries(place, behind, zeros, x, total), as `add_entry`, of some entries.

    They lie `stride` bytes apart from the shared address `place` on; those from `behind` on are
    none. zeros: of a word that is 0.
    """

    @intrinsic
    def add_entries(typingctx, place, behind, zeros, x, total):
        def codegen(context, builder, signature, arguments):
            return grown_by_entries(Ptx(builder), at_once, stride, *arguments)

        return types.float32(*(types.int32,) * 4, types.float32), codegen

    return add_entries


def grown_by_entries(
    ptx: Ptx, at_once: int, stride: int, place, behind, zeros, x, total: ir.Value
) -> ir.Value:
    """What `entries_adder` adds up."""
    entries = []
    for i in range(at_once):
        own = ptx.builder.add(place, i32(i * stride))
        there = ptx.builder.icmp_signed("<", own, behind)
        entries += ptx.load_shared(ptx.builder.select(there, own, zeros), 1)
    for entry in entries:
        total = grown_by_entry(ptx, entry, x, total)
    return total


def grown_by_entry(ptx: Ptx, entry, x, total: ir.Value) -> ir.Value:
    """What `add_entry` adds up."""
    column = ptx.builder.and_(entry, i32(HALF_MASK))
    place = ptx.builder.add(x, ptx.builder.mul(column, i32(HALF_BYTES)))
    return ptx.builder.fma(ptx.floats(entry)[1], ptx.load_shared_half(place), total)
