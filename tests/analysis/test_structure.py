"""Structure scores: each of the five patterns is found where it was planted, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from spqr_numba.analysis.layers import Heads
from spqr_numba.analysis.structure import structure_scores
from spqr_numba.errors import InputError

ROWS, COLUMNS, HEAD = 256, 512, 64
BACKGROUND = 0.002
HEADS = Heads(HEAD, rotated=True)

Mask = np.ndarray


def rates(rows: slice | list[int], columns: slice | list[int], share: float) -> np.ndarray:
    """The probability of an outlier: `share` in some rows and columns, 0 elsewhere."""
    probability = np.zeros((ROWS, COLUMNS))
    probability[rows, columns] = share
    return probability


def draw(random: np.random.Generator, probability: np.ndarray | float) -> Mask:
    return random.random((ROWS, COLUMNS)) < probability


ALL = slice(None)
PATTERNS: dict[str, np.ndarray] = {
    "heads": rates(slice(HEAD, 2 * HEAD), ALL, 0.05),
    "rotary_pairs": rates([5, 5 + HEAD // 2, 200, 200 + HEAD // 2], ALL, 0.3),
    "rows": rates([3, 70, 150], ALL, 0.4),
    "columns": rates(ALL, [11, 12, 300], 0.5),
    "unstructured": rates(ALL, ALL, 0.01),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_planted_pattern_is_found_and_no_other(pattern: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = draw(random, PATTERNS[pattern]) | draw(random, BACKGROUND)
    expected = mask[PATTERNS[pattern] > 0].sum() / mask.sum()
    scores = structure_scores(mask, HEADS).to_dict()
    assert scores.pop(pattern) == pytest.approx(expected)
    assert scores.pop("unstructured", 1 - expected) == pytest.approx(1 - expected)
    assert set(scores.values()) == {0.0}


def test_patterns_planted_together_are_told_apart() -> None:
    random = np.random.default_rng(0)
    parts = {name: draw(random, rate) for name, rate in PATTERNS.items() if name != "heads"}
    mask = np.logical_or.reduce(list(parts.values()))
    scores = structure_scores(mask, HEADS).to_dict()
    for name, part in parts.items():
        assert scores[name] == pytest.approx(part.sum() / mask.sum(), abs=0.06), name
    assert scores["heads"] == 0


def test_a_heavy_row_makes_no_heavy_head() -> None:
    random = np.random.default_rng(0)
    mask = draw(random, rates([HEAD + 7], ALL, 0.9)) | draw(random, BACKGROUND)
    scores = structure_scores(mask, HEADS)
    assert scores.heads == 0
    assert scores.rows == mask[HEAD + 7].sum() / mask.sum()


def test_heads_may_lie_in_columns() -> None:
    random = np.random.default_rng(0)
    mask = (draw(random, PATTERNS["heads"]) | draw(random, BACKGROUND)).T.copy()
    scores = structure_scores(mask, Heads(HEAD, axis=1))
    assert scores.heads == mask[:, HEAD : 2 * HEAD].sum() / mask.sum()
    assert scores.columns == scores.rows == 0
    mask = draw(random, PATTERNS["rows"]) | draw(random, BACKGROUND)
    scores = structure_scores(mask, Heads(HEAD, axis=1))
    assert scores.rows == mask[[3, 70, 150]].sum() / mask.sum()
    assert scores.columns == scores.heads == 0


def test_without_rotary_embeddings_pairs_are_rows() -> None:
    mask = draw(np.random.default_rng(0), PATTERNS["rotary_pairs"])
    assert structure_scores(mask, Heads(HEAD)).rows == 1
    assert structure_scores(mask).rows == 1


@pytest.mark.parametrize("value", [False, True])
def test_a_uniform_mask_has_no_structure(value: bool) -> None:
    scores = structure_scores(np.full((HEAD, 8), value), HEADS).to_dict()
    assert scores.pop("unstructured") == value
    assert set(scores.values()) == {0.0}


def test_bad_masks() -> None:
    with pytest.raises(InputError, match=r"the mask is float64 \[3, 4\]; it must be bool"):
        structure_scores(np.zeros((3, 4)))
    with pytest.raises(InputError, match="heads of 64 do not divide"):
        structure_scores(np.zeros((65, 4), dtype=bool), HEADS)
