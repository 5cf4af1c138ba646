"""From token to token: the cache, the prefill, and decode steps, on a GPU replayed as one graph.

    tokens [B, T] -> prefill -> logits [B, V] -> choose -> token [B, 1] --+
                        ^                                                 |
                        +------------- decode_one_token <----------------+

A decode step of a model of N blocks is some 40 N kernels of a few microseconds each, which Python
starts more slowly than a GPU runs them. With a static cache no shape in it changes from step to
step, so the step and the choice behind it are captured once in a CUDA graph and replayed. The GPU
runs one step ahead of whoever reads the tokens. Compiled (compiled/), the 40 kernels are
half as many; that takes a while, and is left to whoever has much to generate.
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .errors import NumericsError
from .kernels_ahead import compile_joined_kernels, compile_kernels
from .sampling import Chooser

__all__ = ["Decoding", "Steps", "cache_length", "decode_one_token", "make_cache", "prefill"]

WARM_UP_STEPS = 2
LEAST_REPLAYS = 8  # as many eager steps take as long as a capture
COMPILED_LENGTH = 256  # what was compiled serves all caches up to the next multiple

logger = logging.getLogger(__name__)


@dataclass
class Decoding:
    """What a decode step reads and advances.

    cache           the model's keys and values
    attention_mask  [B, cache length] int64, 0 at the padding, or None where there is none
    positions       [B, 1] int64, of the next token in its own prompt
    step            tokens in the cache, padding included
    around          entered around each forward of the model: what compiles its blocks
    """

    model: Any
    cache: Any
    attention_mask: torch.Tensor | None
    positions: torch.Tensor
    step: int
    around: AbstractContextManager[None] = field(default_factory=nullcontext)


def cache_length(tokens: int, compiled: bool) -> int:
    """How long a static cache for so many tokens should be."""
    return -(-tokens // COMPILED_LENGTH) * COMPILED_LENGTH if compiled else tokens


def make_cache(model: Any, length: int, static: bool) -> Any:
    """An empty cache; a static one holds `length` tokens and its shapes never change."""
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    if not static:
        return DynamicCache(config=model.config)
    made = StaticCache(config=model.config, max_cache_len=length)
    # A sliding layer counts in Python, where a graph does not go; the mask slides over all as well.
    made.layers = [
        StaticLayer(length) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in made.layers
    ]
    return made


@torch.inference_mode()
def prefill(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor | None, cache: Any
) -> tuple[torch.Tensor, Decoding]:
    """Run the prompts tokens [B, T], int64, and return the next token's logits [B, V].

    mask is [B, cache length], 0 at the padding, or None where no prompt is padded. Raises
    NumericsError where the logits are not finite.
    """
    length = tokens.shape[1]
    if mask is None:
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    else:
        positions = (mask[:, :length].cumsum(dim=1) - 1).clamp(min=0)
    state = Decoding(model, cache, mask, positions, 0)
    compile_kernels(model, tokens.numel(), len(tokens))
    logits = _forward(state, tokens)
    if not torch.isfinite(logits).all():
        raise NumericsError(
            "the model's output holds NaN or inf after the prompt; its weights are damaged, or"
            f" {logits.dtype} is too narrow for it (load it in float32)"
        )
    state.positions = positions[:, -1:].clone()
    state.positions += 1
    return logits, state


@torch.inference_mode()
def decode_one_token(state: Decoding, tokens: torch.Tensor) -> torch.Tensor:
    """Run the tokens [B, 1] just chosen, advance the state, return the next logits [B, V]."""
    logits = _forward(state, tokens)
    state.positions += 1
    return logits


def _forward(state: Decoding, tokens: torch.Tensor) -> torch.Tensor:
    mask = state.attention_mask
    if mask is not None and not state.cache.is_compileable:
        mask = mask[:, : state.step + tokens.shape[1]]
    inputs = {"attention_mask": mask, "past_key_values": state.cache, "use_cache": True}
    takes = inspect.signature(state.model.forward).parameters
    if "position_ids" in takes:
        inputs["position_ids"] = state.positions
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1  # of a long prompt the others take time and gigabytes
    with state.around:
        logits = state.model(tokens, **inputs).logits[:, -1]
    state.step += tokens.shape[1]
    return logits


class Steps:
    """The tokens of `count` decode steps behind `tokens` [B, 1]: a list [B] a step.

    graph and compiled are wishes; what a model does not allow is left out, and said once. The first
    start_up_steps, which took start_up_seconds, went by before everything was ready.
    """

    def __init__(
        self,
        state: Decoding,
        tokens: torch.Tensor,
        choose: Chooser,
        count: int,
        graph: bool = False,
        compiled: bool = False,
    ) -> None:
        self.start_up_steps = 0
        self.start_up_seconds = 0.0
        self._state, self._tokens, self._choose, self._count = state, tokens, choose, count
        self._captures = graph and count >= WARM_UP_STEPS + LEAST_REPLAYS and capturable(state)
        self._warm_up = min(count, WARM_UP_STEPS) if compiled or self._captures else 0
        if compiled:
            from .compiled.blocks import CompiledBlocks  # takes seconds

            state.around = CompiledBlocks(state.model, state.cache)
            if state.around.works:
                compile_joined_kernels(state.model, len(tokens))

    def __iter__(self) -> Iterator[list[int]]:
        started = time.perf_counter()
        graph = None
        for _ in range(self._warm_up):
            with noticing_waits() as waits:
                self._advance()
            yield self._values()
        if self._captures:
            graph = self._capture(waits)
        if self._warm_up:
            self.start_up_steps = self._warm_up
            self.start_up_seconds = time.perf_counter() - started
        rest = self._count - self._warm_up
        yield from self._replayed(graph, rest) if graph else self._one_by_one(rest)

    def _one_by_one(self, count: int) -> Iterator[list[int]]:
        for _ in range(count):
            self._advance()
            yield self._values()

    def _replayed(self, graph: torch.cuda.CUDAGraph, count: int) -> Iterator[list[int]]:
        """The GPU is one step ahead of whoever reads, who may take as long as a step."""
        read = torch.empty(count, len(self._tokens), dtype=torch.int64, pin_memory=True)
        done = [torch.cuda.Event() for _ in range(count)]
        try:
            for step in range(count):
                with torch.cuda.device(self._state.model.device):
                    graph.replay()
                    read[step].copy_(self._tokens[:, 0], non_blocking=True)
                    done[step].record()
                if step:
                    done[step - 1].synchronize()
                    yield read[step - 1].tolist()
            done[-1].synchronize()
            yield read[-1].tolist()
        finally:
            torch.cuda.synchronize(self._state.model.device)  # before the graph's memory goes

    def _advance(self) -> None:
        """One step and the choice behind it."""
        self._tokens = self._choose(decode_one_token(self._state, self._tokens))

    def _values(self) -> list[int]:
        return self._tokens[:, 0].tolist()  # waits for the device

    def _capture(self, waits: list[str]) -> torch.cuda.CUDAGraph | None:
        """One step and the choice behind it, from self._tokens to self._tokens."""
        state, device = self._state, self._state.model.device
        if waits:
            note(state.model, f"runs without a CUDA graph: its step waits for the GPU ({waits[0]})")
            return None
        graph, self._tokens = torch.cuda.CUDAGraph(), self._tokens.clone()
        random = self._choose.generator
        if random is not None:
            graph.register_generator_state(random)
            random_state = random.get_state()
        try:
            with torch.inference_mode(), capturing(graph, torch.cuda.Stream(device)):
                self._tokens.copy_(self._choose(decode_one_token(state, self._tokens)))
        except RuntimeError as error:
            note(state.model, f"runs without a CUDA graph: {first_line(error)}")
            if random is not None:
                self._choose.generator = torch.Generator(device)
                self._choose.generator.set_state(random_state)
            return None
        return graph


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what is queued inside; where that fails, leave torch as it was. Raises RuntimeError.

    torch alone leaves its current stream, and its generators believing that the capture goes on.
    """
    before = torch.cuda.current_stream(stream.device)
    try:
        with torch.cuda.graph(graph, stream=stream):
            yield
    except RuntimeError:
        torch.cuda.set_stream(before)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device=stream.device)  # ended, this one ends it for the generators
        raise


def capturable(state: Decoding) -> bool:
    """Whether a step may be captured; where not, why not is said."""
    from transformers.cache_utils import StaticLayer

    reason = None
    if not getattr(state.model, "_can_compile_fullgraph", False):
        reason = "transformers knows of decisions in its forward that a graph would freeze"
    elif not all(type(layer) is StaticLayer for layer in state.cache.layers):
        reason = "its cache holds more than keys and values"
    elif len({parameter.device for parameter in state.model.parameters()}) > 1:
        reason = "it is spread over several devices"
    if reason:
        note(state.model, f"runs without a CUDA graph: {reason}")
    return reason is None


@contextmanager
def noticing_waits() -> Iterator[list[str]]:
    """Collects the places where the code inside waits for a GPU: no capture would survive them."""
    waits: list[str] = []
    if not torch.cuda.is_available():
        yield waits
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            waits.append(f"{Path(warning.filename).name}:{warning.lineno}")


def first_line(error: Exception) -> str:
    """What an error says, without its advice."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def note(model: Any, what: str) -> None:
    """Log what a model cannot do; once."""
    _note(f"{type(model).__name__} {what}")


@cache
def _note(message: str) -> None:
    logger.warning(message)
