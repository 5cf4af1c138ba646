"""A tuned block is nearer to the dense one, is what is stored, and else is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spqr_numba.config import SpqrConfig
from spqr_numba.errors import ConfigError
from spqr_numba.kernels.dequantize import dequantize
from spqr_numba.model.activations import Activations
from spqr_numba.model.blocks import find_blocks, find_linears, find_norms, plan
from spqr_numba.model.calibration import sample_windows
from spqr_numba.model.compress import Compression, compress
from spqr_numba.model.integration import load_model
from spqr_numba.model.quantize_block import BlockQuantizer
from spqr_numba.model.report import Clock, TunedRow, read_rows
from spqr_numba.model.source import open_source
from spqr_numba.model.tuning import BlockTuner, TunedBlock, Tuning
from spqr_numba.quantize.solver import QuantizedWeight

from . import architectures
from .architectures import ARCHITECTURES
from .test_compress import KillAfter, Killed, dense_twin, logits, spqr_linears, tensors_of

PAPER = SpqrConfig(damping=0.1)
BALANCED = SpqrConfig(damping=0.1, fit="joint", group_size=8, stats_group_size=64)
CONFIGS = {
    "paper": PAPER,
    "balanced": BALANCED,
    "no outliers": replace(PAPER, outlier_threshold=None),
    "plain statistics": replace(PAPER, scale_bits=16, zero_bits=16),
    "identity": replace(PAPER, permutation="identity"),
    "gptq": SpqrConfig.gptq(3),
    "rtn": SpqrConfig.rtn(3),
    "round zero": replace(PAPER, round_zero=True, zero_bits=16),
}
WINDOWS, LENGTH, BATCH = 32, 24, 8
STEPS = 10


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    """As the block loop runs."""
    with torch.no_grad():
        yield


class Case:
    """The first block of a random model, quantized, and the tuner that knows its dense outputs."""

    def __init__(
        self,
        architecture: str = "llama",
        config: SpqrConfig = PAPER,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype = torch.float16,
        batch: int = BATCH,
        **tuning: Any,
    ) -> None:
        model = architectures.make(architecture, stored).to(dtype)
        model.requires_grad_(False)
        blocks = find_blocks(model)
        self.name, self.block, self.settings = (
            blocks.name(0),
            blocks.modules[0],
            plan(blocks, config),
        )
        random = torch.Generator().manual_seed(1)
        windows = torch.randint(0, 256, (WINDOWS, LENGTH), generator=random)
        self.activations = Activations.start(
            model, blocks.modules, windows, batch, dense=config.asymmetric
        )
        self.dense = self.activations.outputs(self.block, 0)
        self.norms = {
            name: model.get_parameter(name).to(stored)
            for name in find_norms(model, blocks)
            if name.startswith(self.name)
        }
        self.said: list[str] = []
        settings = Tuning(**{"steps": STEPS, "windows": WINDOWS} | tuning)
        self.tuner = BlockTuner(
            self.block, self.name, 0, self.activations, self.norms, settings, self.said.append
        )
        quantizer = BlockQuantizer(self.block, self.name, 0, self.settings, Clock())
        self.results = quantizer.quantize(self.activations, sequential=False)
        self.quantized = {name: p.clone() for name, p in self.block.named_parameters()}

    def tune(self) -> TunedBlock:
        return self.tuner.tune(self.results, self.settings)

    def error(self) -> float:
        """Of the block as it is, on the windows that are held back."""
        held_back = slice(self.tuner.tuning.trained, None)
        output = self.activations.outputs(self.block, 0)[held_back].float()
        target = self.dense[held_back].float()
        return ((output - target).square().sum(-1) / target.square().sum(-1)).mean().item()

    def weight(self, layer: str) -> torch.Tensor:
        return self.block.get_parameter(f"{layer.removeprefix(self.name + '.')}.weight")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_error_falls(config: SpqrConfig) -> None:
    case = Case(config=config)
    before = case.error()
    row = case.tune().row
    assert row.error_before == pytest.approx(before, rel=1e-4)
    assert row.error_after == pytest.approx(case.error(), rel=1e-4)
    assert row.error_after < 0.995 * row.error_before
    assert 0 < row.steps <= STEPS


@pytest.mark.parametrize("name", ["falcon", "gpt-neox", "gemma3", "phi3"])
def test_other_families(name: str) -> None:
    case = Case(name, steps=3)
    before = case.error()
    tuned = case.tune()
    assert tuned.row.error_after == pytest.approx(case.error(), rel=1e-4)
    assert case.error() < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_block_holds_what_is_stored(dtype: torch.dtype) -> None:
    """And masters are fp32: of steps this small, bf16 would lose every one."""
    case = Case("qwen2", dtype=dtype, stored=torch.bfloat16)
    tuned = case.tune()
    assert tuned.row.steps
    assert set(tuned.results) == set(case.results)
    for name, result in tuned.results.items():
        result.matrix.check_values()
        assert torch.equal(result.weight, dequantize(result.matrix))
        assert torch.equal(case.weight(name), result.weight.to(dtype))
        assert changed(case.results[name], result) == {
            "scale_scale", "scale_zero", "zero_scale", "zero_zero", "outlier_values",
        }  # fmt: skip
    assert len(tuned.norms) == 2
    for name, norm in tuned.norms.items():
        assert norm.dtype == torch.bfloat16
        assert norm.device.type == "cpu"
        assert torch.equal(
            case.block.get_parameter(name.removeprefix(f"{case.name}.")), norm.to(dtype)
        )


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Behind each try of a step, by what its gradients in fp16 are scaled next."""
    found: list[float] = []
    update = torch.amp.GradScaler.update

    def noted(scaler: torch.amp.GradScaler) -> None:
        update(scaler)
        found.append(scaler.get_scale())

    monkeypatch.setattr(torch.amp.GradScaler, "update", noted)
    return found


def test_gradients_beyond_fp16_cost_no_step(scales: list[float]) -> None:
    """The batch comes again at half the scale: three steps without effect would be the end."""
    row = (case := Case(dtype=torch.float16, batch=1)).tune().row
    assert scales[:3] == [2.0**15, 2.0**14, 2.0**13]
    taken = [scale == before for before, scale in pairwise(scales)]
    assert sum(taken) == len(case.said)
    assert row.error_after < row.error_before


def test_gradients_beyond_any_scale_end_it(
    scales: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(dtype=torch.float16)
    errors = case.tuner.errors

    def steep(*arguments: Any) -> Iterator[torch.Tensor]:
        for error in errors(*arguments):
            if error.requires_grad:
                error.register_hook(lambda gradient: gradient * float("inf"))
            yield error

    monkeypatch.setattr(case.tuner, "errors", steep)
    assert case.tune().row.steps == 0
    assert len(case.said) == 3
    assert scales[16:] == [0.5, 0.25, 0.125]


def changed(before: QuantizedWeight, after: QuantizedWeight) -> set[str]:
    """The buffers that tuning has changed."""
    names = before.matrix.tensors
    return {name for name in names if not torch.equal(before.matrix[name], after.matrix[name])}


def test_biases_stay() -> None:
    case = Case("opt")
    case.tune()
    for name, parameter in case.block.named_parameters():
        assert torch.equal(parameter, case.quantized[name]) == name.endswith("bias"), name


def test_rounded_zeros_stay() -> None:
    tuned = (case := Case(config=CONFIGS["round zero"])).tune()
    for name, result in tuned.results.items():
        assert "zeros" not in changed(case.results[name], result)
        assert "scale_scale" in changed(case.results[name], result)


def test_what_does_not_help_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(learning_rate=100.0)
    with caplog.at_level("INFO", "spqr_numba"):
        tuned = case.tune()
    assert tuned.row.steps == 0
    assert tuned.row.error_after == tuned.row.error_before == pytest.approx(case.error(), rel=1e-4)
    assert tuned.results == case.results
    assert tuned.norms == {}
    for name, parameter in case.block.named_parameters():
        assert torch.equal(parameter, case.quantized[name]), name
    assert "left as it was" in caplog.text


def test_the_target_is_the_dense_models_where_that_is_carried_along() -> None:
    """The states that the quantizer advances, not what the block makes of the compressed ones."""
    case = Case(config=replace(PAPER, asymmetric=True))
    assert case.tuner.targets is case.activations.dense
    assert torch.equal(case.tuner.targets, case.dense)
    row = case.tune().row
    assert row.error_after == pytest.approx(case.error(), rel=1e-4)
    assert row.error_after < row.error_before


def test_what_cannot_be_better_is_left() -> None:
    case = Case()
    case.tuner.targets = case.activations.outputs(case.block, 0)
    tuned = case.tune()
    assert (tuned.row.steps, tuned.row.error_before) == (0, 0.0)


def test_it_says_how_far_it_has_come() -> None:
    case = Case()
    case.tune()
    assert len(case.said) == 10
    assert case.said[0].startswith("model.layers.0, tuning step 1 of 10, ")
    assert case.said[-1].endswith("% of the error left")


def test_the_seed_is_of_the_order_of_windows() -> None:
    first, second, other = (Case(seed=seed).tune() for seed in (0, 0, 1))
    for name, result in first.results.items():
        assert not changed(result, second.results[name])
        assert changed(result, other.results[name])


def test_every_window_is_trained_on_before_any_comes_again() -> None:
    tuning = Tuning(steps=6, windows=16)
    assert tuning.trained == 14
    batches = list(tuning.batches(4, part=0))
    assert [len(batch) for batch in batches] == [4] * 6
    windows = list(chain(*batches))
    assert sorted(windows[:14]) == list(range(14))
    assert len(set(windows[14:])) == 10
    assert batches != list(tuning.batches(4, part=1))


def test_no_batch_is_larger_than_the_training_set() -> None:
    for batch in Tuning(steps=5, windows=8).batches(8, part=0):
        assert sorted(batch) == list(range(7))


@pytest.mark.parametrize(("windows", "trained"), [(2, 1), (7, 6), (128, 112), (1000, 984)])
def test_some_windows_are_held_back(windows: int, trained: int) -> None:
    assert Tuning(1, windows).trained == trained
    assert Tuning(1, windows).held_back == windows - trained


@pytest.mark.parametrize(
    ("steps", "windows", "message"),
    [(-1, 8, "takes -1 steps"), (5, 1, "nsamples is 1; tuning trains")],
)
def test_settings_that_cannot_be(steps: int, windows: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tuning(steps, windows)


def test_norms_that_share_their_weight_are_left_out() -> None:
    model = architectures.make("llama")
    blocks = find_blocks(model)
    assert len(find_norms(model, blocks)) == 4
    first, second = blocks.modules
    second.input_layernorm = first.input_layernorm
    second.post_attention_layernorm.weight = model.model.norm.weight
    assert find_norms(model, blocks) == ["model.layers.0.post_attention_layernorm.weight"]


def test_linears_are_no_norms() -> None:
    for name in ARCHITECTURES:
        model = architectures.make(name)
        blocks = find_blocks(model)
        norms = {norm.rpartition(".")[0] for norm in find_norms(model, blocks)}
        assert norms, name
        assert not any(type(model.get_submodule(norm)) is nn.Linear for norm in norms)
        assert not norms & {
            f"{blocks.name(i)}.{n}" for i, b in enumerate(blocks.modules) for n in find_linears(b)
        }


# --- Through whole models

Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> Run:
    """run(folder, name="out", config=PAPER, ...) -> the compressed, tuned folder."""

    def call(folder: Path, name: str = "out", config: SpqrConfig = PAPER, **settings: Any) -> Path:
        arguments = {"nsamples": 9, "seqlen": 24, "batch_size": 2, "tune": 10} | settings
        out = tmp_path / name
        return compress(str(folder), out, config, dataset=str(text_file), **arguments).out

    return call


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_a_tuned_checkpoint_loads_as_it_was_tuned(
    name: str, folder_of: Callable[[str], Path], run: Run
) -> None:
    out = run(folder_of(name))
    model, _ = load_model(str(out))
    twin = dense_twin(model, folder_of(name))
    blocks = find_blocks(twin)
    norms = find_norms(twin, blocks)
    for norm in norms:
        assert not torch.equal(twin.get_parameter(norm), model.get_parameter(norm))
        twin.get_parameter(norm).data.copy_(model.get_parameter(norm))
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    rows = read_rows((out / "tuning.csv").read_text(), TunedRow)
    assert [row.block for row in rows] == [blocks.name(0), blocks.name(1)]
    assert all(0 < row.error_after < row.error_before for row in rows)


def test_what_is_held_back_is_text_that_no_other_window_has(
    folder_of: Callable[[str], Path],
) -> None:
    """A window of it that is in the training too would call any overfitting better."""
    source, tokens = open_source(str(folder_of("llama"))), torch.arange(250)
    job = Compression(source, PAPER, torch.device("cpu"), Clock("cpu"), tuning := Tuning(1, 16))
    job.calibrate_on([tokens], 16, 24, seed=0, batch_size=None)
    assert job.windows is not None
    trained, held_back = job.windows[: tuning.trained], job.windows[tuning.trained :]
    assert len(held_back) == 2
    assert not set(trained.flatten().tolist()) & set(held_back.flatten().tolist())


def test_without_tuning_windows_are_as_ever(folder_of: Callable[[str], Path], run: Run) -> None:
    source, tokens = open_source(str(folder_of("llama"))), torch.arange(250)
    job = Compression(source, PAPER, torch.device("cpu"), Clock("cpu"))
    job.calibrate_on([tokens], 16, 24, seed=3, batch_size=None)
    assert job.windows is not None
    assert torch.equal(job.windows, sample_windows([tokens], 16, 24, seed=3))
    assert not (run(folder_of("llama"), tune=0) / "tuning.csv").exists()


def test_how_long_it_is_tuned_changes_no_code(folder_of: Callable[[str], Path], run: Run) -> None:
    outs = run(folder_of("llama"), "short", tune=1), run(folder_of("llama"), "long")
    codes = [
        {name: layer.codes for name, layer in spqr_linears(load_model(str(out))[0]).items()}
        for out in outs
    ]
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(codes[0][first], codes[1][first])


def test_rounding_to_nearest_reads_text_to_be_tuned(
    folder_of: Callable[[str], Path], run: Run
) -> None:
    out = run(folder_of("llama"), config=SpqrConfig.rtn(3, 16))
    rows = read_rows((out / "tuning.csv").read_text(), TunedRow)
    assert all(row.error_after < row.error_before for row in rows)


def test_killed_and_continued_is_uninterrupted(tmp_path: Path, run: Run) -> None:
    model = architectures.make("gemma3", num_hidden_layers=4, layer_types=None)
    folder = architectures.save(model, tmp_path / "four")
    whole = run(folder, "whole")
    for blocks in (1, 2):
        with pytest.raises(Killed):
            run(folder, "killed", progress=KillAfter(blocks))
    continued = run(folder, "killed")
    assert tensors_of(continued) == tensors_of(whole)
    tables = [read_rows((out / "tuning.csv").read_text(), TunedRow) for out in (whole, continued)]
    assert len(tables[0]) == 4
    assert [replace(row, seconds=0) for row in tables[0]] == [
        replace(row, seconds=0) for row in tables[1]
    ]


def test_other_steps_do_not_continue(
    folder_of: Callable[[str], Path], run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        run(folder_of("llama"), progress=KillAfter(1))
    run(folder_of("llama"), tune=5, overwrite=True)
    assert "starting anew" in caplog.text


@pytest.mark.gpu
def test_on_a_gpu(folder_of: Callable[[str], Path], run: Run) -> None:
    """The same bytes from run to run, wherever hidden states are."""
    on_gpu = run(folder_of("llama"), "gpu", device="cuda")
    off_loaded = run(folder_of("llama"), "off", device="cuda", offload_activations=True)
    assert tensors_of(on_gpu) == tensors_of(off_loaded)
    rows = read_rows((on_gpu / "tuning.csv").read_text(), TunedRow)
    assert all(row.error_after < row.error_before for row in rows)
