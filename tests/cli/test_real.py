"""The commands on a real model: SmolLM2-135M-Instruct, as a .gguf that a package carries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_compress_eval_generate(run: Run, smollm2_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(f"compress {smollm2_gguf} {out} --bits 3 --nsamples 16 --seqlen 128 --json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["layers"]) == 30 * 7
    assert report["bits"] == pytest.approx(report["formula_bits"], rel=0.005)
    assert report["bits"] < 4.6

    text = "--seqlen 256 --nsamples 4 --json"
    dense, compressed = (json.loads(run(f"eval {m} {text}").stdout)[0] for m in (smollm2_gguf, out))
    assert (dense["bits"], compressed["bits"]) == (16, pytest.approx(report["bits"]))
    assert 1 < compressed["perplexity"]["manual"] / dense["perplexity"]["manual"] < 1.5

    answer = run(f"generate {out} -p 'The capital of France is' --raw -n 12").stdout
    assert "Paris" in answer
