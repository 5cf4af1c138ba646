"""quantize_weight: what it reports, what it promises of every result, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from spqr_numba.config import SpqrConfig
from spqr_numba.errors import InputError, NumericsError, SpqrError
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.quantize.hessian import factorize
from spqr_numba.quantize.solver import QuantizedWeight, quantize_weight

from .. import oracle
from ..problems import make_problem

PAPER = SpqrConfig()
PROBLEM = make_problem(40, 96)


def quantize(**settings: Any) -> QuantizedWeight:
    return quantize_weight(PROBLEM.weight, PROBLEM.hessian, SpqrConfig(**settings))


def assert_same(first: SpqrMatrix, second: SpqrMatrix) -> None:
    assert first.spec == second.spec
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second[name]), name


def test_the_report() -> None:
    quantized = quantize()
    report, weight, hessian = quantized.report, PROBLEM.weight.numpy(), PROBLEM.hessian.numpy()
    expected = oracle.quantize(weight, hessian, PAPER)
    loss = oracle.layer_loss(weight, quantized.weight.numpy(), hessian)
    size = oracle.layer_loss(weight, 0 * weight, hessian)
    assert report.loss == pytest.approx(loss, rel=1e-4)
    assert report.relative_loss == pytest.approx(loss / size, rel=1e-4)
    assert report.threshold == pytest.approx(expected.threshold, rel=1e-5)
    assert report.outlier_share == quantized.matrix.outlier_share > 0
    assert report.bits_per_weight == quantized.matrix.bits_per_weight
    assert report.error_before > report.error_after > 0
    assert report.damping == 1
    assert not report.rounded_to_nearest
    assert report.seconds > 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"outlier_threshold": None}, {"damping": 0.1}, {"damping": 0.1, "shrinkage": 0.4}],
    ids=str,
)
def test_errors_add_up_to_the_loss(settings: dict[str, Any]) -> None:
    """sum err^2 = tr(D (H + damping) D^T), of H as it was factorised: each err is what the columns
    behind could not mend."""
    report = quantize(**settings).report
    error = PROBLEM.weight - quantize(**settings).weight
    damping = report.damping * PROBLEM.hessian.diagonal().mean()
    hessian, shrinkage = PROBLEM.hessian, settings.get("shrinkage", 0)
    damped = (1 - shrinkage) * hessian + shrinkage * torch.diag(hessian.diagonal())
    damped += damping * torch.eye(len(hessian))
    assert report.error_after == pytest.approx(
        oracle.layer_loss(error.numpy(), 0 * error.numpy(), damped.numpy()), rel=1e-4
    )


def test_without_a_hessian_the_loss_is_the_squared_error() -> None:
    quantized = quantize_weight(PROBLEM.weight, None, SpqrConfig.rtn(3, 16))
    error = (PROBLEM.weight - quantized.weight).double()
    assert quantized.report.loss == pytest.approx(error.square().sum().item(), rel=1e-5)
    assert quantized.report.rounded_to_nearest
    assert quantized.report.threshold == math.inf


def test_a_lower_threshold_keeps_more_and_loses_less() -> None:
    reports = [quantize(outlier_threshold=t).report for t in (None, 1.0, 0.2, 0.02)]
    shares = [report.outlier_share for report in reports]
    losses = [report.loss for report in reports]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert losses == sorted(losses, reverse=True)


def test_buffers_follow_the_settings() -> None:
    assert quantize(outlier_threshold=None).matrix.outliers is None
    assert quantize(outlier_threshold=1e9).matrix.outliers == 0
    assert "permutation" in quantize().matrix.tensors
    assert "permutation" not in quantize(permutation="identity").matrix.tensors


def test_one_factor_serves_several_weights() -> None:
    factor = factorize(PROBLEM.hessian, PAPER)
    for seed in range(2):
        weight = make_problem(24, 96, seed).weight
        shared = quantize_weight(weight, factor, PAPER)
        alone = quantize_weight(weight, PROBLEM.hessian, PAPER)
        assert_same(shared.matrix, alone.matrix)
        assert torch.equal(shared.weight, alone.weight)


def test_the_weight_may_be_of_any_float_dtype_and_layout() -> None:
    expected = quantize_weight(PROBLEM.weight.half().float(), PROBLEM.hessian, PAPER)
    parameter = torch.nn.Parameter(PROBLEM.weight.half())
    strided = PROBLEM.weight.half().T.contiguous().T
    for weight in (parameter, strided, PROBLEM.weight.half().double()):
        before = weight.detach().clone()
        assert_same(quantize_weight(weight, PROBLEM.hessian, PAPER).matrix, expected.matrix)
        assert torch.equal(weight, before)


def test_the_hessian_is_left_alone() -> None:
    before = PROBLEM.hessian.clone()
    quantize()
    assert torch.equal(PROBLEM.hessian, before)


def test_a_weight_on_its_grid_is_kept() -> None:
    """Scale 1/8 and zero 3 are exact in fp16: nothing is lost, so nothing moves."""
    codes = torch.randint(0, 8, (20, 48), generator=torch.Generator().manual_seed(0))
    codes[:, ::16], codes[:, 1::16] = 0, 7
    weight = (codes - 3) / 8
    settings = {"scale_bits": 16, "zero_bits": 16, "permutation": "identity"}
    quantized = quantize_weight(
        weight, make_problem(1, 48).hessian, SpqrConfig(outlier_threshold=None, **settings)
    )
    assert torch.equal(quantized.weight, weight)
    assert quantized.report.loss == 0


def test_dead_inputs() -> None:
    """Their weights are 0 to the grid, whatever they were, and cost nothing."""
    problem = make_problem(24, 48, dead=(3, 40))
    loud = problem.weight.clone()
    loud[:, [3, 40]] = 1e4
    first, second = (quantize_weight(w, problem.hessian, PAPER) for w in (problem.weight, loud))
    assert torch.equal(first.weight, second.weight)
    assert first.report.loss == pytest.approx(second.report.loss, rel=1e-6)


def test_zeros() -> None:
    quantized = quantize_weight(torch.zeros(20, 40), make_problem(1, 40).hessian, PAPER)
    assert not quantized.weight.any()
    assert quantized.report.loss == quantized.report.relative_loss == 0


def test_rows_all_alike_keep_no_outliers() -> None:
    """Without variance over rows there is no T to measure an outlier by."""
    row = PROBLEM.weight[:1]
    for weight in (row, row.expand(20, -1)):
        quantized = quantize_weight(weight, PROBLEM.hessian, PAPER)
        assert quantized.matrix.outliers == 0
        assert quantized.report.threshold == math.inf


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-6, 1e3], ids=str)
@pytest.mark.parametrize("settings", [{}, {"scale_bits": 16, "zero_bits": 16}], ids=str)
def test_far_from_the_usual_size(size: float, settings: dict[str, Any]) -> None:
    """Below and near the end of fp16 the codes may be poor, but they are finite and decodable."""
    weight = PROBLEM.weight * size
    quantized = quantize_weight(weight, PROBLEM.hessian, SpqrConfig(**settings))
    assert torch.isfinite(quantized.weight).all()
    assert np.array_equal(oracle.decode(quantized.matrix).weight, quantized.weight.numpy())
    assert quantized.weight.abs().max() <= 2 * weight.abs().max()


@pytest.mark.parametrize("size", [1e6, 1e8, 1e38], ids=str)
@pytest.mark.parametrize("settings", [{}, {"scale_bits": 16, "zero_bits": 16}], ids=str)
def test_beyond_fp16(size: float, settings: dict[str, Any]) -> None:
    """Weights whose scale fp16 cannot hold: an error or finite numbers, never silent NaN."""
    weight = PROBLEM.weight * size
    try:
        quantized = quantize_weight(weight, PROBLEM.hessian, SpqrConfig(**settings))
    except NumericsError:
        return
    assert torch.isfinite(quantized.weight).all()
    quantized.matrix.check_values()


def test_failed_factorisation() -> None:
    with pytest.raises(NumericsError, match="cannot be factorised"):
        quantize_weight(torch.randn(4, 8), -torch.eye(8), PAPER)


def test_failed_factorisation_rounds_to_nearest_by_option() -> None:
    settings = {"group_size": 16, "scale_bits": 16, "zero_bits": 16, "permutation": "identity"}
    config = SpqrConfig(on_failed_factorization="round-to-nearest", **settings)
    quantized = quantize_weight(PROBLEM.weight, -torch.eye(96), config)
    nearest = quantize_weight(PROBLEM.weight, None, SpqrConfig.rtn(3, 16))
    assert quantized.report.rounded_to_nearest
    assert quantized.matrix.outliers == 0
    assert torch.equal(quantized.weight, nearest.weight)


def test_grown_damping_is_reported() -> None:
    hessian = torch.tensor([[1.0, 5.0], [5.0, 1.0]])  # positive definite once 4 is added
    report = quantize_weight(torch.randn(4, 2), hessian, SpqrConfig(damping=0.0)).report
    assert report.damping == pytest.approx(10)


NAN_WEIGHT = torch.full((4, 8), float("nan"))
INF_WEIGHT = torch.full((4, 8), float("inf"))
WEIGHT, HESSIAN = torch.randn(4, 8), torch.eye(8)


@pytest.mark.parametrize(
    ("weight", "hessian", "error", "message"),
    [
        (NAN_WEIGHT, HESSIAN, NumericsError, "the weight holds NaN or inf"),
        (INF_WEIGHT, HESSIAN, NumericsError, "the weight holds NaN or inf"),
        (WEIGHT, HESSIAN * float("nan"), NumericsError, "the Hessian holds NaN or inf"),
        (WEIGHT, torch.eye(7), InputError, r"the Hessian has shape \[7, 7\]; it must be \[8, 8\]"),
        (WEIGHT, torch.ones(8), InputError, r"the Hessian has shape \[8\]; it must be \[8, 8\]"),
        (WEIGHT, None, InputError, "use_hessian=True"),
        (WEIGHT[0], HESSIAN, InputError, r"the weight is torch.float32 \[8\]; it must be a float"),
        (WEIGHT.int(), HESSIAN, InputError, r"the weight is torch.int32 \[4, 8\]"),
        (WEIGHT[:0], HESSIAN, InputError, r"the weight is torch.float32 \[0, 8\]"),
    ],
    ids=[
        "nan weight",
        "inf weight",
        "nan hessian",
        "small hessian",
        "flat hessian",
        "no hessian",
        "flat weight",
        "integers",
        "no rows",
    ],
)
def test_what_it_refuses(
    weight: torch.Tensor, hessian: torch.Tensor | None, error: type[SpqrError], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize_weight(weight, hessian, PAPER)


def test_a_hessian_that_is_not_used() -> None:
    config = SpqrConfig.rtn(3, 16)
    with_one = quantize_weight(PROBLEM.weight, PROBLEM.hessian, config)
    assert_same(with_one.matrix, quantize_weight(PROBLEM.weight, None, config).matrix)
