"""spqr bench: its options reach the measurement, its rows become a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run


@pytest.mark.parametrize("what", ["matmul", "quantize"])
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--shape 4096", 2, "'4096' must look like 4096x4096"),
        ("--shape 0x8", 2, "'0x8' must look like 4096x4096"),
        ("--device tpu", 2, "'tpu' is not one of 'cpu', 'cuda'"),
        ("--device cuda", 1, "torch finds no CUDA device here; use --device cpu"),
    ],
)
def test_bad_input(
    run: Run, what: str, options: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run(f"bench {what} {options}")
    assert result.exit_code == code
    assert message in result.stderr


def test_quantize_prints_a_row_a_shape(run: Run) -> None:
    line = "bench quantize --shape 32x64 --shape 16x48 --against reference"
    result = run(line)
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    assert "total ms" in header
    assert [row.split()[0] for row in rows] == ["32x64", "16x48"]
    assert json.loads(run(line + " --json").stdout)[1]["total ms"] > 0


def test_an_unknown_model_shape(run: Run) -> None:
    result = run("bench quantize --shape llama9")
    assert result.exit_code == 1
    assert "the shape 'llama9' is none of llama2-7b" in result.stderr


def test_matmul_prints_a_row_a_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spqr_numba.bench.matmul.COLD_BYTES", 0)
    rows = json.loads(run("bench matmul --shape 64x96 --batch 1 --batch 2 --json").stdout)
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["spqr us"] > 0 for row in rows)


def test_matmul_draws_its_times(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("spqr_numba.bench.matmul.COLD_BYTES", 0)
    picture = tmp_path / "times.png"
    result = run(f"bench matmul --shape 64x96 --shape 32x64 --plot {picture}")
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_matmul_wants_the_shape_of_a_weight(run: Run) -> None:
    result = run("bench matmul --shape llama2-7b")
    assert result.exit_code == 1
    assert "give ROWSxCOLUMNS" in result.stderr


def test_generate_prints_a_row_a_model(run: Run, dense: Path) -> None:
    line = f"bench generate --shape {dense} --prompt-tokens 4 --new-tokens 16"
    result = run(line)
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    assert "tokens/s" in header
    assert [row.split()[:2] for row in rows] == [["spqr", "eager"], ["dense", "eager"]]
    [row] = json.loads(run(line + " --no-dense --json").stdout)
    assert row["x dense"] is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--shape nowhere/at/all", 1, "there is no model folder"),
        ("--new-tokens 3", 1, "too short to measure"),
        ("--engine steam", 2, "'steam' is not one of"),
    ],
)
def test_generate_refuses(run: Run, options: str, code: int, message: str) -> None:
    result = run(f"bench generate {options}")
    assert result.exit_code == code
    assert message in result.stderr
