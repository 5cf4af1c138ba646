"""What a product makes of its one input while it stages it (feed.py): device functions.

    ratio_of    what all numbers are multiplied by: of a norm, 1 / sqrt(mean(x^2) + eps)
    words_of    eight numbers of x, made into those of the product: two to a word
    half_of     one of them

x and beside: addresses of fp16 or bf16, which 16 divides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .feed import GATE, NORM
from .launch import numba_cuda
from .prepared import ALL_LANES, LANES
from .ptx import (
    exp2,
    inverse_root,
    load_uint16,
    load_words,
    pair_multiplier,
    pair_rounder,
    reciprocal,
)
from .scalars import bfloat_to_float, half_to_float
from .stream_cuda import KernelSpec
from .unit_cuda import HALF_BYTES, LOAD_BYTES

__all__ = ["half_function", "ratio_function", "words_function"]

cuda = numba_cuda()

LOG2_E = 1.4426950408889634
LARGEST_POWER = 60  # of 2, in a denominator: two of them may be multiplied
HALF_MASK = 0xFFFF
int32: Any = np.int32
uint16: Any = np.uint16
float32: Any = np.float32


def words_function(spec: KernelSpec) -> Any:
    """words_of(x, beside, ratio, i) -> the i-th eight numbers, as four words."""
    alone, made = spec.feed is None, word_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def words_of(x, beside, ratio, i):
        words = load_words(x + LOAD_BYTES * i)
        if alone:
            return words
        others = load_words(beside + LOAD_BYTES * i)
        return (
            made(words[0], others[0], ratio),
            made(words[1], others[1], ratio),
            made(words[2], others[2], ratio),
            made(words[3], others[3], ratio),
        )

    return words_of


def half_function(spec: KernelSpec) -> Any:
    """half_of(x, beside, ratio, i) -> the i-th number, uint16."""
    alone, made = spec.feed is None, word_function(spec)

    @cuda.jit(device=True, forceinline=True)
    def half_of(x, beside, ratio, i):
        half = load_uint16(x + HALF_BYTES * i)
        if alone:
            return half
        other = load_uint16(beside + HALF_BYTES * i)
        return uint16(made(int32(half), int32(other), ratio) & HALF_MASK)

    return half_of


def word_function(spec: KernelSpec) -> Any:
    """made(word, other, ratio) -> word: two numbers of x, and what lies beside them."""
    bfloat, gates = spec.kind == torch.bfloat16, spec.feed == GATE
    to_float, kind = (bfloat_to_float, "bf16") if bfloat else (half_to_float, "f16")
    rounded_pair, multiplied_pairs = pair_rounder(kind), pair_multiplier(kind)

    @cuda.jit(device=True, forceinline=True)
    def made(word, other, ratio):
        low, high = to_float(uint16(word & HALF_MASK)), to_float(uint16(word >> 16 & HALF_MASK))
        if gates:
            one, two = denominator(low), denominator(high)
            both = reciprocal(one * two)
            low, high = low * (both * two), high * (both * one)
        else:
            low, high = low * ratio, high * ratio
        return multiplied_pairs(rounded_pair(low, high), other)

    return made


@cuda.jit(device=True, forceinline=True)
def denominator(number):
    """1 + exp(-number), at most 2^LARGEST_POWER."""
    return float32(1) + exp2(min(number * float32(-LOG2_E), float32(LARGEST_POWER)))


def ratio_function(spec: KernelSpec) -> Any:
    """ratio_of(weight, x, eps, thread) -> of a norm, for all threads of a block; else 1."""
    bfloat = spec.kind == torch.bfloat16
    to_float = bfloat_to_float if bfloat else half_to_float
    threads, sum_block = spec.threads, block_summer(spec)

    @cuda.jit(device=True, forceinline=True)
    def one(weight, x, eps, thread):
        return float32(1)

    @cuda.jit(device=True, forceinline=True)
    def square(half):
        number = to_float(uint16(half & HALF_MASK))
        return number * number

    @cuda.jit(device=True, forceinline=True)
    def ratio_of(weight, x, eps, thread):
        total = float32(0)
        i, whole = thread, int32(weight.columns >> 3)
        while i < whole:
            words = load_words(x + LOAD_BYTES * i)
            for k in range(4):
                total += square(words[k]) + square(words[k] >> 16)
            i = int32(i + threads)
        i = int32(8 * whole + thread)
        while i < weight.columns:
            total += square(int32(load_uint16(x + HALF_BYTES * i)))
            i = int32(i + threads)
        mean = sum_block(total, thread) * reciprocal(float32(weight.columns))
        return inverse_root(mean + eps)

    return ratio_of if spec.feed == NORM else one


def block_summer(spec: KernelSpec) -> Any:
    """sum_block(number, thread) -> the sum of all threads' numbers."""
    warps = spec.warps

    @cuda.jit(device=True, forceinline=True)
    def sum_block(number, thread):
        sums = cuda.shared.array(warps, np.float32)
        for distance in (16, 8, 4, 2, 1):
            number += cuda.shfl_xor_sync(ALL_LANES, number, distance)
        if thread & (LANES - 1) == 0:
            sums[thread >> 5] = number
        cuda.syncthreads()
        total = float32(0)
        for warp in range(warps):
            total += sums[warp]
        return total

    return sum_block
