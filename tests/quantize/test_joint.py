"""The joint fit on weights so small that nothing averages out: is it ever worse than min-max?"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spqr_numba.config import SpqrConfig
from spqr_numba.quantize.solver import QuantizedWeight, quantize_weight

from ..problems import Problem, make_problem

configs = st.builds(
    SpqrConfig,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([8, 16, 64, None]),
    stats_group_size=st.sampled_from([8, 16, 64]),
    scale_bits=st.sampled_from([2, 3, 4]),
    zero_bits=st.sampled_from([2, 3, 4]),
    fit=st.just("joint"),
    outlier_threshold=st.sampled_from([None, 0.01, 0.2, 1]),
    outlier_search=st.sampled_from(["leave-one-out", "simplified"]),
    damping=st.sampled_from([0.01, 0.1, 1]),
)


@st.composite
def small_problems(draw: st.DrawFn) -> Problem:
    """Up to 40 x 64; some with inputs of rank 2, and some with one input a thousand times off."""
    rows, columns = draw(st.sampled_from([1, 2, 5, 17, 40])), draw(st.integers(1, 64))
    samples = draw(st.sampled_from([2, 4 * columns]))
    problem = make_problem(rows, columns, draw(st.integers(0, 10**6)), samples=samples)
    if draw(st.booleans()):
        problem.weight[:, draw(st.integers(0, columns - 1))] *= 1000
    return problem


def cost_of(quantized: QuantizedWeight) -> float:
    """The layer loss with damping, and T for each outlier: what its bits are worth."""
    report = quantized.report
    outliers = round(report.outlier_share * quantized.weight.numel())
    return report.error_after + (outliers * report.threshold if outliers else 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(small_problems(), configs)
def test_no_worse_than_min_max(problem: Problem, config: SpqrConfig) -> None:
    """Of one group nearly a promise (kernels/joint.py checks it), of several a matter of chance.

    The errors of one group move the next: of 5000 such problems 4 cost more than 1.05 times as
    much, up to 1.5 times, all of one row, several groups and inputs of rank 2.
    """
    rows, columns = problem.weight.shape
    assume(rows > 1 or columns <= (config.group_size or columns))
    joint, plain = (
        quantize_weight(problem.weight, problem.hessian, replace(config, fit=fit))
        for fit in ("joint", "min-max")
    )
    assert torch.isfinite(joint.weight).all()
    assert math.isfinite(joint.report.loss)
    rounding = 1e-10 * problem.weight.square().sum().item()
    assert cost_of(joint) <= 1.05 * cost_of(plain) + rounding
