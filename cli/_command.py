"""What every command has: --json and --debug, errors as one line, progress, tables."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from spqr_numba.errors import SpqrError

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Command", "Interrupted", "echo_table", "emit", "format_bytes", "note", "progress_bar"]

Cell = str | int | float | None


class Interrupted(click.ClickException):
    """Ctrl-C: the message says what is kept and how to go on."""

    exit_code = 130


class Command(click.Command):
    """A click command with --json and --debug, whose errors are messages and not tracebacks.

    The callback gets `as_json`. A SpqrError or an OSError ends the command with its message and
    code 1, Ctrl-C with code 130; --debug shows the traceback instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--json", "as_json"], is_flag=True, help="Print results as one JSON document."
            ),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the callback; turn what goes wrong into a message."""
        debug = ctx.params.pop("debug")
        _quiet_libraries()
        try:
            with _notes_on_stderr():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            if debug:
                raise
            raise Interrupted("interrupted; nothing was written") from None
        except (SpqrError, OSError) as error:
            if debug or getattr(error, "errno", None) == errno.EPIPE:
                raise  # a closed pipe is click's business: it leaves quietly
            raise click.ClickException(_told(error)) from error


def _told(error: Exception) -> str:
    """What went wrong, in words."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def emit(result: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result: as JSON, NaN and inf as null, or in the way that `show` has for people."""
    if as_json:
        click.echo(json.dumps(_plain(result), indent=2, allow_nan=False))
    else:
        show()


def note(message: str) -> None:
    """One line about the work, not part of its result."""
    click.echo(message, err=True)


def echo_table(rows: Sequence[Mapping[str, Cell]]) -> None:
    """Print rows as aligned columns, headed by the first row's keys; numbers to the right."""
    if not rows:
        return
    titles = list(rows[0])
    cells = [titles, *([_format(row[title]) for title in titles] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    numeric = [all(not isinstance(row[title], str) for row in rows) for title in titles]
    for line in cells:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        click.echo("  ".join(padded).rstrip())


def format_bytes(count: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def progress_bar(total: int | None = None, description: str = "", unit: str = "it") -> tqdm:
    """A bar with the time left, on stderr; rarely redrawn where nobody watches."""
    from tqdm import tqdm

    class Bar(tqdm):
        def reset(self, total: float | None = None) -> None:
            self.delay = 0  # work that has stages has not failed at once
            super().reset(total)

    watched = sys.stderr.isatty()
    return Bar(
        total=total,
        desc=description,
        unit=unit,
        file=sys.stderr,
        mininterval=0.2 if watched else 15,
        delay=0.1 if watched else 0,  # nothing to see of work that fails at once
        dynamic_ncols=True,
    )


class _Notes(logging.Handler):
    """Log records as lines on stderr, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Show what the package logs: resumed runs, growing damping, the way that work takes."""
    logger = logging.getLogger("spqr_numba")
    handler, level = _Notes(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _quiet_libraries() -> None:
    """Our own messages are enough: no advice and no bars of transformers'."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
