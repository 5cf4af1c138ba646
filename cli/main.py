"""The command `spqr` and its subcommands."""

from __future__ import annotations

import click

import spqr_numba

__all__ = ["main"]


@click.group()
@click.version_option(spqr_numba.__version__)
def main() -> None:
    """Compress language models to 3 to 5 bits a weight, and use them."""
