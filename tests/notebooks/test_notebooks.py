"""The notebooks: executed from top to bottom on the bundled model, and committed as executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

nbclient = pytest.importorskip("nbclient", reason="the extra `notebooks` is not installed")
nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT_SECONDS = 240  # for a cell, on a busy machine
REAL_SECONDS = 3600  # 02 compresses the whole model ten times

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_four() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@each_notebook
def test_committed_as_executed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "MODEL = None" in cells[0].source
    assert "._" not in "".join(cell.source for cell in cells)  # public names only


def execute(notebook: Any, folder: Path, cell_seconds: int) -> None:
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        notebook, timeout=cell_seconds, kernel_name="python3", resources=resources
    ).execute()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own event loop
@each_notebook
def test_runs(path: Path, tmp_path: Path) -> None:
    execute(nbformat.read(path, as_version=4), tmp_path, LIMIT_SECONDS)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("stem", ["01", "02", "03", "04"])
def test_runs_on_a_real_model(stem: str, smollm2_gguf: Path, tmp_path: Path) -> None:
    [path] = [path for path in NOTEBOOKS if path.stem.startswith(stem)]
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace("MODEL = None", f"MODEL = {str(smollm2_gguf)!r}")
    if torch.cuda.is_available():
        first.source = first.source.replace('DEVICE = "cpu"', 'DEVICE = "cuda"')
    execute(notebook, tmp_path, REAL_SECONDS)
    nbformat.write(notebook, tmp_path / path.name)
