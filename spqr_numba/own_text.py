"""Text that a model writes of itself: calibration where no text like its use is at hand.

A random token begins each window, and all others are drawn as the model predicts them, beyond the
ends of its texts too. So the windows are of all the kinds that the model was trained on, in about
their shares: prose, code, chats, other languages. Calibration on what a model writes is from Liu et
al. (LLM-QAT, arXiv 2305.17888) and Williams et al. (self-calibration, arXiv 2410.17170).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from .decoding import Steps, make_cache, prefill
from .errors import ConfigError, DataError
from .sampling import Sampling

__all__ = ["own_text"]

ROWS = {"cpu": 32, "cuda": 256}  # windows written at once

logger = logging.getLogger(__name__)


def own_text(
    model: Any,
    tokenizer: Any,
    windows: int,
    length: int,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """`windows` windows of `length` tokens that the model writes: int64 [windows, length].

    seed        of the first tokens and of the choice of all others
    batch_size  windows written at once; None: 32 on a CPU and 256 on a GPU, halved until they fit
    progress    gets the number of tokens written since it was last called

    Raises DataError where no window would hold a token that the model chose, ConfigError for a
    batch of none, NumericsError where what it predicts behind the first tokens is not finite.
    """
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    start = tokenizer("")["input_ids"]
    if windows < 1 or length < len(start) + 2:
        raise DataError(
            f"{windows} windows of {length} tokens were asked for; at least one of"
            f" {len(start) + 2} is needed"
        )
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; at least one window is written at once")
    starts = torch.tensor([start] * windows, dtype=torch.int64)
    begun = torch.cat([starts, _words(tokenizer, known, windows, seed)], dim=1)
    rows = min(batch_size or ROWS[model.device.type], windows)
    written: list[torch.Tensor] = []
    while (done := sum(map(len, written))) < windows:
        given = begun[done : done + rows], length, known, seed + done
        part = _if_it_fits(model, *given, progress, must=rows == 1 or batch_size is not None)
        if part is not None:
            written.append(part)
            continue
        rows //= 2
        logger.info("the GPU has no room for more: %d windows are written at once", rows)
    return torch.cat(written)


def _if_it_fits(model: Any, *given: Any, must: bool) -> torch.Tensor | None:
    """What `_continued` returns; None where memory is short, unless it must fit."""
    try:
        return _continued(model, *given)
    except torch.OutOfMemoryError:
        if must:
            raise
    torch.cuda.empty_cache()  # here, where nothing holds what was taken
    return None


def _words(tokenizer: Any, known: int, windows: int, seed: int) -> torch.Tensor:
    """Tokens at random, none of the special ones: int64 [windows, 1]."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = torch.tensor([token for token in range(known) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    return words[torch.randint(len(words), (windows, 1), generator=generator)]


def _continued(
    model: Any,
    begun: torch.Tensor,
    length: int,
    known: int,
    seed: int,
    progress: Callable[[int], object] | None,
) -> torch.Tensor:
    """The windows begun [B, T], as long as they are to be: int64 [B, length]."""
    on_gpu = model.device.type == "cuda"
    choose = Sampling(temperature=1.0, seed=seed).chooser(model.device, known)
    cache = make_cache(model, length, static=on_gpu)
    logits, state = prefill(model, begun.to(model.device), None, cache)
    chosen = choose(logits)
    columns = [chosen[:, 0].tolist()]
    tell = progress or (lambda tokens: None)
    tell((begun.shape[1] + 1) * len(begun))
    for column in Steps(state, chosen, choose, length - begun.shape[1] - 1, graph=on_gpu):
        columns.append(column)
        tell(len(begun))
    return torch.cat([begun, torch.tensor(columns).T], dim=1)
