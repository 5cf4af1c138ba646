from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spqr_numba.errors import CheckpointError
from spqr_numba.model import source
from spqr_numba.model.skeleton import stored_names
from spqr_numba.model.source import open_source

from . import architectures
from .architectures import ARCHITECTURES

FolderOf = Callable[[str], Path]


@pytest.fixture
def folder(folder_of: FolderOf, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "model"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_stored_tensor_is_found_and_read(name: str, folder_of: FolderOf) -> None:
    opened = open_source(str(folder_of(name)))
    model = architectures.make(name)
    weights = opened.weights(model)
    for tensor_name in stored_names(model):
        assert torch.equal(weights.read(tensor_name), model.state_dict()[tensor_name])


def test_a_sharded_folder(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    model = architectures.make("llama")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    weights = open_source(str(folder)).weights(model)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())


def test_names_without_the_prefix_of_the_base_model(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(stripped, folder / "model.safetensors")
    weights = open_source(str(folder)).weights(architectures.make("llama"))
    assert "model.layers.0.mlp.up_proj.weight" in weights


def test_a_tied_embedding_stored_under_the_head_s_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    weights = open_source(str(folder)).weights(architectures.make("llama"))
    assert torch.equal(weights.read("model.embed_tokens.weight"), tensors["lm_head.weight"])


def test_a_missing_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    weights = open_source(str(folder)).weights(architectures.make("llama"))
    with pytest.raises(CheckpointError, match=r"no tensor for model\.norm\.weight"):
        weights.read("model.norm.weight")


def test_the_fingerprint_follows_config_and_weights(folder: Path) -> None:
    first = open_source(str(folder)).fingerprint
    assert open_source(str(folder)).fingerprint == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    second = open_source(str(folder)).fingerprint
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert len({first, second, open_source(str(folder)).fingerprint}) == 3


def test_companions_are_copied(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "code.py").write_text("print('never copied')")
    out = tmp_path / "out"
    out.mkdir()
    open_source(str(folder)).write_companions(out)
    names = {path.name for path in out.iterdir()}
    assert names >= {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert not names & {"code.py", "config.json", "model.safetensors"}


def test_a_generation_config_is_made_where_there_is_none(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").unlink()
    open_source(str(folder)).write_companions(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 256


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("config.json"), "is not a model folder: it holds no config.json"),
        (remove("model.safetensors"), "holds no weights: neither model.safetensors nor"),
        (pickled, r"holds pickled weights .* convert them: .*save_pretrained"),
        (truncated, "is not a whole safetensors file"),
        (no_shard, "is incomplete: model-00001-of-00002.safetensors is missing"),
        (bad_index, "cannot read .*index.json"),
    ],
)
def test_folders_that_hold_no_model(
    spoil: Callable[[Path], None], message: str, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [("not json", "cannot read"), ('{"model_type": "nope"}', "cannot read .*nope")],
)
def test_configs_that_cannot_be_read(config: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(folder)).config  # noqa: B018


def test_a_missing_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer \(none of tokenizer\.json"):
        open_source(str(folder)).tokenizer()


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder or \.gguf file at .*absent"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"no model folder or \.gguf file at absent\.gguf"):
        open_source("absent.gguf")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(CheckpointError, match="is a file; a model is a folder"):
        open_source(str(tmp_path / "file.txt"))
    (tmp_path / "file.gguf").write_text("nope")
    with pytest.raises(CheckpointError, match="is not a gguf file"):
        open_source(str(tmp_path / "file.gguf"))


def test_a_hub_name_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_source("someone/model").label == "someone/model"
    assert asked == ["someone/model"]


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"no folder 'a/b' here, .*no network\)"):
        open_source("a/b")


def test_nothing_means_the_bundled_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spqr_numba.demo.MODEL_PATH", folder)
    opened = open_source(None)
    assert opened.label == "the bundled model"
    assert open_source(opened) is opened
    assert source.open_source(None).config.model_type == "llama"
