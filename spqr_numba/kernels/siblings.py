"""Weights that share an input, side by side in memory: one launch multiplies by all of them.

    records, second_level    each sibling's rows behind those of the one before
    runs                     the same; run_starts count from the beginning of the first's
    target                   the one that all have

Each stays a PreparedMatrix of its own. Its buffers are views of the whole's, and `runs` and
`target` are the whole's own: run_starts says which runs are whose. Nothing is in memory twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from ..errors import InputError
from ..format.matrix import SpqrMatrix
from .prepared import PreparedMatrix
from .runs import LOAD_WORDS, TILE_ROWS, segments_of

__all__ = ["join", "kinship", "whole_of"]


def kinship(weight: PreparedMatrix) -> Hashable:
    """Equal for weights that can be joined; None for one that cannot be.

    Equal permutations come from one Hessian, which is that of one input.
    """
    spec = weight.spec
    whole_blocks = spec.out_features % spec.stats_group_size == 0
    if weight.whole is not None or "target" not in weight.tensors or not whole_blocks:
        return None
    target = weight["target"].cpu().numpy().tobytes()
    return weight.device, replace(spec, out_features=1), tuple(weight.tensors), target


def join(weights: Sequence[PreparedMatrix]) -> list[PreparedMatrix]:
    """The same weights as parts of one. Raises InputError unless they are of one kinship."""
    kinships = {kinship(weight) for weight in weights}
    if len(kinships) != 1 or None in kinships:
        raise InputError(
            "weights of different settings, permutations or devices cannot be joined, nor can parts"
            " of a whole or those whose rows end within a stats block"
        )
    rows = sum(weight.spec.out_features for weight in weights)
    whole = PreparedMatrix(replace(weights[0].spec, out_features=rows), joined_buffers(weights))
    parts, first_row = [], 0
    for weight in weights:
        tensors = buffers_of_rows(whole, first_row, weight)
        parts.append(PreparedMatrix(weight.spec, tensors, whole, first_row))
        first_row += weight.spec.out_features
    return parts


def joined_buffers(weights: Sequence[PreparedMatrix]) -> dict[str, torch.Tensor]:
    """The buffers of the whole."""
    tensors = {}
    for name in weights[0].tensors:
        if name == "target":
            tensors[name] = weights[0][name]
        elif name == "run_starts":
            tensors[name] = joined_starts(weights)
        else:
            tensors[name] = torch.cat([weight[name] for weight in weights])
    return tensors


def joined_starts(weights: Sequence[PreparedMatrix]) -> torch.Tensor:
    """The run_starts of the whole: where one sibling's end, the next one's begin."""
    starts, first = [weights[0]["run_starts"][:1]], 0
    for weight in weights:
        starts.append(weight["run_starts"][1:] + first)
        first += len(weight["runs"]) // LOAD_WORDS
    return torch.cat(starts)


def buffers_of_rows(
    whole: PreparedMatrix, first_row: int, weight: PreparedMatrix
) -> dict[str, torch.Tensor]:
    """The buffers of as many rows as `weight` has, as views where not all rows share one."""
    tensors = dict(whole.tensors)
    first_tile = first_row // TILE_ROWS
    tensors["records"] = whole["records"].narrow(0, first_tile, weight.tiles)
    stats_group = first_row // whole.spec.stats_group_size
    stats_groups = weight.spec.stats_groups
    tensors["second_level"] = whole["second_level"].narrow(0, stats_group, stats_groups)
    if "run_starts" in tensors:
        segments = segments_of(whole.spec)
        first, count = first_tile * segments, weight.tiles * segments + 1
        tensors["run_starts"] = whole["run_starts"].narrow(0, first, count)
    return tensors


def whole_of(parts: Sequence[SpqrMatrix | PreparedMatrix]) -> PreparedMatrix | None:
    """The weight that these are the parts of, all of them and in order; None if there is none."""
    first, row = parts[0], 0
    whole = first.whole if isinstance(first, PreparedMatrix) else None
    for part in parts:
        if not isinstance(part, PreparedMatrix) or (part.whole, part.first_row) != (whole, row):
            return None
        row += part.spec.out_features
    return whole if whole is not None and whole.spec.out_features == row else None
