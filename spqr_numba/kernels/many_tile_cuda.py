"""What a warp does with its tile in the product with many inputs (many_cuda.py).

It copies the codes, statistics and runs of outliers of its sixteen rows ahead, into places of its
own (many_spec.py), and makes a strip of them at a time: numbers in registers, the first operand of
a product, with what the strip's outliers add (patch_cuda.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .launch import numba_cuda
from .many_spec import ManySpec
from .patch_cuda import outlier_putter, run_copier, run_opener, segment_finder
from .prepared import ALL_LANES, LANES, place_of_lane
from .ptx import anew, copier
from .runs import SEGMENT_COLUMNS
from .strip_cuda import strip_multiplier
from .unit_cuda import LOAD_BYTES

__all__ = [
    "Tile",
    "ahead_copier",
    "strip_runner",
    "tile_finder",
    "tile_run_opener",
    "unit_copier",
]

cuda = numba_cuda()

int32: Any = np.int32


class Tile(NamedTuple):
    """What a warp decodes."""

    number: int
    own: int  # shared address of what is the warp's own
    warp: int
    lane: int


def tile_finder(spec: ManySpec) -> Any:
    """tile_of(weight, row_block, thread, zero) -> Tile; a warp behind the last has the last."""
    warps, warp_bytes, count = spec.warps, spec.warp_bytes, spec.warp_count

    @cuda.jit(device=True, forceinline=True)
    def tile_of(weight, row_block, thread, zero):
        # from lane 0, so that the assembler knows it for the same in all lanes
        warp = int32(cuda.shfl_sync(ALL_LANES, int32(thread >> 5), 0))
        number = int32(min(int32(row_block * count + warp), int32(weight.tiles - 1)))
        return Tile(number, int32(zero + warps + warp * warp_bytes), warp, int32(thread & 31))

    return tile_of


def strip_runner(spec: ManySpec, octet: int, half: int) -> Any:
    """multiply_strip(weight, tile, unit, inputs, sums, cursor) -> the last two, as they are behind
    it: sums on their way, and the cursor of `tile_run_opener`. inputs: shared address of B."""
    of_unit, in_unit = spec.unit, octet * 2 + half
    multiply = strip_multiplier(of_unit, octet, half, spec.outliers, spec.b)
    block_of, statistics_of = block_place(spec, octet // of_unit.octets), statistics_place(spec)
    put, outliers = strip_putter(spec, in_unit), spec.outliers

    @cuda.jit(device=True, forceinline=True)
    def multiply_strip(weight, tile, unit, inputs, sums, cursor):
        if outliers:
            cursor = put(weight, tile, unit, cursor)
            cuda.syncwarp()
        codes, statistics = block_of(tile.own, unit), statistics_of(tile.own, unit)
        sums = multiply(sums, codes, statistics, tile.lane, tile.own, inputs)
        return sums, cursor

    return multiply_strip


# --- Copying ahead


def unit_copier(spec: ManySpec) -> Any:
    """copy_unit(weight, tile, unit, end): all that the first strips need from a unit on."""
    copy_statistics, copy_run = statistics_copier(spec), tile_run_copier(spec)
    blocks, segment_of = spec.unit.blocks, segment_finder(spec.unit.columns)
    copy_block, copy_other = block_copier(spec, 0), block_copier(spec, 1 % blocks)
    later = 1 // blocks

    @cuda.jit(device=True, forceinline=True)
    def copy_unit(weight, tile, unit, end):
        copy_block(weight, tile, unit)
        if int32(unit + later) < end:
            copy_other(weight, tile, int32(unit + later))
        copy_statistics(weight, tile, unit)
        copy_run(weight, tile, segment_of(unit))

    return copy_unit


def ahead_copier(spec: ManySpec, octet: int, half: int) -> Any:
    """copy_ahead(weight, tile, unit, end): into what a strip of a unit is the last to use."""
    of_unit, segment_of = spec.unit, segment_finder(spec.unit.columns)
    block, in_block = divmod(2 * octet + half, spec.block_strips)
    later, block_then = divmod(block + 2, of_unit.blocks)
    copy_block = block_copier(spec, block_then)
    copy_statistics, copy_run = statistics_copier(spec), tile_run_copier(spec)
    begins_unit, ends_block = octet == half == 0, in_block == spec.block_strips - 1

    @cuda.jit(device=True, forceinline=True)
    def copy_ahead(weight, tile, unit, end):
        if ends_block and unit + later < end:
            copy_block(weight, tile, int32(unit + later))
        if begins_unit and unit + 1 < end:
            copy_statistics(weight, tile, int32(unit + 1))
            if segment_of(unit) != segment_of(int32(unit + 1)):
                copy_run(weight, tile, segment_of(int32(unit + 1)))

    return copy_ahead


@cache
def block_place(spec: ManySpec, block: int) -> Any:
    """block_of(own, unit) -> where the codes of its block are; blocks take turns along the tile."""
    block_bytes, blocks, first = spec.unit.block_bytes, spec.unit.blocks, spec.blocks

    @cuda.jit(device=True, forceinline=True)
    def block_of(own, unit):
        return int32(own + first + (int32(unit * blocks + block) & 1) * block_bytes)

    return block_of


@cache
def statistics_place(spec: ManySpec) -> Any:
    """statistics_of(own, unit) -> where they are."""
    statistics_bytes, first = spec.statistics_bytes, spec.statistics

    @cuda.jit(device=True, forceinline=True)
    def statistics_of(own, unit):
        return int32(own + first + (unit & 1) * statistics_bytes)

    return statistics_of


@cache
def run_place(spec: ManySpec) -> Any:
    """run_in(own, segment) -> where its run is."""
    run_bytes, runs = spec.run_bytes, spec.runs

    @cuda.jit(device=True, forceinline=True)
    def run_in(own, segment):
        return int32(own + runs + (segment & 1) * run_bytes)

    return run_in


@cache
def record_finder(spec: ManySpec) -> Any:
    """record_of(weight, tile, unit) -> address of its codes and statistics."""
    record_bytes = spec.unit.record_bytes

    @cuda.jit(device=True, forceinline=True)
    def record_of(weight, tile, unit):
        return (
            weight.records + np.int64(int32(anew(tile.number) * weight.units + unit)) * record_bytes
        )

    return record_of


@cache
def block_copier(spec: ManySpec, block: int) -> Any:
    """copy_block(weight, tile, unit): codes of one of its blocks, by lanes: registers are scarce
    where they are read."""
    block_of, distance = block_place(spec, block), block * spec.unit.block_bytes
    copy_ahead = copier(*range(0, spec.unit.block_bytes, LANES * LOAD_BYTES))
    record_of = record_finder(spec)
    place_of = cuda.jit(device=True, forceinline=True)(place_of_lane)

    @cuda.jit(device=True, forceinline=True)
    def copy_block(weight, tile, unit):
        own = int32(LOAD_BYTES * int32(place_of(anew(tile.lane))))
        source = record_of(weight, tile, unit) + distance + own
        copy_ahead(int32(block_of(tile.own, unit) + int32(LOAD_BYTES * tile.lane)), source)

    return copy_block


@cache
def statistics_copier(spec: ManySpec) -> Any:
    """copy_statistics(weight, tile, unit): the first level, then the second."""
    unit, statistics_of, copy_ahead = spec.unit, statistics_place(spec), copier(0)
    stat_bytes, second_bytes, record_of = unit.stat_bytes, unit.second_bytes, record_finder(spec)
    code_bytes = unit.blocks * unit.block_bytes

    @cuda.jit(device=True, forceinline=True)
    def copy_statistics(weight, tile, of_unit):
        at = int32(LOAD_BYTES * tile.lane)
        to = int32(statistics_of(tile.own, of_unit) + at)
        if at < stat_bytes:
            copy_ahead(to, record_of(weight, tile, of_unit) + code_bytes + at)
        if at < second_bytes:
            stats = int32((anew(tile.number) >> weight.stats_shift) * weight.units + of_unit)
            source = weight.second_level + np.int64(stats) * second_bytes + at
            copy_ahead(int32(to + stat_bytes), source)

    return copy_statistics


@cache
def tile_run_copier(spec: ManySpec) -> Any:
    """copy_tile_run(weight, tile, segment): as much of a run as has room."""
    run_in, copy_run, outliers = run_place(spec), run_copier(spec.patch), spec.outliers

    @cuda.jit(device=True, forceinline=True)
    def copy_tile_run(weight, tile, segment):
        if outliers:
            copy_run(weight, tile.number, segment, run_in(tile.own, segment), tile.lane)

    return copy_tile_run


# --- Outliers


def tile_run_opener(spec: ManySpec) -> Any:
    """open_tile_run(weight, tile, unit) -> cursor of a unit's first column."""
    columns, segment_of, in_segment = (
        spec.unit.columns,
        segment_finder(spec.unit.columns),
        SEGMENT_COLUMNS - 1,
    )
    run_in, open_run, outliers = run_place(spec), run_opener(spec.patch), spec.outliers

    @cuda.jit(device=True, forceinline=True)
    def open_tile_run(weight, tile, unit):
        if not outliers:
            return int32(0), int32(0), int32(0)
        segment, first = segment_of(unit), int32(unit * columns & in_segment)
        return open_run(weight, tile.number, segment, run_in(tile.own, segment), first, tile.lane)

    return open_tile_run


def strip_putter(spec: ManySpec, in_unit: int) -> Any:
    """put_strip(weight, tile, unit, cursor) -> cursor: outliers of a unit's strip into the
    patch."""
    of_unit, in_segment, before = spec.unit.columns, SEGMENT_COLUMNS - 1, in_unit * spec.columns
    put, segment_of, run_in = (
        outlier_putter(spec.patch),
        segment_finder(spec.unit.columns),
        run_place(spec),
    )

    @cuda.jit(device=True, forceinline=True)
    def put_strip(weight, tile, unit, cursor):
        now = anew(unit)
        first, segment = int32((now * of_unit & in_segment) + before), segment_of(now)
        at = run_in(tile.own, segment)
        return put(weight, tile.number, segment, at, first, tile.own, tile.lane, cursor)

    return put_strip
