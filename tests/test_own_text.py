"""Text that a model writes of itself: drawn as it predicts, whole, and the same for a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from spqr_numba import own_text as room
from spqr_numba.errors import ConfigError, DataError, NumericsError
from spqr_numba.own_text import own_text

from .tiny import byte_tokenizer, tiny_llama

END = 256


def begins_with_end() -> Any:
    """A tokenizer that puts its end token before any text, as those with a start token do."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", END)]
    )
    return tokenizer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_windows_are_drawn_as_the_model_predicts(device: str) -> None:
    model = tiny_llama(initializer_range=0.2).to(device)  # some tokens are likelier than others
    told: list[int] = []
    windows = own_text(model, byte_tokenizer(), 300, 24, batch_size=100, progress=told.append)
    assert (windows.shape, windows.dtype) == ((300, 24), torch.int64)
    assert sum(told) == windows.numel()
    first, rest = windows[:, 0], windows[:, 1:]
    assert first.max() < END  # no special token
    assert len(first.unique()) > 150  # of 256: 300 draws leave some out
    assert (rest[:, :-1] == END).any()  # it writes on behind the end of a text
    with torch.inference_mode():
        logits = model(windows.to(device)).logits[:, :-1].float().cpu()
    predicted = logits.log_softmax(-1)
    surprise = -predicted.gather(2, rest[..., None])[..., 0]
    entropy = -(predicted.exp() * predicted).sum(-1)
    assert entropy.mean() < 5.2  # of 5.55: what is drawn evenly would be told from this
    assert surprise.mean().item() == pytest.approx(entropy.mean().item(), abs=0.05)


def test_seeds() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    one, same, other = (own_text(model, tokenizer, 4, 12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(one.unique(dim=0)) == 4


def test_what_the_tokenizer_puts_before_any_text_is_there() -> None:
    windows = own_text(tiny_llama(), begins_with_end(), 5, 8)
    assert windows[:, 0].eq(END).all()
    assert windows[:, 1].max() < END


def test_fewer_at_once_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    continued = room._continued

    def short(model: Any, begun: torch.Tensor, *more: Any) -> torch.Tensor:
        rows.append(len(begun))
        if len(begun) > 3:
            raise torch.OutOfMemoryError("no room")
        return continued(model, begun, *more)

    monkeypatch.setattr(room, "_continued", short)
    model, tokenizer = tiny_llama(), byte_tokenizer()
    assert own_text(model, tokenizer, 8, 6).shape == (8, 6)
    assert rows == [8, 4, 2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        own_text(model, tokenizer, 8, 6, batch_size=8)


def test_no_token_that_the_tokenizer_does_not_have() -> None:
    windows = own_text(tiny_llama(vocab_size=320), byte_tokenizer(), 40, 24)
    assert 240 < windows.max() <= END
    model = tiny_llama(vocab_size=200)
    assert own_text(model, byte_tokenizer(), 40, 24).max() < 200


@pytest.mark.parametrize(("windows", "length"), [(0, 8), (-1, 8), (3, 1)])
def test_too_little_to_write(windows: int, length: int) -> None:
    with pytest.raises(DataError, match=f"{windows} windows of {length} tokens"):
        own_text(tiny_llama(), byte_tokenizer(), windows, length)


def test_no_batch() -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        own_text(tiny_llama(), byte_tokenizer(), 3, 8, batch_size=0)


def test_a_broken_model() -> None:
    model = tiny_llama()
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(NumericsError):
        own_text(model, byte_tokenizer(), 2, 8)
