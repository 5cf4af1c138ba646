"""spqr inspect: what the folder says must be what the loaded model says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spqr_numba.model.integration import load_model
from spqr_numba.nn import SpqrLinear

from .conftest import Run


def test_layers_are_as_the_loaded_model_has_them(run: Run, compressed: Path) -> None:
    result = json.loads(run(f"inspect {compressed} --json").stdout)
    model, _ = load_model(str(compressed))
    linears = {n: m.matrix for n, m in model.named_modules() if isinstance(m, SpqrLinear)}
    assert [layer["layer"] for layer in result["layers"]] == list(linears)
    for layer in result["layers"]:
        matrix = linears[layer["layer"]]
        assert (layer["rows"], layer["columns"]) == (
            matrix.spec.out_features,
            matrix.spec.in_features,
        )
        assert layer["nbytes"] == matrix.nbytes
        assert layer["bits"] == pytest.approx(matrix.bits_per_weight)
        assert layer["outlier_share"] == matrix.outlier_share
        assert 0 < layer["relative_loss"] < 1
    total = sum(matrix.nbytes for matrix in linears.values())
    assert result["total"]["nbytes"] == total


def test_the_table(run: Run, compressed: Path) -> None:
    lines = run(f"inspect {compressed}").stdout.splitlines()
    assert lines[0].split() == [
        "layer",
        "shape",
        "bits",
        "outliers",
        "%",
        "loss",
        "relative",
        "loss",
    ]
    assert lines[1].startswith("model.layers.0.self_attn.q_proj  32 x 32")
    assert lines[-1].startswith("14 layers, 15,360 weights in ")


def test_without_the_log_losses_are_unknown(run: Run, compressed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    (copy / "layers.csv").unlink()
    layers = json.loads(run(f"inspect {copy} --json").stdout)["layers"]
    assert {layer["loss"] for layer in layers} == {None}


def test_bad_input(run: Run, dense: Path, compressed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["scale_bits"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    for folder, message in [
        (tmp_path / "nowhere", f"there is no folder {tmp_path / 'nowhere'}"),
        (dense, "is not a model that `spqr compress` wrote"),
        (copy, "the checkpoint is damaged"),
    ]:
        result = run(f"inspect {folder}")
        assert result.exit_code == 1
        assert message in result.stderr


def test_the_page_and_the_picture(run: Run, compressed: Path, dense: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    layer = "model.layers.0.self_attn.q_proj"
    result = run(f"inspect {compressed} --html {page} --plot {picture} --layer {layer}")
    assert result.exit_code == 0, result.output
    assert f"wrote {page}\nwrote {picture}\n" in result.stderr
    assert f"Where the outliers of {layer} are" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = run(f"inspect {compressed} --html {page} --layer {layer} --model {dense}")
    assert result.exit_code == 0, result.output
    assert f"Where {layer} is sensitive" in page.read_text()


def test_a_map_needs_somewhere_to_go(run: Run, compressed: Path) -> None:
    result = run(f"inspect {compressed} --layer model.layers.0.self_attn.q_proj")
    assert result.exit_code == 2
    assert "--layer and --model choose the map of --html or --plot" in result.stderr
