"""SpqrConfig: what it refuses and in which words, JSON and back, the formula of the bits."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from spqr_numba.config import PRESETS, SpqrConfig
from spqr_numba.errors import ConfigError, SpqrError
from spqr_numba.format.layout import MatrixSpec
from spqr_numba.format.matrix import SpqrMatrix

RTN = {"use_hessian": False, "outlier_threshold": None, "permutation": "identity"}


def test_the_defaults_are_the_papers() -> None:
    config = SpqrConfig()
    assert (config.bits, config.group_size, config.stats_group_size) == (3, 16, 16)
    assert (config.scale_bits, config.zero_bits, config.outlier_threshold) == (3, 3, 0.2)
    assert (config.permutation, config.outlier_search) == ("act-order", "leave-one-out")
    assert (config.fit, config.damping) == ("min-max", 1.0)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("near-lossless", 4 + 8 / 16 + 64 / (16 * 64)),  # 4.5625
        ("balanced", 3 + 8 / 16 + 64 / (16 * 64)),  # 3.5625
        ("small", 3 + 6 / 32 + 64 / (32 * 64)),  # 3.21875
    ],
)
def test_presets_keep_to_their_bits(name: str, bits: float) -> None:
    """Without outliers, of which 0.1 % cost 0.032 bits."""
    assert PRESETS[name].fit == "joint"
    assert PRESETS[name].token_weights
    assert PRESETS[name].formula_bits(0.001) == pytest.approx(bits + 0.032)


def test_the_papers_presets_are_its_recipes() -> None:
    assert PRESETS["paper"] == SpqrConfig()
    assert PRESETS["paper-4bit"] == SpqrConfig(bits=4, outlier_threshold=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits is 1; it must be one of 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 3.0}, "bits is 3.0"),
        ({"bits": True}, "bits is True"),
        ({"bits": "3"}, "bits is '3'"),
        ({"group_size": 12}, "group_size is 12; it must be one of 8, 16, 32, 64, 128, whole row"),
        ({"group_size": 0}, "group_size is 0"),
        ({"stats_group_size": 4}, "stats_group_size is 4"),
        ({"stats_group_size": None}, "stats_group_size is None"),
        ({"scale_bits": 8}, "scale_bits is 8; it must be one of 2, 3, 4, 16"),
        ({"zero_bits": 1}, "zero_bits is 1"),
        ({"fit": "clip"}, "fit is 'clip'; it must be one of min-max, joint"),
        ({"fit": "joint", "scale_bits": 16}, "scale_bits is 16, which has none"),
        ({"fit": "joint", "zero_bits": 16}, "zero_bits is 16, which has none"),
        ({"fit": "joint", "round_zero": True}, "round_zero would change"),
        ({"outlier_search": "none"}, "outlier_search is 'none'"),
        ({"permutation": "act_order"}, "permutation is 'act_order'; it must be one of act-order"),
        ({"on_failed_factorization": "ignore"}, "on_failed_factorization is 'ignore'"),
        ({"outlier_threshold": 0}, "outlier_threshold is 0; it must be positive"),
        ({"outlier_threshold": -0.1}, "outlier_threshold is -0.1"),
        ({"outlier_threshold": math.nan}, "outlier_threshold is nan"),
        ({"damping": -1.0}, "damping is -1.0; it must be finite and not negative"),
        ({"damping": math.nan}, "damping is nan"),
        ({"damping": math.inf}, "damping is inf"),
        ({"damping": "abc"}, "damping is 'abc'; it must be a number"),
        ({"shrinkage": -0.1}, "shrinkage is -0.1; it must be at least 0 and below 1"),
        ({"shrinkage": 1}, "shrinkage is 1; it must be at least 0 and below 1"),
        ({"shrinkage": math.nan}, "shrinkage is nan; it must be at least 0 and below 1"),
        ({"shrinkage": "abc"}, "shrinkage is 'abc'; it must be a number"),
        ({"outlier_threshold": "abc"}, "outlier_threshold is 'abc'; it must be a number"),
        ({"round_zero": "no"}, "round_zero is 'no'; it must be true or false"),
        ({"overrides": (("q", {"use_hessian": "no"}),)}, "use_hessian is 'no'"),
        ({"use_hessian": False}, "needs outlier_threshold=None"),
        ({**RTN, "permutation": "act-order"}, "needs permutation='identity' or 'spearman'"),
        ({**RTN, "true_sequential": True}, "true_sequential calibrates"),
        ({**RTN, "asymmetric": True}, "asymmetric calibrates"),
        ({"skip": ("(",)}, "'(' is not a regular expression"),
        ({"skip": "lm_head"}, "skip"),
        ({"overrides": (("[", {"bits": 4}),)}, "'[' is not a regular expression"),
        ({"overrides": (("mlp", {"bit": 4}),)}, "unknown field 'bit'; there are bits, group_size"),
        ({"overrides": (("mlp", {"skip": ()}),)}, "override for 'mlp' sets skip"),
        ({"overrides": (("mlp", {"bits": 1}),)}, "bits is 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_it_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SpqrConfig(**settings)
    assert message in str(caught.value)
    assert isinstance(caught.value, SpqrError)
    assert isinstance(caught.value, ValueError)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpqrConfig().bits = 4  # type: ignore[misc]


def test_an_infinite_threshold_means_no_outliers() -> None:
    assert SpqrConfig(outlier_threshold=math.inf).outlier_threshold is None


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        SpqrConfig.rtn(3, 16),
        SpqrConfig.gptq(4),
        SpqrConfig(outlier_threshold=math.inf, round_zero=True, permutation="spearman"),
        SpqrConfig(skip=("lm_head",), overrides=((r"\.v_proj$", {"bits": 4}), ("mlp", {}))),
    ],
    ids=[*PRESETS, "rtn", "gptq", "no outliers", "skip and overrides"],
)
def test_json_and_back(config: SpqrConfig) -> None:
    settings = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert set(settings) == {field.name for field in dataclasses.fields(SpqrConfig)}
    assert SpqrConfig.from_dict(settings) == config


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'wbits'; known: asymmetric, bits"):
        SpqrConfig.from_dict({"wbits": 3})


def test_settings_of_one_module() -> None:
    config = SpqrConfig(
        skip=(r"lm_head$", r"\.0\."),
        overrides=((r"v_proj", {"bits": 4}), (r"_proj", {"bits": 2, "group_size": None})),
    )
    assert config.for_module("lm_head") is None
    assert config.for_module("layers.0.v_proj") is None

    first_match = config.for_module("layers.1.v_proj")
    assert first_match is not None
    assert (first_match.bits, first_match.group_size) == (4, 16)

    second = config.for_module("layers.1.k_proj")
    assert second is not None
    assert (second.bits, second.group_size) == (2, None)
    assert config.for_module("layers.1.fc") == config


@pytest.mark.parametrize(
    ("config", "outlier_share", "bits"),
    [
        # 3 + (3 + 3) / 16 + 64 / (16 * 16) + 32 * 0.01
        (SpqrConfig(), 0.01, 3 + 0.375 + 0.25 + 0.32),
        # 4 + (3 + 3) / 8 + 64 / (8 * 64)
        (SpqrConfig(bits=4, group_size=8, stats_group_size=64), 0.0, 4 + 0.75 + 0.125),
        # one level of statistics only: two fp16 numbers a group
        (SpqrConfig.gptq(4, 128), 0.0, 4 + 32 / 128),
        # scales in two levels, zeros in one: 3 / 16 + 32 / 256 + 16 / 16
        (SpqrConfig(zero_bits=16), 0.0, 3 + 0.1875 + 0.125 + 1),
        (SpqrConfig.rtn(3), 0.0, 3),
    ],
    ids=["paper", "8/64", "gptq g128", "mixed", "whole row"],
)
def test_formula_of_the_bits(config: SpqrConfig, outlier_share: float, bits: float) -> None:
    assert config.formula_bits(outlier_share) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008)], ids=str)
@pytest.mark.parametrize(
    ("config", "outlier_share"),
    [
        (SpqrConfig(), 0.0),
        (SpqrConfig(), 0.01),
        (SpqrConfig(bits=4, outlier_threshold=0.1), 0.003),
        (SpqrConfig(bits=2, outlier_threshold=None), 0.0),
        (SpqrConfig(bits=2, group_size=8, stats_group_size=64), 0.05),
        (SpqrConfig(group_size=128, stats_group_size=128, outlier_threshold=None), 0.0),
        (SpqrConfig.gptq(3), 0.0),
        (SpqrConfig.gptq(4, 128), 0.0),
        (SpqrConfig.rtn(2), 0.0),
        (SpqrConfig.rtn(8, 8), 0.0),
    ],
    ids=[
        "no outliers found",
        "paper",
        "4 bit",
        "2 bit",
        "8/64",
        "128/128",
        "gptq",
        "gptq g128",
        "rtn",
        "8 bit",
    ],
)
def test_formula_against_bytes(
    config: SpqrConfig, outlier_share: float, shape: tuple[int, int]
) -> None:
    """Buffers of a large layer, not filled: within half a percent of the formula."""
    spec = MatrixSpec.from_config(config, *shape)
    keeps = config.outlier_threshold is not None
    outliers = round(outlier_share * shape[0] * shape[1]) if keeps else None
    buffers = spec.buffers(outliers, config.permutation != "identity")
    matrix = SpqrMatrix(
        spec, {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in buffers.items()}
    )
    assert matrix.bits_per_weight == pytest.approx(
        config.formula_bits(matrix.outlier_share), rel=0.005
    )
    assert matrix.outlier_share == pytest.approx(outlier_share, abs=1e-6)


def test_an_override_for_each_module() -> None:
    config = SpqrConfig(skip=("head",), overrides=(("proj", {"bits": 4}),))
    modules = {
        "a.0.q_proj": replace(config, bits=2, outlier_threshold=None, overrides=()),
        "a.0.q_projector": replace(config, damping=0.5, overrides=()),
        "a.1.k": replace(config, overrides=()),
    }
    whole = config.with_modules(modules)
    for name, chosen in modules.items():
        found = whole.for_module(name)
        assert found is not None
        assert replace(found, overrides=()) == chosen
    assert whole.skip == config.skip
    assert len(whole.overrides) == 2
    assert SpqrConfig.from_dict(whole.to_dict()) == whole
