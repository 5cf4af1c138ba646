"""A prepared weight (prepared.py) back to numbers on a GPU, for products with many inputs.

    out[row, j] = scale[row, g] * (code[row, j] - zero[row, g]) + outlier[row, j]
                  with g = j // group_size

    out    fp32, fp16 or bf16 [rows, columns], columns as they are stored: permute the inputs

A block of threads decodes one tile's unit: 16 rows, 32 groups. A thread decodes the scale and the
zero of a row's group, then its codes, to shared memory, from where they are written out in runs.
Weights that have an outlier are written once more, from float32, so that each is rounded once.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from ..format.layout import MatrixSpec
from .launch import array_of, numba_cuda, stream_of
from .prepared import (
    HALF,
    OCTET,
    PAIRS,
    QUARTERS,
    UNIT_GROUPS,
    PreparedMatrix,
    octets_and_pairs,
    pair_places,
)
from .runs import HALF_MASK, HEADER_WORDS, LOAD_WORDS, SEGMENT_COLUMNS, TILE_ROWS
from .scalars import decoded_statistic, float_to_bfloat, float_to_half, half_to_float, weight_of

__all__ = ["dequantize_stored"]

cuda = numba_cuda()  # only those who have tensors on a GPU import this module

THREADS = 256
BITS = {torch.float32: torch.float32, torch.float16: torch.uint16, torch.bfloat16: torch.uint16}
"""dtype of a weight -> dtype that a kernel writes it as."""


class Views(NamedTuple):
    """Arrays over a prepared weight's buffers; without outliers, the last two are empty."""

    code_words: Any
    stat_words: Any
    second_level: Any
    runs: Any
    run_starts: Any


def dequantize_stored(weight: PreparedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """W_hat [out_features, in_features] of a dtype, columns in stored order."""
    spec = weight.spec
    out = torch.empty(spec.out_features, spec.in_features, dtype=dtype, device=weight.device)
    launch = dequantize_kernel(spec.bits, spec.scale_bits, spec.group_size, dtype)[
        (weight.units, weight.tiles), THREADS, stream_of(out.device)
    ]
    launch(views(weight), array_of(out.view(BITS[dtype])), spec.stats_group_size // TILE_ROWS)
    return out


def views(weight: PreparedMatrix) -> Views:
    """What the kernel reads."""
    halves = weight["second_level"].view(torch.uint16)
    nothing = weight["records"].flatten()[:0]
    return Views(
        array_of(weight.code_words),
        array_of(weight.stat_words),
        array_of(halves),
        array_of(weight.tensors.get("runs", nothing)),
        array_of(weight.tensors.get("run_starts", nothing)),
    )


@cache
def dequantize_kernel(bits: int, stat_bits: int, group_size: int, dtype: torch.dtype) -> Any:
    """kernel(weight, out, stats_tiles) on a grid of [units, tiles]."""
    statistic, code_at = statistic_function(stat_bits), code_function(bits, group_size)
    columns, groups = UNIT_GROUPS * group_size, UNIT_GROUPS
    convert = {torch.float16: float_to_half, torch.bfloat16: float_to_bfloat}.get(dtype)
    number = np.float32 if dtype == torch.float32 else np.uint16

    @cuda.jit(device=True)
    def converted(value):
        return value if convert is None else convert(value)

    @cuda.jit(device=True)
    def grid_of(weight, tile, unit, row, group, stats_tiles):
        block = tile // stats_tiles
        scale = statistic(weight, tile, unit, row, group, block, 0)
        return scale, statistic(weight, tile, unit, row, group, block, 1)

    @cuda.jit(device=True)
    def add_outliers(weight, out, tile, unit, thread, stats_tiles):
        first = unit * columns
        run = tile * ((out.shape[1] - 1) // SEGMENT_COLUMNS + 1) + first // SEGMENT_COLUMNS
        start, behind = LOAD_WORDS * weight.run_starts[run], LOAD_WORDS * weight.run_starts[run + 1]
        end = 0
        for row in range(TILE_ROWS if start < behind else 0):
            begin, end = end, weight.runs[start + row // 2] >> row % 2 * HALF & HALF_MASK
            for at in range(begin + thread, end, THREADS):
                entry = weight.runs[start + HEADER_WORDS + at]
                column = (entry & HALF_MASK) - first % SEGMENT_COLUMNS
                if 0 <= column < columns:
                    group, k = column // group_size, column % group_size
                    scale, zero = grid_of(weight, tile, unit, row, group, stats_tiles)
                    code = np.float32(code_at(weight.code_words, tile, unit, row, group, k))
                    value = half_to_float(np.uint16(entry >> HALF & HALF_MASK))
                    total = weight_of(code, scale, zero) + value
                    out[tile * TILE_ROWS + row, first + column] = converted(total)

    @cuda.jit
    def kernel(weight, out, stats_tiles):
        decoded = cuda.shared.array((TILE_ROWS, columns), number)
        unit, tile, thread = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
        for at in range(thread, TILE_ROWS * groups, THREADS):
            row, group = at // groups, at % groups
            scale, zero = grid_of(weight, tile, unit, row, group, stats_tiles)
            for k in range(group_size):
                code = np.float32(code_at(weight.code_words, tile, unit, row, group, k))
                decoded[row, group * group_size + k] = converted(weight_of(code, scale, zero))
        cuda.syncthreads()
        first, rows, width = unit * columns, out.shape[0], out.shape[1]
        for at in range(thread, TILE_ROWS * columns, THREADS):
            row, column = tile * TILE_ROWS + at // columns, first + at % columns
            if row < rows and column < width:
                out[row, column] = decoded[at // columns, at % columns]
        cuda.syncthreads()
        if weight.runs.shape[0]:
            add_outliers(weight, out, tile, unit, thread, stats_tiles)

    return kernel


def statistic_function(bits: int) -> Any:
    """statistic(weight, tile, unit, row, group, block, which) -> scale (which 0) or zero (1)."""
    field = field_function(bits)

    @cuda.jit(device=True)
    def statistic(weight, tile, unit, row, group, block, which):
        octet, in_octet = group // OCTET, group % OCTET
        lane = row % 8 * 4 + in_octet // 2
        pair = octet * 4 + row // 8 * 2 + which
        words = weight.stat_words[tile, unit]
        code = field(words, lane, pair, in_octet % 2)
        numbers = weight.second_level[block, unit * 4 + octet, in_octet // 2]
        step = half_to_float(numbers[2 * which, in_octet % 2])
        base = half_to_float(numbers[2 * which + 1, in_octet % 2])
        return decoded_statistic(np.float32(code), step, base)

    return statistic


def code_function(bits: int, group_size: int) -> Any:
    """code_at(code_words, tile, unit, row, group, k): of column k of a group of the unit."""
    field = field_function(bits)
    spec = MatrixSpec(1, group_size, bits, group_size, TILE_ROWS, bits, bits)
    octets, per_quarter = octets_and_pairs(spec)
    in_quarter = group_size // QUARTERS

    @cuda.jit(device=True)
    def code_at(code_words, tile, unit, row, group, k):
        octet, in_octet = group // OCTET, group % OCTET
        block, octet = octet // octets, octet % octets
        lane = row % 8 * 4 + in_octet % 4
        quarter, k = k // in_quarter, k % in_quarter
        pair = (octet * per_quarter + k // 2) * 4 + in_octet // 4 * 2 + row // 8
        return field(code_words[tile, unit, block, :, :, quarter], lane, pair, k % 2)

    return code_at


def field_function(bits: int) -> Any:
    """field(words, lane, pair, half) -> the code in a half of a lane's pair; words [bits, 32]."""
    places = [pair_places(bits, pair) for pair in range(PAIRS)]
    whole = [place[0] if len(place) == 1 else (0, 0, 0, 0) for place in places]
    word_of = np.array([place[0] for place in whole], np.int32)
    shift_of = np.array([place[1] for place in whole], np.int32)
    [spread] = [pair for pair in range(PAIRS) if len(places[pair]) > 1] or [-1]
    max_code, top = (1 << bits) - 1, HALF - 1

    @cuda.jit(device=True)
    def field(words, lane, pair, half):
        if pair == spread:
            code = 0
            for word in range(bits):
                code |= (words[word, lane] >> top + HALF * half & 1) << word
            return code
        word, shift = cuda.const.array_like(word_of)[pair], cuda.const.array_like(shift_of)[pair]
        return words[word, lane] >> shift + HALF * half & max_code

    return field
