"""The kernel of the matrix product on a GPU, over prepared.py's buffers; matmul_cuda.py runs it.

One launch multiplies 1, up to 8, or up to 16 inputs. stream_cuda.py says how the work is shared
between blocks and warps, and brings it to them; unit_cuda.py and unit_several_cuda.py multiply; at
the end the warps' shares of a row are added up. No warp waits for another but where all need the
next slab of the inputs.

    shared memory  dtype    shape
    zeros          fp16     [32]                                what multiplies nothing
    x'             fp16     [buffers, inputs, stride]           staging_cuda.py; of a slab
    factor         float32  [4]                                 the first: what staging one returned
    X              float32  [buffers, inputs, sums_stride]
    slots          float32  [tiles + warps - 1, 32, totals]     stream_cuda.py
    ring           bytes    [warps, stages, unit]

One input is all one slab, staged by each block for itself. Several are staged once, by a kernel of
their own; while a slab is multiplied, the next is copied into the other buffer.

With "programmatic dependent launch" a block starts while the kernel before it still runs: it
fetches what it can of the weight, and waits only before it reads x.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types

from .codes_cuda import SUBNORMAL_UNIT
from .launch import numba_cuda
from .prepared import ALL_LANES, LANES, OCTET, UNIT_GROUPS, UNIT_OCTETS
from .ptx import (
    clear_shared,
    copier,
    copies_done,
    divide,
    end_of_copies,
    let_dependents_start,
    load_float,
    load_uint16,
    prefetch,
    shared_address,
    shared_float,
    store_uint16,
    to_shared_float,
    wait_for_dependencies,
)
from .run_cuda import run_multiplier
from .runs import SEGMENT_COLUMNS, TILE_ROWS
from .scalars import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from .staging_cuda import ZERO_HALVES, padding_function, staging_function
from .stream_cuda import (
    WEIGHT,
    KernelSpec,
    Plan,
    filler,
    first_item_of,
    following,
    run_of,
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
from .unit_several_cuda import AT_ONCE, UnitOfSeveral

__all__ = ["BLOCKS_PER_SM", "FACTOR_FLOATS", "FLOAT_BYTES", "SIGNATURE", "product_kernel"]

cuda = numba_cuda()

FLOAT_BYTES = 4
FACTOR_FLOATS = 4
SUMS_BYTES = FLOAT_BYTES * UNIT_GROUPS  # of a unit and an input
BLOCKS_PER_SM = {1: 2, 8: 1, 16: 1}  # inputs -> whose registers fit
int32: Any = np.int32

SIGNATURE = (
    WEIGHT,
    *(types.int64,) * 5,
    types.int32,
    types.NamedTuple([types.int32] * len(Plan._fields), Plan),
)


@cache
def product_kernel(spec: KernelSpec) -> Any:
    """kernel(weight, x, sums, factors, y, bias, count, plan): addresses of y [count, rows] and of
    bias [rows] or 0.

    For one input x is as it was given, and sums and factors are 0; else all are staging_cuda's.
    """
    early, alone = spec.early, spec.unit.inputs == 1
    work_of, start, stage = work_function(spec), starting_function(spec), stage_function(spec)
    walk, write_rows = walking_function(spec), writing_function(spec)

    @cuda.jit(launch_bounds=(spec.threads, BLOCKS_PER_SM[spec.unit.inputs]))
    def kernel(weight, x, sums, factors, y, bias, count, plan):
        zeros = shared_address(cuda.shared.array(0, np.uint16))
        work, first = work_of(weight, plan)
        ahead = start(weight, plan, work, first, zeros)
        if early:
            wait_for_dependencies()
            let_dependents_start()
        if alone:
            stage(weight, plan, x, work.thread, zeros)
        walk(weight, plan, x, sums, work, first, ahead, zeros)
        cuda.syncthreads()
        write_rows(weight, plan, work, zeros, factors, y, bias, count)

    return kernel


def starting_function(spec: KernelSpec) -> Any:
    """start(...) -> the first item that is not on its way: what does not depend on x."""
    threads, stages, warps_but_one = spec.threads, spec.stages, spec.warps - 1
    slot_bytes, alone = FLOAT_BYTES * LANES * spec.unit.totals, spec.unit.inputs == 1
    fill, ring_of, unit_bytes = filler(spec), ring_function(spec), spec.unit.bytes
    clear_padding, step = padding_function(spec), 8 * threads

    @cuda.jit(device=True, forceinline=True)
    def clear(begin, end, thread):
        at = int32(begin + 8 * thread)
        while at < end:
            clear_shared(at)
            at = int32(at + step)

    @cuda.jit(device=True, forceinline=True)
    def start(weight, plan, work, first, zeros):
        ring, ahead = ring_of(plan, work, zeros), first
        for i in range(stages):
            fill(weight, plan, work, ahead, int32(ring + i * unit_bytes))
            ahead = following(plan, ahead, first)
            end_of_copies()
        slots = int32(zeros + FLOAT_BYTES * plan.slots)
        clear(slots, int32(slots + (work.tiles + warps_but_one) * slot_bytes), work.thread)
        clear(zeros, int32(zeros + HALF_BYTES * ZERO_HALVES), work.thread)
        if alone:
            clear_padding(weight, work.thread, zeros)
            i, end = int32(128 * work.thread), int32(HALF_BYTES * weight.columns)
            while weight.target and i < end:
                prefetch(weight.target + i)
                i = int32(i + 128 * threads)
        return ahead

    return start


def ring_function(spec: KernelSpec) -> Any:
    """ring_of(plan, work, zeros) -> address of the warp's ring."""
    ring_bytes = spec.stages * spec.unit.bytes

    @cuda.jit(device=True, forceinline=True)
    def ring_of(plan, work, zeros):
        return int32(zeros + plan.ring + work.warp * ring_bytes)

    return ring_of


def walking_function(spec: KernelSpec) -> Any:
    """walk(...): the warp's items, one after the other, slab by slab."""
    stages, alone, unit_bytes = spec.stages, spec.unit.inputs == 1, spec.unit.bytes
    fill, ring_of, copy_slab = filler(spec), ring_function(spec), slab_copier(spec)
    wait_for_item, wait_for_all = copies_done(stages - 1), copies_done(0)
    multiply = item_multiplier(spec)

    @cuda.jit(device=True, forceinline=True)
    def walk(weight, plan, x, sums, work, first, ahead, zeros):
        ring, item, slot = ring_of(plan, work, zeros), first, int32(0)
        if not alone:
            copy_slab(weight, plan, x, sums, int32(0), work.thread, zeros)
        for slab in range(plan.slabs):
            if not alone:
                end_of_copies()
                wait_for_all()
                cuda.syncthreads()
                if slab + 1 < plan.slabs:
                    copy_slab(weight, plan, x, sums, int32(slab + 1), work.thread, zeros)
            for _ in range(work.stretch):
                wait_for_item()
                cuda.syncwarp()
                at = int32(ring + slot * unit_bytes)
                multiply(weight, plan, work, item, at, zeros)
                cuda.syncwarp()
                fill(weight, plan, work, ahead, at)
                end_of_copies()
                item, ahead = following(plan, item, first), following(plan, ahead, first)
                slot = int32(slot + 1 if slot + 1 < stages else 0)

    return walk


# --- The inputs


def stage_function(spec: KernelSpec) -> Any:
    """stage(...): x', X and the factor of one input."""
    threads, group_bytes = spec.threads, HALF_BYTES * spec.unit.group_size
    stage_input, sum_group = staging_function(spec), group_summer(spec.unit.group_size)

    @cuda.jit(device=True, forceinline=True)
    def stage(weight, plan, x, thread, zeros):
        factor = stage_input(weight, x, thread, zeros)
        first = int32(zeros + HALF_BYTES * ZERO_HALVES)
        sums = int32(zeros + FLOAT_BYTES * plan.sums)
        group = thread
        while group < weight.units * UNIT_GROUPS:
            total = sum_group(int32(first + group * group_bytes))
            to_shared_float(int32(sums + FLOAT_BYTES * group), total)
            group = int32(group + threads)
        if thread == 0:
            to_shared_float(int32(sums - FLOAT_BYTES * FACTOR_FLOATS), factor)
        cuda.syncthreads()

    return stage


def slab_copier(spec: KernelSpec) -> Any:
    """copy_slab(weight, plan, x, sums, slab, thread, zeros): x' and X of a slab on their way."""
    threads, inputs, copy_ahead = spec.threads, spec.unit.inputs, copier(0)
    segment_units, unit_bytes = spec.segment_units, HALF_BYTES * spec.unit.columns
    shift = 3 + inputs.bit_length() - 1  # eight loads of an input, then those of the next

    @cuda.jit(device=True, forceinline=True)
    def copy_rows(to, to_step, source, source_step, loads, thread):
        turn = divide(int32(cuda.blockIdx.x * loads), int32(cuda.gridDim.x))
        i = thread
        while i < loads:
            k = int32(i + turn)  # each block begins elsewhere: all want the same
            k = int32(k - loads if k >= loads else k)
            own, at = int32(k >> 3 & (inputs - 1)), int32(((k >> shift) * 8 + (k & 7)) * LOAD_BYTES)
            copy_ahead(int32(to + own * to_step + at), source + np.int64(own) * source_step + at)
            i = int32(i + threads)

    @cuda.jit(device=True, forceinline=True)
    def copy_slab(weight, plan, x, sums, slab, thread, zeros):
        slab_units = int32(plan.segments * segment_units)
        first, buffer = int32(slab * slab_units), int32((slab & 1) * inputs)
        units = int32(min(slab_units, weight.units - first))
        step = int32(HALF_BYTES * plan.stride)
        to = int32(zeros + HALF_BYTES * ZERO_HALVES + buffer * step)
        source, loads = x + np.int64(first) * unit_bytes, int32(unit_bytes // LOAD_BYTES * inputs)
        copy_rows(to, step, source, weight.units * unit_bytes, int32(units * loads), thread)
        step = int32(FLOAT_BYTES * plan.sums_stride)
        to = int32(zeros + FLOAT_BYTES * plan.sums + buffer * step)
        source, loads = (
            sums + np.int64(first) * SUMS_BYTES,
            int32(SUMS_BYTES // LOAD_BYTES * inputs),
        )
        copy_rows(to, step, source, weight.units * SUMS_BYTES, int32(units * loads), thread)

    return copy_slab


# --- Multiplying


def item_multiplier(spec: KernelSpec) -> Any:
    """multiply(...): what a warp does with an item that lies at `at`; the sums go to its slot."""
    segment_units, slot_bytes = spec.segment_units, FLOAT_BYTES * LANES * spec.unit.totals
    lane_bytes, zero = FLOAT_BYTES * spec.unit.totals, (np.float32(0),) * spec.unit.totals
    inputs = spec.unit.inputs
    multiply_unit = unit_multiplier(spec.unit, UnitOfOne if inputs == 1 else UnitOfSeveral)
    places_of = one_places(spec) if inputs == 1 else several_places(spec)
    multiply_run = run_multiplier(spec.unit)

    @cuda.jit(device=True, forceinline=True)
    def multiply(weight, plan, work, item, at, zeros):
        segment = int32(item.slab * plan.segments + item.segment)
        slot = int32(zeros + FLOAT_BYTES * plan.slots + (item.tile + work.warp) * slot_bytes)
        if item.place < segment_units:
            unit = int32(segment * segment_units + item.place)
            if unit < weight.units:
                places = places_of(plan, item, unit, at, work.lane, zeros)
                share = int32(slot + work.lane * lane_bytes)
                add_to_shared(share, multiply_unit(places, zero))
        elif segment < weight.segments:
            start, loads = run_of(weight, int32(work.first_tile + item.tile), segment)
            if loads:
                run = weight.runs + np.int64(start) * LOAD_BYTES
                x = int32((item.slab & 1) * inputs * plan.stride + item.segment * SEGMENT_COLUMNS)
                x = int32(zeros + HALF_BYTES * (ZERO_HALVES + x))
                step = int32(HALF_BYTES * plan.stride)
                multiply_run(run, at, slot, x, step, work.lane, zeros)

    return multiply


def one_places(spec: KernelSpec) -> Any:
    """places_of(plan, item, unit, at, lane, zeros) -> where UnitOfOne finds things."""
    own_bytes, step_bytes = HALF_BYTES * spec.unit.group_size, spec.unit.octet_bytes

    @cuda.jit(device=True, forceinline=True)
    def places_of(plan, item, unit, at, lane, zeros):
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


def several_places(spec: KernelSpec) -> Any:
    """places_of(plan, item, unit, at, lane, zeros) -> where UnitOfSeveral finds things."""
    inputs, columns, quarter = spec.unit.inputs, spec.unit.columns, spec.unit.group_size // 4
    segment_units = spec.segment_units

    @cuda.jit(device=True, forceinline=True)
    def places_of(plan, item, unit, at, lane, zeros):
        g, t, buffer = int32(lane >> 2), int32(lane & 3), int32(item.slab & 1)
        unit = int32(item.segment * segment_units + item.place)  # of the slab
        x = int32((buffer * inputs + g) * plan.stride + unit * columns + t * quarter)
        x_sums = int32(plan.sums + (buffer * inputs + g) * plan.sums_stride + unit * UNIT_GROUPS)
        return (
            at,
            lane,
            int32(zeros + HALF_BYTES * (ZERO_HALVES + x)),
            int32(HALF_BYTES * AT_ONCE * plan.stride),
            int32(zeros + FLOAT_BYTES * (x_sums + 2 * t)),
            int32(FLOAT_BYTES * AT_ONCE * plan.sums_stride),
        )

    return places_of


# --- Writing


def writing_function(spec: KernelSpec) -> Any:
    """write_rows(...): the warps' shares of each row, and the bias, to y.

    Some lanes share what is to be added up of a row: for one input the lanes of the quad, and for
    any number every other warp's each.
    """
    threads, inputs, bfloat = spec.threads, spec.unit.inputs, spec.kind == torch.bfloat16
    lanes_shift = 3 if inputs == 1 else 1
    own_shift = lanes_shift + 4
    tile_shift = own_shift + inputs.bit_length() - 1
    to_float = bfloat_to_float if bfloat else half_to_float
    from_float = float_to_bfloat if bfloat else float_to_half
    sum_shares = share_summer(spec)

    @cuda.jit(device=True, forceinline=True)
    def write_rows(weight, plan, work, zeros, factors, y, bias, count):
        i, end = work.thread, int32(work.tiles << tile_shift)
        while i < end:
            own, tile = int32(i >> own_shift & (inputs - 1)), int32(i >> tile_shift)
            in_tile, lane = int32(i >> lanes_shift & 15), int32(i & ((1 << lanes_shift) - 1))
            row = int32((work.first_tile + tile) * TILE_ROWS + in_tile)
            total = sum_shares(plan, work.tiles, zeros, tile, in_tile, own, lane)
            if lane == 0 and row < weight.rows and own < count:
                total *= np.float32(1 / SUBNORMAL_UNIT)
                if bfloat and inputs == 1:
                    total *= shared_float(int32(zeros + FLOAT_BYTES * (plan.sums - FACTOR_FLOATS)))
                elif bfloat:
                    total *= load_float(factors + FLOAT_BYTES * own)
                if bias:
                    total += to_float(load_uint16(bias + HALF_BYTES * row))
                place = y + HALF_BYTES * (np.int64(own) * weight.rows + row)
                store_uint16(place, from_float(total))
            i = int32(i + threads)

    return write_rows


def share_summer(spec: KernelSpec) -> Any:
    """sum_shares(plan, tiles, zeros, tile, row, own, lane) -> all warps' shares of a row.

    Only the warps that have met the tile: another's slot may be that of another tile.
    """
    warps, inputs, shift = spec.warps, spec.unit.inputs, spec.warp_shift
    lane_bytes, slot_bytes = FLOAT_BYTES * spec.unit.totals, FLOAT_BYTES * LANES * spec.unit.totals

    @cuda.jit(device=True, forceinline=True)
    def place_in_slot(row, own, lane):
        if inputs == 1:
            return int32(((row & 7) * 4 + (lane & 3)) * lane_bytes + (row >> 3) * FLOAT_BYTES)
        place = int32(((row & 7) * 4 + ((own & 7) >> 1)) * lane_bytes)
        return int32(place + FLOAT_BYTES * ((own >> 3) * 4 + (row >> 3) * 2 + (own & 1)))

    @cuda.jit(device=True, forceinline=True)
    def sum_shares(plan, tiles, zeros, tile, row, own, lane):
        of_tile, total = int32(plan.segments * plan.items), np.float32(0)
        items, first = int32(tiles * of_tile), int32(tile * of_tile)
        slot = int32(zeros + FLOAT_BYTES * plan.slots + place_in_slot(row, own, lane))
        warp = int32(lane >> 2) if inputs == 1 else lane
        slot = int32(slot + (tile + warp) * slot_bytes)
        for _ in range(warps // 2):
            begin = first_item_of(warp, shift, items)
            end = first_item_of(int32(warp + 1), shift, items)
            if begin < first + of_tile and end > first:
                total += shared_float(slot)
            warp, slot = int32(warp + 2), int32(slot + 2 * slot_bytes)
        if inputs == 1:
            total += cuda.shfl_xor_sync(ALL_LANES, total, 1)
            total += cuda.shfl_xor_sync(ALL_LANES, total, 2)
            return total + cuda.shfl_xor_sync(ALL_LANES, total, 4)
        return total + cuda.shfl_xor_sync(ALL_LANES, total, 1)

    return sum_shares
