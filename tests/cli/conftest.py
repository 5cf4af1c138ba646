"""A tiny model on disk, its text, and the way to run a command."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spqr_cli.main import main

from ..tiny import save_tiny_llama

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def run() -> Run:
    """run("eval FOLDER", input=None): the result of a command line; a bug's traceback shows."""

    def run_command(line: str, input: str | None = None) -> Result:
        result = CliRunner().invoke(main, shlex.split(line), input=input)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run_command


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 2,600 tokens."""
    path = tmp_path_factory.mktemp("text") / "count.txt"
    path.write_text(" ".join(str(number) for number in range(640)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model folder with a chat template."""
    return save_tiny_llama(tmp_path_factory.mktemp("dense") / "model", chat=True)


@pytest.fixture(scope="session")
def compressed(run: Run, dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, compressed with the default settings."""
    out = tmp_path_factory.mktemp("compressed") / "model"
    result = run(f"compress {dense} {out} --dataset {text} --nsamples 4")
    assert result.exit_code == 0, result.output
    return out
