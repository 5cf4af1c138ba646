"""The ring through which a warp's items (stream_cuda.py) come to it, in shared memory of its own.

While a warp works on one item, the next are being copied. A Hopper GPU's copy engine brings an item
when one lane asks for it (bulk_cuda.py), and tells the barrier behind the item's place; elsewhere
the lanes copy 16 bytes each, and count what they have asked for. So with one input: there a warp
waits for what it has asked for, and a word from the copy engine takes longer (4.5 to 4.8
microseconds at 4096 x 4096, on an H200), while with several inputs the lanes have other things to
do (25.0 to 21.4 at 8192 x 8192 with eight).

    place    bytes  [unit]            a unit: its record, its second level; or as much of a run
    barrier  int64  [2]               the first; with a copy engine only
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .bulk_cuda import (
    arrive,
    bulk_copy,
    expect_bytes,
    forget_barrier,
    let_copy_engine_overwrite,
    let_copy_engine_see,
    make_barrier,
    wait_for_phase,
)
from .launch import numba_cuda
from .prepared import LANES
from .ptx import copier, copies_done, end_of_copies
from .stream_cuda import KernelSpec, following, item_run, known_run
from .unit_cuda import LOAD_BYTES, UnitSpec

__all__ = ["earlier_copies_done", "ring_starters", "ring_walker", "unit_filler"]

cuda = numba_cuda()
copy_load = copier(0)
int32: Any = np.int32


@cache
def ring_function(spec: KernelSpec) -> Any:
    """ring_of(plan, work, zeros) -> address of the warp's ring."""
    ring_bytes = spec.stages * spec.place_bytes

    @cuda.jit(device=True, forceinline=True)
    def ring_of(plan, work, zeros):
        return int32(zeros + plan.ring + work.warp * ring_bytes)

    return ring_of


def earlier_copies_done(spec: KernelSpec, places: int) -> Any:
    """wait(): until the copies are there for which the thread asked before the latest `places` of
    its ring."""
    return copies_done(0 if spec.copy_engine else places)


@cache
def ring_starters(spec: KernelSpec) -> tuple[Any, Any]:
    """start_ring(weight, plan, work, part, first, zeros): the warp's items that the ring takes
    first are on their way; and fill_ring(...): those that it has room for besides. Neither needs
    the table of runs. Between the two and the walk the block's threads must meet."""
    place_bytes, fill, ring_of = spec.place_bytes, filler(spec, item_run), ring_function(spec)
    open_ring, _ = ring_keepers(spec)

    def starter(begin: int, end: int) -> Any:
        @cuda.jit(device=True, forceinline=True)
        def fill_places(weight, plan, work, part, first, zeros):
            ring, item = ring_of(plan, work, zeros), first
            if begin == 0:
                open_ring(ring, work.lane)
            for _ in range(begin):
                item = following(work, item)
            for i in range(begin, end):
                fill(weight, plan, work, part, item, int32(ring + i * place_bytes), zeros)
                item = following(work, item)

        return fill_places

    return starter(0, spec.filled_first), starter(spec.filled_first, spec.stages)


def ring_walker(spec: KernelSpec, multiply: Any) -> Any:
    """walk(weight, plan, work, part, first, zeros): each of the warp's items is given to
    multiply(weight, plan, work, part, item, at, zeros). The table of runs must be there."""
    stages, place_bytes, fill = spec.stages, spec.place_bytes, filler(spec, known_run)
    ring_of, wait_for_item, leave_item = ring_function(spec), *item_waiters(spec)
    _, close_ring = ring_keepers(spec)

    @cuda.jit(device=True, forceinline=True)
    def walk(weight, plan, work, part, first, zeros):
        ring, item, slot, turn = ring_of(plan, work, zeros), first, int32(0), int32(0)
        while item.left > 0:
            at = int32(ring + slot * place_bytes)
            wait_for_item(at, turn)
            multiply(weight, plan, work, part, item, at, zeros)
            leave_item()
            item = following(work, item)
            ahead = item
            for _ in range(stages - 1):
                ahead = following(work, ahead)
            fill(weight, plan, work, part, ahead, at, zeros)
            slot = int32(slot + 1)
            if slot == stages:
                slot, turn = int32(0), int32(turn ^ 1)
        close_ring(ring, work.lane)

    return walk


# --- Waiting for what has been asked for


@cache
def ring_keepers(spec: KernelSpec) -> tuple[Any, Any]:
    """open_ring(ring, lane): a ring in which nothing is; and close_ring(...), behind its last
    item."""
    stages, place_bytes, unit_bytes = spec.stages, spec.place_bytes, spec.unit.bytes

    @cuda.jit(device=True, forceinline=True)
    def open_barriers(ring, lane):
        if lane == 0:
            for i in range(stages):
                make_barrier(int32(ring + i * place_bytes + unit_bytes), int32(1))
            let_copy_engine_see()
        cuda.syncwarp()

    @cuda.jit(device=True, forceinline=True)
    def close_barriers(ring, lane):
        cuda.syncwarp()
        if lane == 0:
            for i in range(stages):
                forget_barrier(int32(ring + i * place_bytes + unit_bytes))

    @cuda.jit(device=True, forceinline=True)
    def nothing(ring, lane):
        pass

    return (open_barriers, close_barriers) if spec.copy_engine else (nothing, nothing)


def item_waiters(spec: KernelSpec) -> tuple[Any, Any]:
    """wait_for_item(at, turn): until all lanes may read it; turn: of the ring, 0 and 1 by turns.
    And leave_item(): its place may be filled again."""
    wait_for_copies, unit_bytes = copies_done(spec.stages - 1), spec.unit.bytes

    @cuda.jit(device=True, forceinline=True)
    def wait_for_engine(at, turn):
        wait_for_phase(int32(at + unit_bytes), turn)

    @cuda.jit(device=True, forceinline=True)
    def leave_to_engine():
        let_copy_engine_overwrite()  # the scales that unit_several_cuda.py has left there
        cuda.syncwarp()

    @cuda.jit(device=True, forceinline=True)
    def wait_for_lanes(at, turn):
        wait_for_copies()
        cuda.syncwarp()

    @cuda.jit(device=True, forceinline=True)
    def leave_to_lanes():
        cuda.syncwarp()

    if spec.copy_engine:
        return wait_for_engine, leave_to_engine
    return wait_for_lanes, leave_to_lanes


# --- Asking for it


@cache
def filler(spec: KernelSpec, find_run: Any) -> Any:
    """fill(weight, plan, work, part, item, to, zeros): an item on its way to a place of the ring.
    Of one that does not exist (a part has fewer) nothing is copied.

    find_run: `item_run`, or `known_run`, which needs the table.
    """
    ask_for_unit, ask_for_run, ask_for_nothing = askers(spec)
    room, one_asks = spec.unit.bytes // LOAD_BYTES, spec.copy_engine

    @cuda.jit(device=True, forceinline=True)
    def fill_place(weight, plan, work, part, item, to, zeros):
        if item.place < part.units:
            tile = int32(work.first_tile + item.tile)
            ask_for_unit(weight, tile, int32(part.unit + item.place), to, work.lane)
        elif work.units <= item.place and item.place < work.units + part.runs:
            segment = int32(part.run + item.place - work.units)
            start, loads = find_run(weight, plan, work, item, segment, zeros)
            source = weight.runs + np.int64(start) * LOAD_BYTES
            ask_for_run(source, int32(LOAD_BYTES * min(loads, room)), to, work.lane)
        else:
            ask_for_nothing(to)

    @cuda.jit(device=True, forceinline=True)
    def fill(weight, plan, work, part, item, to, zeros):
        if one_asks:
            if work.lane == 0 and item.left > 0:
                fill_place(weight, plan, work, part, item, to, zeros)
        else:
            if item.left > 0:
                fill_place(weight, plan, work, part, item, to, zeros)
            end_of_copies()

    return fill


@cache
def askers(spec: KernelSpec) -> tuple[Any, Any, Any]:
    """ask_for_unit(weight, tile, unit, to, lane), ask_for_run(source, count, to, lane) and
    ask_for_nothing(to): of the copy engine, or the lanes' own."""
    if spec.copy_engine:
        return engine_askers(spec.unit)

    @cuda.jit(device=True, forceinline=True)
    def ask_for_nothing(to):
        pass

    return unit_filler(spec.unit), fill_run, ask_for_nothing


@cache
def engine_askers(spec: UnitSpec) -> tuple[Any, Any, Any]:
    """Of one lane."""
    unit_bytes, record_bytes, second_bytes = spec.bytes, spec.record_bytes, spec.second_bytes

    @cuda.jit(device=True, forceinline=True)
    def ask_for_unit(weight, tile, unit, to, lane):
        barrier = int32(to + unit_bytes)
        expect_bytes(barrier, int32(unit_bytes))
        record, second = unit_sources(weight, tile, unit, record_bytes, second_bytes)
        bulk_copy(to, record, int32(record_bytes), barrier)
        bulk_copy(int32(to + record_bytes), second, int32(second_bytes), barrier)

    @cuda.jit(device=True, forceinline=True)
    def ask_for_run(source, count, to, lane):
        barrier = int32(to + unit_bytes)
        expect_bytes(barrier, count)
        if count:
            bulk_copy(to, source, count, barrier)

    @cuda.jit(device=True, forceinline=True)
    def ask_for_nothing(to):
        arrive(int32(to + unit_bytes))

    return ask_for_unit, ask_for_run, ask_for_nothing


@cache
def unit_filler(spec: UnitSpec) -> Any:
    """fill_unit(weight, tile, unit, to, lane): one unit, by the lanes."""
    record_bytes, second_bytes = spec.record_bytes, spec.second_bytes
    warp_bytes, copy_second = LANES * LOAD_BYTES, copier(record_bytes)
    whole = record_bytes // warp_bytes * warp_bytes
    copy_record, copy_rest = copier(*range(0, whole, warp_bytes)), copier(whole)

    @cuda.jit(device=True, forceinline=True)
    def fill_unit(weight, tile, unit, to, lane):
        record, second = unit_sources(weight, tile, unit, record_bytes, second_bytes)
        own = int32(LOAD_BYTES * lane)
        to = int32(to + own)
        copy_record(to, record + own)
        if own < record_bytes - whole:
            copy_rest(to, record + own)
        if own < second_bytes:
            copy_second(to, second + own - record_bytes)

    return fill_unit


@cuda.jit(device=True, forceinline=True)
def unit_sources(weight, tile, unit, record_bytes, second_bytes):
    """Addresses of a unit's record and second level."""
    number = int32(tile * weight.units + unit)
    stats = int32(int32(tile >> weight.stats_shift) * weight.units + unit)
    record = weight.records + np.int64(number) * record_bytes
    return record, weight.second_level + np.int64(stats) * second_bytes


@cuda.jit(device=True, forceinline=True)
def fill_run(source, count, to, lane):
    """So many bytes of a run, by the lanes."""
    at = int32(LOAD_BYTES * lane)
    while at < count:
        copy_load(int32(to + at), source + at)
        at = int32(at + LOAD_BYTES * LANES)
