"""The Hessian of one layer's inputs, and its factor U that every error is weighed and spread with.

H = (2/N) sum x x^T over the layer's N calibration inputs. Inputs of 16 bits are multiplied in TF32
on a GPU: their products are exact in it, and sums are fp32 as ever. U is upper triangular with
U^T U = H^-1 (H permuted, shrunk and damped): the inverse of the reversed Cholesky factor, so that
one Cholesky and one triangular inverse suffice. With J the reversal of order and J H J = L L^T,
H = (J L J)(J L J)^T and U = J L^-1 J.

Shrunk: off the diagonal times 1 - shrinkage. Which inputs are large, any text says; which ones go
together, each says a little otherwise, and U spreads errors by it. The target of this shrinkage is
the diagonal, as in Schaefer and Strimmer, doi:10.2202/1544-6115.1175.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..config import SpqrConfig
from ..errors import InputError, NumericsError
from .permutation import column_order

__all__ = ["Factorization", "Hessian", "factorize", "is_finite", "tensor_cores"]

log = logging.getLogger(__name__)

PANEL = 512  # columns of a Hessian that one product accumulates
DAMPING_STEPS = 6
DAMPING_FLOOR = 0.01
DAMPING_GROWTH = 10.0


class Hessian:
    """Accumulates H = (2/N) sum x x^T in fp32 over inputs x [in_features], or a weighed sum.

    And, where it is told what the dense model has in their place, the drift of drift.py.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._drift: torch.Tensor | None = None
        self._inputs = 0

    def add(
        self,
        inputs: torch.Tensor,
        dense: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add inputs [..., in_features], any float dtype; `dense` is like them.

        weights [...] say how often each counts. On a GPU they round inputs of 16 bits to 11 once
        more, of which sums hear nothing.

        Raises InputError for another width, or another shape of `dense`.
        """
        n = len(self._sum)
        if inputs.shape[-1] != n:
            raise InputError(f"inputs have {inputs.shape[-1]} features; the Hessian has {n}")
        if dense is not None and dense.shape != inputs.shape:
            raise InputError(
                f"dense inputs are {list(dense.shape)}; they must be {list(inputs.shape)}"
            )
        x = inputs.reshape(-1, n).to(torch.float32)
        self._inputs += len(x)
        drift = None if dense is None else dense.reshape(-1, n).to(torch.float32) - x
        if weights is not None:
            root = weights.reshape(-1, 1).sqrt()
            x = x * root
            drift = None if drift is None else drift * root
        with tensor_cores(inputs.is_cuda and inputs.itemsize == 2):
            for start in range(0, n, PANEL):  # the lower triangle of panels follows by symmetry
                panel = x[:, start : start + PANEL]
                self._sum[start : start + PANEL, start:].addmm_(panel.T, x[:, start:])
            if drift is not None:
                self._add_drift(x, drift)

    def _add_drift(self, x: torch.Tensor, difference: torch.Tensor) -> None:
        if self._drift is None:
            self._drift = torch.zeros_like(self._sum)
        self._drift.addmm_(difference.T, x)

    @property
    def matrix(self) -> torch.Tensor:
        """H: fp32 [in_features, in_features]. Raises NumericsError for NaN or inf."""
        for start in range(0, len(self._sum), PANEL):  # in place: H can be gigabytes
            stop = start + PANEL
            square = self._sum[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
        return self._mean(self._sum)

    @property
    def drift(self) -> torch.Tensor | None:
        """D: fp32 [in_features, in_features]; None where no dense inputs were given.

        Raises NumericsError for NaN or inf.
        """
        return None if self._drift is None else self._mean(self._drift)

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        mean = total * (2 / max(self._inputs, 1))
        if not is_finite(mean):
            raise NumericsError("the layer's inputs hold NaN or inf; check the model's weights")
        return mean


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor inf; unlike torch.isfinite, makes no copy of it."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


@contextmanager
def tensor_cores(allowed: bool) -> Iterator[None]:
    """Matrix products of fp32 in TF32 (11 bits of each factor), if `allowed`; as set otherwise."""
    matmul = torch.backends.cuda.matmul
    name, value = (
        ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    )
    before = getattr(matmul, name)
    setattr(matmul, name, value if allowed else before)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@dataclass(frozen=True)
class Factorization:
    """What quantizing needs to know of a layer's inputs; shared by layers with the same inputs.

    order     int64 [n]     the input that each permuted column belongs to
    hessian   fp32 [n, n]   permuted, neither shrunk nor damped; None where nothing is known of the
                            inputs
    upper     fp32 [n, n]   U; None where weights are rounded to nearest
    dead      bool [n]      inputs that were always 0, permuted
    damping   share of mean(diag H) that was added
    drift     fp32 [n, n]   permuted; None where inputs are taken for those of the dense model
    """

    order: torch.Tensor
    hessian: torch.Tensor | None
    upper: torch.Tensor | None
    dead: torch.Tensor
    damping: float
    drift: torch.Tensor | None = None


def factorize(
    hessian: torch.Tensor,
    config: SpqrConfig,
    weight: torch.Tensor | None = None,
    drift: torch.Tensor | None = None,
) -> Factorization:
    """Order, shrink, damp and factorise H (fp32 [n, n]).

    weight fp32 [m, n] is only read for permutation="spearman", drift fp32 [n, n] (drift.py) is only
    put into the same order. Where H with its damping is not
    positive definite the damping grows tenfold, up to six times; then NumericsError, or, with
    on_failed_factorization="round-to-nearest", a Factorization without U.
    """
    order = column_order(config.permutation, hessian.diagonal(), weight)
    permuted = hessian[order][:, order]
    drift = None if drift is None else drift[order][:, order]
    dead = permuted.diagonal() == 0
    for damping in damping_steps(config.damping):
        upper = inverse_cholesky(permuted, dead, damping, config.shrinkage)
        if upper is not None:
            return Factorization(order, permuted, upper, dead, damping, drift)
        log.warning("the Hessian is not positive definite with damping %g; trying more", damping)
    if config.on_failed_factorization == "round-to-nearest":
        log.warning("no damping helps; rounding this layer to nearest")
        return Factorization(order, permuted, None, dead, damping)
    raise NumericsError(
        f"the Hessian cannot be factorised, even with damping {damping:g}; use more calibration"
        " text, a larger damping, or on_failed_factorization='round-to-nearest'"
    )


def damping_steps(damping: float) -> list[float]:
    """The configured damping, then ever larger ones."""
    steps = [damping]
    while len(steps) < DAMPING_STEPS:
        steps.append(max(steps[-1] * DAMPING_GROWTH, DAMPING_FLOOR))
    return steps


def inverse_cholesky(
    hessian: torch.Tensor, dead: torch.Tensor, damping: float, shrinkage: float
) -> torch.Tensor | None:
    """U [n, n] fp32, upper, U^T U = (H shrunk and damped)^-1; None where that is not positive
    definite.

    Damped: damping * mean(diag H) on the diagonal, and 1 where the input is dead.
    """
    flipped = hessian.flip(0, 1)
    diagonal = flipped.diagonal()
    if shrinkage:
        kept = diagonal.clone()
        flipped *= 1 - shrinkage
        diagonal.copy_(kept)
    diagonal += damping * hessian.diagonal().mean()
    diagonal[dead.flip(0)] = 1
    lower, failed = torch.linalg.cholesky_ex(flipped)
    del flipped, diagonal  # n^2 numbers each: what is not needed goes before the next is made
    if failed:
        return None
    identity = torch.eye(len(lower), device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    del lower, identity
    upper = inverse.flip(0, 1)
    healthy = is_finite(upper) and (upper.diagonal() > 0).all()
    return upper if healthy else None
