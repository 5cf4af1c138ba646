"""Asymmetric calibration: the weight aimed at, and what aiming at it is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spqr_numba.config import PRESETS, SpqrConfig
from spqr_numba.errors import InputError, NumericsError
from spqr_numba.quantize.drift import aimed_at
from spqr_numba.quantize.hessian import Hessian, factorize
from spqr_numba.quantize.solver import quantize_weight

from ..problems import make_problem

CONFIG = SpqrConfig(damping=0.1)
PROBLEM = make_problem(40, 96)


def drifted(seed: int = 1, share: float = 0.3) -> torch.Tensor:
    """The inputs that a dense model has in the place of PROBLEM's."""
    noise = torch.randn(PROBLEM.inputs.shape, generator=torch.Generator().manual_seed(seed))
    return PROBLEM.inputs * (1 - share / 4) + share * noise


def sums_of(inputs: torch.Tensor, dense: torch.Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[-1])
    hessian.add(inputs, dense)
    return hessian


def test_drift_by_hand() -> None:
    # 2 / 2 * (x~ - x) x^T of one input; the other, without a twin, counts as not drifted
    hessian = Hessian(2)
    hessian.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 1.0]]))
    assert hessian.drift is not None
    assert hessian.drift.tolist() == [[2 * 3, 2 * 6], [2 * -1, 2 * -2]]
    hessian.add(torch.tensor([[5.0, 5.0]]))
    assert hessian.drift.tolist() == [[3, 6], [-1, -2]]


def test_no_twins_no_drift() -> None:
    hessian = Hessian(2)
    hessian.add(torch.ones(3, 2))
    assert hessian.drift is None


def test_bad_twins() -> None:
    with pytest.raises(InputError, match=r"dense inputs are \[2, 4\]; they must be \[3, 4\]"):
        sums_of(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(NumericsError, match="inputs hold NaN or inf"):
        _ = sums_of(torch.ones(3, 4), torch.full((3, 4), torch.nan)).drift


@pytest.mark.parametrize("damping", [0.1, 3.0])
@pytest.mark.parametrize("permutation", ["identity", "act-order"])
def test_the_aim_is_damped_least_squares(permutation: str, damping: float) -> None:
    """Against float64 on the inputs themselves, the damping as further, undrifted inputs."""
    dense = drifted()
    sums = sums_of(PROBLEM.inputs, dense)
    config = replace(CONFIG, permutation=permutation, damping=damping)
    factor = factorize(sums.matrix, config, drift=sums.drift)
    aim = aimed_at(PROBLEM.weight.T[factor.order], factor)
    x, twin, w = (t.double().numpy() for t in (PROBLEM.inputs, dense, PROBLEM.weight))
    n = x.shape[1]
    damped = np.sqrt(max(1, damping) * (x**2).sum(0).mean()) * np.eye(n)
    expected, *_ = np.linalg.lstsq(
        np.vstack([x, damped]), np.vstack([twin @ w.T, damped @ w.T]), rcond=None
    )
    np.testing.assert_allclose(aim, expected[factor.order], rtol=0, atol=1e-4 * abs(w).max())


@pytest.mark.parametrize("preset", ["paper", "balanced"])
def test_without_drift_nothing_changes(preset: str) -> None:
    config, sums = PRESETS[preset], sums_of(PROBLEM.inputs, PROBLEM.inputs)
    assert sums.drift is not None
    assert not sums.drift.any()
    plain = quantize_weight(PROBLEM.weight, factorize(sums.matrix, config), config)
    aimed = quantize_weight(
        PROBLEM.weight, factorize(sums.matrix, config, drift=sums.drift), config
    )
    assert torch.equal(plain.weight, aimed.weight)
    for name, tensor in plain.matrix.tensors.items():
        assert torch.equal(tensor, aimed.matrix[name]), name


def test_the_error_against_the_dense_output_falls() -> None:
    """And the loss, which is that against W, rises: it says what is given up for it."""
    dense = drifted()
    sums = sums_of(PROBLEM.inputs, dense)
    results = [
        quantize_weight(PROBLEM.weight, factorize(sums.matrix, CONFIG, drift=drift), CONFIG)
        for drift in (None, sums.drift)
    ]
    wanted = dense @ PROBLEM.weight.T
    errors = [(PROBLEM.inputs @ r.weight.T - wanted).square().sum().item() for r in results]
    assert errors[1] < 0.9 * errors[0]
    assert results[1].report.loss > results[0].report.loss


def test_dead_inputs_take_no_part() -> None:
    """One that has died in the compressed model alone: the others stand in for it."""
    inputs = PROBLEM.inputs.clone()
    inputs[:, 5] = 0
    sums = sums_of(inputs, PROBLEM.inputs)
    result = quantize_weight(
        PROBLEM.weight, factorize(sums.matrix, CONFIG, drift=sums.drift), CONFIG
    )
    assert torch.isfinite(result.weight).all()
    factor = factorize(sums.matrix, CONFIG, drift=sums.drift)
    position = factor.order.tolist().index(5)
    aim = aimed_at(PROBLEM.weight.T[factor.order], factor)
    assert torch.equal(aim[position], PROBLEM.weight[:, 5])


def test_rounding_to_nearest_knows_no_drift() -> None:
    config = replace(CONFIG, on_failed_factorization="round-to-nearest")
    factor = factorize(-torch.eye(96), config, drift=torch.eye(96))
    assert factor.upper is None
    columns = PROBLEM.weight.T
    assert aimed_at(columns, factor) is columns


def test_a_drift_beyond_all_numbers() -> None:
    factor = factorize(PROBLEM.hessian, CONFIG, drift=torch.full((96, 96), 3e38))
    with pytest.raises(NumericsError, match=r"drifted too far .* without asymmetric"):
        quantize_weight(torch.ones(4, 96), factor, CONFIG)
