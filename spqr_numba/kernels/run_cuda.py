"""What a warp does with a run of outliers (runs.py): 16 rows, 2048 columns.

Two lanes take a row. Of one input they take its entries in turns; of several each takes all
entries, for half of the inputs. Entries are read from where they were copied to in shared memory,
a few at a time; those that did not fit there come from global memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .codes_cuda import SUBNORMAL_UNIT
from .launch import numba_cuda
from .outlier_cuda import add_entry, entries_adder, pairs_adder
from .prepared import ALL_LANES
from .ptx import load_int32, shared_float, shared_uint16, to_shared_float
from .runs import HEADER_WORDS
from .unit_cuda import HALF_BYTES, WORD_BYTES, UnitSpec
from .unit_several_cuda import AT_ONCE

__all__ = ["run_multiplier"]

cuda = numba_cuda()

WAIT_TOGETHER = {1: 8, 8: 2, 16: 1}  # inputs -> entries
int32: Any = np.int32


def run_multiplier(spec: UnitSpec) -> Any:
    """multiply_run(run, at, slot, x, step, lane, zeros): a tile's outliers in a segment, times x'.

    run: global address; at: shared address of its copy, as long as a unit; slot: of the share that
    the sums are added to; x: of the segment's x', of which an input's lies `step` bytes behind
    another's; zeros: of a word that is 0.
    """
    inputs, room = spec.inputs, spec.bytes // WORD_BYTES - HEADER_WORDS
    turns = 2 if inputs == 1 else 1
    step_bytes, at_once = turns * WORD_BYTES, WAIT_TOGETHER[inputs]
    nothing = (np.float32(0),) * max(1, inputs // 2)
    add_entries = entries_adder(at_once, step_bytes)
    add_to_slot = one_to_slot(spec) if inputs == 1 else several_to_slot(spec)

    @cuda.jit(device=True, forceinline=True)
    def multiply_run(run, at, slot, x, step, lane, zeros):
        row, half = int32(lane >> 1), int32(lane & 1)
        end, begin = int32(shared_uint16(int32(at + HALF_BYTES * row))), int32(0)
        if row:
            begin = int32(shared_uint16(int32(at + HALF_BYTES * row - HALF_BYTES)))
        if turns == 2:
            begin = int32(begin + half)
        else:
            x = int32(x + half * (inputs // 2) * step)
        totals, entries = nothing, int32(at + WORD_BYTES * HEADER_WORDS)
        place, behind = int32(entries + WORD_BYTES * begin), int32(min(end, room))
        behind = int32(entries + WORD_BYTES * behind)
        while place < behind:
            totals = add_entries(place, behind, zeros, x, step, totals)
            place = int32(place + at_once * step_bytes)
        if end > room:
            k = begin if begin >= room else int32(room + (begin & (turns - 1)))
            while k < end:
                entry = load_int32(run + WORD_BYTES * np.int64(HEADER_WORDS + k))
                totals = add_entry(entry, x, step, totals)
                k = int32(k + turns)
        add_to_slot(slot, row, half, totals)

    return multiply_run


# --- To the slot: where the totals of unit_cuda.py and unit_several_cuda.py go too


def one_to_slot(spec: UnitSpec) -> Any:
    """add_to_slot(slot, row, half, totals), of one input."""
    lane_bytes = WORD_BYTES * spec.totals

    @cuda.jit(device=True, forceinline=True)
    def add_to_slot(slot, row, half, totals):
        total = totals[0] + cuda.shfl_xor_sync(ALL_LANES, totals[0], 1)
        if half == 0:
            place = int32(slot + (row & 7) * (4 * lane_bytes) + (row >> 3) * WORD_BYTES)
            to_shared_float(place, shared_float(place) + total * np.float32(SUBNORMAL_UNIT))

    return add_to_slot


def several_to_slot(spec: UnitSpec) -> Any:
    """add_to_slot(slot, row, half, totals), of several inputs."""
    lane_bytes = WORD_BYTES * spec.totals
    half_bytes = 2 * lane_bytes if spec.inputs == AT_ONCE else 4 * WORD_BYTES
    add_pairs = pairs_adder(lane_bytes)

    @cuda.jit(device=True, forceinline=True)
    def add_to_slot(slot, row, half, totals):
        place = int32(slot + (row & 7) * (4 * lane_bytes) + (row >> 3) * (2 * WORD_BYTES))
        add_pairs(int32(place + half * half_bytes), totals)

    return add_to_slot
