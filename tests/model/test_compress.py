"""Whole models through the block loop."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spqr_numba.config import CHOSEN_FIELDS, SpqrConfig
from spqr_numba.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NumericsError,
    SpqrError,
)
from spqr_numba.model.blocks import find_blocks
from spqr_numba.model.budget import read_curves
from spqr_numba.model.calibration import load_tokens
from spqr_numba.model.compress import COMPRESSING, compress
from spqr_numba.model.gradients import TokenWeights
from spqr_numba.model.integration import load_model
from spqr_numba.model.progress import Silent
from spqr_numba.model.source import open_source
from spqr_numba.model.survey import Sample
from spqr_numba.nn import SpqrLinear
from spqr_numba.quantize.hessian import Hessian

from . import architectures
from .architectures import ARCHITECTURES

PAPER = SpqrConfig(damping=0.1)
ASYMMETRIC = replace(PAPER, asymmetric=True)
WEIGHED = replace(ASYMMETRIC, true_sequential=True, token_weights=True)
RTN = SpqrConfig.rtn(4, 16)
CALIBRATION = {"nsamples": 5, "seqlen": 24, "batch_size": 2}

FolderOf = Callable[[str], Path]
Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> Run:
    """run(folder, config=PAPER, name="out", ...) -> the compressed folder."""

    def call(folder: Path, config: SpqrConfig = PAPER, name: str = "out", **settings: Any) -> Path:
        arguments = {"dataset": str(text_file), **CALIBRATION, **settings}
        return compress(str(folder), tmp_path / name, config, **arguments).out

    return call


def spqr_linears(model: torch.nn.Module) -> dict[str, SpqrLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SpqrLinear)}


def dense_twin(model: torch.nn.Module, folder: Path) -> Any:
    """The original model with the weights that `model` decodes to."""
    twin, _ = load_model(str(folder))
    for name, layer in spqr_linears(model).items():
        twin.get_submodule(name).weight.data.copy_(layer.dequantize())
    return twin


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "layers.csv").open() as file:
        return list(csv.DictReader(file))


def losses_of(folder: Path) -> torch.Tensor:
    """The relative loss of each layer."""
    return torch.tensor([float(row["relative_loss"]) for row in log_of(folder)])


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compressed_loads_and_is_what_was_calibrated(
    name: str, folder_of: FolderOf, run: Run
) -> None:
    model, tokenizer = load_model(str(run(folder_of(name))))
    linears = spqr_linears(model)
    blocks = find_blocks(model)
    assert not any(type(m) is torch.nn.Linear for b in blocks.modules for m in b.modules())
    assert len(linears) in (8, 12, 14)
    twin = dense_twin(model, folder_of(name))
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(load_model(str(folder_of(name)))[0]))
    assert tokenizer("a")["input_ids"]


ON_A_GPU = pytest.mark.parametrize("config", [PAPER, ASYMMETRIC], ids=["spqr", "asymmetric"])


@pytest.mark.gpu
@ON_A_GPU
def test_on_a_gpu(config: SpqrConfig, folder_of: FolderOf, run: Run) -> None:
    """The same bytes from run to run, wherever hidden states are, and about a CPU's losses.

    The GPU runs the model in fp16. So small a matrix changes its loss by a tenth, either way, where
    its inputs are rounded like that, on a CPU too; the mean of the layers hardly moves.
    """
    folder = folder_of("llama")
    on_gpu = run(folder, config, "gpu", device="cuda")
    off_loaded = run(folder, config, "off", device="cuda", offload_activations=True)
    assert tensors_of(on_gpu) == tensors_of(off_loaded)
    losses, expected = losses_of(on_gpu), losses_of(run(folder, config))
    torch.testing.assert_close(losses.mean(), expected.mean(), rtol=0.05, atol=0)


@pytest.mark.gpu
@ON_A_GPU
def test_a_gpu_loses_what_a_cpu_loses(config: SpqrConfig, tmp_path: Path, run: Run) -> None:
    """Layer by layer, where both run the model in fp32."""
    folder = architectures.save(architectures.make("llama", torch.float32), tmp_path / "fp32")
    on_gpu, on_cpu = run(folder, config, "gpu", device="cuda"), run(folder, config)
    torch.testing.assert_close(losses_of(on_gpu), losses_of(on_cpu), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma3"])
def test_losses_are_those_of_the_inputs_that_the_compressed_model_sees(
    name: str, folder_of: FolderOf, run: Run, text_file: Path
) -> None:
    """The loss in layers.csv is that on the true inputs: blocks before compressed, own not."""
    from spqr_numba.model.calibration import sample_windows

    out = run(folder_of(name))
    model, tokenizer = load_model(str(out))
    original, _ = load_model(str(folder_of(name)))
    windows = sample_windows([load_tokens(str(text_file), tokenizer)], 5, 24, seed=0)
    blocks = find_blocks(original)
    last = blocks.name(len(blocks) - 1)
    compressed = spqr_linears(model)
    hessians = {}
    for layer, module in compressed.items():
        linear = original.get_submodule(layer)
        if layer.startswith(last):
            hessians[layer] = hessian = Hessian(module.in_features)
            linear.register_forward_pre_hook(lambda _, args, h=hessian: h.add(args[0]))
        else:
            linear.weight.data.copy_(module.dequantize())
    with torch.no_grad():
        original(windows)
    rows = {row["layer"]: row for row in log_of(out)}
    for layer, hessian in hessians.items():
        error = original.get_submodule(layer).weight - compressed[layer].dequantize()
        loss = torch.sum((error @ hessian.matrix) * error).item()
        assert float(rows[layer]["loss"]) == pytest.approx(loss, rel=1e-2), layer


def test_the_folder_is_complete(folder_of: FolderOf, run: Run) -> None:
    out = run(folder_of("qwen2"))
    source = folder_of("qwen2")
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "layers.csv",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization.pop("quant_method") == "spqr"
    assert quantization.pop("format_version") == 1
    assert SpqrConfig.from_dict(quantization) == PAPER
    assert config == json.loads((source / "config.json").read_text())


def test_what_is_not_compressed_keeps_its_dtype_and_bytes(folder_of: FolderOf, run: Run) -> None:
    out = run(folder_of("qwen2"), replace(PAPER, skip=(r"layers\.1\.mlp\.down_proj",)))
    stored = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    original = load_file(folder_of("qwen2") / "model.safetensors")
    kept = set(original) & set(stored)
    assert kept >= {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert "model.layers.0.mlp.down_proj.weight" not in stored
    for name in kept:
        assert stored[name].dtype == torch.float16, name
        assert torch.equal(stored[name], original[name]), name


def test_tied_embeddings_stay_tied(folder_of: FolderOf, run: Run) -> None:
    out = run(folder_of("llama"))
    names = [name for path in out.glob("*.safetensors") for name in load_file(path)]
    assert "lm_head.weight" not in names
    model, _ = load_model(str(out))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_report_and_log_agree(folder_of: FolderOf, tmp_path: Path, text_file: Path) -> None:
    report = compress(
        str(folder_of("llama")), tmp_path / "out", PAPER, dataset=str(text_file), **CALIBRATION
    )
    rows = log_of(report.out)
    assert [row["layer"] for row in rows] == [row.layer for row in report.layers]
    assert {"loss", "outlier_share", "damping", "seconds", "bits"} <= set(rows[0])
    assert all(row.loss > 0 and 0 < row.relative_loss < 1 for row in report.layers)
    model, _ = load_model(str(report.out))
    layers = [layer.matrix for layer in spqr_linears(model).values()]
    weights = sum(m.spec.out_features * m.spec.in_features for m in layers)
    assert report.bits == pytest.approx(8 * sum(m.nbytes for m in layers) / weights)
    assert report.bytes == sum(path.stat().st_size for path in report.out.iterdir())
    assert set(report.seconds) == {
        "prepare",
        "read",
        "forward",
        "hessian",
        "factorise",
        "quantize",
        "write",
    }


def test_the_same_seed_gives_the_same_bytes(folder_of: FolderOf, run: Run) -> None:
    first, second, other = (
        tensors_of(run(folder_of("llama"), name=str(i), seed=seed))
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == second
    assert first != other


def test_overrides_change_single_linears(folder_of: FolderOf, run: Run) -> None:
    config = replace(PAPER, overrides=(("q_proj", {"bits": 4}), ("k_proj", {"damping": 1.0})))
    model, _ = load_model(str(run(folder_of("llama"), config)))
    for name, layer in spqr_linears(model).items():
        assert layer.spec.bits == (4 if "q_proj" in name else 3)
    twin = dense_twin(model, folder_of("llama"))
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)


def test_an_override_may_round_to_nearest(folder_of: FolderOf, run: Run) -> None:
    nearest = {"use_hessian": False, "outlier_threshold": None, "permutation": "identity"}
    out = run(folder_of("llama"), replace(PAPER, overrides=(("q_proj", nearest),)))
    rows = {row["layer"]: row for row in log_of(out)}
    assert rows["model.layers.0.self_attn.q_proj"]["rounded"] == "True"
    assert rows["model.layers.0.self_attn.k_proj"]["rounded"] == "False"
    assert len(spqr_linears(load_model(str(out))[0])) == 14


def test_spearman_orders_each_weight_by_itself(folder_of: FolderOf, run: Run) -> None:
    model, _ = load_model(str(run(folder_of("llama"), replace(PAPER, permutation="spearman"))))
    q, k = (
        model.get_submodule(f"model.layers.0.self_attn.{name}").permutation
        for name in ("q_proj", "k_proj")
    )
    assert not torch.equal(q, k)


def test_linears_of_one_input_share_their_order(folder_of: FolderOf, run: Run) -> None:
    attention = load_model(str(run(folder_of("llama"))))[0].model.layers[0].self_attn
    assert torch.equal(attention.q_proj.permutation, attention.k_proj.permutation)
    assert torch.equal(attention.q_proj.permutation, attention.v_proj.permutation)


def test_true_sequential_calibrates_on_compressed_outputs(folder_of: FolderOf, run: Run) -> None:
    config = replace(PAPER, true_sequential=True)
    plain, sequential = (
        load_model(str(run(folder_of("llama"), config, name)))[0]
        for config, name in ((PAPER, "plain"), (config, "sequential"))
    )
    block = "model.layers.0."
    for name, same in (("self_attn.q_proj", True), ("self_attn.o_proj", False)):
        weights = [model.get_submodule(block + name).dequantize() for model in (plain, sequential)]
        assert torch.equal(*weights) == same, name


def test_asymmetric_changes_what_comes_behind_an_error(folder_of: FolderOf, run: Run) -> None:
    """Nothing has drifted in front of the first linears; in front of the next block, all has."""
    plain, asymmetric = (
        load_model(str(run(folder_of("llama"), config, name)))[0]
        for config, name in ((PAPER, "plain"), (ASYMMETRIC, "asymmetric"))
    )
    for name, layer in spqr_linears(plain).items():
        same = torch.equal(layer.dequantize(), asymmetric.get_submodule(name).dequantize())
        assert same == name.startswith("model.layers.0."), name


def test_rounding_to_nearest_needs_no_text(folder_of: FolderOf, run: Run) -> None:
    out = run(folder_of("llama"), RTN, dataset="there is no such text")
    model, _ = load_model(str(out))
    linear = load_model(str(folder_of("llama")))[0].get_submodule("model.layers.1.mlp.up_proj")
    error = model.get_submodule("model.layers.1.mlp.up_proj").dequantize() - linear.weight
    groups = linear.weight.unflatten(1, (-1, 16))
    step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
    assert (error.abs().unflatten(1, (-1, 16)) <= 0.6 * step[..., None]).all()


class Killed(KeyboardInterrupt):
    pass


class KillAfter(Silent):
    """A progress bar that ends the run behind so many blocks of a stage."""

    def __init__(self, blocks: int, of: str = COMPRESSING) -> None:
        self.left, self.stage, self.of = blocks, "", of

    def set_description_str(self, desc: str, refresh: bool = True) -> None:
        self.stage = desc

    def update(self, n: int = 1) -> None:
        if self.stage == self.of:
            self.left -= n
            if n and self.left <= 0:
                raise Killed


class Watched(Silent):
    """A progress bar that remembers its stages: [name, steps, steps done]."""

    def __init__(self) -> None:
        self.stages: list[list[Any]] = []

    def set_description_str(self, desc: str, refresh: bool = True) -> None:
        self.stages.append([desc])

    def reset(self, total: float) -> None:
        self.stages[-1] += [total, 0]

    def update(self, n: int = 1) -> None:
        self.stages[-1][2] += n


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four") / "model"
    return architectures.save(
        architectures.make("gemma3", num_hidden_layers=4, layer_types=None), folder
    )


@pytest.mark.parametrize(
    "config", [PAPER, ASYMMETRIC, WEIGHED, RTN], ids=["spqr", "asymmetric", "weighed", "rtn"]
)
def test_killed_and_continued_is_uninterrupted(
    config: SpqrConfig, four_blocks: Path, run: Run, tmp_path: Path
) -> None:
    whole = run(four_blocks, config, "whole")
    for blocks in (1, 2):  # the second run goes on where the first ended
        with pytest.raises(Killed):
            run(four_blocks, config, "killed", progress=KillAfter(blocks))
        assert not (tmp_path / "killed").exists()
        with pytest.raises(CheckpointError, match="is not a model folder"):
            load_model(str(tmp_path / "killed.partial"))
    continued = run(four_blocks, config, "killed")
    assert tensors_of(continued) == tensors_of(whole)
    layers = [[row["layer"] for row in log_of(folder)] for folder in (whole, continued)]
    assert layers[0] == layers[1]
    assert {path.name for path in continued.iterdir()} == {path.name for path in whole.iterdir()}


def test_other_settings_do_not_continue(
    folder_of: FolderOf, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        run(folder_of("llama"), progress=KillAfter(1))
    run(folder_of("llama"), seed=5, overwrite=True)
    assert "starting anew" in caplog.text


def test_token_weights_are_those_of_the_windows_that_run(
    folder_of: FolderOf, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hessians of the first block's first input, as they are and from its inputs by hand."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    weights: list[TokenWeights] = []
    add, make = Hessian.add, TokenWeights.__init__

    def watched(hessian: Hessian, x: Any, dense: Any = None, each: Any = None) -> None:
        seen.append((x.clone(), each))
        add(hessian, x, dense, each)

    def noted(found: TokenWeights, squares: Any, device: Any) -> None:
        weights.append(found)
        make(found, squares, device)

    monkeypatch.setattr(Hessian, "add", watched)
    monkeypatch.setattr(TokenWeights, "__init__", noted)
    run(folder_of("llama"), replace(PAPER, token_weights=True))
    inputs = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    width = seen[0][0].shape[-1]
    firsts = [pair for pair in seen if pair[0].shape[-1] == width][:9:3]  # three inputs a batch
    expected = weights[0].of(inputs, slice(0, 5))
    assert torch.equal(torch.cat([pair[1] for pair in firsts]), expected)
    assert expected.shape == (5, 24)
    assert expected.mean().item() == pytest.approx(1, abs=0.01)


def test_token_weights_serve_a_target_too(folder_of: FolderOf, run: Run) -> None:
    config = replace(PAPER, fit="joint", token_weights=True)
    plain, weighed = (
        run(folder_of("llama"), each, name, target_bits=4.4)
        for name, each in {"plain": replace(config, token_weights=False), "it": config}.items()
    )
    assert (
        read_curves((plain / "curves.csv").read_text()).keys()
        == read_curves((weighed / "curves.csv").read_text()).keys()
    )
    assert (plain / "curves.csv").read_text() != (weighed / "curves.csv").read_text()
    assert not list(weighed.glob("kept-*"))


def spoiled(folder: Path, tmp_path: Path, changes: dict[str, torch.Tensor]) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "spoiled"))
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | changes, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_nan_in_a_weight_is_named(folder_of: FolderOf, run: Run, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = spoiled(folder_of("llama"), tmp_path, {name: torch.full((96, 64), torch.nan)})
    with pytest.raises(NumericsError, match=rf"{name} holds NaN or inf"):
        run(folder)


def test_inf_in_the_activations_is_named(folder_of: FolderOf, run: Run, tmp_path: Path) -> None:
    large = {"model.layers.1.post_attention_layernorm.weight": torch.full((64,), 3e38)}
    with pytest.raises(NumericsError, match=r"^model\.layers\.1\.mlp\.gate_proj: .*NaN or inf"):
        run(spoiled(folder_of("llama"), tmp_path, large))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dataset": "wikitext3"}, DataError, "'wikitext3' is neither a file"),
        ({"seqlen": 65}, ConfigError, "seqlen is 65, and the model's context is 64 tokens"),
        ({"nsamples": 0}, DataError, "0 windows"),
        ({"config": replace(PAPER, skip=("nope",))}, ConfigError, "'nope' matches no weight"),
    ],
)
def test_settings_that_cannot_be(
    settings: dict[str, Any], error: type[SpqrError], message: str, folder_of: FolderOf, run: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        run(folder_of("llama"), **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [0, 30])
def test_too_little_text(folder_of: FolderOf, run: Run, tmp_path: Path, tokens: int) -> None:
    (tmp_path / "short.txt").write_text("x" * tokens)
    with pytest.raises(
        DataError, match=f"the text has {tokens} tokens, and windows of 40 need at least 41"
    ):
        run(folder_of("llama"), dataset=str(tmp_path / "short.txt"), seqlen=40)


def test_a_batch_of_nothing(folder_of: FolderOf, run: Run) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0; at least one window"):
        run(folder_of("llama"), batch_size=0)


def test_a_tokenizer_of_another_model(folder_of: FolderOf, run: Run, tmp_path: Path) -> None:
    folder = architectures.save(architectures.make("llama", vocab_size=100), tmp_path / "small")
    with pytest.raises(DataError, match=r"has token \d+, and the model knows 0 \.\.\. 99"):
        run(folder)


def test_out_exists(folder_of: FolderOf, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        run(folder_of("llama"), RTN)
    assert (run(folder_of("llama"), RTN, overwrite=True) / "config.json").is_file()


def test_a_compressed_model_is_not_compressed_again(folder_of: FolderOf, run: Run) -> None:
    out = run(folder_of("llama"), RTN)
    with pytest.raises(ModelError, match=r"already quantized \(spqr\)"):
        run(out, name="again")


def test_a_missing_weight_is_named(folder_of: FolderOf, run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder_of("mistral"), tmp_path / "model"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor for lm_head\.weight; it is incomplete"):
        run(copy)


TARGET = SpqrConfig(damping=0.1, stats_group_size=64)


def bits_of(folder: Path) -> float:
    """Bits a weight from the bytes of the buffers."""
    matrices = [layer.matrix for layer in spqr_linears(load_model(str(folder))[0]).values()]
    weights = sum(matrix.spec.out_features * matrix.spec.in_features for matrix in matrices)
    return 8 * sum(matrix.nbytes for matrix in matrices) / weights


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3.6, 4.2])
def test_the_bundled_model_comes_to_the_bits_aimed_at(bits: float, tmp_path: Path) -> None:
    settings = {"nsamples": 8, "seqlen": 128, "per_layer": bits < 4}
    out = compress(None, tmp_path / "out", TARGET, target_bits=bits, **settings).out
    assert bits_of(out) == pytest.approx(bits, rel=0.005)


@pytest.mark.parametrize("per_layer", [False, True])
def test_what_a_target_chose_is_stored(per_layer: bool, folder_of: FolderOf, run: Run) -> None:
    out = run(folder_of("llama"), TARGET, target_bits=4.6, per_layer=per_layer)
    assert bits_of(out) == pytest.approx(4.6, rel=0.02)  # 14 layers, and steps as large as one's
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    del quantization["quant_method"], quantization["format_version"]
    stored = SpqrConfig.from_dict(quantization)
    chosen = set()
    for row in log_of(out):
        config = stored.for_module(row["layer"])
        assert config is not None
        settings = tuple(getattr(config, name) for name in CHOSEN_FIELDS)
        columns = ("code_bits", *CHOSEN_FIELDS[1:])
        assert [str(setting or "") for setting in settings] == [row[name] for name in columns]
        chosen.add(settings)
    assert len(chosen) > 2
    model, _ = load_model(str(out))
    twin = dense_twin(model, folder_of("llama"))
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)


def test_a_target_leaves_what_is_rounded_to_nearest(folder_of: FolderOf, run: Run) -> None:
    nearest = {"use_hessian": False, "outlier_threshold": None, "permutation": "identity"}
    config = replace(TARGET, overrides=(("down_proj", nearest),), skip=("o_proj",))
    out = run(folder_of("llama"), config, target_bits=4.9)
    assert {row["layer"].rpartition(".")[2]: row["rounded"] for row in log_of(out)} == {
        name: str(name == "down_proj")
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("per_layer", [False, True])
def test_killed_on_the_way_to_a_target_and_continued_is_uninterrupted(
    per_layer: bool, four_blocks: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    aim = {"target_bits": 4.6, "per_layer": per_layer}
    whole = run(four_blocks, TARGET, "whole", **aim)
    with pytest.raises(Killed):
        run(four_blocks, TARGET, "killed", progress=KillAfter(2), **aim)
    monkeypatch.delattr("spqr_numba.model.compress.survey")  # what it found is kept
    continued = run(four_blocks, TARGET, "killed", **aim)
    assert tensors_of(continued) == tensors_of(whole)
    for name in ("config.json", "curves.csv"):
        assert (continued / name).read_text() == (whole / name).read_text()


def test_killed_among_the_settings_and_continued_is_uninterrupted(
    four_blocks: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks whose settings were tried are not tried again."""
    aim = {"target_bits": 4.6}
    whole = run(four_blocks, TARGET, "whole", **aim)
    with pytest.raises(Killed):
        run(four_blocks, TARGET, "killed", progress=KillAfter(3, "trying settings"), **aim)
    tried: list[Any] = []
    options = Sample.options

    def noted(sample: Sample, *given: Any) -> Any:
        tried.append(sample)
        return options(sample, *given)

    monkeypatch.setattr(Sample, "options", noted)
    continued = run(four_blocks, TARGET, "killed", **aim)
    inputs_of_a_block = 4  # of q, k and v; o; gate and up; down
    assert len(tried) == inputs_of_a_block
    assert tensors_of(continued) == tensors_of(whole)
    for name in ("config.json", "curves.csv"):
        assert (continued / name).read_text() == (whole / name).read_text()


def test_every_stage_says_how_far_it_is(four_blocks: Path, run: Run) -> None:
    bar = Watched()
    config = replace(TARGET, token_weights=True)
    run(four_blocks, config, target_bits=4.6, tune_model=3, batch_size=2, progress=bar)
    assert bar.stages == [
        ["weighing tokens", 8, 8],
        ["trying settings", 4, 4],
        [COMPRESSING, 4, 4],
        ["running the dense model", 4, 4],
        ["tuning the model", 3, 3],
    ]


def test_another_target_does_not_continue(
    folder_of: FolderOf, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        run(folder_of("llama"), TARGET, progress=KillAfter(1), target_bits=4.8)
    run(folder_of("llama"), TARGET, target_bits=5.0, overwrite=True)
    assert "starting anew" in caplog.text


def test_what_was_tried_serves_another_target(
    four_blocks: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before a block is finished nothing depends on the bits to come to."""
    config = replace(TARGET, token_weights=True)
    whole = run(four_blocks, config, "whole", target_bits=4.6)
    with pytest.raises(ConfigError, match="reach"):
        run(four_blocks, config, "out", target_bits=15)
    monkeypatch.delattr("spqr_numba.model.compress.survey")
    monkeypatch.delattr("spqr_numba.model.compress.token_sensitivities")
    again = run(four_blocks, config, "out", target_bits=4.6)
    assert "going on with what was found out for other bits" in caplog.text
    assert tensors_of(again) == tensors_of(whole)
    assert (again / "config.json").read_text() == (whole / "config.json").read_text()


ALONE = {"per_layer": False}  # thresholds alone are chosen


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (TARGET, {"target_bits": 3.2, **ALONE}, r"reach 3\.\d\d bits and more .*per_layer"),
        (TARGET, {"target_bits": 1.9}, r"reach 2\.\d\d bits and more .*stats_group_size$"),
        (RTN, {"target_bits": 5}, "use_hessian=False has none"),
        (replace(PAPER, outlier_threshold=None), {"target_bits": 5, **ALONE}, "keeps no outliers"),
    ],
)
def test_targets_that_cannot_be(
    config: SpqrConfig, settings: dict[str, Any], message: str, folder_of: FolderOf, run: Run,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        run(folder_of("llama"), config, **settings)
    assert not list(tmp_path.iterdir())


def test_what_one_run_surveyed_serves_another(
    folder_of: FolderOf, run: Run, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, expected = (run(folder_of("llama"), TARGET, f"{b}", target_bits=b) for b in (4.8, 4.9))
    curves = read_curves((first / "curves.csv").read_text())
    monkeypatch.delattr("spqr_numba.model.compress.survey")
    source = open_source(str(folder_of("llama")))
    tokens = load_tokens(str(text_file), source.tokenizer())
    settings = {"dataset": tokens, **CALIBRATION, "target_bits": 4.9, "curves": curves}
    again = compress(source, first.with_name("again"), TARGET, **settings).out
    assert tensors_of(again) == tensors_of(expected)
    with pytest.raises(ConfigError, match="curves are not of the layers"):
        run(folder_of("opt"), TARGET, "other", target_bits=4.9, curves=curves)


def test_more_bits_than_outliers_are_worth(folder_of: FolderOf, run: Run) -> None:
    with pytest.raises(ConfigError, match=r"target_bits is 30, and .* reach 3\.\d\d to \d\d?\."):
        run(folder_of("llama"), TARGET, target_bits=30, **ALONE)


@pytest.mark.gpu
def test_on_a_gpu_a_target_is_met(folder_of: FolderOf, run: Run) -> None:
    outs = [run(folder_of("llama"), TARGET, name, device="cuda", target_bits=4.9) for name in "ab"]
    assert bits_of(outs[0]) == pytest.approx(4.9, rel=0.02)
    assert tensors_of(outs[0]) == tensors_of(outs[1])
