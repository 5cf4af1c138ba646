from __future__ import annotations

import errno
import json
import logging
import sys
import threading
from contextlib import closing
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from spqr_numba.errors import CheckpointError
from spqr_numba.model import checkpoint
from spqr_numba.model.checkpoint import (
    CheckpointWriter,
    WriteBehind,
    check_free,
    finished_blocks,
)


def block(index: int) -> dict[str, torch.Tensor]:
    return {f"layers.{index}.codes": torch.full((4,), index, dtype=torch.uint16)}


HIDDEN = torch.arange(6.0).view(1, 2, 3)
DENSE = '{"model_type": "llama"}'
GPTQ = '{"quantization_config": {"quant_method": "gptq"}}'
OURS = '{"quantization_config": {"quant_method": "spqr", "format_version": 1}}'


def write(writer: CheckpointWriter, blocks: range) -> None:
    for index in blocks:
        writer.write_block(index, block(index), HIDDEN + index)


def finish(writer: CheckpointWriter) -> None:
    writer.write_rest({"embed.weight": torch.ones(3, dtype=torch.bfloat16)})
    writer.finish('{"model_type": "x"}')


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    writer = CheckpointWriter(out, 2, "a")
    write(writer, range(2))
    writer.write_text("layers.csv", "layer\n")
    finish(writer)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "layers.csv",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "layers.0.codes": "model-00001-of-00003.safetensors",
        "layers.1.codes": "model-00002-of-00003.safetensors",
        "embed.weight": "model-00003-of-00003.safetensors",
    }
    assert (
        load_file(out / "model-00003-of-00003.safetensors")["embed.weight"].dtype == torch.bfloat16
    )
    assert not writer.partial.exists()


def test_out_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", 2, "a")
    write(writer, range(2))
    assert not (tmp_path / "out").exists()
    assert not (writer.partial / "config.json").exists()
    assert (writer.partial / "progress.json").is_file()


def test_going_on_behind_the_last_finished_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = CheckpointWriter(tmp_path / "out", 3, "a")
    write(first, range(2))
    (first.partial / "model-00003-of-00004.safetensors.tmp").write_text("half a block")
    with caplog.at_level(logging.INFO):
        second = CheckpointWriter(tmp_path / "out", 3, "a")
    assert "continuing behind 2 finished of 3 blocks" in caplog.text
    assert second.finished_blocks == 2
    hidden = second.read_hidden()
    assert torch.equal(hidden, HIDDEN + 1)
    hidden += 1  # must not reach the file, which a third run may need
    assert torch.equal(CheckpointWriter(tmp_path / "out", 3, "a").read_hidden(), HIDDEN + 1)
    write(second, range(2, 3))
    finish(second)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_folder_of_the_user_s_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no unfinished run of ours; move it away"):
        CheckpointWriter(tmp_path / "out", 3, "a")
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_lost_hidden_states(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", 3, "a")
    write(writer, range(1))
    (writer.partial / "hidden-00001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is lost or damaged .*; delete .*out\.partial"):
        CheckpointWriter(tmp_path / "out", 3, "a").read_hidden()


def test_another_fingerprint_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(CheckpointWriter(tmp_path / "out", 3, "a"), range(2))
    with pytest.raises(CheckpointError, match=r"partial holds 2 finished blocks of another model"):
        CheckpointWriter(tmp_path / "out", 3, "b")
    assert CheckpointWriter(tmp_path / "out", 3, "a").finished_blocks == 2
    writer = CheckpointWriter(tmp_path / "out", 3, "b", overwrite=True)
    assert "of another model, settings or calibration: starting anew" in caplog.text
    assert writer.finished_blocks == 0
    assert {path.name for path in writer.partial.iterdir()} == {"progress.json"}


def test_a_run_without_a_finished_block_is_no_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CheckpointWriter(tmp_path / "out", 3, "a")
    CheckpointWriter(tmp_path / "out", 3, "b")
    assert "starting anew" in caplog.text


def test_blocks_of_a_deeper_model_are_seen(tmp_path: Path) -> None:
    """Whose shards have other names; the one that is no block's does not count."""
    writer = CheckpointWriter(tmp_path / "out", 3, "a")
    write(writer, range(3))
    writer.write_rest({"embed.weight": torch.ones(3)})
    assert finished_blocks(writer.partial) == 3
    with pytest.raises(CheckpointError, match=r"partial holds 3 finished blocks of another model"):
        CheckpointWriter(tmp_path / "out", 5, "b")


def test_shards_are_as_readable_as_other_new_files(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", 1, "a")
    write(writer, range(1))
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "new", *writer.partial.iterdir())}
    assert len(modes) == 1


def test_only_one_set_of_hidden_states_is_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", 3, "a")
    write(writer, range(2))
    assert [path.name for path in writer.partial.glob("hidden*")] == ["hidden-00002.safetensors"]


def test_out_exists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=r"out exists; .*--overwrite"):
        CheckpointWriter(out, 1, "a")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "config", [None, "{", "[]", "{}", '{"quantization_config": 3}', DENSE, GPTQ]
)
def test_nothing_but_a_compressed_model_is_replaced(tmp_path: Path, config: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    if config is not None:
        (out / "config.json").write_text(config)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="out exists and is no compressed model"):
            CheckpointWriter(out, 1, "a", overwrite=overwrite)
    assert (out / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nor_one_that_holds_a_model(tmp_path: Path) -> None:
    out, within = tmp_path / "out", tmp_path / "out" / "within"
    within.mkdir(parents=True)
    (out / "config.json").write_text(OURS)
    check_free(out, overwrite=True)
    with pytest.raises(CheckpointError, match="out holds the model to compress"):
        check_free(out, overwrite=True, source=out / "model.gguf")
    (within / "config.json").write_text(DENSE)
    with pytest.raises(CheckpointError, match="out exists and is no compressed model"):
        check_free(out, overwrite=True)


@pytest.mark.parametrize("name", [".", "..", "out/.."])
def test_a_folder_has_a_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not name the folder"):
        check_free(Path(name), overwrite=True)


def test_one_process_writes_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    held = (
        "import sys; from pathlib import Path\n"
        "from spqr_numba.model.checkpoint import CheckpointWriter\n"
        "writer = CheckpointWriter(Path(sys.argv[1]), 1, 'a')\n"
        "print('writing', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", held, str(out)]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        for fingerprint in "ab":
            with pytest.raises(CheckpointError, match="another process is writing"):
                CheckpointWriter(out, 1, fingerprint)
        other.kill()
    assert CheckpointWriter(out, 1, "a").finished_blocks == 0


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="is a file, and a model is a folder"):
        CheckpointWriter(tmp_path / "out", 1, "a", overwrite=True)


def test_overwriting_keeps_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    (out / "config.json").write_text(OURS)
    writer = CheckpointWriter(out, 1, "a", overwrite=True)
    write(writer, range(1))
    assert (out / "old").read_text() == "old"
    finish(writer)
    assert not (out / "old").exists()
    assert (out / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path / "out", 2, "a")
    write(writer, range(1))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"no space left to write .*; free some and run"):
        write(writer, range(1, 2))
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert CheckpointWriter(tmp_path / "out", 2, "a").finished_blocks == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the folder in"):
        CheckpointWriter(tmp_path / "file" / "out", 1, "a")


class Recorder:
    """Takes blocks in the place of a CheckpointWriter, once its gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.written: list[int] = []

    def write_block(self, index: int, tensors: object, hidden: object) -> None:
        self.gate.wait()
        if index == 2:
            raise CheckpointError("no space left")
        self.written.append(index)


def test_blocks_are_written_behind_in_their_order() -> None:
    recorder = Recorder()
    with closing(WriteBehind(cast("CheckpointWriter", recorder))) as behind:
        behind.wait()
        behind.write_block(0, {}, None)
        assert recorder.written == []
        recorder.gate.set()
        behind.write_block(1, {}, None)
        assert recorder.written[0] == 0
        behind.wait()
        assert recorder.written == [0, 1]
        behind.write_block(2, {}, None)
        with pytest.raises(CheckpointError, match="no space left"):
            behind.write_block(3, {}, None)
        behind.write_block(4, {}, None)
    assert recorder.written == [0, 1, 4]
