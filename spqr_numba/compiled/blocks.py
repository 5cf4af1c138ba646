"""Decoder blocks under torch.compile: what is compiled for one of them serves all.

Compiling a model as a whole takes the longer the deeper it is, and its blocks are all alike but for
the number under which each finds its keys and values in the cache, and what their weights are
compressed to. Here each gets a cache of that one layer, so that the number no longer matters, and
the weights by numbers (operators.py), so that their settings do not; and all get one mask, as the
numbers that attention adds. What lies around the blocks stays as it is. On a GPU products take in
what stands around them (passes.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import exc
from torch._inductor import config as inductor_config
from transformers.cache_utils import Cache

from ..model.blocks import find_blocks
from ..nn import ByNumber, join_siblings
from .passes import ProductPasses

__all__ = ["CompiledBlocks"]

COMPILE_BACKEND = "inductor"
# What is raised before anything has run; torch.compiler exports none of them.
COMPILE_ERRORS = (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)

logger = logging.getLogger(__name__)


class LayerCache(Cache):
    """One layer of a cache, under whatever number a block asks for it."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, heads, T, width], return all of them."""
        return self.layers[0].update(keys, values, *args, **kwargs)


class CompiledBlocks:
    """`with CompiledBlocks(model, cache): model(...)`: the blocks run compiled.

    A block that torch.compile does not take runs as it is, and so do the others from then on; that
    is logged, and `works` is False.
    """

    def __init__(self, model: Any, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._blocks = find_blocks(model).modules
        self._layers = [LayerCache(layers=[layer]) for layer in cache.layers]
        self.works = True
        self._masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by identity, of a step
        self._left = ExitStack()
        if len(self._blocks) != len(self._layers):
            self._give_up(f"it has {len(self._blocks)} blocks and {len(self._layers)} caches")
        elif any("forward" in vars(block) for block in self._blocks):
            self._give_up("its blocks already run through another wrapper")
        for block in self._blocks if self.works else ():
            join_siblings(block)
        self._numbers = ByNumber(model)

    def __enter__(self) -> None:
        if not self.works:
            return
        joining = inductor_config.patch(post_grad_custom_pre_pass=ProductPasses())
        self._left.enter_context(joining)
        self._left.enter_context(self._numbers)
        for block, layer in zip(self._blocks, self._layers, strict=True):
            block.forward = partial(self._run, block, layer)
            self._left.callback(vars(block).pop, "forward", None)

    def __exit__(self, *_: object) -> None:
        self._left.close()
        self._masks.clear()

    def _run(self, block: nn.Module, layer: LayerCache, *args: Any, **kwargs: Any) -> Any:
        def given(argument: Any) -> Any:
            return layer if argument is self._cache else self._added(argument, args[0].dtype)

        if self.works:
            try:
                positional = [given(argument) for argument in args]
                named = {name: given(argument) for name, argument in kwargs.items()}
                return compiled_forward()(block, positional, named)
            except COMPILE_ERRORS as error:
                self._give_up((str(error).splitlines() or [type(error).__name__])[0])
        return forward(block, args, kwargs)

    def _added(self, argument: Any, dtype: torch.dtype) -> Any:
        """A mask as what attention adds, made once for all blocks; all else as it is."""
        if not (isinstance(argument, torch.Tensor) and argument.dtype == torch.bool):
            return argument
        if id(argument) not in self._masks:
            added = torch.where(argument, 0.0, float("-inf")).to(dtype)
            self._masks[id(argument)] = argument, added
        return self._masks[id(argument)][1]

    def _give_up(self, reason: str) -> None:
        self.works = False
        logger.warning("%s cannot be compiled: %s", type(self._model).__name__, reason)


def forward(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a block's class does."""
    return type(block).forward(block, *args, **kwargs)


@cache
def compiled_forward() -> Callable[..., Any]:
    """`forward`, compiled."""
    return torch.compile(forward, fullgraph=True, backend=COMPILE_BACKEND)
