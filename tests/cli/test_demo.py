"""spqr demo, with a tiny model in the place of the bundled one, and the bundled one itself."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import spqr_numba.demo
from spqr_numba.config import SpqrConfig
from spqr_numba.demo import corpus
from spqr_numba.evaluate import baselines

from .conftest import Run

ROWS = ["fp16", "RTN 8 bit, group 16", "SpQR by layer"]


@pytest.fixture
def small(dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, texts and baselines that take no time."""
    monkeypatch.setattr(spqr_numba.demo, "MODEL_PATH", dense)
    monkeypatch.setattr(corpus, "training_text", text.read_text)
    monkeypatch.setattr(corpus, "held_out_text", lambda: text.read_text()[:500])
    monkeypatch.setattr(baselines, "baseline_configs", lambda bits: [SpqrConfig.rtn(8, 16)])


@pytest.mark.usefixtures("small")
def test_table_and_text(run: Run) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    lines = result.stdout.split("\n")
    assert lines[1].split()[:3] == ["model", "bits", "size"]
    assert [line[:20].strip() for line in lines[2:5]] == ROWS
    assert "continues a prompt" in result.stdout
    assert "s in all" in result.stderr


@pytest.mark.usefixtures("small")
def test_json(run: Run) -> None:
    result = json.loads(run("demo --json").stdout)
    assert [row["name"] for row in result["rows"]] == ROWS
    assert all(row["perplexity"]["unseen topics"] > 1 for row in result["rows"])
    assert result["text"]


@pytest.mark.slow
def test_the_bundled_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What README promises of `make demo`: order, and that 3 bits hurt when rounded to nearest.

    On a quarter of the windows, and without the baselines of which nothing is said.
    """
    monkeypatch.setattr(importlib.import_module("spqr_cli.demo"), "NSAMPLES", 8)
    configs = [SpqrConfig.rtn(3), SpqrConfig.gptq(3)]
    monkeypatch.setattr(baselines, "baseline_configs", lambda bits: configs)
    result = json.loads(run("demo --json").stdout)
    fp16, rtn, gptq, spqr = (row["perplexity"]["unseen topics"] for row in result["rows"])
    assert fp16 < spqr < gptq < rtn
    assert rtn > 1.05 * fp16
    assert spqr < 1.03 * fp16
    assert result["rows"][-1]["bits"] < 4.5
