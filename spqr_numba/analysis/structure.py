"""Where in a weight the outliers are: in heads, rotary pairs, rows, columns, or nowhere special.

A unit (a head, a pair of rows, a row, a column) is heavy where it holds so many more outliers than
its peers that chance does not explain it: at least FACTOR times the mean of the units that are not
heavy, and a Poisson tail under SIGNIFICANCE over all units of its kind. Each outlier belongs to the
first heavy unit that holds it, in the order below, so the shares add up to 1:

    head            a run of rows (q, k, v) or columns (o); judged without the heaviest quarter of
                    its rows, so that one heavy row makes no heavy head
    rotary pair     rows i and i + d/2 of a head, which rotary embeddings turn together, both heavy
    row, column     a row against the other rows of its head where that is heavy, else against all
    unstructured    the rest

The five patterns are those of figure 2 of arXiv 2306.03078.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError
from .layers import Heads

__all__ = ["StructureScores", "structure_scores"]

Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]

FACTOR = 3.0
SIGNIFICANCE = 1e-3
SPARED = 4  # a head is judged without one in so many of its rows, the heaviest


@dataclass(frozen=True)
class StructureScores:
    """Shares of the outliers, which add up to 1 (all 0 where there is none)."""

    heads: float
    rotary_pairs: float
    rows: float
    columns: float
    unstructured: float

    def to_dict(self) -> dict[str, float]:
        """Pattern -> share."""
        return asdict(self)


def structure_scores(mask: Mask, heads: Heads | None = None) -> StructureScores:
    """The scores of outliers `mask` (bool [m, n], columns in the layer's own order).

    Without `heads` nothing is attributed to heads and rotary pairs. Raises InputError for a mask
    that is no bool matrix, or that heads of that size do not divide.
    """
    _check(mask, heads)
    total = int(mask.sum())
    if not total:
        return StructureScores(0.0, 0.0, 0.0, 0.0, 0.0)
    shares = {}
    left = mask.copy()
    patterns = [*_members(mask, heads), np.ones((1, 1), dtype=bool)]
    for field, members in zip(fields(StructureScores), patterns, strict=True):
        shares[field.name] = int((left & members).sum()) / total
        left &= ~members
    return StructureScores(**shares)


def _check(mask: Mask, heads: Heads | None) -> None:
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise InputError(f"the mask is {mask.dtype} {list(mask.shape)}; it must be bool [m, n]")
    if heads is not None and mask.shape[heads.axis] % heads.size:
        raise InputError(
            f"heads of {heads.size} do not divide a weight of {list(mask.shape)} along axis"
            f" {heads.axis}"
        )


def _members(mask: Mask, heads: Heads | None) -> list[Mask]:
    """For heads, rotary pairs, rows and columns: bool [m, n] or what broadcasts to it."""
    axis = 0 if heads is None else heads.axis
    lines = mask.sum(1 - axis)  # outliers of each row, or column where heads are columns
    of_head = np.zeros(len(lines), dtype=bool)
    if heads is not None:
        of_head = np.repeat(_heavy_heads(lines, heads.size), heads.size)
    heavy = _heavy_lines(lines, of_head, heads)
    paired = _paired(heavy, heads)
    along, across = (of_head, paired, heavy & ~paired), _heavy(mask.sum(axis))
    if axis == 0:
        return [*(lines[:, None] for lines in along), across[None, :]]
    heads_, pairs, columns = (lines[None, :] for lines in along)
    return [heads_, pairs, across[:, None], columns]


def _heavy_heads(lines: Counts, size: int) -> Mask:
    by_head = np.sort(lines.reshape(-1, size), axis=1)
    return _heavy(by_head[:, : size - size // SPARED].sum(1))


def _heavy_lines(lines: Counts, of_head: Mask, heads: Heads | None) -> Mask:
    """Each line of a heavy head against its head, all others against each other."""
    heavy = np.zeros(len(lines), dtype=bool)
    heavy[~of_head] = _heavy(lines[~of_head])
    if heads is not None:
        for start in range(0, len(lines), heads.size):
            own = slice(start, start + heads.size)
            if of_head[start]:
                heavy[own] = _heavy(lines[own])
    return heavy


def _paired(heavy: Mask, heads: Heads | None) -> Mask:
    """Heavy lines whose rotary partner is heavy too."""
    if heads is None or not heads.rotated:
        return np.zeros_like(heavy)
    halves = heavy.reshape(-1, 2, heads.size // 2)
    return np.repeat(halves.all(1, keepdims=True), 2, axis=1).reshape(-1)


def _heavy(counts: Counts) -> Mask:
    """Which units hold more than chance explains; one alone has no peers and is none."""
    heavy = np.zeros(len(counts), dtype=bool)
    if len(counts) < 2:
        return heavy
    while True:
        usual = counts[~heavy].mean() if not heavy.all() else 0.0
        found = (counts >= FACTOR * usual) & (_chance(counts, usual) * len(counts) < SIGNIFICANCE)
        if not (found & ~heavy).any():
            return heavy
        heavy |= found


def _chance(counts: Counts, mean: float) -> NDArray[np.float64]:
    """P(X >= count) of a Poisson X: the regularised lower incomplete gamma function."""
    order = torch.from_numpy(np.maximum(counts, 1)).double()
    tail = torch.special.gammainc(order, torch.full_like(order, mean)).numpy()
    return np.where(counts > 0, tail, 1.0)
