"""The joint fit: its choice against NumPy, all of it against the oracle, and what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spqr_numba.config import SpqrConfig
from spqr_numba.kernels.bilevel import quantize_statistics
from spqr_numba.kernels.fit import fit_group
from spqr_numba.kernels.joint import Levels, choose, choose_reference, fit_jointly, grids_of

from .. import oracle
from .test_fit import awkward_groups

COLUMNS, ROWS = 16, 13
BITS = 3, 3, 3
THRESHOLDS = [math.inf, 1e-4]


def min_max(weights: np.ndarray, diagonal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale, zero = np.empty((2, weights.shape[1]), np.float32)
    fit_group(weights, diagonal, np.float32(np.inf), np.float32(7), scale, zero)
    return scale, zero


def fit(
    weights: np.ndarray, diagonal: np.ndarray, threshold: float, bits: tuple[int, int, int] = BITS
) -> tuple[np.ndarray, np.ndarray, Levels, np.ndarray]:
    """Scales and zeros [rows] as decoded, the levels, and codes [2, rows]."""
    scale, zero = min_max(weights, diagonal)
    codes = np.full((2, scale.size), 255, np.uint8)
    importance, upper = 1 / diagonal**2, upper_of(diagonal)
    limit = np.float32(threshold)
    levels = fit_jointly(weights, importance, upper, limit, scale, zero, *codes, bits)
    return scale, zero, levels, codes


def upper_of(diagonal: np.ndarray) -> np.ndarray:
    """A U of inputs that correlate."""
    behind = np.triu(np.ones((diagonal.size, diagonal.size), np.float32), 1)
    return np.diag(diagonal) - 0.2 * behind


def cost_of(
    weights: np.ndarray, diagonal: np.ndarray, threshold: float, scale: np.ndarray, zero: np.ndarray
) -> float:
    """What a stats block costs on given grids, in float64."""
    scale, zero = scale.astype(np.float64), zero.astype(np.float64)
    codes = oracle.encode(weights, scale, zero, BITS[0])
    terms = ((weights - scale * (codes - zero)) / diagonal[:, None]) ** 2
    return float(np.minimum(terms, threshold).sum())


def diagonal_of(columns: int) -> np.ndarray:
    return np.linspace(2, 0.5, columns, dtype=np.float32)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("columns", [1, 3, COLUMNS])
@pytest.mark.parametrize("name", awkward_groups(COLUMNS, ROWS))
def test_fit(name: str, columns: int, threshold: float) -> None:
    """Finite, stored as returned, and never dearer than min-max made bilevel."""
    weights, diagonal = awkward_groups(columns, ROWS)[name], diagonal_of(columns)
    scale, zero, levels, codes = fit(weights, diagonal, threshold)
    assert np.isfinite([*levels, *scale, *zero]).all()
    assert (codes < 8).all()
    for found, step, base, code in zip(
        (scale, zero), levels[::2], levels[1::2], codes, strict=True
    ):
        assert np.array_equal(found, (code * np.float64(step) + base).astype(np.float16))
        assert np.float16(step) == step
        assert np.float16(base) == base
    plain = min_max(weights, diagonal)
    for statistics in plain:
        quantize_statistics(statistics, 3, np.empty(ROWS, np.uint8))
    limit = cost_of(weights, diagonal, threshold, *plain)
    assert cost_of(weights, diagonal, threshold, scale, zero) <= limit * 1.0001 + 1e-30


@pytest.mark.parametrize("bits", [BITS, (2, 2, 4), (4, 4, 2), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("rows", [1, 8, ROWS])
def test_agrees_with_the_oracle(rows: int, threshold: float, bits: tuple[int, int, int]) -> None:
    random = np.random.default_rng(rows)
    weights = random.normal(0, 0.02, (COLUMNS, rows)).astype(np.float32)
    config = SpqrConfig(bits=bits[0], scale_bits=bits[1], zero_bits=bits[2], fit="joint")
    scale, zero = (x.astype(np.float64) for x in min_max(weights, diagonal_of(COLUMNS)))
    expected = oracle.JointFit(
        weights.T.astype(np.float64),
        upper_of(diagonal_of(COLUMNS)).astype(np.float64),
        threshold,
        scale,
        zero,
        config,
    ).run()
    found = fit(weights, diagonal_of(COLUMNS), threshold, bits)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


@pytest.mark.parametrize("around", [None, (0, 0), (3, 5), (7, 7)], ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_choice(threshold: float, around: tuple[int, int] | None) -> None:
    """Of all pairs, or of the 16 from one code below a pair to two above, moved in at the ends."""
    weights = awkward_groups(COLUMNS, ROWS)["spiked"]
    importance = 1 / diagonal_of(COLUMNS) ** 2
    levels = Levels(*np.float32([0.005, -0.01, 0.5, -1]))  # scale codes 0 and 1 are negative
    grids = grids_of(levels, BITS)
    allowed = np.ones((8, 8), bool)
    pairs = np.full(ROWS, 63, np.uint32)
    if around is not None:
        allowed[:] = False
        scale, zero = ({0: 0, 3: 2, 5: 4, 7: 4}[code] for code in around)
        allowed[scale : scale + 4, zero : zero + 4] = True
        pairs[:] = 8 * around[0] + around[1]
    limit, max_code = np.float32(threshold), np.float32(7)
    everywhere = around is None
    total = choose(weights, importance, limit, max_code, grids, BITS, everywhere, pairs)
    others = np.where(allowed.ravel(), grids, np.float32([[-1], [0], [0]]))
    expected, costs = choose_reference(weights, importance, threshold, 7, others)
    assert np.array_equal(pairs, expected)
    assert (grids[0, pairs] >= 0).all()
    assert total == pytest.approx(costs.sum(), rel=1e-5)


def test_a_refit_by_hand() -> None:
    """Rows s * (0, 1, 2, 3) with s = 1, 2.4, 3, 4: min-max finds scale = 1 + code, zero = 0.

    Row 1 keeps code 1, that is 2: with scale 3 its error is 0.6^2 + 2 * 1.2^2, with 2 it is
    0.4^2 + 0.8^2 + 1.2^2. What the scales lack is then (0, 0.4, 0, 0) at codes 0 ... 3, all of
    one weight, and the nearest line through that is 0.16 - 0.04 code. What is left has nothing to
    gain from another zero.
    """
    weights = np.outer([0, 1, 2, 3], [1, 2.4, 3, 4]).astype(np.float32)
    scale, zero = np.float32([[1, 2.4, 3, 4], [0, 0, 0, 0]])
    codes = np.empty((2, 4), np.uint8)
    ones, upper, limit = np.ones(4, np.float32), np.eye(4, dtype=np.float32), np.float32(np.inf)
    levels = fit_jointly(weights, ones, upper, limit, scale, zero, *codes, (2, 2, 2))
    assert codes[0].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(levels, [0.96, 1.16, 0, 0], atol=1e-3)
