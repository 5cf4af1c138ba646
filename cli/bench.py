"""spqr bench: how fast the kernels are on this machine."""

from __future__ import annotations

import click

from ._command import Command

__all__ = ["bench"]


@click.group()
def bench() -> None:
    """Measure the kernels beside torch's."""


@bench.command(cls=Command)
def matmul(as_json: bool) -> None:
    """x"""
