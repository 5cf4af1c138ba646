"""spqr inspect: what a compressed checkpoint is made of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._command import Cell, Command, echo_table, emit, format_bytes, note
from ._options import FILE

if TYPE_CHECKING:
    from spqr_numba.analysis.checkpoint import LayerSummary

__all__ = ["inspect"]


@click.command(cls=Command)
@click.argument("checkpoint")
@click.option("--html", type=FILE, help="Write one page with everything, for a browser.")
@click.option("--plot", type=FILE, help="Write a picture (.png, .pdf, .svg); needs matplotlib.")
@click.option("--layer", help="The layer to draw a map of; by default the one that loses most.")
@click.option(
    "--model",
    help="The dense model that CHECKPOINT was made from: the map is of sensitivities, which are"
    " measured on Python's manual, and not of outliers.",
)
def inspect(
    checkpoint: str,
    html: Path | None,
    plot: Path | None,
    layer: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Show what each layer of CHECKPOINT is made of.

    CHECKPOINT is a folder that `spqr compress` wrote. Bits are measured from the bytes on disk; the
    loss is the squared error of the layer's output on the calibration text.
    """
    from spqr_numba.analysis.checkpoint import inspect_checkpoint

    if (layer or model) and not (html or plot):
        raise click.UsageError("--layer and --model choose the map of --html or --plot; give one")
    layers = inspect_checkpoint(checkpoint)
    if html or plot:
        _draw(checkpoint, layers, layer or _worst(layers), model, html, plot)
    total = _total(layers)
    result = {"layers": [_to_json(layer) for layer in layers], "total": total}
    emit(result, as_json, lambda: _show(layers, total))


def _draw(
    checkpoint: str,
    layers: list[LayerSummary],
    layer: str,
    model: str | None,
    html: Path | None,
    plot: Path | None,
) -> None:
    from spqr_numba.analysis.maps import layer_map

    picture = layer_map(checkpoint, layer, model)
    if html:
        from spqr_numba.analysis.page import checkpoint_page

        title = Path(checkpoint).resolve().name
        html.write_text(checkpoint_page(title, layers, picture), encoding="utf-8")
        note(f"wrote {html}")
    if plot:
        from spqr_numba.analysis.plots import plot_checkpoint, save

        save(plot_checkpoint(layers, picture), plot)
        note(f"wrote {plot}")


def _worst(layers: list[LayerSummary]) -> str:
    """The layer of the largest relative loss; without a log, that of the most outliers."""
    return max(layers, key=lambda layer: (layer.relative_loss or 0, layer.outlier_share)).layer


def _total(layers: list[LayerSummary]) -> dict[str, Any]:
    from spqr_numba.analysis.findings import totals

    total = totals(layers)
    return asdict(total) | {"bits": total.bits}


def _show(layers: list[LayerSummary], total: dict[str, Any]) -> None:
    echo_table([_row(layer) for layer in layers])
    click.echo(
        f"\n{len(layers)} layers, {total['weights']:,} weights in {format_bytes(total['nbytes'])}:"
        f" {total['bits']:.3f} bits a weight, {total['outlier_share']:.2%} outliers"
    )


def _row(layer: LayerSummary) -> dict[str, Cell]:
    return {
        "layer": layer.layer,
        "shape": f"{layer.rows} x {layer.columns}",
        "bits": layer.bits,
        "outliers %": 100 * layer.outlier_share,
        "loss": layer.loss,
        "relative loss": layer.relative_loss,
    }


def _to_json(layer: LayerSummary) -> dict[str, Any]:
    return asdict(layer) | {"bits": layer.bits}
