"""spqr inspect: what a compressed checkpoint is made of."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ._command import Cell, Command, echo_table, emit, format_bytes

if TYPE_CHECKING:
    from spqr_numba.analysis.checkpoint import LayerSummary

__all__ = ["inspect"]


@click.command(cls=Command)
@click.argument("checkpoint")
def inspect(checkpoint: str, as_json: bool) -> None:
    """Show what each layer of CHECKPOINT is made of.

    CHECKPOINT is a folder that `spqr compress` wrote. Bits are measured from the bytes on disk; the
    loss is the squared error of the layer's output on the calibration text.
    """
    from spqr_numba.analysis.checkpoint import inspect_checkpoint

    layers = inspect_checkpoint(checkpoint)
    total = _total(layers)
    result = {"layers": [_to_json(layer) for layer in layers], "total": total}
    emit(result, as_json, lambda: _show(layers, total))


def _total(layers: list[LayerSummary]) -> dict[str, Any]:
    weights = sum(layer.rows * layer.columns for layer in layers)
    nbytes = sum(layer.nbytes for layer in layers)
    outliers = sum(layer.outlier_share * layer.rows * layer.columns for layer in layers)
    return {
        "weights": weights,
        "nbytes": nbytes,
        "bits": 8 * nbytes / weights,
        "outlier_share": outliers / weights,
    }


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
