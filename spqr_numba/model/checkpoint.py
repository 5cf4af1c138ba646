"""Writing a compressed model: block by block, resumable, and whole or not there at all.

Everything goes into `<OUT>.partial` first: one safetensors shard a block, one for the rest, and the
hidden states that the next block starts from. A run that was killed finds its shards there and goes
on behind the last one. When all is written, the folder gets its config and is renamed to OUT.

    progress.json              fingerprints of the run; its presence marks the folder as unfinished,
                               and a lock on it that a process is writing there
    model-00001-of-00003...    shards, each renamed into place when whole
    hidden-00001.safetensors   hidden states that block 1 gets; the one before is deleted
    kept-tokens.safetensors    what the model's loss feels of each token
    kept-tuned.safetensors     what tuning the whole model changed; then each shard gets its part of
                               it, and again, if the run was killed meanwhile
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import finalize

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from ..files import sync, write_whole
from .registration import is_ours
from .source import CONFIG_FILE, INDEX_FILE

try:
    import fcntl
except ImportError:  # where there is no POSIX
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "CheckpointWriter",
    "WriteBehind",
    "amended",
    "check_free",
    "finished_blocks",
    "partial_of",
    "replaceable",
]

PROGRESS_FILE = "progress.json"
HIDDEN = "hidden"
KEPT = "kept-"
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
CLAIMED = (errno.EACCES, errno.EAGAIN)

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """The folder OUT while it is being made.

    out           where the model goes
    blocks        number of decoder blocks
    fingerprint   of everything that shapes the result; a partial run is continued only if equal
    found_out     likewise, of what shapes all that is kept before the first block is finished
    overwrite     replace OUT, once the new one is whole, and blocks of a run with other settings

    Raises CheckpointError where either is there and overwrite is not set, or OUT cannot be made, or
    another process is making it.
    """

    def __init__(
        self,
        out: Path,
        blocks: int,
        fingerprint: str,
        found_out: str = "",
        *,
        overwrite: bool = False,
    ) -> None:
        check_free(out, overwrite)
        self.out = out
        self.partial = partial_of(out)
        self._blocks = blocks
        self._shards = blocks + 1
        with self._reported("make the folder"):
            run = {"fingerprint": fingerprint, "found_out": found_out}
            self.finished_blocks = self._resume(run, overwrite)

    def write_block(
        self, index: int, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor | None
    ) -> None:
        """Write the shard of block `index`, and `hidden`, which block index + 1 gets.

        hidden [windows, L, d], None where no block needs it. Once this returns the block is safe.
        """
        if hidden is not None:
            # Not waited for: a killed process loses nothing, and this file is large and soon gone.
            self._write(self._hidden_path(index + 1), {HIDDEN: hidden}, wait=False)
        self._write(self._shard_path(index), tensors)
        self._hidden_path(index).unlink(missing_ok=True)
        self.finished_blocks = index + 1

    def read_block(self, index: int) -> dict[str, torch.Tensor]:
        """What `write_block` or `amend_block` wrote."""
        return load_file(self._shard_path(index))

    def amend_block(self, index: int, changes: Mapping[str, torch.Tensor]) -> None:
        """Put what belongs into the shard of block `index` of `changes` there."""
        self._write(self._shard_path(index), amended(self.read_block(index), changes))

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors under a name of their own, until the model is finished."""
        self._write(self._kept_path(name), tensors)

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What `write_tensors` wrote, in this run or the one that it continues."""
        return load_file(self._kept_path(name))

    def holds(self, name: str) -> bool:
        """Whether `write_tensors` was there with this name."""
        return self._kept_path(name).is_file()

    def write_rest(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the shard of everything outside the blocks."""
        self._write(self._shard_path(self._blocks), tensors)

    def write_text(self, name: str, text: str) -> None:
        """Write the small file `name`, at once and whole."""
        with self._reported(f"write {name}"):
            write_whole(
                self.partial / name, lambda to: to.write_text(text, encoding="utf-8"), wait=True
            )

    def read_text(self, name: str) -> str:
        """What `write_text` wrote, in this run or the one that it continues; "" if nothing."""
        path = self.partial / name
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def read_hidden(self) -> torch.Tensor:
        """The hidden states that the first unfinished block gets: [windows, L, d].

        Raises CheckpointError where they were lost (a power cut, a deleted file).
        """
        path = self._hidden_path(self.finished_blocks)
        try:
            return load_file(path)[HIDDEN]
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot continue: {path} is lost or damaged ({error}); delete {self.partial} to"
                " start anew"
            ) from error

    def finish(self, config: str) -> None:
        """Write index and config, and rename the folder to OUT, in one step."""
        self.write_text(INDEX_FILE, json.dumps(self._index(), indent=2) + "\n")
        self.write_text(CONFIG_FILE, config)
        self._hidden_path(self._blocks).unlink(missing_ok=True)
        for path in self.partial.glob(f"{KEPT}*"):
            path.unlink()
        with self._reported("finish"):
            for path in self.partial.iterdir():
                sync(path)
            _move_into_place(self.partial, self.out)
            (self.out / PROGRESS_FILE).unlink()

    def _resume(self, run: Mapping[str, str], overwrite: bool) -> int:
        """Blocks that an earlier run of the same fingerprint finished; makes the folder."""
        text = self.read_text(PROGRESS_FILE)
        if text:
            self._claim()
        before = json.loads(text) if text else {}
        finished = finished_blocks(self.partial) if text else 0
        if before.get("fingerprint") == run["fingerprint"]:
            logger.warning(
                "%s: continuing behind %d finished of %d blocks",
                self.partial, finished, self._blocks,
            )  # fmt: skip
            return finished
        if finished and not overwrite:
            raise CheckpointError(
                f"{self.partial} holds {finished} finished blocks of another model, settings or"
                " calibration; choose another folder, or overwrite them (--overwrite)"
            )
        if not finished and run["found_out"] and before.get("found_out") == run["found_out"]:
            logger.warning("%s: going on with what was found out for other bits", self.partial)
        elif before:
            logger.warning(
                "%s is of another model, settings or calibration: starting anew", self.partial
            )
            shutil.rmtree(self.partial)
        elif self.partial.exists() and any(self.partial.iterdir()):
            raise CheckpointError(
                f"{self.partial} exists and is no unfinished run of ours; move it away"
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        self.write_text(PROGRESS_FILE, json.dumps(run))
        self._claim()
        return 0

    def _claim(self) -> None:
        """Let no other process write into the folder while this one lives."""
        if fcntl is None:
            return
        claimed = os.open(self.partial / PROGRESS_FILE, os.O_RDWR)
        finalize(self, os.close, claimed)
        try:
            fcntl.lockf(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in CLAIMED:
                raise CheckpointError(
                    f"another process is writing {self.partial}; wait for it, or choose another"
                    " folder"
                ) from None
            logger.debug("%s cannot be claimed: %s", self.partial, error)

    def _shard_path(self, index: int) -> Path:
        return self.partial / f"model-{index + 1:05d}-of-{self._shards:05d}.safetensors"

    def _hidden_path(self, index: int) -> Path:
        return self.partial / f"hidden-{index:05d}.safetensors"

    def _kept_path(self, name: str) -> Path:
        return self.partial / f"{KEPT}{name}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor], *, wait: bool = True) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with self._reported(f"write {path.name}"):
            write_whole(path, lambda to: save_file(contiguous, to, metadata={"format": "pt"}), wait)

    def _index(self) -> dict[str, Any]:
        weight_map: dict[str, str] = {}
        total_size = 0
        for index in range(self._shards):
            path = self._shard_path(index)
            with safe_open(path, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
            total_size += path.stat().st_size
        return {"metadata": {"total_size": total_size}, "weight_map": weight_map}

    @contextmanager
    def _reported(self, action: str) -> Iterator[None]:
        """Turn failures to write into CheckpointErrors that say what to do."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) in NO_SPACE or "os error 28" in str(error):
                raise CheckpointError(
                    f"no space left to {action} in {self.partial}; free some and run the same"
                    " command again: it continues behind the last finished block"
                ) from error
            raise CheckpointError(f"cannot {action} in {self.partial}: {error}") from error


class WriteBehind:
    """Writes a block while the next one is worked on: for a GPU, to which a disk is slow.

    A killed run loses the block that is being written with the one in flight.
    """

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, "spqr-writer")
        self._written: Future[None] | None = None

    def write_block(
        self, index: int, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor | None
    ) -> None:
        """Begin with `CheckpointWriter.write_block`; nothing may change the tensors meanwhile."""
        self.wait()
        self._written = self._thread.submit(self._writer.write_block, index, tensors, hidden)

    def wait(self) -> None:
        """Until all is written. Raises CheckpointError where it cannot be."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def close(self) -> None:
        """End the thread, when it has written what it was given."""
        self._thread.shutdown()


def partial_of(out: Path) -> Path:
    """Where OUT is while it is being made."""
    return out.with_name(f"{out.name}.partial")


def finished_blocks(partial: Path) -> int:
    """Blocks, from the first on, whose shards are there; the last shard is no block's."""
    found = (SHARD.fullmatch(path.name) for path in partial.iterdir())
    numbers = {int(shard[1]) for shard in found if shard and shard[1] != shard[2]}
    return next(index for index in count() if index + 1 not in numbers)


def amended(
    tensors: Mapping[str, torch.Tensor], changes: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`tensors`, those of `changes` in their places."""
    return {name: changes.get(name, tensor) for name, tensor in tensors.items()}


def check_free(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raise CheckpointError where OUT may not be made, or exists and may not be replaced.

    Nothing but a compressed model, or an empty folder, is ever replaced, nor what holds `source`.
    """
    if out.name in ("", ".."):
        raise CheckpointError(f"{out} does not name the folder to write; give its name")
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file, and a model is a folder; choose another name")
    if source is not None and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise CheckpointError(f"{out} holds the model to compress; choose another folder")
    if not replaceable(out):
        raise CheckpointError(
            f"{out} exists and is no compressed model, which alone --overwrite would replace;"
            " choose another folder"
        )
    if not overwrite:
        raise CheckpointError(f"{out} exists; choose another folder, or overwrite it (--overwrite)")


def replaceable(out: Path) -> bool:
    """Whether a folder is empty, or what `CheckpointWriter.finish` has left, and no model in it."""
    if not any(out.iterdir()):
        return True
    try:
        config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
        ours = is_ours(config["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return ours and not any(out.glob(f"*/{CONFIG_FILE}"))


def _move_into_place(whole: Path, out: Path) -> None:
    """Rename `whole` to `out`; a folder that is there goes only when the new one has its place."""
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as old:
        if out.exists():
            out.rename(Path(old) / out.name)
        whole.rename(out)
        sync(out.parent)
