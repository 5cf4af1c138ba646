"""matmul against the float64 product with the weight that the oracle decodes, element by element.

The tolerance is oracle.matmul_bound: what fp32 sums of this length may lose, and no more.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.errors import InputError
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.matmul import matmul, matmul_reference

from .. import oracle
from ..problems import make_spec
from .test_dequantize import CASES, build

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_right(
    y: torch.Tensor,
    x: torch.Tensor,
    matrix: SpqrMatrix,
    bias: torch.Tensor | None = None,
    weights: torch.dtype = torch.float32,
) -> None:
    """y has the shape, dtype and device of the product, and each element is within its bound.

    weights: what the parts of W_hat may be rounded to, which is exact in fp32.
    """
    assert y.shape == (*x.shape[:-1], matrix.spec.out_features)
    assert (y.dtype, y.device) == (x.dtype, x.device)
    expected = oracle.matmul(x, oracle.decode(matrix).weight, bias)
    bound = oracle.matmul_bound(x, matrix, bias, weights)
    given = y.double().cpu().numpy()
    excess = np.abs(given - expected) / bound
    # Infinity is right where the bound reaches beyond the largest number of the dtype.
    reaches = np.abs(expected) + bound >= torch.finfo(y.dtype).max
    excess[np.isinf(given) & reaches & (np.sign(given) == np.sign(expected))] = 0
    assert excess.size == 0 or excess.max() <= 1, f"{excess.max():.2f} times the bound"


def run(x: torch.Tensor, matrix: SpqrMatrix, device: torch.device) -> torch.Tensor:
    return matmul(x.to(device), matrix.to(device)).cpu()


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_oracles_product(name: str) -> None:
    matrix = build(name)
    x = make_x(3, matrix.spec.in_features)
    expected = oracle.matmul(x, oracle.decode(matrix).weight)
    np.testing.assert_allclose(matmul_reference(x.numpy(), matrix), expected, rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_matrix(name: str, batch: int, device: torch.device) -> None:
    matrix = build(name)
    x = make_x(batch, matrix.spec.in_features)
    assert_right(run(x, matrix, device), x, matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (33,), (0,), (2, 0, 1)], ids=str)
def test_batch_shapes_and_dtypes(
    batch: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    matrix = build("ragged")
    x = make_x(*batch, matrix.spec.in_features, dtype=dtype)
    assert_right(run(x, matrix, device), x, matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 40])
def test_bias(batch: int, dtype: torch.dtype, device: torch.device) -> None:
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    bias = make_x(matrix.spec.out_features, dtype=dtype, seed=1)
    y = matmul(x.to(device), matrix.to(device), bias.to(device)).cpu()
    assert_right(y, x, matrix, bias)


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_non_contiguous_x(batch: int, device: torch.device) -> None:
    matrix = build("ragged")
    n = matrix.spec.in_features
    strided = make_x(batch, 2 * n)[:, ::2]
    transposed = make_x(n, batch).T
    expanded = make_x(1, n).expand(batch, n)
    for x in (strided, transposed, expanded):
        assert_right(run(x, matrix, device), x, matrix)


def test_x_is_left_alone(device: torch.device) -> None:
    matrix = build("ragged").to(device)
    x = make_x(3, matrix.spec.in_features).to(device)
    before = x.clone()
    matmul(x, matrix)
    assert torch.equal(x, before)


@pytest.mark.parametrize("batch", [1, 40])
def test_same_bits_twice(batch: int, device: torch.device) -> None:
    matrix = build("paper").to(device)
    x = make_x(batch, matrix.spec.in_features).to(device)
    assert torch.equal(matmul(x, matrix), matmul(x, matrix))


@pytest.mark.parametrize("batch", [1, 40])
def test_dirty_memory_does_not_show(batch: int, device: torch.device) -> None:
    """The result comes from memory that last held NaN."""
    matrix = build("ragged").to(device)
    x = make_x(batch, matrix.spec.in_features).to(device)
    for _ in range(3):
        poison = [torch.full((batch, k), float("nan"), device=device) for k in (37, 75, 96)]
        del poison
        assert_right(matmul(x, matrix), x, matrix.to("cpu"))


@pytest.mark.parametrize("batch", [1, 40])
def test_spikes(batch: int, device: torch.device) -> None:
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features)
    x[:, ::7] *= 1e3
    assert_right(run(x, matrix, device), x, matrix)


@pytest.mark.parametrize("batch", [1, 40])
def test_denormals(batch: int, device: torch.device) -> None:
    matrix = build("ragged")
    x = torch.full((batch, matrix.spec.in_features), 1e-40)
    assert_right(run(x, matrix, device), x, matrix)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("batch", [3, 40])
def test_bad_inputs_stay_in_their_row(bad: float, batch: int, device: torch.device) -> None:
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features)
    x[1, 5] = bad
    y = run(x, matrix, device)
    assert not torch.isfinite(y[1]).any()
    others = torch.arange(batch) != 1
    assert_right(y[others], x[others], matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_identity_returns_the_weight(dtype: torch.dtype, device: torch.device) -> None:
    """Columns end up where the permutation says, not only in the right sum."""
    matrix = build("ragged")
    x = torch.eye(matrix.spec.in_features, dtype=dtype)
    assert_right(run(x, matrix, device), x, matrix)
    assert_right(run(x[3], matrix, device), x[3], matrix)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 74), "75"),
        (torch.tensor(1.0), "75"),
        (torch.zeros(2, 75, dtype=torch.float64), "float64"),
        (torch.zeros(2, 75, dtype=torch.int32), "int32"),
        (torch.zeros(2, 75, device="meta"), "meta"),
    ],
    ids=["width", "no dimension", "float64", "int32", "device"],
)
def test_wrong_x(x: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        matmul(x, build("ragged"))
    assert isinstance(caught.value, ValueError)


def test_wrong_bias() -> None:
    with pytest.raises(InputError, match="bias"):
        matmul(torch.zeros(2, 75), build("ragged"), torch.zeros(75))


def test_long_rows(device: torch.device) -> None:
    """A reduction of 2 ** 13, where sloppy sums begin to show."""
    matrix = random_matrix(make_spec(8, 8192), 40)
    for batch in (1, 20):
        x = make_x(batch, 8192)
        assert_right(run(x, matrix, device), x, matrix)
