from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spqr_numba.errors import DataError
from spqr_numba.model.calibration import (
    consecutive_windows,
    load_texts,
    load_tokens,
    sample_windows,
    sample_windows_apart,
)

from ..tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
TOKENS = torch.arange(100, dtype=torch.int64)


def decoded(dataset: str | None) -> str:
    return TOKENIZER.decode(load_tokens(dataset, TOKENIZER))


def test_default_is_the_manual() -> None:
    tokens = load_tokens(None, TOKENIZER)
    assert tokens.dtype == torch.int64
    assert tokens.ndim == 1
    assert len(tokens) > 400_000
    assert 'The "assert" statement' in TOKENIZER.decode(tokens[:3000])


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.text").write_text("Größe\n", encoding="utf-8")
    assert decoded(str(tmp_path / "a.text")) == "Größe\n"


def test_folder_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "of all"}\n')
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert decoded(str(tmp_path)) == "first\n\nof all\n\nsecond"


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two")))
    assert decoded(str(path)) == "one\n\ntwo"


@pytest.mark.parametrize("shape", [(100,), (4, 25)], ids=["stream", "windows"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_tokens_from_files(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = TOKENS.view(shape).to(dtype)
    save_file({"tokens": tokens}, tmp_path / "a.safetensors")
    np.save(tmp_path / "a.npy", tokens.numpy())
    torch.save(tokens, tmp_path / "a.pt")
    torch.save(list(tokens.view(4, 1, 25)), tmp_path / "a.pth")  # the reference's own files
    for name in ("a.safetensors", "a.npy", "a.pt", "a.pth"):
        assert torch.equal(load_tokens(str(tmp_path / name), TOKENIZER), TOKENS), name


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("this must never run",))


def test_pickled_code_is_never_run(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    torch.save(Evil(), tmp_path / "evil.pt")
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    for name in ("evil.pt", "evil.npy"):
        with pytest.raises(DataError, match=f"{name} does not hold plain tensors"):
            load_tokens(str(tmp_path / name), TOKENIZER)
    assert "never" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([3, 257]), r"holds tokens 3 \.\.\. 257, and .* tokenizer has 0 \.\.\. 256"),
        (torch.tensor([-1, 2]), r"holds tokens -1 \.\.\. 2"),
        (torch.tensor([1.0]), "holds torch.float32; tokens must be integers"),
    ],
)
def test_tokens_of_another_tokenizer(tmp_path: Path, tokens: torch.Tensor, message: str) -> None:
    torch.save(tokens, tmp_path / "a.pt")
    with pytest.raises(DataError, match=message):
        load_tokens(str(tmp_path / "a.pt"), TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "x"}\nnope', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"content": "x"}', r"a\.jsonl, line 1 has no field 'text'"),
        ("a.jsonl", b'{"text": 1}', r"line 1 has no field 'text' that holds a string"),
        ("a.npy", b"nope", r"a\.npy does not hold plain tensors"),
        ("a.safetensors", b"nope", r"a\.safetensors does not hold plain tensors"),
        ("a.pt", b"nope", r"a\.pt does not hold plain tensors"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokens(str(tmp_path / name), TOKENIZER)


def test_unknown_dataset() -> None:
    with pytest.raises(DataError, match=r"'wikitext3' is neither a file, .* \(c4, pajama, ptb"):
        load_tokens("wikitext3", TOKENIZER)


def test_a_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text files"):
        load_tokens(str(tmp_path), TOKENIZER)
    torch.save(TOKENS, tmp_path / "a.pt")
    with pytest.raises(DataError, match="holds tokens, and a folder of text"):
        load_tokens(str(tmp_path), TOKENIZER)


def test_windows_are_drawn_as_the_reference_draws_them() -> None:
    windows = sample_windows([TOKENS], nsamples=3, seqlen=10, seed=5)
    random.seed(5)
    starts = [random.randint(0, 100 - 10 - 1) for _ in range(3)]
    assert windows.tolist() == [list(range(start, start + 10)) for start in starts]


def test_each_of_several_texts_has_as_many_windows() -> None:
    other = 1000 + torch.arange(30)
    windows = sample_windows([TOKENS, other], 7, 10, seed=5)
    assert (windows[:, 0] >= 1000).tolist() == [False, True, False, True, False, True, False]
    windows = sample_windows_apart([TOKENS, other], 6, 4, 10, seed=5)
    trained, held_back = windows[:6], windows[6:]
    assert (windows[:, 0] >= 1000).tolist() == [False, True] * 5
    for low, high in ((0, 1000), (1000, 2000)):
        of_one = [part[(part >= low) & (part < high)] for part in (trained, held_back)]
        assert of_one[0].max() < of_one[1].min()
    with pytest.raises(DataError, match=r"text 2 of 2 has 30 tokens, .* at least 31"):
        sample_windows([TOKENS, other], 2, 30, 0)
    with pytest.raises(DataError, match=r"1 calibration windows .* each of 2 texts needs one"):
        sample_windows([TOKENS, other], 1, 10, 0)
    with pytest.raises(DataError, match="8 windows to train on and 1 that are held back"):
        sample_windows_apart([TOKENS, other], 8, 1, 10, 0)


def test_several_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8")
    one, two, three = load_texts(
        [str(tmp_path / "a.txt"), tmp_path / "a.txt", TOKENS.view(4, 25).int()], TOKENIZER
    )
    assert TOKENIZER.decode(one) == TOKENIZER.decode(two) == "hello"
    assert torch.equal(three, TOKENS)
    with pytest.raises(DataError, match=r"holds torch\.float32; tokens must be integers"):
        load_texts(TOKENS.float(), TOKENIZER)
    for alone in (None, ()):
        assert torch.equal(load_texts(alone, TOKENIZER)[0], load_tokens(None, TOKENIZER))


def test_too_little_text_says_how_much() -> None:
    assert sample_windows([TOKENS], 1, 99, 0).shape == (1, 99)
    with pytest.raises(DataError, match="has 100 tokens, and windows of 100 need at least 101"):
        sample_windows([TOKENS], 1, 100, 0)
    assert consecutive_windows(TOKENS, 100).shape == (1, 100)
    with pytest.raises(DataError, match="has 100 tokens, and windows of 101 need at least 101"):
        consecutive_windows(TOKENS, 101)


@pytest.mark.parametrize("seqlen", [5, 11, 12, 30, 49])
def test_windows_apart_share_no_token(seqlen: int) -> None:
    for seed in range(20):
        windows = sample_windows_apart([TOKENS], 14, 2, seqlen, seed)
        assert windows.shape == (16, seqlen)
        assert windows[:14].max() < windows[14:].min()
        assert torch.equal(windows, sample_windows_apart([TOKENS], 14, 2, seqlen, seed))
        assert torch.equal(windows, windows[:, :1] + torch.arange(seqlen))


def test_windows_apart_reach_all_of_the_last_eighth() -> None:
    windows = sample_windows_apart([TOKENS], 500, 50, 5, 0)
    assert (windows[:500].max(), windows[500:].min()) == (86, 88)


def test_windows_apart_need_text_for_two() -> None:
    message = "has 100 tokens, and windows of 50, some of them held back .* need at least 102"
    with pytest.raises(DataError, match=message):
        sample_windows_apart([TOKENS], 7, 1, 50, 0)


@pytest.mark.parametrize(("limit", "count"), [(None, 3), (2, 2), (9, 3)])
def test_consecutive_windows_do_not_overlap(limit: int | None, count: int) -> None:
    windows = consecutive_windows(TOKENS, 30, limit)
    assert windows.tolist() == TOKENS[:90].view(3, 30)[:count].tolist()


def test_counts_must_make_sense() -> None:
    with pytest.raises(DataError, match="0 windows of text"):
        sample_windows([TOKENS], 0, 10, 0)
    with pytest.raises(DataError, match="seqlen is 1; a window needs at least 2"):
        consecutive_windows(TOKENS, 1)
