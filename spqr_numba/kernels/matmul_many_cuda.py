"""The matrix product with many inputs on a Hopper GPU: planned, compiled and launched.

many_cuda.py has the kernel; staging_cuda.py what brings the inputs into its order.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch

from ..format.layout import MatrixSpec, ceil_div
from .launch import Launcher, shared_memory
from .many_cuda import SIGNATURE, many_kernel
from .many_results_cuda import SHARES, SHARES_THREADS, shares_kernel
from .many_spec import UNIT_STRIPS, ManySpec
from .prepared import PreparedMatrix, padded_columns, units_of
from .staging_cuda import CORES, ZERO_HALVES, cores_kernel
from .stream_cuda import KernelSpec, addresses
from .unit_cuda import HALF_BYTES, UnitSpec

__all__ = ["can_multiply_many", "launchers_of", "multiply_many"]

STRIP_MICROSECONDS = {32: 0.85, 64: 0.95, 128: 1.2, 256: 1.03}
"""Inputs of a block -> how long it takes for a strip, on an H200."""
LARGE_BLOCK = 128  # inputs
STAGING_WARPS = 16
HOPPER = 9  # the compute capability that has wgmma
USUAL_RUN = 768  # bytes
BLOCK_MICROSECONDS = 2.5  # for its beginning and its end
SHARE_MICROSECONDS = 1.2e-6  # for each sum that is written as a share, and read again


class Call(NamedTuple):
    """A product with so many inputs, ready but for the weight, x, y and the bias."""

    staging: Launcher
    product: Launcher
    adding: Launcher
    inputs: int  # of a block
    input_blocks: int
    row_blocks: int
    splits: int
    columns: int  # padded to units
    shared_bytes: int


def can_multiply_many(weight: PreparedMatrix, count: int) -> bool:
    """Whether the GPU has the instructions and the shared memory, and does well with so many."""
    return count <= most_inputs(weight.spec, weight.device)


@cache
def most_inputs(spec: MatrixSpec, device: torch.device) -> float:
    """What it does well with, of a weight of a spec: few blocks of inputs, if they are small ones,
    since each decodes the weight for itself."""
    fit = inputs_that_fit(UnitSpec.of(spec))
    staged = HALF_BYTES * (ZERO_HALVES + padded_columns(spec))
    hopper = torch.cuda.get_device_properties(device).major == HOPPER
    if not hopper or not fit or staged > shared_memory(device):
        return 0
    return math.inf if fit[-1] >= LARGE_BLOCK else 2 * fit[-1]


@cache
def inputs_that_fit(unit: UnitSpec) -> tuple[int, ...]:
    """Of a block: those whose strips, and a usual run of outliers, are in shared memory."""
    return tuple(
        inputs
        for inputs in STRIP_MICROSECONDS
        if ManySpec(unit, True, inputs, torch.float16).run_bytes >= USUAL_RUN
    )


def multiply_many(
    x: torch.Tensor, weight: PreparedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Fill out [count, rows] with x W_hat^T + bias, W_hat rounded to fp16, on torch's current
    stream.

    x fp16 or bf16 [count, columns], each input contiguous at an address that 16 divides; bias
    [rows] or None and out, contiguous, of the same dtype. `can_multiply_many` must hold.
    """
    count, device = len(x), x.device
    call = call_of(weight, x.dtype, count)
    stream = torch.cuda.current_stream(device).cuda_stream
    of_weight, all_inputs = addresses(weight), call.inputs * call.input_blocks
    staged = torch.empty(all_inputs * call.columns, dtype=torch.float16, device=device)
    factors = torch.empty(all_inputs, dtype=torch.float32, device=device)
    shares, shares_at = None, 0
    if call.splits > 1:
        shares = torch.empty(call.splits * out.numel(), dtype=torch.float32, device=device)
        shares_at = shares.data_ptr()
    inputs = x.data_ptr(), x.stride(0) * x.element_size(), count, call.inputs
    operands = staged.data_ptr(), factors.data_ptr()
    results = out.data_ptr(), 0 if bias is None else bias.data_ptr()
    needed = HALF_BYTES * (ZERO_HALVES + call.columns)
    call.staging.launch(all_inputs, needed, stream, *of_weight, *inputs, *operands)
    grid = call.row_blocks * call.splits * call.input_blocks
    given = *results, shares_at, count, call.splits, call.input_blocks
    call.product.launch(grid, call.shared_bytes, stream, *of_weight, *operands, *given)
    if shares is not None:
        grid = ceil_div(out.numel(), SHARES_THREADS)
        sizes = count, weight.spec.out_features, call.splits
        call.adding.launch(grid, 0, stream, shares_at, operands[1], *results, *sizes)


def launchers_of(weight: PreparedMatrix, kind: torch.dtype, count: int) -> list[Launcher]:
    """Of `multiply_many`."""
    call = call_of(weight, kind, count)
    return [call.staging, call.product, *([call.adding] if call.splits > 1 else [])]


def call_of(weight: PreparedMatrix, kind: torch.dtype, count: int) -> Call:
    """The product with so many inputs; made once."""
    return make_call(weight.spec, "runs" in weight.tensors, kind, count, weight.device)


@lru_cache(maxsize=4096)
def make_call(
    spec: MatrixSpec, outliers: bool, kind: torch.dtype, count: int, device: torch.device
) -> Call:
    """Choose how the work is divided, and compile the kernels."""
    inputs, splits = division_of(spec, count, device)
    many = ManySpec(UnitSpec.of(spec), outliers, inputs, kind)
    return Call(
        staging_of(many.unit, kind, device),
        launcher_of(many, device),
        adding_of(kind, device),
        inputs,
        ceil_div(count, inputs),
        ceil_div(spec.out_features, many.rows),
        splits,
        padded_columns(spec),
        many.bytes,
    )


def division_of(spec: MatrixSpec, count: int, device: torch.device) -> tuple[int, int]:
    """Inputs of a block, and splits of the columns: what takes least time, about."""
    at_once = torch.cuda.get_device_properties(device).multi_processor_count
    units = units_of(spec)

    def microseconds(way: tuple[int, int]) -> float:
        inputs, splits = way
        rows = ManySpec(UnitSpec.of(spec), True, inputs, torch.float16).rows
        blocks = ceil_div(spec.out_features, rows) * ceil_div(count, inputs) * splits
        strips = UNIT_STRIPS * ceil_div(units, splits)
        block = strips * STRIP_MICROSECONDS[inputs] + BLOCK_MICROSECONDS
        shares = splits * spec.out_features * count if splits > 1 else 0
        return ceil_div(blocks, at_once) * block + shares * SHARE_MICROSECONDS

    inputs = inputs_that_fit(UnitSpec.of(spec))
    return min(product(inputs, range(1, units + 1)), key=microseconds)


@cache
def launcher_of(spec: ManySpec, device: torch.device) -> Launcher:
    """The product, compiled for a GPU."""
    return compiled(partial(many_kernel, spec), SIGNATURE, device, spec.threads, spec.bytes)


@cache
def staging_of(unit: UnitSpec, kind: torch.dtype, device: torch.device) -> Launcher:
    """The kernel that stages inputs, compiled for a GPU."""
    spec = KernelSpec(unit, kind, STAGING_WARPS, 1, True)
    return compiled(partial(cores_kernel, spec), CORES, device, spec.threads, shared_memory(device))


@cache
def adding_of(kind: torch.dtype, device: torch.device) -> Launcher:
    """The kernel that adds shares up, compiled for a GPU."""
    return compiled(partial(shares_kernel, kind), SHARES, device, SHARES_THREADS, 0)


def compiled(
    make: partial, signature: Any, device: torch.device, threads: int, shared_bytes: int
) -> Launcher:
    """What make() returns, for a GPU; it starts before the kernel ahead of it has ended."""
    return Launcher(make, signature, device, threads=threads, shared_bytes=shared_bytes, early=True)
