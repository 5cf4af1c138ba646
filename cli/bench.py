"""spqr bench: how fast the kernels are on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from spqr_numba.errors import InputError

from ._command import Command, echo_table, emit

__all__ = ["bench"]

F = TypeVar("F", bound=Callable[..., Any])


class Shape(click.ParamType):
    """ROWSxCOLUMNS, as (out_features, in_features)."""

    name = "rowsxcolumns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a pair of ints."""
        if isinstance(value, tuple):
            return value
        rows, _, columns = value.partition("x")
        if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
            self.fail(f"{value!r} must look like 4096x4096", param, ctx)
        return int(rows), int(columns)


device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to run.",
)
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
threads_option = click.option("--threads", type=int, help="[default: one a core]")


@click.group()
def bench() -> None:
    """Measure the kernels beside torch's."""


@bench.command(cls=Command)
@device_option
@shapes_option
@bits_option
@click.option("--batch", "batches", multiple=True, default=[1], help="Inputs.  [repeatable]")
@click.option("--outliers", default=0.01, show_default=True, help="Share of the weights.")
@threads_option
def matmul(device: str, as_json: bool, **settings: Any) -> None:
    """Time y = W x from the compressed weight, beside torch's fp32 and bf16.

    GB/s count the bytes of the weight as stored; the machine's read bandwidth stands beside them.
    """
    _check_device(device)
    from spqr_numba.bench.matmul import measure

    _emit(measure(device=device, **settings), as_json)


@bench.command(cls=Command)
@device_option
@shapes_option
@bits_option
@threads_option
def quantize(device: str, as_json: bool, **settings: Any) -> None:
    """Time the compression of one weight, phase by phase."""
    _check_device(device)
    from spqr_numba.bench.quantize import measure

    _emit(measure(device=device, **settings), as_json)


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        found = "its kernels are to come" if torch.cuda.is_available() else "there is no GPU"
        raise InputError(f"cannot measure on cuda: {found}; use --device cpu")


def _emit(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    emit(rows, as_json, lambda: echo_table(rows))
