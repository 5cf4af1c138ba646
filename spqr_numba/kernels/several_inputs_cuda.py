"""How a cluster of blocks stages several inputs: each block a share of the columns, for all blocks.

    x'  fp16     [inputs / 8, columns, 8 inputs]    permuted; of a bf16 input: over a power of two
    -X  float32  [inputs / 8, groups / 2, 8 inputs, 2 groups]    its sums, in units of 2^-24

A thread reads two columns of all inputs, and writes the eight numbers of a column at once: 16
bytes, into the shared memory of each block whose part of the columns (stream_cuda.py) has the
column's place. So an input is read once a cluster, and its permutation costs no more than writing.
In a group the columns are in the order in which a product of tensor cores takes them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from .bulk_cuda import BARRIER_BYTES
from .launch import numba_cuda
from .prepared import ALL_LANES, LANES
from .ptx import (
    arrive_in_cluster,
    divider,
    halves_taker,
    load_int32,
    load_uint16,
    load_word,
    of_rank,
    pair_loader,
    pair_rounder,
    publish_in_cluster,
    shared_float,
    shared_int32,
    to_cluster_int32,
    to_cluster_load,
    to_shared_float,
    to_shared_int32,
    to_shared_load,
    wait_for_cluster,
)
from .scalars import bfloat_to_float, power_of_two
from .staging_cuda import exponent_for, larger_exponent
from .stream_cuda import KernelSpec, columns_function, parts_function
from .unit_cuda import HALF_BYTES, LOAD_BYTES, WORD_BYTES, put_floats
from .unit_several_cuda import AT_ONCE, pair_summer

__all__ = [
    "FACTORS",
    "INPUTS_BEGIN",
    "MOST_INPUTS",
    "SHARES_THERE",
    "cluster_functions",
    "factor_finder",
    "several_stager",
    "summer",
]

cuda = numba_cuda()

MOST_RANKS, MOST_INPUTS = 8, 16
FACTORS = WORD_BYTES * MOST_RANKS * MOST_INPUTS  # behind exponents [ranks, inputs]
DIVIDED = FACTORS + WORD_BYTES * MOST_INPUTS  # one over the factors
SHARES_THERE = DIVIDED + WORD_BYTES * MOST_INPUTS  # a barrier (several_cuda.py)
INPUTS_BEGIN = SHARES_THERE + 2 * BARRIER_BYTES  # where x' lies
int32: Any = np.int32
uint32: Any = np.uint32


def cluster_functions(spec: KernelSpec) -> tuple[Any, Any, Any]:
    """arrive(), publish(), wait(): for the threads of the cluster, which may be one block. Before
    others read what a thread has written, it must publish, and not merely arrive."""
    if spec.ranks > 1:
        return arrive_in_cluster, publish_in_cluster, wait_for_cluster

    @cuda.jit(device=True, forceinline=True)
    def arrive():
        pass

    @cuda.jit(device=True, forceinline=True)
    def wait():
        cuda.syncthreads()

    return arrive, arrive, wait


def several_stager(spec: KernelSpec, begin_copying: Any) -> Any:
    """stage(weight, plan, x, step, count, work, part, first, slab, zeros): the block's share of a
    slab's x', which it must publish; begin_copying: as for `scatterer`.

    x: address of fp16 or bf16 [count, columns], `step` bytes from row to row. From `count` on an
    input is like the last. When it begins the cluster's blocks must be done with the slab before.
    """
    columns_of, clear_padding = columns_function(spec), padding(spec)
    scatter = scatterer(spec, begin_copying)

    @cuda.jit(device=True, forceinline=True)
    def stage(weight, plan, x, step, count, work, part, first, slab, zeros):
        scatter(weight, plan, x, step, count, work, part, first, slab, zeros)
        begin, end = columns_of(weight, part)
        clear_padding(weight, plan, begin, end, work.thread, zeros)

    return stage


def padding(spec: KernelSpec) -> Any:
    """clear_padding(weight, plan, first, end, thread, zeros): zeros behind the last column."""
    threads, place_of, zero = spec.threads, place_function(spec), int32(0)
    eights = spec.unit.inputs // AT_ONCE

    @cuda.jit(device=True, forceinline=True)
    def clear_padding(weight, plan, first, end, thread, zeros):
        column = int32(max(first, weight.columns) + thread)
        while column < end:
            place = int32(zeros + place_of(int32(column - first)))
            for eight in range(eights):
                at = int32(place + LOAD_BYTES * eight * plan.columns)
                to_shared_load(at, zero, zero, zero, zero)
            column = int32(column + threads)

    return clear_padding


@cache
def place_function(spec: KernelSpec) -> Any:
    """place_of(column) -> where x' of the first eight inputs lies; columns of the part.

    Of a group of 16 an mma's operand has 0, 1, 4, 5, 8 ... and then 2, 3, 6, 7 ..., where 4t ...
    4t + 3 are the quarter of lane t.
    """
    spread = spec.unit.group_size > AT_ONCE

    @cuda.jit(device=True, forceinline=True)
    def place_of(column):
        if spread:
            column = int32((column & ~14) | (column & 12) >> 1 | (column & 2) << 2)
        return int32(INPUTS_BEGIN + LOAD_BYTES * column)

    return place_of


# --- From rows of x to columns


def scatterer(spec: KernelSpec, begin_copying: Any) -> Any:
    """scatter(weight, plan, x, step, count, work, part, first, slab, zeros): the block's share of
    columns. A thread has asked for what it takes next but one before it waits for what it takes;
    and then begin_copying(weight, plan, work, part, first, zeros) asks for much more, which would
    keep it waiting."""
    threads, at_once = spec.threads, 2 * AT_ONCE // spec.unit.inputs
    load, put, turn = tasks_loader(spec), tasks_putter(spec), at_once * threads

    @cuda.jit(device=True, forceinline=True)
    def scatter(weight, plan, x, step, count, work, part, first, slab, zeros):
        begin = int32(work.rank * plan.pairs)
        end = int32(min(begin + plan.pairs, (weight.columns + 1) >> 1))
        pair = int32(begin + work.thread)
        loaded = load(weight, x, step, count, pair)
        ahead = loaded
        if pair + turn < end:
            ahead = load(weight, x, step, count, int32(pair + turn))
        begin_copying(weight, plan, work, part, first, zeros)
        while pair < end:
            put(weight, plan, slab, pair, end, loaded, zeros)
            pair, loaded = int32(pair + turn), ahead
            if pair + turn < end:
                ahead = load(weight, x, step, count, int32(pair + turn))

    return scatter


def tasks_loader(spec: KernelSpec) -> Any:
    """load(weight, x, step, count, pair) -> words and targets of a pair of columns and, of eight
    inputs, of that as many on as there are threads: sixteen words at a time."""
    inputs, threads, load_pair = spec.unit.inputs, spec.threads, pair_loader(spec.unit.inputs)

    @cuda.jit(device=True, forceinline=True)
    def load_task(weight, x, step, count, pair):
        column = int32(2 * min(pair, (weight.columns - 1) >> 1))
        return load_pair(x, step, count, column), targets_of(weight, column)

    @cuda.jit(device=True, forceinline=True)
    def load(weight, x, step, count, pair):
        task = load_task(weight, x, step, count, pair)
        if inputs == AT_ONCE:
            return task + load_task(weight, x, step, count, int32(pair + threads))
        return task

    return load


def tasks_putter(spec: KernelSpec) -> Any:
    """put(weight, plan, slab, pair, end, loaded, zeros): what `tasks_loader` loaded, to x'."""
    two, threads, put_pair = spec.unit.inputs == AT_ONCE, spec.threads, pair_putter(spec)

    @cuda.jit(device=True, forceinline=True)
    def put(weight, plan, slab, pair, end, loaded, zeros):
        put_pair(weight, plan, slab, pair, loaded[0], loaded[1], zeros)
        if two and pair + threads < end:
            put_pair(weight, plan, slab, int32(pair + threads), loaded[2], loaded[3], zeros)

    return put


@cuda.jit(device=True, forceinline=True)
def targets_of(weight, column):
    """Where a column and the next go, in the halves of a word."""
    if not weight.target:
        return int32(column | (column + 1) << 16)
    if column + 1 < weight.columns:
        return load_int32(weight.target + HALF_BYTES * column)
    return int32(load_uint16(weight.target + HALF_BYTES * column))


def pair_putter(spec: KernelSpec) -> Any:
    """put_pair(weight, plan, slab, pair, words, targets, zeros): two columns to x'."""
    lower, upper = column_maker(spec, 0), column_maker(spec, 1)
    put_column = column_putter(spec)

    @cuda.jit(device=True, forceinline=True)
    def put_pair(weight, plan, slab, pair, words, targets, zeros):
        put_column(weight, plan, slab, int32(targets & 0xFFFF), lower(words, zeros), zeros)
        if 2 * pair + 1 < weight.columns:
            target = int32(targets >> 16 & 0xFFFF)
            put_column(weight, plan, slab, target, upper(words, zeros), zeros)

    return put_pair


def column_putter(spec: KernelSpec) -> Any:
    """put_column(weight, plan, slab, target, words, zeros): to each block that needs it."""
    ranks, part_of, place_of = spec.ranks, parts_function(spec), place_function(spec)
    columns_of, put_eights = columns_function(spec), eights_putter(spec)

    @cuda.jit(device=True, forceinline=True)
    def put_column(weight, plan, slab, target, words, zeros):
        from_zero = place_of(target)  # 16 divides where parts begin
        for rank in range(ranks):
            first, end = columns_of(weight, part_of(weight, plan, int32(rank), slab))
            if uint32(target - first) < uint32(end - first):
                put_eights(plan, int32(rank), int32(from_zero - LOAD_BYTES * first), words, zeros)

    return put_column


def eights_putter(spec: KernelSpec) -> Any:
    """put_eights(plan, rank, place, words, zeros): a column of all inputs, to a block."""
    ranks, eights = spec.ranks, spec.unit.inputs // AT_ONCE
    put_load = to_cluster_load if ranks > 1 else to_shared_load

    @cuda.jit(device=True, forceinline=True)
    def put_eights(plan, rank, place, words, zeros):
        if ranks > 1:
            zeros = of_rank(zeros, rank)
        put_load(int32(zeros + place), words[0], words[1], words[2], words[3])
        if eights > 1:
            at = int32(zeros + place + LOAD_BYTES * plan.columns)
            put_load(at, words[4], words[5], words[6], words[7])

    return put_eights


@cache
def column_maker(spec: KernelSpec, half: int) -> Any:
    """column_of(words, zeros) -> words of a column: of inputs' words the lower or the upper half,
    two to a word; a bf16 input over its power of two."""
    take, rounded, eights = halves_taker(half), pair_rounder("f16"), spec.unit.inputs // AT_ONCE

    @cuda.jit(device=True, forceinline=True)
    def column_of_halves(words, zeros):
        return take(words)

    @cuda.jit(device=True, forceinline=True)
    def column_of_bfloats(words, zeros):
        words, divided = take(words), int32(zeros + DIVIDED)
        if eights == 1:
            return scaled_four(words, divided)
        behind = int32(divided + WORD_BYTES * AT_ONCE)
        return scaled_four(words[:4], divided) + scaled_four(words[4:], behind)

    @cuda.jit(device=True, forceinline=True)
    def scaled_four(words, divided):
        return (
            scaled(words[0], divided),
            scaled(words[1], int32(divided + 2 * WORD_BYTES)),
            scaled(words[2], int32(divided + 4 * WORD_BYTES)),
            scaled(words[3], int32(divided + 6 * WORD_BYTES)),
        )

    @cuda.jit(device=True, forceinline=True)
    def scaled(word, divided):
        low = bfloat_to_float(np.uint16(word & 0xFFFF)) * shared_float(divided)
        high = bfloat_to_float(np.uint16(word >> 16 & 0xFFFF))
        return rounded(low, high * shared_float(int32(divided + WORD_BYTES)))

    return column_of_bfloats if spec.kind == torch.bfloat16 else column_of_halves


# --- Sums, and the factors of bf16


def summer(spec: KernelSpec) -> Any:
    """sum_groups(weight, plan, work, part, zeros): -X of a part, two groups at a time; a warp waits
    for four such pairs together."""
    warps, sum_pair = spec.warps, pair_summer(spec.unit.group_size)
    pair_columns, eights = 2 * spec.unit.group_size, spec.unit.inputs // AT_ONCE
    pair_bytes, divide_by_columns = 2 * WORD_BYTES * AT_ONCE, divider(pair_columns)
    columns_of, begin = columns_function(spec), INPUTS_BEGIN

    @cuda.jit(device=True, forceinline=True)
    def sum_groups(weight, plan, work, part, zeros):
        first, end = columns_of(weight, part)
        pairs, most = divide_by_columns(int32(end - first)), divide_by_columns(plan.columns)
        for eight in range(eights):
            x = int32(zeros + begin + LOAD_BYTES * eight * plan.columns)
            out = int32(zeros + WORD_BYTES * plan.sums + pair_bytes * eight * most)
            sum_pairs(x, out, work.warp, pairs, work.lane)

    @cuda.jit(device=True, forceinline=True)
    def sum_pairs(x, out, pair, pairs, lane):
        while pair < pairs:
            second, third = int32(pair + warps), int32(pair + 2 * warps)
            fourth = int32(pair + 3 * warps)
            sums = sum_of(x, pair, pairs, lane), sum_of(x, second, pairs, lane)
            others = sum_of(x, third, pairs, lane), sum_of(x, fourth, pairs, lane)
            put(out, pair, pairs, sums[0], lane)
            put(out, second, pairs, sums[1], lane)
            put(out, third, pairs, others[0], lane)
            put(out, fourth, pairs, others[1], lane)
            pair = int32(pair + 4 * warps)

    @cuda.jit(device=True, forceinline=True)
    def sum_of(x, pair, pairs, lane):
        return sum_pair(int32(x + LOAD_BYTES * pair_columns * min(pair, pairs - 1)), lane)

    @cuda.jit(device=True, forceinline=True)
    def put(out, pair, pairs, sums, lane):
        if lane < 4 and pair < pairs:
            put_floats(int32(out + pair_bytes * pair + LOAD_BYTES * lane), sums)

    return sum_groups


def factor_finder(spec: KernelSpec) -> Any:
    """find_factors(weight, plan, x, step, count, work, zeros): what to multiply results with.

    A bf16 input is divided by a power of two, that it fits into fp16; of fp16 there is none. All
    blocks of the cluster must have started.
    """
    _, publish, wait = cluster_functions(spec)
    find_own, inputs, ranks = exponent_finder(spec), spec.unit.inputs, spec.ranks

    @cuda.jit(device=True, forceinline=True)
    def nothing(weight, plan, x, step, count, work, zeros):
        pass

    @cuda.jit(device=True, forceinline=True)
    def find_factors(weight, plan, x, step, count, work, zeros):
        find_own(weight, plan, x, step, count, work, zeros)
        publish()
        wait()
        if work.thread < inputs:
            found = int32(1)
            for rank in range(ranks):
                place = int32(zeros + WORD_BYTES * (rank * MOST_INPUTS + work.thread))
                found = int32(max(found, shared_int32(place)))
            place, exponent = int32(zeros + WORD_BYTES * work.thread), exponent_for(found)
            to_shared_float(int32(place + FACTORS), power_of_two(exponent))
            to_shared_float(int32(place + DIVIDED), power_of_two(int32(-exponent)))
        cuda.syncthreads()

    return find_factors if spec.kind == torch.bfloat16 else nothing


def exponent_finder(spec: KernelSpec) -> Any:
    """find_own(...): the largest exponents in the block's columns of each input, a warp for an
    input, to all blocks of the cluster."""
    warps, inputs, ranks = spec.warps, spec.unit.inputs, spec.ranks

    @cuda.jit(device=True, forceinline=True)
    def largest(weight, plan, x, work):
        pair, found = int32(work.rank * plan.pairs + work.lane), int32(1)
        end = int32(min((work.rank + 1) * plan.pairs, (weight.columns + 1) >> 1))
        while pair < end:
            word = load_word(x + WORD_BYTES * pair)
            if 2 * pair + 1 == weight.columns:
                word = int32(word & 0xFFFF)
            found = larger_exponent(found, word)
            pair = int32(pair + LANES)
        for distance in (16, 8, 4, 2, 1):
            found = int32(max(found, int32(cuda.shfl_xor_sync(ALL_LANES, found, distance))))
        return found

    @cuda.jit(device=True, forceinline=True)
    def find_own(weight, plan, x, step, count, work, zeros):
        own = work.warp
        while own < inputs:
            found = int32(1)
            if own < count:
                found = largest(weight, plan, x + np.int64(own) * step, work)
            place = int32(zeros + WORD_BYTES * (work.rank * MOST_INPUTS + own))
            if work.lane < ranks:
                if ranks == 1:
                    to_shared_int32(place, found)
                else:
                    to_cluster_int32(of_rank(place, work.lane), found)
            own = int32(own + warps)

    return find_own
