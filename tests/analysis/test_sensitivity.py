"""Sensitivities, outliers and statistics against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spqr_numba.analysis.layers import CalibratedLayer, Heads
from spqr_numba.analysis.sensitivity import (
    analyze,
    decode_statistics,
    error_share,
    outlier_mask,
    second_level_effect,
    sensitivity,
)
from spqr_numba.config import SpqrConfig
from spqr_numba.errors import InputError
from spqr_numba.format.packing import csr_to_outliers
from spqr_numba.kernels.dequantize import dequantize
from spqr_numba.quantize.solver import quantize_weight

from ..problems import make_problem


def test_sensitivity_is_its_formula() -> None:
    problem = make_problem(24, 32)
    config = SpqrConfig(damping=0.1)
    damped = problem.hessian.double()
    damped.diagonal().add_(0.1 * problem.hessian.diagonal().mean())
    inverse = torch.linalg.inv(damped).diagonal()
    rounded = quantize_weight(problem.weight, None, SpqrConfig.rtn(3)).weight
    expected = (problem.weight - rounded).double() ** 2 / (2 * inverse)
    found = sensitivity(problem.weight, problem.hessian, config)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3)


@pytest.mark.parametrize("permutation", ["act-order", "identity"])
def test_the_mask_is_in_the_layers_own_order(permutation: str) -> None:
    problem = make_problem(48, 64)
    config = SpqrConfig(permutation=permutation, outlier_threshold=0.1)
    matrix = quantize_weight(problem.weight, problem.hessian, config).matrix
    csr = {k: v for k, v in matrix.tensors.items() if k.startswith("outlier_")}
    permuted = (csr_to_outliers(csr, 64) != 0).numpy()
    order = matrix.tensors["permutation"].long() if permutation == "act-order" else slice(None)
    expected = np.zeros_like(permuted)
    expected[:, order] = permuted
    assert expected.any()
    np.testing.assert_array_equal(outlier_mask(matrix), expected)


def test_without_outliers_the_mask_is_empty() -> None:
    problem = make_problem(16, 32)
    config = SpqrConfig(outlier_threshold=None)
    matrix = quantize_weight(problem.weight, problem.hessian, config).matrix
    assert not outlier_mask(matrix).any()


@pytest.mark.parametrize("pattern", ["rows", "columns", "rotary_pairs", "unstructured"])
def test_patterns_planted_in_a_weight_are_found(pattern: str) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=random) * 0.02
    planted = torch.zeros(128, 256, dtype=torch.bool)
    places = torch.rand(128, 256, generator=random)
    if pattern == "rows":
        planted[[3, 90]] = places[[3, 90]] < 0.1
    elif pattern == "columns":
        planted[:, [7, 100]] = places[:, [7, 100]] < 0.3
    elif pattern == "rotary_pairs":
        planted[[5, 21, 70, 86]] = places[[5, 21, 70, 86]] < 0.1
    else:
        planted = places < 0.002
    weight[planted] *= 40
    layer = CalibratedLayer("q_proj", weight, torch.eye(256), Heads(32, rotated=True))
    found = analyze(layer, SpqrConfig(outlier_threshold=2.0))
    scores = found.structure.to_dict()
    assert scores[pattern] > 0.9, scores
    assert planted.numpy()[found.outliers].mean() > 0.95
    assert found.report.error_after < found.report.error_before


def test_error_share() -> None:
    values = np.array([[1, 0, 5], [2, 0, 2]], dtype=np.float32)
    shares = error_share(values, np.array([0, 1 / 6, 1 / 2, 1]))
    np.testing.assert_allclose(shares, [0, 0.5, 0.9, 1])
    np.testing.assert_array_equal(error_share(0 * values, np.array([0.5])), [0])
    with pytest.raises(InputError, match="between 0 and 1"):
        error_share(values, np.array([1.5]))


@pytest.mark.parametrize("bits", [3, 16])
def test_statistics_are_those_that_kernels_decode(bits: int) -> None:
    weight = make_problem(40, 48).weight
    config = SpqrConfig(
        scale_bits=bits,
        zero_bits=bits,
        outlier_threshold=None,
        permutation="identity",
        use_hessian=False,
    )
    matrix = quantize_weight(weight, None, config).matrix
    scales, zeros = decode_statistics(matrix, "scale"), decode_statistics(matrix, "zero")
    steps = dequantize(matrix).numpy() / np.repeat(scales.T, 16, axis=1)
    codes = steps + np.repeat(zeros.T, 16, axis=1)
    np.testing.assert_allclose(codes, codes.round(), atol=1e-4)
    assert codes.round().min() == 0
    assert codes.round().max() == 7


def test_the_second_level_moves_statistics_a_little_and_costs_something() -> None:
    effect = second_level_effect(make_problem(64, 64).weight, SpqrConfig())
    assert effect.scales_before.shape == effect.scales_after.shape == (4, 64)
    assert not np.array_equal(effect.scales_before, effect.scales_after)
    assert effect.loss_before < effect.loss_after < 4 * effect.loss_before
