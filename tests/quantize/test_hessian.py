"""The Hessian of a layer's inputs, its damping, its factor U, and what happens without one."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from spqr_numba.config import SpqrConfig
from spqr_numba.errors import InputError, NumericsError
from spqr_numba.quantize.hessian import Hessian, factorize

from .. import oracle
from ..problems import make_problem

IDENTITY = SpqrConfig(permutation="identity", damping=0.0)
INDEFINITE = torch.tensor([[1.0, 5.0], [5.0, 1.0]])  # eigenvalues 6 and -4
NEGATIVE = -torch.eye(4)  # damping is a share of a negative mean: it never helps


def accumulate(*inputs: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(inputs[0].shape[-1])
    for x in inputs:
        hessian.add(x)
    return hessian.matrix


def test_by_hand() -> None:
    # 2 / 2 * ((1 2)^T (1 2) + (3 4)^T (3 4))
    hessian = accumulate(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert hessian.tolist() == [[10, 14], [14, 20]]
    assert hessian.dtype == torch.float32


@pytest.mark.parametrize("n", [1, 40, 700])
def test_against_float64(n: int) -> None:
    x = make_problem(1, n, samples=90).inputs
    exact = 2 / len(x) * x.double().T @ x.double()
    hessian = accumulate(x[:30], x[30:31], x[31:])
    magnitude = 2 / len(x) * x.double().abs().T @ x.double().abs()
    assert ((hessian - exact).abs() <= 90 * 2.0**-24 * magnitude).all()
    assert torch.equal(hessian, hessian.T)


def test_any_leading_shape_and_dtype() -> None:
    x = torch.arange(24.0).reshape(6, 4)
    expected = accumulate(x)
    assert torch.equal(accumulate(x.reshape(2, 3, 4)), expected)
    assert torch.equal(accumulate(*x), expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(accumulate(x.to(dtype)), expected)


def test_a_token_that_weighs_three_is_there_three_times() -> None:
    x, dense = torch.arange(24.0).reshape(2, 6, 2)
    weights = torch.tensor([3.0, 0, 1, 1, 0, 1])
    weighed, repeated = Hessian(2), Hessian(2)
    weighed.add(x.reshape(2, 3, 2), dense.reshape(2, 3, 2), weights.reshape(2, 3))
    repeated.add(x[[0, 0, 0, 2, 3, 5]], dense[[0, 0, 0, 2, 3, 5]])
    torch.testing.assert_close(weighed.matrix, repeated.matrix)
    torch.testing.assert_close(weighed.drift, repeated.drift)


def test_no_input_at_all() -> None:
    assert not Hessian(3).matrix.any()


def test_wrong_width() -> None:
    with pytest.raises(InputError, match="inputs have 5 features; the Hessian has 4"):
        Hessian(4).add(torch.zeros(2, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_bad_inputs(bad: float) -> None:
    with pytest.raises(NumericsError, match="inputs hold NaN or inf"):
        accumulate(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("permutation", ["identity", "act-order"])
@pytest.mark.parametrize("n", [1, 7, 130])
def test_factor_against_the_oracle(n: int, permutation: str, shrinkage: float) -> None:
    hessian = make_problem(1, n).hessian
    settings = SpqrConfig(permutation=permutation, damping=0.1, shrinkage=shrinkage)
    factor = factorize(hessian, settings)
    order = oracle.column_order(np.zeros((1, n)), hessian.numpy(), permutation)
    ordered = hessian.double().numpy()[np.ix_(order, order)]
    expected = oracle.upper_factor(ordered, 0.1, shrinkage)
    assert factor.order.tolist() == order.tolist()
    assert torch.equal(factor.hessian, hessian[factor.order][:, factor.order])
    assert factor.damping == 0.1
    assert factor.upper is not None
    assert torch.equal(factor.upper, factor.upper.triu())
    np.testing.assert_allclose(factor.upper, expected, rtol=0, atol=1e-5 * expected.max())


def test_factor_by_hand() -> None:
    # H^-1 = (1 0.5; 0.5 1.25) = U^T U with U = (1 0.5; 0 1)
    factor = factorize(torch.tensor([[1.25, -0.5], [-0.5, 1.0]]), IDENTITY)
    assert factor.upper is not None
    np.testing.assert_allclose(factor.upper, [[1, 0.5], [0, 1]], atol=1e-6)


def test_shrinkage_by_hand() -> None:
    # -1 shrunk by half is -0.5, as above; the Hessian that is reported is what it was.
    hessian = torch.tensor([[1.25, -1.0], [-1.0, 1.0]])
    factor = factorize(hessian, replace(IDENTITY, shrinkage=0.5))
    assert factor.upper is not None
    np.testing.assert_allclose(factor.upper, [[1, 0.5], [0, 1]], atol=1e-6)
    assert torch.equal(factor.hessian, hessian)


def test_dead_inputs_are_damped_like_no_other() -> None:
    # mean(diag) = (3 + 0 + 6) / 3 = 3, half of it on the diagonal: 4.5, 7.5; the dead one gets 1.
    factor = factorize(
        torch.diag(torch.tensor([3.0, 0.0, 6.0])), SpqrConfig(permutation="identity", damping=0.5)
    )
    assert factor.dead.tolist() == [False, True, False]
    assert factor.upper is not None
    np.testing.assert_allclose(factor.upper.diagonal() ** -2, [4.5, 1, 7.5], rtol=1e-6)


def test_damping_grows_until_it_helps(caplog: pytest.LogCaptureFixture) -> None:
    # 1 + damping must exceed 5: 0, 0.01, 0.1 and 1 fail, each with a warning; 10 will do.
    with caplog.at_level(logging.WARNING):
        factor = factorize(INDEFINITE, IDENTITY)
    assert factor.damping == pytest.approx(10)
    assert factor.upper is not None
    assert len(caplog.records) == 4
    assert "not positive definite with damping 0.01" in caplog.text


def test_nothing_helps() -> None:
    with pytest.raises(NumericsError, match="cannot be factorised, even with damping") as caught:
        factorize(NEGATIVE, IDENTITY)
    assert "on_failed_factorization='round-to-nearest'" in str(caught.value)
    assert isinstance(caught.value, ArithmeticError)


def test_nothing_helps_and_rounding_will_do() -> None:
    config = SpqrConfig(permutation="identity", on_failed_factorization="round-to-nearest")
    assert factorize(NEGATIVE, config).upper is None


def test_spearman_needs_the_weight() -> None:
    with pytest.raises(InputError, match="spearman"):
        factorize(torch.eye(4), SpqrConfig(permutation="spearman"))
