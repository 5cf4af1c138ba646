"""spqr eval: one number for dense and compressed models alike, and the baselines' rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import Run

BASELINES_8 = ["fp16", "RTN 8 bit", "RTN 8 bit, group 16", "GPTQ 8 bit"]


def test_perplexity_by_hand(run: Run, dense: Path, text: Path) -> None:
    result = run(f"eval {dense} --dataset {text} --seqlen 50 --nsamples 3 --json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)[0]

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(dense)(text.read_text())["input_ids"])
    windows = tokens[:150].view(3, 50)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert row["perplexity"] == {"count": pytest.approx(math.exp(loss), rel=1e-5)}
    assert (row["name"], row["bits"]) == ("fp16", 16)
    assert row["nbytes"] == 2 * sum(parameter.numel() for parameter in model.parameters())


def test_a_compressed_model_on_two_texts(run: Run, compressed: Path, text: Path) -> None:
    other = text.with_name("other.txt")
    other.write_text("abc " * 100)
    result = run(f"eval {compressed} --dataset {text} --dataset {other} --nsamples 2")
    assert result.exit_code == 0, result.output
    header, row = result.stdout.splitlines()
    assert header.endswith("  perplexity, count  perplexity, other")
    assert row.startswith("SpQR by layer")
    assert "evaluating" in result.stderr


def test_baselines_of_a_dense_model(run: Run, dense: Path, text: Path) -> None:
    line = f"eval {dense} --baselines --bits 8 --dataset {text} --nsamples 2 --json"
    result = run(f"{line} --calibration {text} --calibration-nsamples 2")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == BASELINES_8
    assert 16 > rows[2]["bits"] > rows[1]["bits"] > 8
    for row in rows[1:]:
        assert row["perplexity"]["count"] == pytest.approx(rows[0]["perplexity"]["count"], rel=0.05)


def test_baselines_of_a_compressed_model_need_the_dense_one(
    run: Run, dense: Path, compressed: Path, text: Path
) -> None:
    line = f"eval {compressed} --baselines --dataset {text} --nsamples 2 --bits 8 --json"
    result = run(line)
    assert result.exit_code == 2
    assert "name it with --dense" in result.stderr

    result = run(f"{line} --dense {dense} --calibration {text} --calibration-nsamples 2")
    assert result.exit_code == 0, result.output
    names = [row["name"] for row in json.loads(result.stdout)]
    assert names == [*BASELINES_8, "SpQR by layer"]


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ("nowhere/at/all", ["there is no model"]),
        ("{dense} --dataset nowhere.txt", ["'nowhere.txt' is neither a file"]),
        ("{dense} --dataset {text} --seqlen 65", ["seqlen is 65", "context is 64 tokens"]),
        ("{dense} --dataset {text} --seqlen 1", ["seqlen is 1", "at least 2"]),
        ("{dense} --dataset {text} --nsamples 0", ["0 windows of text"]),
        ("{dense} --dataset {short}", ["the text has 5 tokens", "need at least 64"]),
    ],
)
def test_bad_input(
    run: Run, dense: Path, text: Path, tmp_path: Path, line: str, messages: list[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short")
    result = run("eval " + line.format(dense=dense, text=text, short=short))
    assert result.exit_code == 1
    for message in messages:
        assert message in result.stderr
    assert result.stdout == ""
