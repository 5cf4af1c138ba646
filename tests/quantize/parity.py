"""How well the solver agrees with the float64 oracle.

Where fp32 tips what fp64 left a hair below a tie, be it a code, a statistic or the fp16 of an
outlier, a row (or a stats block of rows) takes another course from there on: just as good, but not
the same codes. So each case is three weights. The loss must agree on every one, the codes on all
but the unlucky one: their median counts.

python -m tests.quantize.parity     the whole matrix of settings, and its worst case
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import mean, median
from typing import Any

import numpy as np

from spqr_numba.config import SpqrConfig
from spqr_numba.quantize.solver import QuantizedWeight, quantize_weight

from .. import oracle
from ..problems import Problem, make_problem

OFF = {"outlier_threshold": None}
SIMPLIFIED = {"outlier_search": "simplified"}
JOINT = {"fit": "joint"}
RTN = {"use_hessian": False, "permutation": "identity", **OFF}

# (rows, columns), settings. The bits come in few combinations: decoding is compiled for each.
TWO = {"bits": 2, "scale_bits": 2, "zero_bits": 4}
FOUR = {"bits": 4, "outlier_threshold": 0.1}
FIVE = {"bits": 5, "scale_bits": 16, "zero_bits": 2, "outlier_threshold": 0.1}
EIGHT = {"bits": 8, "outlier_threshold": 0.1}
CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "paper": ((96, 160), {}),
    "paper, no outliers": ((96, 160), OFF),
    "paper, simplified": ((96, 160), SIMPLIFIED),
    "identity": ((96, 160), {"permutation": "identity"}),
    "spearman": ((96, 96), {"permutation": "spearman"}),
    "round zero": ((96, 160), {"round_zero": True}),
    "little damping": ((96, 160), {"damping": 0.01}),
    "many outliers": ((96, 96), {"outlier_threshold": 0.01}),
    "joint": ((96, 160), JOINT),
    "joint, no outliers": ((96, 160), {**JOINT, **OFF}),
    "joint, simplified, little damping": ((96, 160), {**JOINT, **SIMPLIFIED, "damping": 0.1}),
    "joint, ragged": ((83, 147), JOINT),
    "joint, 2 bit, 8/64": (
        (96, 160),
        {**JOINT, **TWO, "group_size": 8, "stats_group_size": 64},
    ),
    "joint, 4 bit, 32/8": ((96, 160), {**JOINT, **FOUR, "group_size": 32, "stats_group_size": 8}),
    "joint, 8 bit, whole row": ((64, 200), {**JOINT, **EIGHT, "group_size": None}),
    "joint, rtn": ((96, 160), {**JOINT, **RTN}),
    "joint, one row": ((1, 603), JOINT),
    "joint, one column": ((1203, 1), JOINT),
    "2 bit, 8/64": ((96, 160), {**TWO, "group_size": 8, "stats_group_size": 64}),
    "2 bit, off": ((96, 160), {**TWO, **OFF}),
    "2 bit, spearman rtn": ((96, 96), {**TWO, **RTN, "permutation": "spearman"}),
    "4 bit, 16/16": ((96, 160), FOUR),
    "4 bit, 32/8": ((96, 160), {**FOUR, "group_size": 32, "stats_group_size": 8}),
    "4 bit, 128/16, off": ((64, 256), {**FOUR, "group_size": 128, **OFF}),
    "5 bit, 32/16": ((96, 160), {**FIVE, "group_size": 32}),
    "8 bit, 128/16": ((64, 256), {**EIGHT, "group_size": 128}),
    "whole row": ((96, 128), {"group_size": None}),
    "whole row beyond a block": ((64, 200), {"group_size": None, **SIMPLIFIED}),
    "gptq": ((96, 160), SpqrConfig.gptq(3).to_dict()),
    "gptq 4 bit, g128": ((96, 200), SpqrConfig.gptq(4, 128).to_dict()),
    "rtn": ((96, 160), SpqrConfig.rtn(3, 16).to_dict()),
    "rtn, two levels": ((96, 160), RTN),
    "ragged": ((83, 147), {}),
    "ragged, 32/64": ((83, 147), {"group_size": 32, "stats_group_size": 64, **SIMPLIFIED}),
    "ragged 4 bit, off": ((83, 147), {**FOUR, **OFF}),
    "fewer rows than a vector": ((5, 640), OFF),
    "one row": ((1, 603), {}),
    "one column": ((1203, 1), {}),
    "one group": ((203, 8), {}),
}


SEEDS = (0, 1, 2)


@dataclass
class Agreement:
    """Solver against oracle on the weights of one case, one entry a seed."""

    codes: list[float]  # share of codes that are equal
    losses: list[float]  # layer loss of the solver over that of the oracle, less 1
    outliers: list[float]  # share of weights on which both agree whether it is an outlier
    orders: list[bool]  # whether the permutations are equal

    @property
    def worst_loss(self) -> float:
        return max(self.losses, key=abs)


@cache
def solve(name: str, seed: int = 0, device: str = "cpu") -> tuple[Problem, QuantizedWeight]:
    """The weight of a case, and what the solver makes of it on `device`."""
    shape, settings = CASES[name]
    problem, config = make_problem(*shape, seed), SpqrConfig(**settings)
    hessian = problem.hessian.to(device) if config.use_hessian else None
    return problem, quantize_weight(problem.weight.to(device), hessian, config)


def compare(name: str, device: str = "cpu") -> Agreement:
    """Quantize the weights of a case with both."""
    agreement = Agreement([], [], [], [])
    config = SpqrConfig(**CASES[name][1])
    for seed in SEEDS:
        problem, ours = solve(name, seed, device)
        weight, hessian = problem.weight.numpy(), problem.hessian.numpy()
        theirs = oracle.quantize(weight, hessian, config)
        stored = oracle.decode(ours.matrix)
        our_loss = oracle.layer_loss(weight, ours.weight.cpu().numpy(), hessian)
        their_loss = oracle.layer_loss(weight, theirs.weight, hessian)
        agreement.codes.append(float((stored.codes == theirs.codes).mean()))
        agreement.losses.append(our_loss / their_loss - 1)
        agreement.outliers.append(float((stored.is_outlier == (theirs.outliers != 0)).mean()))
        agreement.orders.append(np.array_equal(stored.permutation, theirs.permutation))
    return agreement


def main() -> None:
    """Print every case and the worst."""
    found = {name: compare(name) for name in CASES}
    for name, agreement in found.items():
        codes = "  ".join(f"{share:9.4%}" for share in agreement.codes)
        print(f"{name:26} codes {codes}   loss {agreement.worst_loss:+.4%}")
    fewest = min(found, key=lambda name: median(found[name].codes))
    furthest = max(found, key=lambda name: abs(found[name].worst_loss))
    equal = mean(share for agreement in found.values() for share in agreement.codes)
    print(f"all {len(CASES) * len(SEEDS)} weights: {equal:.4%} of the codes are equal")
    print(f"worst median of three: {median(found[fewest].codes):.4%} ({fewest})")
    print(f"worst loss: {found[furthest].worst_loss:+.4%} ({furthest})")


if __name__ == "__main__":
    main()
