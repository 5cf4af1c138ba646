"""The product of a prepared weight (prepared.py) with many inputs on a Hopper GPU.

    y[b, i] = factor[b] * sum_j W[i, j] x'[b, j] + bias[i]
    W[i, j] = scale * code + (-scale * zero + outlier), rounded to fp16: -scale * zero, then the
              sum in brackets, then the whole

A block of threads has 256 rows, a tile of sixteen for each of its sixteen warps, and up to 128
inputs; or half as many rows, and 256 inputs. It walks its columns in *strips* of four groups. A
warp decodes its tile's strip straight into the registers from which tensor cores take their first
operand (many_tile_cuda.py), while they still multiply the strip before it (wgmma_cuda.py); so a
weight is decoded once for all inputs of a block, and goes nowhere. The copy engine brings the
inputs, a strip at a time, two strips ahead (bulk_cuda.py). No warp waits for another but through
its barriers: a stage is *full* when its inputs are there, and *empty* when all warps have
multiplied by it.

Where there are fewer blocks than multiprocessors the columns are *split* between several
(many_results_cuda.py). many_spec.py has the map of the shared memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from .bulk_cuda import (
    BARRIER_BYTES,
    arrive,
    bulk_copy,
    expect_bytes,
    let_copy_engine_see,
    make_barrier,
    wait_for_phase,
)
from .launch import numba_cuda
from .many_results_cuda import result_writer
from .many_spec import (
    FIRST_STAGE,
    PLACE,
    STAGES,
    UNIT_STRIPS,
    ManySpec,
)
from .many_tile_cuda import (
    ahead_copier,
    strip_runner,
    tile_finder,
    tile_run_opener,
    unit_copier,
)
from .patch_cuda import patch_clearer
from .prepared import UNIT_OCTETS
from .ptx import (
    copies_done,
    divide,
    end_of_copies,
    let_dependents_start,
    shared_address,
    shared_int32,
    to_shared_int32,
    wait_for_dependencies,
)
from .runs import SEGMENT_COLUMNS, TILE_ROWS
from .stream_cuda import WEIGHT
from .unit_cuda import WORD_BYTES
from .wgmma_cuda import products_done, sums_writer

__all__ = ["SIGNATURE", "many_kernel"]

cuda = numba_cuda()

AHEAD = 2  # strips of x'
int32: Any = np.int32

SIGNATURE = (WEIGHT, *(types.int64,) * 5, *(types.int32,) * 3)
"""The signature of `many_kernel`'s."""


@cache
def many_kernel(spec: ManySpec) -> Any:
    """kernel(weight, staged, factors, y, bias, shares, count, splits, input_blocks).

    Addresses: staged, x' as staging_cuda.py writes cores; factors float32 [inputs]; y [count,
    rows]; bias [rows] or 0; shares float32 [splits, count, rows], in place of y, or 0.
    """
    nothing: Any = (np.float32(0),) * (spec.inputs // 2)
    segment_units = SEGMENT_COLUMNS // spec.unit.columns
    tile_of, start, open_run = tile_finder(spec), starting_function(spec), tile_run_opener(spec)
    run_unit, put_sums = unit_function(spec), sums_writer(spec.result_floats)
    write, all_products_done = result_writer(spec), products_done(0)

    @cuda.jit(launch_bounds=(spec.threads, 1))
    def kernel(weight, staged, factors, y, bias, shares, count, splits, input_blocks):
        zero = shared_address(cuda.shared.array(0, np.uint16))
        thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        above = divide(block, input_blocks)
        input_block, row_block = int32(block - above * input_blocks), divide(above, splits)
        split, tile = int32(above - row_block * splits), tile_of(weight, row_block, thread, zero)
        if thread == 0:
            keep(zero, input_block, row_block, split)
        first = divide(int32(weight.units * split), splits)
        end = divide(int32(weight.units * int32(split + 1)), splits)
        start(weight, tile, staged, first, end, zero)
        sums, cursor, unit = nothing, open_run(weight, tile, first), first
        while True:  # at least once, or the sums would not stay in their registers
            sums, cursor = run_unit(weight, tile, staged, unit, end, zero, sums, cursor)
            unit = int32(unit + 1)
            if unit >= end:
                break
            if unit & (segment_units - 1) == 0:
                cursor = open_run(weight, tile, unit)
        all_products_done()
        input_block, row_block, split = kept(zero)
        cuda.syncthreads()
        results = int32(zero + FIRST_STAGE)
        put_sums(int32(results + WORD_BYTES * TILE_ROWS * tile.warp), tile.lane, sums)
        cuda.syncthreads()
        write(weight, factors, y, bias, shares, count, input_block, row_block, split, results)

    return kernel


@cuda.jit(device=True, forceinline=True)
def keep(zero, input_block, row_block, split):
    """A block's place, in shared memory: sums and words leave it no registers."""
    to_shared_int32(int32(zero + PLACE), input_block)
    to_shared_int32(int32(zero + PLACE + WORD_BYTES), row_block)
    to_shared_int32(int32(zero + PLACE + 2 * WORD_BYTES), split)


@cuda.jit(device=True, forceinline=True)
def kept(zero):
    """What `keep` was given."""
    place = int32(zero + PLACE)
    return (
        shared_int32(place),
        shared_int32(int32(place + WORD_BYTES)),
        shared_int32(int32(place + 2 * WORD_BYTES)),
    )


def starting_function(spec: ManySpec) -> Any:
    """start(weight, tile, staged, first, end, zero): what the first strips need is there, or on its
    way. The inputs come from the kernel before this one."""
    copy_unit, clear_patch, wait = unit_copier(spec), patch_clearer(spec.patch), copies_done(0)
    outliers = spec.outliers
    fetch, fetch_next = input_fetcher(spec, 0), input_fetcher(spec, 1)
    full, empty, warps = spec.full(0), spec.empty(0), spec.warp_count

    @cuda.jit(device=True, forceinline=True)
    def make_barriers(zero):
        for stage in range(STAGES):
            make_barrier(int32(zero + full + stage * BARRIER_BYTES), int32(1))
            make_barrier(int32(zero + empty + stage * BARRIER_BYTES), int32(warps))
        let_copy_engine_see()

    @cuda.jit(device=True, forceinline=True)
    def start(weight, tile, staged, first, end, zero):
        let_dependents_start()
        if tile.warp == 0 and tile.lane == 0:
            make_barriers(zero)
        copy_unit(weight, tile, first, end)
        end_of_copies()
        if outliers:
            clear_patch(tile.own, tile.lane)
        cuda.syncthreads()
        wait_for_dependencies()
        if tile.warp == 0 and tile.lane == 0:
            fetch(weight, staged, first, zero)
            fetch_next(weight, staged, first, zero)
        wait()
        cuda.syncwarp()

    return start


@cache
def input_fetcher(spec: ManySpec, in_unit: int) -> Any:
    """fetch(weight, staged, unit, zero): x' of a unit's strip on its way; for one thread."""
    strip_bytes, stage = spec.strip_bytes, in_unit % STAGES
    to, full = spec.stage(stage), spec.full(stage)

    @cuda.jit(device=True, forceinline=True)
    def fetch(weight, staged, unit, zero):
        barrier, input_block = int32(zero + full), shared_int32(int32(zero + PLACE))
        strip = int32((input_block * weight.units + unit) * UNIT_STRIPS + in_unit)
        source = staged + np.int64(strip) * strip_bytes
        expect_bytes(barrier, int32(strip_bytes))
        bulk_copy(int32(zero + to), source, int32(strip_bytes), barrier)

    return fetch


def unit_function(spec: ManySpec) -> Any:
    """run_unit(weight, tile, staged, unit, end, zero, sums, cursor) -> the last two, as the next
    unit needs them."""
    one, two, three, four = (octet_function(spec, octet) for octet in range(UNIT_OCTETS))

    @cuda.jit(device=True, forceinline=True)
    def run_unit(weight, tile, staged, unit, end, zero, sums, cursor):
        sums, cursor = one(weight, tile, staged, unit, end, zero, sums, cursor)
        sums, cursor = two(weight, tile, staged, unit, end, zero, sums, cursor)
        sums, cursor = three(weight, tile, staged, unit, end, zero, sums, cursor)
        return four(weight, tile, staged, unit, end, zero, sums, cursor)

    return run_unit


def octet_function(spec: ManySpec, octet: int) -> Any:
    """run_octet(...), as `unit_function`'s: the two strips of an octet."""
    one, two = (strip_function(spec, octet, half) for half in range(2))

    @cuda.jit(device=True, forceinline=True)
    def run_octet(weight, tile, staged, unit, end, zero, sums, cursor):
        sums, cursor = one(weight, tile, staged, unit, end, zero, sums, cursor)
        return two(weight, tile, staged, unit, end, zero, sums, cursor)

    return run_octet


def strip_function(spec: ManySpec, octet: int, half: int) -> Any:
    """run_strip(...), as `unit_function`'s: decoded, while the strip before is multiplied, and set
    off; when the one before is done, its stage is the next one's to be filled."""
    in_unit = octet * 2 + half
    multiply_strip, copy_ahead = strip_runner(spec, octet, half), ahead_copier(spec, octet, half)
    products_before_done, wait_for_codes = (
        products_done(spec.in_flight),
        copies_done(spec.block_strips),
    )
    release, refill = stage_releaser(spec, in_unit), stage_filler(spec, in_unit)
    full, stage = spec.full(in_unit % STAGES), spec.stage(in_unit % STAGES)
    parity = in_unit // STAGES % 2

    @cuda.jit(device=True, forceinline=True)
    def run_strip(weight, tile, staged, unit, end, zero, sums, cursor):
        wait_for_codes()
        cuda.syncwarp()
        wait_for_phase(int32(zero + full), int32(parity))
        inputs = int32(zero + stage)
        sums, cursor = multiply_strip(weight, tile, unit, inputs, sums, cursor)
        products_before_done()
        release(tile, zero)
        copy_ahead(weight, tile, unit, end)
        end_of_copies()
        refill(weight, tile, staged, unit, end, zero)
        return sums, cursor

    return run_strip


def stage_releaser(spec: ManySpec, in_unit: int) -> Any:
    """release(tile, zero): the strip before a unit's has been multiplied by its inputs.

    Before the first strip there is none, but all warps release its stage none the less.
    """
    empty = spec.empty((in_unit - 1) % STAGES)

    @cuda.jit(device=True, forceinline=True)
    def release(tile, zero):
        if tile.lane == 0:
            arrive(int32(zero + empty))

    return release


def stage_filler(spec: ManySpec, in_unit: int) -> Any:
    """refill(weight, tile, staged, unit, end, zero): the inputs AHEAD of a unit's strip, where
    there are any, into a stage that all warps are through with; by one thread."""
    ahead = in_unit + AHEAD
    fetch, later = input_fetcher(spec, ahead % UNIT_STRIPS), ahead // UNIT_STRIPS
    stage, phase = ahead % STAGES, (ahead - STAGES) // STAGES
    empty, parity = spec.empty(stage), (phase + (stage == STAGES - 1)) % 2  # released once more

    @cuda.jit(device=True, forceinline=True)
    def refill(weight, tile, staged, unit, end, zero):
        if tile.warp == 0 and tile.lane == 0 and unit + later < end:
            wait_for_phase(int32(zero + empty), int32(parity))
            fetch(weight, staged, int32(unit + later), zero)

    return refill
