"""What `spqr eval`, `demo` and `sweep` share: texts to windows, models to rows to a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from ._command import Cell, format_bytes, progress_bar

if TYPE_CHECKING:
    import torch

    from spqr_numba.config import SpqrConfig
    from spqr_numba.evaluate.baselines import Measurement

__all__ = ["baseline_rows", "compressed", "measure", "table", "text_windows"]

Windows = Mapping[str, "torch.Tensor"]
DEFAULT_TEXT = "manual"


def measure(model: Any, windows: Windows, name: str | None = None) -> Measurement:
    """A row: size and perplexity of a loaded model, with a bar over the windows."""
    from spqr_numba.evaluate import baselines

    with progress_bar(sum(map(len, windows.values())), "evaluating", "window") as bar:
        return baselines.measure(model, windows, name, bar.update)


def text_windows(
    datasets: Sequence[str], tokenizer: Any, seqlen: int, limit: int | None
) -> dict[str, torch.Tensor]:
    """Name of each text (without any, the manual) -> its windows, int64 [N, seqlen]."""
    from spqr_numba.model.calibration import consecutive_windows, load_tokens

    windows: dict[str, torch.Tensor] = {}
    for dataset in datasets or (None,):
        name = Path(dataset).stem if dataset else DEFAULT_TEXT
        if name in windows:
            raise click.UsageError(f"two texts are called {name!r}; rename the file of one")
        tokens = load_tokens(dataset, tokenizer, "test")
        windows[name] = consecutive_windows(tokens, seqlen, limit)
    return windows


@contextmanager
def compressed(
    source: str | None, config: SpqrConfig | None, calibration: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) of `source` compressed, in a folder that goes afterwards.

    config None is what `compress` does by default. calibration holds the keywords of `compress`:
    dataset, nsamples, seqlen, seed, device; on that device the model is.
    """
    from spqr_numba.evaluate.baselines import describe
    from spqr_numba.model.compress import compress
    from spqr_numba.model.integration import load_model

    with TemporaryDirectory(prefix="spqr-") as folder:
        out = Path(folder) / "model"
        name = describe(config) if config else "SpQR by layer"
        with progress_bar(description="preparing") as bar:
            bar.bar_format = f"{name}, {{l_bar}}{{bar}}{{r_bar}}"
            compress(source, out, config, progress=bar, **calibration)
        yield load_model(str(out), device=calibration.get("device", "cpu"))


def baseline_rows(
    source: str | None, bits: int, windows: Windows, calibration: Mapping[str, Any]
) -> Iterator[Measurement]:
    """The rows of `source` as RTN and GPTQ."""
    from spqr_numba.evaluate.baselines import baseline_configs

    for config in baseline_configs(bits):
        with compressed(source, config, calibration) as (model, _):
            yield measure(model, windows)


def table(rows: list[Measurement]) -> list[dict[str, Cell]]:
    """Rows for `echo_table`: one column of perplexity a text."""
    return [_cells(row) for row in rows]


def _cells(row: Measurement) -> dict[str, Cell]:
    cells: dict[str, Cell] = {"model": row.name, "bits": round(row.bits, 3)}
    cells["size"] = format_bytes(row.nbytes)
    return cells | {f"perplexity, {text}": value for text, value in row.perplexity.items()}
