"""The order in which input columns are quantized; groups are cut in this order."""

from __future__ import annotations

import torch

from ..errors import InputError

__all__ = ["column_order"]


def column_order(
    permutation: str, diagonal: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """int64 [n]: the input column that comes j-th.

    permutation  "identity"; "act-order", by diag H (fp32 [n]) falling, as GPTQ does; "spearman",
                 neighbours alike in the ranks of their weights (section 4.1 of arXiv 2306.03078)
    weight       fp32 [m, n], needed by "spearman" alone; raises InputError where it is missing
    """
    if permutation == "identity":
        return torch.arange(len(diagonal), device=diagonal.device)
    if permutation == "act-order":
        return torch.argsort(diagonal, descending=True, stable=True)
    if weight is None:
        raise InputError("the spearman order compares columns of a weight, and none was given")
    return nearest_neighbour_chain(rank_correlation(weight), int(diagonal.argmax()))


def rank_correlation(weight: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation of the columns of a weight [m, n], up to a factor: fp32 [n, n]."""
    ranks = weight.argsort(dim=0, stable=True).argsort(dim=0).to(torch.float32)
    ranks -= ranks.mean(0)
    return ranks.T @ ranks


def nearest_neighbour_chain(similarity: torch.Tensor, start: int) -> torch.Tensor:
    """Greedy chain [n]: from `start`, always on to the most similar column not yet visited."""
    remaining = similarity.clone()
    order = [start]
    for _ in range(len(similarity) - 1):
        remaining[:, order[-1]] = -torch.inf
        order.append(int(remaining[order[-1]].argmax()))
    return torch.tensor(order, device=similarity.device)
