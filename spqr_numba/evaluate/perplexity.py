"""Perplexity: exp of the mean surprise over every token of the text that a model has to predict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import DataError, InputError, NumericsError

__all__ = ["perplexity"]

TOKENS_PER_BATCH = 1024
LOSS_POSITIONS = 256  # whose logits are in float32 at once: 256 x 150k words are 150 MB


@torch.inference_mode()
def perplexity(
    model: Any, windows: torch.Tensor, progress: Callable[[int], object] | None = None
) -> float:
    """exp(mean negative log-likelihood) of windows [N, L], int64 tokens, each read on its own.

    The first token of a window is given and the other L - 1 are predicted. `progress` is called
    with the number of windows done since the last call. Raises DataError for no windows,
    InputError for windows of another shape or dtype, NumericsError where a loss is not finite.
    """
    _check_windows(windows)
    total = 0.0
    done = 0
    for batch in windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])):
        loss = _negative_log_likelihood(model, batch.to(model.device))
        if not math.isfinite(loss):
            raise NumericsError(
                f"the loss in windows {done} to {done + len(batch) - 1} is {loss}; the model's"
                " weights are damaged, or its dtype is too narrow for it"
            )
        total += loss
        done += len(batch)
        if progress:
            progress(len(batch))
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return torch.tensor(mean, dtype=torch.float64).exp().item()  # inf where math.exp would raise


def _check_windows(windows: torch.Tensor) -> None:
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[1] < 2:
        raise InputError(
            f"windows are {windows.dtype} {list(windows.shape)}; they must be int64 [N, L] with"
            " L at least 2"
        )
    if not len(windows):
        raise DataError("there is no window to evaluate; give more text or a shorter seqlen")


def _negative_log_likelihood(model: Any, tokens: torch.Tensor) -> float:
    """Summed over the predicted tokens of tokens [B, L]."""
    logits = model(tokens, use_cache=False).logits
    predictions = logits[:, :-1].flatten(0, 1).split(LOSS_POSITIONS)
    targets = tokens[:, 1:].flatten().split(LOSS_POSITIONS)
    losses = [
        F.cross_entropy(prediction.float(), target, reduction="sum")
        for prediction, target in zip(predictions, targets, strict=True)
    ]
    return torch.stack(losses).double().sum().item()
