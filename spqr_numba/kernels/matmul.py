"""The matrix product of SpQR: y = x W_hat^T (+ bias), straight from the compressed weight.

    y[b, i] = sum_g scale[i, g] * (sum_{j in g} code[i, j] x'[b, j] - zero[i, g] * X[b, g])
              + sum_outliers value * x'[b, column],
    where x' = x[:, permutation] and X[b, g] = sum_{j in g} x'[b, j]

    x         fp32, fp16 or bf16 [..., n]
    W_hat     SpqrMatrix (format/layout.py)
    y         like x, [..., m]; sums in fp32

Scale and zero are applied to the sums of a group and not to its weights: exact, and 1/group_size
of the work. Source of the idea: section 4.3 of arXiv 2306.03078 (dense part and CSR part at once).

On a CPU each thread has a run of rows and takes the inputs in blocks of one or four. It stages a
block: x' and X, inputs fastest. Then it takes a tile of its rows, so that their sums stay in the
nearest cache, walks the chunks of 32 columns, and in a chunk takes 16 or 32 rows at a time, one a
lane: the reduction over columns never leaves a lane. A code costs a mask, a conversion, now and
then a shift, and a multiply-add for each input; without AVX-512 that, and not memory, sets the
pace. From `GEMM_FROM` inputs on, dequantizing once and calling BLAS is faster.

On a GPU a prepared weight (prepared.py) is multiplied from its codes as well: up to sixteen inputs
at once as exactly as above; more, on a Hopper GPU, by weights whose parts are rounded to fp16 for
tensor cores. From `DENSE_FROM` inputs on it pays to dequantize the whole weight to the dtype of
x and leave the product to cuBLAS; other GPUs and other weights do so from `ROUNDED_FROM` inputs on.
A weight that cannot be prepared meets fewer inputs in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch.nn.functional import linear

from ..errors import InputError
from ..format.layout import CODES_PER_CHUNK
from ..format.matrix import SpqrMatrix
from .dequantize import dequantize, dequantize_reference, dequantize_rows, row_blocks, stored_order
from .parallel import Fields, tasks_for
from .prepared import PreparedMatrix
from .scalars import weight_of
from .simd import (
    F32,
    FLOAT_BYTES,
    add,
    broadcast,
    float_at,
    free,
    fused_multiply_add,
    half_at,
    heap_floats,
    i64,
    int32_at,
    lane,
    literals,
    load,
    load_floats,
    multiply_add,
    pointer,
    stack_floats,
    store_float,
    zeros,
)
from .unpack import (
    WORD_BYTES,
    ChunkWords,
    decoded_rows,
    groups_of,
    index_at,
    input_unit,
    packed_matrix,
    statistic_at,
    weight_code,
)

if TYPE_CHECKING:
    from .launch import Launcher

__all__ = ["launchers_of", "matmul", "matmul_reference"]

GEMM_FROM = 96
ROUNDED_FROM = 49  # on a GPU: up to three launches of sixteen inputs come before
DENSE_FROM = 512  # on a Hopper GPU, of prepared weights
GPU_LOAD_BYTES = 16
INPUTS = 4  # of a block, where there is more than one
LANES = {1: 32, INPUTS: 16}  # rows a vector: as many sums as the registers hold
TILE_FLOATS = 2048  # sums of a tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Product = Callable[[torch.Tensor, PreparedMatrix, torch.Tensor | None, torch.Tensor], None]


def matmul_reference(x: np.ndarray, matrix: SpqrMatrix) -> np.ndarray:
    """NumPy spec of `matmul` in float64: x [..., n] -> [..., m]."""
    return x.astype(np.float64) @ dequantize_reference(matrix).astype(np.float64).T


def multiply_rows(task, tasks, matrix, x, y, batch):
    """The CPU twin, a kernel: x fp32 [batch, columns] -> y fp32 [batch, rows], this task's rows."""
    runs = (matrix.rows + matrix.lanes - 1) // matrix.lanes
    first = runs * task // tasks * matrix.lanes
    last = min(runs * (task + 1) // tasks * matrix.lanes, matrix.rows)
    staged = heap_floats(3 * matrix.chunks * CODES_PER_CHUNK * matrix.inputs)
    for start in range(0, batch, matrix.inputs):
        inputs = x + FLOAT_BYTES * start * matrix.columns
        out = y + FLOAT_BYTES * start * matrix.rows
        count = min(matrix.inputs, batch - start)
        stage_inputs(matrix, inputs, count, staged)
        multiply_tiles(matrix, first, last, staged, count, out)
    free(staged)


# --- CPU: staging


@njit
def part(matrix, staged, number):
    """Where a part of a staged block begins: 0 is x', 1 is x' in units of the codes, 2 is X."""
    return staged + FLOAT_BYTES * number * matrix.chunks * CODES_PER_CHUNK * matrix.inputs


@njit
def stage_inputs(matrix, x, count, staged):
    """x fp32 [count, columns] -> x' fp32 [chunks * 32, inputs], the same in units of the codes, and
    X fp32 [chunks * pieces, inputs]: permuted, inputs fastest, 0 for what there is not."""
    scaled = part(matrix, staged, 1)
    for j in range(matrix.chunks * CODES_PER_CHUNK):
        inside = j < matrix.columns
        column = index_at(matrix, matrix.permutation, j) if inside and matrix.permutation else j
        unit = input_unit(matrix.bits, j % CODES_PER_CHUNK)
        for i in range(matrix.inputs):
            known = inside and i < count
            value = float_at(x, i * matrix.columns + column) if known else np.float32(0)
            store_float(staged, j * matrix.inputs + i, value)
            store_float(scaled, j * matrix.inputs + i, value * unit)
    sum_pieces(matrix, staged, part(matrix, staged, 2))


@njit
def sum_pieces(matrix, staged, sums):
    """X[piece, i] = the sum of x'[j, i] over the columns of a piece."""
    length = CODES_PER_CHUNK // matrix.pieces
    for piece in range(matrix.chunks * matrix.pieces):
        for i in range(matrix.inputs):
            total = np.float32(0)
            for j in range(piece * length, (piece + 1) * length):
                total += float_at(staged, j * matrix.inputs + i)
            store_float(sums, piece * matrix.inputs + i, total)


# --- CPU: multiplying


@njit
def multiply_tiles(matrix, first, last, x, count, y):
    """Rows [first, last) of y fp32 [count, rows] from a staged block of inputs."""
    sums = stack_floats(TILE_FLOATS)
    tile_rows = TILE_FLOATS // matrix.inputs
    for tile in range(first, last, tile_rows):
        end = min(tile + tile_rows, last)
        multiply_tile(matrix, tile, end, x, sums)
        for i in range(count):
            for row in range(tile, end):
                store_float(y, i * matrix.rows + row, float_at(sums, i * tile_rows + row - tile))


@njit
def multiply_tile(matrix, first, last, x, sums):
    """sums [inputs, tile_rows] of the rows [first, last) of one block of inputs."""
    for at in range(TILE_FLOATS):
        store_float(sums, at, np.float32(0))
    whole = last - (last - first) % matrix.lanes
    dense_rows(matrix, first, whole, x, sums)
    ragged_rows(matrix, whole, last, x, sums + FLOAT_BYTES * (whole - first))
    if matrix.outlier_row_offsets:
        sparse_rows(matrix, first, last, x, sums)


@njit
def dense_rows(matrix, first, last, x, sums):
    """sums += the dense part of whole vectors of rows."""
    for chunk in range(matrix.chunks):
        words = matrix.codes + WORD_BYTES * chunk * matrix.bits * matrix.rows
        inputs = part(matrix, x, 1) + FLOAT_BYTES * matrix.inputs * chunk * CODES_PER_CHUNK
        input_sums = part(matrix, x, 2) + FLOAT_BYTES * matrix.inputs * chunk * matrix.pieces
        groups = groups_of(matrix, chunk)
        for row in range(first, last, matrix.lanes):
            add_chunk(
                matrix,
                words + WORD_BYTES * row,
                inputs,
                input_sums,
                groups,
                row,
                sums + FLOAT_BYTES * (row - first),
            )


@intrinsic
def add_chunk(typingctx, matrix, words, x, x_sums, groups, row, sums):
    """sums [inputs, tile_rows] += the products of one chunk with the rows from `row` on.

    words: address of the chunk's first word of that row; x fp32 [32, inputs] and
    x_sums fp32 [pieces, inputs]: the chunk's x' and X; groups: of its pieces.
    """
    places = (types.intp,) * 3

    def codegen(context, builder, signature, arguments):
        fields = Fields(context, builder, matrix, arguments[0])
        words, x, x_sums, groups, row, sums = arguments[1:]
        chunk = ChunkWords(fields, words)
        for piece in range(fields.pieces):
            dots = piece_dots(chunk, fields, x, piece)
            group = builder.extract_value(groups, piece)
            add_piece(fields, dots, x_sums, piece, group, row, sums)
        return context.get_dummy_value()

    return types.none(matrix, *places, groups, types.intp, types.intp), codegen


def piece_dots(chunk: ChunkWords, matrix: Fields, x: ir.Value, piece: int) -> list[ir.Value]:
    """sum_k code_k * x'[k, i] over the columns of a piece, a vector over rows for each input."""
    columns = CODES_PER_CHUNK // matrix.pieces
    dots = [literals(F32, [0.0] * matrix.lanes)] * matrix.inputs
    for k in range(piece * columns, (piece + 1) * columns):
        code = chunk.code(k)
        for i in range(matrix.inputs):
            element = load(matrix.builder, x, i64(k * matrix.inputs + i), F32, FLOAT_BYTES)
            factor = broadcast(matrix.builder, element, matrix.lanes)
            dots[i] = fused_multiply_add(matrix.builder, code, factor, dots[i])
    return dots


def add_piece(matrix, dots, x_sums, piece, group, row, sums):
    """sums[i] += scale * (dots[i] - zero * x_sums[piece, i])."""
    builder = matrix.builder
    scale = decoded_rows(matrix.scale, group, row)
    zero = decoded_rows(matrix.zero, group, row)
    for i, dot in enumerate(dots):
        x_sum = load(builder, x_sums, i64(piece * matrix.inputs + i), F32, FLOAT_BYTES)
        minus = broadcast(builder, builder.fneg(x_sum), matrix.lanes)
        centred = fused_multiply_add(builder, zero, minus, dot)
        tile = i64(i * (TILE_FLOATS // matrix.inputs))
        at = pointer(builder, sums, tile, dot.type, FLOAT_BYTES)
        total = builder.load(at, align=FLOAT_BYTES)
        builder.store(fused_multiply_add(builder, scale, centred, total), at, align=FLOAT_BYTES)


@njit
def ragged_rows(matrix, first, last, x, sums):
    """sums += the dense part of rows that are too few for a vector."""
    tile_rows = TILE_FLOATS // matrix.inputs
    for column in range(matrix.columns):
        group = column // matrix.group_size
        for row in range(first, last):
            scale = statistic_at(matrix.scale, group, row)
            zero = statistic_at(matrix.zero, group, row)
            weight = weight_of(weight_code(matrix, column, row), scale, zero)
            for i in range(matrix.inputs):
                at = i * tile_rows + row - first
                product = weight * float_at(x, column * matrix.inputs + i)
                store_float(sums, at, float_at(sums, at) + product)


@njit
def sparse_rows(matrix, first, last, x, sums):
    """sums += sum over the outliers of a row of value * x'[column]."""
    tile_rows = TILE_FLOATS // matrix.inputs
    at = int32_at(matrix.outlier_row_offsets, first)
    for row in range(first, last):
        end = int32_at(matrix.outlier_row_offsets, row + 1)
        total = outlier_products(matrix, at, end, x)
        at = end
        for i in range(matrix.inputs):
            index = i * tile_rows + row - first
            store_float(sums, index, float_at(sums, index) + lane(total, i))


@njit(inline="always")
def outlier_products(matrix, first, last, x):
    """The sum over the outliers from `first` on, a lane an input, in four chains of additions."""
    a = b = c = d = zeros(matrix.inputs)
    whole = last - (last - first) % 4
    for at in range(first, whole, 4):
        a = add_outlier(matrix, at, x, a)
        b = add_outlier(matrix, at + 1, x, b)
        c = add_outlier(matrix, at + 2, x, c)
        d = add_outlier(matrix, at + 3, x, d)
    for at in range(whole, last):
        a = add_outlier(matrix, at, x, a)
    return add(add(a, b), add(c, d))


@njit(inline="always")
def add_outlier(matrix, at, x, total):
    """total, a lane an input, plus one outlier's products."""
    column = index_at(matrix, matrix.outlier_columns, at)
    inputs = load_floats(x, column * matrix.inputs, matrix.inputs)
    return multiply_add(inputs, half_at(matrix.outlier_values, at), total)


# --- The product


def matmul(
    x: torch.Tensor, matrix: SpqrMatrix | PreparedMatrix, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W_hat^T + bias.

    x fp32, fp16 or bf16 [..., in_features], bias [out_features] or None -> like x
    [..., out_features]. A PreparedMatrix is for a GPU. Raises InputError for another shape, dtype
    or device.
    """
    check_input(x, matrix, bias)
    if isinstance(matrix, PreparedMatrix):
        return multiply_prepared(x, matrix, bias)
    if not x.is_cpu:
        return multiply_dense(x, matrix, bias)
    floats = floats_of(x)
    y = floats.new_empty((*x.shape[:-1], matrix.spec.out_features))
    batch = x.numel() // matrix.spec.in_features
    if batch >= GEMM_FROM:
        gemm(floats.view(batch, -1), matrix, y.view(batch, -1))
    elif batch:
        multiply(floats, batch, matrix, y)
    if bias is not None:
        y += bias
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def floats_of(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, contiguous, without a gradient.

    A model's weights leave nothing of Python and torch in the caches: each call that can be spared
    saves microseconds, of the few tens that a small layer takes.
    """
    if x.requires_grad:
        x = x.detach()
    if x.dtype != torch.float32:
        x = x.to(torch.float32)
    return x if x.is_contiguous() else x.contiguous()


def multiply(x: torch.Tensor, batch: int, matrix: SpqrMatrix, y: torch.Tensor) -> None:
    """Fill y fp32 [batch, m] from x fp32 [batch, n] through the kernel."""
    inputs = 1 if batch == 1 else INPUTS
    tasks = tasks_for(x.numel() * matrix.spec.out_features)
    packed = packed_matrix(matrix, LANES[inputs], inputs)
    packed.run(multiply_rows, tasks, x.data_ptr(), y.data_ptr(), batch)


def gemm(x: torch.Tensor, matrix: SpqrMatrix, y: torch.Tensor) -> None:
    """Fill y [batch, m] from x [batch, n] through the dequantized weight and BLAS."""
    x = x[:, stored_order(matrix)]
    for first, last in row_blocks(matrix):
        torch.mm(x, dequantize_rows(matrix, first, last), out=y[:, first:last])


def multiply_dense(x: torch.Tensor, matrix: SpqrMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    """`matmul` on a GPU, through the dequantized weight."""
    dtype = rounded_to(x.dtype, x.numel() // matrix.spec.in_features)
    weight = dequantize(matrix, dtype)
    return linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


def multiply_prepared(
    x: torch.Tensor, weight: PreparedMatrix, bias: torch.Tensor | None
) -> torch.Tensor:
    """`matmul` of a prepared weight: from its codes, but for very many inputs."""
    inputs = x.reshape(-1, weight.spec.in_features)
    count = len(inputs)
    multiply = None if x.dtype == torch.float32 else product_of(weight, count)
    if multiply is None:
        return multiply_stored(x, weight, bias)
    inputs = inputs.detach().contiguous()
    if inputs.data_ptr() % GPU_LOAD_BYTES or inputs.shape[1] % (GPU_LOAD_BYTES // 2):
        inputs = aligned_rows(inputs)
    bias = None if bias is None else bias.detach().to(x.dtype).contiguous()
    y = x.new_empty(count, weight.spec.out_features)
    multiply(inputs, weight, bias, y)
    return y.view(*x.shape[:-1], -1)


def product_of(weight: PreparedMatrix, count: int) -> Product | None:
    """What multiplies so many inputs from a prepared weight's codes; None where none does."""
    from .matmul_cuda import (
        MOST_INPUTS,
        can_multiply,
        most_at_once,
        multiply_few,
        multiply_in_turns,
    )
    from .matmul_many_cuda import can_multiply_many, multiply_many

    if MOST_INPUTS < count < DENSE_FROM and can_multiply_many(weight, count):
        return multiply_many
    at_once = most_at_once(weight)
    too_many = ROUNDED_FROM if at_once > 1 else MOST_INPUTS + 1
    if not 0 < count < too_many or not can_multiply(weight, min(count, at_once)):
        return None
    return multiply_few if count <= at_once else multiply_in_turns


def launchers_of(
    weight: PreparedMatrix, kind: torch.dtype, count: int, feed: str | None = None
) -> list[Launcher]:
    """What `matmul` with so many inputs of a dtype launches, or `matmul_fed` with one; inputs that
    lie where a GPU can load 16 bytes."""
    from . import matmul_cuda, matmul_many_cuda, prepared_cuda

    multiply = None if kind == torch.float32 else product_of(weight, count)
    if multiply is None:
        return prepared_cuda.launchers_of(weight, kind, rounded_to(kind, count))
    if multiply is matmul_many_cuda.multiply_many:
        return matmul_many_cuda.launchers_of(weight, kind, count)
    return matmul_cuda.launchers_of(weight, kind, count, feed)


def rounded_to(kind: torch.dtype, count: int) -> torch.dtype:
    """What W_hat is dequantized to, for so many inputs of a dtype."""
    return kind if count >= ROUNDED_FROM else torch.float32


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, each row beginning where a GPU can load 16 bytes."""
    per_load = GPU_LOAD_BYTES // x.element_size()
    wide = x.new_empty(len(x), -(-x.shape[1] // per_load) * per_load)
    return wide[:, : x.shape[1]].copy_(x)


def multiply_stored(
    x: torch.Tensor, weight: PreparedMatrix, bias: torch.Tensor | None
) -> torch.Tensor:
    """`matmul` of a prepared weight through its numbers: x goes into their order."""
    from .prepared_cuda import dequantize_stored, stored_inputs

    dtype = rounded_to(x.dtype, x.numel() // weight.spec.in_features)
    ordered = stored_inputs(x.detach(), weight).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return linear(ordered, dequantize_stored(weight, dtype), bias).to(x.dtype)


def check_input(
    x: torch.Tensor, matrix: SpqrMatrix | PreparedMatrix, bias: torch.Tensor | None
) -> None:
    """Raise InputError unless x and bias fit the weight."""
    columns = matrix.spec.in_features
    if x.dtype not in DTYPES:
        raise InputError(f"x is {x.dtype}; it must be float32, float16 or bfloat16")
    if x.ndim < 1 or x.size(-1) != columns:
        raise InputError(
            f"x has shape {list(x.shape)}; its last axis must be in_features ({columns})"
        )
    on_cpu = x.is_cpu and isinstance(matrix, SpqrMatrix) and matrix["codes"].is_cpu
    if not on_cpu and x.device != matrix.device:
        raise InputError(f"x is on {x.device}, the weight on {matrix.device}")
    if bias is not None and bias.device != x.device:
        raise InputError(f"bias is on {bias.device}, x on {x.device}")
    if bias is not None and bias.shape != (matrix.spec.out_features,):
        raise InputError(
            f"bias has shape {list(bias.shape)}; it must be [{matrix.spec.out_features}]"
        )
