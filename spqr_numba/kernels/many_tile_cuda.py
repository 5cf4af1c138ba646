"""What a warp does with its tile in the product with many inputs (many_cuda.py).

It copies the codes, statistics and runs of outliers of its sixteen rows ahead, into places of its
own (many_spec.py), and makes a strip of them at a time: numbers in registers, the first operand of
a product. Outliers go into a *patch* first, from which the lanes take what they add.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .launch import numba_cuda
from .many_spec import STRIP_GROUPS, ManySpec
from .prepared import ALL_LANES, LANES
from .ptx import anew, clear_shared, copier, load_int32, shared_int32, shared_uint16
from .ptx import to_shared_uint16 as put_half
from .runs import HALF_MASK, HEADER_WORDS, SEGMENT_COLUMNS, TILE_ROWS
from .stream_cuda import run_of
from .strip_cuda import strip_multiplier
from .unit_cuda import HALF_BYTES, LOAD_BYTES, WORD_BYTES

__all__ = [
    "Tile",
    "ahead_copier",
    "patch_clearer",
    "run_opener",
    "strip_runner",
    "tile_finder",
    "unit_copier",
]

cuda = numba_cuda()

QUAD_BYTES = STRIP_GROUPS * LOAD_BYTES  # of a row in the patch
NO_ENTRY = 0xFFFF  # a column behind all others
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
    it: sums on their way, and the cursor of `run_opener`. inputs: shared address of B."""
    of_unit, in_unit = spec.unit, octet * 2 + half
    multiply = strip_multiplier(of_unit, octet, half, spec.outliers, spec.b)
    block_of, statistics_of = block_place(spec, octet // of_unit.octets), statistics_place(spec)
    put, outliers = outlier_putter(spec, in_unit), spec.outliers

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
    copy_statistics, copy_run = statistics_copier(spec), run_copier(spec)
    blocks, segment_of = spec.unit.blocks, segment_finder(spec)
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
    of_unit, segment_of = spec.unit, segment_finder(spec)
    block, in_block = divmod(2 * octet + half, 2 * of_unit.octets)
    later, block_then = divmod(block + 2, of_unit.blocks)
    copy_block = block_copier(spec, block_then)
    copy_statistics, copy_run = statistics_copier(spec), run_copier(spec)
    begins_unit, ends_block = octet == half == 0, in_block == 2 * of_unit.octets - 1

    @cuda.jit(device=True, forceinline=True)
    def copy_ahead(weight, tile, unit, end):
        if ends_block and unit + later < end:
            copy_block(weight, tile, int32(unit + later))
        if begins_unit and unit + 1 < end:
            copy_statistics(weight, tile, int32(unit + 1))
            if segment_of(unit) != segment_of(int32(unit + 1)):
                copy_run(weight, tile, segment_of(int32(unit + 1)))

    return copy_ahead


def block_place(spec: ManySpec, block: int) -> Any:
    """block_of(own, unit) -> where the codes of its block are; blocks take turns along the tile."""
    block_bytes, blocks, first = spec.unit.block_bytes, spec.unit.blocks, spec.blocks

    @cuda.jit(device=True, forceinline=True)
    def block_of(own, unit):
        return int32(own + first + (int32(unit * blocks + block) & 1) * block_bytes)

    return block_of


def statistics_place(spec: ManySpec) -> Any:
    """statistics_of(own, unit) -> where they are."""
    statistics_bytes, first = spec.statistics_bytes, spec.statistics

    @cuda.jit(device=True, forceinline=True)
    def statistics_of(own, unit):
        return int32(own + first + (unit & 1) * statistics_bytes)

    return statistics_of


def segment_finder(spec: ManySpec) -> Any:
    """segment_of(unit) -> the segment that it is in."""
    shift = (SEGMENT_COLUMNS // spec.unit.columns).bit_length() - 1

    @cuda.jit(device=True, forceinline=True)
    def segment_of(unit):
        return int32(unit >> shift)

    return segment_of


def run_place(spec: ManySpec) -> Any:
    """run_in(own, segment) -> where its run is."""
    run_bytes, runs = spec.run_bytes, spec.runs

    @cuda.jit(device=True, forceinline=True)
    def run_in(own, segment):
        return int32(own + runs + (segment & 1) * run_bytes)

    return run_in


def record_finder(spec: ManySpec) -> Any:
    """record_of(weight, tile, unit) -> address of its codes and statistics."""
    record_bytes = spec.unit.record_bytes

    @cuda.jit(device=True, forceinline=True)
    def record_of(weight, tile, unit):
        return (
            weight.records + np.int64(int32(anew(tile.number) * weight.units + unit)) * record_bytes
        )

    return record_of


def block_copier(spec: ManySpec, block: int) -> Any:
    """copy_block(weight, tile, unit): codes of one of its blocks."""
    block_of, distance = block_place(spec, block), block * spec.unit.block_bytes
    copy_ahead = copier(*range(0, spec.unit.block_bytes, LANES * LOAD_BYTES))
    record_of = record_finder(spec)

    @cuda.jit(device=True, forceinline=True)
    def copy_block(weight, tile, unit):
        at = int32(LOAD_BYTES * tile.lane)
        source = record_of(weight, tile, unit) + distance + at
        copy_ahead(int32(block_of(tile.own, unit) + at), source)

    return copy_block


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


def run_copier(spec: ManySpec) -> Any:
    """copy_run(weight, tile, segment): as much of a run as has room."""
    run_in, room, copy_ahead = run_place(spec), spec.run_bytes, copier(0)
    outliers = spec.outliers

    @cuda.jit(device=True, forceinline=True)
    def copy_run(weight, tile, segment):
        if outliers:
            start, loads = run_of(weight, tile.number, segment)
            source, to = weight.runs + np.int64(start) * LOAD_BYTES, run_in(tile.own, segment)
            at, end = int32(LOAD_BYTES * tile.lane), int32(min(LOAD_BYTES * loads, room))
            while at < end:
                copy_ahead(int32(to + at), source + at)
                at = int32(at + LOAD_BYTES * LANES)

    return copy_run


# --- Outliers: two lanes a row, which take its entries in turns as the strips come to them


def patch_clearer(spec: ManySpec) -> Any:
    """clear_patch(tile): the warp's patch, all of it."""
    end, step_bytes = spec.patch_bytes, 8 * LANES

    @cuda.jit(device=True, forceinline=True)
    def clear_patch(tile):
        at = int32(8 * tile.lane)
        while at < end:
            clear_shared(int32(tile.own + at))
            at = int32(at + step_bytes)

    return clear_patch


def run_opener(spec: ManySpec) -> Any:
    """open_run(weight, tile, unit) -> cursor: the lane's first entry from a unit on.

    A cursor: the number of an entry in its run, the end of the row's, and the entry.
    """
    columns, segment_of, in_segment = spec.unit.columns, segment_finder(spec), SEGMENT_COLUMNS - 1
    run_in, entry_at, outliers = run_place(spec), entry_reader(spec), spec.outliers

    @cuda.jit(device=True, forceinline=True)
    def open_run(weight, tile, unit):
        k, end, row = int32(0), int32(0), int32(tile.lane >> 1)
        if not outliers:
            return k, end, int32(NO_ENTRY)
        segment = segment_of(unit)
        at = run_in(tile.own, segment)
        if run_of(weight, tile.number, segment)[1]:
            end = int32(shared_uint16(int32(at + HALF_BYTES * row)))
            if row:
                k = int32(shared_uint16(int32(at + HALF_BYTES * row - HALF_BYTES)))
        k = int32(k + (tile.lane & 1))
        first = int32(unit * columns & in_segment)
        entry = entry_at(weight, tile, segment, k, end)
        while int32(entry & HALF_MASK) < first:
            k = int32(k + 2)
            entry = entry_at(weight, tile, segment, k, end)
        return k, end, entry

    return open_run


def entry_reader(spec: ManySpec) -> Any:
    """entry_at(weight, tile, segment, k, end) -> entry k of a run; one behind all columns where the
    row has no more."""
    room, run_in = spec.run_bytes // WORD_BYTES - HEADER_WORDS, run_place(spec)

    @cuda.jit(device=True, forceinline=True)
    def entry_at(weight, tile, segment, k, end):
        at = int32(run_in(tile.own, segment) + WORD_BYTES * HEADER_WORDS)
        entry = shared_int32(int32(at + WORD_BYTES * min(k, int32(room - 1))))
        if room <= k < end:
            run = weight.runs + np.int64(run_of(weight, tile.number, segment)[0]) * LOAD_BYTES
            entry = load_int32(run + WORD_BYTES * np.int64(HEADER_WORDS + k))
        return entry if k < end else int32(NO_ENTRY)

    return entry_at


def outlier_putter(spec: ManySpec, in_unit: int) -> Any:
    """put(weight, tile, unit, cursor) -> cursor: outliers of a unit's strip into the patch."""
    columns, of_unit, entry_at = spec.columns, spec.unit.columns, entry_reader(spec)
    of_group, segment_of = spec.unit.group_size - 1, segment_finder(spec)
    group_shift, part_bytes = of_group.bit_length(), TILE_ROWS * QUAD_BYTES
    in_segment, before = SEGMENT_COLUMNS - 1, in_unit * spec.columns

    @cuda.jit(device=True, forceinline=True)
    def put(weight, tile, unit, cursor):
        first = int32((anew(unit) * of_unit & in_segment) + before)
        own, behind = int32(tile.own + (tile.lane >> 1) * QUAD_BYTES), int32(first + columns)
        k, end, entry = cursor
        while int32(entry & HALF_MASK) < behind:
            column = int32((entry & HALF_MASK) - first)
            place = int32(own + (column >> group_shift) * LOAD_BYTES + (column & 7) * HALF_BYTES)
            place = int32(place + ((column & of_group) >> 3) * part_bytes)
            put_half(place, np.uint16(entry >> 16 & HALF_MASK))
            k = int32(k + 2)
            entry = entry_at(weight, tile, segment_of(unit), k, end)
        return k, end, entry

    return put
