"""spqr demo, with a tiny model in the place of the bundled one, and the bundled one itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import spqr_numba.demo
from spqr_numba.demo import corpus

from .conftest import Run

ROWS = ["fp16", "RTN 3 bit", "RTN 3 bit, group 16", "GPTQ 3 bit", "GPTQ 4 bit"]


@pytest.fixture
def small(dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and texts that take no time."""
    monkeypatch.setattr(spqr_numba.demo, "MODEL_PATH", dense)
    monkeypatch.setattr(corpus, "training_text", text.read_text)
    monkeypatch.setattr(corpus, "held_out_text", lambda: text.read_text()[:500])


@pytest.mark.usefixtures("small")
def test_table_and_text(run: Run) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    lines = result.stdout.split("\n")
    assert lines[1].split()[:3] == ["model", "bits", "size"]
    for line, name in zip(lines[2:], [*ROWS, "SpQR 3 bit, group 16"], strict=False):
        assert line.startswith(f"{name}  ")
    assert "continues a prompt" in result.stdout
    assert "s in all" in result.stderr


@pytest.mark.usefixtures("small")
def test_json(run: Run) -> None:
    result = json.loads(run("demo --json").stdout)
    assert [row["name"] for row in result["rows"]] == [*ROWS, "SpQR 3 bit, group 16"]
    assert all(row["perplexity"]["unseen topics"] > 1 for row in result["rows"])
    assert result["text"]


@pytest.mark.slow
def test_the_bundled_model(run: Run) -> None:
    """What README promises of `make demo`: order, and that 3 bits hurt when rounded to nearest."""
    result = json.loads(run("demo --json").stdout)
    fp16, rtn, _, gptq, _, spqr = (row["perplexity"]["unseen topics"] for row in result["rows"])
    assert fp16 < spqr < gptq < rtn
    assert rtn > 1.3 * fp16
    assert spqr < 1.05 * fp16
    assert result["rows"][-1]["bits"] < 4.5
