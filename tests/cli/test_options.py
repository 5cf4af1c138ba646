"""Options become the settings that they name, the reference implementation's names included."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from spqr_cli._command import Command
from spqr_cli._options import config_from, config_options
from spqr_cli.main import main
from spqr_numba.config import DEFAULT_BITS, PRESETS, SpqrConfig
from spqr_numba.model import compress as compress_module

PAPER_COMMAND = (
    "--wbits 4 --groupsize 16 --perchannel --qq_scale_bits 3 --qq_zero_bits 3 --qq_groupsize 16"
    " --outlier_threshold 0.1 --fit_quantizer_without_outliers --permutation_order act_order"
)


def run(line: str) -> tuple[Any, SpqrConfig | None]:
    """The result of a command that takes config options, and the config that it made of them."""
    configs: list[SpqrConfig] = []

    @click.command(cls=Command)
    @config_options
    def command(as_json: bool, **values: Any) -> None:
        configs.append(config_from(values))
        assert not values

    result = CliRunner().invoke(command, shlex.split(line))
    return result, configs[0] if configs else None


BALANCED = PRESETS["balanced"]
PAPER_COMMAND_ON_BALANCED = SpqrConfig(
    bits=4,
    outlier_threshold=0.1,
    fit="joint",
    damping=0.1,
    shrinkage=0.2,
    token_weights=True,
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", BALANCED),
        ("--preset small", PRESETS["small"]),
        ("--preset paper", SpqrConfig()),
        (f"--preset paper {PAPER_COMMAND}", SpqrConfig(bits=4, outlier_threshold=0.1)),
        (PAPER_COMMAND, PAPER_COMMAND_ON_BALANCED),
        ("--preset paper-4bit --bits 2", SpqrConfig(bits=2, outlier_threshold=0.1)),
        ("--groupsize -1", replace(BALANCED, group_size=None)),
        ("--group-size row", replace(BALANCED, group_size=None)),
        ("--damping 0", replace(BALANCED, damping=0)),
        ("--percdamp 1e0", replace(BALANCED, damping=1.0)),
        ("--shrinkage 0", replace(BALANCED, shrinkage=0.0)),
        ("--outlier-threshold inf", replace(BALANCED, outlier_threshold=None)),
        ("--simplified_outliers", replace(BALANCED, outlier_search="simplified")),
        ("--true-sequential", replace(BALANCED, true_sequential=True)),
        ("--true_sequential", replace(BALANCED, true_sequential=True)),
        ("--asymmetric", replace(BALANCED, asymmetric=True)),
        ("--token-weights", BALANCED),
        ("--no-token-weights", replace(BALANCED, token_weights=False)),
        ("--preset paper --token-weights", SpqrConfig(token_weights=True)),
        ("--no-true-sequential --no-asymmetric", BALANCED),
        ("--preset paper --round-zero", SpqrConfig(round_zero=True)),
        ("--preset paper --round_zero 1", SpqrConfig(round_zero=True)),
        ("--round_zero 0", BALANCED),
        ("--permutation spearman", replace(BALANCED, permutation="spearman")),
        ("--fit min-max", replace(BALANCED, fit="min-max")),
        ("--perchannel --skip_out_loss", BALANCED),
        ("--skip lm --skip head", replace(BALANCED, skip=("lm", "head"))),
        (
            "--nearest --wbits 3 --groupsize 16 --scale-bits 16 --zero-bits 16",
            replace(SpqrConfig.rtn(3, 16), stats_group_size=64, damping=0.1, shrinkage=0.2),
        ),
        (
            "--nearest --permutation spearman --preset paper",
            SpqrConfig(use_hessian=False, outlier_threshold=None, permutation="spearman"),
        ),
        (
            "--on-failed-factorization round-to-nearest",
            replace(BALANCED, on_failed_factorization="round-to-nearest"),
        ),
    ],
)
def test_options_become_settings(line: str, expected: SpqrConfig) -> None:
    result, config = run(line)
    assert result.exit_code == 0, result.output
    assert config == expected


def test_overrides_keep_their_order_and_merge_by_pattern() -> None:
    _, config = run(
        "--preset paper"
        " --override 'q_(?:a|b):bits=4' --override '.*:round_zero=true,group_size=row'"
        " --override 'q_(?:a|b):damping=0.5,outlier_threshold=none,permutation=identity'"
    )
    assert config is not None
    changed = {
        "bits": 4,
        "damping": 0.5,
        "outlier_threshold": None,
        "permutation": "identity",
    }
    assert config.overrides == (
        ("q_(?:a|b)", changed),
        (".*", {"round_zero": True, "group_size": None}),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sym", "symmetric quantization is not supported"),
        ("--qq_zero_sym", "symmetric quantization is not supported"),
        ("--permutation random", "'random' is not one of 'act-order', 'identity', 'spearman'"),
        ("--preset best", "'best' is not one of"),
        ("--groupsize big", "'big' is not a valid integer"),
        ("--override q_proj", "must look like"),
        ("--override q_proj:bits", "must look like"),
        ("--override :bits=3", "must look like"),
        ("--round_zero 2", "2 is not in the range 0<=x<=1"),
    ],
)
def test_usage_errors(line: str, message: str) -> None:
    result, _ = run(line)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--wbits 16", "Error: bits is 16; it must be one of 2, 3, 4, 5, 6, 7, 8"),
        ("--group-size 12", "Error: group_size is 12"),
        ("--outlier-threshold -1", "Error: outlier_threshold is -1.0; it must be positive"),
        ("--nearest --outlier-threshold 0.2", "outliers are found by their Hessian-weighted error"),
        ("--nearest --permutation act-order", "act-order sorts by the Hessian's diagonal"),
        ("--nearest --true-sequential", "true_sequential calibrates"),
        ("--nearest --asymmetric", "asymmetric calibrates"),
        ("--nearest --token-weights", "token_weights calibrates"),
        ("--scale-bits 16", "scale_bits is 16, which has none; use 2, 3 or 4, or fit='min-max'"),
        ("--round-zero", "fit='joint' chooses zeros that round_zero would change"),
        ("--skip '('", "'(' is not a regular expression"),
        ("--override q_proj:width=3", "sets unknown field 'width'"),
        ("--override q_proj:bits=three", "bits is 'three'"),
    ],
)
def test_settings_out_of_range_or_at_odds(line: str, message: str) -> None:
    result, _ = run(line)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("line", "bits"),
    [
        ("", DEFAULT_BITS),
        ("--damping 0.2 --no-token-weights --skip o_proj", DEFAULT_BITS),
        ("--override q_proj:damping=1", DEFAULT_BITS),
        ("--target-bits 4.5 --preset small --bits 2 --no-per-layer", 4.5),
        ("--preset balanced", None),
        ("--bits 3", None),
        ("--group-size row", None),
        ("--scale-bits 3", None),
        ("--outlier-threshold 0.2", None),
        ("--override q_proj:bits=4", None),
        ("--nearest", None),
    ],
)
def test_bits_are_aimed_at_where_nothing_says_what_layers_get(
    line: str, bits: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fake(*_: Any, target_bits: float | None, **__: Any) -> None:
        asked["bits"] = target_bits
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_module, "compress", fake)
    CliRunner().invoke(main, ["compress", "model", "out", *shlex.split(line)])
    assert asked == {"bits": bits}
