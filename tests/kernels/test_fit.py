"""Fitting a grid and making it bilevel: kernel against NumPy reference against the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spqr_numba.kernels.bilevel import bilevel_reference, quantize_statistics
from spqr_numba.kernels.fit import fit_group, fit_reference

from .. import oracle

COLUMNS, ROWS = 16, 40


def awkward_groups(columns: int, rows: int) -> dict[str, np.ndarray]:
    """Name -> weights fp32 [columns, rows]."""
    random = np.random.default_rng(0)
    normal = random.normal(0, 0.02, (columns, rows))
    spiked = normal.copy()
    spiked[0, ::2] *= 100
    spiked[columns // 2, ::3] *= -50
    groups = {
        "normal": normal,
        "spiked": spiked,
        "all alike": np.full((columns, rows), -0.7),
        "zeros": np.zeros((columns, rows)),
        "hardly any spread": 1 + 1e-5 * normal,
        "positive": np.abs(normal) + 0.01,
        "two values": np.where(normal > 0, 0.5, -0.25),
        "two of each extreme": np.concatenate([normal[: columns // 2 + 1]] * 2)[:columns],
        "tiny": 1e-30 * normal,
        "huge": 1e6 * normal,
    }
    return {name: group.astype(np.float32) for name, group in groups.items()}


def fit(
    weights: np.ndarray, diagonal: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    scale, zero = np.full((2, weights.shape[1]), np.nan, np.float32)
    fit_group(weights, diagonal, np.float32(threshold), np.float32(7), scale, zero)
    return scale, zero


def fit_by_oracle(
    weights: np.ndarray, diagonal: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    rows = weights.T.astype(np.float64)
    gains = oracle.leave_one_out(rows, diagonal.astype(np.float64), 3)
    return oracle.min_max(rows, gains > threshold, 3)


@pytest.mark.parametrize("threshold", [math.inf, 1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("columns", [1, 2, 3, COLUMNS])
@pytest.mark.parametrize("name", awkward_groups(COLUMNS, ROWS))
def test_fit(name: str, columns: int, threshold: float) -> None:
    weights = awkward_groups(columns, ROWS)[name]
    diagonal = np.linspace(2, 0.5, columns, dtype=np.float32)
    expected = fit_by_oracle(weights, diagonal, threshold)
    for found in (
        fit(weights, diagonal, threshold),
        fit_reference(weights, diagonal, threshold, 7),
    ):
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_fit_leaves_out_what_helps_the_rest() -> None:
    """The case of tests/quantize/test_by_hand.py: 30 goes, the grid is that of 0 ... 3."""
    weights = np.array([[0, 1, 2, 3, 30]], np.float32).T
    scale, zero = np.empty((2, 1), np.float32)
    fit_group(weights, np.ones(5, np.float32), np.float32(10.9), np.float32(3), scale, zero)
    assert (scale.item(), zero.item()) == (1, 0)


STATISTICS = {
    "normal": np.random.default_rng(1).uniform(0.005, 0.02, 16),
    "one": np.array([0.25]),
    "alike": np.full(8, 0.3),
    "zeros": np.zeros(8),
    "both signs": np.linspace(-3.3, 7.7, 11),
    "negative": np.linspace(-9, -2, 16),
    "far from 0": 2000 + np.linspace(0, 1, 8),
    "a step below 2^-12 of the base": 1000 + np.linspace(0, 1, 8),
    "a base below 2^-8 of the step": np.linspace(1e-4, 7, 8),
    "denormal": np.linspace(1, 9, 9) * 2.0**-24,
    "below fp16": np.linspace(1, 9, 9) * 1e-12,
    "large": np.linspace(0, 65000, 8),
}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", STATISTICS)
def test_bilevel(name: str, bits: int) -> None:
    statistics = STATISTICS[name].astype(np.float32)
    decoded, codes = statistics.copy(), np.full(len(statistics), 255, np.uint8)
    step, base = np.array(quantize_statistics(decoded, bits, codes), np.uint16).view(np.float16)
    expected = bilevel_reference(statistics, bits)
    assert np.array_equal(codes, expected[0])
    assert (step, base) == (expected[1], expected[2])
    assert np.array_equal(decoded, expected[3])
    assert np.array_equal(
        decoded, oracle.second_level(statistics.astype(np.float64), bits, len(statistics))
    )
    assert np.isfinite(decoded).all()
    assert codes.max() < 2**bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bilevel_is_as_near_as_its_step_allows(bits: int) -> None:
    statistics = STATISTICS["normal"].astype(np.float32)
    step = float(bilevel_reference(statistics, bits)[1])
    decoded = bilevel_reference(statistics, bits)[3]
    assert np.abs(decoded - statistics).max() <= step / 2 + 2.0**-11 * statistics.max()
