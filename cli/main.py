"""The command `spqr` and its subcommands."""

from __future__ import annotations

import click

import spqr_numba

from .bench import bench
from .compress import compress
from .demo import demo
from .eval import evaluate
from .generate import generate
from .inspect import inspect
from .sweep import sweep
from .write import write

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(spqr_numba.__version__)
def main() -> None:
    """Compress language models to 3 to 5 bits a weight, and use them."""


for command in (compress, evaluate, generate, inspect, sweep, write, demo, bench):
    main.add_command(command)
