"""spqr eval: perplexity of a model, dense or compressed, beside the baselines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ._command import Command, echo_table, emit
from ._comparison import baseline_rows, measure, table, text_windows
from ._options import device_option, model_argument, text_options

if TYPE_CHECKING:
    import torch

    from spqr_numba.evaluate.baselines import Measurement

__all__ = ["evaluate"]


@click.command("eval", cls=Command)
@model_argument
@text_options
@device_option
@click.option("--baselines", is_flag=True, help="Add rows for fp16, RTN and GPTQ.")
@click.option("--dense", help="With --baselines: the model they start from.  [default: MODEL]")
@click.option("--bits", default=3, show_default=True, help="With --baselines: of RTN and GPTQ.")
@click.option(
    "--calibration",
    metavar="DATASET",
    help="With --baselines: text for GPTQ.  [default: Python's manual]",
)
@click.option(
    "--calibration-nsamples",
    default=128,
    show_default=True,
    help="With --baselines: windows of that text.",
)
def evaluate(
    model: str | None,
    datasets: tuple[str, ...],
    seqlen: int | None,
    nsamples: int | None,
    device: str,
    baselines: bool,
    dense: str | None,
    bits: int,
    calibration: str | None,
    calibration_nsamples: int,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL.

    MODEL is a folder, a hub name or a .gguf file, dense or compressed; without it, the bundled
    model. It reads windows of text that do not overlap.
    """
    from spqr_numba.model.calibration import window_length
    from spqr_numba.model.integration import load_model

    loaded, tokenizer = load_model(model, device=device)
    length = window_length(loaded.config, seqlen)
    windows = text_windows(datasets, tokenizer, length, nsamples)
    if baselines:
        keywords = {"dataset": calibration, "nsamples": calibration_nsamples}
        keywords |= {"seqlen": length, "device": device}
        rows = list(_with_baselines(model, loaded, windows, dense, bits, keywords))
    else:
        rows = [measure(loaded, windows)]
    emit([row.to_dict() for row in rows], as_json, lambda: echo_table(table(rows)))


def _with_baselines(
    model: str | None,
    loaded: Any,
    windows: dict[str, torch.Tensor],
    dense: str | None,
    bits: int,
    calibration: dict[str, Any],
) -> Iterator[Measurement]:
    """fp16, RTN, GPTQ and, where MODEL is compressed, MODEL."""
    from spqr_numba.evaluate.baselines import is_compressed
    from spqr_numba.model.integration import load_model

    if is_compressed(loaded) and dense is None:
        raise click.UsageError(
            "MODEL is compressed, and the baselines start from a dense model: name it with --dense"
        )
    device = loaded.device
    yield measure(load_model(dense, device=device)[0] if dense else loaded, windows)
    yield from baseline_rows(dense or model, bits, windows, calibration)
    if is_compressed(loaded):
        yield measure(loaded, windows)
