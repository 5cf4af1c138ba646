"""A model tuned whole predicts more like the dense one; what was tuned is what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from spqr_numba.config import SpqrConfig
from spqr_numba.errors import ConfigError
from spqr_numba.model import model_tuning as module
from spqr_numba.model.blocks import find_blocks, find_norms, outer_norms
from spqr_numba.model.calibration import load_tokens, sample_windows_apart
from spqr_numba.model.checkpoint import CheckpointWriter
from spqr_numba.model.compress import compress
from spqr_numba.model.integration import load_model
from spqr_numba.model.model_tuning import model_tuning
from spqr_numba.model.report import CompressionReport, TunedRow, read_rows
from spqr_numba.model.source import open_source
from spqr_numba.model.training import Best

from . import architectures
from .test_compress import Killed, tensors_of

PAPER = SpqrConfig(damping=0.1)
CONFIGS = {
    "balanced": replace(PAPER, fit="joint", group_size=8, stats_group_size=64),
    "plain statistics": replace(PAPER, scale_bits=16, zero_bits=16),
    "rtn": SpqrConfig.rtn(3),
    "one left dense": replace(PAPER, skip=("down_proj",)),
}
TRAINED = {
    "scale_scale",
    "scale_zero",
    "zero_scale",
    "zero_zero",
    "scales",
    "zeros",
    "outlier_values",
}
STEPS, LENGTH, BATCH = 20, 24, 2

FolderOf = Callable[[str], Path]
Run = Callable[..., CompressionReport]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """Random models with opinions: those of smaller weights predict nothing in particular."""
    root = tmp_path_factory.mktemp("opinions")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            architectures.save(architectures.make(name, initializer_range=0.2), root / name)
        return root / name

    return folder


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> Run:
    """run(folder, name="out", config=PAPER, ...) -> how it went, into the folder `name`."""

    def call(
        folder: Path, name: str = "out", config: SpqrConfig = PAPER, **settings: Any
    ) -> CompressionReport:
        arguments = {"nsamples": 9, "seqlen": LENGTH, "batch_size": BATCH, "tune_model": STEPS}
        arguments |= settings
        return compress(str(folder), tmp_path / name, config, dataset=str(text_file), **arguments)

    return call


@torch.no_grad()
def divergence(folder: Path, dense_folder: Path, text_file: Path, steps: int = STEPS) -> float:
    """Nats a token on the windows that are held back, of two loaded models."""
    (model, tokenizer), (dense, _) = load_model(str(folder)), load_model(str(dense_folder))
    tokens = load_tokens(str(text_file), tokenizer)
    text = len(tokens) // LENGTH
    tuning = model_tuning(steps, BATCH, 0, codes=False, text=text, length=LENGTH)
    windows = sample_windows_apart([tokens], tuning.trained, tuning.held_back, LENGTH, seed=0)
    held_back = windows[tuning.trained :]
    predicted, target = (m(held_back).logits.log_softmax(-1) for m in (model, dense))
    return F.kl_div(predicted, target, reduction="sum", log_target=True).item() / held_back.numel()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the shards of a folder."""
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def changed(one: Path, other: Path) -> set[str]:
    """Names of the tensors that differ."""
    tensors = stored(other)
    assert tensors.keys() == stored(one).keys()
    return {name for name, tensor in stored(one).items() if not torch.equal(tensor, tensors[name])}


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "falcon", "gpt-neox", "phi3"])
def test_what_was_measured_is_what_is_stored(
    name: str, folder_of: FolderOf, run: Run, text_file: Path
) -> None:
    folder = folder_of(name)
    report, plain = run(folder), run(folder, "plain", tune_model=0)
    assert report.model is not None
    assert report.model.steps
    before, after = (divergence(out.out, folder, text_file) for out in (plain, report))
    assert report.model.error_before == pytest.approx(before, rel=1e-3)
    assert report.model.error_after == pytest.approx(after, rel=1e-3)
    assert after < 0.99 * before


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_codes_stay_and_the_rest_is_trained(
    config: SpqrConfig, folder_of: FolderOf, run: Run
) -> None:
    report = run(folder_of("llama"), config=config)
    plain = run(folder_of("llama"), "plain", config, tune_model=0)
    moved = changed(plain.out, report.out)
    model, _ = load_model(str(folder_of("llama")))
    blocks = find_blocks(model)
    norms = {*find_norms(model, blocks), *outer_norms(model, blocks)}
    assert "model.norm.weight" in norms
    assert moved & norms == norms
    assert kinds(moved - norms) <= TRAINED
    assert any(name.startswith("model.layers.0.mlp.up_proj.") for name in moved)
    assert report.bits == plain.bits


def test_codes_are_trained_too_where_that_is_wanted(
    folder_of: FolderOf, run: Run, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEARNING_RATE", 2e-3)  # so few steps move no code at a lower one
    folder, config = folder_of("llama"), CONFIGS["rtn"]
    report = run(folder, config=config, tune_codes=True)
    assert report.model is not None
    assert divergence(report.out, folder, text_file) < report.model.error_before
    assert "codes" in kinds(changed(run(folder, "plain", config, tune_model=0).out, report.out))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_codes_that_were_measured_are_what_is_stored(
    config: SpqrConfig,
    folder_of: FolderOf,
    run: Run,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step_at_random(task: module.ModelTask, *_: Any) -> Best:
        best = Best(task.trained(), task.measure())
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in task.trained():
                parameter += 0.02 * torch.randn(parameter.shape, generator=random)
        best.steps, best.after = 1, task.measure()
        return best

    monkeypatch.setattr(module, "train", step_at_random)
    folder = folder_of("llama")
    report = run(folder, config=config, tune_codes=True)
    plain = run(folder, "plain", config, tune_model=0)
    assert report.model is not None
    assert report.model.error_after == pytest.approx(
        divergence(report.out, folder, text_file), rel=1e-3
    )
    moved = kinds(changed(plain.out, report.out))
    assert moved <= {*TRAINED, "codes", "weight"}
    assert "codes" in moved
    assert report.bits == plain.bits


def kinds(names: set[str]) -> set[str]:
    """What buffers of a weight, or parameters, they are."""
    return {name.rpartition(".")[2] for name in names}


def test_codes_alone_are_not_trained(folder_of: FolderOf, run: Run) -> None:
    with pytest.raises(ConfigError, match="give tune_model"):
        run(folder_of("llama"), tune_model=0, tune_codes=True)


def test_steps_that_do_not_help_leave_all_as_it_was(
    folder_of: FolderOf, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEARNING_RATE", 100.0)
    report, plain = run(folder_of("llama")), run(folder_of("llama"), "plain", tune_model=0)
    assert report.model is not None
    assert (report.model.steps, report.model.error_after) == (0, report.model.error_before)
    assert not changed(plain.out, report.out)


def test_it_follows_the_tuning_of_blocks(folder_of: FolderOf, run: Run, text_file: Path) -> None:
    folder = folder_of("llama")
    blocks, both = (run(folder, name, tune=4, tune_model=steps) for name, steps in BOTH.items())
    assert both.model is not None
    before = divergence(blocks.out, folder, text_file)
    assert both.model.error_before == pytest.approx(before, rel=1e-3)
    assert [replace(row, seconds=0) for row in both.tuned] == [
        replace(row, seconds=0) for row in blocks.tuned
    ]


BOTH = {"blocks": 0, "both": STEPS}


def test_few_positions_at_a_time_are_all_of_them(
    folder_of: FolderOf, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder_of("llama"), "whole").model
    monkeypatch.setattr(module, "POSITIONS", 7)
    parts = run(folder_of("llama"), "parts").model
    assert whole is not None
    assert parts is not None
    assert parts.error_before == pytest.approx(whole.error_before, rel=1e-5)
    assert parts.error_after == pytest.approx(whole.error_after, rel=1e-2)


@pytest.mark.parametrize("call", range(4))
def test_killed_and_continued_is_uninterrupted(
    call: int, folder_of: FolderOf, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it trains, and in front of each file that it writes behind that."""
    folder = folder_of("llama")
    whole = run(folder, "whole")
    calls = [(module.ModelTask, "backward")] + 2 * [(CheckpointWriter, "amend_block")]
    owner, name = (*calls, (CheckpointWriter, "write_rest"))[call]
    left = [call == 2]  # amend the first block, and be killed in front of the second

    original = getattr(owner, name)

    def killed(*arguments: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] = False
        original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(Killed):
            run(folder, "killed")
    assert not (tmp_path / "killed").exists()
    continued = run(folder, "killed")
    assert tensors_of(continued.out) == tensors_of(whole.out)
    assert continued.model is not None
    assert whole.model is not None
    assert continued.model.error_after == whole.model.error_after
    assert not list(tmp_path.glob("**/kept-*"))


def test_other_steps_do_not_continue(
    folder_of: FolderOf, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "write_rest", killed)
        with pytest.raises(Killed):
            run(folder_of("llama"))
    run(folder_of("llama"), tune_model=2, overwrite=True)
    assert "starting anew" in caplog.text


def test_it_is_told_in_a_file(folder_of: FolderOf, run: Run) -> None:
    report = run(folder_of("llama"))
    rows = read_rows((report.out / "model_tuning.csv").read_text(), TunedRow)
    assert rows == [report.model]
    assert report.to_dict()["model"]["block"] == "model"
    assert report.seconds["tune"] > 0


def test_every_step_has_windows_of_its_own_as_far_as_there_is_text() -> None:
    assert windows_for(10, 8, text=1000, length=512) == 96
    assert windows_for(10, 8, text=30, length=512) == 60
    assert windows_for(10**6, 8, text=10**6, length=512) == 1024
    assert windows_for(1, 1, text=0, length=2**20) == 2


def windows_for(steps: int, batch_size: int, **text: int) -> int:
    return model_tuning(steps, batch_size, 0, codes=False, **text).windows


def test_steps_below_none_are_refused(folder_of: FolderOf, run: Run) -> None:
    with pytest.raises(ConfigError, match="takes -1 steps"):
        run(folder_of("llama"), tune_model=-1)


def test_a_model_too_large_to_be_kept_decoded_runs_each_block_again(
    folder_of: FolderOf, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(folder_of("llama"), "kept")
    monkeypatch.setattr(module, "KEPT_WEIGHTS", 0)
    again = run(folder_of("llama"), "again")
    assert kept.model is not None
    assert again.model is not None
    assert again.model.error_after == pytest.approx(kept.model.error_after, rel=1e-3)
    assert again.model.steps


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [False, True], ids=["codes stay", "codes too"])
def test_on_a_gpu(codes: bool, folder_of: FolderOf, run: Run) -> None:
    """The same bytes from run to run, wherever the dense model's states are."""
    on_gpu, off_loaded = (
        run(folder_of("llama"), str(off), device="cuda", tune_codes=codes, offload_activations=off)
        for off in (False, True)
    )
    assert on_gpu.model is not None
    assert on_gpu.model.error_after < on_gpu.model.error_before
    assert tensors_of(on_gpu.out) == tensors_of(off_loaded.out)


def test_the_dense_source_is_not_touched(folder_of: FolderOf, run: Run) -> None:
    before = open_source(str(folder_of("llama"))).fingerprint
    run(folder_of("llama"))
    assert open_source(str(folder_of("llama"))).fingerprint == before


def test_bf16_models(tmp_path: Path, run: Run) -> None:
    folder = architectures.save(architectures.make("llama", torch.bfloat16), tmp_path / "bf16")
    report = run(folder)
    assert report.model is not None
    assert report.model.steps
    assert stored(report.out)["model.norm.weight"].dtype == torch.bfloat16
