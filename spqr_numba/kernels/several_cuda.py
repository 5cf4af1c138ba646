"""The kernel of the matrix product on a GPU with eight or sixteen inputs; matmul_cuda.py runs it.

A cluster of blocks owns some tiles, and each of its blocks some of the columns (stream_cuda.py), so
that x' of these fits into its shared memory. The cluster stages x' together
(several_inputs_cuda.py), and in the end each block adds up some rows of all. In between no warp
waits for another but where all need the next slab of the inputs. On a GPU that has no clusters a
block is one.

    shared memory  dtype    shape
    exponents      int32    [8 ranks, 16 inputs]             the largest of a bf16 input
    factors        float32  [2, 16 inputs]                   to multiply by, and one over these
    x'             fp16     [inputs / 8, columns, 8 inputs]  of a part
    -X             float32  [inputs / 8, groups / 2, 8 inputs, 2 groups]
    slots          float32  [tiles + warps - 1, 32, totals]  stream_cuda.py
    starts         int32    [tiles * segments + 1]           of run_starts (runs.py)
    ring           bytes    [warps, stages, place]   ring_cuda.py
    in its place   float32  [tiles, 32, totals]              the sums of the slots, for the cluster
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types

from .codes_cuda import SUBNORMAL_UNIT
from .launch import numba_cuda
from .prepared import LANES, OCTET, UNIT_OCTETS
from .product_cuda import FLOAT_BYTES
from .ptx import (
    cluster_floats,
    divide,
    divider,
    four_floats,
    let_dependents_start,
    load_uint16,
    of_rank,
    prefetch,
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
    cluster_functions,
    factor_finder,
    several_stager,
    summer,
)
from .stream_cuda import (
    PLAN,
    WEIGHT,
    KernelSpec,
    clear_shared_bytes,
    known_run,
    parts_function,
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
    arrive, publish, wait = cluster_functions(spec)
    work_of, part_of = work_function(spec), parts_function(spec)
    start, (_, fill_ring) = starting_function(spec), ring_starters(spec)
    find_factors = factor_finder(spec)
    wait_for_table = earlier_copies_done(spec, spec.filled_first)
    stage, sum_groups = several_stager(spec), summer(spec)
    walk = ring_walker(spec, item_multiplier(spec))
    add_shares, write_rows = share_adder(spec), writing_function(spec)

    @cuda.jit(launch_bounds=(spec.threads, spec.resident))
    def kernel(weight, x, step, y, bias, count, plan):
        zeros = shared_address(cuda.shared.array(0, np.uint16))
        slab = int32(0)
        while slab < plan.slabs:
            arrive()
            work, first = work_of(weight, plan)
            part = part_of(weight, plan, work.rank, slab)
            start(weight, plan, work, part, first, slab, zeros)
            wait()
            if slab == 0:
                find_factors(weight, plan, x, step, count, work, zeros)
            stage(weight, plan, x, step, count, work, part, slab, zeros)
            wait_for_table()
            publish()
            fill_ring(weight, plan, work, part, first, zeros)
            wait()
            sum_groups(weight, plan, work, part, zeros)
            cuda.syncthreads()
            walk(weight, plan, work, part, first, zeros)
            slab = int32(slab + 1)
        cuda.syncthreads()
        work, _ = work_of(weight, plan)
        add_shares(plan, work, zeros)
        publish()
        wait()
        write_rows(weight, plan, work, zeros, y, bias, count)
        arrive()
        wait()

    return kernel


def starting_function(spec: KernelSpec) -> Any:
    """start(weight, plan, work, part, first, slab, zeros): what does not need x, and until x may be
    read. What is needed first is asked for first."""
    start_ring, _ = ring_starters(spec)
    threads, warps_but_one, early = spec.threads, spec.warps - 1, spec.early
    slot_bytes, fill_table = FLOAT_BYTES * LANES * spec.unit.totals, table_filler(spec)

    @cuda.jit(device=True, forceinline=True)
    def start(weight, plan, work, part, first, slab, zeros):
        if slab == 0:
            fill_table(weight, plan, work, zeros)
            prefetch_targets(weight, plan, work)
        start_ring(weight, plan, work, part, first, zeros)
        if slab == 0:
            slots = int32(zeros + FLOAT_BYTES * plan.slots)
            end = int32(slots + (work.tiles + warps_but_one) * slot_bytes)
            clear_shared_bytes(slots, end, work.thread, threads)
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
    slot_bytes = FLOAT_BYTES * LANES * spec.unit.totals
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
    return LANES * spec.unit.totals * FLOAT_BYTES // LOAD_BYTES


def share_adder(spec: KernelSpec) -> Any:
    """add_shares(plan, work, zeros): the sum of each tile's slots, where the rings were.

    A tile's items are those of some warps side by side; of others between them the slot is empty.
    """
    threads, warps = spec.threads, spec.warps
    slot_bytes = FLOAT_BYTES * LANES * spec.unit.totals
    loads, divide_by_loads = tile_loads(spec), divider(tile_loads(spec))

    @cuda.jit(device=True, forceinline=True)
    def warp_of(item, items):
        return divide(int32((item + 1) * warps - 1), items)

    @cuda.jit(device=True, forceinline=True)
    def add_shares(plan, work, zeros):
        slots, sums = int32(zeros + FLOAT_BYTES * plan.slots), int32(zeros + plan.ring)
        items, i = int32(work.tiles * work.places), work.thread
        while i < work.tiles * loads:
            tile = divide_by_loads(i)
            warp = warp_of(int32(tile * work.places), items)
            last = warp_of(int32((tile + 1) * work.places - 1), items)
            slot = int32(slots + (tile + warp) * slot_bytes + LOAD_BYTES * (i - tile * loads))
            a, b, c, d = four_floats(slot)
            while warp < last:
                warp, slot = int32(warp + 1), int32(slot + slot_bytes)
                e, f, g, h = four_floats(slot)
                a, b, c, d = a + e, b + f, c + g, d + h
            put_floats(int32(sums + LOAD_BYTES * i), (a, b, c, d))
            i = int32(i + threads)

    return add_shares


def writing_function(spec: KernelSpec) -> Any:
    """write_rows(...): what the cluster's blocks found for a share of its tiles, and the bias, to
    y."""
    threads, ranks, eights = spec.threads, spec.ranks, spec.unit.inputs // AT_ONCE
    loads, put, sum_ranks = tile_loads(spec), total_putter(spec), rank_summer(spec)
    divide_by_ranks, divide_by_loads, divide_by_eights = map(divider, (ranks, loads, eights))

    @cuda.jit(device=True, forceinline=True)
    def write_rows(weight, plan, work, zeros, y, bias, count):
        i, tiles = work.thread, divide_by_ranks(int32(work.tiles + ranks - 1 - work.rank))
        while i < tiles * loads:
            turn = divide_by_loads(i)
            tile, load = int32(turn * ranks + work.rank), int32(i - turn * loads)
            lane = divide_by_eights(load)
            row = int32((work.first_tile + tile) * TILE_ROWS + (lane >> 2))
            own = int32((load - lane * eights) * AT_ONCE + 2 * (lane & 3))
            if row < weight.rows and own < count:  # nobody waits for loads that nobody uses
                place = int32(zeros + plan.ring + LOAD_BYTES * (tile * loads + load))
                a, b, c, d = sum_ranks(place)
                put(weight, row, own, a, zeros, y, bias, count)
                put(weight, row, int32(own + 1), b, zeros, y, bias, count)
                put(weight, int32(row + 8), own, c, zeros, y, bias, count)
                put(weight, int32(row + 8), int32(own + 1), d, zeros, y, bias, count)
            i = int32(i + threads)

    return write_rows


def rank_summer(spec: KernelSpec) -> Any:
    """sum_ranks(place) -> all blocks' sums of four totals (unit_several_cuda.py)."""
    ranks = spec.ranks

    @cuda.jit(device=True, forceinline=True)
    def sum_ranks(place):
        if ranks == 1:
            return four_floats(place)
        a, b, c, d = cluster_floats(of_rank(place, int32(0)))
        for rank in range(1, ranks):
            e, f, g, h = cluster_floats(of_rank(place, int32(rank)))
            a, b, c, d = a + e, b + f, c + g, d + h
        return a, b, c, d

    return sum_ranks


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
