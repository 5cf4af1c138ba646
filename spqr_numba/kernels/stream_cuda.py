"""How a kernel's warps share a prepared weight.

A cluster of blocks, or one block, owns a run of tiles. The columns are cut into as many *parts* as
there are blocks in a cluster and *slabs*: a block takes some parts side by side, one after the
other where x' of all of them does not fit into shared memory. A part has some units of each tile,
and the runs of outliers whose segments begin in it: so it needs x' from its first unit to the end
of its last run.

The *items* of a slab, tile after tile the units and then the runs, are dealt to the warps in
stretches of equal length. The stretches are the same in every slab, and along them tiles and warps
both ascend: so no two pairs of a warp and a tile it meets have the same `tile + warp`, the slot for
the warp's share. Where each scheduler has as many warps, it has stretches that are side by side:
those that are longer by one lie apart, so that none gets all of these.

ring_cuda.py brings a warp its items, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import types

from .launch import numba_cuda
from .prepared import LANES, PreparedMatrix
from .ptx import (
    anew,
    clear_shared,
    copy_word,
    divide,
    divider,
    end_of_copies,
    load_int32,
    shared_int32,
)
from .runs import SEGMENT_COLUMNS, TILE_ROWS, segments_of
from .unit_cuda import LOAD_BYTES, WORD_BYTES, UnitSpec

__all__ = [
    "BUFFERS",
    "PLAN",
    "WEIGHT",
    "Item",
    "KernelSpec",
    "Part",
    "Plan",
    "Weight",
    "Work",
    "addresses",
    "clear_shared_bytes",
    "columns_function",
    "following",
    "item_run",
    "known_run",
    "parts_function",
    "run_of",
    "slots_clearer",
    "stretches_function",
    "table_filler",
    "work_function",
]

cuda = numba_cuda()
SCHEDULERS = 4  # of a multiprocessor; a warp's number says which
int32: Any = np.int32


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel is compiled for."""

    unit: UnitSpec
    kind: torch.dtype
    warps: int
    stages: int
    early: bool
    ranks: int = 1  # blocks of a cluster
    feed: str | None = None  # Feed.kind of what makes the input
    resident: int = 1  # blocks that a multiprocessor's registers are shared out to

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps * LANES

    @property
    def copy_engine(self) -> bool:
        """Whether it fills the rings (ring_cuda.py)."""
        return self.early and self.unit.inputs > 1

    @property
    def place_bytes(self) -> int:
        """Of a ring (ring_cuda.py)."""
        return self.unit.bytes + (LOAD_BYTES if self.copy_engine else 0)

    @property
    def slot_bytes(self) -> int:
        """Of a warp's share of a tile: float32 [32 lanes, totals]."""
        return WORD_BYTES * LANES * self.unit.totals

    @property
    def segment_units(self) -> int:
        """Units of a segment."""
        return SEGMENT_COLUMNS // self.unit.columns

    @property
    def filled_first(self) -> int:
        """Places of a ring that are filled before x' is staged. A warp waits until its copies are
        asked for, and x' for the warp. There is time for all where blocks of the product before
        still run beside these, and where x is made first."""
        return self.stages if self.resident > 1 or self.feed else 1


class Weight(NamedTuple):
    """Addresses of a prepared weight's buffers, 0 for one that is not there, and its sizes."""

    records: int
    second_level: int
    runs: int
    run_starts: int
    target: int
    rows: int
    columns: int
    tiles: int
    units: int
    segments: int
    stats_shift: int  # log2 of the tiles of a stats group


BUFFERS = Weight._fields[:5]
WEIGHT = types.NamedTuple([types.int64] * 5 + [types.int32] * 6, Weight)
"""Numba's type of a Weight."""


class Plan(NamedTuple):
    """How a launch divides the work, and where things are in shared memory (product_cuda.py and
    several_cuda.py)."""

    tiles: int  # of a cluster
    longer: int  # how many clusters, the first ones, have one more
    slabs: int
    units: int  # of a part
    wider: int  # how many parts, the first ones, have one more
    most_runs: int  # of a part
    pairs: int  # of columns, that a block stages for its cluster
    columns: int  # of x' in shared memory
    sums: int
    slots: int
    starts: int
    ring: int


PLAN = types.NamedTuple([types.int32] * len(Plan._fields), Plan)
"""Numba's type of a Plan."""


class Part(NamedTuple):
    """What a block takes of each tile at a time."""

    unit: int
    units: int
    run: int
    runs: int


class Work(NamedTuple):
    """What a block and a warp of it have to do, and who asks. Warps count as their stretches do."""

    first_tile: int
    tiles: int
    units: int  # places of units among a tile's
    places: int  # items of a tile in a slab, there or not
    stretch: int  # items of the warp in each slab
    thread: int
    lane: int
    warp: int
    rank: int


class Item(NamedTuple):
    """One item of a warp's: `place` counts the tile's units, then come the runs; `left` of the
    stretch, this one included. Tiles count from the cluster's first."""

    tile: int
    place: int
    left: int


def addresses(weight: PreparedMatrix) -> Weight:
    """The kernel's view of a weight."""
    if weight not in _ADDRESSES:
        _ADDRESSES[weight] = find_addresses(weight)
    return _ADDRESSES[weight]


_ADDRESSES: WeakKeyDictionary[PreparedMatrix, Weight] = WeakKeyDictionary()


def find_addresses(weight: PreparedMatrix) -> Weight:
    """What `addresses` finds once."""
    spec, tensors = weight.spec, weight.tensors
    pointers = {name: tensors[name].data_ptr() if name in tensors else 0 for name in BUFFERS}
    return Weight(
        **pointers,
        rows=spec.out_features,
        columns=spec.in_features,
        tiles=weight.tiles,
        units=weight.units,
        segments=segments_of(spec),
        stats_shift=(spec.stats_group_size // TILE_ROWS).bit_length() - 1,
    )


@cache
def stretches_function(spec: KernelSpec) -> Any:
    """first_item_of(warp, items): where a warp's stretch of a slab's items begins; the next one's
    is where it ends."""
    divide_by_warps = divider(spec.warps)

    @cuda.jit(device=True, forceinline=True)
    def first_item_of(warp, items):
        return divide_by_warps(int32(warp * items))

    return first_item_of


@cache
def parts_function(spec: KernelSpec) -> Any:
    """part_of(weight, plan, rank, slab) -> Part."""
    more, divide_by_units = spec.segment_units - 1, divider(spec.segment_units)

    @cuda.jit(device=True, forceinline=True)
    def part_of(weight, plan, rank, slab):
        number = int32(rank * plan.slabs + slab)
        unit = int32(number * plan.units + min(number, plan.wider))
        units = int32(plan.units + (1 if number < plan.wider else 0))
        run = divide_by_units(int32(unit + more))
        runs = int32(divide_by_units(int32(unit + units + more)) - run)
        return Part(unit, units, run, int32(runs if weight.runs else 0))

    return part_of


@cache
def columns_function(spec: KernelSpec) -> Any:
    """columns_of(weight, part) -> the first column of x' that a part needs, and their end."""
    columns = spec.unit.columns

    @cuda.jit(device=True, forceinline=True)
    def columns_of(weight, part):
        end = int32(part.unit + part.units)
        if part.runs:
            end = int32((part.run + part.runs) * (SEGMENT_COLUMNS // columns))
        return int32(part.unit * columns), int32(min(end, weight.units) * columns)

    return columns_of


def work_function(spec: KernelSpec) -> Any:
    """work_of(weight, plan) -> Work, and the first Item, of this thread's warp.

    Found anew at each call: registers that last from one to the next are dearer.
    """
    first_item_of, part_of = stretches_function(spec), parts_function(spec)
    ranks, divide_by_ranks, number_of = spec.ranks, divider(spec.ranks), warp_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def places_of(weight, plan, rank):
        if plan.slabs > 1:
            return int32(plan.units + (1 if plan.wider else 0)), plan.most_runs
        part = part_of(weight, plan, rank, int32(0))
        return part.units, part.runs

    @cuda.jit(device=True, forceinline=True)
    def work_of(weight, plan):
        thread, block = anew(int32(cuda.threadIdx.x)), anew(int32(cuda.blockIdx.x))
        cluster, warp = divide_by_ranks(block), number_of(thread)
        rank = int32(block - cluster * ranks)
        first_tile = int32(cluster * plan.tiles + min(cluster, plan.longer))
        tiles = int32(plan.tiles + (1 if cluster < plan.longer else 0))
        units, runs = places_of(weight, plan, rank)
        places = int32(units + runs)
        begin = first_item_of(warp, int32(tiles * places))
        stretch = int32(first_item_of(int32(warp + 1), int32(tiles * places)) - begin)
        tile, lane = divide(begin, places), int32(thread & (LANES - 1))
        work = Work(first_tile, tiles, units, places, stretch, thread, lane, warp, rank)
        return work, Item(tile, int32(begin - tile * places), stretch)

    return work_of


def warp_function(spec: KernelSpec) -> Any:
    """number_of(thread) -> that of the thread's warp, by the order of stretches."""
    turns, divide_by_schedulers = spec.warps // SCHEDULERS, divider(SCHEDULERS)
    in_turns = spec.warps % SCHEDULERS == 0

    @cuda.jit(device=True, forceinline=True)
    def number_of(thread):
        warp = int32(thread >> 5)
        if in_turns:
            turn = divide_by_schedulers(warp)
            warp = int32((warp - turn * SCHEDULERS) * turns + turn)
        return warp

    return number_of


@cuda.jit(device=True, forceinline=True)
def following(work, item):
    """The item behind `item`."""
    tile, place = item.tile, int32(item.place + 1)
    if place == work.places:
        tile, place = int32(tile + 1), int32(0)
    return Item(tile, place, int32(item.left - 1))


@cuda.jit(device=True, forceinline=True)
def clear_shared_bytes(begin, end, thread, threads):
    """Zeros from a shared address on to another; 8 divides both."""
    at = int32(begin + 8 * thread)
    while at < end:
        clear_shared(at)
        at = int32(at + 8 * threads)


def slots_clearer(spec: KernelSpec) -> Any:
    """clear_slots(plan, work, zeros): the block's, for its threads to add to."""
    threads, warps_but_one, slot_bytes = spec.threads, spec.warps - 1, spec.slot_bytes

    @cuda.jit(device=True, forceinline=True)
    def clear_slots(plan, work, zeros):
        slots = int32(zeros + WORD_BYTES * plan.slots)
        end = int32(slots + (work.tiles + warps_but_one) * slot_bytes)
        clear_shared_bytes(slots, end, work.thread, threads)

    return clear_slots


# --- Runs


def table_filler(spec: KernelSpec) -> Any:
    """fill_table(weight, plan, work, zeros): run_starts of the cluster's tiles are on their way to
    shared memory. In global memory they are too far away for a warp that has a unit to multiply by.
    They are a group of each thread's copies (ptx.end_of_copies); when that is there others, behind
    a barrier, may read them."""
    threads = spec.threads

    @cuda.jit(device=True, forceinline=True)
    def fill_table(weight, plan, work, zeros):
        table, i = int32(zeros + WORD_BYTES * plan.starts), work.thread
        first = np.int64(work.first_tile) * weight.segments
        while weight.runs and i <= work.tiles * weight.segments:
            source = weight.run_starts + WORD_BYTES * (first + i)
            copy_word(int32(table + WORD_BYTES * i), source)
            i = int32(i + threads)
        end_of_copies()

    return fill_table


@cuda.jit(device=True, forceinline=True)
def known_run(weight, plan, work, item, segment, zeros):
    """`item_run`, from the table."""
    place = int32(plan.starts + item.tile * weight.segments + segment)
    start = shared_int32(int32(zeros + WORD_BYTES * place))
    return start, int32(shared_int32(int32(zeros + WORD_BYTES * (place + 1))) - start)


@cuda.jit(device=True, forceinline=True)
def item_run(weight, plan, work, item, segment, zeros):
    """`run_of` an item's tile and a segment."""
    return run_of(weight, int32(work.first_tile + item.tile), segment)


@cuda.jit(device=True, forceinline=True)
def run_of(weight, tile, segment):
    """Where a run begins, and how long it is, by 16 bytes."""
    place = weight.run_starts + WORD_BYTES * (np.int64(tile) * weight.segments + segment)
    start = load_int32(place)
    return start, int32(load_int32(place + WORD_BYTES) - start)
