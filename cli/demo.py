"""spqr demo: the bundled model compressed, measured beside the baselines, and talking."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from spqr_numba.config import DEFAULT_PRESET, PRESETS

from ._command import Command, echo_table, emit, note
from ._comparison import baseline_rows, compressed, measure, table

if TYPE_CHECKING:
    import torch

    from spqr_numba.evaluate.baselines import Measurement

__all__ = ["demo"]

NSAMPLES = 32
NEW_TOKENS = 80
PROMPT = 'The "while" statement is used for'
TEXT = "unseen topics"


@click.command(cls=Command)
def demo(as_json: bool) -> None:
    """Compress the bundled model, measure it, let it talk.

    It stands beside fp16, RTN and GPTQ. The model has read Python's manual and the docstrings of
    the standard library, but for the topics that it is measured on.
    """
    started = time.perf_counter()
    with TemporaryDirectory(prefix="spqr-") as folder:
        calibration = {"dataset": _calibration_file(folder), "nsamples": NSAMPLES}
        rows, text = _compare(calibration)
    result = {
        "rows": [row.to_dict() for row in rows],
        "prompt": PROMPT,
        "text": text,
        "seconds": time.perf_counter() - started,
    }
    emit(result, as_json, lambda: _show(rows, result))


def _calibration_file(folder: str) -> str:
    from spqr_numba.demo.corpus import training_text

    path = Path(folder) / "manual.txt"
    path.write_text(training_text(), encoding="utf-8")
    return str(path)


def _compare(calibration: dict[str, Any]) -> tuple[list[Measurement], str]:
    """The table's rows, and what the SpQR model says."""
    from spqr_numba.generate import generate
    from spqr_numba.model.integration import load_model

    dense, tokenizer = load_model(None)
    windows = {TEXT: _held_out_windows(dense, tokenizer)}
    bits = PRESETS[DEFAULT_PRESET].bits
    rows = [measure(dense, windows), *baseline_rows(None, bits, windows, calibration)]
    with compressed(None, None, calibration) as (model, _):
        rows.append(measure(model, windows))
        text = generate(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS).text
    return rows, text


def _held_out_windows(model: Any, tokenizer: Any) -> torch.Tensor:
    from spqr_numba.demo.corpus import held_out_text
    from spqr_numba.model.calibration import consecutive_windows, tokenize, window_length

    tokens = tokenize(held_out_text(), tokenizer)
    return consecutive_windows(tokens, window_length(model.config, None))


def _show(rows: list[Measurement], result: dict[str, Any]) -> None:
    click.echo()
    echo_table(table(rows))
    continuation = click.style(result["text"], bold=True)
    click.echo(f"\nThe SpQR model continues a prompt:\n\n{PROMPT}{continuation}\n")
    note(f"{result['seconds']:.0f} s in all")
