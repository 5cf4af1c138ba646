"""The kernel of the matrix product on a GPU with eight or sixteen inputs; matmul_cuda.py runs it.

A cluster of blocks owns some tiles, and each of its blocks some of the columns (stream_cuda.py), so
that x' of these fits into its shared memory. The cluster stages x' together
(several_inputs_cuda.py), and in the end each block adds up some rows of all. In between no warp
waits for another but where all need the next slab of the inputs. On a GPU that has no clusters a
block is one.

    shared memory  dtype    shape
    exponents      int32    [8 ranks, 16 inputs]             the largest of a bf16 input
    factors        float32  [2, 16 inputs]                   to multiply by, and one over these
    barrier        int64    [2]                              the first: of the shares
    x'             fp16     [inputs / 8, columns, 8 inputs]  of a part
    -X             float32  [inputs / 8, groups / 2, 8 inputs, 2 groups]
    shares         float32  [own tiles, ranks, 32, totals]   in their place: the cluster's sums
    slots          float32  [tiles + warps - 1, 32, totals]  stream_cuda.py
    starts         int32    [tiles * segments + 1]           of run_starts (runs.py)
    ring           bytes    [warps, stages, place]           ring_cuda.py

In the end a tile belongs to one of the cluster's blocks. Each block sends it the sum of its slots.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types

from .bulk_cuda import expect_bytes, let_copy_engine_see, make_barrier, wait_for_cluster_phase
from .codes_cuda import SUBNORMAL_UNIT
from .launch import numba_cuda
from .prepared import LANES, OCTET, UNIT_OCTETS
from .product_cuda import FLOAT_BYTES
from .ptx import (
    divide,
    divider,
    four_floats,
    let_dependents_start,
    load_uint16,
    of_rank,
    prefetch,
    send_floats,
    shared_address,
    shared_float,
    store_uint16,
    wait_for_dependencies,
)
from .ring_cuda import earlier_copies_done, ring_starters, ring_walker
from .run_several_cuda import several_run_multiplier
from .runs import SEGMENT_COLUMNS, TILE_ROWS
from .scalars import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from .several_inputs_cuda import (
    FACTORS,
    INPUTS_BEGIN,
    SHARES_THERE,
    cluster_functions,
    factor_finder,
    several_stager,
    summer,
)
from .stream_cuda import (
    PLAN,
    WEIGHT,
    KernelSpec,
    known_run,
    parts_function,
    slots_clearer,
    table_filler,
    work_function,
)
from .unit_cuda import HALF_BYTES, LOAD_BYTES, add_to_shared, put_floats, unit_multiplier
from .unit_several_cuda import AT_ONCE, UnitOfSeveral

__all__ = ["SEVERAL", "several_kernel"]

cuda = numba_cuda()
int32: Any = np.int32

SEVERAL = (WEIGHT, types.int64, types.int32, types.int64, types.int64, types.int32, PLAN)
"""The signature of `several_kernel`'s kernel."""


@cache
def several_kernel(spec: KernelSpec) -> Any:
    """kernel(weight, x, step, y, bias, count, plan): addresses of x [count, columns], `step` bytes
    from row to row, of y [count, rows], all fp16 or bf16, and of bias [rows] or 0."""
    make_known, wait_for_shares = shares_barrier(spec)
    arrive, publish, wait = cluster_functions(spec)
    work_of, part_of = work_function(spec), parts_function(spec)
    start, (start_ring, fill_ring) = starting_function(spec), ring_starters(spec)
    find_factors, stage = factor_finder(spec), several_stager(spec, start_ring)
    wait_for_table = earlier_copies_done(spec, spec.filled_first)
    sum_groups, walk = summer(spec), ring_walker(spec, item_multiplier(spec))
    send_shares, write_rows = share_sender(spec), writing_function(spec)

    @cuda.jit(launch_bounds=(spec.threads, spec.resident))
    def kernel(weight, x, step, y, bias, count, plan):
        zeros, slab = shared_address(cuda.shared.array(0, np.uint16)), int32(0)
        make_known(zeros)
        while slab < plan.slabs:
            arrive()
            work, first = work_of(weight, plan)
            part = part_of(weight, plan, work.rank, slab)
            if slab == 0:
                start(weight, plan, work, zeros)
            wait()
            if slab == 0:
                find_factors(weight, plan, x, step, count, work, zeros)
            stage(weight, plan, x, step, count, work, part, first, slab, zeros)
            wait_for_table()
            publish()
            fill_ring(weight, plan, work, part, first, zeros)
            wait()
            sum_groups(weight, plan, work, part, zeros)
            cuda.syncthreads()
            walk(weight, plan, work, part, first, zeros)
            slab = int32(slab + 1)
        cuda.syncthreads()
        arrive()
        work, _ = work_of(weight, plan)
        wait()
        send_shares(plan, work, zeros)
        wait_for_shares(zeros)
        write_rows(weight, plan, work, zeros, y, bias, count)

    return kernel


def shares_barrier(spec: KernelSpec) -> tuple[Any, Any]:
    """make_known(zeros): to the cluster, the barrier of the shares; and wait_for_shares(zeros). A
    block alone has none: its threads meet."""
    alone = spec.ranks == 1

    @cuda.jit(device=True, forceinline=True)
    def make_known(zeros):
        if cuda.threadIdx.x == 0:
            make_barrier(int32(zeros + SHARES_THERE), int32(1))
            let_copy_engine_see()

    @cuda.jit(device=True, forceinline=True)
    def wait_for_shares(zeros):
        wait_for_cluster_phase(int32(zeros + SHARES_THERE), int32(0))

    @cuda.jit(device=True, forceinline=True)
    def nothing(zeros):
        pass

    @cuda.jit(device=True, forceinline=True)
    def meet(zeros):
        cuda.syncthreads()

    return (nothing, meet) if alone else (make_known, wait_for_shares)


def starting_function(spec: KernelSpec) -> Any:
    """start(weight, plan, work, zeros): what does not need x, and then until x may be read."""
    threads, early = spec.threads, spec.early
    fill_table, clear_slots = table_filler(spec), slots_clearer(spec)

    @cuda.jit(device=True, forceinline=True)
    def start(weight, plan, work, zeros):
        prefetch_targets(weight, plan, work)
        fill_table(weight, plan, work, zeros)
        clear_slots(plan, work, zeros)
        if early:
            wait_for_dependencies()
            let_dependents_start()

    @cuda.jit(device=True, forceinline=True)
    def prefetch_targets(weight, plan, work):
        i = int32(2 * HALF_BYTES * work.rank * plan.pairs + 128 * work.thread)
        end = int32(min(2 * HALF_BYTES * (work.rank + 1) * plan.pairs, HALF_BYTES * weight.columns))
        while weight.target and i < end:
            prefetch(weight.target + i)
            i = int32(i + 128 * threads)

    return start


# --- Multiplying


def item_multiplier(spec: KernelSpec) -> Any:
    """multiply(...): what a warp does with an item that lies at `at`; the sums go to its slot."""
    slot_bytes = spec.slot_bytes
    lane_bytes, zero = FLOAT_BYTES * spec.unit.totals, (np.float32(0),) * spec.unit.totals
    multiply_unit, places_of = unit_multiplier(spec.unit, UnitOfSeveral), unit_places(spec)
    multiply_run, columns = several_run_multiplier(spec.unit), spec.unit.columns

    @cuda.jit(device=True, forceinline=True)
    def multiply(weight, plan, work, part, item, at, zeros):
        slot = int32(zeros + FLOAT_BYTES * plan.slots + (item.tile + work.warp) * slot_bytes)
        if item.place < work.units:
            if item.place < part.units:
                places = places_of(plan, item.place, at, work.lane, zeros)
                add_to_shared(int32(slot + work.lane * lane_bytes), multiply_unit(places, zero))
        elif item.place < work.units + part.runs:
            segment = int32(part.run + item.place - work.units)
            start, loads = known_run(weight, plan, work, item, segment, zeros)
            if loads:
                run = weight.runs + np.int64(start) * LOAD_BYTES
                x = int32(segment * SEGMENT_COLUMNS - part.unit * columns)
                x = int32(zeros + INPUTS_BEGIN + LOAD_BYTES * x)
                multiply_run(run, at, slot, x, int32(LOAD_BYTES * plan.columns), work.lane)

    return multiply


def unit_places(spec: KernelSpec) -> Any:
    """places_of(plan, unit, at, lane, zeros) -> where UnitOfSeveral finds things; units of the
    part."""
    columns, divide_by_octet = spec.unit.columns, divider(OCTET * spec.unit.group_size)
    octet_bytes = FLOAT_BYTES * OCTET * AT_ONCE  # of X

    @cuda.jit(device=True, forceinline=True)
    def places_of(plan, unit, at, lane, zeros):
        octets = divide_by_octet(plan.columns)
        return (
            at,
            lane,
            int32(zeros + INPUTS_BEGIN + unit * columns * LOAD_BYTES),
            int32(LOAD_BYTES * plan.columns),
            int32(zeros + plan.sums * FLOAT_BYTES + unit * UNIT_OCTETS * octet_bytes),
            int32(octets * octet_bytes),
        )

    return places_of


# --- Adding up, and writing


def tile_loads(spec: KernelSpec) -> int:
    """Loads of 16 bytes that a tile's totals take."""
    return spec.slot_bytes // LOAD_BYTES


@cache
def own_tiles_function(spec: KernelSpec) -> Any:
    """own_tiles(work) -> how many of the cluster's tiles are the block's: each `ranks`-th."""
    ranks, divide_by_ranks = spec.ranks, divider(spec.ranks)

    @cuda.jit(device=True, forceinline=True)
    def own_tiles(work):
        return divide_by_ranks(int32(work.tiles + ranks - 1 - work.rank))

    return own_tiles


def slots_summer(spec: KernelSpec) -> Any:
    """sum_slots(at, more) -> the sum of four totals and of the same in so many slots behind."""
    slot_bytes = spec.slot_bytes

    @cuda.jit(device=True, forceinline=True)
    def sum_slots(at, more):
        a, b, c, d = four_floats(at)
        for _ in range(more):
            at = int32(at + slot_bytes)
            e, f, g, h = four_floats(at)
            a, b, c, d = a + e, b + f, c + g, d + h
        return a, b, c, d

    return sum_slots


def share_sender(spec: KernelSpec) -> Any:
    """send_shares(plan, work, zeros): the sum of each tile's slots, to whom the tile belongs.

    A tile's items are those of some warps side by side; of others between them the slot is empty.
    """
    warps, ranks, loads, slot_bytes = spec.warps, spec.ranks, tile_loads(spec), spec.slot_bytes
    send, sum_slots, own_tiles = share_putter(spec), slots_summer(spec), own_tiles_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def warp_of(item, items):
        return divide(int32((item + 1) * warps - 1), items)

    @cuda.jit(device=True, forceinline=True)
    def send_shares(plan, work, zeros):
        items, tile = int32(work.tiles * work.places), work.warp
        if ranks > 1 and work.thread == 0:
            expected = int32(own_tiles(work) * ranks * slot_bytes)
            expect_bytes(int32(zeros + SHARES_THERE), expected)
        while tile < work.tiles:
            warp = warp_of(int32(tile * work.places), items)
            more = int32(warp_of(int32((tile + 1) * work.places - 1), items) - warp)
            slot = int32(zeros + FLOAT_BYTES * plan.slots + (tile + warp) * slot_bytes)
            for first in range(0, loads, LANES):
                load = int32(first + work.lane)
                send(work, tile, load, sum_slots(int32(slot + LOAD_BYTES * load), more), zeros)
            tile = int32(tile + warps)

    return send_shares


def share_putter(spec: KernelSpec) -> Any:
    """send(work, tile, load, sums, zeros): four totals of a tile, to whom it belongs."""
    ranks, loads, divide_by_ranks = spec.ranks, tile_loads(spec), divider(spec.ranks)

    @cuda.jit(device=True, forceinline=True)
    def send(work, tile, load, sums, zeros):
        turn = divide_by_ranks(tile)
        place = int32(INPUTS_BEGIN + LOAD_BYTES * ((turn * ranks + work.rank) * loads + load))
        if ranks == 1:
            put_floats(int32(zeros + place), sums)
        else:
            other = of_rank(zeros, int32(tile - turn * ranks))
            barrier = int32(other + SHARES_THERE)
            send_floats(int32(other + place), sums[0], sums[1], sums[2], sums[3], barrier)

    return send


def writing_function(spec: KernelSpec) -> Any:
    """write_rows(...): the sum of all blocks' shares of the block's tiles, and the bias, to y."""
    threads, ranks, eights = spec.threads, spec.ranks, spec.unit.inputs // AT_ONCE
    loads, put, sum_slots = tile_loads(spec), total_putter(spec), slots_summer(spec)
    divide_by_loads, divide_by_eights = divider(loads), divider(eights)
    own_tiles, slot_bytes = own_tiles_function(spec), spec.slot_bytes

    @cuda.jit(device=True, forceinline=True)
    def write_rows(weight, plan, work, zeros, y, bias, count):
        i, tiles = work.thread, own_tiles(work)
        while i < tiles * loads:
            turn = divide_by_loads(i)
            load = int32(i - turn * loads)
            lane, tile = divide_by_eights(load), int32(turn * ranks + work.rank)
            row = int32((work.first_tile + tile) * TILE_ROWS + (lane >> 2))
            own = int32((load - lane * eights) * AT_ONCE + 2 * (lane & 3))
            at = int32(zeros + INPUTS_BEGIN + turn * ranks * slot_bytes + LOAD_BYTES * load)
            a, b, c, d = sum_slots(at, ranks - 1)
            put(weight, row, own, a, zeros, y, bias, count)
            put(weight, row, int32(own + 1), b, zeros, y, bias, count)
            put(weight, int32(row + 8), own, c, zeros, y, bias, count)
            put(weight, int32(row + 8), int32(own + 1), d, zeros, y, bias, count)
            i = int32(i + threads)

    return write_rows


def total_putter(spec: KernelSpec) -> Any:
    """put(weight, row, own, total, zeros, y, bias, count): what a row gives with an input, to y, if
    there are such."""
    bfloat = spec.kind == torch.bfloat16
    to_float = bfloat_to_float if bfloat else half_to_float
    from_float = float_to_bfloat if bfloat else float_to_half

    @cuda.jit(device=True, forceinline=True)
    def put(weight, row, own, total, zeros, y, bias, count):
        if row < weight.rows and own < count:
            total *= np.float32(1 / SUBNORMAL_UNIT)
            if bfloat:
                total *= shared_float(int32(zeros + FACTORS + FLOAT_BYTES * own))
            if bias:
                total += to_float(load_uint16(bias + HALF_BYTES * np.int64(row)))
            place = y + HALF_BYTES * (np.int64(own) * weight.rows + row)
            store_uint16(place, from_float(total))

    return put
