"""A model without its weights, and the weights of one part of it at a time.

Parameters are on the meta device until `load` reads them from a checkpoint; `release` sends them
back. Buffers that no checkpoint holds (rotary frequencies, embedding scales) are real from the
start, because the model's own code computes them when it is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import CheckpointError, ModelError, NumericsError
from .blocks import Blocks

__all__ = [
    "InMemory",
    "Parts",
    "ReadAhead",
    "Weights",
    "build_skeleton",
    "load",
    "move_buffers",
    "release",
    "stored_names",
]


class Weights(Protocol):
    """The tensors of a checkpoint, under the names that a model has for them."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in its stored dtype, on the CPU."""
        ...


class ReadAhead:
    """Weights of which a thread reads some before they are asked for, where `ahead` says so.

    A disk is slow, and so is a copy to a GPU from memory that is not pinned: either would keep the
    GPU waiting in front of each block.
    """

    def __init__(self, weights: Weights, ahead: bool) -> None:
        self._weights, self._ahead = weights, ahead
        self._reader = ThreadPoolExecutor(1, "spqr-reader")
        self._coming: dict[str, Future[torch.Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def expect(self, names: Iterable[str]) -> None:
        """Begin to read `names`, each of which is to be asked for once."""
        for name in names:
            if self._ahead and name in self._weights:
                self._coming[name] = self._reader.submit(self._fetch, name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in its stored dtype, on the CPU. Raises CheckpointError."""
        coming = self._coming.pop(name, None)
        return self._weights.read(name) if coming is None else coming.result()

    def close(self) -> None:
        """Read nothing more."""
        self._reader.shutdown(cancel_futures=True)

    def _fetch(self, name: str) -> torch.Tensor:
        tensor = self._weights.read(name)
        return tensor.pin_memory() if torch.cuda.is_available() else tensor


class InMemory:
    """Weights that have been read already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`."""
        return self._tensors[name]


class Parts:
    """A model whose parts have their weights only while they are in use.

    blocks    its decoder blocks
    device, dtype   where its weights are then, and as what
    """

    def __init__(
        self, model: Any, blocks: Blocks, weights: Weights, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.blocks, self.device, self.dtype = model, blocks, device, dtype
        self._weights, self._names = weights, stored_names(model)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as the checkpoint has it, on the CPU. Raises CheckpointError."""
        return self._weights.read(name)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index`, loaded. Raises as `load`."""
        prefix = f"{self.blocks.name(index)}."
        with self._loaded([name for name in self._names if name.startswith(prefix)]):
            yield self.blocks.modules[index]

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Everything outside the blocks is loaded, the head too. Raises as `load`."""
        prefix = f"{self.blocks.path}."
        with self._loaded([name for name in self._names if not name.startswith(prefix)]):
            self.model.tie_weights()
            yield
        self.model.tie_weights()  # what was tied goes back to the meta device too

    @contextmanager
    def _loaded(self, names: list[str]) -> Iterator[None]:
        load(self.model, names, self._weights, self.device, self.dtype)
        try:
            yield
        finally:
            release(self.model, names)


def build_skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal LM of a transformers config, in eval mode, every parameter on the meta device.

    Raises ModelError where transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"transformers cannot build a model of type {config.model_type}: {error}"
        ) from error
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside get their parameters on the meta device, and real buffers."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what the model's code computed to where its weights will be."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def stored_names(model: Any) -> list[str]:
    """Names of everything that a checkpoint of `model` holds; tied tensors under one name only."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]


def load(
    model: nn.Module,
    names: Iterable[str],
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Read the parameters and buffers `names` of `model`; floating-point ones become `dtype`.

    A buffer that the checkpoint lacks stays as the model's code made it. Raises CheckpointError for
    a parameter that is missing or of another shape, NumericsError for NaN or inf.
    """
    for name in names:
        owner, leaf, current = _place(model, name)
        if name not in weights and leaf in owner._buffers:
            continue
        tensor = weights.read(name)
        if tensor.shape != current.shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} in the checkpoint, and config.json makes it"
                f" {list(current.shape)}; the two do not belong together"
            )
        floats = tensor.is_floating_point()
        tensor = tensor.to(device, dtype if floats else None, non_blocking=True)
        if not torch.isfinite(tensor).all():
            raise NumericsError(f"{name} holds NaN or inf; the checkpoint is damaged")
        if leaf in owner._buffers:
            setattr(owner, leaf, tensor)
        else:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))


def release(model: nn.Module, names: Iterable[str]) -> None:
    """Send the parameters among `names` back to the meta device."""
    for name in names:
        owner, leaf, current = _place(model, name)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(current.to("meta"), requires_grad=False))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str, torch.Tensor]:
    """The module that holds the tensor `name`, its name there, and the tensor."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return owner, leaf, getattr(owner, leaf)
