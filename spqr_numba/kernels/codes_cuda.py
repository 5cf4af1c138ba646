"""Codes out of a prepared weight's words (prepared.py), two at a time, as halves that multiply.

Masked out of its word a code is a subnormal half, code * 2^(place - 24), which tensor cores
multiply exactly; so no code is converted. `place` is the bit of the mantissa at which it lies then.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from llvmlite import ir

from .prepared import MANTISSA_BITS, PAIRS, pair_places, shift_and_place
from .ptx import Ptx, i32

__all__ = [
    "SUBNORMAL_UNIT",
    "both",
    "code_place",
    "exact_codes",
    "masked_codes",
    "masked_pair",
    "raw_codes",
]

MAGIC = 0x64006400  # two halves of 2^MANTISSA_BITS, whose last bit is worth 1
SUBNORMAL_UNIT = 2.0**-24  # what the last bit of a half is worth by itself


def masked_codes(ptx: Ptx, words: list[ir.Value]) -> list[ir.Value]:
    """Sixteen pairs of codes, as subnormal halves; `code_place` says how large they came out."""
    return masked(ptx, words, [fields(len(words), pair) for pair in range(PAIRS)])


def masked_pair(ptx: Ptx, words: list[ir.Value], pair: int) -> ir.Value:
    """One of `masked_codes`."""
    return masked(ptx, words, [fields(len(words), pair)])[0]


def raw_codes(ptx: Ptx, words: list[ir.Value]) -> list[ir.Value]:
    """Sixteen pairs of codes, as subnormal halves, all at place 0; it takes a few more moves."""
    bits = len(words)
    parts = [pair_places(bits, pair) for pair in range(PAIRS)]
    return masked(
        ptx,
        words,
        [
            [(word, shift - part, both_halves(width, part)) for word, shift, part, width in pair]
            for pair in parts
        ],
    )


def masked(
    ptx: Ptx, words: list[ir.Value], pairs: Iterable[list[tuple[int, int, int]]]
) -> list[ir.Value]:
    """Each pair from its fields: (word, how far it moves to the right, mask)."""
    word_of, values = Shifted(ptx, words), []
    for (first, places, mask), *rest in pairs:
        value = ptx.builder.and_(word_of(first, places), i32(mask))
        for word, places, mask in rest:
            value = ptx.masked_or(word_of(word, places), mask, value)
        values.append(value)
    return values


def exact_codes(ptx: Ptx, words: list[ir.Value], which: Iterable[int]) -> list[ir.Value]:
    """Some of the pairs, as halves of the codes' values.

    A code in the last bits of 2^MANTISSA_BITS adds its value to it; one multiply-add takes the
    power away, and the code's place.
    """
    bits, word_of, pairs = len(words), Shifted(ptx, words), []
    for pair in which:
        value: ir.Value = i32(MAGIC)
        for word, places, mask in fields(bits, pair):
            value = ptx.masked_or(word_of(word, places), mask, value)
        operand, register = divmod(pair, 4)
        place = code_place(bits, operand, row=register % 2)
        factor, minus = 2.0**-place, -(2.0 ** (MANTISSA_BITS - place))
        pairs.append(ptx.fma_halves(value, both(factor), both(minus)))
    return pairs


class Shifted:
    """Words moved to the right, each distance once."""

    def __init__(self, ptx: Ptx, words: list[ir.Value]) -> None:
        self.ptx, self.words = ptx, words
        self.known: dict[tuple[int, int], ir.Value] = {}

    def __call__(self, word: int, places: int) -> ir.Value:
        """A word moved by so many places."""
        if not places:
            return self.words[word]
        if (word, places) not in self.known:
            self.known[word, places] = self.ptx.builder.lshr(self.words[word], i32(places))
        return self.known[word, places]


def fields(bits: int, pair: int) -> list[tuple[int, int, int]]:
    """(word, how far it moves to the right, mask of both halves) of a pair's one or more parts."""
    found = []
    for word, shift, part, width in pair_places(bits, pair):
        if width < bits:
            places, place = shift - part, part
        else:
            places, place = shift_and_place(bits, shift)
        found.append((word, places, both_halves(width, place)))
    return found


def both_halves(width: int, place: int) -> int:
    """The mask of so many bits from a place on, in both halves of a word."""
    mask = ((1 << width) - 1) << place
    return mask | mask << 16


def code_place(bits: int, operand: int, row: int) -> int:
    """The bit at which the codes of row g (0) or g + 8 (1) begin in an operand's halves."""
    places = set()
    for register in (row, row + 2):
        for _, shift, _, width in pair_places(bits, 4 * operand + register):
            places.add(0 if width < bits else shift_and_place(bits, shift)[1])
    [place] = places
    return place


def both(value: float) -> ir.Constant:
    """A word whose halves are `value`."""
    bits = int(np.float16(value).view(np.uint16))
    return i32(bits | bits << 16)
