"""Names and settings of grids, ablations and baselines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from spqr_numba.analysis.settings import ablation, baselines, grid
from spqr_numba.config import PRESETS, SpqrConfig
from spqr_numba.errors import ConfigError

PAPER, BALANCED = PRESETS["paper"], PRESETS["balanced"]


def test_a_grid_is_every_combination_on_each_preset() -> None:
    settings = grid(["paper", "small"], {"bits": [3, 4], "outlier_threshold": [0.2, math.inf]})
    assert len(settings) == 8
    assert settings["paper, bits 3, outlier_threshold 0.2"] == PAPER
    name = "small, bits 4, outlier_threshold none"
    assert settings[name] == replace(PRESETS["small"], bits=4, outlier_threshold=None)


def test_a_grid_of_nothing_is_the_presets() -> None:
    assert grid(PRESETS, {}) == PRESETS


def test_values_read_as_they_are_given() -> None:
    values = {"group_size": [None], "true_sequential": [True], "round_zero": [False]}
    assert list(grid(["paper"], values)) == [
        "paper, group_size row, true_sequential on, round_zero off"
    ]


def test_a_contradiction_is_left_out_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    settings = grid(["paper", "balanced"], {"scale_bits": [3, 16]})
    assert list(settings) == [
        "paper, scale_bits 3",
        "paper, scale_bits 16",
        "balanced, scale_bits 3",
    ]
    assert "left out balanced, scale_bits 16: fit='joint' chooses" in caplog.text


def test_nothing_but_contradictions() -> None:
    with pytest.raises(ConfigError, match="balanced, scale_bits 16: fit='joint' chooses"):
        grid(["balanced", "small"], {"scale_bits": [16]})


def test_a_value_that_no_setting_can_have() -> None:
    with pytest.raises(ConfigError, match="paper, bits 9: bits is 9"):
        grid(["paper"], {"bits": [3, 9]})


def test_an_ablation_adds_and_leaves_out_each_part() -> None:
    groups = {"group_size": 16, "stats_group_size": 64}
    statistics = {"scale_bits": 4, "zero_bits": 4}
    settings = ablation("balanced", {"true_sequential": True})
    full = replace(BALANCED, true_sequential=True)
    assert settings == {
        "paper": PAPER,
        "paper, group_size 16, stats_group_size 64": replace(PAPER, **groups),
        "paper, scale_bits 4, zero_bits 4": replace(PAPER, **statistics),
        "paper, fit joint": replace(PAPER, fit="joint"),
        "paper, damping 0.1": replace(PAPER, damping=0.1),
        "paper, shrinkage 0.2": replace(PAPER, shrinkage=0.2),
        "paper, true_sequential on": replace(PAPER, true_sequential=True),
        "paper, token_weights on": replace(PAPER, token_weights=True),
        "paper, outlier_threshold none": replace(PAPER, outlier_threshold=None),
        "balanced, true_sequential on": full,
        "balanced, true_sequential on, group_size 16, stats_group_size 16": replace(
            full, group_size=16, stats_group_size=16
        ),
        "balanced, true_sequential on, scale_bits 3, zero_bits 3": replace(
            full, scale_bits=3, zero_bits=3
        ),
        "balanced, true_sequential on, fit min-max": replace(full, fit="min-max"),
        "balanced, true_sequential on, damping 1.0": replace(full, damping=1.0),
        "balanced, true_sequential on, shrinkage 0.0": replace(full, shrinkage=0.0),
        "balanced, true_sequential off": BALANCED,
        "balanced, true_sequential on, token_weights off": replace(full, token_weights=False),
        "balanced, true_sequential on, outlier_threshold none": replace(
            full, outlier_threshold=None
        ),
    }


def test_an_ablation_starts_from_as_many_bits() -> None:
    settings = ablation("near-lossless", {})
    assert settings["paper-4bit"] == PRESETS["paper-4bit"]
    assert "near-lossless, fit min-max" in settings
    assert all(config.bits == 4 for config in settings.values())
    assert "paper, bits 2" in ablation("balanced", {"bits": 2})


def test_nothing_to_ablate() -> None:
    with pytest.raises(ConfigError, match="paper is the paper's recipe"):
        ablation("paper", {})


def test_baselines_are_named_as_in_other_tables() -> None:
    assert list(baselines([3, 4]))[1:6] == [
        "RTN 3 bit, group 16",
        "GPTQ 3 bit",
        "GPTQ 3 bit, group 128",
        "RTN 4 bit",
        "RTN 4 bit, group 16",
    ]
    assert baselines([2])["GPTQ 2 bit"] == SpqrConfig.gptq(2)
