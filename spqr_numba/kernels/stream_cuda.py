"""How a kernel's warps share a prepared weight, and how each copies what it will need.

A block of threads owns a run of tiles. The columns are taken in *slabs* of a few segments, so that
x' of a slab fits into shared memory; in a slab a tile has, for each segment, its units and its run
of outliers. These *items*, tile after tile, are dealt to the warps in stretches of equal length.
The stretches are the same in every slab, and along them tiles and warps both ascend: so no two
pairs of a warp and a tile it meets have the same `tile + warp`, the slot for the warp's share.

A warp's items come through a ring in shared memory that it alone uses: while it works on one, the
next are being copied. An item that does not exist (behind the last column) copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import types

from .launch import numba_cuda
from .prepared import LANES, PreparedMatrix
from .ptx import copier, divide, load_int32
from .runs import SEGMENT_COLUMNS, TILE_ROWS, segments_of
from .unit_cuda import LOAD_BYTES, UnitSpec

__all__ = [
    "BUFFERS",
    "WEIGHT",
    "Item",
    "KernelSpec",
    "Plan",
    "Weight",
    "Work",
    "addresses",
    "filler",
    "first_item_of",
    "following",
    "run_of",
    "work_function",
]

cuda = numba_cuda()
int32: Any = np.int32


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel is compiled for."""

    unit: UnitSpec
    kind: torch.dtype
    warps: int
    stages: int
    early: bool

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps * LANES

    @property
    def warp_shift(self) -> int:
        """log2 of the warps."""
        return self.warps.bit_length() - 1

    @property
    def segment_units(self) -> int:
        """Units of a segment."""
        return SEGMENT_COLUMNS // self.unit.columns


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
    """How a launch divides the work, and where things are in shared memory (product_cuda.py)."""

    tiles: int  # of a block
    longer: int  # how many blocks, the first ones, have one more
    segments: int  # of a slab
    slabs: int
    items: int  # of a segment: its units, and its run where there are outliers
    stride: int  # from one input's x' to the next, in halves
    sums_stride: int  # from one input's X to the next, in floats
    sums: int
    slots: int
    ring: int


class Work(NamedTuple):
    """What a block and a warp of it have to do, and who asks."""

    first_tile: int
    tiles: int
    stretch: int  # items of the warp in each slab
    thread: int
    lane: int
    warp: int


class Item(NamedTuple):
    """One item of a warp's: `place` counts the segment's units, then comes the run; `left` of the
    stretch, this one included. Tiles count from the block's first, segments from the slab's."""

    slab: int
    tile: int
    segment: int
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


@cuda.jit(device=True, forceinline=True)
def first_item_of(warp, shift, items):
    """Where a warp's stretch of a slab's items begins, of 2^shift warps; the next one's is where it
    ends."""
    return int32(int32(warp * items) >> shift)


def work_function(spec: KernelSpec) -> Any:
    """work_of(weight, plan) -> Work, and the first Item, of this thread's warp."""
    shift = spec.warp_shift

    @cuda.jit(device=True, forceinline=True)
    def work_of(weight, plan):
        thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        first_tile = int32(block * plan.tiles + min(block, plan.longer))
        tiles = int32(plan.tiles + (1 if block < plan.longer else 0))
        warp, of_tile = int32(thread >> 5), int32(plan.segments * plan.items)
        begin = first_item_of(warp, shift, int32(tiles * of_tile))
        stretch = int32(first_item_of(int32(warp + 1), shift, int32(tiles * of_tile)) - begin)
        tile = divide(begin, of_tile)
        in_tile = int32(begin - tile * of_tile)
        segment = divide(in_tile, plan.items)
        work = Work(first_tile, tiles, stretch, thread, int32(thread & 31), warp)
        return work, Item(
            int32(0 if stretch else plan.slabs),
            tile,
            segment,
            int32(in_tile - segment * plan.items),
            stretch,
        )

    return work_of


@cuda.jit(device=True, forceinline=True)
def following(plan, item, first):
    """The item behind `item`; behind a slab's last the next slab's `first`."""
    slab, tile, segment, place = item.slab, item.tile, item.segment, int32(item.place + 1)
    left = int32(item.left - 1)
    if place == plan.items:
        place, segment = int32(0), int32(segment + 1)
        if segment == plan.segments:
            segment, tile = int32(0), int32(tile + 1)
    if left == 0:
        slab, left = int32(slab + 1), first.left
        tile, segment, place = first.tile, first.segment, first.place
    return Item(slab, tile, segment, place, left)


# --- Copying ahead


def filler(spec: KernelSpec) -> Any:
    """fill(weight, plan, work, item, to): an item on its way to shared memory."""
    fill_unit, fill_run = unit_filler(spec.unit), run_filler(spec.unit)
    segment_units = spec.segment_units

    @cuda.jit(device=True, forceinline=True)
    def fill(weight, plan, work, item, to):
        if item.slab < plan.slabs:
            tile = int32(work.first_tile + item.tile)
            segment = int32(item.slab * plan.segments + item.segment)
            if item.place < segment_units:
                unit = int32(segment * segment_units + item.place)
                if unit < weight.units:
                    fill_unit(weight, tile, unit, to, work.lane)
            elif segment < weight.segments:
                fill_run(weight, tile, segment, to, work.lane)

    return fill


def unit_filler(spec: UnitSpec) -> Any:
    """fill_unit(weight, tile, unit, to, lane): one unit.

    For several inputs, of each 32 loads of codes those of a quad's lane t lie side by side, so that
    a warp whose lanes read one word each of them meets each bank once.
    """
    warp_bytes = LANES * LOAD_BYTES
    code_bytes, transposed = spec.blocks * spec.block_bytes, spec.inputs > 1
    stat_bytes, second_bytes = spec.stat_bytes, spec.second_bytes
    record_bytes = spec.record_bytes
    copy_codes = copier(*range(0, code_bytes, warp_bytes))
    copy_statistics, copy_second = copier(code_bytes), copier(record_bytes)

    @cuda.jit(device=True, forceinline=True)
    def fill_unit(weight, tile, unit, to, lane):
        own = int32(LOAD_BYTES * lane)
        place = own
        if transposed:
            place = int32(LOAD_BYTES * ((lane & 3) * 8 + (lane >> 2)))
        source = weight.records + np.int64(tile * weight.units + unit) * record_bytes + own
        copy_codes(int32(to + place), source)
        to = int32(to + own)
        if own < stat_bytes:
            copy_statistics(to, source)
        if own < second_bytes:
            stats = (tile >> weight.stats_shift) * weight.units + unit
            source = weight.second_level + np.int64(stats) * second_bytes + own - record_bytes
            copy_second(to, source)

    return fill_unit


def run_filler(spec: UnitSpec) -> Any:
    """fill_run(weight, tile, segment, to, lane): one run, as much of it as a unit's place takes."""
    room, copy_ahead = spec.bytes // LOAD_BYTES, copier(0)

    @cuda.jit(device=True, forceinline=True)
    def fill_run(weight, tile, segment, to, lane):
        start, loads = run_of(weight, tile, segment)
        source = weight.runs + np.int64(start) * LOAD_BYTES
        at, end = int32(LOAD_BYTES * lane), int32(LOAD_BYTES * min(loads, room))
        while at < end:
            copy_ahead(int32(to + at), source + at)
            at = int32(at + LOAD_BYTES * LANES)

    return fill_run


@cuda.jit(device=True, forceinline=True)
def run_of(weight, tile, segment):
    """Where a run begins, and how long it is, by 16 bytes."""
    place = weight.run_starts + 4 * (np.int64(tile) * weight.segments + segment)
    start = load_int32(place)
    return start, int32(load_int32(place + 4) - start)
