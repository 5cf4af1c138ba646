"""Codes out of a prepared weight's words (prepared.py), two at a time, as halves that multiply.

Masked out of its word a code is a subnormal half, code * 2^(place - 24), which tensor cores
multiply exactly; so no code is converted. `place` is the bit of the mantissa at which it lies then.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
from llvmlite import ir

from .prepared import MANTISSA_BITS, OCTET, PAIRS, pair_places, shift_and_place
from .ptx import Ptx, i32

__all__ = [
    "SUBNORMAL_UNIT",
    "both",
    "code_place",
    "exact_codes",
    "group_codes",
    "group_places",
    "masked_codes",
    "masked_pair",
]

MAGIC = 0x64006400  # two halves of 2^MANTISSA_BITS, whose last bit is worth 1
SUBNORMAL_UNIT = 2.0**-24  # what the last bit of a half is worth by itself


def masked_codes(ptx: Ptx, words: list[ir.Value]) -> list[ir.Value]:
    """Sixteen pairs of codes, as subnormal halves; `code_place` says how large they came out."""
    return masked(ptx, words, [fields(len(words), pair) for pair in range(PAIRS)])


def masked_pair(ptx: Ptx, words: list[ir.Value], pair: int) -> ir.Value:
    """One of `masked_codes`."""
    return masked(ptx, words, [fields(len(words), pair)])[0]


def group_codes(ptx: Ptx, words: list[ir.Value], group_size: int) -> list[ir.Value]:
    """As `masked_codes`, for an mma whose depth is a group: the codes of a row in it are at the
    place that `group_places` says."""
    bits = len(words)
    places = group_places(bits, group_size)
    pairs = [
        group_fields(bits, pair, places[row_of_octet(group_size, pair)]) for pair in range(PAIRS)
    ]
    return masked(ptx, words, pairs)


def row_of_octet(group_size: int, pair: int) -> int:
    """Which of the octets of a block, two rows of each, a pair belongs to."""
    return pair * OCTET // (4 * group_size) * 2 + pair % 2


def group_fields(bits: int, pair: int, place: int) -> list[tuple[int, int, int]]:
    """As `fields`, for codes that begin at `place`; to the left where it is less than nothing."""
    return [
        (word, shift - part - place, both_halves(width, part + place))
        for word, shift, part, width in pair_places(bits, pair)
    ]


@cache
def group_places(bits: int, group_size: int) -> tuple[int, ...]:
    """Where the codes of each octet of a block, rows g and g + 8, begin in the halves of
    `group_codes`: chosen, one after the other, so that words are shifted as seldom as possible."""
    rows = [row_of_octet(group_size, pair) for pair in range(PAIRS)]
    places = [0] * (max(rows) + 1)
    for row in 2 * list(range(len(places))):
        tried = [
            [*places[:row], place, *places[row + 1 :]] for place in range(MANTISSA_BITS - bits)
        ]
        places = min(tried, key=lambda chosen: shifts_of(bits, [chosen[row] for row in rows]))
    return tuple(places)


def shifts_of(bits: int, places: list[int]) -> int:
    """How many shifts of words it takes to have each pair at its place."""
    fields_of = [group_fields(bits, pair, place) for pair, place in enumerate(places)]
    return len({(word, shift) for pair in fields_of for word, shift, _ in pair if shift})


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
        place = code_place(bits, pair)
        factor, minus = 2.0**-place, -(2.0 ** (MANTISSA_BITS - place))
        pairs.append(ptx.fma_halves(value, both(factor), both(minus)))
    return pairs


class Shifted:
    """Words moved to the right, or by less than nothing to the left, each distance once."""

    def __init__(self, ptx: Ptx, words: list[ir.Value]) -> None:
        self.ptx, self.words = ptx, words
        self.known: dict[tuple[int, int], ir.Value] = {}

    def __call__(self, word: int, places: int) -> ir.Value:
        """A word moved by so many places."""
        if not places:
            return self.words[word]
        if (word, places) not in self.known:
            shift = self.ptx.builder.lshr if places > 0 else self.ptx.builder.shl
            self.known[word, places] = shift(self.words[word], i32(abs(places)))
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


def code_place(bits: int, pair: int) -> int:
    """The bit at which a pair's codes begin in their halves, and those of the same row in the same
    operand."""
    operand, register = divmod(pair, 4)
    places = set()
    for same_row in (register % 2, register % 2 + 2):
        for _, shift, _, width in pair_places(bits, 4 * operand + same_row):
            places.add(0 if width < bits else shift_and_place(bits, shift)[1])
    [place] = places
    return place


def both(value: float) -> ir.Constant:
    """A word whose halves are `value`."""
    bits = int(np.float16(value).view(np.uint16))
    return i32(bits | bits << 16)
