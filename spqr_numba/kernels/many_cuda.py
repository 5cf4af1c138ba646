"""The product of a prepared weight (prepared.py) with many inputs on a Hopper GPU.

    y[b, i] = factor[b] * sum_j W[i, j] x'[b, j] + bias[i]
    W[i, j] = scale * code + (-scale * zero) + outlier, rounded to fp16 in brackets and at each plus

A block of threads has 128 rows, a tile of sixteen for each of its eight warps, and up to 128
inputs. It walks its columns in *strips* of four groups. For each a warp decodes its tile
(unit_numbers_cuda.py), writes the numbers to shared memory, and adds the outliers; then both
warpgroups multiply them by the strip of the inputs (wgmma_cuda.py), and while tensor cores do so,
the warps decode the next strip, as far as registers take it. So each weight is decoded once for all
inputs of a block, and goes nowhere but there. Two blocks share a multiprocessor: what one waits
for, the other hides.

    shared memory  dtype  shape
    A              fp16   [columns / 8, 16, 8, 8]               with a gap behind each 8 columns
    B              fp16   [2, columns / 8, inputs / 8, 8, 8]    x' of a strip
    of each warp:
    blocks         bytes  [2, block]                            codes
    statistics     bytes  [2, statistics of a unit]
    runs           bytes  [2, run]                              as much of them as has room

Where there are fewer blocks than multiprocessors the columns are *split* between several, and
`shares_kernel` adds up what they found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types

from .launch import numba_cuda
from .prepared import ALL_LANES, LANES, UNIT_GROUPS, UNIT_OCTETS
from .ptx import (
    copier,
    copies_done,
    divide,
    end_of_copies,
    load_float,
    load_int32,
    load_uint16,
    shared_address,
    shared_float,
    shared_int32,
    shared_uint16,
    store_float,
    store_uint16,
    to_shared_uint16,
)
from .runs import HALF_MASK, HEADER_WORDS, SEGMENT_COLUMNS, TILE_ROWS
from .scalars import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from .stream_cuda import WEIGHT, run_of
from .unit_cuda import HALF_BYTES, LOAD_BYTES, WORD_BYTES, UnitSpec
from .unit_numbers_cuda import half_decoder, half_writer
from .wgmma_cuda import (
    CORE_BYTES,
    CORE_ROW_BYTES,
    CORE_ROWS,
    STEP_COLUMNS,
    WARPGROUP_ROWS,
    Tiled,
    let_tensor_cores_see,
    products_done,
    sums_writer,
    warpgroup_product,
)

__all__ = [
    "BLOCKS_PER_SM",
    "ROWS",
    "SHARES",
    "SIGNATURE",
    "THREADS",
    "ManySpec",
    "many_kernel",
    "shares_kernel",
]

cuda = numba_cuda()

WARPS = 8
THREADS = WARPS * LANES
ROWS = WARPS * TILE_ROWS  # of a block
STRIP_GROUPS = 4
UNIT_STRIPS = UNIT_GROUPS // STRIP_GROUPS
BLOCKS_PER_SM = 2
SHARED_BYTES = 112 * 1024  # of a block, where a Hopper GPU has two at once
LONGEST_RUN = 4096  # bytes
GAP_BYTES = 32  # from group to group, so that the stores of eight lanes meet different banks
RESULT_FLOATS = ROWS + 4  # of an input, for the same reason
NO_ENTRY = 0xFFFF  # a column behind all others
int32: Any = np.int32

SIGNATURE = (WEIGHT, *(types.int64,) * 5, *(types.int32,) * 3)
SHARES = (*(types.int64,) * 4, *(types.int32,) * 3)
"""The signatures of the kernels of `many_kernel` and `shares_kernel`."""


@dataclass(frozen=True)
class ManySpec:
    """What a kernel is compiled for: the weight, the inputs of a block, the dtype of y."""

    unit: UnitSpec
    inputs: int
    kind: torch.dtype

    @property
    def columns(self) -> int:
        """Of a strip."""
        return STRIP_GROUPS * self.unit.group_size

    @property
    def chunks(self) -> int:
        """Of a strip, by eight columns."""
        return self.columns // CORE_ROWS

    @property
    def a(self) -> Tiled:
        """How A lies."""
        gap = GAP_BYTES * CORE_ROWS // self.unit.group_size
        return Tiled(ROWS // CORE_ROWS * CORE_BYTES + gap)

    @property
    def b(self) -> Tiled:
        """How B lies."""
        return Tiled(self.inputs * CORE_ROW_BYTES)

    @property
    def a_bytes(self) -> int:
        """Of A."""
        return self.chunks * self.a.column_step

    @property
    def b_bytes(self) -> int:
        """Of one B."""
        return self.chunks * self.b.column_step

    @property
    def statistics_bytes(self) -> int:
        """Of a unit."""
        return self.unit.stat_bytes + self.unit.second_bytes

    @property
    def warps(self) -> int:
        """Where what is of the warps begins."""
        return self.a_bytes + 2 * self.b_bytes

    @property
    def runs(self) -> int:
        """Where a warp's runs begin, in what is its own."""
        return 2 * (self.unit.block_bytes + self.statistics_bytes)

    @property
    def run_bytes(self) -> int:
        """Of a run, as much as is copied; the rest comes from global memory."""
        room = (SHARED_BYTES - self.warps) // WARPS - self.runs
        return min(room // 2 // LOAD_BYTES * LOAD_BYTES, LONGEST_RUN)

    @property
    def warp_bytes(self) -> int:
        """Of what is a warp's own."""
        return self.runs + 2 * self.run_bytes

    @property
    def bytes(self) -> int:
        """Of a block's shared memory; the results take the place of all in the end."""
        return self.warps + WARPS * self.warp_bytes


@cache
def many_kernel(spec: ManySpec) -> Any:
    """kernel(weight, staged, factors, y, bias, shares, count, splits, input_blocks).

    Addresses: staged, x' as staging_cuda.py writes cores; factors float32 [inputs]; y [count,
    rows]; bias [rows] or 0; shares float32 [splits, count, rows], in place of y, or 0.
    """
    inputs, strip_bytes = spec.inputs, spec.b_bytes
    segment_units, nothing = SEGMENT_COLUMNS // spec.unit.columns, (np.float32(0),) * (inputs // 2)
    tile_of, start, open_run = tile_finder(spec), starting_function(spec), run_opener(spec)
    run_unit, put_sums = unit_function(spec), sums_writer(RESULT_FLOATS)
    write = result_writer(spec)

    @cuda.jit(launch_bounds=(THREADS, BLOCKS_PER_SM))
    def kernel(weight, staged, factors, y, bias, shares, count, splits, input_blocks):
        zero = shared_address(cuda.shared.array(0, np.uint16))
        thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        above = divide(block, input_blocks)
        input_block, row_block = int32(block - above * input_blocks), divide(above, splits)
        split, tile = int32(above - row_block * splits), tile_of(weight, row_block, thread, zero)
        unit = divide(int32(weight.units * split), splits)
        end = divide(int32(weight.units * int32(split + 1)), splits)
        x = staged + np.int64(input_block) * weight.units * (UNIT_STRIPS * strip_bytes)
        x = x + LOAD_BYTES * thread
        start(weight, tile, x, unit, end, zero)
        sums, cursor = nothing, open_run(weight, tile, unit)
        while True:  # at least once, or the sums would not stay in their registers
            sums, cursor = run_unit(weight, tile, x, unit, end, zero, sums, cursor)
            unit = int32(unit + 1)
            if unit >= end:
                break
            if unit & (segment_units - 1) == 0:
                cursor = open_run(weight, tile, unit)
        products_done()
        cuda.syncthreads()
        put_sums(int32(zero + WORD_BYTES * TILE_ROWS * tile.warp), tile.lane, sums)
        cuda.syncthreads()
        column, row = int32(input_block * inputs), int32(row_block * ROWS)
        write(weight, factors, y, bias, shares, count, split, column, row, thread, zero)

    return kernel


class Tile(NamedTuple):
    """What a warp decodes: `there` is 0 for one behind the last."""

    records: int  # addresses of its first unit's, for the lane
    second_level: int
    number: int
    there: int
    own: int  # shared address of what is the warp's own
    warp: int
    lane: int


def tile_finder(spec: ManySpec) -> Any:
    """tile_of(weight, row_block, thread, zero) -> Tile."""
    warps, warp_bytes = spec.warps, spec.warp_bytes
    record_bytes, second_bytes = spec.unit.record_bytes, spec.unit.second_bytes

    @cuda.jit(device=True, forceinline=True)
    def tile_of(weight, row_block, thread, zero):
        # from lane 0, so that the assembler knows it for the same in all lanes
        warp = int32(cuda.shfl_sync(ALL_LANES, int32(thread >> 5), 0))
        lane, number = int32(thread & 31), int32(row_block * WARPS + warp)
        own, stats = LOAD_BYTES * lane, number >> weight.stats_shift
        return Tile(
            weight.records + np.int64(number) * weight.units * record_bytes + own,
            weight.second_level + np.int64(stats) * weight.units * second_bytes + own,
            number,
            int32(number < weight.tiles),
            int32(zero + warps + warp * warp_bytes),
            warp,
            lane,
        )

    return tile_of


def starting_function(spec: ManySpec) -> Any:
    """start(weight, tile, x, unit, end, zero): what the first strips need is there."""
    copy_inputs, copy_statistics = inputs_copier(spec), statistics_copier(spec)
    copy_run, wait = run_copier(spec), copies_done(0)
    blocks, segment_units = spec.unit.blocks, SEGMENT_COLUMNS // spec.unit.columns
    copy_block, copy_other = block_copier(spec, 0), block_copier(spec, 1 % blocks)

    @cuda.jit(device=True, forceinline=True)
    def start(weight, tile, x, unit, end, zero):
        copy_block(tile, unit)
        if blocks == 2 or unit + 1 < end:
            copy_other(tile, int32(unit + 2 - blocks))
        copy_statistics(tile, unit)
        copy_run(weight, tile, divide(unit, int32(segment_units)))
        copy_inputs(x, int32(UNIT_STRIPS * unit), tile, zero)
        end_of_copies()
        wait()
        cuda.syncwarp()

    return start


def unit_function(spec: ManySpec) -> Any:
    """run_unit(weight, tile, x, unit, end, zero, sums, cursor) -> the last two, as the next unit
    needs them."""
    first, second, third, fourth = (octet_function(spec, octet) for octet in range(UNIT_OCTETS))

    @cuda.jit(device=True, forceinline=True)
    def run_unit(weight, tile, x, unit, end, zero, sums, cursor):
        sums, cursor = first(weight, tile, x, unit, end, zero, sums, cursor)
        sums, cursor = second(weight, tile, x, unit, end, zero, sums, cursor)
        sums, cursor = third(weight, tile, x, unit, end, zero, sums, cursor)
        return fourth(weight, tile, x, unit, end, zero, sums, cursor)

    return run_unit


def octet_function(spec: ManySpec, octet: int) -> Any:
    """run_octet(...), as `unit_function`'s: the two strips of an octet."""
    first, second = (strip_function(spec, octet, half) for half in range(2))

    @cuda.jit(device=True, forceinline=True)
    def run_octet(weight, tile, x, unit, end, zero, sums, cursor):
        sums, cursor = first(weight, tile, x, unit, end, zero, sums, cursor)
        return second(weight, tile, x, unit, end, zero, sums, cursor)

    return run_octet


def strip_function(spec: ManySpec, octet: int, half: int) -> Any:
    """run_strip(...), as `unit_function`'s: decoded, while the strip before is multiplied, and set
    off. The next strip's inputs are on their way meanwhile, and what the warp will decode."""
    of_unit, in_unit = spec.unit, octet * 2 + half
    decode, write = half_decoder(of_unit, octet, half), half_writer(of_unit, spec.a.column_step)
    multiply = warpgroup_product(spec.inputs, spec.columns // STEP_COLUMNS, spec.a, spec.b)
    wait_for_inputs = copies_done(1)
    copy_inputs, copy_ahead = inputs_copier(spec), ahead_copier(spec, octet, half)
    add_outliers, columns = outlier_adder(spec), spec.columns
    in_segment, group_bytes = (
        SEGMENT_COLUMNS // columns - 1,
        WARPGROUP_ROWS // CORE_ROWS * CORE_BYTES,
    )
    tile_bytes, a_bytes, b_bytes = TILE_ROWS // CORE_ROWS * CORE_BYTES, spec.a_bytes, spec.b_bytes
    block_of, statistics_of = block_place(spec, octet // of_unit.octets), statistics_place(spec)

    @cuda.jit(device=True, forceinline=True)
    def run_strip(weight, tile, x, unit, end, zero, sums, cursor):
        strip, out = int32(UNIT_STRIPS * unit + in_unit), int32(zero + tile.warp * tile_bytes)
        if tile.there:
            words = decode(block_of(tile.own, unit), statistics_of(tile.own, unit), tile.lane)
            products_done()
            write(out, tile.lane, words)
            cuda.syncwarp()
            cursor = add_outliers(cursor, int32((strip & in_segment) * columns), out, tile.lane)
        else:
            products_done()
        wait_for_inputs()
        let_tensor_cores_see()
        cuda.syncthreads()
        rows, inputs = int32(zero + (tile.warp >> 2) * group_bytes), int32(strip & 1)
        sums = multiply(sums, rows, int32(zero + a_bytes + inputs * b_bytes))
        if in_unit + 1 < UNIT_STRIPS or unit + 1 < end:
            copy_inputs(x, int32(strip + 1), tile, zero)
        end_of_copies()
        copy_ahead(weight, tile, unit, end)
        end_of_copies()
        return sums, cursor

    return run_strip


# --- Copying ahead: x' of the next strip; of a warp's tile what is needed from the one behind it on


def inputs_copier(spec: ManySpec) -> Any:
    """copy_inputs(x, strip, tile, zero): x' of a strip, on its way to its B.

    x: address of the thread's first 16 bytes.
    """
    a_bytes, b_bytes, warp_bytes = spec.a_bytes, spec.b_bytes, LANES * LOAD_BYTES
    at_once, rest = WARPS * warp_bytes, b_bytes % (WARPS * warp_bytes)
    copy_all, copy_rest = copier(*range(0, b_bytes - rest, at_once)), copier(b_bytes - rest)

    @cuda.jit(device=True, forceinline=True)
    def copy_inputs(x, strip, tile, zero):
        own = int32(tile.warp * warp_bytes + LOAD_BYTES * tile.lane)
        to = int32(zero + a_bytes + (strip & 1) * b_bytes + own)
        copy_all(to, x + np.int64(strip) * b_bytes)
        if own < rest:
            copy_rest(to, x + np.int64(strip) * b_bytes)

    return copy_inputs


def ahead_copier(spec: ManySpec, octet: int, half: int) -> Any:
    """copy_ahead(weight, tile, unit, end): into what a strip of a unit is the last to use."""
    of_unit, segment_units = spec.unit, SEGMENT_COLUMNS // spec.unit.columns
    block, in_block = divmod(2 * octet + half, 2 * of_unit.octets)
    copy_block, later = block_copier(spec, (block + 2) % of_unit.blocks), 2 // of_unit.blocks
    copy_statistics, copy_run = statistics_copier(spec), run_copier(spec)
    begins_unit, ends_block = octet == half == 0, in_block == 2 * of_unit.octets - 1

    @cuda.jit(device=True, forceinline=True)
    def copy_ahead(weight, tile, unit, end):
        if ends_block and unit + later < end:
            copy_block(tile, int32(unit + later))
        if begins_unit and unit + 1 < end:
            copy_statistics(tile, int32(unit + 1))
            if (unit + 1) & (segment_units - 1) == 0:
                copy_run(weight, tile, divide(int32(unit + 1), int32(segment_units)))

    return copy_ahead


def block_place(spec: ManySpec, block: int) -> Any:
    """block_of(own, unit) -> where the codes of its block are; blocks take turns along the tile."""
    block_bytes, blocks = spec.unit.block_bytes, spec.unit.blocks

    @cuda.jit(device=True, forceinline=True)
    def block_of(own, unit):
        return int32(own + (int32(unit * blocks + block) & 1) * block_bytes)

    return block_of


def statistics_place(spec: ManySpec) -> Any:
    """statistics_of(own, unit) -> where they are."""
    statistics_bytes, first = spec.statistics_bytes, 2 * spec.unit.block_bytes

    @cuda.jit(device=True, forceinline=True)
    def statistics_of(own, unit):
        return int32(own + first + (unit & 1) * statistics_bytes)

    return statistics_of


def run_place(spec: ManySpec) -> Any:
    """run_in(own, segment) -> where its run is."""
    run_bytes, runs = spec.run_bytes, spec.runs

    @cuda.jit(device=True, forceinline=True)
    def run_in(own, segment):
        return int32(own + runs + (segment & 1) * run_bytes)

    return run_in


def block_copier(spec: ManySpec, block: int) -> Any:
    """copy_block(tile, unit): codes of one of its blocks."""
    block_of, distance = block_place(spec, block), block * spec.unit.block_bytes
    copy_ahead = copier(*range(0, spec.unit.block_bytes, LANES * LOAD_BYTES))
    record_bytes = spec.unit.record_bytes

    @cuda.jit(device=True, forceinline=True)
    def copy_block(tile, unit):
        if tile.there:
            source = tile.records + np.int64(unit) * record_bytes + distance
            copy_ahead(int32(block_of(tile.own, unit) + LOAD_BYTES * tile.lane), source)

    return copy_block


def statistics_copier(spec: ManySpec) -> Any:
    """copy_statistics(tile, unit): the first level, then the second."""
    unit, statistics_of, copy_ahead = spec.unit, statistics_place(spec), copier(0)
    record_bytes, stat_bytes, second_bytes = unit.record_bytes, unit.stat_bytes, unit.second_bytes
    code_bytes = unit.blocks * unit.block_bytes

    @cuda.jit(device=True, forceinline=True)
    def copy_statistics(tile, of_unit):
        at = int32(LOAD_BYTES * tile.lane)
        to = int32(statistics_of(tile.own, of_unit) + at)
        if tile.there and at < stat_bytes:
            copy_ahead(to, tile.records + np.int64(of_unit) * record_bytes + code_bytes)
        if tile.there and at < second_bytes:
            source = tile.second_level + np.int64(of_unit) * second_bytes
            copy_ahead(int32(to + stat_bytes), source)

    return copy_statistics


def run_copier(spec: ManySpec) -> Any:
    """copy_run(weight, tile, segment): as much of a run as has room."""
    run_in, room, copy_ahead = run_place(spec), spec.run_bytes, copier(0)

    @cuda.jit(device=True, forceinline=True)
    def copy_run(weight, tile, segment):
        if weight.runs and tile.there:
            start, loads = run_of(weight, tile.number, segment)
            source, to = weight.runs + np.int64(start) * LOAD_BYTES, run_in(tile.own, segment)
            at, end = int32(LOAD_BYTES * tile.lane), int32(min(LOAD_BYTES * loads, room))
            while at < end:
                copy_ahead(int32(to + at), source + at)
                at = int32(at + LOAD_BYTES * LANES)

    return copy_run


# --- Outliers: two lanes a row, which take its entries in turns as the strips come to them


def run_opener(spec: ManySpec) -> Any:
    """open_run(weight, tile, unit) -> cursor: the lane's first entry from a unit on.

    A cursor: where a run's entries are, in shared and in global memory, the number of the next, the
    end of the row's, and the next itself.
    """
    columns, segment_units = spec.unit.columns, SEGMENT_COLUMNS // spec.unit.columns
    run_in, entry_at = run_place(spec), entry_reader(spec)

    @cuda.jit(device=True, forceinline=True)
    def open_run(weight, tile, unit):
        run, k, end = np.int64(0), int32(0), int32(0)
        segment = divide(unit, int32(segment_units))
        at, row = run_in(tile.own, segment), int32(tile.lane >> 1)
        if weight.runs and tile.there:
            start, loads = run_of(weight, tile.number, segment)
            run = weight.runs + np.int64(start) * LOAD_BYTES
            if loads:
                end = int32(shared_uint16(int32(at + HALF_BYTES * row)))
                if row:
                    k = int32(shared_uint16(int32(at + HALF_BYTES * row - HALF_BYTES)))
            k = int32(k + (tile.lane & 1))
        run, at = run + WORD_BYTES * HEADER_WORDS, int32(at + WORD_BYTES * HEADER_WORDS)
        first = int32((unit - segment * segment_units) * columns)
        entry = entry_at(at, run, k, end)
        while entry & HALF_MASK < first:
            k = int32(k + 2)
            entry = entry_at(at, run, k, end)
        return at, run, k, end, entry

    return open_run


def entry_reader(spec: ManySpec) -> Any:
    """entry_at(at, run, k, end) -> entry k; one behind all columns where the row has no more."""
    room = spec.run_bytes // WORD_BYTES - HEADER_WORDS

    @cuda.jit(device=True, forceinline=True)
    def entry_at(at, run, k, end):
        entry = shared_int32(int32(at + WORD_BYTES * min(k, int32(room - 1))))
        if room <= k < end:
            entry = load_int32(run + np.int64(WORD_BYTES) * k)
        return entry if k < end else int32(NO_ENTRY)

    return entry_at


def outlier_adder(spec: ManySpec) -> Any:
    """add_outliers(cursor, first, out, lane) -> cursor: to a tile's numbers in A, those of a strip.

    first: of the strip's columns in the segment; out: of the tile's first 16 bytes.
    """
    columns, column_step, entry_at = spec.columns, spec.a.column_step, entry_reader(spec)

    @cuda.jit(device=True, forceinline=True)
    def add_outliers(cursor, first, out, lane):
        own = int32(out + (lane >> 1) * CORE_ROW_BYTES)
        at, run, k, end, entry = cursor
        while entry & HALF_MASK < first + columns:
            column = int32((entry & HALF_MASK) - first)
            place = int32(own + (column >> 3) * column_step + (column & 7) * HALF_BYTES)
            value = half_to_float(np.uint16(entry >> 16 & HALF_MASK))
            k = int32(k + 2)
            entry = entry_at(at, run, k, end)
            total = half_to_float(shared_uint16(place)) + value
            to_shared_uint16(place, float_to_half(total))
        return at, run, k, end, entry

    return add_outliers


# --- Results


def result_writer(spec: ManySpec) -> Any:
    """write(...): a block's sums from shared memory, as y or as shares of it; a thread has a row
    and every other input."""
    inputs, put, bias_of = spec.inputs, number_writer(spec.kind), bias_reader(spec.kind)
    at_once, step_bytes = THREADS // ROWS, THREADS // ROWS * WORD_BYTES * RESULT_FLOATS

    @cuda.jit(device=True, forceinline=True)
    def write(weight, factors, y, bias, shares, count, split, column, row, thread, zero):
        in_block, i = int32(thread & (ROWS - 1)), int32(thread // ROWS)
        at = int32(zero + WORD_BYTES * (i * RESULT_FLOATS + in_block))
        row, i, end = int32(row + in_block), int32(column + i), int32(min(count, column + inputs))
        place = np.int64(i) * weight.rows + row
        if row < weight.rows and shares:
            place = shares + WORD_BYTES * (np.int64(split) * count * weight.rows + place)
            while i < end:
                store_float(place, shared_float(at))
                i, at = int32(i + at_once), int32(at + step_bytes)
                place = place + WORD_BYTES * at_once * np.int64(weight.rows)
        elif row < weight.rows:
            place, more = y + HALF_BYTES * place, bias_of(bias, row)
            while i < end:
                factor = load_float(factors + WORD_BYTES * np.int64(i))
                put(place, shared_float(at) * factor + more)
                i, at = int32(i + at_once), int32(at + step_bytes)
                place = place + HALF_BYTES * at_once * np.int64(weight.rows)

    return write


def number_writer(kind: torch.dtype) -> Any:
    """put(address, value): rounded to fp16 or bf16."""
    rounded = float_to_bfloat if kind == torch.bfloat16 else float_to_half

    @cuda.jit(device=True, forceinline=True)
    def put(address, value):
        store_uint16(address, rounded(value))

    return put


def bias_reader(kind: torch.dtype) -> Any:
    """bias_of(bias, row) -> float32; 0 where there is none."""
    widened = bfloat_to_float if kind == torch.bfloat16 else half_to_float

    @cuda.jit(device=True, forceinline=True)
    def bias_of(bias, row):
        return widened(load_uint16(bias + HALF_BYTES * np.int64(row))) if bias else np.float32(0)

    return bias_of


@cache
def shares_kernel(kind: torch.dtype) -> Any:
    """kernel(shares, factors, y, bias, count, rows, splits): y from the shares of all splits."""
    put, bias_of = number_writer(kind), bias_reader(kind)

    @cuda.jit(launch_bounds=(THREADS, 1))
    def kernel(shares, factors, y, bias, count, rows, splits):
        step = np.int64(count) * rows
        own = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if own < step:
            total, place = np.float32(0), shares + WORD_BYTES * own
            for _ in range(splits):
                total += load_float(place)
                place += WORD_BYTES * step
            i = own // rows
            factor = load_float(factors + WORD_BYTES * i)
            put(y + HALF_BYTES * own, total * factor + bias_of(bias, own - i * rows))

    return kernel
