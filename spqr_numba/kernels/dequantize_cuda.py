"""Dequantize on a GPU: the CUDA twin of dequantize.py, which has the formula.

A block of threads takes a few rows and all their columns, so that what it reads and what it writes
is contiguous whatever the permutation. What lies in between is in shared memory, where any order is
cheap:

    words      uint32 [chunks * bits, pitch]   the codes of its rows, as they are stored
    decoded    uint32 [groups, pitch]          their statistics: fp16 scale | fp16 zero << 16

A thread takes every THREADS-th input of the layer, looks up where its column is stored, and writes
the weight of each row: neighbours write to neighbours. Then a few threads a row write the weights
that have an outlier once more. `pitch` is odd where it can be, so that the words of one row lie in
all banks. A row too long for shared memory goes in runs of chunks; a block with too few rows takes
the last one more than once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..format.layout import CODES_PER_CHUNK, UNQUANTIZED_BITS, MatrixSpec, ceil_div
from ..format.matrix import SpqrMatrix
from .launch import array_of, numba_cuda, stream_of
from .scalars import (
    decoded_statistic,
    float_to_bfloat,
    float_to_half,
    funnel_shift,
    half_to_float,
    integer_to_float,
    weight_of,
)

__all__ = ["Decoding", "dequantize_kernel", "launch_dequantize"]

cuda = numba_cuda()  # only those who have tensors on a GPU import this module

THREADS = 512
SHARED_WORDS = 12 * 1024  # what every GPU gives a block (48 KB)
ROWS = 8, 4, 2, 1  # of a block: as many as fit
WORD = np.dtype(np.uint32)
WORD_BITS = np.uint32(32)
CHUNK = np.uint32(CODES_PER_CHUNK)
ONE_GROUP = 1 << 30  # the group_size of whole rows: no column reaches it
BITS = {torch.float32: torch.float32, torch.float16: torch.uint16, torch.bfloat16: torch.uint16}
"""dtype of a weight -> dtype that a kernel writes it as."""


@dataclass(frozen=True)
class Decoding:
    """What a kernel is made for: settings of the format, the dtype of W, and the rows of a block.

    sparse: whether there are outliers.
    """

    bits: int
    scale_bits: int
    zero_bits: int
    group_size: int
    stats_group_size: int
    sparse: bool
    dtype: torch.dtype
    rows: int

    @property
    def pitch(self) -> int:
        """Words from one word of a row to its next in shared memory."""
        return self.rows + 1 if self.rows > 2 else self.rows

    @classmethod
    def of(cls, spec: MatrixSpec, *, sparse: bool, dtype: torch.dtype) -> Decoding:
        """With as many rows as fit into shared memory whole."""
        group_size = spec.group_size if spec.groups > 1 else ONE_GROUP
        statistics = spec.scale_bits, spec.zero_bits, group_size, spec.stats_group_size
        for rows in ROWS:
            decoding = cls(spec.bits, *statistics, sparse, dtype, rows)
            if decoding.words_of(spec, spec.chunks) <= SHARED_WORDS:
                break
        return decoding

    def words_of(self, spec: MatrixSpec, chunks: int) -> int:
        """How much shared memory a run of chunks takes."""
        groups = min(spec.groups, ceil_div(chunks * CODES_PER_CHUNK, self.group_size) + 1)
        return (chunks * self.bits + groups) * self.pitch

    def chunks_at_once(self, spec: MatrixSpec) -> int:
        """How many chunks of a row are in shared memory together: all, but of a very long row."""
        chunks = spec.chunks
        while self.words_of(spec, chunks) > SHARED_WORDS:
            chunks //= 2
        return chunks


class Statistics(NamedTuple):
    """The scales of a matrix, or its zeros.

    values   uint32 [groups * row_chunks * bits]; not quantized, uint16 [groups * rows]
    step     uint16 [groups, stats_groups]: fp16 bits, second level
    base     like step; not quantized, both are `values` and not looked at
    """

    values: Any
    step: Any
    base: Any


class Outliers(NamedTuple):
    """The sparse part: int32 [rows + 1], uint16 or int32 [outliers], uint16 (fp16 bits)."""

    row_offsets: Any
    columns: Any
    values: Any


@cache
def dequantize_kernel(how: Decoding) -> Any:
    """kernel(codes, scale, zero, outliers, order, stored, out, chunks).

    codes    uint32 [chunks * bits, rows]
    order    int32 [columns], the layer's input of each stored column; stored: its inverse
    out      [rows, columns], fp32 or the bits of 16-bit numbers
    chunks   of a row that are in shared memory at once
    """
    stage, weight_at = stage_function(how), weight_function(how)
    convert, write_sparse = convert_function(how.dtype), sparse_function(how)
    tile_rows = how.rows

    @cuda.jit
    def kernel(codes, scale, zero, outliers, order, stored, out, chunks):
        shared = cuda.shared.array(0, WORD)
        rows, columns = np.uint32(out.shape[0]), np.uint32(out.shape[1])
        first_row, last_row = np.uint32(cuda.blockIdx.x * tile_rows), np.uint32(rows - 1)
        width = np.uint32(chunks * CODES_PER_CHUNK)
        for first in range(np.uint32(0), columns, width):
            stage(shared, codes, scale, zero, first, width, rows, columns)
            cuda.syncthreads()
            for column in range(np.uint32(cuda.threadIdx.x), columns, np.uint32(THREADS)):
                j = np.uint32(stored[column] - first)
                if j < width:
                    for r in range(tile_rows):
                        row = min(np.uint32(first_row + r), last_row)
                        out[row, column] = convert(weight_at(shared, first, j, np.uint32(r), width))
            cuda.syncthreads()
            write_sparse(shared, outliers, order, first, width, out)
            cuda.syncthreads()

    return kernel


def stage_function(how: Decoding) -> Any:
    """stage(...): words and statistics of columns first ... first + width - 1 to shared memory."""
    bits, group_size = np.uint32(how.bits), np.uint32(how.group_size)
    rows_at_once, pitch = np.uint32(how.rows), np.uint32(how.pitch)
    scale_of = statistic_function(how.scale_bits, how.stats_group_size)
    zero_of = statistic_function(how.zero_bits, how.stats_group_size)
    step = np.uint32(THREADS // how.rows)

    @cuda.jit(device=True)
    def stage(shared, codes, scale, zero, first, width, rows, columns):
        thread = np.uint32(cuda.threadIdx.x)
        r, start = np.uint32(thread % rows_at_once), np.uint32(thread // rows_at_once)
        row = min(np.uint32(cuda.blockIdx.x * rows_at_once + r), np.uint32(rows - 1))
        end = min(np.uint32(first + width), columns)
        first_word = np.uint32(first // CHUNK * bits)
        words = np.uint32((end - first + CHUNK - 1) // CHUNK * bits)
        for word in range(start, words, step):
            shared[np.uint32(word * pitch + r)] = codes[np.uint32(first_word + word), row]
        first_group, decoded = np.uint32(first // group_size), np.uint32(width // CHUNK * bits)
        groups = np.uint32((end - 1) // group_size - first_group + 1)
        for at in range(start, groups, step):
            group = np.uint32(first_group + at)
            pair = np.uint32(scale_of(scale, group, row, rows))
            pair |= np.uint32(zero_of(zero, group, row, rows)) << np.uint32(16)
            shared[np.uint32((decoded + at) * pitch + r)] = pair

    return stage


def statistic_function(bits: int, stats_group_size: int) -> Any:
    """statistic_of(statistics, group, row, rows) -> the fp16 bits that it decodes to."""
    if bits == UNQUANTIZED_BITS:

        @cuda.jit(device=True)
        def value_of(statistics, group, row, rows):
            return statistics.values[np.uint64(group) * rows + row]

        return value_of
    code_of = code_function(bits)
    word_rows, block_rows = np.uint32(bits), np.uint32(stats_group_size)

    @cuda.jit(device=True)
    def statistic_of(statistics, group, row, rows):
        chunk = np.uint32(group * ((rows + CHUNK - 1) // CHUNK) + row // CHUNK)
        first = np.uint64(chunk * word_rows)
        code = code_of(statistics.values, first, np.uint64(1), np.uint32(row % CHUNK))
        block = np.uint32(row // block_rows)
        step = half_to_float(statistics.step[group, block])
        base = half_to_float(statistics.base[group, block])
        return float_to_half(decoded_statistic(code, step, base))

    return statistic_of


def code_function(bits: int) -> Any:
    """code_of(words, first, step, k) -> code k (float32) of the chunk that begins at `first`."""
    width, max_code = np.uint32(bits), np.uint32((1 << bits) - 1)

    @cuda.jit(device=True)
    def code_of(words, first, step, k):
        bit = np.uint32(k * width)
        at, shift = first + np.uint64(bit // WORD_BITS * step), np.uint32(bit % WORD_BITS)
        high = np.uint32(0)
        if np.uint32(shift + width) > WORD_BITS:
            high = words[at + step]
        return integer_to_float(np.uint32(funnel_shift(words[at], high, shift) & max_code))

    return code_of


def weight_function(how: Decoding) -> Any:
    """weight_at(...) -> the dense part (float32) of row r at column first + j."""
    bits, pitch, group_size = map(np.uint32, (how.bits, how.pitch, how.group_size))
    code_of = code_function(how.bits)

    @cuda.jit(device=True)
    def weight_at(shared, first, j, r, width):
        word, k = np.uint32(j // CHUNK * bits * pitch), np.uint32(j % CHUNK)
        code = code_of(shared, np.uint64(word) + np.uint64(r), np.uint64(pitch), k)
        group = np.uint32(np.uint32(first + j) // group_size - first // group_size)
        pair_at = np.uint32((width // CHUNK * bits + group) * pitch)
        pair = shared[np.uint64(pair_at) + np.uint64(r)]
        scale = half_to_float(np.uint16(pair & np.uint32(0xFFFF)))
        return weight_of(code, scale, half_to_float(np.uint16(pair >> np.uint32(16))))

    return weight_at


def sparse_function(how: Decoding) -> Any:
    """write_sparse(...): write the weights of stored columns first, ... that have an outlier."""
    weight_at, convert = weight_function(how), convert_function(how.dtype)
    tile_rows, parts = np.uint32(how.rows), np.uint32(THREADS // how.rows)
    if not how.sparse:

        @cuda.jit(device=True)
        def write_nothing(shared, outliers, order, first, width, out):
            pass

        return write_nothing

    @cuda.jit(device=True)
    def write_sparse(shared, outliers, order, first, width, out):
        thread = np.uint32(cuda.threadIdx.x)
        r, part = np.uint32(thread // parts), np.uint32(thread % parts)
        row = np.uint32(cuda.blockIdx.x * tile_rows + r)
        if row < out.shape[0]:
            begin, end = outliers.row_offsets[row], outliers.row_offsets[np.uint32(row + 1)]
            for at in range(np.uint32(begin + part), np.uint32(end), parts):
                column = np.uint32(outliers.columns[at])
                j = np.uint32(column - first)
                if j < width:
                    dense = weight_at(shared, first, j, r, width)
                    weight = dense + half_to_float(outliers.values[at])
                    out[row, np.uint32(order[column])] = convert(weight)

    return write_sparse


def convert_function(dtype: torch.dtype) -> Any:
    """convert(weight) -> what is written for a float32."""
    if dtype == torch.float32:

        @cuda.jit(device=True)
        def as_it_is(weight):
            return weight

        return as_it_is
    return float_to_half if dtype == torch.float16 else float_to_bfloat


def launch_dequantize(matrix: SpqrMatrix, out: torch.Tensor) -> None:
    """Fill out [rows, columns] fp32, fp16 or bf16 on torch's current stream."""
    spec = matrix.spec
    how = Decoding.of(spec, sparse=matrix.outliers is not None, dtype=out.dtype)
    chunks = how.chunks_at_once(spec)
    launch = dequantize_kernel(how)[
        ceil_div(spec.out_features, how.rows),
        THREADS,
        stream_of(out.device),
        4 * how.words_of(spec, chunks),
    ]
    launch(*views(matrix), array_of(out.view(BITS[out.dtype])), np.int32(chunks))


_VIEWS: WeakKeyDictionary[SpqrMatrix, tuple[object, tuple[Any, ...]]] = WeakKeyDictionary()


def views(matrix: SpqrMatrix) -> tuple[Any, ...]:
    """What a kernel gets of a matrix: codes, scale, zero, outliers, order, stored.

    Made once, as it takes longer than the kernel, and again where tensors moved or the permutation
    was written to.
    """
    order = matrix.tensors.get("permutation")
    changes = None if order is None or order.is_inference() else order._version
    state = matrix["codes"].data_ptr(), changes
    if matrix not in _VIEWS or _VIEWS[matrix][0] != state:
        _VIEWS[matrix] = state, (*make_views(matrix), *map(array_of, orders(matrix)))
    return _VIEWS[matrix][1]


def orders(matrix: SpqrMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [n]: the layer's input of each stored column, and the stored column of each input."""
    n = matrix.spec.in_features
    alike = torch.arange(n, dtype=torch.int32, device=matrix.device)
    if "permutation" not in matrix.tensors:
        return alike, alike
    order = matrix["permutation"].to(torch.int64)
    return order.to(torch.int32), torch.empty_like(alike).scatter_(0, order, alike)


def make_views(matrix: SpqrMatrix) -> tuple[Any, Statistics, Statistics, Outliers]:
    """Numba's arrays over the buffers; a name that is not there gets another's."""
    spec = matrix.spec

    def bits_of(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        return array_of(matrix[name].view(dtype).view(shape))

    def statistics_of(name: str, bits: int) -> Statistics:
        if bits == UNQUANTIZED_BITS:
            return Statistics(*[bits_of(f"{name}s", torch.uint16, (-1,))] * 3)
        shape = spec.groups, spec.stats_groups
        return Statistics(
            bits_of(f"{name}_codes", torch.uint32, (-1,)),
            bits_of(f"{name}_scale", torch.uint16, shape),
            bits_of(f"{name}_zero", torch.uint16, shape),
        )

    codes = bits_of("codes", torch.uint32, (-1, spec.out_features))
    outliers = Outliers(codes, codes, codes)
    if matrix.outliers is not None:
        outliers = Outliers(
            array_of(matrix["outlier_row_offsets"]),
            array_of(matrix["outlier_columns"]),
            bits_of("outlier_values", torch.uint16, (-1,)),
        )
    scale, zero = statistics_of("scale", spec.scale_bits), statistics_of("zero", spec.zero_bits)
    return codes, scale, zero, outliers
