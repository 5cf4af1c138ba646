"""Compressed weights that never were weights: random buffers, for timing without quantizing."""

from __future__ import annotations

import torch

from ..format.layout import UNQUANTIZED_BITS, MatrixSpec, index_dtype
from ..format.matrix import SpqrMatrix
from ..format.packing import outliers_to_csr, pack_codes, pack_statistics

__all__ = ["random_matrix"]

SCALE = 0.01
OUTLIER_SIZE = 0.2


def random_matrix(spec: MatrixSpec, outlier_share: float, seed: int = 0) -> SpqrMatrix:
    """A permuted matrix of random codes and statistics on the CPU; no outliers for share 0."""
    random = torch.Generator().manual_seed(seed)
    m, n = spec.out_features, spec.in_features
    codes = torch.randint(2**spec.bits, (n, m), generator=random, dtype=torch.uint8)
    tensors = {"codes": pack_codes(codes, spec.bits)}
    tensors |= random_statistics(spec, "scale", spec.scale_bits, SCALE, random)
    tensors |= random_statistics(spec, "zero", spec.zero_bits, 2.0 ** (spec.bits - 1), random)
    if outlier_share:
        values = OUTLIER_SIZE * torch.randn(m, n, generator=random)
        kept = torch.rand(m, n, generator=random) < outlier_share
        tensors |= outliers_to_csr(torch.where(kept, values, 0).half())
    order = torch.randperm(n, generator=random)
    tensors["permutation"] = order.to(index_dtype(n))
    return SpqrMatrix(spec, tensors)


def random_statistics(
    spec: MatrixSpec, name: str, bits: int, size: float, random: torch.Generator
) -> dict[str, torch.Tensor]:
    """Scales or zeros between size / 2 and 3/2 size."""

    def half(*shape: int) -> torch.Tensor:
        return (size * (0.5 + torch.rand(shape, generator=random))).half()

    if bits == UNQUANTIZED_BITS:
        return {f"{name}s": half(spec.groups, spec.out_features)}
    shape = (spec.groups, spec.out_features)
    codes = torch.randint(2**bits, shape, generator=random, dtype=torch.uint8)
    return {
        f"{name}_codes": pack_statistics(codes, bits),
        f"{name}_scale": half(spec.groups, spec.stats_groups) / 2**bits,
        f"{name}_zero": half(spec.groups, spec.stats_groups) / 2,
    }
