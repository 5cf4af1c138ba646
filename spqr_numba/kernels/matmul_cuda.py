"""The matrix product on a GPU, for one input: matmul.py's CUDA twin, over prepared.py's buffers.

A block of threads owns a run of tiles (16 rows each). It stages x once: permuted, as fp16, beside
the sums X over the groups of columns. Its warps share the units of its tiles (one tile's rows, 32
groups; unit_cuda.py multiplies one) between them, and each warp streams its own through a ring in
shared memory, copied ahead of use. No warp waits for another before the end, when the warps' shares
of a row and its outliers are added up.

    shared memory     dtype    shape
    zeros             fp16     [16]                           what lanes read that multiply nothing
    x'                fp16     [units * columns a unit]       of bf16: over a power of two
    X                 float32  [units * 32]                   in units of 2^-24
    shares            float32  [tiles of the block, warps, 16]
    sparse            float32  [tiles of the block, 16]
    offsets           int32    [tiles of the block * 16 + 1]  where its rows' outliers begin
    outliers          uint16   [warps, 2, room]               columns and values of the warp's rows
    ring              bytes    [warps, stages, unit]

With "programmatic dependent launch" a block starts while the kernel before it still runs: it
fetches what it can of the weight, and waits only before it reads x.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numba import types

from ..format.layout import ceil_div
from .launch import Launcher, numba_cuda, shared_memory
from .prepared import (
    COPIED_TOGETHER,
    LANES,
    OCTET,
    TILE_ROWS,
    UNIT_GROUPS,
    UNIT_OCTETS,
    PreparedMatrix,
)
from .ptx import (
    copier,
    copies_done,
    end_of_copies,
    let_dependents_start,
    load_int32,
    load_uint16,
    load_words,
    prefetch,
    shared_address,
    store_uint16,
    wait_for_dependencies,
)
from .scalars import (
    bfloat_to_float,
    float_to_bfloat,
    float_to_half,
    half_to_float,
    power_of_two,
)
from .unit_cuda import HALF_BYTES, SUBNORMAL_UNIT, UnitSpec, group_summer, unit_multiplier

__all__ = ["can_multiply", "multiply_one", "product_kernel"]

cuda = numba_cuda()  # only those who have tensors on a GPU import this module

ZERO_HALVES = 16
WARPS = 8  # of a block
BLOCKS_PER_SM = 2  # whose registers fit
STAGES = 2  # of a warp's ring, where they fit
ALIGNMENT = 128
LOAD_BYTES = 16
EARLY_FROM = 9  # the compute capability that has programmatic dependent launch
ALL = 0xFFFFFFFF  # lanes
EXPONENT_BIAS = 127
LARGEST_EXPONENT = 14  # of the staged x of a bf16 input
MOST_EXPONENT = 100
int32: Any = np.int32


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel is compiled for."""

    unit: UnitSpec
    kind: torch.dtype
    stages: int
    early: bool
    warps: int = WARPS

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps * LANES


class Weight(NamedTuple):
    """Addresses of a prepared weight's buffers, 0 for one that is not there, and its sizes."""

    records: int
    second_level: int
    outlier_row_offsets: int
    outlier_columns: int
    outlier_values: int
    target: int
    rows: int
    columns: int
    tiles: int
    units: int
    stats_shift: int  # log2 of the tiles of a stats group


BUFFERS = Weight._fields[:6]


class Plan(NamedTuple):
    """How a launch divides the work."""

    tiles: int  # of a block, at most
    room: int  # for outliers of a warp's rows; those with more read them from global memory


class Places(NamedTuple):
    """Where things are in shared memory, for one warp.

    In bytes, as PTX counts them: zeros, own (x' of group g), ring. As an index: sums, shares,
    sparse and offsets of float32 or int32, outliers of uint16.
    """

    zeros: int
    own: int
    ring: int
    sums: int
    shares: int
    sparse: int
    offsets: int
    outliers: int


class Work(NamedTuple):
    """What a block and a warp of it have to do.

    first_tile, tiles: of the block; first_row: of its first tile; begin, end: the warp's rows,
    counted from there; thread, lane, warp: who asks.
    """

    first_tile: int
    tiles: int
    first_row: int
    begin: int
    end: int
    thread: int
    lane: int
    warp: int


SIGNATURE = (
    types.NamedTuple([types.int64] * 6 + [types.int32] * 5, Weight),
    *(types.int64,) * 3,
    types.NamedTuple([types.int32] * 2, Plan),
)
ARGUMENT_TYPES = (
    *(ctypes.c_int64,) * 6,
    *(ctypes.c_int32,) * 5,
    *(ctypes.c_int64,) * 3,
    *(ctypes.c_int32,) * 2,
)


@cache
def product_kernel(spec: KernelSpec) -> Any:
    """kernel(weight, x, y, bias, plan): addresses of x [columns], y [rows] and bias [rows] or 0."""
    early, threads = spec.early, spec.threads
    work_of, places_of = work_function(spec), places_function(spec)
    copy_first, stage = copying_function(spec), staging_function(spec)
    add_outliers, add_units = outliers_function(spec), units_function(spec)
    write_rows = writing_function(spec)

    @cuda.jit(launch_bounds=(threads, BLOCKS_PER_SM))
    def kernel(weight, x, y, bias, plan):
        staged = cuda.shared.array(0, np.uint16)
        floats = cuda.shared.array(0, np.float32)
        integers = cuda.shared.array(0, np.int32)
        work = work_of(weight)
        places = places_of(weight, plan, work, shared_address(staged))
        copied = copy_first(weight, plan, work, places, integers)
        for i in range(work.thread, int32(work.tiles * warps_rows), threads):
            floats[places.shares + i] = 0
        if early:
            wait_for_dependencies()
            let_dependents_start()
        factor = stage(weight, x, work, places, staged, floats)
        add_outliers(weight, plan, work, places, copied, staged, floats, integers)
        add_units(weight, work, places, floats)
        cuda.syncthreads()
        write_rows(weight, work, places, floats, factor, y, bias)

    warps_rows = spec.warps * TILE_ROWS
    return kernel


def work_function(spec: KernelSpec) -> Any:
    """work_of(weight) -> Work of this thread."""
    warps = spec.warps

    @cuda.jit(device=True, inline="always")
    def work_of(weight):
        thread, block, grid = int32(cuda.threadIdx.x), cuda.blockIdx.x, cuda.gridDim.x
        first_tile = int32(block * weight.tiles // grid)
        tiles = int32((block + 1) * weight.tiles // grid - first_tile)
        warp, warp_rows = int32(thread >> 5), int32(tiles * (TILE_ROWS // warps))
        begin = int32(warp * warp_rows)
        return Work(
            first_tile,
            tiles,
            int32(first_tile * TILE_ROWS),
            begin,
            int32(begin + warp_rows),
            thread,
            int32(thread & 31),
            warp,
        )

    return work_of


def places_function(spec: KernelSpec) -> Any:
    """places_of(weight, plan, work, zeros) -> Places; `shared_bytes` adds the same things up."""
    warps, unit_columns, group_size = spec.warps, spec.unit.columns, spec.unit.group_size
    ring_bytes = spec.stages * spec.unit.bytes

    @cuda.jit(device=True, inline="always")
    def places_of(weight, plan, work, zeros):
        sums = int32((ZERO_HALVES + weight.units * unit_columns) // 2)
        shares = int32(sums + weight.units * UNIT_GROUPS)
        sparse = int32(shares + plan.tiles * warps * TILE_ROWS)
        offsets = int32(sparse + plan.tiles * TILE_ROWS)
        outliers = int32((offsets + plan.tiles * TILE_ROWS) // 4 * 8 + 8)
        ring = int32((2 * outliers + 4 * warps * plan.room + ALIGNMENT - 1) & -ALIGNMENT)
        own = int32(zeros + HALF_BYTES * (ZERO_HALVES + (work.lane >> 2) * group_size))
        return Places(
            zeros,
            own,
            int32(zeros + ring + work.warp * ring_bytes),
            sums,
            shares,
            sparse,
            offsets,
            int32(outliers + 2 * work.warp * plan.room),
        )

    return places_of


# --- What does not depend on x


def copying_function(spec: KernelSpec) -> Any:
    """copy_first(...) -> whether the outliers of the warp's rows are on their way.

    Groups of copies, the oldest first: a unit, the outliers, more units.
    """
    stages, threads = spec.stages, spec.threads
    fill, following, unit_bytes = unit_filler(spec.unit), following_function(spec), spec.unit.bytes
    copy_outliers = outlier_copier(spec)

    @cuda.jit(device=True, inline="always")
    def copy_first(weight, plan, work, places, integers):
        tile, unit = int32(work.warp // weight.units), int32(work.warp % weight.units)
        copied = False
        for i in range(stages):
            if tile < work.tiles:
                to = int32(places.ring + i * unit_bytes)
                fill(weight, int32(work.first_tile + tile), unit, to, work.lane)
                tile, unit = following(tile, unit, weight.units)
            end_of_copies()
            if i == 0:
                if weight.outlier_values:
                    copied = copy_outliers(weight, plan, work, places, integers)
                end_of_copies()
        if weight.target:
            for i in range(work.thread, weight.columns // 64, threads):
                prefetch(weight.target + 128 * i)
        return copied

    return copy_first


def following_function(spec: KernelSpec) -> Any:
    """following(tile, unit, units) -> the tile and the unit that a warp takes next."""
    warps = spec.warps

    @cuda.jit(device=True, inline="always")
    def following(tile, unit, units):
        unit = int32(unit + warps)
        while unit >= units:
            unit = int32(unit - units)
            tile = int32(tile + 1)
        return tile, unit

    return following


def unit_filler(spec: UnitSpec) -> Any:
    """fill(weight, tile, unit, to, lane): one unit on its way to shared memory."""
    record_bytes, second_bytes = spec.record_bytes, spec.second_bytes
    warp_bytes, rest = LANES * LOAD_BYTES, record_bytes % (LANES * LOAD_BYTES)
    copy_record = copier(*range(0, record_bytes - rest, warp_bytes))
    copy_rest, copy_second = copier(record_bytes - rest), copier(record_bytes)

    @cuda.jit(device=True, inline="always")
    def fill(weight, tile, unit, to, lane):
        own = int32(LOAD_BYTES * lane)
        to = int32(to + own)
        source = weight.records + np.int64(tile * weight.units + unit) * record_bytes + own
        copy_record(to, source)
        if own < rest:
            copy_rest(to, source)
        if own < second_bytes:
            stats = (tile >> weight.stats_shift) * weight.units + unit
            source = weight.second_level + np.int64(stats) * second_bytes + own - record_bytes
            copy_second(to, source)

    return fill


def outlier_copier(spec: KernelSpec) -> Any:
    """copy_outliers(...) -> whether there is room for those of the warp's rows, which then are on
    their way; where each row's begin goes to `integers`."""
    threads, copy_ahead = spec.threads, copier(0)

    @cuda.jit(device=True, inline="always")
    def copy_outliers(weight, plan, work, places, integers):
        for i in range(work.thread, int32(work.tiles * TILE_ROWS + 1), threads):
            integers[places.offsets + i] = offset_of(weight, work.first_row + i)
        start = offset_of(weight, work.first_row + work.begin) & -COPIED_TOGETHER
        end = offset_of(weight, work.first_row + work.end)
        if end - start + COPIED_TOGETHER > plan.room:
            return False
        to = int32(places.zeros + HALF_BYTES * places.outliers)
        for at in range(int32(start + work.lane * COPIED_TOGETHER), end, LANES * COPIED_TOGETHER):
            there = int32(to + HALF_BYTES * (at - start))
            copy_ahead(there, weight.outlier_columns + HALF_BYTES * at)
            copy_ahead(int32(there + HALF_BYTES * plan.room), weight.outlier_values + 2 * at)
        return True

    return copy_outliers


@cuda.jit(device=True, inline="always")
def offset_of(weight, row):
    """Where the outliers of a row begin."""
    return load_int32(weight.outlier_row_offsets + 4 * min(row, weight.rows))


# --- Staging x


def staging_function(spec: KernelSpec) -> Any:
    """stage(weight, x, work, places, staged, floats) -> what to multiply results with.

    x' and X, for all threads of the block when it returns.
    """
    threads, unit_columns = spec.threads, spec.unit.columns
    group_bytes = HALF_BYTES * spec.unit.group_size
    sum_group, scale_of = group_summer(spec.unit.group_size), scale_function(spec)
    permute = permuting_function(spec)

    @cuda.jit(device=True, inline="always")
    def stage(weight, x, work, places, staged, floats):
        for i in range(work.thread, ZERO_HALVES, threads):
            staged[i] = 0
        last = int32(weight.units * unit_columns)
        for i in range(int32(weight.columns + work.thread), last, threads):
            staged[ZERO_HALVES + i] = 0
        exponent = scale_of(weight, x, work.thread)
        permute(weight, x, power_of_two(int32(-exponent)), staged, work.thread)
        cuda.syncthreads()
        first = places.zeros + HALF_BYTES * ZERO_HALVES
        for group in range(work.thread, int32(weight.units * UNIT_GROUPS), threads):
            floats[places.sums + group] = sum_group(int32(first + group * group_bytes))
        cuda.syncthreads()
        return power_of_two(exponent)

    return stage


def scale_function(spec: KernelSpec) -> Any:
    """exponent_of(weight, x, thread) -> the power of two by which x is divided to fit into fp16."""
    threads, warps = spec.threads, spec.warps

    @cuda.jit(device=True, inline="always")
    def nothing(weight, x, thread):
        return int32(0)

    @cuda.jit(device=True, inline="always")
    def exponent_of(weight, x, thread):
        largest = cuda.shared.array(warps, np.int32)
        found = int32(1)
        for i in range(thread, weight.columns // 8, threads):
            words = load_words(x + 16 * i)
            for k in range(4):
                low, high = int32(words[k] >> 7 & 0xFF), int32(words[k] >> 23 & 0xFF)
                found = int32(max(found, low, high))
        for i in range(weight.columns // 8 * 8 + thread, weight.columns, threads):
            found = int32(max(found, int32(load_uint16(x + 2 * i) >> 7 & 0xFF)))
        for distance in (16, 8, 4, 2, 1):
            found = int32(max(found, int32(cuda.shfl_xor_sync(ALL, found, distance))))
        if thread % LANES == 0:
            largest[thread // LANES] = found
        cuda.syncthreads()
        for other in range(warps):
            found = int32(max(found, largest[other]))
        exponent = found - EXPONENT_BIAS - LARGEST_EXPONENT
        return int32(min(max(exponent, -MOST_EXPONENT), MOST_EXPONENT))

    return exponent_of if spec.kind == torch.bfloat16 else nothing


def permuting_function(spec: KernelSpec) -> Any:
    """permute(weight, x, factor, staged, thread): x * factor as fp16, where `target` says."""
    threads, bfloat = spec.threads, spec.kind == torch.bfloat16

    @cuda.jit(device=True, inline="always")
    def put(staged, target, half, factor):
        value = np.uint16(half & 0xFFFF)
        if bfloat:
            value = float_to_half(bfloat_to_float(value) * factor)
        staged[ZERO_HALVES + (target & 0xFFFF)] = value

    @cuda.jit(device=True, inline="always")
    def put_all(staged, targets, words, factor):
        for k in range(4):
            put(staged, targets[k], words[k], factor)
            put(staged, targets[k] >> 16, words[k] >> 16, factor)

    @cuda.jit(device=True, inline="always")
    def permute(weight, x, factor, staged, thread):
        whole = int32(weight.columns // 8)
        for i in range(thread, whole, 2 * threads):
            also = int32(min(i + threads, whole - 1))  # two at once, to wait for both together
            words, others = load_words(x + 16 * i), load_words(x + 16 * also)
            targets, other_targets = targets_of(weight, i), targets_of(weight, also)
            put_all(staged, targets, words, factor)
            put_all(staged, other_targets, others, factor)
        for i in range(int32(8 * whole + thread), weight.columns, threads):
            target = int32(load_uint16(weight.target + 2 * i)) if weight.target else int32(i)
            put(staged, target, load_uint16(x + 2 * i), factor)

    return permute


@cuda.jit(device=True, inline="always")
def targets_of(weight, i):
    """Where inputs 8i ... 8i + 7 go, two to a word."""
    if weight.target:
        return load_words(weight.target + 16 * i)
    start, step = 8 * i | (8 * i + 1) << 16, 0x00020002
    return int32(start), int32(start + step), int32(start + 2 * step), int32(start + 3 * step)


# --- Multiplying


def outliers_function(spec: KernelSpec) -> Any:
    """add_outliers(...): the sparse part of each of the warp's rows, to `floats`."""
    wait_for_first = copies_done(spec.stages - 1)

    @cuda.jit(device=True, inline="always")
    def product(weight, at, end, copied, first, room, staged):
        if at >= end:
            return np.float32(0)
        if copied:
            column, value = staged[first + at], staged[first + at + room]
        else:
            column = load_uint16(weight.outlier_columns + HALF_BYTES * at)
            value = load_uint16(weight.outlier_values + HALF_BYTES * at)
        return half_to_float(value) * half_to_float(staged[ZERO_HALVES + column])

    @cuda.jit(device=True, inline="always")
    def row_sum(weight, begin, end, copied, first, room, staged):
        total, other = np.float32(0), np.float32(0)  # two at once, to wait for both together
        for at in range(begin, end, 2 * LANES):
            total += product(weight, at, end, copied, first, room, staged)
            other += product(weight, int32(at + LANES), end, copied, first, room, staged)
        total += other
        for distance in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(ALL, total, distance)
        return total

    @cuda.jit(device=True, inline="always")
    def add_outliers(weight, plan, work, places, copied, staged, floats, integers):
        wait_for_first()
        cuda.syncwarp()
        first = int32(0)  # where outlier 0 would be in `staged`
        if weight.outlier_values:
            start = integers[places.offsets + work.begin] & -COPIED_TOGETHER
            first = int32(places.outliers - start)
        for i in range(work.begin, work.end):
            total = np.float32(0)
            if weight.outlier_values:
                begin = int32(integers[places.offsets + i] + work.lane)
                end = integers[places.offsets + i + 1]
                total = row_sum(weight, begin, end, copied, first, plan.room, staged)
            if work.lane == 0:
                floats[places.sparse + i] = total

    return add_outliers


def units_function(spec: KernelSpec) -> Any:
    """add_units(...): the warp's share of the dense part of each row, to `floats`."""
    unit_spec, stages, warps = spec.unit, spec.stages, spec.warps
    wait_for_unit, multiply_unit = copies_done(stages - 1), unit_multiplier(unit_spec)
    fill, following, unit_bytes = unit_filler(unit_spec), following_function(spec), unit_spec.bytes
    step_bytes = unit_spec.octet_bytes

    @cuda.jit(device=True, inline="always")
    def multiply(weight, work, places, at, unit, low, high):
        g, t = int32(work.lane >> 2), int32(work.lane & 3)
        octet = unit * UNIT_OCTETS
        first, first_step = (places.own, int32(step_bytes)) if t == g else (places.zeros, int32(0))
        second, second_step = places.zeros, int32(0)
        if t + 4 == g:
            second, second_step = places.own, int32(step_bytes)
        return multiply_unit(
            at,
            work.lane,
            int32(first + octet * first_step),
            first_step,
            int32(second + octet * second_step),
            second_step,
            int32(places.zeros + 4 * places.sums + 8 * t + octet * (4 * OCTET)),
            low,
            high,
        )

    @cuda.jit(device=True, inline="always")
    def store_share(work, places, tile, low, high, floats):
        for distance in (1, 2):
            low += cuda.shfl_xor_sync(ALL, low, distance)
            high += cuda.shfl_xor_sync(ALL, high, distance)
        if work.lane & 3 == 0:
            at = places.shares + (tile * warps + work.warp) * TILE_ROWS + (work.lane >> 2)
            floats[at] = low
            floats[at + 8] = high

    @cuda.jit(device=True, inline="always")
    def add_units(weight, work, places, floats):
        tile, unit = int32(work.warp // weight.units), int32(work.warp % weight.units)
        ahead_tile, ahead_unit = tile, unit
        for _ in range(stages):
            ahead_tile, ahead_unit = following(ahead_tile, ahead_unit, weight.units)
        slot, low, high = int32(0), np.float32(0), np.float32(0)
        while tile < work.tiles:
            wait_for_unit()
            cuda.syncwarp()
            at = int32(places.ring + slot * unit_bytes)
            low, high = multiply(weight, work, places, at, unit, low, high)
            cuda.syncwarp()
            if ahead_tile < work.tiles:
                fill(weight, int32(work.first_tile + ahead_tile), ahead_unit, at, work.lane)
                ahead_tile, ahead_unit = following(ahead_tile, ahead_unit, weight.units)
            end_of_copies()
            slot = int32(slot + 1 if slot + 1 < stages else 0)
            tile_now = tile
            tile, unit = following(tile, unit, weight.units)
            if tile != tile_now:
                store_share(work, places, tile_now, low, high, floats)
                low, high = np.float32(0), np.float32(0)

    return add_units


def writing_function(spec: KernelSpec) -> Any:
    """write_rows(...): the warps' shares, the outliers and the bias of each row, to y."""
    threads, warps = spec.threads, spec.warps
    bfloat = spec.kind == torch.bfloat16
    to_float = bfloat_to_float if bfloat else half_to_float
    from_float = float_to_bfloat if bfloat else float_to_half

    @cuda.jit(device=True, inline="always")
    def write_rows(weight, work, places, floats, factor, y, bias):
        for i in range(work.thread, int32(work.tiles * TILE_ROWS), threads):
            row = work.first_row + i
            if row < weight.rows:
                at = places.shares + i // TILE_ROWS * (warps * TILE_ROWS) + i % TILE_ROWS
                total = np.float32(0)
                for other in range(warps):
                    total += floats[at + other * TILE_ROWS]
                total *= np.float32(1 / SUBNORMAL_UNIT)
                total = (total + floats[places.sparse + i]) * factor
                if bias:
                    total += to_float(load_uint16(bias + 2 * row))
                store_uint16(y + 2 * row, from_float(total))

    return write_rows


# --- Launching


class Call(NamedTuple):
    """A product with one weight, ready but for x, y and the bias."""

    launcher: Launcher
    grid: int
    shared_bytes: int
    addresses: Weight
    plan: Plan


_CALLS: WeakKeyDictionary[PreparedMatrix, dict[torch.dtype, Call]] = WeakKeyDictionary()


def multiply_one(
    x: torch.Tensor, weight: PreparedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Fill out [rows] with W_hat x + bias, on torch's current stream.

    x fp16 or bf16 [columns], contiguous, its address a multiple of 16; bias [rows] or None and out
    of the same dtype. `can_multiply` must hold.
    """
    calls = _CALLS.setdefault(weight, {})
    if x.dtype not in calls:
        calls[x.dtype] = make_call(weight, x.dtype)
    call = calls[x.dtype]
    call.launcher.launch(
        call.grid,
        call.shared_bytes,
        torch.cuda.current_stream(x.device).cuda_stream,
        *call.addresses,
        x.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *call.plan,
    )


def can_multiply(weight: PreparedMatrix) -> bool:
    """Whether x and a ring fit into the GPU's shared memory."""
    return shared_bytes(weight, 1) <= shared_memory(weight.device)


def make_call(weight: PreparedMatrix, kind: torch.dtype) -> Call:
    """Choose grid, stages and room, and compile the kernel."""
    device, unit = weight.device, unit_of(weight)
    half = shared_memory(device) // 2
    stages = STAGES
    while stages > 1 and shared_bytes(weight, stages) > half:
        stages -= 1
    early = torch.cuda.get_device_capability(device)[0] >= EARLY_FROM
    launcher = launcher_of(KernelSpec(unit, kind, stages, early), device)
    grid, plan = divide(weight)
    return Call(launcher, grid, shared_bytes(weight, stages), addresses(weight), plan)


@cache
def launcher_of(spec: KernelSpec, device: torch.device) -> Launcher:
    """A kernel, compiled for a GPU."""
    return Launcher(
        product_kernel(spec),
        SIGNATURE,
        ARGUMENT_TYPES,
        device,
        threads=spec.threads,
        shared_bytes=shared_memory(device),
        early=spec.early,
    )


def divide(weight: PreparedMatrix) -> tuple[int, Plan]:
    """How many blocks there are, and what a block does: as many as run at once, or, where that
    would leave each but a tile or two, half as many, which leave room for what runs next."""
    at_once = torch.cuda.get_device_properties(weight.device).multi_processor_count
    grid = min(weight.tiles, at_once if weight.tiles <= 2 * at_once else 2 * at_once)
    tiles = ceil_div(weight.tiles, grid)
    outliers = len(weight["outlier_values"]) if "outlier_values" in weight.tensors else 0
    average = outliers * tiles * TILE_ROWS // (WARPS * weight.spec.out_features)
    room = ceil_div(average * 3 // 2, COPIED_TOGETHER) * COPIED_TOGETHER + 2 * COPIED_TOGETHER
    return grid, Plan(tiles, room)


def shared_bytes(weight: PreparedMatrix, stages: int) -> int:
    """What a block takes of shared memory; the table above, line by line."""
    unit, (_, plan) = unit_of(weight), divide(weight)
    floats = weight.units * UNIT_GROUPS + plan.tiles * TILE_ROWS * (WARPS + 2) + 8
    halves = ZERO_HALVES + weight.units * unit.columns + 2 * WARPS * plan.room
    ring = WARPS * stages * unit.bytes
    return ceil_div(4 * floats + 2 * halves, ALIGNMENT) * ALIGNMENT + ring


def unit_of(weight: PreparedMatrix) -> UnitSpec:
    """The settings of a weight that instructions depend on."""
    return UnitSpec(weight.spec.bits, weight.spec.scale_bits, weight.spec.group_size)


def addresses(weight: PreparedMatrix) -> Weight:
    """The kernel's view of a weight."""
    spec, tensors = weight.spec, weight.tensors
    pointers = {name: tensors[name].data_ptr() if name in tensors else 0 for name in BUFFERS}
    return Weight(
        **pointers,
        rows=spec.out_features,
        columns=spec.in_features,
        tiles=weight.tiles,
        units=weight.units,
        stats_shift=(spec.stats_group_size // TILE_ROWS).bit_length() - 1,
    )
