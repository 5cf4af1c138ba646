"""spqr compress: a checkpoint becomes one of 3 to 5 bits a weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spqr_numba.config import CHOSEN_FIELDS, DEFAULT_BITS

from ._command import (
    Cell,
    Command,
    Interrupted,
    echo_table,
    emit,
    format_bytes,
    note,
    progress_bar,
)
from ._options import (
    calibration_options,
    config_from,
    config_options,
    device_option,
    target_bits_from,
)

if TYPE_CHECKING:
    from spqr_numba.config import SpqrConfig
    from spqr_numba.model.report import CompressionReport, LayerRow, TunedRow

__all__ = ["compress"]


@click.command(cls=Command)
@click.argument("model", required=False)
@click.argument("out", required=False)
@config_options
@calibration_options
@click.option(
    "--tune",
    type=click.IntRange(min=0),
    default=0,
    metavar="STEPS",
    help="Train statistics, outliers and norms of each compressed block for so many steps, towards"
    " the output of the dense block.  [default: 0]",
)
@click.option(
    "--tune-model",
    type=click.IntRange(min=0),
    default=0,
    metavar="STEPS",
    help="Train them in all blocks together for so many steps, towards what the dense model"
    " predicts.  [default: 0]",
)
@click.option(
    "--tune-codes",
    is_flag=True,
    help="With --tune-model: train codes too, which takes 16 bytes more for each weight.",
)
@device_option
@click.option(
    "--offload-activations",
    "--offload_activations",
    "offload_activations",
    is_flag=True,
    help="Keep hidden states in main memory, also where the GPU has room.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Windows run at once.  [default: about 4096 tokens]",
)
@click.option(
    "--target-bits",
    type=float,
    help="Bits a weight that all compressed weights are to come to: each layer gets the bits, the"
    " group size, the bits of scales and zeros and the outlier threshold with which they do most. "
    f" [default: {DEFAULT_BITS}, unless --preset or a flag of one of these says what all layers"
    " get]",
)
@click.option(
    "--per-layer/--no-per-layer",
    default=True,
    help="With --target-bits: choose all of these for each layer, or outlier thresholds alone."
    "  [default: per layer]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a compressed model.")
def compress(model: str | None, out: str | None, as_json: bool, **options: Any) -> None:
    """Compress MODEL into the folder OUT.

    MODEL is a folder, a hub name or a .gguf file; with OUT alone, it is the bundled model. A run
    that was killed goes on behind what it finished when the same command is run again.
    """
    if out is None:
        model, out = None, model
    if out is None:
        raise click.UsageError("missing argument 'OUT', the folder to write")
    if model is None:
        _check_out_alone(out)
    options["target_bits"] = target_bits_from(options)
    _check_choice(options)
    config = config_from(options)
    if model is not None and config.use_hessian and not options["dataset"]:
        note(
            "calibrating on Python's manual: give --dataset text like what the model is used for,"
            " or let it write some (spqr write)"
        )
    report = _compress(model, Path(out).expanduser(), config, options)
    emit(report.to_dict(), as_json, lambda: _show(report, options["target_bits"]))


def _check_out_alone(out: str) -> None:
    """Refuse a model where the folder to write is asked for, and say which model goes there."""
    from spqr_numba.model.checkpoint import replaceable

    path = Path(out).expanduser()
    if path.is_file() or ((path / "config.json").is_file() and not replaceable(path)):
        raise click.UsageError(f"missing argument 'OUT', the folder to write: {out} is a MODEL")
    note(f"no MODEL is named: the bundled one is compressed into {out}")


def _check_choice(options: dict[str, Any]) -> None:
    """Refuse a setting for all layers that is to be chosen for each of them."""
    if options["target_bits"] is None or not options["per_layer"]:
        return
    for name in CHOSEN_FIELDS:
        if options[name] is not None:
            raise click.UsageError(
                f"--{name.replace('_', '-')} says what all layers get, and --target-bits chooses it"
                " for each: leave one of them out, or add --no-per-layer"
            )


def _compress(
    model: str | None, out: Path, config: SpqrConfig, options: dict[str, Any]
) -> CompressionReport:
    """Run with a bar; say what Ctrl-C leaves."""
    from spqr_numba.model.checkpoint import finished_blocks, partial_of
    from spqr_numba.model.compress import compress as run

    try:
        with progress_bar(description="preparing") as bar:
            return run(model, out, config, progress=bar, **options)
    except KeyboardInterrupt:
        partial = partial_of(out)
        if not partial.exists():
            raise
        raise Interrupted(
            f"interrupted; {partial} keeps what is finished (blocks: {finished_blocks(partial)})"
            " and tried: run the same command again to go on behind it, or delete that folder"
        ) from None


def _show(report: CompressionReport, target_bits: float | None) -> None:
    aim = "" if target_bits is None else f", {target_bits:g} aimed at"
    rows = [
        ("weights compressed", f"{sum(row.weights for row in report.layers):,}"),
        (
            "bits a weight",
            f"{report.bits:.3f} measured, {report.formula_bits:.3f} by formula{aim}",
        ),
        ("outliers", f"{report.outlier_share:.2%}"),
        *([("tuning", _tuning(report))] if report.tuned else []),
        *([("tuning the model", _model_tuning(report.model))] if report.model else []),
        ("folder", f"{report.out} ({format_bytes(report.bytes)})"),
        ("seconds", ", ".join(f"{name} {s:.1f}" for name, s in report.seconds.items())),
    ]
    width = max(len(title) for title, _ in rows)
    for title, text in rows:
        click.echo(f"{title.ljust(width)}  {text}")
    if target_bits is not None:
        click.echo()
        echo_table(_choices(report.layers))


def _tuning(report: CompressionReport) -> str:
    """What it did to the blocks' outputs, in a line."""
    better = [row for row in report.tuned if row.steps]
    left = sum(row.error_after / row.error_before for row in better) / max(len(better), 1)
    return f"{len(better)} of {len(report.tuned)} blocks, {left:.1%} of their output error left"


def _model_tuning(row: TunedRow) -> str:
    """What it did to the model's predictions, in a line."""
    return (
        f"{row.error_after:.4f} of {row.error_before:.4f} nats a token from the dense model's"
        " predictions left"
    )


def _choices(layers: list[LayerRow]) -> list[dict[str, Cell]]:
    """What layers were given: a line for each setting of codes, with their thresholds."""
    chosen: dict[tuple[int, float, int, int], list[LayerRow]] = {}
    for row in layers:
        size = row.group_size or math.inf
        chosen.setdefault((row.code_bits, size, row.scale_bits, row.zero_bits), []).append(row)
    weights = sum(row.weights for row in layers)
    return [
        {
            "bits": bits,
            "group": "row" if group == math.inf else group,
            "scale, zero": f"{scale}, {zero}",
            "layers": len(rows),
            "weights %": 100 * sum(row.weights for row in rows) / weights,
            "outlier thresholds": _range([row.outlier_threshold for row in rows]),
        }
        for (bits, group, scale, zero), rows in sorted(chosen.items(), key=lambda item: item[0])
    ]


def _range(thresholds: list[float | None]) -> str:
    """Smallest and largest, and how many layers keep no outliers."""
    kept = [threshold for threshold in thresholds if threshold is not None]
    parts = [f"{min(kept):.3g} to {max(kept):.3g}"] if kept else []
    without = len(thresholds) - len(kept)
    return ", ".join(parts + ([f"none in {without}"] if without else []))
