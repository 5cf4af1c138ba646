"""Where a bit buys most: one budget for many layers, each with several ways to compress it.

Each layer has a curve, its options with their bytes and their loss; the losses of all layers add
up. (A layer is one linear here, or several that are compressed alike.) With a price on a byte every
layer decides for itself: it takes the option of least loss + price * bytes, and that one lies on
the lower convex hull of its curve. So the answer walks along the hulls. Of all next steps it takes
the one whose loss falls most a byte, until none fits into the budget (Everett's multipliers, 1963;
the greedy solution of a convex knapsack).

    loss |\\                    what fits ends where all layers have about the same slope:
         | o                   the price of a byte
         |  \\ x   x off the hull: never taken, two others are better together
         |   o_
         |     -o__
         +------------- bytes
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..config import CHOSEN_FIELDS, SpqrConfig
from ..errors import CheckpointError, ConfigError

__all__ = [
    "Curves",
    "Layers",
    "Option",
    "Ration",
    "Target",
    "allocate",
    "between",
    "curves_to_csv",
    "layers_of",
    "lower_hull",
    "reach",
    "read_curves",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One way to compress one layer.

    bits ... outlier_threshold   the fields of SpqrConfig, of CHOSEN_FIELDS
    nbytes                       of the compressed weight, as it would be
    loss                         what it does to the model, in one unit for all layers
    """

    bits: int
    group_size: int | None
    scale_bits: int
    zero_bits: int
    outlier_threshold: float | None
    nbytes: float
    loss: float

    @classmethod
    def of(cls, config: SpqrConfig, nbytes: float, loss: float) -> Self:
        """What `config` has in these fields, and what comes of it."""
        chosen = {name: getattr(config, name) for name in CHOSEN_FIELDS}
        return cls(nbytes=float(nbytes), loss=loss, **chosen)

    def settings(self, config: SpqrConfig) -> SpqrConfig:
        """`config` with what this option chose."""
        return replace(config, **{name: getattr(self, name) for name in CHOSEN_FIELDS})


Layers = tuple[str, ...]
"""Full names of linears that are compressed alike."""
Curves = Mapping[Layers, Sequence[Option]]
"""Linears -> their options, the bytes and the loss of all of them together."""
Hulls = Mapping[Layers, list[Option]]
Step = tuple[Layers, Option, Option]


def lower_hull(options: Iterable[Option]) -> list[Option]:
    """The options on the lower convex hull of a curve, bytes rising, losses falling."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(option: Option, larger: Option) -> float:
    """How much the loss falls for each byte more."""
    return (option.loss - larger.loss) / (larger.nbytes - option.nbytes)


def allocate(curves: Curves, nbytes: float) -> dict[Layers, Option]:
    """The option of each layer: together at most `nbytes`, where the loss falls most a byte.

    No choice of no more bytes than these has less loss, up to the steps behind the first that does
    not fit: they only use up what is left. Where even the smallest options are too large together,
    those.
    """
    hulls = {layer: lower_hull(options) for layer, options in curves.items()}
    return _walk(hulls, _steps(hulls), nbytes)


def _steps(hulls: Hulls) -> list[Step]:
    """(layer, option, the next on its hull), the steepest first."""
    steps = [(layer, *pair) for layer, hull in hulls.items() for pair in pairwise(hull)]
    return sorted(steps, key=lambda step: -_gain(*step[1:]))


def _walk(hulls: Hulls, steps: Iterable[Step], nbytes: float) -> dict[Layers, Option]:
    """The option of each layer of `hulls`, behind all steps that fit; other layers' are ignored."""
    chosen = {layer: hull[0] for layer, hull in hulls.items()}
    left = nbytes - sum(option.nbytes for option in chosen.values())
    for layer, one, other in steps:
        if chosen.get(layer) is one and other.nbytes - one.nbytes <= left:
            chosen[layer] = other
            left -= other.nbytes - one.nbytes
    return chosen


def layers_of(curves: Curves) -> set[str]:
    """Of which layers they are."""
    return {name for layers in curves for name in layers}


def reach(curves: Curves) -> tuple[float, float]:
    """Bytes of the smallest choice for all layers, and of the largest that is worth its bytes."""
    hulls = [lower_hull(options) for options in curves.values()]
    return sum(h[0].nbytes for h in hulls), sum(h[-1].nbytes for h in hulls)


def between(tried: Sequence[Option], floor: float, steps: int) -> list[Option]:
    """The options at thresholds between those that were tried, `steps` from one to the next.

    tried   options that differ in their thresholds alone, these falling, at least two of them
    floor   bytes with outliers kept, and none found

    The logarithms of the bytes of outliers and of the loss are cubic in that of the threshold
    between two of those tried, with the slopes that their neighbours give.
    """
    x = -np.log([option.outlier_threshold or math.inf for option in tried])
    logs = (
        np.log1p([max(option.nbytes - floor, 0.0) for option in tried]),
        np.log([max(option.loss, sys.float_info.min) for option in tried]),
    )
    at = np.interp(np.arange(steps * (len(x) - 1) + 1) / steps, np.arange(len(x)), x)
    nbytes, losses = (_cubic(at, x, y) for y in logs)
    return [
        replace(tried[0], outlier_threshold=float(f"{threshold:.4g}"), nbytes=size, loss=loss)
        for threshold, size, loss in np.stack(
            [np.exp(-at), floor + np.expm1(nbytes), np.exp(losses)], axis=1
        ).tolist()
    ]


def _cubic(at: Floats, x: Floats, y: Floats) -> Floats:
    """Cubic Hermite interpolation of (x, y), x rising, with the slopes of np.gradient."""
    slopes = np.gradient(y, x)
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    width = x[left + 1] - x[left]
    t = (at - x[left]) / width
    return (
        (1 + 2 * t) * (1 - t) ** 2 * y[left]
        + t**2 * (3 - 2 * t) * y[left + 1]
        + width * t * (1 - t) * ((1 - t) * slopes[left] - t * slopes[left + 1])
    )


@dataclass(frozen=True)
class Target:
    """What a compression aims at.

    bits        a weight, over all compressed linears, from the bytes on disk
    per_layer   choose bits, group_size and the bits of scales and zeros of each layer too, not its
                outlier_threshold alone
    """

    bits: float
    per_layer: bool = True

    def check(self, config: SpqrConfig) -> None:
        """Raise ConfigError where `config` leaves nothing to choose, or says it already."""
        self.check_hessians([config])
        if config.outlier_threshold is None and not self.per_layer:
            raise ConfigError(
                "target_bits chooses outlier thresholds, and outlier_threshold=None keeps no"
                " outliers; give a threshold (any), or choose per layer (per_layer)"
            )
        chosen = CHOSEN_FIELDS if self.per_layer else ("outlier_threshold",)
        for pattern, values in config.overrides:
            both = [name for name in chosen if name in values]
            if both and values.get("use_hessian", True):
                raise ConfigError(
                    f"the override for {pattern!r} sets {both[0]}, which target_bits chooses; drop"
                    " one of the two"
                )

    def check_hessians(self, settings: Iterable[SpqrConfig]) -> None:
        """Raise ConfigError where no layer's `settings` have a Hessian."""
        if not any(config.use_hessian for config in settings):
            raise ConfigError(
                "target_bits weighs errors by the Hessian, and use_hessian=False has none"
            )

    def check_reach(self, least: float, most: float, weights: int) -> None:
        """Raise ConfigError where the target is not between two numbers of bytes."""
        low, high = 8 * least / weights, 8 * most / weights
        if not low <= self.bits <= high:
            reached = f"{low:.2f} bits and more" if math.isinf(high) else f"{low:.2f} to {high:.2f}"
            raise ConfigError(
                f"target_bits is {self.bits:g}, and these settings reach {reached} on this model;"
                " aim there, or change bits, group_size, scale_bits, zero_bits or stats_group_size"
                + ("" if self.per_layer else ", or choose them per layer (per_layer)")
            )


class Ration:
    """What is left of the bytes, and what each layer to come gets of them.

    curves     of the layers to compress
    settings   of each layer, but for what an option chooses
    nbytes     for all layers together

    What a layer takes in the end differs a little from its curve: it is measured, and the layers to
    come share what that leaves.
    """

    def __init__(self, curves: Curves, settings: Mapping[str, SpqrConfig], nbytes: float) -> None:
        self._settings = settings
        self._hulls = {layers: lower_hull(options) for layers, options in curves.items()}
        self._steps = _steps(self._hulls)
        self._layers_of = {name: layers for layers in curves for name in layers}
        self._chosen: dict[Layers, Option] = {}
        self._reserved: dict[str, float] = {}
        self._left = nbytes

    def settings_of(self, layer: str) -> SpqrConfig:
        """What `layer` gets, if it is the next, or compressed like one that was."""
        layers = self._layers_of[layer]
        if layers not in self._chosen:
            option = _walk(self._hulls, self._steps, self._left)[layers]
            self._chosen[layers] = option
            self._reserved |= dict.fromkeys(layers, option.nbytes / len(layers))
            self._left -= option.nbytes
        return self._chosen[layers].settings(self._settings[layer])

    def spend(self, layer: str, nbytes: float) -> None:
        """`layer` is compressed, and has taken `nbytes`."""
        self._hulls.pop(self._layers_of[layer], None)
        self._left += self._reserved.pop(layer, 0.0) - nbytes


def curves_to_csv(curves: Curves) -> str:
    """curves.csv: a header, then a line an option of layers, whose names a space divides."""
    text = io.StringIO()
    names = ["layers", *(f.name for f in fields(Option))]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {"layers": " ".join(layers), **asdict(option)}
        for layers, options in curves.items()
        for option in options
    )
    return text.getvalue()


def read_curves(text: str) -> Curves:
    """The curves of a curves.csv, as `curves_to_csv` wrote it.

    Raises CheckpointError for one that is damaged, or of another version.
    """
    curves: dict[Layers, list[Option]] = {}
    try:
        for line in csv.DictReader(io.StringIO(text)):
            curves.setdefault(tuple(line["layers"].split()), []).append(_option_of(line))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"what the options of layers are worth cannot be read ({error}): it is damaged or of"
            " another version; start afresh"
        ) from error
    return curves


def _option_of(line: Mapping[str, str]) -> Option:
    size, threshold = line["group_size"], line["outlier_threshold"]
    return Option(
        bits=int(line["bits"]),
        group_size=int(size) if size else None,
        scale_bits=int(line["scale_bits"]),
        zero_bits=int(line["zero_bits"]),
        outlier_threshold=float(threshold) if threshold else None,
        nbytes=float(line["nbytes"]),
        loss=float(line["loss"]),
    )
