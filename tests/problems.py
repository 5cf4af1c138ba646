"""Random problems: a layer to be quantized, and buffers of a weight that never was a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spqr_numba.format.layout import UNQUANTIZED_BITS, MatrixSpec, index_dtype
from spqr_numba.format.matrix import SpqrMatrix

from . import oracle


@dataclass
class Problem:
    """weight fp32 [m, n], inputs fp32 [samples, n], hessian fp32 [n, n] = (2/N) sum x x^T."""

    weight: torch.Tensor
    inputs: torch.Tensor
    hessian: torch.Tensor


def make_problem(
    rows: int,
    columns: int,
    seed: int = 0,
    *,
    samples: int | None = None,
    dead: tuple[int, ...] = (),
) -> Problem:
    """A weight with a few large entries and inputs that correlate; those in `dead` stay 0."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    weight = normal(rows, columns) * 0.02
    heavy = torch.rand(rows, columns, generator=random) < 0.01
    weight = torch.where(heavy, weight * 8, weight)

    mixing = normal(columns, columns) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(normal(columns))  # some inputs are louder than others, all are distinct
    inputs = (normal(samples or 4 * columns, columns) @ mixing) * sizes
    inputs[:, list(dead)] = 0
    exact = inputs.double()
    hessian = (2 / len(exact) * exact.T @ exact).float()
    return Problem(weight, inputs, hessian)


def make_spec(rows: int, columns: int, **settings: int) -> MatrixSpec:
    """A spec with the paper's settings but for those given."""
    paper = {
        "bits": 3,
        "group_size": 16,
        "stats_group_size": 16,
        "scale_bits": 3,
        "zero_bits": 3,
    }
    return MatrixSpec(out_features=rows, in_features=columns, **(paper | settings))


def make_matrix(
    spec: MatrixSpec,
    outliers: Sequence[int] | int | None = 2,
    *,
    permuted: bool = True,
    seed: int = 0,
) -> SpqrMatrix:
    """Random buffers; `outliers` is how many each row has (one number for all), None for none."""
    random = np.random.default_rng(seed)
    m, n = spec.out_features, spec.in_features
    codes = random.integers(0, 2**spec.bits, (n, m))
    tensors = {"codes": torch.from_numpy(oracle.write_codes(codes, spec.bits))}
    tensors |= _statistics(spec, "scale", spec.scale_bits, 0.01, random)
    tensors |= _statistics(spec, "zero", spec.zero_bits, 2**spec.bits / 2, random)
    if outliers is not None:
        counts = [outliers] * m if isinstance(outliers, int) else outliers
        tensors |= _outliers(spec, counts, random)
    if permuted:
        order = torch.from_numpy(random.permutation(n))
        tensors["permutation"] = order.to(index_dtype(n))
    return SpqrMatrix(spec, tensors)


def _statistics(
    spec: MatrixSpec, name: str, bits: int, size: float, random: np.random.Generator
) -> dict[str, torch.Tensor]:
    """First- and second-level buffers of scales or zeros between size / 2 and 2 size or so."""

    def half(*shape: int, scale: float) -> torch.Tensor:
        return torch.from_numpy((random.uniform(0.5, 1, shape) * scale).astype(np.float16))

    if bits == UNQUANTIZED_BITS:
        return {f"{name}s": half(spec.groups, spec.out_features, scale=2 * size)}
    codes = random.integers(0, 2**bits, (spec.out_features, spec.groups))
    return {
        f"{name}_codes": torch.from_numpy(oracle.write_statistics(codes, bits)),
        f"{name}_scale": half(spec.groups, spec.stats_groups, scale=size / 2**bits),
        f"{name}_zero": half(spec.groups, spec.stats_groups, scale=size),
    }


def _outliers(
    spec: MatrixSpec, counts: Sequence[int], random: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The sparse part with counts[i] outliers in row i, columns ascending."""
    n = spec.in_features
    columns = [np.sort(random.choice(n, count, replace=False)) for count in counts]
    values = random.normal(0, 0.2, sum(counts)).astype(np.float16)
    return {
        "outlier_row_offsets": torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        "outlier_columns": torch.from_numpy(np.concatenate(columns)).to(index_dtype(n)),
        "outlier_values": torch.from_numpy(values),
    }
