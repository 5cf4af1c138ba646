"""Which weights are worth 32 bits: the threshold on their Hessian-weighted error."""

from __future__ import annotations

import math

import torch

__all__ = ["outlier_threshold"]


def outlier_threshold(weight: torch.Tensor, upper: torch.Tensor, relative: float | None) -> float:
    """T = relative * mean_j( var_i(W_ij) / U_jj^2 ); inf where no outliers are to be kept.

    weight fp32 [m, n] and upper (U) fp32 [n, n] in the same column order. A weight without variance
    (one row, or all rows alike) has no measure of what is large and keeps no outliers. Source: the
    reference implementation of arXiv 2306.03078.
    """
    if relative is None or len(weight) < 2:
        return math.inf
    mean = (weight.var(0) / upper.diagonal().square()).mean().item()
    return relative * mean if mean > 0 else math.inf
