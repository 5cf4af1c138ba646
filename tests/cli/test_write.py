"""spqr write: a file of tokens that the other commands take as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from spqr_numba.model.integration import load_model
from spqr_numba.own_text import own_text

from .conftest import Run


def test_what_it_writes_can_be_calibrated_on(
    run: Run, dense: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.safetensors"
    result = run(f"write {dense} {file} --nsamples 9 --seqlen 24 --seed 3")
    assert result.exit_code == 0, result.output
    assert "The first begins: " in result.stdout
    written = load_file(file)["tokens"]
    expected = own_text(*load_model(str(dense)), 9, 24, seed=3)
    assert written.tolist() == expected.tolist()
    assert list(tmp_path.iterdir()) == [file]
    line = f"{dense} {tmp_path / 'out'} --dataset {file} --dataset {text} --seqlen 24"
    assert run(f"compress {line} --nsamples 4 --preset paper").exit_code == 0
    assert run(f"eval {dense} --dataset {file} --seqlen 24").exit_code == 0


def test_json(run: Run, dense: Path, tmp_path: Path) -> None:
    result = run(f"write {dense} {tmp_path / 'own.safetensors'} --nsamples 2 --json")
    values = json.loads(result.stdout)
    assert (values["windows"], values["tokens"]) == (2, 128)  # the model's context: 64
    assert values["begins"]


def test_a_file_that_exists(run: Run, dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    file.write_text("precious")
    line = f"write {dense} {file} --nsamples 2 --seqlen 8"
    refused = run(line)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert file.read_text() == "precious"
    assert run(f"{line} --overwrite").exit_code == 0
    assert load_file(file)["tokens"].shape == (2, 8)


def test_a_disk_that_fills_up(
    run: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, Any], to: Path) -> None:
        to.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    result = run(f"write {dense} {tmp_path / 'own.safetensors'} --nsamples 2 --seqlen 8")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("", 2, "name the FILE.safetensors"),
        ("{dense} own.txt", 2, "must end in .safetensors"),
        ("{dense} nowhere/own.safetensors", 2, "there is no folder nowhere"),
        ("{dense} /proc/own.safetensors", 2, "nothing can be written into the folder /proc"),
        ("nowhere {tmp}/own.safetensors", 1, "nowhere"),
        ("{dense} {tmp}/own.safetensors --seqlen 65", 1, "context is 64 tokens"),
        ("{dense} {tmp}/own.safetensors --seqlen 1", 1, "at least one of 2"),
        ("{dense} {tmp}/own.safetensors --nsamples 0", 2, "--nsamples"),
        ("{dense}", 2, "spqr write MODEL FILE.safetensors"),
    ],
)
def test_bad_input(
    run: Run, dense: Path, tmp_path: Path, line: str, code: int, message: str
) -> None:
    result = run(f"write {line.format(dense=dense, tmp=tmp_path)}")
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not list(tmp_path.iterdir())
