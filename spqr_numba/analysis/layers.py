"""The linears of a dense model with what they get on a text: the material of every analysis."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..model.activations import Activations
from ..model.blocks import (
    check_causal,
    check_dense,
    find_blocks,
    find_linears,
    first_input,
    input_groups,
    pre_hook,
)
from ..model.calibration import load_texts, sample_windows, window_length
from ..model.skeleton import build_skeleton, load, release, stored_names
from ..model.source import open_source
from ..quantize.hessian import Hessian

__all__ = ["CalibratedLayer", "Heads", "calibrated_layers", "heads_of"]

BATCH_TOKENS = 4096
ROTATED = re.compile(r"(^|_)(q|k|query|key)(_|$)")
HEADS_IN_ROWS = re.compile(r"(^|_)(q|k|v|query|key|value)(_|$)")
HEADS_IN_COLUMNS = re.compile(r"^(o_proj|out_proj|dense)$")


@dataclass(frozen=True)
class Heads:
    """How the attention heads of a model lie in one weight.

    size      rows (or columns) a head
    axis      0: heads are runs of rows (q, k, v), 1: runs of columns (o)
    rotated   whether row i and row i + size/2 of a head are turned as a pair (q and k)
    """

    size: int
    axis: int = 0
    rotated: bool = False


@dataclass(frozen=True)
class CalibratedLayer:
    """One linear of a dense model: weight fp32 [m, n], hessian fp32 [n, n] of its inputs."""

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor
    heads: Heads | None = None


def heads_of(layer: str, config: Any) -> Heads | None:
    """Where the heads lie in the linear called `layer`, by its name; None for other linears.

    config is the model's transformers config. A name that is none of the usual ones has no heads.
    """
    kind = layer.rpartition(".")[2]
    config = config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if HEADS_IN_COLUMNS.match(kind):
        return Heads(size, axis=1)
    if not HEADS_IN_ROWS.search(kind):
        return None
    rotary = hasattr(config, "rope_parameters") or hasattr(config, "rope_theta")
    return Heads(size, rotated=rotary and bool(ROTATED.search(kind)))


@torch.no_grad()
def calibrated_layers(
    model: str | None,
    *,
    only: str = "",
    dataset: str | None = None,
    nsamples: int = 32,
    seqlen: int | None = None,
    seed: int = 0,
) -> Iterator[CalibratedLayer]:
    """Each linear of a dense model whose full name matches the regular expression `only`, in order.

    Other keywords are those of `compress`. One block is in memory at a time, and each gets what the
    dense model gives it. Raises InputError where `only` matches nothing, and ModelError, DataError
    or CheckpointError as `compress` does.
    """
    source = open_source(model)
    check_dense(source.config)
    check_causal(source.config)
    skeleton: Any = build_skeleton(source.config, torch.float32)
    blocks = find_blocks(skeleton)
    wanted = [_matching(b, blocks.name(i), only) for i, b in enumerate(blocks.modules)]
    if not any(wanted):
        raise InputError(f"the pattern {only!r} matches no linear of {source.label}")
    length = window_length(source.config, seqlen)
    windows = sample_windows(load_texts(dataset, source.tokenizer()), nsamples, length, seed)
    weights, place = source.weights(skeleton), (torch.device("cpu"), torch.float32)
    outside = [n for n in stored_names(skeleton) if not n.startswith(f"{blocks.path}.")]
    load(skeleton, outside, weights, *place)
    batch = max(1, BATCH_TOKENS // length)
    activations = Activations.start(skeleton, blocks.modules, windows, batch)
    for index, (block, names) in enumerate(zip(blocks.modules, wanted, strict=True)):
        inside = [n for n in stored_names(skeleton) if n.startswith(f"{blocks.name(index)}.")]
        load(skeleton, inside, weights, *place)
        for name, weight, hessian in _calibrate(block, index, names, activations):
            full_name = f"{blocks.name(index)}.{name}"
            yield CalibratedLayer(full_name, weight, hessian, heads_of(full_name, source.config))
        if not any(wanted[index + 1 :]):
            return
        activations.advance(block, index)
        release(skeleton, inside)


def _matching(block: nn.Module, name: str, only: str) -> list[str]:
    return [linear for linear in find_linears(block) if re.search(only, f"{name}.{linear}")]


def _calibrate(
    block: nn.Module, index: int, names: list[str], activations: Activations
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, weight, Hessian) of the linears `names` of a loaded block."""
    linears = {name: module for name, module in find_linears(block).items() if name in names}
    if not linears:
        return
    groups = input_groups(linears, lambda: activations.run_first(block, index))
    hessians = [Hessian(linears[group.names[0]].in_features) for group in groups]
    with ExitStack() as hooks:
        for group, hessian in zip(groups, hessians, strict=True):
            hook = _adding_to(hessian)
            hooks.enter_context(pre_hook(linears[group.names[0]], hook))
        activations.run_all(block, index)
    matrices = {
        name: hessian.matrix
        for group, hessian in zip(groups, hessians, strict=True)
        for name in group.names
    }
    for name, linear in linears.items():
        if name in matrices:
            yield name, linear.weight.detach().clone(), matrices[name]


def _adding_to(hessian: Hessian) -> Any:
    return lambda _, args, kwargs: hessian.add(first_input(args, kwargs))
