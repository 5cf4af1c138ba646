"""Weights joined to one: the same numbers in the same memory, each alone and all at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.errors import InputError
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.dequantize import dequantize
from spqr_numba.kernels.matmul import matmul, multiply_prepared
from spqr_numba.kernels.prepared import PreparedMatrix, prepare
from spqr_numba.kernels.siblings import join, kinship, whole_of

from ..problems import make_spec
from .emulator import emulated
from .test_matmul import assert_right, make_x
from .test_matmul_cuda import weights_of

ROWS = (48, 16, 32)
SETTINGS = pytest.mark.parametrize(
    ("settings", "columns", "scale"),
    [
        ({}, 300, 1),
        ({"bits": 4, "scale_bits": 4, "zero_bits": 4}, 2100, 1),
        ({"bits": 2, "scale_bits": 2, "zero_bits": 2, "stats_group_size": 64}, 75, 4),
    ],
    ids=["paper", "two segments", "stats 64"],
)


def make_matrices(
    rows: Sequence[int] = ROWS,
    columns: int = 300,
    outliers: Sequence[int | None] = (3, 0, 5),
    **settings: int,
) -> list[SpqrMatrix]:
    """Matrices of one order of columns."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(9)).to(torch.uint16)
    matrices = []
    for seed, (height, count) in enumerate(zip(rows, outliers, strict=True)):
        matrix = random_matrix(make_spec(height, columns, **settings), count, seed=seed)
        tensors = {**matrix.tensors, "permutation": order.clone()}
        matrices.append(SpqrMatrix(matrix.spec, tensors))
    return matrices


def whole_matrix(parts: Sequence[PreparedMatrix]) -> SpqrMatrix:
    whole = whole_of(parts)
    assert whole is not None
    return whole.canonical()


def memory_of(weights: Sequence[PreparedMatrix]) -> int:
    """Bytes, shared ones once."""
    storages = [t.untyped_storage() for weight in weights for t in weight.tensors.values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@SETTINGS
def test_parts_and_whole_are_the_same_numbers(
    settings: dict[str, int], columns: int, scale: int, device: torch.device
) -> None:
    rows = [scale * count for count in ROWS]
    matrices = [m.to(device) for m in make_matrices(rows, columns, **settings)]
    parts = join([prepare(matrix) for matrix in matrices])
    for part, matrix in zip(parts, matrices, strict=True):
        back = part.canonical()
        assert set(back.tensors) == set(matrix.tensors)
        for name, tensor in matrix.tensors.items():
            assert torch.equal(back[name], tensor), name
    together = torch.cat([dequantize(matrix) for matrix in matrices])
    assert torch.equal(dequantize(whole_matrix(parts)), together)


@pytest.mark.parametrize("outliers", [(3, 0, 5), (0, 0, 0), (None, None, None)], ids=str)
def test_nothing_is_in_memory_twice(outliers: Sequence[int | None]) -> None:
    weights = [prepare(matrix) for matrix in make_matrices(outliers=outliers)]
    parts = join(weights)
    whole = whole_of(parts)
    assert whole is not None
    assert memory_of([*parts, whole]) == memory_of([whole]) <= memory_of(weights)
    assert all(tensor.is_contiguous() for part in parts for tensor in part.tensors.values())


def test_a_whole_needs_all_its_parts_in_their_order() -> None:
    first, second, third = join([prepare(matrix) for matrix in make_matrices()])
    assert whole_of([first, second, third]) is first.whole
    other = [prepare(matrix) for matrix in make_matrices()]
    stranger = join(other)[1]
    for weights in (
        [first, second],
        [second, first, third],
        [first, second, second],
        [first, stranger, third],
        [first, other[1], third],
        [first, second.canonical(), third],
        other,
    ):
        assert whole_of(weights) is None


def test_what_cannot_be_joined() -> None:
    [matrix] = make_matrices([48], outliers=[3])
    known = prepare(matrix)
    kin, ragged = (prepare(m) for m in make_matrices([32, 24], outliers=[1, 1]))
    assert kinship(kin) == kinship(known)
    permuted = prepare(random_matrix(make_spec(48, 300)))
    four_bits = prepare(make_matrices([48], outliers=[3], bits=4)[0])
    without = prepare(make_matrices([48], outliers=[None])[0])
    plain = prepare(random_matrix(make_spec(48, 300), permuted=False))
    part = join([known, kin])[0]
    for other in (permuted, four_bits, without, plain, ragged, part):
        assert kinship(other) != kinship(known)
        with pytest.raises(InputError, match="cannot be joined"):
            join([known, other])
    for other in (plain, ragged, part):
        assert kinship(other) is None
        with pytest.raises(InputError, match="cannot be joined"):
            join([other, other])


@pytest.mark.parametrize("batch", [1, 3])
def test_emulated_products(batch: int) -> None:
    matrices = make_matrices((32, 16), 128, (2, 1))
    parts, x = join([prepare(m) for m in matrices]), make_x(batch, 128, dtype=torch.float16)
    whole = whole_of(parts)
    assert whole is not None
    with emulated("late"):
        assert_right(multiply_prepared(x, whole, None), x, whole.canonical())
        assert_right(multiply_prepared(x, parts[1], None), x, matrices[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 7, 33, 130])
@SETTINGS
def test_products(
    settings: dict[str, int], columns: int, scale: int, batch: int, dtype: torch.dtype
) -> None:
    rows = [scale * count for count in ROWS]
    matrices = make_matrices(rows, columns, **settings)
    parts = join([prepare(matrix.to("cuda")) for matrix in matrices])
    whole = whole_of(parts)
    assert whole is not None
    x = make_x(batch, columns, dtype=dtype)
    weights = weights_of(batch, dtype)
    for weight in (whole, *parts):
        matrix = weight.canonical().to("cpu")
        assert_right(matmul(x.cuda(), weight).cpu(), x, matrix, weights=weights)
