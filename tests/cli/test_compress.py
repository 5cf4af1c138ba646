"""spqr compress: the folder it writes, and everything that can be wrong with its input."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from spqr_cli.compress import _choices
from spqr_numba.model import compress as compress_module
from spqr_numba.model.report import LayerRow

from .conftest import Run
from .test_options import PAPER_COMMAND

QUICK = "--nsamples 2 --seqlen 32"
NEAREST = "use_hessian=false,outlier_threshold=none,permutation=identity"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model(dense: Path, tmp_path: Path) -> Path:
    """A copy of the dense model, to be damaged."""
    return Path(shutil.copytree(dense, tmp_path / "damaged"))


def test_the_folder_is_complete(dense: Path, compressed: Path) -> None:
    names = {path.name for path in compressed.iterdir()}
    expected = {"config.json", "generation_config.json", "layers.csv", "tokenizer.json"}
    expected |= {"chat_template.jinja", "model.safetensors.index.json"}
    assert expected <= names
    assert not list(compressed.parent.glob("*.partial"))
    settings = json.loads((compressed / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "spqr"
    assert settings["bits"] == 3


def test_the_papers_command_line_runs_as_printed(
    run: Run, dense: Path, text: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(2000) % 256)
    out = tmp_path / "out"
    line = f"compress {dense} {out} --custom_data_path {tokens} {PAPER_COMMAND}"
    result = run(f"{line} --nsamples 2 --offload_activations --json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert Path(report["out"]) == out
    assert len(report["layers"]) == 14
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["outlier_threshold"]) == (4, 0.1)


def test_results_on_stdout_progress_on_stderr(
    run: Run, dense: Path, text: Path, tmp_path: Path
) -> None:
    result = run(f"compress {dense} {tmp_path / 'out'} --dataset {text} {QUICK}")
    assert result.exit_code == 0, result.output
    assert "bits a weight" in result.stdout
    assert "measured" in result.stdout
    for stage in ("weighing tokens", "trying settings", "compressing"):
        assert (stage in result.stderr, stage in result.stdout) == (True, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [("", True), ("--dataset {text}", False), ("--preset paper", True), ("--nearest", False)],
)
def test_what_it_calibrates_on_is_said_where_nobody_did(
    run: Run,
    dense: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    said: bool,
) -> None:
    def fake(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_module, "compress", fake)
    result = run(f"compress {dense} {tmp_path / 'out'} {options.format(text=text)}")
    assert ("calibrating on Python's manual" in result.stderr) == said
    alone = run(f"compress {tmp_path / 'out'}")  # the bundled model was trained on it
    assert "manual" not in alone.stderr


def test_tuning_is_said_and_shown(run: Run, dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = (
        f"compress {dense} {out} --dataset {text} --nsamples 8 --seqlen 32 --preset paper --tune 2"
    )
    result = run(line)
    assert result.exit_code == 0, result.output
    assert re.search(r"tuning +2 of 2 blocks, \d\d\.\d% of their output error left", result.stdout)
    assert "model.layers.1, tuning step 2 of 2, " in result.stderr
    assert "2 steps of tuning leave" in result.stderr
    assert (out / "tuning.csv").read_text().startswith("block,error_before,error_after,steps,")
    as_json = json.loads(run(f"{line} --overwrite --json").stdout)
    assert [row["block"] for row in as_json["tuned"]] == ["model.layers.0", "model.layers.1"]


def test_tuning_the_model_is_said_and_shown(
    run: Run, dense: Path, text: Path, tmp_path: Path
) -> None:
    line = f"compress {dense} {tmp_path / 'out'} --dataset {text} --nsamples 8 --seqlen 32"
    result = run(f"{line} --tune-model 2")
    assert result.exit_code == 0, result.output
    assert re.search(r"tuning the model +0\.\d{4} of 0\.\d{4} nats a token from", result.stdout)
    assert "running the dense model" in result.stderr
    assert "2/2" in result.stderr.partition("tuning the model")[2]
    as_json = json.loads(run(f"{line} --tune-model 1 --overwrite --json").stdout)
    assert as_json["model"]["block"] == "model"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--tune -1", 2, "-1 is not in the range x>=0"),
        ("--tune-codes", 1, "give tune_model"),
        ("--tune 5 --nsamples 1", 1, "trains on some windows and measures on others"),
    ],
)
def test_tuning_that_cannot_be(
    options: str, code: int, message: str, run: Run, dense: Path, text: Path, tmp_path: Path
) -> None:
    result = run(f"compress {dense} {tmp_path / 'out'} --dataset {text} --seqlen 32 {options}")
    assert result.exit_code == code
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_out_alone_takes_the_bundled_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def fake(model: str | None, out: Path, config: Any, **options: Any) -> None:
        seen.update(model=model, out=out)
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_module, "compress", fake)
    assert run(f"compress {tmp_path / 'out'}").exit_code == 130
    assert seen == {"model": None, "out": tmp_path / "out"}


def test_a_target_is_shown_beside_what_was_chosen(
    run: Run, dense: Path, text: Path, tmp_path: Path
) -> None:
    line = f"compress {dense} {tmp_path / 'out'} --dataset {text} {QUICK} --stats-group-size 64"
    result = run(f"{line} --target-bits 4")
    assert result.exit_code == 0, result.output
    assert "by formula, 4 aimed at" in result.stdout
    assert "outlier thresholds" in result.stdout
    options = "--target-bits 6 --no-per-layer --overwrite --json"
    report = json.loads(run(f"{line} {options}").stdout)
    assert {row["code_bits"] for row in report["layers"]} == {3}
    assert len({row["outlier_threshold"] for row in report["layers"]}) > 1


def test_choices_stand_in_the_order_of_their_numbers() -> None:
    groups = [(3, 32, 4), (3, None, 3), (3, 32, 3), (2, 16, 3), (3, 8, 3)]
    layers = [
        LayerRow(
            f"layer {i}", 4, 8, bits, group, 3, zero_bits, 0.2, 0.1, 1e-9, 0.01, 0.1, 1.0, 2.5,
            0.5, 3.0, 3.5, False, 0.25,
        )
        for i, (bits, group, zero_bits) in enumerate(groups)
    ]  # fmt: skip
    lines = [(line["bits"], line["group"], line["scale, zero"]) for line in _choices(layers)]
    assert lines == [
        (2, 16, "3, 3"), (3, 8, "3, 3"), (3, 32, "3, 3"), (3, 32, "3, 4"), (3, "row", "3, 3")
    ]  # fmt: skip


def no_folder(model: Path) -> None:
    shutil.rmtree(model)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()


def half_a_file(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def encoder(model: Path) -> None:
    config = BertConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1)
    config.num_attention_heads, config.intermediate_size = 4, 48
    BertModel(config).save_pretrained(model)


def quantized(model: Path) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": "awq", "bits": 4})


def nan_weight(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def huge_norm(model: Path) -> None:
    """Finite weights whose activations are not finite when squared."""
    path = model / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    tensors["model.layers.1.input_layernorm.weight"].fill_(1e30)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (no_folder, ["there is no model"]),
        (no_config, ["is not a model folder", "config.json"]),
        (no_weights, ["holds no weights"]),
        (no_tokenizer, ["holds no tokenizer"]),
        (half_a_file, ["model.safetensors"]),
        (encoder, ["not a causal language model"]),
        (quantized, ["already quantized (awq)"]),
        (nan_weight, ["model.layers.1.mlp.up_proj", "NaN or inf"]),
        (huge_norm, ["no finite gradient at model.layers.0.self_attn", "--no-token-weights"]),
    ],
)
def test_bad_models(
    run: Run,
    model: Path,
    text: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    messages: list[str],
) -> None:
    damage(model)
    out = tmp_path / "out"
    result = run(f"compress {model} {out} --dataset {text} {QUICK}")
    assert_refused(result, out, *messages)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ("--dataset wikitext3", ["'wikitext3' is neither", "wikitext2"]),
        ("--dataset {tmp}/short.txt", ["the text has 12 tokens", "need at least 33"]),
        ("--dataset {tmp}/broken.jsonl", ["broken.jsonl, line 2 has no field 'text'"]),
        ("--dataset {tmp}/floats.npy", ["tokens must be integers"]),
        ("--dataset {tmp}/empty", ["empty holds no text files"]),
        ("--seqlen 100", ["seqlen is 100", "context is 64 tokens"]),
        ("--nsamples 0", ["0 windows"]),
        ("--wbits 16", ["bits is 16"]),
        ("--nearest --true-sequential", ["true_sequential calibrates"]),
        ("--override layers.9:bits=4", ["layers.9"]),
        ("--target-bits 2.5", ["target_bits is 2.5", "bits and more on this model"]),
        ("--target-bits 5 --nearest", ["use_hessian=False has none"]),
        (f"--target-bits 5 --override .:{NEAREST}", ["use_hessian=False has none"]),
        ("--target-bits 5 --no-per-layer --outlier-threshold inf", ["keeps no outliers"]),
        ("--target-bits 5 --override q_proj:bits=4", ["'q_proj' sets bits"]),
        ("--dataset {tmp}/short.txt --dataset {tmp}/short.txt --nsamples 1", ["2 texts"]),
        ("--skip layers.9", ["layers.9"]),
    ],
)
def test_bad_text_and_settings(
    run: Run, dense: Path, tmp_path: Path, options: str, messages: list[str]
) -> None:
    (tmp_path / "short.txt").write_text("twelve bytes")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    np.save(tmp_path / "floats.npy", np.zeros(100))
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    result = run(f"compress {dense} {out} {QUICK} {options.format(tmp=tmp_path)}")
    assert_refused(result, out, *messages)


@pytest.mark.parametrize("flag", ["--bits 3", "--group-size 8", "--zero-bits 4"])
def test_what_is_chosen_cannot_be_said_too(
    run: Run, dense: Path, tmp_path: Path, flag: str
) -> None:
    out = tmp_path / "out"
    result = run(f"compress {dense} {out} {flag} --target-bits 4")
    assert result.exit_code == 2
    assert f"{flag.split()[0]} says what all layers get" in result.stderr
    assert not out.exists()


def test_out_exists(run: Run, dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    line = f"compress {dense} {out} --dataset {text} {QUICK}"
    result = run(line)
    assert result.exit_code == 1
    assert f"{out} exists" in result.stderr
    assert "--overwrite" in result.stderr
    assert [path.name for path in out.iterdir()] == ["precious"]

    assert run(f"{line} --overwrite").exit_code == 1  # it is no compressed model
    assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    for _ in range(2):
        assert run(f"{line} --overwrite").exit_code == 0
    assert (out / "config.json").exists()


def test_a_model_is_no_folder_to_write(run: Run, dense: Path) -> None:
    before = sorted(path.name for path in dense.iterdir())
    for line in (f"compress {dense}", f"compress {dense} --overwrite"):
        result = run(line)
        assert result.exit_code == 2
        assert f"missing argument 'OUT', the folder to write: {dense} is a MODEL" in result.stderr
    assert sorted(path.name for path in dense.iterdir()) == before


def test_the_bundled_model_is_named(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(f"compress {out} --preset paper --no-token-weights {QUICK} --json")
    assert result.exit_code == 0, result.output
    assert f"the bundled one is compressed into {out}" in result.stderr


def test_no_space_left(
    run: Run, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spqr_numba.model.checkpoint.save_file", full)
    out = tmp_path / "out"
    result = run(f"compress {dense} {out} --dataset {text} {QUICK}")
    assert_refused(result, out, "no space left", f"{out}.partial")


def test_a_folder_that_cannot_be_made(run: Run, dense: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert_refused(run(f"compress {dense} {out} --dataset {text} {QUICK}"), out, "file")


def test_ctrl_c_keeps_finished_blocks_and_the_same_command_goes_on(
    run: Run, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compress_module.Compression._compress_block

    def interrupted(self: Any, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        original(self, index, *args)

    out = tmp_path / "out"
    line = f"compress {dense} {out} --dataset {text} {QUICK}"
    with monkeypatch.context() as patch:
        patch.setattr(compress_module.Compression, "_compress_block", interrupted)
        result = run(line)
    assert result.exit_code == 130
    assert f"{out}.partial keeps what is finished (blocks: 1)" in result.stderr
    assert "run the same command again" in result.stderr
    assert not out.exists()

    result = run(line)
    assert result.exit_code == 0
    assert "continuing behind 1 finished of 2 blocks" in result.stderr
    assert (out / "config.json").exists()
    assert not out.with_name("out.partial").exists()


def assert_refused(result: Any, out: Path, *messages: str) -> None:
    """Exit code 1, one message that says all of `messages`, and nothing that looks like a model."""
    assert result.exit_code == 1, result.output
    for message in messages:
        assert message in result.stderr
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not out.exists()
