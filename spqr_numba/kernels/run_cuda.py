"""What a warp does with a run of outliers (runs.py) and one input: 16 rows, 2048 columns.

Two lanes take a row's entries in turns. Entries are read from where they were copied to in shared
memory, a few at a time; those that did not fit there come from global memory. Several inputs:
run_several_cuda.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .codes_cuda import SUBNORMAL_UNIT
from .launch import numba_cuda
from .outlier_cuda import add_entry, entries_adder
from .prepared import ALL_LANES
from .ptx import load_int32, shared_float, shared_uint16, to_shared_float
from .runs import HEADER_WORDS
from .unit_cuda import HALF_BYTES, WORD_BYTES, UnitSpec

__all__ = ["run_multiplier"]

cuda = numba_cuda()

WAIT_TOGETHER = 8  # entries
TURNS = 2  # lanes of a row
int32: Any = np.int32


def run_multiplier(spec: UnitSpec) -> Any:
    """multiply_run(run, at, slot, x, lane, zeros): a tile's outliers in a segment, times x'.

    run: global address; at: shared address of its copy, as long as a unit; slot: of the share that
    the sums are added to; x: of the segment's x'; zeros: of a word that is 0.
    """
    room, step_bytes = spec.bytes // WORD_BYTES - HEADER_WORDS, TURNS * WORD_BYTES
    add_entries, nothing = entries_adder(WAIT_TOGETHER, step_bytes), np.float32(0)
    add_to_slot = slot_adder(spec)

    @cuda.jit(device=True, forceinline=True)
    def multiply_run(run, at, slot, x, lane, zeros):
        row, half = int32(lane >> 1), int32(lane & 1)
        end, begin = int32(shared_uint16(int32(at + HALF_BYTES * row))), half
        if row:
            begin = int32(half + shared_uint16(int32(at + HALF_BYTES * row - HALF_BYTES)))
        total, entries = nothing, int32(at + WORD_BYTES * HEADER_WORDS)
        place, behind = int32(entries + WORD_BYTES * begin), int32(min(end, room))
        behind = int32(entries + WORD_BYTES * behind)
        while place < behind:
            total = add_entries(place, behind, zeros, x, total)
            place = int32(place + WAIT_TOGETHER * step_bytes)
        if end > room:
            k = begin if begin >= room else int32(room + (begin & (TURNS - 1)))
            while k < end:
                entry = load_int32(run + WORD_BYTES * np.int64(HEADER_WORDS + k))
                total = add_entry(entry, x, total)
                k = int32(k + TURNS)
        add_to_slot(slot, row, half, total)

    return multiply_run


def slot_adder(spec: UnitSpec) -> Any:
    """add_to_slot(slot, row, half, total): to where the totals of unit_cuda.py go too."""
    lane_bytes = WORD_BYTES * spec.totals

    @cuda.jit(device=True, forceinline=True)
    def add_to_slot(slot, row, half, total):
        total += cuda.shfl_xor_sync(ALL_LANES, total, 1)
        if half == 0:
            place = int32(slot + (row & 7) * (4 * lane_bytes) + (row >> 3) * WORD_BYTES)
            to_shared_float(place, shared_float(place) + total * np.float32(SUBNORMAL_UNIT))

    return add_to_slot
