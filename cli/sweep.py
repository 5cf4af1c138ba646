"""spqr sweep: many settings on one model, and what each is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from ._command import Cell, Command, Interrupted, echo_table, emit, note, progress_bar
from ._comparison import text_windows
from ._options import (
    FILE,
    Several,
    device_option,
    grid_from,
    grid_options,
    skip_option,
    text_options,
)

if TYPE_CHECKING:
    import torch

    from spqr_numba.analysis.points import SweepPoint
    from spqr_numba.config import SpqrConfig
    from spqr_numba.model.budget import Target

__all__ = ["sweep"]

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@click.command(cls=Command)
@click.argument("model", required=False)
@click.argument("out", required=False)
@grid_options
@skip_option
@click.option(
    "--ablate",
    is_flag=True,
    help="Not just the settings: also each part of them alone on the paper's recipe, and left out.",
)
@click.option(
    "--baselines",
    type=Several(click.INT),
    metavar="BITS,...",
    help="Add RTN and GPTQ, a grid a row and in groups.",
)
@text_options
@click.option(
    "--calibration",
    metavar="DATASET",
    multiple=True,
    help="Text to calibrate on, as for `spqr compress`.  [repeatable; default: Python's manual]",
)
@click.option("--calibration-nsamples", default=128, show_default=True, help="Windows of it.")
@click.option(
    "--seed",
    "seeds",
    type=Several(click.INT),
    default="0",
    show_default=True,
    help="Of the choice of these windows; several make a point each.",
)
@click.option(
    "--tune",
    type=Several(click.IntRange(min=0)),
    metavar="STEPS,...",
    default="0",
    show_default=True,
    help="As for `spqr compress`; several make a point each. Rounding to nearest is not tuned.",
)
@click.option(
    "--tune-model",
    type=Several(click.IntRange(min=0)),
    metavar="STEPS,...",
    default="0",
    show_default=True,
    help="The same.",
)
@click.option("--tune-codes", is_flag=True, help="The same.")
@click.option(
    "--target-bits",
    type=Several(click.FLOAT),
    metavar="BITS,...",
    default=(),
    help="As for `spqr compress`; several make a point each, out of each setting with outliers.",
)
@click.option("--per-layer/--no-per-layer", default=True, help="As for `spqr compress`.")
@device_option
@click.option(
    "--no-dense",
    is_flag=True,
    help="Leave out the dense model and nats from it; it must fit in memory whole.",
)
@click.option("--plot", type=FILE, help="Draw what OUT holds (.png, .pdf, .svg); needs matplotlib.")
def sweep(model: str | None, out: str | None, as_json: bool, **options: Any) -> None:
    """Measure what settings are worth on MODEL, into the folder OUT.

    Settings take several values, as in `--bits 3,4 --fit joint,min-max`: all combinations are made,
    on each preset, but for those that contradict themselves. Each is compressed and measured as
    `spqr compress` and `spqr eval` do it, every block calibrated on what the compressed ones before
    it give. What OUT holds is not made again: an interrupted sweep goes on, and other options add
    to it.

    MODEL is a folder, a hub name or a .gguf file; with OUT alone, it is the bundled model.
    """
    from spqr_numba.analysis.points import read_sweep

    if out is None:
        model, out = None, model
    if out is None:
        raise click.UsageError("missing argument 'OUT', the folder to write")
    folder, plot = Path(out).expanduser(), options.pop("plot")
    if plot:
        _check_plot(plot)
    _run(model, folder, _settings(options), options)
    points = read_sweep(folder)
    if plot:
        _draw(points, plot)
    emit([point.to_dict() for point in points], as_json, lambda: echo_table(_table(points)))


def _settings(options: dict[str, Any]) -> dict[str, SpqrConfig]:
    """Name -> setting, of everything that the options ask for; takes those options out."""
    from spqr_numba.analysis.settings import ablation, baselines, grid

    presets, values = grid_from(options)
    skip, bits = options.pop("skip"), options.pop("baselines")
    if options.pop("ablate"):
        found: dict[str, SpqrConfig] = {}
        for preset in presets:
            found |= ablation(preset, _single(values))
    else:
        found = grid(presets, values)
    found |= baselines(bits or ())
    skipped = "".join(f", skip {pattern}" for pattern in skip)
    return {name + skipped: replace(config, skip=skip) for name, config in found.items()}


def _single(values: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Field -> its only value."""
    for field, several in values.items():
        if len(several) > 1:
            raise click.UsageError(
                f"--ablate takes a setting to pieces, and {field} has {len(several)} values; give"
                " one"
            )
    return {field: value for field, (value,) in values.items()}


def _run(
    model: str | None, folder: Path, settings: dict[str, SpqrConfig], options: dict[str, Any]
) -> None:
    """Make the points that are missing, with a bar over all of them; say what Ctrl-C leaves."""
    from spqr_numba.analysis.sweep import sweep as run

    windows = _windows(model, options)
    calibration = {
        "targets": _targets(options.pop("target_bits"), options.pop("per_layer")),
        "dataset": options.pop("calibration"),
        "nsamples": options.pop("calibration_nsamples"),
        "dense": not options.pop("no_dense"),
    }
    try:
        with progress_bar(description="sweeping") as bar:
            bar.bar_format = BAR
            for _ in run(model, settings, windows, folder, progress=bar, **calibration, **options):
                pass
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; what is finished is kept in {folder}: run the same command again to go"
            " on"
        ) from None


def _targets(bits: tuple[float, ...], per_layer: bool) -> list[Target]:
    from spqr_numba.model.budget import Target

    return [Target(each, per_layer) for each in bits]


def _windows(model: str | None, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Name of each text -> its windows; takes the options of texts out, but for the length."""
    from spqr_numba.model.calibration import window_length
    from spqr_numba.model.source import open_source

    source = open_source(model)
    options["seqlen"] = window_length(source.config, options["seqlen"])
    datasets, limit = options.pop("datasets"), options.pop("nsamples")
    return text_windows(datasets, source.tokenizer(), options["seqlen"], limit)


def _table(points: list[SweepPoint]) -> list[dict[str, Cell]]:
    """A row a point, by bits; excess and nats from the dense model are means over texts."""
    from spqr_numba.analysis.points import excess, find_dense

    dense = find_dense(points)
    rows = []
    for point in sorted(points, key=lambda point: point.bits):
        row: dict[str, Cell] = {"setting": point.name, "seed": point.seed}
        row |= {"bits": round(point.bits, 3), "outliers %": 100 * point.outlier_share}
        row |= {f"perplexity, {text}": value for text, value in point.perplexity.items()}
        if dense:
            row["excess"] = fmean(excess(point, dense).values())
            row["nats"] = fmean(point.nats.values()) if point.nats else None
        rows.append(row)
    return rows


def _check_plot(plot: Path) -> None:
    """Fail now and not after hours."""
    from spqr_numba.analysis.plots import check_format

    check_format(plot)


def _draw(points: list[SweepPoint], plot: Path) -> None:
    from spqr_numba.analysis.plots import plot_sweep, save

    save(plot_sweep(points), plot)
    note(f"wrote {plot}")
