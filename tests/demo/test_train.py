"""Training, for a few steps on a text of a few lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spqr_numba.demo import train as training

PAGE = "spam.eggs(ham)\n\n   Return the eggs that go with *ham*.\n\n" * 20


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step or two, of one short window each, on a line or two of text."""
    settings = {"CONTEXT": 16, "BATCH": 1, "PASSES": 1, "CHECKPOINTS": 2}
    for name, value in settings.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(training, "training_documents", lambda: [PAGE[:130]])
    monkeypatch.setattr(training, "held_out_text", lambda: PAGE)


@pytest.mark.usefixtures("brief")
def test_a_short_run_leaves_a_model_that_loads(tmp_path: Path) -> None:
    reached = training.train(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 1 < reached < 2 * training.VOCABULARY
    assert model.dtype == torch.float16
    assert AutoTokenizer.from_pretrained(tmp_path).decode([0]) == training.BEGIN


@pytest.mark.usefixtures("brief")
def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        training.train(tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.usefixtures("brief")
def test_the_time_bounds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PASSES", 10**6)
    assert math.isfinite(training.train(tmp_path, minutes=0.01))


def test_no_time_at_all_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--out", "unused", "--minutes", "0"])
    with pytest.raises(SystemExit, match="2"):
        training.main()
    assert "--minutes is 0.0; it must be above 0" in capsys.readouterr().err


def test_the_learning_rate_warms_up_and_then_falls() -> None:
    rates = [training._learning_rate(done / 1000) for done in range(1001)]
    peak = rates.index(max(rates))
    assert peak == 1000 * training.WARM_UP
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert rates[0] == 0
    assert rates[peak] == training.PEAK_LEARNING_RATE
    assert rates[-1] == pytest.approx(training.FINAL_LEARNING_RATE)
