"""Figures of what the other modules of this room compute; needs matplotlib.

Each function returns a matplotlib Figure, which a notebook shows and `savefig` writes. Nothing here
computes, and no global state of pyplot is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, SpqrError
from .checkpoint import PARTS, LayerSummary, by_depth_and_kind
from .findings import bits_finding, loss_finding, map_finding, outlier_finding, sweep_finding
from .maps import LayerMap, pooled
from .page import PART_COLORS
from .points import DENSE, SettingSummary, SweepPoint, frontier, summaries
from .sensitivity import Floats, StatisticsEffect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "check_format",
    "plot_checkpoint",
    "plot_error_share",
    "plot_frontier",
    "plot_sensitivity",
    "plot_statistics",
    "plot_structure",
    "plot_sweep",
    "plot_times",
    "save",
]

DECADES = 3.0
COLORS = "Blues"  # one hue, dark is much: reads the same in greyscale
PATTERN_COLORS = ("#08306b", "#4a90c8", "#a9cfe8", "#d95f0e", "#cccccc")
MARKERS = "os^Dv"
FAR = 2.0
MARGIN = 1.05  # below the dense model, of an axis that is cut off
BITS_LABEL = "bits a weight, measured"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Raises SpqrError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpqrError(
            "plots need the package matplotlib: pip install 'spqr-numba[notebooks]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's name. Raises InputError for an unknown one."""
    check_format(path)
    figure.savefig(path, dpi=120)


def check_format(path: Path) -> None:
    """Raise InputError for a file name whose format is unknown, SpqrError without matplotlib."""
    known = sorted(new_figure(1, 1).canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise InputError(f"cannot write {path}: its name must end in one of {', '.join(known)}")


def plot_sensitivity(values: Floats, title: str, axes: Axes | None = None) -> Figure:
    """A map of sensitivities [m, n], on a logarithmic scale of three decades."""
    figure, axes = _axes(axes, 6, 5)
    _plot_map(axes, pooled(values), values.shape, title, logarithmic=True)
    return figure


def plot_structure(scores: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Stacked bars: for each name the shares of its outliers by pattern (StructureScores)."""
    figure, axes = _axes(None, 7, 0.32 * len(scores) + 1.6)
    left = np.zeros(len(scores))
    patterns = list(next(iter(scores.values())))
    for pattern, color in zip(patterns, PATTERN_COLORS, strict=True):
        shares = np.array([100 * values[pattern] for values in scores.values()])
        axes.barh(list(scores), shares, left=left, color=color, label=pattern.replace("_", " "))
        left += shares
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set(title=title, xlabel="share of the outliers, %", xlim=(0, 100))
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def plot_error_share(
    shares: NDArray[np.float64], curves: Mapping[str, NDArray[np.float64]], title: str
) -> Figure:
    """Curves: what share of the sensitivity the most sensitive `shares` of weights carry."""
    figure, axes = _axes(None, 6, 4)
    styles = ("-", "--", "-.", ":")
    for index, (name, carried) in enumerate(curves.items()):
        axes.plot(100 * shares, 100 * carried, styles[index % len(styles)], label=name)
    axes.plot(100 * shares, 100 * shares, color="#bbbbbb", label="if all were alike")
    axes.set(
        title=title,
        xscale="log",
        xlabel="most sensitive weights, %",
        ylabel="share of the total sensitivity, %",
        ylim=(0, None),
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    return figure


def plot_statistics(effect: StatisticsEffect, title: str) -> Figure:
    """Distributions of scales and zeros, as fitted in fp16 and as stored."""
    figure = new_figure(9, 3.6)
    pairs = {
        "scale": (effect.scales_before, effect.scales_after),
        "zero (in steps of the scale)": (effect.zeros_before, effect.zeros_after),
    }
    for index, (name, (before, after)) in enumerate(pairs.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        bins = np.histogram_bin_edges(np.concatenate([before, after], axis=None), 60).tolist()
        axes.hist(before.ravel(), bins, color="#a9cfe8", label="fitted, 16 bits")
        axes.hist(after.ravel(), bins, histtype="step", color="#08306b", lw=1.5, label="as stored")
        axes.set(xlabel=name, ylabel="groups")
        axes.legend(frameon=False)
    figure.suptitle(title)
    return figure


def plot_frontier(
    points: Mapping[str, Sequence[tuple[float, float]]], dense: float, title: str
) -> Figure:
    """Series of (bits a weight, perplexity), and the dense model's perplexity as a line.

    What is more than FAR times as high would flatten all else: it is written at the upper edge.
    """
    figure, axes = _axes(None, 7, 4.5)
    for index, (name, series) in enumerate(points.items()):
        bits, perplexities = zip(*sorted(series), strict=True)
        axes.plot(bits, perplexities, marker=MARKERS[index % len(MARKERS)], label=name)
    axes.axhline(dense, color="#888888", ls="--", label="dense, 16 bits")
    axes.set(title=title, xlabel=BITS_LABEL)
    _scale_perplexity(axes)
    _cut_off(axes, points, dense)
    axes.legend(frameon=False)
    return figure


def plot_sweep(points: Sequence[SweepPoint]) -> Figure:
    """Perplexity over bits, a panel a text: each setting, the range of its seeds, the frontier.

    A setting whose perplexity is more than FAR times the best one's would flatten all others: the
    title names it instead. Raises InputError for no setting at all.
    """
    if all(point.config is None for point in points):
        raise InputError("the sweep holds no setting yet: there is nothing to draw")
    texts = list(points[0].perplexity)
    figure = new_figure(7 * len(texts), 6)
    for index, text in enumerate(texts):
        _plot_settings(figure.add_subplot(1, len(texts), index + 1), summaries(points, text), text)
    return figure


def plot_checkpoint(layers: Sequence[LayerSummary], picture: LayerMap) -> Figure:
    """A checkpoint in four panels: bits by part, outliers and loss by layer, the map of one."""
    figure = new_figure(14, 10)
    panels = [figure.add_subplot(2, 2, i + 1) for i in range(4)]
    _plot_bits(layers, panels[0])
    _plot_by_depth(layers, "outlier_share", outlier_finding(layers), "outliers, %", panels[1])
    loss = "squared error of the output, % of its square"
    _plot_by_depth(layers, "relative_loss", loss_finding(layers), loss, panels[2])
    shape = (picture.rows, picture.columns)
    logarithmic = picture.measure == "sensitivity"
    _plot_map(panels[3], picture.picture, shape, map_finding(picture), logarithmic)
    return figure


def plot_times(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Bars of `spqr bench matmul`: each candidate's speed over torch's dense product, a cluster a
    shape and batch; microseconds above each bar."""
    names = [key.removesuffix(" us") for key in rows[0] if key.endswith(" us")]
    names.remove("spread")
    base = "fp16 us" if "fp16 us" in rows[0] else "fp32 us"
    figure = new_figure(2 + 1.6 * len(rows), 4)
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = np.arange(len(rows)) + (i - (len(names) - 1) / 2) * width
        times = [row[f"{name} us"] or np.nan for row in rows]
        speeds = [row[base] / time for row, time in zip(rows, times, strict=True)]
        shade = str(0.8 * i / max(1, len(names) - 1))
        bars = axes.bar(places, speeds, width, label=name, color=shade)
        labels = ["" if np.isnan(time) else f"{time:.3g}" for time in times]
        axes.bar_label(bars, labels, fontsize=6, padding=1)
    ticks = [f"{row['m x n']}\nbatch {row['batch']}" for row in rows]
    axes.set_xticks(range(len(rows)), ticks, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_ylabel(f"speed over {base.removesuffix(' us')} (above: microseconds)")
    axes.set_title(title)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(names))
    return figure


def _axes(axes: Axes | None, width: float, height: float) -> tuple[Any, Axes]:
    """(figure, axes): those given, or new ones."""
    if axes is not None:
        return axes.figure, axes
    figure = new_figure(width, height)
    return figure, figure.add_subplot()


def _plot_bits(layers: Sequence[LayerSummary], axes: Axes) -> None:
    places = np.arange(len(layers))
    below = np.zeros(len(layers))
    for part in PARTS:
        bits = np.array([layer.part_bits[part] for layer in layers])
        axes.bar(places, bits, 0.9, bottom=below, color=PART_COLORS[part], label=part)
        below += bits
    axes.set(title=bits_finding(layers), xlabel="layer", ylabel="bits a weight")
    axes.title.set_fontsize("medium")
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _plot_by_depth(
    layers: Sequence[LayerSummary], field: str, title: str, label: str, axes: Axes
) -> None:
    kinds, table = by_depth_and_kind(layers, field)
    for index, kind in enumerate(kinds):
        marker = "os^Dvx+*"[index % 8]
        axes.plot(100 * table[:, index], marker=marker, label=kind)
    axes.set(title=title, xlabel="decoder block", ylabel=label, ylim=(0, None))
    axes.set_xticks(range(0, len(table), max(1, len(table) // 8)))
    axes.title.set_fontsize("medium")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _plot_map(
    axes: Axes, picture: Floats, shape: tuple[int, ...], title: str, logarithmic: bool
) -> None:
    """A pooled picture of a weight of `shape`: sensitivities, if logarithmic, else outliers."""
    low, high = 0.0, 100 * float(picture.max()) or 1.0
    label, values = "outliers, % of a cell", 100 * picture
    if logarithmic:
        low, high = -DECADES, 0.0
        label = "sensitivity, log10 of its share of the largest"
        values = np.log10(np.maximum(picture / max(float(picture.max()), 1e-30), 10**-DECADES))
    image = axes.imshow(
        values,
        cmap=COLORS,
        aspect="auto",
        interpolation="nearest",
        extent=(0, shape[1], shape[0], 0),
        vmin=low,
        vmax=high,
    )
    axes.set(title=title, xlabel="input (column)", ylabel="output (row)")
    axes.title.set_fontsize("medium")
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, label=label)


def _cut_off(axes: Axes, points: Mapping[str, Sequence[tuple[float, float]]], dense: float) -> None:
    """End the axis at FAR times the dense model's perplexity, if some are higher and some are not,
    and write those where they would be."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    limit, all_ = FAR * dense, [(*p, name) for name, series in points.items() for p in series]
    far = sorted(point for point in all_ if point[1] > limit)
    if not 0 < len(far) < len(all_):
        return
    axes.set_ylim(dense / MARGIN, limit)
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_minor_locator(NullLocator())
    for line, (bits, perplexity, name) in enumerate(far):
        axes.annotate(
            f"↑ {name}: {perplexity:,.0f}",
            (bits, limit),
            xytext=(0, -14 * line - 4),
            textcoords="offset points",
            va="top",
        )


def _plot_settings(axes: Axes, settings: Sequence[SettingSummary], text: str) -> None:
    """One panel of a sweep."""
    compressed = [setting for setting in settings if setting.name != DENSE]
    limit = FAR * min(setting.perplexity for setting in compressed)
    near = [setting for setting in compressed if setting.perplexity <= limit]
    far = [setting for setting in compressed if setting.perplexity > limit]
    for index, family in enumerate(dict.fromkeys(setting.family for setting in near)):
        members = [setting for setting in near if setting.family == family]
        _plot_family(axes, members, MARKERS[index % len(MARKERS)])
    for setting in settings:
        if setting.name == DENSE:
            axes.axhline(setting.perplexity, color="#888888", ls="--", label="dense, 16 bits")
    axes.set(title=sweep_finding(text, near, far), xlabel=BITS_LABEL)
    axes.title.set_fontsize("medium")
    _scale_perplexity(axes)
    axes.add_artist(axes.legend(frameon=False))
    _plot_frontier_line(axes, frontier(near))


def _plot_family(axes: Axes, members: Sequence[SettingSummary], marker: str) -> None:
    """Settings that vary one thing, each with the range of its seeds."""
    bits = [setting.bits for setting in members]
    means = np.array([setting.perplexity for setting in members])
    ranges = np.array([(setting.low, setting.high) for setting in members]).T
    axes.errorbar(bits, means, abs(ranges - means), ls="", marker=marker, label=members[0].family)


def _plot_frontier_line(axes: Axes, best: Sequence[SettingSummary]) -> None:
    """A line through the settings that none beats, numbered on its empty side, named below."""
    bits = [setting.bits for setting in best]
    axes.plot(bits, [setting.perplexity for setting in best], color="#bbbbbb", zorder=0)
    names = []
    for number, setting in enumerate(best, 1):
        place = (setting.bits, setting.perplexity)
        axes.annotate(str(number), place, (-10, -12), textcoords="offset points", fontsize="small")
        names += axes.plot([], [], " ", label=f"{number}  {setting.name}")
    axes.legend(
        handles=names,
        frameon=False,
        fontsize="small",
        handlelength=0,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
    )


def _scale_perplexity(axes: Axes) -> None:
    axes.set(ylabel="perplexity (logarithmic)", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")  # a decade would often have no other number
