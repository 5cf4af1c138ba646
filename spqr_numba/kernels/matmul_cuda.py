"""The matrix product on a GPU: matmul.py's CUDA twin for 1 to 16 inputs.

product_cuda.py has the kernel; here it is planned, compiled and launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..format.layout import ceil_div
from .launch import Launcher, shared_memory
from .prepared import LANES, OCTET, UNIT_GROUPS, PreparedMatrix, padded_columns
from .product_cuda import BLOCKS_PER_SM, FACTOR_FLOATS, FLOAT_BYTES, SIGNATURE, product_kernel
from .runs import SEGMENT_COLUMNS, segments_of
from .staging_cuda import STAGING, ZERO_HALVES, staging_kernel
from .stream_cuda import KernelSpec, Plan, Weight, addresses
from .unit_cuda import HALF_BYTES, LOAD_BYTES, UnitSpec
from .unit_several_cuda import AT_ONCE

__all__ = [
    "MOST_INPUTS",
    "RINGS",
    "can_multiply",
    "most_at_once",
    "multiply_few",
    "multiply_in_turns",
]

MOST_INPUTS = 16
LARGEST_DEPTH = 16  # of an mma
ALIGNMENT = 128
RINGS = {1: ((8, 3), (8, 2), (8, 1)), 8: ((16, 1), (8, 1)), 16: ((8, 2), (8, 1))}
"""inputs -> warps of a block and stages of a warp's ring, the best first."""
WHOLE = 3  # stages of one input's: only for warps that have no more items
STAGING_WARPS = 16
EARLY_FROM = 9  # the compute capability that has programmatic dependent launch


class Call(NamedTuple):
    """A product with one weight, ready but for x, y and the bias."""

    staging: Launcher | None  # of several inputs
    product: Launcher
    grid: int
    shared_bytes: int
    addresses: Weight
    plan: Plan


_CALLS: WeakKeyDictionary[PreparedMatrix, dict[Any, Call]] = WeakKeyDictionary()
_FITS: WeakKeyDictionary[PreparedMatrix, dict[int, bool]] = WeakKeyDictionary()


def multiply_few(
    x: torch.Tensor, weight: PreparedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Fill out [count, rows] with x W_hat^T + bias, on torch's current stream.

    x fp16 or bf16 [count, columns], 1 to 16 inputs, each contiguous at an address that 16 divides;
    bias [rows] or None and out, contiguous, of the same dtype. `can_multiply` must hold.
    """
    count = len(x)
    inputs = 1 if count == 1 else AT_ONCE * ceil_div(count, AT_ONCE)
    calls = _CALLS.setdefault(weight, {})
    if (x.dtype, inputs) not in calls:
        calls[x.dtype, inputs] = make_call(weight, x.dtype, inputs)
    call = calls[x.dtype, inputs]
    stream = torch.cuda.current_stream(x.device).cuda_stream
    operands = x.data_ptr(), 0, 0
    if call.staging is not None:
        staged = torch.empty(staged_bytes(weight, inputs), dtype=torch.uint8, device=x.device)
        operands = staged_operands(weight, inputs, staged.data_ptr())
        step = x.stride(0) * x.element_size()
        needed = HALF_BYTES * (ZERO_HALVES + padded_columns(weight.spec))
        given = *call.addresses, x.data_ptr(), step, count, *operands
        call.staging.launch(inputs, needed, stream, *given)
    call.product.launch(
        call.grid,
        call.shared_bytes,
        stream,
        *call.addresses,
        *operands,
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        count,
        *call.plan,
    )


def multiply_in_turns(
    x: torch.Tensor, weight: PreparedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """`multiply_few` of any number of inputs, as many in a launch as it takes."""
    at_once = most_at_once(weight)
    for first in range(0, len(x), at_once):
        some = slice(first, first + at_once)
        multiply_few(x[some], weight, bias, out[some])


def most_at_once(weight: PreparedMatrix) -> int:
    """Inputs of a launch; with groups too large for the depth of one product each has its own."""
    return MOST_INPUTS if weight.spec.group_size <= LARGEST_DEPTH else 1


def staged_operands(weight: PreparedMatrix, inputs: int, start: int) -> tuple[int, int, int]:
    """Where x', X and factors are in what several inputs are staged into."""
    sums = start + inputs * HALF_BYTES * padded_columns(weight.spec)
    return start, sums, sums + inputs * FLOAT_BYTES * weight.units * UNIT_GROUPS


def staged_bytes(weight: PreparedMatrix, inputs: int) -> int:
    """What several inputs are staged into."""
    return staged_operands(weight, inputs, 0)[-1] + inputs * FLOAT_BYTES


def can_multiply(weight: PreparedMatrix, count: int) -> bool:
    """Whether so many inputs, or slabs of them, fit into the GPU's shared memory."""
    inputs = 1 if count == 1 else AT_ONCE * ceil_div(count, AT_ONCE)
    known = _FITS.setdefault(weight, {})
    if inputs not in known:
        plan = next(plans(weight, torch.float16, inputs), None) if inputs <= MOST_INPUTS else None
        known[inputs] = plan is not None
    return known[inputs]


def make_call(weight: PreparedMatrix, kind: torch.dtype, inputs: int) -> Call:
    """Choose the plan, and compile the kernels."""
    spec, plan, grid = next(plans(weight, kind, inputs))
    launcher = launcher_of(spec, weight.device)
    staging = staging_of(spec, weight.device) if inputs > 1 else None
    needed = plan.ring + spec.warps * spec.stages * spec.unit.bytes
    return Call(staging, launcher, grid, needed, addresses(weight), plan)


@cache
def launcher_of(spec: KernelSpec, device: torch.device) -> Launcher:
    """A kernel of the product, compiled for a GPU."""
    return compiled(product_kernel(spec), SIGNATURE, spec, device)


@cache
def staging_of(spec: KernelSpec, device: torch.device) -> Launcher:
    """The kernel that stages several inputs, compiled for a GPU."""
    spec = KernelSpec(spec.unit, spec.kind, STAGING_WARPS, 1, spec.early)
    return compiled(staging_kernel(spec), STAGING, spec, device)


def compiled(kernel: Any, signature: Any, spec: KernelSpec, device: torch.device) -> Launcher:
    """A kernel for a GPU, with as much shared memory as a plan may ask for."""
    return Launcher(
        kernel,
        signature,
        device,
        threads=spec.threads,
        shared_bytes=shared_memory(device),
        early=spec.early,
    )


def plans(
    weight: PreparedMatrix, kind: torch.dtype, inputs: int
) -> Iterator[tuple[KernelSpec, Plan, int]]:
    """What fits into shared memory, the best first: the inputs as one slab, and how many blocks.

    One input's blocks run two to a multiprocessor. Where one block there has so little to do that
    its rings hold all of it, the other's place is left for what runs next.
    """
    unit = UnitSpec.of(weight.spec, inputs)
    properties = torch.cuda.get_device_properties(weight.device)
    at_once, early = properties.multi_processor_count, properties.major >= EARLY_FROM
    room, all_segments = shared_memory(weight.device), segments_of(weight.spec)
    slabs = [all_segments] if inputs == 1 else range(all_segments, 0, -1)
    for blocks in range(BLOCKS_PER_SM[inputs], 0, -1):
        for segments, (warps, stages) in product(slabs, RINGS[inputs]):
            spec = KernelSpec(unit, kind, warps, stages, early)
            tile_items = all_segments * segment_items(weight, spec)
            little = ceil_div(weight.tiles, at_once) * tile_items <= WHOLE * warps
            if inputs == 1 and stages == WHOLE and not little:
                continue
            grid = min(weight.tiles, at_once if little else at_once * blocks)
            plan = make_plan(weight, spec, segments, grid)
            if plan.ring + warps * stages * unit.bytes <= room // blocks:
                yield spec, plan, grid


def segment_items(weight: PreparedMatrix, spec: KernelSpec) -> int:
    """Units of a segment, and its run where there are outliers."""
    return spec.segment_units + (1 if "runs" in weight.tensors else 0)


def make_plan(weight: PreparedMatrix, spec: KernelSpec, segments: int, grid: int) -> Plan:
    """The table of product_cuda.py, line by line, for slabs of so many segments."""
    inputs, slabs = spec.unit.inputs, ceil_div(segments_of(weight.spec), segments)
    buffers, columns = min(slabs, 2), segments * SEGMENT_COLUMNS
    stride = columns + weight.spec.group_size  # which keeps inputs in banks of their own
    sums_stride = columns // weight.spec.group_size + OCTET  # and so does this
    if inputs == 1:
        stride, sums_stride = weight.units * spec.unit.columns, weight.units * UNIT_GROUPS
    inputs_bytes = HALF_BYTES * (ZERO_HALVES + buffers * inputs * stride)
    sums = ceil_div(inputs_bytes, LOAD_BYTES) * (LOAD_BYTES // FLOAT_BYTES) + FACTOR_FLOATS
    slots = sums + buffers * inputs * sums_stride
    tiles, longer = divmod(weight.tiles, grid)
    end = slots + (tiles + (longer > 0) + spec.warps - 1) * LANES * spec.unit.totals
    return Plan(
        tiles=tiles,
        longer=longer,
        segments=segments,
        slabs=slabs,
        items=segment_items(weight, spec),
        stride=stride,
        sums_stride=sums_stride,
        sums=sums,
        slots=slots,
        ring=ceil_div(FLOAT_BYTES * end, ALIGNMENT) * ALIGNMENT,
    )
