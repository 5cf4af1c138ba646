"""The named datasets, from a local folder of the hub's layout, and from a stand-in `datasets`."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spqr_numba.errors import DataError
from spqr_numba.model import hub
from spqr_numba.model.calibration import load_tokens

from ..tiny import byte_tokenizer

NAMES = ("wikitext2", "ptb", "c4", "pajama", "refinedweb")
SPLITS = ("train", "test")


class StandIn(ModuleType):
    """The one function of `datasets` that we call, over JSON lines whatever the suffix."""

    def __init__(self) -> None:
        super().__init__("datasets")

    def load_dataset(
        self, path: str, data_files: str, split: str, streaming: bool
    ) -> Iterator[dict[str, Any]]:
        assert path == ("parquet" if data_files.endswith(".parquet") else "json")
        assert (split, streaming) == ("train", True)
        return map(json.loads, Path(data_files).read_text().splitlines())


def documents(name: str, split: str, file: str) -> list[str]:
    return [f"{name} {Path(file).name[:8]} document {i}." for i in range(3)]


def rows_of(name: str, split: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    wanted = hub.HUB_TEXTS[name][split]
    for file in wanted.files:
        yield file, [{wanted.column: text} for text in documents(name, split, file)]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "datasets", StandIn())
    monkeypatch.setattr(hub, "HUB", str(tmp_path))
    for name in NAMES:
        for split in SPLITS:
            for file, rows in rows_of(name, split):
                path = tmp_path / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_read(name: str, stand_in: Path) -> None:
    wanted = hub.HUB_TEXTS[name]["train"]
    expected = [text for file in wanted.files for text in documents(name, "train", file)]
    assert hub.hub_text(name, "train") == wanted.separator.join(expected)


def test_tokens_of_a_named_dataset_and_its_splits(stand_in: Path) -> None:
    tokenizer = byte_tokenizer()
    train = tokenizer.decode(load_tokens("wikitext2", tokenizer, "train"))
    assert train.startswith("wikitext2 train-00 document 0.\n\nwikitext2 train-00 document 1.")
    test = tokenizer.decode(load_tokens("wikitext2", tokenizer, "test"))
    assert test.startswith("wikitext2 test-000 document 0.")


def test_cutting_by_documents_characters_and_skip() -> None:
    texts = ["aaaa", "bbbb", "cccc", "dddd"]

    def cut(**limits: int) -> str:
        return "".join(text[0] for text in hub._cut(iter(texts), hub.HubText((), **limits)))

    assert cut() == "abcd"
    assert cut(documents=2) == "ab"
    assert cut(characters=5) == "ab"
    assert cut(characters=8) == "ab"
    assert cut(characters=8, skip=8) == "cd"


@pytest.mark.parametrize("name", ["pajama", "refinedweb"])
def test_splits_of_one_file_do_not_overlap(name: str) -> None:
    train, test = (hub.HUB_TEXTS[name][split] for split in SPLITS)
    assert train.files == test.files
    assert (train.skip, test.skip) == (0, train.characters)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'spqr-numba\[eval\]'"):
        hub.hub_text("c4", "train")


def test_an_unreadable_file_is_named(stand_in: Path) -> None:
    (stand_in / hub.HUB_TEXTS["ptb"]["test"].files[0]).unlink()
    with pytest.raises(DataError, match=r"cannot read ptb-text-only/\S+/0000\.parquet of .* ptb"):
        hub.hub_text("ptb", "test")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_the_real_package_reads_the_layout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="the extra `eval` is not installed")
    from pyarrow import Table, parquet

    monkeypatch.setattr(hub, "HUB", str(tmp_path))
    for file, rows in rows_of(name, "train"):
        path = tmp_path / file
        path.parent.mkdir(parents=True)
        if file.endswith(".parquet"):
            parquet.write_table(Table.from_pylist(rows), path)
        else:
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    file = hub.HUB_TEXTS[name]["train"].files[0]
    assert hub.hub_text(name, "train") == "\n\n".join(documents(name, "train", file))
