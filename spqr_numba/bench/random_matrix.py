"""Compressed weights that never were weights: random buffers, for timing and testing alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..format.layout import UNQUANTIZED_BITS, MatrixSpec, index_dtype
from ..format.matrix import SpqrMatrix
from ..format.packing import pack_codes, pack_statistics

__all__ = ["random_matrix"]

SCALE = 0.01
OUTLIER_SIZE = 0.2


def random_matrix(
    spec: MatrixSpec,
    outliers: Sequence[int] | int | None = 2,
    *,
    permuted: bool = True,
    seed: int = 0,
) -> SpqrMatrix:
    """A matrix on the CPU; `outliers` is how many each row has (one number for all), or None."""
    random = torch.Generator().manual_seed(seed)
    m, n = spec.out_features, spec.in_features
    codes = torch.randint(2**spec.bits, (n, m), generator=random, dtype=torch.uint8)
    tensors = {"codes": pack_codes(codes, spec.bits)}
    tensors |= random_statistics(spec, "scale", spec.scale_bits, SCALE, random)
    tensors |= random_statistics(spec, "zero", spec.zero_bits, 2.0 ** (spec.bits - 1), random)
    if outliers is not None:
        counts = [outliers] * m if isinstance(outliers, int) else outliers
        tensors |= random_outliers(n, counts, random)
    if permuted:
        tensors["permutation"] = torch.randperm(n, generator=random).to(index_dtype(n))
    return SpqrMatrix(spec, tensors)


def random_statistics(
    spec: MatrixSpec, name: str, bits: int, size: float, random: torch.Generator
) -> dict[str, torch.Tensor]:
    """First- and second-level buffers of scales or zeros between size / 2 and 2 size."""

    def half(width: int, largest: float) -> torch.Tensor:
        return (largest * (0.5 + torch.rand(spec.groups, width, generator=random) / 2)).half()

    if bits == UNQUANTIZED_BITS:
        return {f"{name}s": half(spec.out_features, 2 * size)}
    shape = spec.groups, spec.out_features
    codes = torch.randint(2**bits, shape, generator=random, dtype=torch.uint8)
    return {
        f"{name}_codes": pack_statistics(codes, bits),
        f"{name}_scale": half(spec.stats_groups, size / 2**bits),
        f"{name}_zero": half(spec.stats_groups, size),
    }


def random_outliers(
    columns: int, counts: Sequence[int], random: torch.Generator
) -> dict[str, torch.Tensor]:
    """The sparse part with counts[i] outliers in row i, columns ascending."""
    rows = [torch.randperm(columns, generator=random)[:count].sort().values for count in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    values = OUTLIER_SIZE * torch.randn(sum(counts), generator=random)
    return {
        "outlier_row_offsets": offsets.to(torch.int32),
        "outlier_columns": torch.cat(rows).to(index_dtype(columns)),
        "outlier_values": values.half(),
    }
