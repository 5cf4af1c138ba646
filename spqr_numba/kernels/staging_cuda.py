"""The inputs of a product as a GPU multiplies them: permuted, as fp16, beside the sums over groups.

    x'  fp16     [columns, padded to units]    of a bf16 input: over a power of two
    X   float32  [groups]                      in units of 2^-24

A block of threads stages one input in its shared memory. For one input each block of the product
does so for itself, for several a cluster does (several_inputs_cuda.py); for many a kernel here does
it once, into global memory, in cores of eight inputs (wgmma_cuda.py). Another brings them as they
are into the order of a weight that is dequantized (prepared_cuda.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types

from .feed_cuda import half_function, ratio_function, words_function
from .launch import numba_cuda
from .prepared import ALL_LANES, LANES
from .ptx import (
    divide,
    let_dependents_start,
    load_uint16,
    load_words,
    shared_address,
    store_float,
    to_shared_uint16,
    wait_for_dependencies,
    word_gatherer,
)
from .scalars import bfloat_to_float, float_to_half, power_of_two
from .stream_cuda import WEIGHT, KernelSpec
from .unit_cuda import HALF_BYTES, LOAD_BYTES, WORD_BYTES

__all__ = [
    "CORES",
    "ORDERED",
    "ZERO_HALVES",
    "cores_kernel",
    "exponent_for",
    "first_targets_function",
    "larger_exponent",
    "order_kernel",
    "padding_function",
    "staging_function",
]

cuda = numba_cuda()

ZERO_HALVES = 32  # before x', a largest group: what lanes read that multiply nothing
EXPONENT_BIAS = 127
LARGEST_EXPONENT = 14  # of the staged x of a bf16 input
MOST_EXPONENT = 100
int32: Any = np.int32

CORES = (WEIGHT, types.int64, *(types.int32,) * 3, types.int64, types.int64)
"""The signature of the kernel of `cores_kernel`."""

ORDERED = (WEIGHT, types.int64, types.int64)
"""The signature of the kernel of `order_kernel`."""


@cache
def cores_kernel(spec: KernelSpec) -> Any:
    """kernel(weight, x, step, count, inputs, staged, factors), a block for each input.

    x: address of fp16 or bf16 [count, columns], `step` bytes from row to row; inputs from `count`
    on are zero. staged: address of x' as fp16 [blocks of inputs, columns padded to units / 8,
    inputs, 8]. Of each strip, four groups, the columns are in the order in which lanes have them
    (strip_cuda.py): the i-th eight are columns 2i and 2i + 1 of each group.
    """
    threads, unit_columns, stage_own = spec.threads, spec.unit.columns, own_staging_function(spec)
    first_targets = first_targets_function(spec)
    group_bytes = HALF_BYTES * spec.unit.group_size
    shift, strip_bytes = (spec.unit.group_size // 2).bit_length() - 1, 4 * group_bytes
    early, in_strip = spec.early, (1 << shift) - 1
    gather = word_gatherer(*range(0, strip_bytes, group_bytes))

    @cuda.jit(launch_bounds=(threads, spec.resident))
    def kernel(weight, x, step, count, inputs, staged_out, factors_out):
        zeros = shared_address(cuda.shared.array(0, np.uint16))
        thread, own = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        targets = first_targets(weight, thread)
        if early:
            let_dependents_start()
            wait_for_dependencies()
        factor = stage_own(weight, x, step, count, own, thread, targets, zeros)
        start, eights = int32(zeros + HALF_BYTES * ZERO_HALVES), int32(weight.units * unit_columns)
        eights, block = int32(eights >> 3), divide(own, inputs)
        first = np.int64(block) * eights * inputs + int32(own - block * inputs)
        i = thread
        while i < eights:
            source = int32(start + (i >> shift) * strip_bytes + (i & in_strip) * WORD_BYTES)
            gather(staged_out + LOAD_BYTES * (first + np.int64(i) * inputs), source)
            i = int32(i + threads)
        if thread == 0:
            store_float(factors_out + 4 * own, factor)

    return kernel


@cache
def order_kernel(spec: KernelSpec) -> Any:
    """kernel(weight, x, ordered), a block for each input: addresses of [inputs, columns], of fp16
    or, in a spec of fp16 as well, of bf16; 8 divides columns."""
    threads, permute = spec.threads, permuting_function(spec)
    first_targets = first_targets_function(spec)
    copy = word_gatherer(*range(0, LOAD_BYTES, WORD_BYTES))

    @cuda.jit(launch_bounds=(threads, spec.resident))
    def kernel(weight, x, ordered):
        start = shared_address(cuda.shared.array(0, np.uint16))
        thread, one = int32(cuda.threadIdx.x), np.float32(1)
        distance = np.int64(cuda.blockIdx.x) * HALF_BYTES * weight.columns
        targets = first_targets(weight, thread)
        permute(weight, x + distance, x, one, one, start, thread, targets)
        cuda.syncthreads()
        i = thread
        while i < weight.columns >> 3:
            copy(ordered + distance + LOAD_BYTES * i, int32(start + LOAD_BYTES * i))
            i = int32(i + threads)

    return kernel


def own_staging_function(spec: KernelSpec) -> Any:
    """stage_own(weight, x, step, count, own, thread, targets, zeros) -> factor: input `own`, and
    what is behind its columns; all zeros where there is no such input."""
    threads, unit_columns = spec.threads, spec.unit.columns
    stage, clear_padding = staging_function(spec), padding_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def stage_own(weight, x, step, count, own, thread, targets, zeros):
        clear_padding(weight, thread, zeros)
        if own < count:
            at = x + np.int64(own) * step
            return stage(weight, at, at, np.float32(0), thread, targets, zeros)
        start, columns = int32(zeros + HALF_BYTES * ZERO_HALVES), int32(weight.units * unit_columns)
        i = thread
        while i < columns:
            to_shared_uint16(int32(start + HALF_BYTES * i), np.uint16(0))
            i = int32(i + threads)
        cuda.syncthreads()
        return np.float32(1)

    return stage_own


def staging_function(spec: KernelSpec) -> Any:
    """stage(weight, x, beside, eps, thread, targets, zeros) -> what to multiply results with.

    targets: `first_targets_function`'s. x', of what the spec's feed makes of x, lies behind the
    zeros for all threads of the block when it returns; `padding_function` is for what lies behind
    its columns.
    """
    ratio_of = ratio_function(spec)
    scale_of, permute = scale_function(spec), permuting_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def stage(weight, x, beside, eps, thread, targets, zeros):
        ratio = ratio_of(weight, x, eps, thread)
        exponent = scale_of(weight, x, beside, ratio, thread)
        start = int32(zeros + HALF_BYTES * ZERO_HALVES)
        factor = power_of_two(int32(-exponent))
        permute(weight, x, beside, ratio, factor, start, thread, targets)
        cuda.syncthreads()
        return power_of_two(exponent)

    return stage


def padding_function(spec: KernelSpec) -> Any:
    """clear_padding(weight, thread, zeros): zeros from the last column to the end of its unit."""
    threads, unit_columns = spec.threads, spec.unit.columns

    @cuda.jit(device=True, forceinline=True)
    def clear_padding(weight, thread, zeros):
        i, start = int32(weight.columns + thread), int32(zeros + HALF_BYTES * ZERO_HALVES)
        while i < weight.units * unit_columns:
            to_shared_uint16(int32(start + HALF_BYTES * i), np.uint16(0))
            i = int32(i + threads)

    return clear_padding


def scale_function(spec: KernelSpec) -> Any:
    """exponent_of(weight, x, beside, ratio, thread) -> the power of two by which the input is
    divided to fit into fp16."""
    threads, warps = spec.threads, spec.warps
    words_of, half_of = words_function(spec), half_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def nothing(weight, x, beside, ratio, thread):
        return int32(0)

    @cuda.jit(device=True, forceinline=True)
    def exponent_of(weight, x, beside, ratio, thread):
        largest = cuda.shared.array(warps, np.int32)
        found = int32(1)
        i, whole = thread, int32(weight.columns >> 3)
        while i < whole:
            words = words_of(x, beside, ratio, i)
            for k in range(4):
                found = larger_exponent(found, words[k])
            i = int32(i + threads)
        i = int32(8 * whole + thread)
        while i < weight.columns:
            found = larger_exponent(found, int32(half_of(x, beside, ratio, i)))
            i = int32(i + threads)
        for distance in (16, 8, 4, 2, 1):
            found = int32(max(found, int32(cuda.shfl_xor_sync(ALL_LANES, found, distance))))
        if thread & (LANES - 1) == 0:
            largest[thread >> 5] = found
        cuda.syncthreads()
        for other in range(warps):
            found = int32(max(found, largest[other]))
        return exponent_for(found)

    return exponent_of if spec.kind == torch.bfloat16 else nothing


@cuda.jit(device=True, forceinline=True)
def larger_exponent(found, word):
    """`found`, or one of the exponents, bias and all, of the two bf16 in a word."""
    return int32(max(found, int32(word >> 7 & 0xFF), int32(word >> 23 & 0xFF)))


@cuda.jit(device=True, forceinline=True)
def exponent_for(found):
    """The power of two by which an input is divided whose largest exponent, bias and all, is
    `found`."""
    exponent = found - EXPONENT_BIAS - LARGEST_EXPONENT
    return int32(min(max(exponent, -MOST_EXPONENT), MOST_EXPONENT))


@cache
def permuting_function(spec: KernelSpec) -> Any:
    """permute(weight, x, beside, ratio, factor, start, thread, targets): the input times a factor,
    as fp16, where `target` says; at first `targets`."""
    threads, bfloat = spec.threads, spec.kind == torch.bfloat16
    words_of, half_of = words_function(spec), half_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def put(start, target, half, factor):
        value = np.uint16(half & 0xFFFF)
        if bfloat:
            value = float_to_half(bfloat_to_float(value) * factor)
        to_shared_uint16(int32(start + HALF_BYTES * (target & 0xFFFF)), value)

    @cuda.jit(device=True, forceinline=True)
    def put_all(start, targets, words, factor):
        for k in range(4):
            put(start, targets[k], words[k], factor)
            put(start, targets[k] >> 16, words[k] >> 16, factor)

    @cuda.jit(device=True, forceinline=True)
    def permute(weight, x, beside, ratio, factor, start, thread, targets):
        i, whole = thread, int32(weight.columns >> 3)
        while i < whole:
            also = int32(min(i + threads, whole - 1))  # two at once, to wait for both together
            words, others = words_of(x, beside, ratio, i), words_of(x, beside, ratio, also)
            if i != thread:
                targets = targets_of(weight, i), targets_of(weight, also)
            put_all(start, targets[0], words, factor)
            put_all(start, targets[1], others, factor)
            i = int32(i + 2 * threads)
        i = int32(8 * whole + thread)
        while i < weight.columns:
            target = int32(load_uint16(weight.target + 2 * i)) if weight.target else int32(i)
            put(start, target, half_of(x, beside, ratio, i), factor)
            i = int32(i + threads)

    return permute


def first_targets_function(spec: KernelSpec) -> Any:
    """first_targets(weight, thread): those of the numbers that a thread permutes first, read while
    the input may not be there yet."""
    threads = spec.threads

    @cuda.jit(device=True, forceinline=True)
    def first_targets(weight, thread):
        last = int32((weight.columns >> 3) - 1)
        if thread <= last:
            also = int32(min(thread + threads, last))
            return targets_of(weight, thread), targets_of(weight, also)
        none = int32(0), int32(0), int32(0), int32(0)
        return none, none

    return first_targets


@cuda.jit(device=True, forceinline=True)
def targets_of(weight, i):
    """Where inputs 8i ... 8i + 7 go, two to a word."""
    if weight.target:
        return load_words(weight.target + 16 * i)
    start, step = 8 * i | (8 * i + 1) << 16, 0x00020002
    return int32(start), int32(start + step), int32(start + 2 * step), int32(start + 3 * step)
