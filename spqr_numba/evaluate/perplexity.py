"""Perplexity: exp of the mean surprise over every token of the text that a model has to predict.

And how far a model's predictions are from another's, which tells more where both are near: what one
token gains by an error another loses, and that goes into perplexity as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import DataError, InputError, NumericsError
from ..kernels_ahead import compile_kernels

__all__ = ["perplexity", "perplexity_beside"]

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
    return _measure(model, None, windows, progress)[0]


@torch.inference_mode()
def perplexity_beside(
    model: Any,
    dense: Any,
    windows: torch.Tensor,
    progress: Callable[[int], object] | None = None,
) -> tuple[float, float]:
    """(perplexity, nats a token from `dense`), of windows as for `perplexity`, and in one pass.

    The second is the mean Kullback-Leibler divergence of the model's next-token distribution from
    that of `dense`, which is on the same device.
    """
    return _measure(model, dense, windows, progress)


def _measure(
    model: Any, dense: Any, windows: torch.Tensor, progress: Callable[[int], object] | None
) -> tuple[float, float]:
    """(perplexity, nats a token from `dense`, 0 where that is None)."""
    _check_windows(windows)
    loss, nats = 0.0, 0.0
    done = 0
    for batch in windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])):
        some_loss, some_nats = _sums(model, dense, batch.to(model.device))
        if not math.isfinite(some_loss):
            raise NumericsError(
                f"the loss in windows {done} to {done + len(batch) - 1} is {some_loss}; the model's"
                " weights are damaged, or its dtype is too narrow for it"
            )
        loss, nats = loss + some_loss, nats + some_nats
        done += len(batch)
        if progress:
            progress(len(batch))
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    mean = torch.tensor(loss / predicted, dtype=torch.float64)
    return mean.exp().item(), nats / predicted  # inf where math.exp would raise


def _check_windows(windows: torch.Tensor) -> None:
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[1] < 2:
        raise InputError(
            f"windows are {windows.dtype} {list(windows.shape)}; they must be int64 [N, L] with"
            " L at least 2"
        )
    if not len(windows):
        raise DataError("there is no window to evaluate; give more text or a shorter seqlen")


def _sums(model: Any, dense: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """Over the predicted tokens of tokens [B, L]: (negative log-likelihood, nats from `dense`)."""
    predictions = _predictions(model, tokens)
    targets = tokens[:, 1:].flatten().split(LOSS_POSITIONS)
    losses = [
        F.cross_entropy(prediction.float(), target, reduction="sum")
        for prediction, target in zip(predictions, targets, strict=True)
    ]
    loss = torch.stack(losses).double().sum().item()
    if dense is None:
        return loss, 0.0
    pairs = zip(predictions, _predictions(dense, tokens), strict=True)
    return loss, torch.stack([_divergence(*pair) for pair in pairs]).double().sum().item()


def _predictions(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits of all next tokens, some positions at a time."""
    compile_kernels(model, tokens.numel())
    logits = model(tokens, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).split(LOSS_POSITIONS)


def _divergence(prediction: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Summed over positions."""
    logs = F.log_softmax(prediction.float(), dim=-1)
    dense_logs = F.log_softmax(dense.float(), dim=-1)
    return F.kl_div(logs, dense_logs, reduction="sum", log_target=True)
