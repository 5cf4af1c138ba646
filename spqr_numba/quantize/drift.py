"""Asymmetric calibration: what a weight aims at once its inputs are not what they were.

The blocks compressed before give a layer inputs x where the dense model gives x~. It is to return
W x~ all the same, so over the calibration inputs W_hat minimises

    (2/N) sum |W_hat x - W x~|^2  +  damping |W_hat - W|^2

Without rounding this is least squares. With H' the damped H = (2/N) sum x x^T, and the drift
D = (2/N) sum (x~ - x) x^T, the best weight is

    A = W + W D H'^-1 = W + W D U^T U

and any W_hat costs tr((W_hat - A) H' (W_hat - A)^T) more than A does. That is what the column loop
minimises, so it takes A in the place of W, and nothing else changes. Where nothing drifts A is W.

GPTAQ (arXiv 2504.02692) adds, while it walks, W_j D_j to the columns behind j alone: with the W of
the beginning that is W triu(D U^T, 1) U, the part of the same correction that does not go back.
"""

from __future__ import annotations

import torch

from ..errors import NumericsError
from .hessian import Factorization, is_finite

__all__ = ["aimed_at"]


def aimed_at(columns: torch.Tensor, factor: Factorization) -> torch.Tensor:
    """A for the permuted columns fp32 [n, m] of a weight: itself, where no drift is known.

    Raises NumericsError where it is not finite.
    """
    if factor.drift is None or factor.upper is None:
        return columns
    missed = factor.drift.T @ columns
    aim = torch.addmm(columns, factor.upper.T, factor.upper @ missed)
    if not is_finite(aim):
        raise NumericsError(
            "the inputs have drifted too far from the dense model's to be made good; use a larger"
            " damping, or no asymmetric calibration"
        )
    return aim
