"""How the next token is chosen from a model's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError

__all__ = ["Chooser", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, or, with temperature > 0, at random.

    temperature   divides the logits; 0 is greedy
    top_k         keep only the k most likely tokens
    top_p         keep only the fewest most likely tokens whose probabilities reach top_p
    seed          of the random choice

    Raises ConfigError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError(
                "top_k and top_p choose among random tokens, and temperature 0 is greedy:"
                " set a temperature above 0"
            )

    def chooser(self, device: torch.device, known: int | None = None) -> Chooser:
        """The choice as a function of logits on `device`, among the first `known` tokens."""
        return Chooser(self, device, known)


class Chooser:
    """Logits [B, V] -> the chosen tokens [B, 1], int64, without waiting for a GPU.

    generator   where the choice gets its random numbers; None for the greedy one
    """

    def __init__(self, sampling: Sampling, device: torch.device, known: int | None = None) -> None:
        self.generator: torch.Generator | None = None
        self._known = known
        if sampling.temperature > 0:
            self.generator = torch.Generator(device).manual_seed(sampling.seed)
            self._warpers = _warpers(sampling)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [B, 1] for logits [B, V]."""
        logits = logits[:, : self._known]
        if self.generator is None:
            return logits.argmax(dim=-1, keepdim=True)
        # The smallest of exponential variables of rates p falls on each token with probability p;
        # torch.multinomial does the same and first waits to see whether p is valid.
        scores = self._warpers(None, logits.float())
        waits = torch.empty_like(scores).exponential_(generator=self.generator)
        waits.clamp_(min=torch.finfo(torch.float32).tiny)
        return (scores - waits.log_()).argmax(dim=-1, keepdim=True)


def _warpers(sampling: Sampling) -> Any:
    from transformers.generation import logits_process

    warpers = logits_process.LogitsProcessorList()
    warpers.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        warpers.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(logits_process.TopPLogitsWarper(sampling.top_p))
    return warpers
