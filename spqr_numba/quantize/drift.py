"""Asymmetric calibration: what a weight aims at once its inputs are not what they were.

What was compressed before gives a layer inputs x where the dense model gives x~. It is to return
W x~ all the same. Over the calibration inputs that is least squares,

    (2/N) sum |A x - W x~|^2  +  damping |A - W|^2

and with H = (2/N) sum x x^T and the drift D = (2/N) sum (x~ - x) x^T the best weight is

    A = W + W D (H + damping)^-1

Without damping any W_hat costs tr((W_hat - A) H (W_hat - A)^T) more than A, and that is what the
column loop minimises: it takes A in the place of W, and nothing else changes. Where nothing has
drifted A is W.

The damping here is a strong one. Much of D is the calibration text's own, most of all where H is
small; with the damping of the column loop, A can be worse than W on text of another kind.

GPTAQ (arXiv 2504.02692) adds, while it walks, W_j D_j to the columns behind j alone: with the W of
the beginning that is W triu(D U^T, 1) U, the part of W D U^T U that does not go back.
"""

from __future__ import annotations

import torch

from ..errors import NumericsError
from .hessian import Factorization, is_finite

__all__ = ["aimed_at"]

DAMPING = 1.0  # share of mean(diag H), where that of the column loop is not larger still


def aimed_at(columns: torch.Tensor, factor: Factorization) -> torch.Tensor:
    """A for the permuted columns fp32 [n, m] of a weight: themselves, where no drift is known.

    Raises NumericsError where it is not finite.
    """
    if factor.drift is None or factor.hessian is None or factor.upper is None:
        return columns
    damped = factor.hessian.clone()
    damped.diagonal().add_(max(DAMPING, factor.damping) * damped.diagonal().mean())
    damped.diagonal()[factor.dead] = 1
    lower, _ = torch.linalg.cholesky_ex(damped)
    aim = columns + torch.cholesky_solve(factor.drift.T @ columns, lower)
    if not is_finite(aim):
        raise NumericsError(
            "the inputs have drifted too far from the dense model's to be made good; calibrate"
            " without asymmetric"
        )
    return aim
