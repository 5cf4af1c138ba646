"""A tile's outliers, as the lanes that hold its weights take them.

A warp that decodes its tile some groups at a time puts their outliers into a *patch* in shared
memory first, in the order in which the lanes hold weights, so that each adds what is there to its
own. Two lanes share a row; they take its entries in turns, with a cursor each.

    patch   fp16   patch_spec.py
    run     bytes  as much of the run (runs.py) as has room; the rest comes from global memory
    cursor         the number of an entry in its run, the end of the row's, and the entry
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .launch import numba_cuda
from .patch_spec import PatchSpec
from .prepared import LANES, QUAD
from .ptx import clear_shared, copier, load_int32, shared_int32, shared_uint16
from .ptx import to_shared_uint16 as put_half
from .runs import HALF_MASK, HEADER_WORDS, SEGMENT_COLUMNS, TILE_ROWS
from .stream_cuda import run_of
from .unit_cuda import HALF_BYTES, LOAD_BYTES, WORD_BYTES

__all__ = [
    "outlier_putter",
    "patch_clearer",
    "run_copier",
    "run_opener",
    "segment_finder",
]

cuda = numba_cuda()

QUAD_BYTES = QUAD * LOAD_BYTES
NO_ENTRY = 0xFFFF  # a column behind all others
int32: Any = np.int32


@cache
def segment_finder(unit_columns: int) -> Any:
    """segment_of(unit) -> the segment that a unit is in."""
    shift = (SEGMENT_COLUMNS // unit_columns).bit_length() - 1

    @cuda.jit(device=True, forceinline=True)
    def segment_of(unit):
        return int32(unit >> shift)

    return segment_of


@cache
def patch_clearer(spec: PatchSpec) -> Any:
    """clear_patch(patch, lane): all of it."""
    end, step_bytes = spec.bytes, 8 * LANES

    @cuda.jit(device=True, forceinline=True)
    def clear_patch(patch, lane):
        at = int32(8 * lane)
        while at < end:
            clear_shared(int32(patch + at))
            at = int32(at + step_bytes)

    return clear_patch


@cache
def run_copier(spec: PatchSpec) -> Any:
    """copy_run(weight, tile, segment, to, lane): as much of a run as has room, on its way."""
    room, copy_ahead = spec.run_bytes, copier(0)

    @cuda.jit(device=True, forceinline=True)
    def copy_run(weight, tile, segment, to, lane):
        start, loads = run_of(weight, tile, segment)
        source = weight.runs + np.int64(start) * LOAD_BYTES
        at, end = int32(LOAD_BYTES * lane), int32(min(LOAD_BYTES * loads, room))
        while at < end:
            copy_ahead(int32(to + at), source + at)
            at = int32(at + LOAD_BYTES * LANES)

    return copy_run


@cache
def run_opener(spec: PatchSpec) -> Any:
    """open_run(weight, tile, segment, at, first, lane) -> cursor: the lane's first entry from a
    column of the segment on; at: shared address of the run."""
    entry_at = entry_reader(spec)

    @cuda.jit(device=True, forceinline=True)
    def open_run(weight, tile, segment, at, first, lane):
        k, end, row = int32(0), int32(0), int32(lane >> 1)
        if run_of(weight, tile, segment)[1]:
            end = int32(shared_uint16(int32(at + HALF_BYTES * row)))
            if row:
                k = int32(shared_uint16(int32(at + HALF_BYTES * row - HALF_BYTES)))
        k = int32(k + (lane & 1))
        entry = entry_at(weight, tile, segment, at, k, end)
        while int32(entry & HALF_MASK) < first:
            k = int32(k + 2)
            entry = entry_at(weight, tile, segment, at, k, end)
        return k, end, entry

    return open_run


@cache
def entry_reader(spec: PatchSpec) -> Any:
    """entry_at(weight, tile, segment, at, k, end) -> entry k of a run; one behind all columns where
    the row has no more."""
    room = spec.run_bytes // WORD_BYTES - HEADER_WORDS

    @cuda.jit(device=True, forceinline=True)
    def entry_at(weight, tile, segment, at, k, end):
        entries = int32(at + WORD_BYTES * HEADER_WORDS)
        entry = shared_int32(int32(entries + WORD_BYTES * min(k, int32(room - 1))))
        if room <= k < end:
            run = weight.runs + np.int64(run_of(weight, tile, segment)[0]) * LOAD_BYTES
            entry = load_int32(run + WORD_BYTES * np.int64(HEADER_WORDS + k))
        return entry if k < end else int32(NO_ENTRY)

    return entry_at


@cache
def outlier_putter(spec: PatchSpec) -> Any:
    """put(weight, tile, segment, at, first, patch, lane, cursor) -> cursor: what is in the spec's
    columns from `first` of the segment on, into the patch."""
    columns, entry_at, of_group = spec.columns, entry_reader(spec), spec.group_size - 1
    shift, part_bytes, halves = of_group.bit_length(), TILE_ROWS * QUAD_BYTES, spec.halves
    half_bytes, in_quad = spec.group_size // 8 * part_bytes, QUAD - 1

    @cuda.jit(device=True, forceinline=True)
    def place_of(column):
        group = int32(column >> shift)
        place = int32(((column & of_group) >> 3) * part_bytes + (column & 7) * HALF_BYTES)
        if halves == 1:
            return int32(place + group * LOAD_BYTES)
        return int32(place + (group & in_quad) * LOAD_BYTES + (group >> 2) * half_bytes)

    @cuda.jit(device=True, forceinline=True)
    def put(weight, tile, segment, at, first, patch, lane, cursor):
        own, behind = int32(patch + (lane >> 1) * QUAD_BYTES), int32(first + columns)
        k, end, entry = cursor
        while int32(entry & HALF_MASK) < behind:
            place = place_of(int32((entry & HALF_MASK) - first))
            put_half(int32(own + place), np.uint16(entry >> 16 & HALF_MASK))
            k = int32(k + 2)
            entry = entry_at(weight, tile, segment, at, k, end)
        return k, end, entry

    return put
