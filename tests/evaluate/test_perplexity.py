"""Perplexity against hand-worked models."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spqr_numba.errors import DataError, InputError, NumericsError
from spqr_numba.evaluate.perplexity import perplexity, perplexity_beside

from ..tiny import tiny_llama

VOCABULARY = 8


class Bigram:
    """Gives the token after the last one `probability`, and the rest of it evenly to the others."""

    device = torch.device("cpu")

    def __init__(self, probability: float) -> None:
        rest = (1 - probability) / (VOCABULARY - 1)
        table = torch.full((VOCABULARY, VOCABULARY), rest)
        table[torch.arange(VOCABULARY), (torch.arange(VOCABULARY) + 1) % VOCABULARY] = probability
        self.logits = table.log()

    def __call__(self, tokens: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits[tokens])


def counting(windows: int, length: int) -> torch.Tensor:
    return (torch.arange(length) % VOCABULARY).repeat(windows, 1)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = Bigram(1 / VOCABULARY)
    assert perplexity(model, counting(3, 5)) == pytest.approx(VOCABULARY, rel=1e-6)


def test_mean_over_predicted_tokens_by_hand() -> None:
    # Three transitions, of which the last goes back to 0 and costs the small probability.
    model = Bigram(0.5)
    expected = math.exp((2 * -math.log(0.5) - math.log(0.5 / 7)) / 3)
    assert perplexity(model, torch.tensor([[0, 1, 2, 0]])) == pytest.approx(expected, rel=1e-6)


def test_nats_beside_another_model_by_hand() -> None:
    """Both predict the next number: 0.5 ln(0.5 / 0.8) + 0.5 ln((0.5 / 7) / (0.2 / 7))."""
    model, dense = Bigram(0.8), Bigram(0.5)
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    found = perplexity_beside(model, dense, counting(3, 600))
    assert found == (perplexity(model, counting(3, 600)), pytest.approx(expected, rel=1e-5))
    assert perplexity_beside(model, model, counting(2, 5))[1] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("length", [2, 300, 1500])
def test_batches_and_slices_do_not_show(length: int) -> None:
    """Windows shorter and longer than a batch and than a slice of the loss."""
    torch.manual_seed(0)
    windows = torch.randint(VOCABULARY, (5, length))
    model = Bigram(0.3)
    nll = -model.logits[windows[:, :-1].flatten(), windows[:, 1:].flatten()].double().mean()
    assert perplexity(model, windows) == pytest.approx(math.exp(nll), rel=1e-5)


def test_agrees_with_the_loss_of_transformers() -> None:
    model = tiny_llama()
    windows = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert perplexity(model, windows) == pytest.approx(math.exp(loss), rel=1e-5)


def test_progress_adds_up_to_all_windows() -> None:
    steps: list[int] = []
    perplexity(Bigram(0.5), counting(7, 400), progress=steps.append)
    assert sum(steps) == 7
    assert len(steps) > 1


def test_no_window_is_an_error() -> None:
    with pytest.raises(DataError, match="no window to evaluate"):
        perplexity(Bigram(0.5), torch.empty(0, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    "windows",
    [torch.zeros(8, dtype=torch.int64), torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.int64)],
    ids=["one dimension", "floats", "nothing to predict"],
)
def test_wrong_windows_are_an_error(windows: torch.Tensor) -> None:
    with pytest.raises(InputError, match="windows are"):
        perplexity(Bigram(0.5), windows)


def test_nan_is_named_by_window() -> None:
    model = Bigram(0.5)
    model.logits[7] = math.nan
    windows = torch.cat([counting(4, 400)[:, :7].repeat(1, 60), counting(1, 420)])
    with pytest.raises(NumericsError, match="windows 4 to 4 is nan"):
        perplexity(model, windows)
