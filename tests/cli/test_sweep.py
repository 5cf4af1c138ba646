"""spqr sweep: settings from flags, results on stdout and in OUT, everything that can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spqr_numba.analysis import sweep as sweep_module
from spqr_numba.analysis.points import SweepPoint
from spqr_numba.model.budget import Target

from .conftest import Run

QUICK = "--calibration-nsamples 2 --nsamples 2 --seqlen 64"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks for; nothing is compressed."""
    seen: dict[str, Any] = {}

    def fake(model: Any, settings: Any, texts: Any, out: Any, **options: Any) -> Iterator[Any]:
        options.pop("progress")
        seen.update(options, model=model, settings=settings, texts=texts, out=out)
        return iter(())

    monkeypatch.setattr(sweep_module, "sweep", fake)
    monkeypatch.setattr("spqr_numba.analysis.points.read_sweep", lambda folder: [])
    return seen


def test_table_json_and_picture(run: Run, dense: Path, text: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "out", tmp_path / "frontier.png"
    line = f"sweep {dense} {out} --dataset {text} --calibration {text} {QUICK}"
    result = run(f"{line} --preset paper --bits 3,4 --baselines 8 --plot {plot}")
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    titles = ["setting", "seed", "bits", "outliers %", "perplexity, count", "excess", "nats"]
    assert re.split(" {2,}", header) == titles
    names = [row.split("  ")[0] for row in rows]
    assert sorted(names) == sorted(
        [
            "fp16",
            "paper, bits 3",
            "paper, bits 4",
            "RTN 8 bit",
            "RTN 8 bit, group 16",
            "GPTQ 8 bit",
            "GPTQ 8 bit, group 128",
        ]
    )
    assert names[-1] == "fp16"  # by bits
    assert "sweeping: 100%" in result.stderr
    assert f"wrote {plot}" in result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")

    again = run(f"{line} --preset paper --json")
    assert again.exit_code == 0, again.output
    points = json.loads(again.stdout)
    assert len(points) == len(names)  # "paper" is "paper, bits 3"
    assert points[0]["name"] == "fp16"
    assert set(points[0]) == set(SweepPoint.__dataclass_fields__)


def test_flags_become_settings(run: Run, tmp_path: Path, asked: dict[str, Any]) -> None:
    line = f"sweep {tmp_path / 'out'} --preset paper,small --group-size row,16 --fit min-max"
    line += " --outlier-threshold 0.2,none --true-sequential on,off --skip gate --no-dense"
    line += (
        " --calibration-nsamples 7 --seqlen 64 --nsamples 2 --seed 3,4 --tune 0,9 --tune-model 7"
        " --tune-codes"
    )
    result = run(line + " --target-bits 3.5,4 --per-layer")
    assert result.exit_code == 0, result.output
    assert len(asked["settings"]) == 16
    name = "paper, group_size row, fit min-max, outlier_threshold none, true_sequential on"
    config = asked["settings"][f"{name}, skip gate"]
    assert (config.group_size, config.outlier_threshold, config.skip) == (None, None, ("gate",))
    assert (asked["model"], asked["out"]) == (None, tmp_path / "out")
    assert asked["texts"]["manual"].shape == (2, 64)
    assert (asked["dataset"], asked["nsamples"], asked["seqlen"]) == ((), 7, 64)
    assert (asked["seeds"], asked["tune"]) == ((3, 4), (0, 9))
    assert (asked["tune_model"], asked["tune_codes"]) == ((7,), True)
    assert asked["targets"] == [Target(3.5, per_layer=True), Target(4, per_layer=True)]
    assert (asked["dense"], asked["device"]) == (False, "cpu")


def test_without_flags_the_default_preset(run: Run, tmp_path: Path, asked: dict[str, Any]) -> None:
    assert run(f"sweep {tmp_path / 'out'}").exit_code == 0
    assert list(asked["settings"]) == ["balanced"]
    assert (asked["nsamples"], asked["seqlen"], asked["seeds"]) == (128, 512, (0,))


def test_an_ablation_in_one_command(run: Run, tmp_path: Path, asked: dict[str, Any]) -> None:
    result = run(f"sweep {tmp_path / 'out'} --ablate --true-sequential on --baselines 3")
    assert result.exit_code == 0, result.output
    assert len(asked["settings"]) == 2 * 9 + 4
    assert "paper, fit joint" in asked["settings"]
    assert "balanced, true_sequential off" in asked["settings"]


def test_what_is_skipped_is_in_every_name(run: Run, tmp_path: Path, asked: dict[str, Any]) -> None:
    line = f"sweep {tmp_path / 'out'} --preset paper --baselines 4 --skip gate --skip down_proj"
    assert run(line).exit_code == 0
    assert "paper, skip gate, skip down_proj" in asked["settings"]
    assert "RTN 4 bit, skip gate, skip down_proj" in asked["settings"]
    assert {config.skip for config in asked["settings"].values()} == {("gate", "down_proj")}


def test_a_contradictory_combination_is_noted(
    run: Run, tmp_path: Path, asked: dict[str, Any]
) -> None:
    line = f"sweep {tmp_path / 'out'} --preset paper --fit joint,min-max --scale-bits 3,16"
    result = run(line)
    assert result.exit_code == 0, result.output
    assert len(asked["settings"]) == 3
    assert "left out paper, scale_bits 16, fit joint: fit='joint' chooses" in result.stderr


def test_help_says_that_rounding_is_not_tuned(run: Run) -> None:
    assert "Rounding to nearest is not tuned" in " ".join(run("sweep --help").stdout.split())


def test_ctrl_c_says_what_is_kept(
    run: Run, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    line = f"sweep {dense} {out} --dataset {text} --calibration {text} {QUICK}"
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "compress", interrupted)
        result = run(line)
    assert result.exit_code == 130
    assert f"what is finished is kept in {out}: run the same command again" in result.stderr
    assert [row["name"] for row in json.loads((out / "sweep.json").read_text())["points"]] == [
        "fp16"
    ]
    assert run(line).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bits 3,four", "'four' is not a valid integer"),
        ("--preset paper,best", "'best' is not one of"),
        ("--fit joint,", "'' is not one of"),
        ("--seed 0,x", "'x' is not a valid integer"),
        ("--ablate --bits 3,4", "bits has 2 values; give one"),
        ("--outlier-threshold some", "'some' is not a valid float"),
    ],
)
def test_usage_errors(run: Run, tmp_path: Path, options: str, message: str) -> None:
    result = run(f"sweep {tmp_path / 'out'} {options}")
    assert result.exit_code == 2
    assert message in result.stderr


def test_out_is_needed(run: Run) -> None:
    result = run("sweep")
    assert result.exit_code == 2
    assert "missing argument 'OUT'" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bits 3,9", "balanced, bits 9: bits is 9"),
        ("--scale-bits 16", "balanced, scale_bits 16: fit='joint' chooses"),
        ("--preset paper --ablate", "there is nothing to leave out"),
        ("--baselines 1", "bits is 1"),
        ("--dataset nowhere.txt", "'nowhere.txt' is neither a file"),
        ("--calibration nowhere.txt", "'nowhere.txt' is neither a file"),
        ("--seqlen 65", "context is 64 tokens"),
        ("--nsamples 0", "0 windows of text"),
        ("--skip layers.9", "the pattern 'layers.9' matches no weight"),
        ("--plot picture.xyz", "cannot write picture.xyz"),
    ],
)
def test_bad_input(
    run: Run, dense: Path, text: Path, tmp_path: Path, options: str, message: str
) -> None:
    line = f"sweep {dense} {tmp_path / 'out'} --dataset {text} {QUICK} --no-dense"
    result = run(f"{line} --calibration {text} {options}")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_two_texts_of_one_name(run: Run, dense: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / text.name
    other.write_text(text.read_text())
    result = run(f"sweep {dense} {tmp_path / 'out'} --dataset {text} --dataset {other} {QUICK}")
    assert result.exit_code == 2
    assert "two texts are called 'count'" in result.stderr


def test_another_sweep_in_the_same_folder(
    run: Run, dense: Path, text: Path, tmp_path: Path
) -> None:
    line = f"sweep {dense} {tmp_path / 'out'} --dataset {text} --calibration {text} {QUICK}"
    assert run(line).exit_code == 0
    result = run(f"{line} --calibration-nsamples 3")
    assert result.exit_code == 1
    assert "calibration is 2 windows of 64 tokens" in result.stderr
    assert "give another folder" in result.stderr
