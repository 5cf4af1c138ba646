"""The order in which a GPU reads a weight: the same numbers, and as many bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.errors import InputError
from spqr_numba.kernels.prepared import (
    can_prepare,
    pack_pairs,
    place_of_lane,
    prepare,
    unpack_pairs,
)
from tests.problems import make_spec

CASES: dict[str, tuple[int, int, dict[str, int]]] = {
    "paper": (32, 512, {}),
    "ragged": (37, 300, {}),
    "4 bit": (33, 700, {"bits": 4, "scale_bits": 4, "zero_bits": 4}),
    "2 bit, one row": (1, 20, {"bits": 2, "scale_bits": 2, "zero_bits": 2}),
    "group 8, stats 64": (130, 300, {"group_size": 8, "stats_group_size": 64}),
    "group 32, stats 64": (70, 1200, {"group_size": 32, "stats_group_size": 64}),
}


@pytest.mark.parametrize("name", CASES)
def test_canonical_undoes_prepare(name: str, device: torch.device) -> None:
    rows, columns, settings = CASES[name]
    matrix = random_matrix(make_spec(rows, columns, **settings), 2).to(device)
    assert can_prepare(matrix)
    back = prepare(matrix).canonical()
    assert set(back.tensors) == set(matrix.tensors)
    for tensor_name, tensor in matrix.tensors.items():
        assert torch.equal(back[tensor_name], tensor), tensor_name


def test_whole_tiles_take_no_more_bytes() -> None:
    matrix = random_matrix(make_spec(32, 512), 5)
    assert prepare(matrix).nbytes <= matrix.nbytes


def test_without_outliers_and_permutation() -> None:
    matrix = random_matrix(make_spec(16, 64), None, permuted=False)
    assert set(prepare(matrix).canonical().tensors) == set(matrix.tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 5},
        {"group_size": 64},
        {"stats_group_size": 8},
        {"scale_bits": 16, "zero_bits": 16},
        {"scale_bits": 2},
    ],
    ids=str,
)
def test_other_settings_stay_canonical(settings: dict[str, Any]) -> None:
    matrix = random_matrix(make_spec(16, 64, **settings), 1)
    assert not can_prepare(matrix)
    with pytest.raises(InputError, match="cannot be prepared"):
        prepare(matrix)


def test_pairs_by_hand() -> None:
    """Of 3 bits, pair 2 is at bit 3 of word 0; pair 10 lies in the top bits of all three."""
    codes = torch.zeros(16, 1, 2, dtype=torch.uint8)
    codes[2, 0] = torch.tensor([5, 2])
    codes[10, 0] = torch.tensor([0b101, 0b010])
    words = pack_pairs(codes, 3)
    expected = [5 << 3 | 2 << 19 | 1 << 15, 1 << 31, 1 << 15]
    assert [int(word) & 0xFFFFFFFF for word in words[:, 0]] == expected
    assert torch.equal(unpack_pairs(words, 3), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pairs_fill_the_words(bits: int) -> None:
    """All codes at their largest set every bit but those that 16 pairs leave over."""
    codes = torch.full((16, 1, 2), 2**bits - 1, dtype=torch.uint8)
    assert [int(word) for word in pack_pairs(codes, bits)[:, 0]] == [-1] * bits


def test_no_bank_is_met_twice() -> None:
    """Shared memory has 32 banks of four bytes, and serves eight lanes at a time with 16 each."""
    places = [place_of_lane(lane) for lane in range(32)]
    assert sorted(places) == list(range(32))
    for eight in range(0, 32, 8):
        own = places[eight : eight + 8]
        assert len({place % 8 for place in own}) == 8
        assert len({place // 8 for place in own}) == 1  # one line of global memory
    for t in range(4):  # the lane t of each row has a load of which the row's four read a word each
        banks = {4 * places[4 * g + t] % 32 + word for g in range(8) for word in range(4)}
        assert len(banks) == 32
