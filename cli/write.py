"""spqr write: a model writes the text that it is then calibrated on."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ._command import Cell, Command, echo_table, emit, progress_bar
from ._options import device_option, seqlen_option

__all__ = ["write"]

SUFFIX = ".safetensors"
SHOWN = 300  # characters of a window


@click.command(cls=Command)
@click.argument("model", required=False)
@click.argument("file", required=False)
@click.option(
    "--nsamples",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Windows to write.",
)
@seqlen_option
@click.option("--seed", default=0, show_default=True, help="Of the random choice.")
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Windows written at once.  [default: 32, on a GPU 256 if it has room]",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
def write(
    model: str | None,
    file: str | None,
    nsamples: int,
    seqlen: int | None,
    seed: int,
    device: str,
    batch_size: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Let MODEL write text of its own into FILE.safetensors, to be calibrated on.

    `spqr compress MODEL OUT --dataset FILE.safetensors` then needs no text like what the model is
    used for. MODEL is a folder, a hub name or a .gguf file; with FILE alone, it is the bundled
    model.
    """
    if file is None:
        model, file = None, model
    path = _checked(file, overwrite)

    from safetensors.torch import save_file

    from spqr_numba.files import write_whole
    from spqr_numba.model.calibration import window_length
    from spqr_numba.model.integration import load_model
    from spqr_numba.own_text import own_text

    loaded, tokenizer = load_model(model, device=device)
    length = window_length(loaded.config, seqlen)
    started = time.perf_counter()
    with progress_bar(nsamples * length, "writing", " tokens") as bar:
        windows = own_text(
            loaded,
            tokenizer,
            nsamples,
            length,
            seed=seed,
            batch_size=batch_size,
            progress=bar.update,
        )
    seconds = time.perf_counter() - started
    write_whole(path, lambda to: save_file({"tokens": windows.int()}, to))
    result: dict[str, Cell] = {
        "windows": nsamples,
        "tokens": windows.numel(),
        "seconds": seconds,
        "tokens/s": windows.numel() / seconds,
        "file": str(path),
    }
    begins = tokenizer.decode(windows[0])[:SHOWN]
    emit(result | {"begins": begins}, as_json, lambda: _show(result, begins))


def _checked(file: str | None, overwrite: bool) -> Path:
    """The path of a file that may be written."""
    if file is None:
        raise click.UsageError("name the FILE.safetensors to write")
    path = Path(file).expanduser()
    if path.suffix != SUFFIX:
        raise click.UsageError(
            f"the file to write must end in {SUFFIX}, and {file} does not: spqr write MODEL"
            f" FILE{SUFFIX}"
        )
    if path.is_dir():
        raise click.UsageError(f"{file} is a folder; name a file")
    if path.exists() and not overwrite:
        raise click.UsageError(f"{file} exists; --overwrite replaces it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise click.UsageError(f"there is no folder {path.parent} to write {path.name} into")
    from spqr_numba.files import check_writable

    try:  # now, and not when all is written
        check_writable(path)
    except OSError as error:
        raise click.UsageError(
            f"nothing can be written into the folder {folder}: {error.strerror}"
        ) from error
    return path


def _show(result: dict[str, Cell], begins: str) -> None:
    echo_table([result])
    click.echo(f"\nThe first begins: {begins}")
