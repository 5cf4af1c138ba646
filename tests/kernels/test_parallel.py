"""The CPU's kernels on several threads, and at the edges of their blocks, tiles and vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.config import SpqrConfig
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels import parallel
from spqr_numba.kernels.dequantize import BLOCK_ROWS, dequantize, dequantize_reference
from spqr_numba.kernels.matmul import GEMM_FROM, INPUTS, TILE_FLOATS, matmul
from spqr_numba.quantize.hessian import factorize
from spqr_numba.quantize.solver import quantize_weight

from ..problems import make_problem, make_spec
from .test_dequantize import build
from .test_matmul import assert_right, make_x


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As many tasks, however small the work."""
    before, numbas = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(request.param)
    numba.set_num_threads(min(request.param, numba.config.NUMBA_NUM_THREADS))
    monkeypatch.setattr(parallel, "TASK_WEIGHTS", 1)
    yield request.param
    torch.set_num_threads(before)
    numba.set_num_threads(numbas)


@pytest.mark.parametrize("name", ["paper", "ragged", "one row"])
def test_any_number_of_tasks(name: str, threads: int) -> None:
    matrix = build(name)
    assert parallel.tasks_for(10**6) == threads
    assert np.array_equal(dequantize(matrix).numpy(), dequantize_reference(matrix))
    for batch in (1, 3):
        x = make_x(batch, matrix.spec.in_features)
        assert_right(matmul(x, matrix), x, matrix)


def test_columns_on_any_number_of_threads(threads: int) -> None:
    problem, config = make_problem(200, 32), SpqrConfig()
    factor = factorize(problem.hessian, config)
    quantized = quantize_weight(problem.weight, factor, config)
    numba.set_num_threads(1)
    assert torch.equal(quantize_weight(problem.weight, factor, config).weight, quantized.weight)


def test_small_work_stays_on_its_thread() -> None:
    assert parallel.tasks_for(1000) == 1


@pytest.mark.parametrize("batch", [INPUTS - 1, INPUTS, INPUTS + 1, GEMM_FROM - 1, GEMM_FROM])
def test_blocks_of_inputs(batch: int) -> None:
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features)
    assert_right(matmul(x, matrix), x, matrix)


@pytest.mark.parametrize("rows", [TILE_FLOATS + 40, 2 * BLOCK_ROWS])
def test_many_rows(rows: int) -> None:
    """More than a tile of them, more than a block."""
    matrix = random_matrix(make_spec(rows, 40))
    weight = dequantize_reference(matrix)
    assert np.array_equal(dequantize(matrix).numpy(), weight)
    for batch in (1, 2):
        x = make_x(batch, 40)
        product = x.double().numpy() @ weight.T.astype(np.float64)
        np.testing.assert_allclose(matmul(x, matrix), product, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, GEMM_FROM])
def test_the_default_dtype_does_not_matter(batch: int) -> None:
    """Model loaders change it."""
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features)
    torch.set_default_dtype(torch.bfloat16)
    try:
        y, weight = matmul(x, matrix), dequantize(matrix)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_right(y, x, matrix)
    assert weight.dtype == torch.float32


def test_tensors_may_move() -> None:
    """share_memory_() gives the same tensors other memory."""
    matrix = build("ragged")
    x = make_x(1, matrix.spec.in_features)
    before = matmul(x, matrix)
    for tensor in matrix.tensors.values():
        tensor.share_memory_()
    assert torch.equal(matmul(x, matrix), before)


def test_inputs_with_a_gradient() -> None:
    matrix: SpqrMatrix = build("ragged")
    for batch in (1, GEMM_FROM):
        x = make_x(batch, matrix.spec.in_features)
        assert torch.equal(matmul(x.clone().requires_grad_(), matrix), matmul(x, matrix))
