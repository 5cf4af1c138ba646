"""The named datasets of the literature, read from the Hugging Face hub through `datasets`.

Files are named, not repositories' own loading scripts, so no code of theirs ever runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..errors import DataError

__all__ = ["HUB_TEXTS", "HubText", "hub_text"]

HUB = "hf://datasets"
"""Where repositories lie; a local folder of the same layout does as well."""

MANY_CHARACTERS = 16_000_000  # about 4 million tokens
PAJAMA_PARTS = (
    "arxiv",
    "book",
    "c4",
    "cc_2019-30",
    "cc_2020-05",
    "cc_2021-04",
    "cc_2022-05",
    "cc_2023-06",
    "github",
    "stackexchange",
    "wikipedia",
)
PAJAMA = tuple(
    f"togethercomputer/RedPajama-Data-1T-Sample/{part}_sample.jsonl" for part in PAJAMA_PARTS
)
PTB = "ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
REFINEDWEB = ("tiiuae/falcon-refinedweb/data/train-00000-of-05534-b8fc5348cbe605a5.parquet",)


@dataclass(frozen=True)
class HubText:
    """One split of a dataset.

    files        under HUB: .parquet or JSON lines
    column       of the text
    separator    between documents
    documents    at most so many of each file
    characters   no more documents of a file after so many characters
    skip         characters at the start of each file that belong to the other split
    """

    files: tuple[str, ...]
    column: str = "text"
    separator: str = "\n\n"
    documents: int | None = None
    characters: int | None = None
    skip: int = 0


HUB_TEXTS = {
    "wikitext2": {
        "train": HubText(("Salesforce/wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet",)),
        "test": HubText(("Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet",)),
    },
    "ptb": {
        "train": HubText((f"{PTB}/train/0000.parquet",), "sentence"),
        "test": HubText((f"{PTB}/validation/0000.parquet",), "sentence"),
    },
    "c4": {
        "train": HubText(
            ("allenai/c4/en/c4-train.00000-of-01024.json.gz",), characters=MANY_CHARACTERS
        ),
        "test": HubText(
            ("allenai/c4/en/c4-validation.00000-of-00008.json.gz",), separator=" ", documents=1100
        ),
    },
    "pajama": {
        "train": HubText(PAJAMA, characters=MANY_CHARACTERS // len(PAJAMA)),
        "test": HubText(
            PAJAMA,
            characters=MANY_CHARACTERS // len(PAJAMA),
            skip=MANY_CHARACTERS // len(PAJAMA),
        ),
    },
    "refinedweb": {
        "train": HubText(REFINEDWEB, "content", characters=MANY_CHARACTERS),
        "test": HubText(REFINEDWEB, "content", characters=MANY_CHARACTERS, skip=MANY_CHARACTERS),
    },
}
"""Name -> split -> files, as the reference implementation and GPTQ cut them."""


def hub_text(name: str, split: str) -> str:
    """The text of a named dataset's split ("train" or "test").

    Raises DataError where `datasets` is not installed or the files cannot be read.
    """
    wanted = HUB_TEXTS[name][split]
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"the dataset {name} is read through the package `datasets`, which is not installed:"
            " pip install 'spqr-numba[eval]', or give a text file"
        ) from error
    texts = [text for file in wanted.files for text in _file_texts(datasets, name, file, wanted)]
    return wanted.separator.join(texts)


def _file_texts(datasets: Any, name: str, file: str, wanted: HubText) -> list[str]:
    builder = "parquet" if file.endswith(".parquet") else "json"
    try:
        rows = datasets.load_dataset(
            builder, data_files=f"{HUB}/{file}", split="train", streaming=True
        )
        return list(_cut((row[wanted.column] for row in rows), wanted))
    except Exception as error:  # datasets, fsspec and httpx each raise their own
        raise DataError(
            f"cannot read {file} of the dataset {name}: {error} (without a network, give a text"
            " file instead)"
        ) from error


def _cut(documents: Iterator[str], wanted: HubText) -> Iterator[str]:
    """The documents that `wanted` asks for."""
    seen = 0
    for text in islice(documents, wanted.documents):
        if wanted.characters is not None and seen >= wanted.skip + wanted.characters:
            return
        if seen >= wanted.skip:
            yield text
        seen += len(text)
