"""Running the blocks one by one must be running the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from spqr_numba.errors import ModelError
from spqr_numba.model.activations import Activations, logits, record_calls
from spqr_numba.model.blocks import find_blocks

from . import architectures
from .architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def windows_of(count: int, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_is_the_model(name: str) -> None:
    model = architectures.make(name, torch.float32)
    windows = windows_of(5)
    seen: list[torch.Tensor] = []
    blocks = find_blocks(model)
    with blocks.modules[-1].register_forward_hook(lambda *args: seen.append(args[-1])):
        model(input_ids=windows, use_cache=False)
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    activations = Activations.start(model, blocks.modules, windows, batch_size=2)
    for index, block in enumerate(blocks.modules):
        activations.advance(block, index)
    torch.testing.assert_close(activations.states, expected, rtol=1e-5, atol=1e-5)
    made = logits(model, blocks.modules, windows, activations.states)
    torch.testing.assert_close(made, model(windows).logits, rtol=1e-5, atol=1e-5)


def test_states_of_an_earlier_run_are_taken_up() -> None:
    model = architectures.make("llama", torch.float32)
    blocks = find_blocks(model).modules
    first = Activations.start(model, blocks, windows_of(3), batch_size=2)
    first.advance(blocks[0], 0)
    second = Activations.start(model, blocks, windows_of(3), 2, states=first.states.clone())
    first.advance(blocks[1], 1)
    second.advance(blocks[1], 1)
    assert torch.equal(first.states, second.states)


def test_the_blocks_are_left_as_they_were() -> None:
    model = architectures.make("llama", torch.float32)
    windows = windows_of(2)
    before = model(windows).logits
    Activations.start(model, find_blocks(model).modules, windows, batch_size=1)
    assert torch.equal(model(windows).logits, before)


class BetweenBlocks(LlamaForCausalLM):
    """Does something between its blocks that nobody knows of."""

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def test_hidden_states_that_change_between_blocks_are_an_error() -> None:
    model = BetweenBlocks(architectures.make("llama").config).eval()
    with pytest.raises(ModelError, match="BetweenBlocks does not pass hidden states straight"):
        record_calls(model, find_blocks(model).modules, windows_of(1))


class TokenMask(nn.Module):
    """Hands the tokens themselves to every block."""

    all_tied_weights_keys: dict = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 8)
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask=(input_ids, use_cache))
        return hidden


def test_arguments_that_depend_on_the_tokens_are_an_error() -> None:
    model = TokenMask()
    with pytest.raises(ModelError, match=r"depends on the tokens \(mask\)"):
        Activations.start(model, list(model.layers), windows_of(2), batch_size=2)
