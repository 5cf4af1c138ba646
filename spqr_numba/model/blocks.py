"""Decoder blocks and their linears, found by structure: no tables of model or module names.

A causal LM is embeddings, one ModuleList of decoder blocks, a final norm and a head. The list that
holds the most weights is that of the blocks; every nn.Linear inside is compressed. Weights that
are not in an nn.Linear (Conv1D of GPT-2, fused experts) cannot be, and raise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import SpqrConfig
from ..errors import ConfigError, ModelError

__all__ = [
    "Blocks",
    "check_causal",
    "check_dense",
    "find_blocks",
    "find_linears",
    "find_norms",
    "input_groups",
    "outer_norms",
    "plan",
]

MAX_NAMED = 3


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model, in the order in which they run.

    path       name of their ModuleList in the model ("model.layers")
    modules    the blocks
    """

    path: str
    modules: list[nn.Module]

    def __len__(self) -> int:
        return len(self.modules)

    def name(self, index: int) -> str:
        """Full name of block `index`: "model.layers.3"."""
        return f"{self.path}.{index}"


def check_dense(config: Any) -> None:
    """Raise ModelError where a transformers config is that of a quantized model."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "an unnamed method")
        raise ModelError(
            f"the model is already quantized ({method}); start from its original, dense checkpoint"
        )


def check_causal(config: Any) -> None:
    """Raise ModelError where a transformers config is not that of a causal LM."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type} is an encoder-decoder, and only decoder-only (causal) language"
            " models are handled"
        )
    if not _is_causal(config):
        named = ", ".join(config.architectures or []) or config.model_type
        raise ModelError(
            f"{named} is not a causal language model (it cannot predict the next token); use the"
            " checkpoint of a ...ForCausalLM model"
        )


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    causal_classes = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not config.architectures:
        return getattr(config, "is_decoder", True)
    return any(architecture in causal_classes for architecture in config.architectures)


def find_blocks(model: nn.Module) -> Blocks:
    """The model's decoder blocks: its ModuleList that holds the most weights.

    Raises ModelError where the model has none.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks (nn.ModuleList)")
    path, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return Blocks(path, list(found))


def find_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Name in the block -> every nn.Linear of it, in the order of definition."""
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def find_norms(model: nn.Module, blocks: Blocks) -> list[str]:
    """Full names of the weights of all norms in the blocks.

    A norm is what has a weight with one dimension. Those that share their weight with another
    module are left out: a change would be one of both.
    """
    return [name for name in _all_norms(model) if name.startswith(f"{blocks.path}.")]


def outer_norms(model: nn.Module, blocks: Blocks) -> list[str]:
    """The same of those outside the blocks."""
    return [name for name in _all_norms(model) if not name.startswith(f"{blocks.path}.")]


def _all_norms(model: nn.Module) -> list[str]:
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in named)
    return [
        name
        for name, parameter in named
        if name.endswith(".weight") and parameter.ndim == 1 and uses[id(parameter)] == 1
    ]


def plan(blocks: Blocks, config: SpqrConfig) -> dict[str, SpqrConfig]:
    """Full name -> settings of every linear that is to be compressed.

    Raises ModelError for weights that cannot be (unless `config.skip` leaves them out), and
    ConfigError where nothing is left or a pattern of `config` matches nothing.
    """
    linears: list[str] = []
    others: list[str] = []
    for index, block in enumerate(blocks.modules):
        prefix = blocks.name(index)
        linears += [f"{prefix}.{name}" for name in find_linears(block)]
        others += _other_weights(block, prefix, config)
    _check_patterns([*linears, *others], config)
    settings = {name: config.for_module(name) for name in linears}
    planned = {name: chosen for name, chosen in settings.items() if chosen is not None}
    if not planned:
        raise ConfigError(f"skip leaves none of the {len(linears)} linears to compress")
    return planned


def _other_weights(block: nn.Module, prefix: str, config: SpqrConfig) -> list[str]:
    """Full names of the modules that hold a matrix but are no nn.Linear; all must be skipped."""
    found = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            continue
        full_name = f"{prefix}.{name}".rstrip(".")
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue  # norms, biases
            found.append(full_name)
            if config.for_module(full_name) is not None:
                raise ModelError(
                    f"{full_name} ({type(module).__name__}) holds {parameter_name}"
                    f" {list(parameter.shape)}, and only weights of nn.Linear can be compressed;"
                    f" leave it dense with a skip pattern such as {name.split('.')[-1]!r}"
                )
    return found


def _check_patterns(names: list[str], config: SpqrConfig) -> None:
    for pattern in (*config.skip, *(pattern for pattern, _ in config.overrides)):
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"the pattern {pattern!r} matches no weight of a block; their names look like"
                f" {', '.join(names[:MAX_NAMED])}"
            )


@dataclass(frozen=True)
class InputGroup:
    """Linears that are called with the same tensors.

    names    of the linears
    calls    how often each is called in one forward pass of the block
    """

    names: tuple[str, ...]
    calls: int


def input_groups(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> list[InputGroup]:
    """The linears that share their inputs, in the order in which they run.

    `run` is one forward pass of their block. Two linears share an input when they are called with
    the same tensor object, unchanged in between: no names are looked at. A linear that `run` never
    calls is in no group.
    """
    inputs: dict[str, list[tuple[torch.Tensor, int]]] = {}

    def remember(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_input(args, kwargs)
            inputs.setdefault(name, []).append((x, x._version))

        return hook

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.enter_context(pre_hook(linear, remember(name)))
        run()
    groups: dict[tuple, list[str]] = {}
    for name, calls in inputs.items():
        groups.setdefault(tuple((id(x), version) for x, version in calls), []).append(name)
    return [InputGroup(tuple(names), len(calls)) for calls, names in groups.items()]


def first_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The tensor that a module was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def pre_hook(module: nn.Module, hook: Callable) -> Any:
    """A context in which hook(module, args, kwargs) runs before each call of `module`."""
    return module.register_forward_pre_hook(hook, with_kwargs=True)
