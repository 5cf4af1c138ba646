"""Weights small enough to quantize by hand: the oracle and the solver both, number by number.

Groups are whole rows and statistics fp16 unless said, so that a case is a few sums. Expected
weights are those of the layer's own column order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spqr_numba.config import SpqrConfig
from spqr_numba.quantize.solver import quantize_weight

from .. import oracle

PLAIN = {
    "bits": 2,
    "group_size": None,
    "scale_bits": 16,
    "zero_bits": 16,
    "outlier_threshold": None,
    "permutation": "identity",
    "damping": 0.0,
}


def half(value: float) -> float:
    return float(np.float16(value))


def by_oracle(
    weight: torch.Tensor, hessian: torch.Tensor | None, config: SpqrConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    result = oracle.quantize(weight.numpy(), None if hessian is None else hessian.numpy(), config)
    return result.codes, result.weight, result.permutation


def by_solver(
    weight: torch.Tensor, hessian: torch.Tensor | None, config: SpqrConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    result = quantize_weight(weight, hessian if config.use_hessian else None, config)
    stored = oracle.decode(result.matrix)
    return stored.codes, result.weight.double().numpy(), stored.permutation


@pytest.fixture(params=[by_oracle, by_solver], ids=["oracle", "solver"])
def check(request: pytest.FixtureRequest) -> Any:
    """check(weight, diagonal or matrix of H, settings, codes=..., weights=..., order=...)."""

    def check(
        weight: list[list[float]],
        hessian: list[Any],
        settings: dict[str, Any],
        *,
        codes: list[list[int]] | None = None,
        weights: list[list[float]] | None = None,
        order: list[int] | None = None,
    ) -> None:
        h = torch.tensor(hessian, dtype=torch.float32)
        h = torch.diag(h) if h.ndim == 1 else h
        config = SpqrConfig(**(PLAIN | settings))
        found_codes, found, permutation = request.param(
            torch.tensor(weight, dtype=torch.float32), h, config
        )
        if codes is not None:
            assert found_codes.tolist() == codes
        if weights is not None:
            np.testing.assert_allclose(found, weights, rtol=2e-7, atol=1e-7)
        if order is not None:
            assert permutation.tolist() == order

    return check


def test_round_to_nearest(check: Any) -> None:
    check(
        # row 0: scale (3 - 0) / 3 = 1, zero 0. Row 1: scale (2 - -1) / 3 = 1, zero 1, and
        # w / scale + zero = (0, 0.6, 1.6, 3).
        [[0, 1, 2, 3], [-1, -0.4, 0.6, 2]],
        [1, 1, 1, 1],
        {"use_hessian": False},
        codes=[[0, 1, 2, 3], [0, 1, 2, 3]],
        weights=[[0, 1, 2, 3], [-1, 0, 1, 2]],
    )


def test_ties_go_to_even(check: Any) -> None:
    # scale 1, zero 0: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2
    check([[0, 0.5, 1.5, 2.5, 3]], [1] * 5, {}, codes=[[0, 0, 2, 2, 3]])


def test_error_moves_on(check: Any) -> None:
    # H^-1 = U^T U with U = (1 0.5; 0 1) in columns 0 and 1, the rest independent of them.
    hessian = [[1.25, -0.5, 0, 0], [-0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    check(
        # row 0, scale 1, zero 0: 1.4 -> 1, error 0.4; column 1 becomes 1.6 - 0.4 * 0.5 = 1.4 -> 1.
        # row 1, scale 1, zero 1: -1 is exact; -0.6 + 1 = 0.4 -> 0, that is -1; 1.6 -> 2.
        [[1.4, 1.6, 0, 3], [-1, -0.6, 0.6, 2]],
        hessian,
        {},
        codes=[[1, 1, 0, 3], [0, 0, 2, 3]],
        weights=[[1, 1, 0, 3], [-1, -1, 1, 2]],
    )


def test_damping_weakens_what_moves_on(check: Any) -> None:
    # 100 * mean(1.25, 1, 1, 1) on the diagonal: columns are all but independent, 1.6 stays -> 2
    hessian = [[1.25, -0.5, 0, 0], [-0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    check([[1.4, 1.6, 0, 3]], hessian, {"damping": 100.0}, codes=[[1, 2, 0, 3]])


def test_act_order(check: Any) -> None:
    check(
        # By diag(H), equal ones in their order: 1, 4, 3, 2, 0. Codes are stored in that order.
        [[0, 1, 2, 3, 2]],
        [1, 5, 2, 3, 5],
        {"permutation": "act-order"},
        order=[1, 4, 3, 2, 0],
        codes=[[1, 2, 3, 2, 0]],
        weights=[[0, 1, 2, 3, 2]],
    )


SPEARMAN_WEIGHT = [[1, 4, 1, 2], [2, 3, 2, 1], [3, 2, 4, 4], [4, 1, 3, 3]]
# Centred ranks, doubled: column 0 (-3 -1 1 3), 1 (3 1 -1 -3), 2 (-3 -1 3 1), 3 (-1 -3 3 1).
# Products: 0.1 = -20, 0.2 = 16, 0.3 = 12, 1.2 = -16, 1.3 = -12, 2.3 = 16.


def test_spearman_starts_at_the_loudest_input(check: Any) -> None:
    # From 3 to 2 (16), from 2 to 0 (16), 1 is left.
    check(SPEARMAN_WEIGHT, [1, 1, 1, 2], {"permutation": "spearman"}, order=[3, 2, 0, 1])


def test_spearman_without_a_hessian_starts_at_column_0(check: Any) -> None:
    # From 0 to 2 (16), from 2 to 3 (16), 1 is left.
    settings = {"permutation": "spearman", "use_hessian": False}
    check(SPEARMAN_WEIGHT, [1, 1, 1, 1], settings, order=[0, 2, 3, 1])


def test_spearman_of_one_row_keeps_the_order(check: Any) -> None:
    # All ranks are equal, so all correlations are: the lowest index goes first.
    check([[3, 1, 2]], [1, 2, 1], {"permutation": "spearman"}, order=[1, 0, 2])


def test_dead_inputs_become_zero(check: Any) -> None:
    check(
        # Input 2 never was anything but 0: its weight of 100 does not spoil the grid.
        [[1, 3, 100, 2], [1, 2, -50, 3]],
        [1, 3, 0, 2],
        {"permutation": "act-order", "damping": 1.0},
        order=[1, 3, 0, 2],
        codes=[[3, 2, 1, 0], [2, 3, 1, 0]],
        weights=[[1, 3, 0, 2], [1, 2, 0, 3]],
    )


def test_all_inputs_dead(check: Any) -> None:
    check([[1, 3], [2, 4]], [0, 0], {"damping": 1.0}, weights=[[0, 0], [0, 0]])


def test_an_outlier_while_quantizing(check: Any) -> None:
    # Only column 2 varies: T = (0.3^2 / 2) / 4 = 0.01125 (U = 1). Row 0: 2.3 -> 2, error 0.09 > T,
    # so fp16(0.3) is stored beside code 2.
    check(
        [[0, 1, 2.3, 3], [0, 1, 2, 3]],
        [1, 1, 1, 1],
        {"outlier_threshold": 1.0, "outlier_search": "simplified"},
        codes=[[0, 1, 2, 3], [0, 1, 2, 3]],
        weights=[[0, 1, 2 + half(0.3), 3], [0, 1, 2, 3]],
    )


def test_what_fp16_loses_of_an_outlier_moves_on(check: Any) -> None:
    # U = (1 10; 0 1) in columns 0 and 1: H^-1 = (1 10; 10 101), of determinant 1. An outlier of
    # 0.3 at column 0 leaves 0.3 - fp16(0.3) = -4.88e-5, and 2 + 4.88e-4 stays nearest to 2; if all
    # of 0.3 moved on, column 1 would become 2 - 3 and its code 0.
    u = 10.0
    hessian = [[u * u + 1, -u, 0, 0], [-u, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    check(
        [[1.3, 2, 0, 3], [1, 2, 0, 3]],
        hessian,
        {"outlier_threshold": 1.0, "outlier_search": "simplified"},
        codes=[[1, 2, 0, 3], [1, 2, 0, 3]],
    )


# Row 0 has one huge weight; T = 0.15 * (27^2 / 2) / 5 = 10.9 (only column 4 varies, U = 1).
HUGE = [[0, 1, 2, 3, 30], [0, 1, 2, 3, 3]]


def test_leave_one_out(check: Any) -> None:
    # On the grid of scale 10 the errors are 0, 1, 4, 9, 0: 14 in all. Without 30 the rest is exact:
    # gain 14 > T. Without 0 (scale 29 / 3 from 1 on) 0, 1, 4, 0 remain: gain 9 < T; the others gain
    # 1, 4, 9. So 30 is left out, the grid is that of 0 ... 3, and 30 = 3 + an outlier of 27.
    check(
        HUGE,
        [1] * 5,
        {"outlier_threshold": 0.15},
        codes=[[0, 1, 2, 3, 3], [0, 1, 2, 3, 3]],
        weights=HUGE,
    )


def test_simplified_search_leaves_the_grid_alone(check: Any) -> None:
    # Errors of 1, 4 and 9 on the grid of scale 10 are below T: nothing is an outlier.
    check(
        HUGE,
        [1] * 5,
        {"outlier_threshold": 0.15, "outlier_search": "simplified"},
        codes=[[0, 0, 0, 0, 3], [0, 1, 2, 3, 3]],
        weights=[[0, 0, 0, 0, 30], [0, 1, 2, 3, 3]],
    )


@pytest.mark.parametrize(
    ("value", "code", "zero"), [(0.5, 3, 0), (-0.5, 0, 3), (0.0, 0, 0)], ids=["+", "-", "0"]
)
def test_no_spread(check: Any, value: float, code: int, zero: int) -> None:
    # The range is 0 ... value; its scale is fp16(0.5 / 3), so 0.5 comes back as 3 times that.
    expected = half(abs(value) / 3) * (code - zero)
    check([[value] * 4], [1] * 4, {}, codes=[[code] * 4], weights=[[expected] * 4])


def test_hardly_any_spread(check: Any) -> None:
    # 1 ... 1.001 would have a zero of -1 / (0.001 / 3) = -3000, beyond the integers of fp16: the
    # range becomes 0 ... 1.001. 1 ... 1.002 has -1500 and keeps its own, which fp16 rounds to.
    coarse, fine = half(1.001 / 3), half(0.002 / 3)
    zero = half(-1 / (0.002 / 3))
    check(
        [[1.0, 1.001], [1.0, 1.002]],
        [1, 1],
        {},
        codes=[[3, 3], [int(np.clip(np.rint(w / fine + zero), 0, 3)) for w in (1.0, 1.002)]],
        weights=[
            [3 * coarse] * 2,
            [fine * (np.clip(np.rint(w / fine + zero), 0, 3) - zero) for w in (1.0, 1.002)],
        ],
    )


def test_one_weight_a_row(check: Any) -> None:
    # Each group holds one weight, and none varies but over rows: T = 0.2 * var = 0.2 * 12.5 = 2.5.
    # Left alone it leaves no error, so nothing is gained, and 3 * fp16(w / 3) is close enough.
    weight = [[5.0], [10.0]]
    expected = [[3 * half(5 / 3)], [3 * half(10 / 3)]]
    check(weight, [1], {"outlier_threshold": 0.2}, codes=[[3], [3]], weights=expected)


def test_two_levels_of_statistics(check: Any) -> None:
    # Scales 1, 2.4, 3, 4: base 1, step 1, so row 1 gets scale rint(1.4) + 1 = 2, and
    # (0, 2.4, 4.8, 7.2) / 2 = (0, 1.2, 2.4, 3.6 -> at most 3). Zeros are all 0: base 0, step 0.
    row = np.array([0.0, 1, 2, 3])
    check(
        [(row * s).tolist() for s in (1, 2.4, 3, 4)],
        [1] * 4,
        {"scale_bits": 2, "zero_bits": 2},
        codes=[[0, 1, 2, 3]] * 4,
        weights=[(row * s).tolist() for s in (1, 2, 3, 4)],
    )


def test_each_block_of_rows_has_its_own_second_level(check: Any) -> None:
    # Rows 0 to 7 all have scale 1, row 8 has 5: with blocks of 8 both are exact.
    row = [0.0, 1, 2, 3]
    weight = [row] * 8 + [[5 * w for w in row]]
    settings = {"scale_bits": 2, "zero_bits": 2, "stats_group_size": 8}
    check(weight, [1] * 4, settings, weights=weight)


def test_round_zero(check: Any) -> None:
    # scale 1, zero 0.6 -> 1: codes rint(w + 1) = (0, 1, 2, 3 of 3.4), weights code - 1.
    check(
        [[-0.6, 0.2, 1.2, 2.4]],
        [1] * 4,
        {"round_zero": True},
        codes=[[0, 1, 2, 3]],
        weights=[[-1, 0, 1, 2]],
    )


def test_groups_see_what_moved_into_them(check: Any) -> None:
    # Group 0 is columns 0 to 7, group 1 columns 8 to 15, and U couples column 0 to 8 with 0.5:
    # 1.4 -> 1 moves -0.2 to column 8, whose group then spans -0.2 ... 2.8: scale 1, zero 0.2.
    hessian = torch.eye(16)
    hessian[[0, 0, 8, 8], [0, 8, 0, 8]] = torch.tensor([1.25, -0.5, -0.5, 1.0])
    first = [1.4, 0, 1, 2, 3, 0, 1, 2]
    second = [0, 0.8, 1.8, 2.8, 0.8, 1.8, 2.8, 0.8]
    zero = half(0.2)
    check(
        [first + second],
        hessian.tolist(),
        {"group_size": 8},
        codes=[[1, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 1, 2, 3, 1]],
        weights=[[1, 0, 1, 2, 3, 0, 1, 2] + [c - zero for c in (0, 1, 2, 3, 1, 2, 3, 1)]],
    )
