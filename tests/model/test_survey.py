"""What options cost, tried on a sample of the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spqr_numba.config import SpqrConfig
from spqr_numba.model.activations import Activations
from spqr_numba.model.blocks import plan
from spqr_numba.model.gradients import TokenWeights
from spqr_numba.model.report import Clock
from spqr_numba.model.survey import (
    Sample,
    Told,
    _alike,
    _factorizations,
    candidates,
    least_bytes,
    sampled_rows,
)
from spqr_numba.quantize.hessian import factorize
from spqr_numba.quantize.solver import quantize_weight

from ..problems import make_problem
from .architectures import parts_of

CONFIG = SpqrConfig(damping=0.1)


@pytest.mark.parametrize("rows", [1, 40, 128, 130, 1000, 1001])
@pytest.mark.parametrize("block", [8, 16, 128])
def test_samples_are_whole_stats_blocks(rows: int, block: int) -> None:
    sampled = sampled_rows(rows, block)
    assert sampled.unique().equal(sampled)
    assert len(sampled) >= min(rows, 128 - block)
    assert len(sampled) <= 128 + block
    for start in sampled[::block].tolist():
        assert start % block == 0
    assert sampled[0] == 0
    assert sampled[-1] == rows - 1 or rows > 128


def sample_of(rows: int) -> tuple[Sample, torch.Tensor]:
    problem = make_problem(rows, 64)
    factor = factorize(problem.hessian, CONFIG)
    told = Told(problem.weight, 0.5, factor.hessian)
    return Sample.of([told], factor, CONFIG), problem.weight


def test_of_a_small_weight_the_options_are_exact() -> None:
    sample, weight = sample_of(96)
    for threshold in (None, 0.3, 0.05):
        config = replace(CONFIG, bits=4, group_size=8, outlier_threshold=threshold)
        option = sample.option(config)
        result = quantize_weight(weight, sample.factor, config)
        assert option.nbytes == result.matrix.nbytes
        assert option.loss == pytest.approx(0.5 * result.report.loss)
        assert option.settings(CONFIG) == config


def test_a_sample_tells_of_the_whole() -> None:
    sample, weight = sample_of(2048)
    assert len(sample.weight) == 128
    for threshold in (None, 0.2, 0.05):
        config = replace(CONFIG, outlier_threshold=threshold)
        option = sample.option(config)
        result = quantize_weight(weight, sample.factor, config)
        assert option.nbytes == pytest.approx(result.matrix.nbytes, rel=0.05)
        assert option.loss == pytest.approx(0.5 * result.report.loss, rel=0.2)


def test_the_samples_threshold_is_that_of_the_whole() -> None:
    """However much more its rows vary."""
    problem = make_problem(1024, 64)
    weight = problem.weight
    weight[:16] *= 50
    factor = factorize(problem.hessian, CONFIG)
    sample = Sample.of([Told(weight, 1.0, factor.hessian)], factor, CONFIG)
    whole = quantize_weight(weight, factor, CONFIG).report.threshold
    part = quantize_weight(
        sample.weight, factor, replace(CONFIG, outlier_threshold=0.2 * sample.stretch)
    ).report.threshold
    assert part == pytest.approx(whole, rel=1e-4)


def test_candidates() -> None:
    assert candidates(CONFIG, per_layer=False) == [CONFIG]
    found = candidates(replace(CONFIG, bits=5, group_size=64), per_layer=True)
    assert [(c.bits, c.group_size, c.scale_bits, c.zero_bits) for c in found] == [
        (5, 64, 3, 3), (2, 32, 3, 3), (2, 16, 3, 3), (3, 32, 3, 3), (3, 32, 4, 4), (3, 16, 3, 3),
        (3, 16, 4, 4), (4, 32, 4, 4), (4, 16, 4, 4), (4, 8, 4, 4),
    ]  # fmt: skip
    assert len(candidates(CONFIG, per_layer=True)) == 9


def test_options_without_outliers() -> None:
    sample, _ = sample_of(16)
    config = replace(CONFIG, outlier_threshold=None)
    options = sample.options(config, per_layer=True)
    assert len(options) == 9
    assert all(option.outlier_threshold is None for option in options)


def test_options_lie_on_falling_thresholds() -> None:
    sample, _ = sample_of(64)
    none, *kept = sample.options(CONFIG, per_layer=False)
    assert none.outlier_threshold is None
    thresholds = [option.outlier_threshold for option in kept]
    assert thresholds == sorted(thresholds, reverse=True)
    assert (thresholds[0], thresholds[-1]) == (0.8, 0.05)
    assert all(none.nbytes < option.nbytes for option in kept)


def test_the_least_bytes_need_no_measurement() -> None:
    sample, weight = sample_of(48)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    for per_layer in (False, True):
        smallest = min(option.nbytes for option in sample.options(CONFIG, per_layer))
        assert least_bytes(CONFIG, linear, per_layer) == smallest


@pytest.mark.parametrize("threshold", [None, 0.3, 0.1])
def test_linears_of_one_input_are_told_together_as_apart(threshold: float | None) -> None:
    """Whatever their sizes, and by whichever Hessian their losses are told."""
    problem = make_problem(192, 64)
    factor = factorize(problem.hessian, CONFIG)
    other = factorize(make_problem(8, 64).hessian, CONFIG).hessian
    linears = [
        Told(problem.weight[:64], 0.5, factor.hessian),
        Told(problem.weight[64:] * 30, 0.002, other),
    ]
    config = replace(CONFIG, outlier_threshold=threshold)
    apart = [Sample.of([told], factor, CONFIG).option(config) for told in linears]
    together = Sample.of(linears, factor, CONFIG).option(config)
    assert together.nbytes == pytest.approx(sum(option.nbytes for option in apart), rel=0.01)
    assert together.loss == pytest.approx(sum(option.loss for option in apart), rel=0.02)


def test_only_what_can_be_compressed_alike_is_told_together() -> None:
    other = replace(CONFIG, damping=0.2)
    settings = {"q": CONFIG, "k": other, "v": CONFIG}
    assert _alike("qkv", settings) == [["q", "v"], ["k"]]
    spearman = dict.fromkeys("qkv", replace(CONFIG, permutation="spearman"))
    assert _alike("qkv", spearman) == [["q"], ["k"], ["v"]]  # each in an order of its own


def test_losses_are_told_by_tokens_as_each_linear_weighs_them(
    folder_of: Callable[[str], Path],
) -> None:
    parts = parts_of(folder_of("llama"))
    windows = torch.randint(0, 256, (3, 12))
    settings = {n: c for n, c in plan(parts.blocks, CONFIG).items() if ".0.self_attn" in n}
    weights = TokenWeights({name: torch.rand(3, 12).square() for name in settings})

    def found(names: list[str]) -> dict[str, torch.Tensor]:
        linears = {name: parts.model.get_submodule(name) for name in names}
        with parts.outside():
            start = Activations.start(parts.model, parts.blocks.modules, windows, 2)
        with parts.block(0) as block:
            clock = Clock(parts.device)
            told = {}
            for factor, hessians in _factorizations(
                block, 0, linears, settings, start, clock, weights
            ):
                back = factor.order.argsort()
                told |= {name: hessian[back][:, back] for name, hessian in hessians.items()}
            return told

    together = found(list(settings))
    assert list(together) == list(settings)
    for name, hessian in together.items():
        torch.testing.assert_close(hessian, found([name])[name])
    queries, keys = (next(n for n in settings if n.endswith(f"{k}_proj")) for k in "qk")
    assert not torch.allclose(together[queries], together[keys])
