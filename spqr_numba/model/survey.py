"""What each way to compress each layer would cost: a walk over the dense model before the real one.

    a backward pass over a few windows   what the model's loss feels of each linear (gradients.py)
    a forward pass over some windows     H of each input; each option tried on a sample of the rows

Linears that share an input are tried together, and will be compressed alike: that is one walk over
the columns for all of them, and one launch where they are multiplied by.

Rows are quantized on their own but for the statistics that a stats block shares, so some whole
stats blocks tell what all would do. Between two thresholds bytes and losses follow smooth curves
and are read off those. The real walk sees other inputs, those that compressed blocks give; how many
bytes a layer takes differs by a few percent, which the layers behind it make up for (`Ration`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from ..config import SpqrConfig
from ..format.layout import MatrixSpec
from ..quantize.hessian import Factorization, factorize
from ..quantize.outliers import outlier_threshold
from ..quantize.solver import check_weight, squared_output, walk_columns
from .activations import Activations
from .blocks import InputGroup, input_groups
from .budget import Curves, Layers, Option, Target, between, layers_of, lower_hull
from .gradients import TokenWeights, mean_sensitivities, sensitivities
from .input_sums import InputSums
from .progress import Progress, begin
from .quantize_block import factorization_key, named, weigher
from .report import Clock
from .skeleton import Parts

__all__ = ["candidates", "check_target", "least_bytes", "survey"]

WINDOWS = 32
GRADIENT_TOKENS = 4096
SAMPLED_ROWS = 128
# Bits and group sizes beside a layer's own. Groups of 8 with 2 or 3 bits are not among them: they
# lose more than a mixture of larger ones, with those and with one bit more, does in as many bytes.
CANDIDATES = (  # bits, group_size, bits of scales and of zeros; others are never worth theirs
    (2, 32, 3), (2, 16, 3), (3, 32, 3), (3, 32, 4), (3, 16, 3), (3, 16, 4), (4, 32, 4), (4, 16, 4),
    (4, 8, 4),
)  # fmt: skip
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
    progress: Progress,
    weights: TokenWeights | None = None,
    known: Curves | None = None,
    keep: Callable[[Curves], None] = lambda curves: None,
) -> Curves:
    """The options of all linears that `settings` names and the windows reach.

    windows     int64 [N, L] tokens on the device of the parts; the first 32 are used
    batch_size  windows run at once
    per_layer   options differ in bits, group_size and the bits of scales and zeros too, not in the
                threshold alone
    clock       for the seconds spent on Hessians
    progress    a bar
    weights     of the tokens of all windows, where they do not count alike
    known       of some blocks, the first ones, from an earlier run
    keep        gets what is known behind each block

    Raises NumericsError for NaN or inf, ModelError where blocks cannot be run one by one.
    """
    if weights is None:
        felt = sensitivities(parts, settings, windows[: _few(windows)], progress)
    else:
        felt = mean_sensitivities(parts.model, weights.squares)
    with parts.outside():
        blocks = parts.blocks.modules
        activations = Activations.start(parts.model, blocks, windows[:WINDOWS], batch_size)
    curves: dict[Layers, list[Option]] = {
        (name,): [_only(config, parts.model.get_submodule(name))]
        for name, config in settings.items()
        if not config.use_hessian
    }
    curves |= {layers: list(options) for layers, options in (known or {}).items()}
    surveyed = layers_of(curves)
    begin(progress, "trying settings", len(parts.blocks))
    for index in range(len(parts.blocks)):
        name = parts.blocks.name(index)
        inside = {n: config for n, config in settings.items() if n.startswith(f"{name}.")}
        with parts.block(index) as block:
            linears = {n: parts.model.get_submodule(n) for n in inside}
            found = _factorizations(block, index, linears, inside, activations, clock, weights)
            for factor, hessians in found if not surveyed.issuperset(inside) else ():
                layers, config = tuple(hessians), inside[next(iter(hessians))]
                told = [Told(linears[n].weight, felt[n], hessians[n]) for n in layers]
                with named(layers[0]):
                    sample = Sample.of(told, factor, config)
                    curves[layers] = sample.options(config, per_layer)
            activations.advance(block, index)
        keep(curves)
        progress.update(1)
    return curves


def _only(config: SpqrConfig, linear: nn.Linear) -> Option:
    """The one option of a linear that is rounded to nearest."""
    nbytes = _nbytes(config, linear.out_features, linear.in_features, None)
    return Option.of(replace(config, outlier_threshold=None), nbytes, loss=0.0)


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
    """The bits, group sizes and bits of statistics that a layer can have; its own are the first."""
    if not per_layer:
        return [config]
    others = (
        replace(config, bits=bits, group_size=size, scale_bits=statistic, zero_bits=statistic)
        for bits, size, statistic in CANDIDATES
    )
    return [config, *(other for other in others if other != config)]


class Told(NamedTuple):
    """A linear of which a sample is to tell.

    weight    [rows, columns]
    felt      how much the model's loss feels of the squared error of an output
    hessian   fp32 [columns, columns] of its inputs, permuted: its losses are told by this one
    """

    weight: torch.Tensor
    felt: float
    hessian: torch.Tensor | None


@dataclass(frozen=True)
class Member:
    """A linear in a sample.

    rows      of the whole weight
    place     of those that were sampled
    hessian   fp32 [columns, columns], permuted
    worth     what the model loses by each squared error of theirs
    """

    rows: int
    place: slice
    hessian: torch.Tensor | None
    worth: float


@dataclass(frozen=True)
class Sample:
    """Some rows of each of some weights that share an input, to try options on.

    Each weight is scaled so that one threshold T is the same share of what its own rows are, which
    changes nothing else. Where its rows end within a stats block, the next one's fill that up.

    weight    fp32 [sampled, columns]
    factor    of the Hessian of their input
    members   whose rows they are
    stretch   T of a whole weight, scaled, over that of the sample
    """

    weight: torch.Tensor
    factor: Factorization
    members: list[Member]
    stretch: float

    @classmethod
    def of(cls, linears: Sequence[Told], factor: Factorization, config: SpqrConfig) -> Self:
        """Whole stats blocks, spread evenly over the rows of each."""
        for told in linears:
            check_weight(told.weight, factor, config)
        unscaled = [_unit(told.weight, factor) for told in linears]
        least = min(unscaled)
        parts, members, start = [], [], 0
        for (weight, felt, hessian), unit in zip(linears, unscaled, strict=True):
            chosen = sampled_rows(len(weight), config.stats_group_size).to(weight.device)
            rows = weight[chosen].to(torch.float32)
            # T is a mean square of weights, weighed as their errors are: if that of all rows is
            # larger, so, we take it, are their losses.
            larger = _larger(unit, _unit(rows, factor))
            scale = least / unit if math.isfinite(unit) else 1.0
            worth = felt * larger * len(weight) / len(rows) / scale
            members.append(Member(len(weight), slice(start, start + len(rows)), hessian, worth))
            parts.append(rows * math.sqrt(scale))
            start += len(rows)
        together = torch.cat(parts)
        return cls(together, factor, members, _larger(least, _unit(together, factor)))

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
                settings = tried[0].settings(config)
                floor = sum(self._nbytes(settings, member, 0) for member in self.members)
                options += between(tried, floor, STEPS)
        return options

    def option(self, config: SpqrConfig) -> Option:
        """What the whole weights would cost with these settings."""
        threshold = config.outlier_threshold
        relative = None if threshold is None else threshold * self.stretch
        tried = replace(config, outlier_threshold=relative)
        columns = self.weight.T[self.factor.order]
        spec = MatrixSpec.from_config(tried, *self.weight.shape)
        loop = walk_columns(columns, self.factor, spec, tried).loop
        errors, outliers = columns - loop.weight, loop.outliers.view(torch.float16) != 0
        found = [
            measure
            for member in self.members
            for measure in (
                outliers[:, member.place].double().mean(),
                squared_output(errors[:, member.place], member.hessian),
            )
        ]
        shares, losses = torch.stack(found).view(-1, 2).T.tolist()  # waits for a GPU once
        nbytes, loss = 0, 0.0
        for member, share, error in zip(self.members, shares, losses, strict=True):
            kept = None if threshold is None else round(share * member.rows * len(columns))
            nbytes += self._nbytes(config, member, kept)
            loss += member.worth * error
        return Option.of(config, nbytes, loss)

    def _nbytes(self, config: SpqrConfig, member: Member, outliers: int | None) -> int:
        return _nbytes(config, member.rows, self.weight.shape[1], outliers)


def sampled_rows(rows: int, block: int) -> torch.Tensor:
    """int64: the rows of some stats blocks of `block` rows, SAMPLED_ROWS or a few more together."""
    blocks, wanted = -(-rows // block), -(-SAMPLED_ROWS // block)
    if blocks <= wanted:
        return torch.arange(rows)
    chosen = torch.linspace(0, blocks - 1, wanted).round().to(torch.int64)
    sampled = (block * chosen[:, None] + torch.arange(block)).flatten()
    return sampled[sampled < rows]


def _unit(weight: torch.Tensor, factor: Factorization) -> float:
    """T of a weight, of the threshold 1; inf where it keeps no outliers."""
    if factor.upper is None:
        return math.inf
    return outlier_threshold(weight.to(torch.float32)[:, factor.order], factor.upper, 1.0)


def _larger(whole: float, part: float) -> float:
    """How many times as large; 1 where either keeps no outliers."""
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
) -> Iterator[tuple[Factorization, dict[str, torch.Tensor | None]]]:
    """(factorization, linear -> H by which its losses are told), of the linears that calibrate.

    Those that a factorization serves and whose settings are equal come together. H is permuted, and
    of tokens as that linear alone weighs them.
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
        for layers in _alike(group.names, settings):
            first, config = layers[0], settings[layers[0]]
            key = factorization_key(first, config)
            if key not in known:
                with named(first):
                    known[key] = factorize(matrix, config, wanted[first].weight)
            factor = known[key]
            hessians: dict[str, torch.Tensor | None] = dict.fromkeys(layers, factor.hessian)
            for name in layers:
                if name in alone:
                    own = sums.hessians.pop(alone[name]).matrix
                    hessians[name] = own[factor.order][:, factor.order]
            yield factor, hessians


def _alike(names: Iterable[str], settings: Mapping[str, SpqrConfig]) -> list[list[str]]:
    """Linears of one input whose settings are equal, and that can share a factorization."""
    keys = {name: (settings[name], factorization_key(name, settings[name])) for name in names}
    found: list[list[str]] = []
    for name in names:  # settings with overrides have no hash
        others = next((some for some in found if keys[some[0]] == keys[name]), None)
        if others is None:
            found.append([name])
        else:
            others.append(name)
    return found
