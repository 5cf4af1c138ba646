"""What goes into each decoder block: hidden states, and the arguments that come along.

Masks, position embeddings and the like differ between models, and in some (Gemma 2 and 3) between
blocks, so they are never guessed: the model's own forward runs with every block replaced by a
recorder, which keeps its arguments and hands the hidden states on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.func import functional_call

from ..errors import ModelError

__all__ = ["Activations", "BlockCall", "StopForward", "logits"]

# What a block class may return: hidden states, or a tuple that begins with them.
RETURNS: tuple[Callable[[torch.Tensor], object], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
)
RECORDING_ERRORS = (AttributeError, IndexError, ModelError, RuntimeError, TypeError, ValueError)
HIDDEN_STATES = "hidden_states"
HIDDEN_DIMS = 3


class StopForward(Exception):  # noqa: N818 - control flow, no error
    """Leaves a forward pass from inside a hook: the rest of it is not needed."""


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides hidden states."""

    args: tuple
    kwargs: dict[str, Any]

    def of(self, block: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """What `block` makes of hidden states."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class Activations:
    """The hidden states of all calibration windows on their way through the blocks.

    states       [windows, L, d], what the next block gets; replaced in place, a batch at a time on
                 the block's device
    dense        the same as the dense model has it, or None; given with states as one tensor
                 [2, windows, L, d]
    batch_size   windows run at once
    calls        number of windows -> the arguments of each block for a batch of so many
    running      the windows that `run_all` and `run_pairs` are at
    """

    def __init__(
        self, states: torch.Tensor, batch_size: int, calls: dict[int, list[BlockCall]]
    ) -> None:
        self._whole = states
        alone = states.ndim == HIDDEN_DIMS
        self.states: torch.Tensor = states if alone else states[0]
        self.dense: torch.Tensor | None = None if alone else states[1]
        self.batch_size = batch_size
        self.calls = calls
        self.running = slice(0)

    @classmethod
    def start(
        cls,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        windows: torch.Tensor,
        batch_size: int,
        states: torch.Tensor | None = None,
        *,
        offload: bool = False,
        dense: bool = False,
    ) -> Self:
        """Embed token windows [windows, L], or go on from the `states` of an earlier run.

        The states stay where the windows are, or with `offload` in main memory; `dense` carries
        those of the dense model along, which begin as the same. Everything of
        `model` in front of its blocks must be loaded. Raises ModelError where the blocks cannot be
        run one by one.
        """
        batches = windows.split(batch_size)
        place = torch.device("cpu") if offload else windows.device
        if states is None:
            states = torch.cat([embed(model, blocks[0], batch).to(place) for batch in batches])
            states = torch.stack([states, states]) if dense else states
        samples = {len(batch): batch for batch in (windows[:1], batches[0], batches[-1])}
        calls = {size: record_calls(model, blocks, batch) for size, batch in samples.items()}
        if len(windows) > 1:
            check_token_independence(calls[1], record_calls(model, blocks, windows[1:2]))
        states = states.to(place)
        return cls(
            states.pin_memory() if offload and windows.is_cuda else states, batch_size, calls
        )

    @property
    def on_gpu(self) -> bool:
        """Whether the states are on a GPU."""
        return self.states.is_cuda

    def in_main_memory(self) -> torch.Tensor:
        """What `start` takes for states, in main memory; a copy, where they are on a GPU."""
        if not self.on_gpu:
            return self._whole
        return torch.empty_like(self._whole, device="cpu", pin_memory=True).copy_(self._whole)

    def run_first(self, block: nn.Module, index: int) -> None:
        """Run block `index` on the first window alone: what its hooks see, all windows will."""
        self.run(block, index, self.states[:1])

    def run_all(self, block: nn.Module, index: int) -> None:
        """Run block `index` on every window, for what its hooks see; any may stop a batch."""
        for batch in self._batches(self.states):
            with suppress(StopForward):
                self.run(block, index, batch)

    def run_pairs(
        self,
        block: nn.Module,
        index: int,
        as_dense: Callable[[], AbstractContextManager],
        *,
        advance: bool,
    ) -> None:
        """`run_all`, each batch behind its dense twin, for which as_dense() prepares the block.

        With `advance`, what the block makes of the dense states replaces them.
        """
        assert self.dense is not None
        dense_batches = self.dense.split(self.batch_size)
        for dense, batch in zip(dense_batches, self._batches(self.states), strict=True):
            with suppress(StopForward), as_dense():
                output = self.run(block, index, dense)
                if advance:
                    dense.copy_(output)
            with suppress(StopForward):
                self.run(block, index, batch)

    def _batches(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """The states, batch by batch."""
        for start in range(0, len(states), self.batch_size):
            self.running = slice(start, start + self.batch_size)
            yield states[self.running]

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the states by what block `index` makes of them."""
        for batch in self.states.split(self.batch_size):
            batch.copy_(self.run(block, index, batch))

    def outputs(self, block: nn.Module, index: int) -> torch.Tensor:
        """What block `index` makes of the states: [windows, L, d], where they are."""
        made = torch.empty_like(self.states)
        for batch, outputs in zip(
            self.states.split(self.batch_size), made.split(self.batch_size), strict=True
        ):
            outputs.copy_(self.run(block, index, batch))
        return made

    def parts(self, windows: Sequence[int]) -> Iterator[Sequence[int]]:
        """Any windows, as many at once as a block can be called with."""
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            yield from [batch] if len(batch) in self.calls else ([window] for window in batch)

    def run(self, block: nn.Module, index: int, batch: torch.Tensor) -> torch.Tensor:
        """What block `index` makes of hidden states [B, L, d]; `calls` knows B windows."""
        batch = batch.to(next(block.parameters()).device, non_blocking=True)
        return self.calls[len(batch)][index].of(block, batch)


def embed(model: nn.Module, first_block: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """The hidden states that the first block gets for token windows [B, L]: [B, L, d]."""
    caught: list[torch.Tensor] = []

    def catch(*args: Any, **kwargs: Any) -> None:
        caught.append(_split(args, kwargs)[0])
        raise StopForward

    with _replaced([first_block], [catch]):
        _forward(model, windows)
    return caught[0]


def logits(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    windows: torch.Tensor,
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The logits [B, L, vocabulary] that a model makes of its last block's output [B, L, d].

    windows are the tokens [B, L], weights name -> parameter to be used in place of the model's own.
    Everything outside the blocks must be loaded. Raises ModelError where hidden states do not go
    straight from the blocks to the head.
    """
    failure: Exception | None = None
    arguments = {"input_ids": windows, "use_cache": False}
    for returns in RETURNS:
        made = returns(hidden)
        try:
            with _replaced(blocks, [lambda *_, made=made, **__: made] * len(blocks)):
                return functional_call(model, dict(weights or {}), (), arguments).logits
        except RECORDING_ERRORS as error:
            failure = error  # the model may unpack something else than `returns` gives
    raise ModelError(f"{type(model).__name__} makes no logits of its blocks' output") from failure


def record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], windows: torch.Tensor
) -> list[BlockCall]:
    """The arguments of every block for a batch of the shape of `windows` [B, L].

    Raises ModelError where hidden states do not go straight from one block to the next.
    """
    failure: Exception | None = None
    for returns in RETURNS:
        try:
            return _record(model, blocks, windows, returns)
        except RECORDING_ERRORS as error:
            failure = error  # the model may unpack something else than `returns` gives
    raise ModelError(
        f"{type(model).__name__} does not pass hidden states straight from one decoder block to the"
        f" next, so it cannot be compressed ({failure})"
    ) from failure


def check_token_independence(first: Sequence[BlockCall], second: Sequence[BlockCall]) -> None:
    """Raise ModelError where the arguments of two recordings of equal shape differ."""
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        for name, value in one.kwargs.items():
            if not _same(value, other.kwargs.get(name)):
                raise ModelError(
                    f"decoder block {index} gets an argument that depends on the tokens"
                    f" ({name}); such a model cannot be compressed"
                )


def _record(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    windows: torch.Tensor,
    returns: Callable[[torch.Tensor], object],
) -> list[BlockCall]:
    """`record_calls`, if every block returns `returns(hidden)`."""
    calls: list[BlockCall] = []
    sent: list[torch.Tensor] = []

    def recorder(*args: Any, **kwargs: Any) -> object:
        hidden, call = _split(args, kwargs)
        if sent and hidden is not sent[-1]:
            raise ModelError(f"hidden states change between blocks {len(sent) - 1} and {len(sent)}")
        sent.append(hidden)
        calls.append(call)
        if len(calls) == len(blocks):
            raise StopForward
        return returns(hidden)

    with _replaced(blocks, [recorder] * len(blocks)):
        _forward(model, windows)
    return calls


def _forward(model: nn.Module, windows: torch.Tensor) -> None:
    """The model's forward, until a recorder stops it."""
    try:
        model(input_ids=windows, use_cache=False)
    except StopForward:
        return
    raise ModelError(f"{type(model).__name__} runs without calling its last decoder block")


@contextmanager
def _replaced(blocks: Sequence[nn.Module], forwards: Sequence[Callable]) -> Iterator[None]:
    """The blocks with other forward functions; all else of them (attention_type) stays visible."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, BlockCall]:
    """Hidden states, by position or by name, and the rest."""
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = {name: value for name, value in kwargs.items() if name != HIDDEN_STATES}
    return kwargs[HIDDEN_STATES], BlockCall((), rest)


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and all(map(_same, one, other))
    return True  # flags and None
