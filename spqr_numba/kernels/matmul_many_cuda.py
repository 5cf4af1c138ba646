"""The matrix product with many inputs on a Hopper GPU: planned, compiled and launched.

many_cuda.py has the kernel; staging_cuda.py what brings the inputs into its order.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ..format.layout import MatrixSpec, ceil_div
from .launch import Launcher, shared_memory
from .many_cuda import (
    BLOCKS_PER_SM,
    ROWS,
    SHARES,
    SIGNATURE,
    THREADS,
    ManySpec,
    many_kernel,
    shares_kernel,
)
from .prepared import PreparedMatrix, padded_columns, units_of
from .staging_cuda import CORES, ZERO_HALVES, cores_kernel
from .stream_cuda import KernelSpec, addresses
from .unit_cuda import HALF_BYTES, UnitSpec

__all__ = ["can_multiply_many", "multiply_many"]

INPUTS = (32, 64, 128)  # of a block
STAGING_WARPS = 16
HOPPER = 9  # the compute capability that has wgmma
BLOCK_UNITS = 1.2  # what begins and ends a block takes as long as so many units
UNIT_SUMS = 2**22  # that are written as shares and read again while a block walks a unit


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


def can_multiply_many(weight: PreparedMatrix) -> bool:
    """Whether the GPU has the instructions and the shared memory."""
    return _can_multiply_many(weight.spec, weight.device)


@cache
def _can_multiply_many(spec: MatrixSpec, device: torch.device) -> bool:
    """The same for all weights of a spec."""
    if torch.cuda.get_device_properties(device).major != HOPPER:
        return False
    unit, room = UnitSpec.of(spec), shared_memory(device)
    staged = HALF_BYTES * (ZERO_HALVES + padded_columns(spec))
    return ManySpec(unit, INPUTS[-1], torch.float16).bytes <= room and staged <= room


def multiply_many(
    x: torch.Tensor, weight: PreparedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Fill out [count, rows] with x W_hat^T + bias, W_hat rounded to fp16, on torch's current
    stream.

    x fp16 or bf16 [count, columns], each input contiguous at an address that 16 divides; bias
    [rows] or None and out, contiguous, of the same dtype. `can_multiply_many` must hold.
    """
    count, device = len(x), x.device
    call = make_call(weight.spec, x.dtype, count, device)
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
        grid = ceil_div(out.numel(), THREADS)
        sizes = count, weight.spec.out_features, call.splits
        call.adding.launch(grid, 0, stream, shares_at, operands[1], *results, *sizes)


@lru_cache(maxsize=4096)
def make_call(spec: MatrixSpec, kind: torch.dtype, count: int, device: torch.device) -> Call:
    """Choose how the work is divided, and compile the kernels."""
    inputs = next((n for n in INPUTS if n >= count), INPUTS[-1])
    many = ManySpec(UnitSpec.of(spec), inputs, kind)
    row_blocks, input_blocks = ceil_div(spec.out_features, ROWS), ceil_div(count, inputs)
    return Call(
        staging_of(many.unit, kind, device),
        launcher_of(many, device),
        adding_of(kind, device),
        inputs,
        input_blocks,
        row_blocks,
        splits_of(units_of(spec), row_blocks * input_blocks, spec.out_features * count, device),
        padded_columns(spec),
        many.bytes,
    )


def splits_of(units: int, blocks: int, sums: int, device: torch.device) -> int:
    """Of the columns: what takes least time, the sums of each split added."""
    at_once = BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count

    def cost(splits: int) -> float:
        shares = splits * sums / UNIT_SUMS if splits > 1 else 0
        return ceil_div(blocks * splits, at_once) * (ceil_div(units, splits) + BLOCK_UNITS) + shares

    return min(range(1, units + 1), key=cost)


@cache
def launcher_of(spec: ManySpec, device: torch.device) -> Launcher:
    """The product, compiled for a GPU."""
    return compiled(many_kernel(spec), SIGNATURE, device, THREADS, spec.bytes)


@cache
def staging_of(unit: UnitSpec, kind: torch.dtype, device: torch.device) -> Launcher:
    """The kernel that stages inputs, compiled for a GPU."""
    spec = KernelSpec(unit, kind, STAGING_WARPS, 1, False)
    return compiled(cores_kernel(spec), CORES, device, spec.threads, shared_memory(device))


@cache
def adding_of(kind: torch.dtype, device: torch.device) -> Launcher:
    """The kernel that adds shares up, compiled for a GPU."""
    return compiled(shares_kernel(kind), SHARES, device, THREADS, 0)


def compiled(
    kernel: Any, signature: Any, device: torch.device, threads: int, shared_bytes: int
) -> Launcher:
    """A kernel for a GPU, that starts when the one before it has ended."""
    return Launcher(
        kernel, signature, device, threads=threads, shared_bytes=shared_bytes, early=False
    )
