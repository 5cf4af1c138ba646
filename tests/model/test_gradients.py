"""What the loss feels of each linear, block by block and without most of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from spqr_numba.config import SpqrConfig
from spqr_numba.errors import ModelError, NumericsError
from spqr_numba.model import gradients
from spqr_numba.model.blocks import plan
from spqr_numba.model.gradients import (
    TokenWeights,
    mean_sensitivities,
    sensitivities,
    token_sensitivities,
)
from spqr_numba.model.integration import load_model
from spqr_numba.model.progress import Silent
from spqr_numba.model.skeleton import Parts

from .architectures import ARCHITECTURES, make, parts_of, save

WINDOWS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))


def by_autograd(folder: Path, names: list[str]) -> dict[str, float]:
    """The same from the whole model, every window by itself."""
    model: Any = load_model(str(folder))[0].float()
    outputs: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.__setitem__(name, output)
        )
    model.requires_grad_(True)
    squares = dict.fromkeys(names, 0.0)
    for window in WINDOWS.split(1):
        made = model(window).logits[0, :-1]
        loss = F.cross_entropy(made, window[0, 1:], reduction="sum")
        for name, gradient in zip(
            names, torch.autograd.grad(loss, [outputs[name] for name in names]), strict=True
        ):
            squares[name] += gradient.square().mean().item() / len(WINDOWS)
    return squares


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_at_a_time_is_the_whole_model(name: str, folder_of: Callable[[str], Path]) -> None:
    parts = parts_of(folder_of(name))
    names = list(plan(parts.blocks, SpqrConfig()))
    with torch.no_grad():
        felt = sensitivities(parts, names, WINDOWS, Silent())
    expected = by_autograd(folder_of(name), names)
    assert list(felt) == names
    for linear in names:
        assert felt[linear] == pytest.approx(expected[linear], rel=1e-3), linear
    assert all(parameter.is_meta for parameter in parts.model.parameters())


def test_a_gradient_without_end_is_named(folder_of: Callable[[str], Path]) -> None:
    parts = parts_of(folder_of("llama"))
    real = parts._weights.read

    def huge(name: str) -> torch.Tensor:
        scale = 1e30 if name.endswith("layers.1.post_attention_layernorm.weight") else 1.0
        return real(name).float() * scale

    parts._weights.read = huge  # type: ignore[method-assign]
    names = list(plan(parts.blocks, SpqrConfig()))
    with torch.no_grad(), pytest.raises(NumericsError, match=r"no finite gradient at model\.l"):
        sensitivities(parts, names, WINDOWS, Silent())


def test_what_no_token_reaches_is_an_average_linear(folder_of: Callable[[str], Path]) -> None:
    parts = parts_of(folder_of("llama"))
    names = list(plan(parts.blocks, SpqrConfig()))
    with torch.no_grad():
        squares = token_sensitivities(parts, names, WINDOWS, 1, Silent())
    expert = names[3]
    squares[expert].zero_()
    felt = mean_sensitivities(parts.model, squares)
    assert felt.pop(expert) == pytest.approx(sum(felt.values()) / len(felt))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_are_told_apart_however_many_run_at_once(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(folder_of(name))
    names = list(plan(parts.blocks, SpqrConfig()))
    with torch.no_grad():
        alone = token_sensitivities(parts, names, WINDOWS, 1, Silent())
        together = token_sensitivities(parts, names, WINDOWS, 2, Silent())
        monkeypatch.setattr(gradients, "KEPT_BYTES", 1)
        monkeypatch.setattr(gradients, "KEPT_SHARE", 0)
        apart = token_sensitivities(parts, names, WINDOWS, 1, Silent())
        felt = sensitivities(parts, names, WINDOWS, Silent())
    for linear in names:
        assert alone[linear].shape == WINDOWS.shape
        outputs = parts.model.get_submodule(linear).out_features
        assert alone[linear].mean().item() / outputs == pytest.approx(felt[linear], rel=1e-5)
        torch.testing.assert_close(together[linear], alone[linear], rtol=1e-3, atol=0)
        assert torch.equal(apart[linear], alone[linear])
    assert (alone[names[0]][:, -1] == 0).all()  # the last token predicts nothing


def test_what_blocks_get_may_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks, of which the first, the third and the last keep it."""
    save(make("llama", num_hidden_layers=5), tmp_path)
    parts = parts_of(tmp_path)
    names = list(plan(parts.blocks, SpqrConfig()))
    walks = Walks(parts)
    with torch.no_grad():
        kept = token_sensitivities(parts, names, WINDOWS, 2, Silent())
        assert walks.read == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
        walks.read.clear()
        monkeypatch.setattr(gradients, "_portions", lambda *_: (4, 2))
        again = token_sensitivities(parts, names, WINDOWS, 2, Silent())
    assert walks.read == [0, 1, 2, 3, 4, 4, 2, 3, 2, 0, 1, 0]
    assert all(torch.equal(again[name], kept[name]) for name in names)


class Walks:
    """Notes which blocks of `parts` are loaded."""

    def __init__(self, parts: Parts) -> None:
        self.read: list[int] = []
        block = parts.block

        def noted(index: int) -> Any:
            self.read.append(index)
            return block(index)

        parts.block = noted  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("blocks", "width", "weights", "portions"),
    [
        (30, 576, 135e6, (480, 1)),  # SmolLM2: all 128 windows, at 18 MB each
        (32, 4096, 6.7e9, (46, 6)),  # three portions of 8 GiB, in place of eight that keep all
        (80, 8192, 69e9, (60, 9)),  # three of 34 GB, in place of eleven
    ],
)
def test_portions_are_those_of_the_fewest_walks(
    blocks: int, width: int, weights: float, portions: tuple[int, int]
) -> None:
    model = Namespace(
        config=Namespace(get_text_config=lambda: Namespace(hidden_size=width)),
        parameters=lambda: [Namespace(numel=lambda: int(weights))],
    )
    parts: Any = Namespace(model=model, blocks=range(blocks), dtype=torch.float16)
    length = 512 if width == 576 else 2048
    windows = torch.zeros(1, 1).expand(128, length)
    assert gradients._portions(parts, windows, 4096 // length) == portions


def test_a_smaller_scale_serves_where_fp16_ends(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(folder_of("llama"))
    names = list(plan(parts.blocks, SpqrConfig()))
    with torch.no_grad():
        expected = token_sensitivities(parts, names, WINDOWS, 1, Silent())
        monkeypatch.setattr(gradients, "LOSS_SCALES", (1e30, 1.0))
        found = token_sensitivities(parts, names, WINDOWS, 1, Silent())
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=0)


def test_a_block_without_gradient_is_named(folder_of: Callable[[str], Path]) -> None:
    parts = parts_of(folder_of("llama"))
    parts.blocks.modules[1].register_forward_pre_hook(
        lambda _, args: tuple(arg.detach() if arg.requires_grad else arg for arg in args)
    )
    message = r"decoder block 1 cannot be run backward \(.*\); compress without token weights"
    with torch.no_grad(), pytest.raises(ModelError, match=message):
        sensitivities(parts, list(plan(parts.blocks, SpqrConfig())), WINDOWS, Silent())


def test_weights_are_one_on_average(device: torch.device) -> None:
    squares = {
        "a": torch.tensor([[10.0, 20.0], [10.0, 0.0]]),
        "b": torch.tensor([[1.0, 0, 1, 0]]).view(2, 2),
    }
    weights = TokenWeights(squares, device)
    both = torch.tensor([[1.5, 1], [1.5, 1e-4]], device=device)
    assert torch.equal(weights.of(["a", "b"], slice(2)), both)
    assert torch.equal(weights.of(["b"], slice(1, 2)), both.new_tensor([[2.0, 1e-4]]))
    unfelt = TokenWeights({"a": torch.zeros(2, 3)}, device)
    assert torch.equal(unfelt.of(["a"], slice(2)), both.new_ones(2, 3))
