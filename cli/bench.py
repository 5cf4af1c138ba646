"""spqr bench: how fast the kernels are on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ._command import Command, echo_table, emit, note
from ._options import FILE, device_option

__all__ = ["bench"]


class Shape(click.ParamType):
    """ROWSxCOLUMNS as (out_features, in_features), or the name of a model's shape."""

    name = "rowsxcolumns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a pair of ints, or the name."""
        if isinstance(value, tuple) or not value[:1].isdecimal():
            return value
        rows, _, columns = value.partition("x")
        if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
            self.fail(f"{value!r} must look like 4096x4096", param, ctx)
        return int(rows), int(columns)


shapes_option = click.option(
    "--shape",
    "shapes",
    type=Shape(),
    multiple=True,
    default=[(4096, 4096)],
    show_default="4096x4096",
    help="Of the weight.  [repeatable]",
)
bits_option = click.option("--bits", default=3, show_default=True, help="Bits of a weight code.")
outliers_option = click.option(
    "--outliers", default=0.01, show_default=True, help="Share of the weights."
)
threads_option = click.option("--threads", type=int, help="On a CPU.  [default: one a core]")


@click.group()
def bench() -> None:
    """Measure the kernels beside torch's."""


@bench.command(cls=Command)
@device_option
@shapes_option
@bits_option
@click.option(
    "--batch", "batches", multiple=True, default=[1], show_default="1", help="Inputs.  [repeatable]"
)
@outliers_option
@threads_option
@click.option("--plot", type=FILE, help="Write a picture (.png, .pdf, .svg); needs matplotlib.")
def matmul(as_json: bool, plot: Path | None, **settings: Any) -> None:
    """Time y = W x from the compressed weight, beside torch's dense ones.

    On a GPU also beside torch's int4, gemlite, bitsandbytes and spqr_quant, where installed.

    GB/s count the bytes of the weight as stored; the machine's read bandwidth stands beside them.
    """
    from spqr_numba.bench.matmul import measure

    rows = measure(**settings)
    _emit(rows, as_json)
    if plot:
        from spqr_numba.analysis.plots import plot_times, save

        save(plot_times(rows, f"Matrix product, {settings['bits']} bit"), plot)
        note(f"wrote {plot}")


@bench.command(cls=Command)
@device_option
@shapes_option
@bits_option
@threads_option
@click.option("--blocks", default=1, show_default=True, help="Of a model: how many to compress.")
@click.option("--windows", default=128, show_default=True, help="Of a model: calibration windows.")
@click.option("--seqlen", default=2048, show_default=True, help="Of a model: tokens a window.")
@click.option("--offload-activations", is_flag=True, help="Of a model: keep states in main memory.")
@click.option(
    "--against", type=click.Choice(["reference"]), help="Time it column by column in torch too."
)
def quantize(as_json: bool, **settings: Any) -> None:
    """Time the compression of a weight, phase by phase.

    --shape also takes llama2-7b or llama2-70b: a whole decoder block of that shape.
    """
    from spqr_numba.bench.quantize import measure

    _emit(measure(**settings), as_json)


@bench.command(cls=Command)
@device_option
@click.option(
    "--shape",
    metavar="llama2-7b|llama2-70b|MODEL",
    help="A random model of this shape, or a model and a random twin.  [default: the bundled one]",
)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(["eager", "graph", "compiled"]),
    multiple=True,
    help="How decode steps run.  [default: graph and compiled, on a CPU eager]  [repeatable]",
)
@bits_option
@outliers_option
@click.option("--prompt-tokens", default=64, show_default=True, help="Tokens of the prompt.")
@click.option("--new-tokens", default=128, show_default=True, help="Tokens behind it.")
@click.option("--dense/--no-dense", default=True, help="Measure the dense model too.")
@threads_option
def generate(as_json: bool, **settings: Any) -> None:
    """Time a model that continues a prompt, beside the same model dense.

    Tokens a second are those at full speed; `ready s` is what passes from the prompt until then,
    the first time and again.
    """
    from spqr_numba.bench.generate import measure

    _emit(measure(**settings), as_json)


def _emit(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    emit(rows, as_json, lambda: echo_table(rows))
