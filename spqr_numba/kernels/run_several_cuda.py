"""What a warp does with a run of outliers (runs.py) and eight or sixteen inputs.

Tensor cores multiply by them, 32 entries a step (outlier_several_cuda.py): at a time so many of the
rows 0 to 7 of the tile and as many of the others, since a step has to wait for itself a good while.
Entries are read from where they were copied to in shared memory; those that did not fit there
follow in their place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .codes_cuda import SUBNORMAL_UNIT
from .launch import numba_cuda
from .outlier_several_cuda import entries_multiplier
from .prepared import LANES
from .ptx import (
    copier,
    copies_done,
    end_of_copies,
    shared_float,
    shared_uint16,
    to_shared_float,
)
from .runs import HEADER_WORDS, TILE_ROWS
from .unit_cuda import HALF_BYTES, LOAD_BYTES, WORD_BYTES, UnitSpec
from .unit_several_cuda import AT_ONCE

__all__ = ["several_run_multiplier"]

cuda = numba_cuda()

HEADER_BYTES = WORD_BYTES * HEADER_WORDS
ROWS = TILE_ROWS // 2  # at a time
int32: Any = np.int32


def several_run_multiplier(spec: UnitSpec) -> Any:
    """multiply_run(run, at, slot, x, x_step, lane): a tile's outliers in a segment, times x'.

    run: global address; at: shared address of its copy, as long as a unit; slot: of the share that
    the sums are added to; x: of x' of the segment's first column and the first eight inputs, and
    x_step: bytes to the next eight.
    """
    room = spec.bytes // WORD_BYTES - HEADER_WORDS
    multiply_some, copy_rest = halves_multiplier(spec), rest_copier(room)
    add_to_slot = half_adder(spec)

    @cuda.jit(device=True, forceinline=True)
    def multiply_run(run, at, slot, x, x_step, lane):
        count, first = end_of_row(at, int32(TILE_ROWS - 1)), int32(0)
        while first < count:
            if first:
                copy_rest(run, at, first, count, lane)
            behind = int32(min(count, first + room))
            lower, upper = multiply_some(at, first, behind, x, x_step, lane)
            add_to_slot(slot, int32(0), lane, lower)
            add_to_slot(slot, int32(1), lane, upper)
            first = int32(first + room)

    return multiply_run


@cuda.jit(device=True, forceinline=True)
def end_of_row(at, row):
    """How many entries of a run there are up to the end of a row; row -1 is before all."""
    return int32(shared_uint16(int32(at + HALF_BYTES * row))) if row >= 0 else int32(0)


def halves_multiplier(spec: UnitSpec) -> Any:
    """multiply_some(at, first, behind, x, x_step, lane) -> two float32 [4], of rows 0 to 7 and of
    the others, as `half_adder` takes them: of the run's entries from `first` on, which lie at `at`,
    and before `behind`."""
    multiply_step, nothing = step_multiplier(spec), (np.float32(0),) * 4

    @cuda.jit(device=True, forceinline=True)
    def entries_of(at, row, behind):
        return end_of_row(at, int32(row - 1)), int32(min(end_of_row(at, row), behind))

    @cuda.jit(device=True, forceinline=True)
    def multiply_some(at, first, behind, x, x_step, lane):
        own = entries_of(at, int32(lane >> 2), behind)
        other = entries_of(at, int32(ROWS + (lane >> 2)), behind)
        middle = end_of_row(at, int32(ROWS - 1))
        start, stop = first, int32(min(middle, behind))
        upper_start = int32(max(first, middle) & -4)
        lower, upper = nothing, nothing
        while start < stop or upper_start < behind:
            lower = multiply_step(at, first, start, stop, behind, own, x, x_step, lane, lower)
            upper = multiply_step(
                at, first, upper_start, behind, behind, other, x, x_step, lane, upper
            )
            start, upper_start = int32(start + LANES), int32(upper_start + LANES)
        return lower, upper

    return multiply_some


def step_multiplier(spec: UnitSpec) -> Any:
    """multiply_step(at, first, start, stop, behind, own, x, x_step, lane, totals) -> totals, grown
    by the entries of the lane's row among 32 from `start` on; by none if that is not before `stop`.
    own: the row's first entry, and the end of its entries."""
    multiply_entries = entries_multiplier(spec)

    @cuda.jit(device=True, forceinline=True)
    def multiply_step(at, first, start, stop, behind, own, x, x_step, lane, totals):
        begin, end = own
        if start >= stop:  # what is read must be there, and nobody's
            start, end = int32((behind - 1) & -4), begin
        place = int32(at + HEADER_BYTES + WORD_BYTES * (start - first))
        from_start = int32(begin - start), int32(end - start), int32(behind - start)
        return multiply_entries(place, from_start, lane, x, x_step, totals)

    return multiply_step


def rest_copier(room: int) -> Any:
    """copy_rest(run, at, first, count, lane): the entries from `first` on that have room, in the
    place of those before them; they are there when it returns."""
    copy_ahead, wait_for_all = copier(0), copies_done(0)

    @cuda.jit(device=True, forceinline=True)
    def copy_rest(run, at, first, count, lane):
        cuda.syncwarp()
        to, source = int32(at + HEADER_BYTES), run + HEADER_BYTES + np.int64(WORD_BYTES * first)
        own, end = int32(LOAD_BYTES * lane), int32(WORD_BYTES * min(room, count - first))
        while own < end:
            copy_ahead(int32(to + own), source + own)
            own = int32(own + LOAD_BYTES * LANES)
        end_of_copies()
        wait_for_all()
        cuda.syncwarp()

    return copy_rest


def half_adder(spec: UnitSpec) -> Any:
    """add_to_slot(slot, half, lane, totals): to where the totals of unit_several_cuda.py go too.

    totals: of input g the rows 2t and 2t + 1 of a half of the tile, and those of input g + 8.
    """
    lane_bytes, more = WORD_BYTES * spec.totals, spec.inputs > AT_ONCE

    @cuda.jit(device=True, forceinline=True)
    def add(place, total):
        to_shared_float(place, shared_float(place) + total * np.float32(SUBNORMAL_UNIT))

    @cuda.jit(device=True, forceinline=True)
    def add_to_slot(slot, half, lane, totals):
        g, row = int32(lane >> 2), int32(2 * (lane & 3))
        place = int32(slot + (4 * row + (g >> 1)) * lane_bytes)
        place = int32(place + WORD_BYTES * (2 * half + (g & 1)))
        add(place, totals[0])
        add(int32(place + 4 * lane_bytes), totals[1])
        if more:
            add(int32(place + 4 * WORD_BYTES), totals[2])
            add(int32(place + 4 * WORD_BYTES + 4 * lane_bytes), totals[3])

    return add_to_slot
