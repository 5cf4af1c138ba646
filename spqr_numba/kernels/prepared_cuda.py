"""A prepared weight (prepared.py) back to numbers on a GPU, for products with many inputs.

    out[row, j] = scale[row, g] * (code[row, j] - zero[row, g]) + outlier[row, j]
                  with g = j // group_size

    out    fp32, fp16 or bf16 [rows, columns], columns as they are stored: so must inputs be

A warp takes a unit of a tile: 16 rows, 32 groups. It copies it and its run of outliers to shared
memory, and writes it, an octet at a time, through shared memory once more (unit_numbers_cuda.py).
An octet's outliers wait in a patch (patch_cuda.py), and are added before anything is rounded.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import types

from ..format.layout import ceil_div
from .launch import Launcher, numba_cuda, shared_memory
from .patch_cuda import outlier_putter, patch_clearer, run_copier, run_opener, segment_finder
from .patch_spec import PatchSpec
from .prepared import LANES, PreparedMatrix
from .ptx import copies_done, divide, end_of_copies, shared_address
from .ring_cuda import unit_filler
from .runs import SEGMENT_COLUMNS, TILE_ROWS
from .staging_cuda import ORDERED, order_kernel
from .stream_cuda import WEIGHT, KernelSpec, addresses
from .unit_cuda import HALF_BYTES, LOAD_BYTES, UnitSpec
from .unit_numbers_cuda import Copying, part_writer

__all__ = [
    "SIGNATURE",
    "dequantize_kernel",
    "dequantize_stored",
    "launchers_of",
    "stored_inputs",
]

cuda = numba_cuda()  # only those who have tensors on a GPU import this module

WARPS = 4  # of a block: as many have room in every GPU, of which some have 99 KB
WARPS_PER_SM = {8: 16, 16: 16, 32: 12}
"""Size of a group -> for how many warps a multiprocessor's registers are."""
ORDER_WARPS = 16  # of a block that orders an input
RUN_BYTES = 2048  # of a run, beside a unit; the rest comes from global memory
int32: Any = np.int32

SIGNATURE = (WEIGHT, types.int64, types.int32)


def dequantize_stored(weight: PreparedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """W_hat [out_features, in_features] of a dtype, columns in stored order; rows may lie apart."""
    spec = weight.spec
    unit, outliers = UnitSpec.of(spec), "runs" in weight.tensors
    width = spec.groups * spec.group_size
    out = torch.empty(spec.out_features, width, dtype=dtype, device=weight.device)
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    blocks, needed = ceil_div(weight.tiles * weight.units, WARPS), shared_bytes(unit, dtype)
    launcher = launcher_of(unit, dtype, outliers, weight.device)
    launcher.launch(blocks, needed, stream, *addresses(weight), out.data_ptr(), width)
    return out[:, : spec.in_features]


def stored_inputs(x: torch.Tensor, weight: PreparedMatrix) -> torch.Tensor:
    """x [..., in_features] in the order of those columns."""
    if "target" not in weight.tensors:
        return x
    ordered = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns, needed = x.shape[-1], x.shape[-1] * HALF_BYTES
    as_it_lies = x.is_contiguous() and x.data_ptr() % LOAD_BYTES == 0
    if not (as_it_lies and can_order(weight, x.dtype) and x.numel()):
        return ordered.index_copy_(-1, weight["target"].to(torch.int64), x)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    given = *addresses(weight), x.data_ptr(), ordered.data_ptr()
    ordering_of(UnitSpec.of(weight.spec), x.device).launch(
        x.numel() // columns, needed, stream, *given
    )
    return ordered


def launchers_of(weight: PreparedMatrix, kind: torch.dtype, dtype: torch.dtype) -> list[Launcher]:
    """Of `stored_inputs` of a kind, as it lies, and of `dequantize_stored` to a dtype."""
    unit, outliers = UnitSpec.of(weight.spec), "runs" in weight.tensors
    found = [launcher_of(unit, dtype, outliers, weight.device)]
    if "target" in weight.tensors and can_order(weight, kind):
        found.append(ordering_of(unit, weight.device))
    return found


def can_order(weight: PreparedMatrix, kind: torch.dtype) -> bool:
    """Whether the kernel that orders inputs takes rows of a kind."""
    needed = HALF_BYTES * weight.spec.in_features
    whole = needed % LOAD_BYTES == 0 and needed <= shared_memory(weight.device)
    return kind.itemsize == HALF_BYTES and whole


@cache
def ordering_of(unit: UnitSpec, device: torch.device) -> Launcher:
    """The kernel that orders inputs, compiled for a GPU."""
    spec = KernelSpec(unit, torch.float16, ORDER_WARPS, 1, False)
    return Launcher(
        partial(order_kernel, spec),
        ORDERED,
        device,
        threads=spec.threads,
        shared_bytes=shared_memory(device),
        early=False,
    )


@cache
def launcher_of(
    unit: UnitSpec, dtype: torch.dtype, outliers: bool, device: torch.device
) -> Launcher:
    """The kernel, compiled for a GPU."""
    return Launcher(
        partial(dequantize_kernel, unit, dtype, outliers),
        SIGNATURE,
        device,
        threads=WARPS * LANES,
        shared_bytes=shared_bytes(unit, dtype),
        early=False,
    )


def patch_of(unit: UnitSpec, dtype: torch.dtype) -> PatchSpec:
    """Of what goes at once."""
    return PatchSpec(unit.group_size, Copying(unit, dtype).halves, RUN_BYTES)


def warp_bytes(unit: UnitSpec, dtype: torch.dtype) -> int:
    """Of shared memory: a warp's unit, its run, a patch, and what numbers pass through."""
    patch = patch_of(unit, dtype)
    return unit.bytes + patch.run_bytes + patch.bytes + Copying(unit, dtype).bytes


def shared_bytes(unit: UnitSpec, dtype: torch.dtype) -> int:
    """Of a block."""
    return WARPS * warp_bytes(unit, dtype)


@cache
def dequantize_kernel(spec: UnitSpec, dtype: torch.dtype, outliers: bool) -> Any:
    """kernel(weight, out, width): out is the address of [rows, width], whole groups."""
    fill_unit, wait, own_bytes = unit_filler(spec), copies_done(0), warp_bytes(spec, dtype)
    unit_bytes, patch = spec.bytes, patch_of(spec, dtype)
    copy_run, clear_patch, open_run = run_copier(patch), patch_clearer(patch), run_opener(patch)
    write_parts, run_bytes = parts_writer(spec, dtype, outliers), patch.run_bytes
    columns, in_segment = spec.columns, SEGMENT_COLUMNS - 1
    segment_of = segment_finder(columns)

    @cuda.jit(launch_bounds=(WARPS * LANES, WARPS_PER_SM[spec.group_size] // WARPS))
    def kernel(weight, out, width):
        zero = shared_address(cuda.shared.array(0, np.uint16))
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        index = int32(cuda.blockIdx.x * WARPS + warp)
        tile = divide(index, weight.units)
        unit, at = int32(index - tile * weight.units), int32(zero + warp * own_bytes)
        if tile < weight.tiles:
            run, first = int32(at + unit_bytes), int32(unit * columns & in_segment)
            segment, cursor = segment_of(unit), (int32(0), int32(0), int32(0))
            fill_unit(weight, tile, unit, at, lane)
            if outliers:
                copy_run(weight, tile, segment, run, lane)
                clear_patch(int32(run + run_bytes), lane)
            end_of_copies()
            wait()
            cuda.syncwarp()
            if outliers:
                cursor = open_run(weight, tile, segment, run, first, lane)
            write_parts(weight, out, width, tile, unit, at, lane, cursor)

    return kernel


def parts_writer(spec: UnitSpec, dtype: torch.dtype, outliers: bool) -> Any:
    """write_parts(weight, out, width, tile, unit, at, lane, cursor): a unit that lies at `at`, one
    part after the other."""
    size, copying, patch_spec = dtype.itemsize, Copying(spec, dtype), patch_of(spec, dtype)
    run_at, patch_bytes, columns = spec.bytes, patch_spec.bytes, spec.columns
    patch_at = run_at + patch_spec.run_bytes
    loads_shift, load_columns = copying.loads.bit_length() - 1, LOAD_BYTES // size
    in_row, rows_at_once = copying.loads - 1, copying.rows
    write_from = part_function(spec, dtype, outliers, 0)

    @cuda.jit(device=True, forceinline=True)
    def write_parts(weight, out, width, tile, unit, at, lane, cursor):
        row = int32(tile * TILE_ROWS + (lane >> loads_shift))
        column = int32(unit * columns + (lane & in_row) * load_columns)
        place = out + size * (np.int64(row) * width + column)
        step = np.int64(size * rows_at_once * width)
        rows, left = int32(weight.rows - row), int32(width - column)
        patch = int32(at + patch_at)
        places = at, int32(at + run_at), patch, int32(patch + patch_bytes)
        write_from(weight, tile, unit, places, lane, place, step, rows, left, cursor)

    return write_parts


def part_function(spec: UnitSpec, dtype: torch.dtype, outliers: bool, part: int) -> Any:
    """write_from(weight, tile, unit, places, lane, out, step, rows, columns, cursor): a part of a
    unit, and those behind it.

    places: shared addresses of the unit, its run, a patch, and what numbers pass through; the rest
    as for `part_writer`.
    """
    copying = Copying(spec, dtype)
    put, write = outlier_putter(patch_of(spec, dtype)), part_writer(spec, dtype, part, outliers)
    unit_columns, before = spec.columns, part * copying.columns
    segment_of, in_segment = segment_finder(unit_columns), SEGMENT_COLUMNS - 1
    last = part + 1 == copying.parts
    write_rest: Any = None if last else part_function(spec, dtype, outliers, part + 1)

    @cuda.jit(device=True, forceinline=True)
    def write_own(weight, tile, unit, places, lane, out, step, rows, columns, cursor):
        at, run, patch, between = places
        if outliers:
            first = int32((unit * unit_columns & in_segment) + before)
            cursor = put(weight, tile, segment_of(unit), run, first, patch, lane, cursor)
            cuda.syncwarp()
        write(at, lane, patch, between, out, step, rows, columns)
        return cursor

    @cuda.jit(device=True, forceinline=True)
    def write_from(weight, tile, unit, places, lane, out, step, rows, columns, cursor):
        given = weight, tile, unit, places, lane, out, step, rows, columns
        write_rest(*given, write_own(*given, cursor))

    return write_own if last else write_from
