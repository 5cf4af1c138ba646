"""What each way to compress each layer would cost: a walk over the dense model before the real one.

    a backward pass over a few windows   what the model's loss feels of each linear (gradients.py)
    a forward pass over some windows     H of each input; each option tried on a sample of the rows

Rows are quantized on their own but for the statistics that a stats block shares, so some whole
stats blocks tell what all would do. Between two thresholds bytes and losses follow smooth curves
and are read off those. The real walk sees other inputs, those that compressed blocks give; how many
bytes a layer takes differs by a few percent, which the layers behind it make up for (`Ration`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from ..config import SpqrConfig
from ..format.layout import MatrixSpec
from ..quantize.hessian import Factorization, factorize
from ..quantize.outliers import outlier_threshold
from ..quantize.solver import quantize_weight
from .activations import Activations
from .blocks import InputGroup, input_groups
from .budget import Curves, Option, Target, between, lower_hull
from .gradients import TokenWeights, mean_sensitivities, sensitivities
from .input_sums import InputSums
from .quantize_block import factorization_key, named, weigher
from .report import Clock
from .skeleton import Parts

__all__ = ["candidates", "check_target", "least_bytes", "survey"]

WINDOWS = 32
GRADIENT_TOKENS = 4096
SAMPLED_ROWS = 128
BITS = (2, 3, 4)
GROUP_SIZES = (8, 16, 32)
FINE_THRESHOLDS: tuple[float, ...] = (0.8, 0.4, 0.2, 0.1, 0.05)
THRESHOLDS: tuple[float, ...] = (0.4, 0.2, 0.1)  # beside a choice of bits and groups
STEPS = 8  # options between two thresholds that were tried


def survey(
    parts: Parts,
    settings: Mapping[str, SpqrConfig],
    windows: torch.Tensor,
    batch_size: int,
    *,
    per_layer: bool,
    clock: Clock,
    note: Callable[[str], object],
    weights: TokenWeights | None = None,
) -> Curves:
    """The options of every linear that `settings` names and the windows reach.

    windows     int64 [N, L] tokens on the device of the parts; the first 32 are used
    batch_size  windows run at once
    per_layer   options differ in bits and group_size too, not in the threshold alone
    clock       for the seconds spent on Hessians
    note        is told what is being done
    weights     of the tokens of all windows, where they do not count alike

    Raises NumericsError for NaN or inf, ModelError where blocks cannot be run one by one.
    """
    if weights is None:
        felt = sensitivities(parts, settings, windows[: _few(windows)], note)
    else:
        felt = mean_sensitivities(parts.model, weights.squares)
    with parts.outside():
        blocks = parts.blocks.modules
        activations = Activations.start(parts.model, blocks, windows[:WINDOWS], batch_size)
    curves: dict[str, list[Option]] = {
        name: [_only(config, parts.model.get_submodule(name))]
        for name, config in settings.items()
        if not config.use_hessian
    }
    for index in range(len(parts.blocks)):
        name = parts.blocks.name(index)
        note(f"{name}, options")
        inside = {n: config for n, config in settings.items() if n.startswith(f"{name}.")}
        with parts.block(index) as block:
            linears = {n: parts.model.get_submodule(n) for n in inside}
            found = _factorizations(block, index, linears, inside, activations, clock, weights)
            for layer, factor in found:
                sample = Sample.of(linears[layer].weight, factor, inside[layer], felt[layer])
                curves[layer] = sample.options(inside[layer], per_layer)
            activations.advance(block, index)
    return curves


def _only(config: SpqrConfig, linear: nn.Linear) -> Option:
    """The one option of a linear that is rounded to nearest."""
    nbytes = _nbytes(config, linear.out_features, linear.in_features, None)
    return Option(config.bits, config.group_size, None, nbytes, loss=0.0)


def _few(windows: torch.Tensor) -> int:
    """Windows of about GRADIENT_TOKENS tokens."""
    return max(1, GRADIENT_TOKENS // windows.shape[1])


def least_bytes(config: SpqrConfig, linear: nn.Linear, per_layer: bool) -> int:
    """Bytes of the smallest option of a linear; nothing has to be measured for it."""
    shape = linear.out_features, linear.in_features
    configs = candidates(config, per_layer) if config.use_hessian else [config]
    return min(_nbytes(replace(c, outlier_threshold=None), *shape, None) for c in configs)


def check_target(
    target: Target, config: SpqrConfig, settings: Mapping[str, SpqrConfig], model: Any
) -> None:
    """Raise ConfigError where no choice for the linears `settings` of `model` meets `target`."""
    target.check(config)
    target.check_hessians(settings.values())
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in settings}
    least = sum(least_bytes(c, linears[name], target.per_layer) for name, c in settings.items())
    target.check_reach(least, math.inf, sum(linear.weight.numel() for linear in linears.values()))


def candidates(config: SpqrConfig, per_layer: bool) -> list[SpqrConfig]:
    """The bits and group sizes that a layer can have; its own are the first."""
    if not per_layer:
        return [config]
    others = (replace(config, bits=b, group_size=g) for b in BITS for g in GROUP_SIZES)
    return [config, *(other for other in others if other != config)]


@dataclass(frozen=True)
class Sample:
    """Some rows of a weight, to try options on.

    weight    fp32 [sampled, columns]
    factor    of the Hessian of its inputs
    rows      of the whole weight
    stretch   T of the whole weight over that of the sample. T is a mean square of weights, weighed
              as their errors are, so losses too are taken to be that much larger a row
    felt      how much the model's loss feels of the squared error of an output
    """

    weight: torch.Tensor
    factor: Factorization
    rows: int
    stretch: float
    felt: float

    @classmethod
    def of(
        cls, weight: torch.Tensor, factor: Factorization, config: SpqrConfig, felt: float
    ) -> Self:
        """Whole stats blocks, spread evenly over the rows."""
        rows = sampled_rows(len(weight), config.stats_group_size)
        sampled = weight[rows.to(weight.device)].to(torch.float32)
        return cls(sampled, factor, len(weight), _stretch(weight, sampled, factor), felt)

    def options(self, config: SpqrConfig, per_layer: bool) -> list[Option]:
        """What was tried, and what lies between."""
        thresholds = THRESHOLDS if per_layer else FINE_THRESHOLDS
        if config.outlier_threshold is None:
            thresholds = ()
        plain = {
            self.option(replace(candidate, outlier_threshold=None)): candidate
            for candidate in candidates(config, per_layer)
        }
        options = list(plain)
        for better in lower_hull(plain):  # outliers seldom make good what the others lose
            tried = [self.option(replace(plain[better], outlier_threshold=t)) for t in thresholds]
            if tried:
                floor = _nbytes(tried[0].settings(config), self.rows, self.weight.shape[1], 0)
                options += between(tried, floor, STEPS)
        return options

    def option(self, config: SpqrConfig) -> Option:
        """What the whole weight would cost with these settings."""
        threshold = config.outlier_threshold
        relative = None if threshold is None else threshold * self.stretch
        tried = replace(config, outlier_threshold=relative)
        report = quantize_weight(self.weight, self.factor, tried).report
        columns = self.weight.shape[1]
        outliers = None
        if threshold is not None:
            outliers = round(report.outlier_share * self.rows * columns)
        return Option(
            bits=config.bits,
            group_size=config.group_size,
            outlier_threshold=threshold,
            nbytes=_nbytes(config, self.rows, columns, outliers),
            loss=self.felt * report.loss * self.stretch * self.rows / len(self.weight),
        )


def sampled_rows(rows: int, block: int) -> torch.Tensor:
    """int64: the rows of some stats blocks of `block` rows, SAMPLED_ROWS or a few more together."""
    blocks, wanted = -(-rows // block), -(-SAMPLED_ROWS // block)
    if blocks <= wanted:
        return torch.arange(rows)
    chosen = torch.linspace(0, blocks - 1, wanted).round().to(torch.int64)
    sampled = (block * chosen[:, None] + torch.arange(block)).flatten()
    return sampled[sampled < rows]


def _stretch(weight: torch.Tensor, sampled: torch.Tensor, factor: Factorization) -> float:
    """T of a weight over T of some rows of it; 1 where either keeps no outliers."""
    if factor.upper is None:
        return 1.0
    whole, part = (
        outlier_threshold(w.to(torch.float32)[:, factor.order], factor.upper, 1.0)
        for w in (weight, sampled)
    )
    return whole / part if math.isfinite(whole) and math.isfinite(part) else 1.0


def _nbytes(config: SpqrConfig, rows: int, columns: int, outliers: int | None) -> int:
    spec = MatrixSpec.from_config(config, rows, columns)
    return spec.nbytes(outliers, config.permutation != "identity")


def _factorizations(
    block: nn.Module,
    index: int,
    linears: Mapping[str, nn.Linear],
    settings: Mapping[str, SpqrConfig],
    activations: Activations,
    clock: Clock,
    weights: TokenWeights | None,
) -> Iterator[tuple[str, Factorization]]:
    """(name, factorization) of the linears that calibrate; equal settings share what they can.

    Its Hessian, by which losses are told, is of tokens weighed for that linear alone.
    """
    wanted = {name: linear for name, linear in linears.items() if settings[name].use_hessian}
    groups = input_groups(wanted, lambda: activations.run_first(block, index))
    alone = {
        name: InputGroup((name,), group.calls)
        for group in groups
        for name in group.names
        if weights is not None and len(group.names) > 1
    }
    some = {group: wanted[group.names[0]] for group in (*groups, *alone.values())}
    sums = InputSums(block, some, clock, weigher(weights, activations))
    with sums.hooked():
        activations.run_all(block, index)
    for group in groups:
        with named(group.names[0]):
            matrix = sums.hessians.pop(group).matrix
        known: dict[tuple | None, Factorization] = {}
        for name in group.names:
            key = factorization_key(name, settings[name])
            if key not in known:
                with named(name):
                    known[key] = factorize(matrix, settings[name], wanted[name].weight)
            factor = known[key]
            if name in alone:
                own = sums.hessians.pop(alone[name]).matrix
                factor = replace(factor, hessian=own[factor.order][:, factor.order])
            yield name, factor
