"""The kernel of the matrix product on a GPU with one input, over prepared.py's buffers.

matmul_cuda.py runs it; several_cuda.py has the kernel of more inputs. stream_cuda.py says how the
work is shared between blocks and warps, and brings it to them; unit_cuda.py and run_cuda.py
multiply; at the end the warps' shares of a row are added up. No warp waits for another in between.

    shared memory  dtype    shape
    zeros          fp16     [32]                                what multiplies nothing
    x'             fp16     [columns, padded to units]          staging_cuda.py
    factor         float32  [4]                                 the first: what staging returned
    X              float32  [groups]
    slots          float32  [tiles + warps - 1, 32, totals]     stream_cuda.py
    starts         int32    [tiles * segments + 1]              of run_starts (runs.py)
    ring           bytes    [warps, stages, unit]

With "programmatic dependent launch" a block starts while the kernel before it still runs: it
fetches some of the weight (KernelSpec.filled_first), and waits only before it reads x.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types

from .codes_cuda import SUBNORMAL_UNIT
from .feed import NORM
from .launch import numba_cuda
from .prepared import ALL_LANES, OCTET, UNIT_GROUPS, UNIT_OCTETS
from .ptx import (
    let_dependents_start,
    load_uint16,
    prefetch,
    shared_address,
    shared_float,
    store_uint16,
    to_shared_float,
    wait_for_dependencies,
)
from .ring_cuda import earlier_copies_done, ring_starters, ring_walker
from .run_cuda import run_multiplier
from .runs import SEGMENT_COLUMNS, TILE_ROWS
from .scalars import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from .staging_cuda import (
    ZERO_HALVES,
    first_targets_function,
    padding_function,
    staging_function,
)
from .stream_cuda import (
    PLAN,
    WEIGHT,
    KernelSpec,
    clear_shared_bytes,
    known_run,
    parts_function,
    slots_clearer,
    stretches_function,
    table_filler,
    work_function,
)
from .unit_cuda import (
    HALF_BYTES,
    LOAD_BYTES,
    UnitOfOne,
    add_to_shared,
    group_summer,
    unit_multiplier,
)

__all__ = ["FACTOR_FLOATS", "FLOAT_BYTES", "SIGNATURE", "product_kernel"]

cuda = numba_cuda()

FLOAT_BYTES = 4
FACTOR_FLOATS = 4
int32: Any = np.int32

SIGNATURE = (WEIGHT, *(types.int64,) * 2, types.float32, *(types.int64,) * 2, PLAN)


@cache
def product_kernel(spec: KernelSpec) -> Any:
    """kernel(weight, x, beside, eps, y, bias, plan): addresses of x and beside [columns], y [rows],
    all fp16 or bf16, and of bias [rows] or 0; beside and eps as the spec's feed has them (feed.py).
    """
    early, work_of, part_of = spec.early, work_function(spec), parts_function(spec)
    (start_ring, fill_ring), start = ring_starters(spec), starting_function(spec)
    first_targets, stage = first_targets_function(spec), staging_function(spec)
    put_sums, filled_then = sums_putter(spec), spec.stages - spec.filled_first
    wait_for_table = earlier_copies_done(spec, filled_then)
    walk, write_rows = ring_walker(spec, item_multiplier(spec)), writing_function(spec)

    @cuda.jit(launch_bounds=(spec.threads, spec.resident))
    def kernel(weight, x, beside, eps, y, bias, plan):
        zeros = shared_address(cuda.shared.array(0, np.uint16))
        work, first = work_of(weight, plan)
        part = part_of(weight, plan, work.rank, int32(0))
        start_ring(weight, plan, work, part, first, zeros)
        start(weight, plan, work, beside, zeros)
        targets = first_targets(weight, work.thread)
        if early:
            wait_for_dependencies()
            let_dependents_start()
        factor = stage(weight, x, beside, eps, work.thread, targets, zeros)
        fill_ring(weight, plan, work, part, first, zeros)
        put_sums(weight, plan, factor, work.thread, zeros)
        wait_for_table()
        cuda.syncthreads()
        walk(weight, plan, work, part, first, zeros)
        cuda.syncthreads()
        work, _ = work_of(weight, plan)
        write_rows(weight, plan, work, zeros, y, bias)

    return kernel


def starting_function(spec: KernelSpec) -> Any:
    """start(weight, plan, work, beside, zeros): what depends neither on x nor on the ring."""
    threads, norms, clear_slots = spec.threads, spec.feed == NORM, slots_clearer(spec)
    clear_padding, fill_table = padding_function(spec), table_filler(spec)

    @cuda.jit(device=True, forceinline=True)
    def start(weight, plan, work, beside, zeros):
        clear_slots(plan, work, zeros)
        clear_shared_bytes(zeros, int32(zeros + HALF_BYTES * ZERO_HALVES), work.thread, threads)
        clear_padding(weight, work.thread, zeros)
        fill_table(weight, plan, work, zeros)
        i, end = int32(128 * work.thread), int32(HALF_BYTES * weight.columns)
        while weight.target and i < end:
            prefetch(weight.target + i)
            if norms:  # its weight, that is; a gate is not there yet
                prefetch(beside + i)
            i = int32(i + 128 * threads)

    return start


# --- The inputs


def sums_putter(spec: KernelSpec) -> Any:
    """put_sums(weight, plan, factor, thread, zeros): X of one input, and its factor."""
    threads, group_bytes = spec.threads, HALF_BYTES * spec.unit.group_size
    sum_group = group_summer(spec.unit.group_size)

    @cuda.jit(device=True, forceinline=True)
    def put_sums(weight, plan, factor, thread, zeros):
        first = int32(zeros + HALF_BYTES * ZERO_HALVES)
        sums = int32(zeros + FLOAT_BYTES * plan.sums)
        group = thread
        while group < weight.units * UNIT_GROUPS:
            total = sum_group(int32(first + group * group_bytes))
            to_shared_float(int32(sums + FLOAT_BYTES * group), total)
            group = int32(group + threads)
        if thread == 0:
            to_shared_float(int32(sums - FLOAT_BYTES * FACTOR_FLOATS), factor)

    return put_sums


# --- Multiplying


def item_multiplier(spec: KernelSpec) -> Any:
    """multiply(...): what a warp does with an item that lies at `at`; the sums go to its slot."""
    slot_bytes = spec.slot_bytes
    lane_bytes, zero = FLOAT_BYTES * spec.unit.totals, (np.float32(0),) * spec.unit.totals
    multiply_unit, places_of = unit_multiplier(spec.unit, UnitOfOne), unit_places(spec)
    multiply_run = run_multiplier(spec.unit)

    @cuda.jit(device=True, forceinline=True)
    def multiply(weight, plan, work, part, item, at, zeros):
        slot = int32(zeros + FLOAT_BYTES * plan.slots + (item.tile + work.warp) * slot_bytes)
        if item.place < work.units:
            places = places_of(plan, item.place, at, work.lane, zeros)
            add_to_shared(int32(slot + work.lane * lane_bytes), multiply_unit(places, zero))
        else:
            segment = int32(item.place - work.units)
            start, loads = known_run(weight, plan, work, item, segment, zeros)
            if loads:
                run = weight.runs + np.int64(start) * LOAD_BYTES
                x = int32(zeros + HALF_BYTES * (ZERO_HALVES + segment * SEGMENT_COLUMNS))
                multiply_run(run, at, slot, x, work.lane, zeros)

    return multiply


def unit_places(spec: KernelSpec) -> Any:
    """places_of(plan, unit, at, lane, zeros) -> where UnitOfOne finds things."""
    own_bytes, step_bytes = HALF_BYTES * spec.unit.group_size, spec.unit.octet_bytes

    @cuda.jit(device=True, forceinline=True)
    def places_of(plan, unit, at, lane, zeros):
        g, t = int32(lane >> 2), int32(lane & 3)
        own = int32(zeros + HALF_BYTES * ZERO_HALVES + g * own_bytes)
        octet = int32(unit * UNIT_OCTETS)
        low, low_step = (own, int32(step_bytes)) if t == g else (zeros, int32(0))
        high, high_step = (own, int32(step_bytes)) if t + 4 == g else (zeros, int32(0))
        return (
            at,
            lane,
            int32(low + octet * low_step),
            low_step,
            int32(high + octet * high_step),
            high_step,
            int32(zeros + FLOAT_BYTES * (plan.sums + octet * OCTET + 2 * t)),
        )

    return places_of


# --- Writing


def writing_function(spec: KernelSpec) -> Any:
    """write_rows(...): the warps' shares of each row, and the bias, to y.

    The four lanes of the quad each have some of a row, and of every other warp: so eight threads
    share what is to be added up.
    """
    threads, bfloat = spec.threads, spec.kind == torch.bfloat16
    to_float = bfloat_to_float if bfloat else half_to_float
    from_float = float_to_bfloat if bfloat else float_to_half
    sum_shares = share_summer(spec)

    @cuda.jit(device=True, forceinline=True)
    def write_rows(weight, plan, work, zeros, y, bias):
        i, end = work.thread, int32(work.tiles * (8 * TILE_ROWS))
        while i < end:
            tile, in_tile, lane = int32(i >> 7), int32(i >> 3 & 15), int32(i & 7)
            row = int32((work.first_tile + tile) * TILE_ROWS + in_tile)
            total = sum_shares(plan, work, zeros, tile, in_tile, lane)
            if lane == 0 and row < weight.rows:
                total *= np.float32(1 / SUBNORMAL_UNIT)
                if bfloat:
                    total *= shared_float(int32(zeros + FLOAT_BYTES * (plan.sums - FACTOR_FLOATS)))
                if bias:
                    total += to_float(load_uint16(bias + HALF_BYTES * np.int64(row)))
                store_uint16(y + HALF_BYTES * np.int64(row), from_float(total))
            i = int32(i + threads)

    return write_rows


def share_summer(spec: KernelSpec) -> Any:
    """sum_shares(plan, work, zeros, tile, row, lane) -> all warps' shares of a row.

    Only the warps that have met the tile: another's slot may be that of another tile.
    """
    warps, lane_bytes = spec.warps, FLOAT_BYTES * spec.unit.totals
    slot_bytes, first_item_of = spec.slot_bytes, stretches_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def sum_shares(plan, work, zeros, tile, row, lane):
        items, first = int32(work.tiles * work.places), int32(tile * work.places)
        place = int32(((row & 7) * 4 + (lane & 3)) * lane_bytes + (row >> 3) * FLOAT_BYTES)
        warp, total = int32(lane >> 2), np.float32(0)
        slot = int32(zeros + FLOAT_BYTES * plan.slots + place + (tile + warp) * slot_bytes)
        for _ in range(warps // 2):
            begin = first_item_of(warp, items)
            end = first_item_of(int32(warp + 1), items)
            if begin < first + work.places and end > first:
                total += shared_float(slot)
            warp, slot = int32(warp + 2), int32(slot + 2 * slot_bytes)
        total += cuda.shfl_xor_sync(ALL_LANES, total, 1)
        total += cuda.shfl_xor_sync(ALL_LANES, total, 2)
        return total + cuda.shfl_xor_sync(ALL_LANES, total, 4)

    return sum_shares
