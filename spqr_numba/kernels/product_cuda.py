"""The kernel of the matrix product on a GPU, over prepared.py's buffers; matmul_cuda.py runs it.

One launch multiplies 1, up to 8, or up to 16 inputs. stream_cuda.py says how the work is shared
between blocks and warps, and brings it to them; unit_cuda.py and unit_several_cuda.py multiply; at
the end the warps' shares of a row are added up. No warp waits for another but where all need the
next slab of the inputs.

    shared memory  dtype    shape
    zeros          fp16     [16]                                what multiplies nothing
    x'             fp16     [buffers, inputs, stride]           staging_cuda.py; of a slab
    factor         float32  [4]                                 the first: what staging one returned
    X              float32  [buffers, groups of a slab, inputs]
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
from .prepared import LANES, OCTET, UNIT_GROUPS, UNIT_OCTETS
from .ptx import (
    copier,
    copies_done,
    end_of_copies,
    let_dependents_start,
    load_float,
    load_int32,
    load_uint16,
    prefetch,
    shared_address,
    store_uint16,
    wait_for_dependencies,
)
from .runs import HALF_MASK, HEADER_WORDS, SEGMENT_COLUMNS, TILE_ROWS
from .scalars import bfloat_to_float, float_to_bfloat, float_to_half, half_to_float
from .staging_cuda import WEIGHT, ZERO_HALVES, staging_function
from .stream_cuda import KernelSpec, Plan, filler, first_item_of, following, run_of, work_function
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
BLOCKS_PER_SM = {1: 2, 8: 1, 16: 1}  # inputs -> whose registers fit
STREAMS = 8  # lanes that take a row's outliers between them, for one input
ALL = 0xFFFFFFFF  # lanes
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
        staged = cuda.shared.array(0, np.uint16)
        floats = cuda.shared.array(0, np.float32)
        words = cuda.shared.array(0, np.int32)
        zeros = shared_address(staged)
        work, first = work_of(weight, plan)
        ahead = start(weight, plan, work, first, zeros, floats)
        if early:
            wait_for_dependencies()
            let_dependents_start()
        if alone:
            stage(weight, plan, x, work.thread, staged, floats, zeros)
        walk(weight, plan, x, sums, work, first, ahead, zeros, staged, floats, words)
        cuda.syncthreads()
        write_rows(weight, plan, work, floats, factors, y, bias, count)

    return kernel


def starting_function(spec: KernelSpec) -> Any:
    """start(...) -> the first item that is not on its way: what does not depend on x."""
    threads, stages, warps_but_one = spec.threads, spec.stages, spec.warps - 1
    slot_floats, alone, unit_bytes = (
        LANES * spec.unit.totals,
        spec.unit.inputs == 1,
        spec.unit.bytes,
    )
    fill, ring_of = filler(spec), ring_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def start(weight, plan, work, first, zeros, floats):
        ring, ahead = ring_of(plan, work, zeros), first
        for i in range(stages):
            fill(weight, plan, work, ahead, int32(ring + i * unit_bytes))
            ahead = following(plan, ahead, first)
            end_of_copies()
        for i in range(work.thread, int32((work.tiles + warps_but_one) * slot_floats), threads):
            floats[plan.slots + i] = 0
        if alone and weight.target:
            for i in range(work.thread, weight.columns >> 6, threads):
                prefetch(weight.target + 128 * i)
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
    def walk(weight, plan, x, sums, work, first, ahead, zeros, staged, floats, words):
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
                multiply(weight, plan, work, item, at, zeros, staged, floats, words)
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
    def stage(weight, plan, x, thread, staged, floats, zeros):
        factor = stage_input(weight, x, thread, staged)
        first = int32(zeros + HALF_BYTES * ZERO_HALVES)
        for group in range(thread, int32(weight.units * UNIT_GROUPS), threads):
            floats[plan.sums + group] = sum_group(int32(first + group * group_bytes))
        if thread == 0:
            floats[plan.sums - FACTOR_FLOATS] = factor
        cuda.syncthreads()

    return stage


def slab_copier(spec: KernelSpec) -> Any:
    """copy_slab(weight, plan, x, sums, slab, thread, zeros): x' and X of a slab on their way."""
    threads, inputs, copy_ahead = spec.threads, spec.unit.inputs, copier(0)
    segment_units, unit_bytes = spec.segment_units, HALF_BYTES * spec.unit.columns
    sums_bytes = FLOAT_BYTES * UNIT_GROUPS * inputs  # of a unit
    shift = 3 + inputs.bit_length() - 1  # eight loads of an input, then those of the next

    @cuda.jit(device=True, forceinline=True)
    def copy_slab(weight, plan, x, sums, slab, thread, zeros):
        slab_units = int32(plan.segments * segment_units)
        first = int32(slab * slab_units)
        units = int32(min(slab_units, weight.units - first))
        loads, buffer = int32(units * (unit_bytes // LOAD_BYTES)), int32(slab & 1)
        to = int32(zeros + HALF_BYTES * (ZERO_HALVES + buffer * (inputs * plan.stride)))
        source = x + np.int64(first) * unit_bytes
        for i in range(thread, int32(inputs * loads), threads):
            own, at = int32(i >> 3 & (inputs - 1)), int32(((i >> shift) * 8 + (i & 7)) * LOAD_BYTES)
            there = source + np.int64(own) * (weight.units * unit_bytes) + at
            copy_ahead(int32(to + own * (HALF_BYTES * plan.stride) + at), there)
        to = int32(zeros + FLOAT_BYTES * plan.sums + buffer * (slab_units * sums_bytes))
        source = sums + np.int64(first) * sums_bytes
        for at in range(LOAD_BYTES * thread, int32(units * sums_bytes), LOAD_BYTES * threads):
            copy_ahead(int32(to + at), source + at)

    return copy_slab


# --- Multiplying


def item_multiplier(spec: KernelSpec) -> Any:
    """multiply(...): what a warp does with an item that lies at `at`; the sums go to its slot."""
    segment_units, slot_floats = spec.segment_units, LANES * spec.unit.totals
    lane_floats, zero = spec.unit.totals, (np.float32(0),) * spec.unit.totals
    multiply_unit = unit_multiplier(
        spec.unit, UnitOfOne if spec.unit.inputs == 1 else UnitOfSeveral
    )
    places_of = one_places(spec) if spec.unit.inputs == 1 else several_places(spec)
    multiply_run = run_multiplier(spec)

    @cuda.jit(device=True, forceinline=True)
    def multiply(weight, plan, work, item, at, zeros, staged, floats, words):
        segment = int32(item.slab * plan.segments + item.segment)
        slot = int32(plan.slots + (item.tile + work.warp) * slot_floats)
        if item.place < segment_units:
            unit = int32(segment * segment_units + item.place)
            if unit < weight.units:
                places = places_of(plan, item, unit, at, work.lane, zeros)
                share = int32(zeros + FLOAT_BYTES * (slot + work.lane * lane_floats))
                add_to_shared(share, multiply_unit(places, zero))
        elif segment < weight.segments:
            tile = int32(work.first_tile + item.tile)
            start, loads = run_of(weight, tile, segment)
            if loads:
                run = weight.runs + np.int64(start) * LOAD_BYTES
                multiply_run(plan, item, run, at, slot, work.lane, zeros, staged, floats, words)

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
    segment_units, unit_sums = spec.segment_units, UNIT_GROUPS * spec.unit.inputs

    @cuda.jit(device=True, forceinline=True)
    def places_of(plan, item, unit, at, lane, zeros):
        g, t, buffer = int32(lane >> 2), int32(lane & 3), int32(item.slab & 1)
        unit = int32(item.segment * segment_units + item.place)  # of the slab
        x = int32((buffer * inputs + g) * plan.stride + unit * columns + t * quarter)
        x_sums = int32(plan.sums + buffer * (plan.segments * segment_units) * unit_sums)
        return (
            at,
            lane,
            int32(zeros + HALF_BYTES * (ZERO_HALVES + x)),
            int32(HALF_BYTES * AT_ONCE * plan.stride),
            int32(zeros + FLOAT_BYTES * (x_sums + unit * unit_sums + 2 * t)),
        )

    return places_of


def run_multiplier(spec: KernelSpec) -> Any:
    """multiply_run(...): a tile's outliers in a segment, times x', to the slot.

    A lane takes one row and one input at a time; for one input, eight lanes take a row together.
    """
    inputs, lane_floats = spec.unit.inputs, spec.unit.totals
    streams = STREAMS if inputs == 1 else 1
    rows_at_once, shift = LANES // (inputs * streams), streams.bit_length() - 1
    own_shift = (streams * inputs).bit_length() - 1
    room = spec.unit.bytes // 4 - HEADER_WORDS

    @cuda.jit(device=True, forceinline=True)
    def product(run, entries, k, end, x, staged, words):
        if k >= end:
            return np.float32(0)
        entry = words[entries + k] if k < room else load_int32(run + 4 * (HEADER_WORDS + k))
        value = half_to_float(np.uint16(entry >> 16 & HALF_MASK))
        return value * half_to_float(staged[x + (entry & HALF_MASK)])

    @cuda.jit(device=True, forceinline=True)
    def row_sum(run, entries, begin, end, x, staged, words):
        first, second = np.float32(0), np.float32(0)
        third, fourth = np.float32(0), np.float32(0)  # four at once, to wait for all together
        for k in range(begin, end, 4 * streams):
            first += product(run, entries, k, end, x, staged, words)
            second += product(run, entries, int32(k + streams), end, x, staged, words)
            third += product(run, entries, int32(k + 2 * streams), end, x, staged, words)
            fourth += product(run, entries, int32(k + 3 * streams), end, x, staged, words)
        return (first + second) + (third + fourth)

    @cuda.jit(device=True, forceinline=True)
    def place_of(row, own):
        if inputs == 1:
            return int32((row & 7) * (4 * lane_floats) + (row >> 3))
        lane = int32((row & 7) * 4 + ((own & 7) >> 1))
        return int32(lane * lane_floats + (own >> 3) * 4 + (row >> 3) * 2 + (own & 1))

    @cuda.jit(device=True, forceinline=True)
    def multiply_run(plan, item, run, at, slot, lane, zeros, staged, floats, words):
        stream, own = int32(lane & (streams - 1)), int32(lane >> shift & (inputs - 1))
        x = int32(((item.slab & 1) * inputs + own) * plan.stride + item.segment * SEGMENT_COLUMNS)
        x, header = int32(x + ZERO_HALVES), int32((at - zeros) >> 1)
        entries = int32((header >> 1) + HEADER_WORDS)
        for i in range(0, TILE_ROWS, rows_at_once):
            row = int32(i + (lane >> own_shift))
            end = int32(staged[header + row])
            begin = int32(stream + (int32(staged[header + row - 1]) if row else int32(0)))
            total = row_sum(run, entries, begin, end, x, staged, words)
            if streams > 1:
                for distance in (4, 2, 1):
                    total += cuda.shfl_xor_sync(ALL, total, distance)
            if stream == 0:
                floats[slot + place_of(row, own)] += total * np.float32(SUBNORMAL_UNIT)

    return multiply_run


# --- Writing


def writing_function(spec: KernelSpec) -> Any:
    """write_rows(...): the warps' shares of each row, and the bias, to y."""
    warps, threads, inputs = spec.warps, spec.threads, spec.unit.inputs
    lane_floats, slot_floats = spec.unit.totals, LANES * spec.unit.totals
    shift, tile_shift = spec.warp_shift, (TILE_ROWS * inputs).bit_length() - 1
    bfloat = spec.kind == torch.bfloat16
    to_float = bfloat_to_float if bfloat else half_to_float
    from_float = float_to_bfloat if bfloat else float_to_half

    @cuda.jit(device=True, forceinline=True)
    def share(floats, slot, row, own):
        at = int32(slot + (row & 7) * (4 * lane_floats) + (row >> 3))
        if inputs == 1:  # of each lane of the quad
            low, high = floats[at] + floats[at + 2], floats[at + 4] + floats[at + 6]
            return low + high
        at = int32(slot + ((row & 7) * 4 + ((own & 7) >> 1)) * lane_floats)
        return floats[at + (own >> 3) * 4 + (row >> 3) * 2 + (own & 1)]

    @cuda.jit(device=True, forceinline=True)
    def row_total(plan, tiles, floats, tile, row, own):
        of_tile = int32(plan.segments * plan.items)
        items, total = int32(tiles * of_tile), np.float32(0)
        for warp in range(warps):
            begin = first_item_of(int32(warp), shift, items)
            end = first_item_of(int32(warp + 1), shift, items)
            if begin < (tile + 1) * of_tile and end > tile * of_tile:
                total += share(floats, int32(plan.slots + (tile + warp) * slot_floats), row, own)
        return total

    @cuda.jit(device=True, forceinline=True)
    def factor_of(plan, floats, factors, own):
        if inputs == 1:
            return floats[plan.sums - FACTOR_FLOATS]
        return load_float(factors + 4 * own)

    @cuda.jit(device=True, forceinline=True)
    def write_rows(weight, plan, work, floats, factors, y, bias, count):
        for i in range(work.thread, int32(work.tiles * (TILE_ROWS * inputs)), threads):
            own, tile = int32(i >> 4 & (inputs - 1)), int32(i >> tile_shift)
            row = int32((work.first_tile + tile) * TILE_ROWS + (i & 15))
            if row < weight.rows and own < count:
                total = row_total(plan, work.tiles, floats, tile, int32(i & 15), own)
                total *= np.float32(1 / SUBNORMAL_UNIT)
                if bfloat:
                    total *= factor_of(plan, floats, factors, own)
                if bias:
                    total += to_float(load_uint16(bias + 2 * row))
                place = y + 2 * (np.int64(own) * weight.rows + row)
                store_uint16(place, from_float(total))

    return write_rows
