"""The Hessians of a block's inputs, filled by hooks while the block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from ..quantize.hessian import Hessian
from .activations import StopForward
from .blocks import InputGroup, first_input, pre_hook
from .report import Clock

__all__ = ["InputSums", "Weigh"]

Weigh = Callable[[Sequence[str]], torch.Tensor]


class InputSums:
    """A Hessian for each of some inputs of a block.

    block      which runs on batches [B, L, d]
    linears    input -> a linear that gets it
    clock      for the seconds spent on Hessians
    weigh      the names of linears that share an input -> how much each token of the batch that is
               run counts for it, fp32 [B, L]; None where all count alike
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Mapping[InputGroup, nn.Linear],
        clock: Clock,
        weigh: Weigh | None = None,
    ) -> None:
        self._weigh = weigh
        self._block, self._linears, self._clock = block, linears, clock
        self.hessians = {
            group: Hessian(linear.in_features, linear.weight.device)
            for group, linear in linears.items()
        }
        self._awaited: dict[InputGroup, int] = {}
        self._tokens = 0
        self._remembers = self._whole = False
        self._dense: dict[InputGroup, list[torch.Tensor]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within, every pass of the block is added, and stopped behind the last input awaited."""
        with ExitStack() as hooks:
            hooks.enter_context(pre_hook(self._block, self._begin))
            for group, linear in self._linears.items():
                hooks.enter_context(pre_hook(linear, partial(self._meet, group)))
            yield

    @contextmanager
    def remembering(self, *, whole: bool) -> Iterator[None]:
        """Within, a pass is that of the dense model, beside whose inputs the next one's are added.

        A `whole` one is not stopped.
        """
        self._remembers, self._whole = True, whole
        self._dense = {group: [] for group in self._linears}
        try:
            yield
        finally:
            self._remembers = self._whole = False

    def _begin(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self._awaited = {group: group.calls for group in self._linears}
        self._tokens = first_input(args, kwargs).shape[:-1].numel()

    def _meet(self, group: InputGroup, _: nn.Module, args: tuple, kwargs: dict) -> None:
        x = first_input(args, kwargs)
        if self._remembers:
            self._dense[group].append(x)
        else:
            with self._clock("hessian"):
                self.hessians[group].add(x, self._twin(group, x), self._weights(group, x))
        self._awaited[group] -= 1
        if not (self._whole or any(self._awaited.values())):
            raise StopForward

    def _weights(self, group: InputGroup, x: torch.Tensor) -> torch.Tensor | None:
        """How much each token counts; None where all do alike, or some pass this input by."""
        if self._weigh is None:
            return None
        weights = self._weigh(group.names)
        return weights.to(x.device) if weights.numel() == x.shape[:-1].numel() else None

    def _twin(self, group: InputGroup, x: torch.Tensor) -> torch.Tensor | None:
        """What the dense model had in the place of `x`.

        None where that is not known: an expert of a mixture gets some of the tokens, and not the
        same ones in both models.
        """
        remembered = self._dense.get(group)
        dense = remembered.pop(0) if remembered else None
        if dense is None or not dense.shape[:-1].numel() == x.shape[:-1].numel() == self._tokens:
            return None
        return dense.reshape(x.shape)
