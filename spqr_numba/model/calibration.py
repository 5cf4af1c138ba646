"""Text in, token windows out: for calibration ("train") and for perplexity ("test").

    dataset        what it is
    None           the language manual that every CPython ships (pydoc_data.topics)
    a file         .jsonl (field `text`), tokens (.safetensors, as `spqr write` makes them, .npy,
                   .pt, .pth), or else plain text
    a folder       every file in it, text or .jsonl, in the order of their names
    a name         wikitext2, ptb, c4, pajama, refinedweb, through `datasets` (hub.py)

Only the named ones have a separate test split; the others give the same text for both. Windows are
cut out of one long stream of tokens and never padded. Where several texts are given to calibrate
on, windows are taken from each in turn.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import ConfigError, DataError
from .hub import HUB_TEXTS, hub_text

__all__ = [
    "Dataset",
    "consecutive_windows",
    "load_texts",
    "load_tokens",
    "sample_windows",
    "sample_windows_apart",
    "window_length",
]

DEFAULT_SEQLEN = 2048
HELD_BACK_SHARE = 8  # one token in so many, the last ones, where some windows are held back
Dataset = str | Path | torch.Tensor | None
"""Text (see the table above), or its tokens: integers of any shape, read one after the other."""

UNREADABLE = (pickle.UnpicklingError, SafetensorError)
TOKEN_SUFFIXES = (".safetensors", ".npy", ".pt", ".pth")


def load_tokens(dataset: str | Path | None, tokenizer: Any, split: str = "train") -> torch.Tensor:
    """The tokens of `dataset` (see the table above): int64 [tokens].

    Raises DataError for an unknown name, a file that cannot be read, and tokens that `tokenizer`
    does not have.
    """
    path = Path(dataset) if dataset is not None else None
    if path is not None and path.suffix in TOKEN_SUFFIXES and path.is_file():
        return _check_tokens(_read_tokens(path), path, len(tokenizer))
    return tokenize(_read_text(dataset, split), tokenizer)


def load_texts(datasets: Dataset | Sequence[Dataset], tokenizer: Any) -> list[torch.Tensor]:
    """The tokens of one dataset or of several: int64 [n] each. Raises as `load_tokens`."""
    if datasets is None or isinstance(datasets, str | Path | torch.Tensor):
        datasets = [datasets]
    return [
        _whole_numbers(dataset.flatten(), "the dataset")
        if isinstance(dataset, torch.Tensor)
        else load_tokens(dataset, tokenizer)
        for dataset in datasets or [None]
    ]


def tokenize(text: str, tokenizer: Any) -> torch.Tensor:
    """int64 [tokens], with the special tokens that `tokenizer` adds to one text."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def window_length(config: Any, seqlen: int | None) -> int:
    """Tokens a window: seqlen, or the context of the model of `config`, DEFAULT_SEQLEN at most.

    Raises ConfigError for a seqlen beyond the context.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if seqlen is None:
        return min(context or DEFAULT_SEQLEN, DEFAULT_SEQLEN)
    if context is not None and seqlen > context:
        raise ConfigError(f"seqlen is {seqlen}, and the model's context is {context} tokens")
    return seqlen


def sample_windows(
    texts: Sequence[torch.Tensor], nsamples: int, seqlen: int, seed: int
) -> torch.Tensor:
    """`nsamples` windows at random places, as the reference draws them, of the texts [n] in turn.

    int64 [nsamples, seqlen]; they may overlap. Raises DataError for a text of fewer than seqlen + 1
    tokens, and for fewer windows than texts.
    """
    _check_counts(nsamples, seqlen)
    if nsamples < len(texts):
        raise DataError(
            f"{nsamples} calibration windows were asked for, and each of {len(texts)} texts needs"
            " one; give more windows or fewer texts"
        )
    _check_enough(texts, seqlen + 1, f"windows of {seqlen}")
    return _draw(texts, nsamples, seqlen, random.Random(seed))


def sample_windows_apart(
    texts: Sequence[torch.Tensor], trained: int, held_back: int, seqlen: int, seed: int
) -> torch.Tensor:
    """Windows of the texts [n] at random places: `trained` of them, then `held_back` ones.

    The latter come from the last eighth of each text, or as much as a window takes, the former from
    what is before it, so that no token is in both.
    int64 [trained + held_back, seqlen]. Raises DataError for a text of fewer than 2 * (seqlen + 1)
    tokens, and for fewer windows than texts.
    """
    _check_counts(min(trained, held_back), seqlen)
    if min(trained, held_back) < len(texts):
        raise DataError(
            f"there are {trained} windows to train on and {held_back} that are held back, and each"
            f" of {len(texts)} texts needs one of both; give more windows or fewer texts"
        )
    least = seqlen + 1
    windows = f"windows of {seqlen}, some of them held back from a part of the text of their own,"
    _check_enough(texts, 2 * least, windows)
    generator = random.Random(seed)
    lasts = [max(len(tokens) // HELD_BACK_SHARE, least) for tokens in texts]
    firsts = [tokens[:-last] for tokens, last in zip(texts, lasts, strict=True)]
    before = _draw(firsts, trained, seqlen, generator)
    behind = [tokens[-last:] for tokens, last in zip(texts, lasts, strict=True)]
    return torch.cat([before, _draw(behind, held_back, seqlen, generator)])


def _draw(
    texts: Sequence[torch.Tensor], count: int, seqlen: int, generator: random.Random
) -> torch.Tensor:
    windows = []
    for tokens in islice(cycle(texts), count):
        start = generator.randint(0, len(tokens) - seqlen - 1)
        windows.append(tokens[start : start + seqlen])
    return torch.stack(windows)


def consecutive_windows(
    tokens: torch.Tensor, seqlen: int, limit: int | None = None
) -> torch.Tensor:
    """The first `limit` (None: all) non-overlapping windows of `tokens` [n]: int64 [N, seqlen].

    A last, shorter window is left out. Raises DataError for fewer than seqlen tokens.
    """
    _check_counts(1 if limit is None else limit, seqlen)
    _check_enough([tokens], seqlen, f"windows of {seqlen}")
    count = len(tokens) // seqlen
    return tokens[: count * seqlen].view(count, seqlen)[:limit]


def _check_counts(windows: int, seqlen: int) -> None:
    if windows < 1:
        raise DataError(f"{windows} windows of text were asked for; at least 1 is needed")
    if seqlen < 2:
        raise DataError(f"seqlen is {seqlen}; a window needs at least 2 tokens")


def _check_enough(texts: Sequence[torch.Tensor], needed: int, windows: str) -> None:
    for number, tokens in enumerate(texts, 1):
        if len(tokens) < needed:
            text = "the text" if len(texts) == 1 else f"text {number} of {len(texts)}"
            raise DataError(
                f"{text} has {len(tokens)} tokens, and {windows} need at least {needed}; give more"
                " text or a smaller seqlen"
            )


def _read_text(dataset: str | Path | None, split: str) -> str:
    if dataset is None:
        return manual()
    path = Path(dataset)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if str(dataset) in HUB_TEXTS:
        return hub_text(str(dataset), split)
    raise DataError(
        f"{str(dataset)!r} is neither a file, nor a folder, nor a known dataset"
        f" ({', '.join(sorted(HUB_TEXTS))})"
    )


def manual() -> str:
    """The topics of Python's language manual, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def _read_folder(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise DataError(f"the folder {folder} holds no text files")
    return "\n\n".join(_read_file(path) for path in files)


def _read_file(path: Path) -> str:
    if path.suffix in TOKEN_SUFFIXES:
        raise DataError(f"{path} holds tokens, and a folder of text was asked for; name the file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return "\n\n".join(_jsonl_texts(text, path)) if path.suffix == ".jsonl" else text


def _jsonl_texts(lines: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(lines.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{path}, line {number} has no field 'text' that holds a string")
        yield text


def _read_tokens(path: Path) -> torch.Tensor:
    """All tokens of a file, one after the other, of the file's own integer dtype."""
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)).flatten()
        if path.suffix == ".safetensors":
            return _join(list(load_file(path).values()))
        return _join(torch.load(path, map_location="cpu", weights_only=True))
    except (*UNREADABLE, OSError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} does not hold plain tensors of tokens: {error}") from error


def _join(tokens: Any) -> torch.Tensor:
    """A tensor, or a list of them, flattened into one row."""
    if isinstance(tokens, torch.Tensor):
        return tokens.flatten()
    return torch.cat([torch.as_tensor(part).flatten() for part in tokens])


def _whole_numbers(tokens: torch.Tensor, where: Path | str) -> torch.Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise DataError(f"{where} holds {tokens.dtype}; tokens must be integers")
    return tokens.to(torch.int64)


def _check_tokens(tokens: torch.Tensor, path: Path, vocabulary: int) -> torch.Tensor:
    tokens = _whole_numbers(tokens, path)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise DataError(
            f"{path} holds tokens {tokens.min().item()} ... {tokens.max().item()}, and the model's"
            f" tokenizer has 0 ... {vocabulary - 1}; they were made with another tokenizer"
        )
    return tokens
