"""A prepared weight (prepared.py) back to numbers on a GPU, for products with many inputs.

    out[row, j] = scale[row, g] * (code[row, j] - zero[row, g]) + outlier[row, j]
                  with g = j // group_size

    out    fp32, fp16 or bf16 [rows, columns], columns as they are stored: permute the inputs

A warp takes a unit of a tile: 16 rows, 32 groups. It copies it to shared memory and writes it, an
octet at a time, through shared memory once more (unit_numbers_cuda.py). Weights that have an
outlier are written again, from float32, so that each is rounded once: the lanes look through the
run for entries of the unit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import types

from ..format.layout import ceil_div
from .launch import Launcher, numba_cuda
from .prepared import (
    HALF,
    LANES,
    OCTET,
    PAIRS,
    QUARTERS,
    PreparedMatrix,
    pair_places,
)
from .ptx import (
    copies_done,
    divide,
    end_of_copies,
    load_int32,
    shared_address,
    shared_int32,
    shared_uint16,
    store_float,
    store_uint16,
)
from .runs import HALF_MASK, HEADER_WORDS, SEGMENT_COLUMNS, TILE_ROWS
from .scalars import decoded_statistic, float_to_bfloat, float_to_half, half_to_float, weight_of
from .stream_cuda import WEIGHT, addresses, run_of, unit_filler
from .unit_cuda import LOAD_BYTES, WORD_BYTES, UnitSpec
from .unit_numbers_cuda import Copying, unit_writer

__all__ = ["SIGNATURE", "dequantize_kernel", "dequantize_stored"]

cuda = numba_cuda()  # only those who have tensors on a GPU import this module

WARPS_PER_SM = {2: 24, 4: 16}
"""Bytes of a number -> for how many warps a multiprocessor's registers are; half of them hold the
numbers of groups of 32."""
MOST_BYTES = 12 * 1024  # of shared memory a warp, where a block has eight: some GPUs have 99 KB
NIBBLE = 4  # bits of an entry of a table in a number
int32: Any = np.int32

SIGNATURE = (WEIGHT, types.int64, types.int32)


def dequantize_stored(weight: PreparedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """W_hat [out_features, in_features] of a dtype, columns in stored order; rows may lie apart."""
    spec = weight.spec
    unit = UnitSpec.of(spec)
    width = spec.groups * spec.group_size
    out = torch.empty(spec.out_features, width, dtype=dtype, device=weight.device)
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    blocks = ceil_div(weight.tiles * weight.units, warps_of(unit, dtype))
    launcher = launcher_of(unit, dtype, weight.device)
    launcher.launch(
        blocks, shared_bytes(unit, dtype), stream, *addresses(weight), out.data_ptr(), width
    )
    return out[:, : spec.in_features]


@cache
def launcher_of(unit: UnitSpec, dtype: torch.dtype, device: torch.device) -> Launcher:
    """The kernel, compiled for a GPU."""
    return Launcher(
        dequantize_kernel(unit, dtype),
        SIGNATURE,
        device,
        threads=warps_of(unit, dtype) * LANES,
        shared_bytes=shared_bytes(unit, dtype),
        early=False,
    )


def warps_of(unit: UnitSpec, dtype: torch.dtype) -> int:
    """Of a block."""
    return 8 if dtype.itemsize == 2 and warp_bytes(unit, dtype) <= MOST_BYTES else 4


def warp_bytes(unit: UnitSpec, dtype: torch.dtype) -> int:
    """Of shared memory: a warp's unit, and what its numbers pass through."""
    return unit.bytes + Copying(unit, dtype).bytes


def shared_bytes(unit: UnitSpec, dtype: torch.dtype) -> int:
    """Of a block."""
    return warps_of(unit, dtype) * warp_bytes(unit, dtype)


@cache
def dequantize_kernel(spec: UnitSpec, dtype: torch.dtype) -> Any:
    """kernel(weight, out, width): out is the address of [rows, width], whole groups."""
    fill_unit, wait, write_unit = unit_filler(spec), copies_done(0), unit_writer(spec, dtype)
    add_outliers, unit_bytes = outlier_adder(spec, dtype), spec.bytes
    size, copying = dtype.itemsize, Copying(spec, dtype)
    loads_shift, load_columns = copying.loads.bit_length() - 1, LOAD_BYTES // size
    rows_at_once, between_bytes = copying.rows, copying.bytes
    columns = spec.columns

    warps = warps_of(spec, dtype)
    blocks_per_sm = WARPS_PER_SM[size] // (2 if spec.group_size == 32 else 1) // warps

    @cuda.jit(launch_bounds=(warps * LANES, blocks_per_sm))
    def kernel(weight, out, width):
        zero = shared_address(cuda.shared.array(0, np.uint16))
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        index = int32(cuda.blockIdx.x * warps + warp)
        tile = divide(index, weight.units)
        unit, at = int32(index - tile * weight.units), int32(zero + warp * unit_bytes)
        if tile < weight.tiles:
            fill_unit(weight, tile, unit, at, lane)
            end_of_copies()
            wait()
            cuda.syncwarp()
            between = int32(zero + warps * unit_bytes + warp * between_bytes)
            row = int32(tile * TILE_ROWS + (lane >> loads_shift))
            load = int32(lane & ((1 << loads_shift) - 1))
            column = int32(unit * columns + load * load_columns)
            place, step = out + size * (np.int64(row) * width + column), size * rows_at_once * width
            rows, left = int32(weight.rows - row), int32(width - column)
            write_unit(at, lane, between, place, np.int64(step), rows, left)
            cuda.syncwarp()
            if weight.runs:
                add_outliers(weight, out, width, tile, unit, at, lane)

    return kernel


# --- Outliers


def outlier_adder(spec: UnitSpec, dtype: torch.dtype) -> Any:
    """add_outliers(weight, out, width, tile, unit, at, lane): the unit's, each from float32."""
    columns, group_size, size = spec.columns, spec.group_size, dtype.itemsize
    segment_units = SEGMENT_COLUMNS // columns
    number_at = number_function(spec)
    convert = {torch.float16: float_to_half, torch.bfloat16: float_to_bfloat}.get(dtype)

    @cuda.jit(device=True, forceinline=True)
    def put(place, total):
        if convert is None:
            store_float(place, total)
        else:
            store_uint16(place, convert(total))

    @cuda.jit(device=True, forceinline=True)
    def row_of(run, k):
        row = int32(0)
        for word in range(HEADER_WORDS):
            ends = load_int32(run + WORD_BYTES * word)
            row = int32(row + (1 if ends & HALF_MASK <= k else 0))
            row = int32(row + (1 if ends >> HALF & HALF_MASK <= k else 0))
        return row

    @cuda.jit(device=True, forceinline=True)
    def add_outliers(weight, out, width, tile, unit, at, lane):
        segment = divide(unit, segment_units)
        first = int32((unit - segment * segment_units) * columns)
        start, loads = run_of(weight, tile, segment)
        run, k = weight.runs + np.int64(start) * LOAD_BYTES, lane
        count = int32(0)
        if loads:
            count = int32(load_int32(run + WORD_BYTES * (HEADER_WORDS - 1)) >> HALF & HALF_MASK)
        while k < count:
            entry = load_int32(run + WORD_BYTES * np.int64(HEADER_WORDS + k))
            column = int32((entry & HALF_MASK) - first)
            if 0 <= column < columns:
                row, group = row_of(run, k), divide(column, group_size)
                value = half_to_float(np.uint16(entry >> HALF & HALF_MASK))
                total = number_at(at, row, group, int32(column - group * group_size)) + value
                in_row = np.int64(unit) * columns + column
                place = (np.int64(tile) * TILE_ROWS + row) * width + in_row
                put(out + size * place, total)
            k = int32(k + LANES)

    return add_outliers


def number_function(spec: UnitSpec) -> Any:
    """number_at(at, row, group, k): the weight of column k of a group of the unit at `at`."""
    code_bytes = spec.blocks * spec.block_bytes
    pairs, octets, quarter_columns = spec.pairs, spec.octets, spec.group_size // QUARTERS
    block_bytes, record_bytes = spec.block_bytes, spec.record_bytes
    code_field = field_function(spec.bits, LANES * LOAD_BYTES)
    stat_field = field_function(spec.stat_bits, LANES * WORD_BYTES)

    @cuda.jit(device=True, forceinline=True)
    def statistic(at, row, group, which):
        octet, in_octet = int32(group >> 3), int32(group & (OCTET - 1))
        lane = int32((row & 7) * 4 + (in_octet >> 1))
        words = int32(at + code_bytes + lane * WORD_BYTES)
        code = stat_field(words, int32(octet * 4 + (row >> 3) * 2 + which), int32(in_octet & 1))
        second = int32(at + record_bytes + (octet * 4 + (in_octet >> 1)) * LOAD_BYTES)
        second = int32(second + which * (2 * WORD_BYTES) + (in_octet & 1) * 2)
        step = half_to_float(shared_uint16(second))
        base = half_to_float(shared_uint16(int32(second + WORD_BYTES)))
        return decoded_statistic(np.float32(code), step, base)

    @cuda.jit(device=True, forceinline=True)
    def number_at(at, row, group, k):
        octet, in_octet = int32(group >> 3), int32(group & (OCTET - 1))
        block = divide(octet, octets)
        octet = int32(octet - block * octets)
        lane = int32((row & 7) * 4 + (in_octet & 3))
        quarter = divide(k, quarter_columns)
        k = int32(k - quarter * quarter_columns)
        words = int32(at + block * block_bytes + lane * LOAD_BYTES + quarter * WORD_BYTES)
        pair = int32((octet * pairs + (k >> 1)) * 4 + (in_octet >> 2) * 2 + (row >> 3))
        code = np.float32(code_field(words, pair, int32(k & 1)))
        return weight_of(code, statistic(at, row, group, 0), statistic(at, row, group, 1))

    return number_at


def field_function(bits: int, step: int) -> Any:
    """field(words, pair, half) -> the code in a half of a pair, of words `step` bytes apart."""
    places = [pair_places(bits, pair) for pair in range(PAIRS)]
    whole = [place[0] if len(place) == 1 else (0, 0, 0, 0) for place in places]
    word_of = [table([place[0] for place in whole[half : half + 8]]) for half in (0, 8)]
    shift_of = [table([place[1] for place in whole[half : half + 8]]) for half in (0, 8)]
    (low_word, high_word), (low_shift, high_shift) = word_of, shift_of
    [spread] = [pair for pair in range(PAIRS) if len(places[pair]) > 1] or [-1]
    max_code, top = (1 << bits) - 1, HALF - 1

    @cuda.jit(device=True, forceinline=True)
    def entry(low, high, pair):
        return int32((high if pair & 8 else low) >> NIBBLE * (pair & 7) & 15)

    @cuda.jit(device=True, forceinline=True)
    def field(words, pair, half):
        if pair == spread:
            code = int32(0)
            for word in range(bits):
                bit = shared_int32(int32(words + word * step)) >> top + HALF * half & 1
                code = int32(code | bit << word)
            return code
        word, shift = entry(low_word, high_word, pair), entry(low_shift, high_shift, pair)
        return int32(shared_int32(int32(words + word * step)) >> shift + HALF * half & max_code)

    return field


def table(entries: list[int]) -> np.int64:
    """Eight numbers below 16 as one."""
    return np.int64(sum(entry << NIBBLE * i for i, entry in enumerate(entries)))
