"""What the pictures of a checkpoint show, in a sentence each: their titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checkpoint import PARTS, LayerSummary
from .maps import LayerMap
from .points import SettingSummary, frontier

__all__ = [
    "Totals",
    "bits_finding",
    "loss_finding",
    "map_finding",
    "outlier_finding",
    "structure_finding",
    "sweep_finding",
    "totals",
]


@dataclass(frozen=True)
class Totals:
    """Sums over all compressed layers; part_bits are bits a weight by part."""

    weights: int
    nbytes: int
    outlier_share: float
    part_bits: dict[str, float]

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / self.weights


def totals(layers: Sequence[LayerSummary]) -> Totals:
    """The sums over `layers`, of which there must be one at least."""
    weights = sum(layer.rows * layer.columns for layer in layers)
    outliers = sum(layer.outlier_share * layer.rows * layer.columns for layer in layers)
    parts = {part: sum(layer.parts[part] for layer in layers) for part in PARTS}
    return Totals(
        weights=weights,
        nbytes=sum(layer.nbytes for layer in layers),
        outlier_share=outliers / weights,
        part_bits={part: 8 * size / weights for part, size in parts.items()},
    )


def bits_finding(layers: Sequence[LayerSummary]) -> str:
    """Where the bits go."""
    total = totals(layers)
    parts = total.part_bits
    around = parts["statistics"] + parts["second level"]
    return (
        f"Of {total.bits:.2f} bits a weight, {parts['codes']:.2f} are codes, {around:.2f} scales"
        f" and zeros, {parts['outliers']:.2f} outliers"
    )


def outlier_finding(layers: Sequence[LayerSummary]) -> str:
    """Where outliers are dense and sparse."""
    densest = max(layers, key=lambda layer: layer.outlier_share)
    sparsest = min(layers, key=lambda layer: layer.outlier_share)
    if not densest.outlier_share:
        return "There are no outliers"
    return (
        f"Outliers: {sparsest.outlier_share:.2%} of {sparsest.kind} in block {sparsest.depth} to"
        f" {densest.outlier_share:.2%} of {densest.kind} in block {densest.depth}"
    )


def loss_finding(layers: Sequence[LayerSummary]) -> str:
    """Which layer loses most."""
    known = {layer.layer: layer.relative_loss for layer in layers if layer.relative_loss}
    if not known:
        return "There is no log of losses in this checkpoint"
    worst = max(known, key=lambda name: known[name])
    return f"{worst} loses most: {known[worst]:.2%} of its squared output"


def map_finding(picture: LayerMap) -> str:
    """What the map is of."""
    if picture.measure == "sensitivity":
        return f"Where {picture.layer} is sensitive"
    return f"Where the outliers of {picture.layer} are"


def structure_finding(picture: LayerMap) -> str:
    """How much of the outliers each pattern holds."""
    scores = picture.structure.to_dict()
    if not any(scores.values()):
        return "It has no outliers."
    rest = scores.pop("unstructured")
    found = [f"{share:.0%} in heavy {n.replace('_', ' ')}" for n, share in scores.items() if share]
    return f"Of its outliers, {', '.join([*found, f'{rest:.0%} in no pattern'])}."


def sweep_finding(
    text: str, shown: Sequence[SettingSummary], left_out: Sequence[SettingSummary]
) -> str:
    """How many of the settings that a plot shows are worth their bits, and which it leaves out."""
    best = len(frontier(shown))
    finding = f"{text}: {best} of {len(shown)} settings are beaten by none of fewer bits"
    if not left_out:
        return finding
    others = ", ".join(f"{setting.name} ({setting.perplexity:,.0f})" for setting in left_out)
    return f"{finding}\nnot shown: {others}"
