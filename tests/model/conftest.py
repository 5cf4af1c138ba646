"""Model folders, made once for all tests of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from . import architectures


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder_of("llama"): the saved tiny model of that architecture. Not to be written to."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            architectures.save(architectures.make(name), root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(architectures.text())
    return path
