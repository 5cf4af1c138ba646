"""Random problems: a layer to be quantized, and the spec of a compressed weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spqr_numba.format.layout import MatrixSpec


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
