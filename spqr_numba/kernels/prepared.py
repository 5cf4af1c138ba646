"""A compressed weight as the GPU's product reads it: canonical buffers, rearranged once at load.

A warp takes a *tile* of 16 rows and, at a time, a *block* of 256 columns. Lane 4 * g + t of it owns
rows g and g + 8, and of each *octet* (8 groups side by side) the groups t and t + 4::

    octet             groups 0 1 2 3 4 5 6 7       t = 1 owns groups 1 and 5
    a group's columns quarters 0 1 2 3             of group_size / 4 columns
    a code pair       columns 2p, 2p + 1 of a quarter, side by side in a register

So the sixteen code pairs of quarter q that a lane owns in a block are its operands of four
mma.m16n8k16, in the order (octet, group t or t + 4, p, row g or g + 8). `pack_pairs` puts them into
`bits` words, the lower column in the lower half of a word; the four quarters' words of one number
lie side by side, which is one 16-byte load a lane, 512 bytes a warp, in the order of
`place_of_lane`: in shared memory neither the lanes' own loads nor a word of one load of each row
meet a bank twice, and eight lanes side by side copy a line of 128 bytes. Scale and zero codes take
the same form: sixteen pairs (octet, row g or g + 8, scale or zero) of the groups 2t and 2t + 1,
four octets together, which are one *unit*. A tile's unit is one record: its blocks, then its
statistics.

    buffer        dtype  shape                                 instead of
    records       int32  [tiles, units, words]                 codes, scale_codes, zero_codes
        its blocks       [blocks of a unit, bits, 32 places, 4]
        its statistics   [stat_bits, 32 lanes]
    second_level  fp16   [stats_groups, 4 * units, 4, 4, 2]    scale_scale, scale_zero, zero_scale,
                                                               zero_zero (of groups 2t and 2t + 1)
    target        uint16 [in_features]                         permutation; its inverse

The outliers' buffers are in runs.py. Rows beyond the last tile's and columns beyond the last unit's
are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..format.layout import MAX_UINT16_INDICES, MatrixSpec, ceil_div
from ..format.matrix import SpqrMatrix
from ..format.packing import pack_codes, pack_statistics, unpack_codes, unpack_statistics
from .runs import TILE_ROWS, from_runs, to_runs

__all__ = [
    "PreparedMatrix",
    "can_prepare",
    "group_pairs",
    "padded_columns",
    "place_of_lane",
    "prepare",
    "units_of",
]

BLOCK_COLUMNS = 256
LANES = 32
QUAD = 4  # lanes of a row
ALL_LANES = 0xFFFFFFFF  # a bit each
QUARTERS = 4
PAIRS = 16  # of a quarter in a block, and of statistics in a unit
OCTET = 8  # groups
UNIT_OCTETS = 4
UNIT_GROUPS = UNIT_OCTETS * OCTET
HALF = 16  # bits of half a word
MANTISSA_BITS = 10  # of fp16
PLACES_OF_2 = (
    *((0, 0), (1, 0), (0, 10), (1, 10), (0, 2), (1, 2), (0, 12), (1, 12)),
    *((0, 4), (1, 4), (0, 14), (1, 14), (0, 6), (0, 8), (1, 6), (1, 8)),
)  # (word, shift) of each pair of 2 bits
PLACES_OF_3 = (
    *((1, 3), (0, 0), (0, 3), (1, 0), (0, 9), (1, 6), (1, 9), (0, 6)),
    *((2, 0), (2, 3), (0, 15), (2, 9), (2, 6), (0, 12), (2, 12), (1, 12)),
)  # that of SPREAD has a bit in each word; otherwise test_many_cuda.py finds spills
SPREAD = 10
STATISTICS = ("scale", "zero")
SECOND_LEVEL = ("scale_scale", "scale_zero", "zero_scale", "zero_zero")


def can_prepare(matrix: SpqrMatrix) -> bool:
    """Whether the fast product of a GPU knows these settings."""
    spec = matrix.spec
    return (
        spec.bits in (2, 3, 4)
        and spec.group_size in (8, 16, 32)
        and spec.stats_group_size % TILE_ROWS == 0
        and spec.scale_bits == spec.zero_bits
        and spec.scale_bits in (2, 3, 4)
        and spec.in_features <= MAX_UINT16_INDICES
    )


def units_of(spec: MatrixSpec) -> int:
    """Runs of 32 groups; the last may be ragged."""
    return ceil_div(spec.groups, UNIT_GROUPS)


def padded_columns(spec: MatrixSpec) -> int:
    """Those of a row, up to the end of its last unit."""
    return units_of(spec) * UNIT_GROUPS * spec.group_size


@dataclass(frozen=True, eq=False)
class PreparedMatrix:
    """One compressed weight in the order in which a GPU reads it; the same numbers, as many bytes.

    `canonical` is the exact inverse of `prepare`. One that was joined (siblings.py) knows the whole
    that its rows are part of, and its first row there.
    """

    spec: MatrixSpec
    tensors: Mapping[str, torch.Tensor]
    whole: PreparedMatrix | None = None
    first_row: int = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def device(self) -> torch.device:
        """Where all the buffers lie."""
        return self["records"].device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tiles(self) -> int:
        """Runs of 16 rows; the last may be ragged."""
        return ceil_div(self.spec.out_features, TILE_ROWS)

    @property
    def units(self) -> int:
        """Runs of 32 groups; the last may be ragged."""
        return units_of(self.spec)

    @property
    def code_words(self) -> torch.Tensor:
        """int32 [tiles, units, blocks of a unit, bits, 32 lanes, 4]."""
        words = self["records"][..., : -self.spec.scale_bits * LANES]
        words = words.unflatten(2, (-1, self.spec.bits, LANES, QUARTERS))
        return words[..., [place_of_lane(lane) for lane in range(LANES)], :]

    @property
    def stat_words(self) -> torch.Tensor:
        """int32 [tiles, units, stat_bits, 32], a view of the records."""
        words = self["records"][..., -self.spec.scale_bits * LANES :]
        return words.unflatten(2, (self.spec.scale_bits, LANES))

    def canonical(self) -> SpqrMatrix:
        """The buffers as layout.py lists them."""
        tensors = from_runs(self.spec, self.tensors) if "runs" in self.tensors else {}
        tensors["codes"] = pack_codes(self._codes(), self.spec.bits)
        for name, codes in zip(STATISTICS, self._statistic_codes(), strict=True):
            tensors[f"{name}_codes"] = pack_statistics(codes, self.spec.scale_bits)
        tensors |= self._second_level()
        if "target" in self.tensors:
            tensors["permutation"] = inverse(self["target"])
        return SpqrMatrix(self.spec, tensors)

    def _codes(self) -> torch.Tensor:
        """uint8 [n, m]."""
        pairs = unpack_pairs(self.code_words.movedim(3, 0), self.spec.bits)
        octets, per_quarter = octets_and_pairs(self.spec)
        shape = octets, 2, per_quarter, 2, self.tiles, -1, 8, 4, QUARTERS, 2
        codes = pairs.view(shape).permute(5, 0, 1, 7, 8, 2, 9, 4, 3, 6)
        codes = codes.reshape(-1, self.tiles * TILE_ROWS)
        return codes[: self.spec.in_features, : self.spec.out_features]

    def _statistic_codes(self) -> torch.Tensor:
        """uint8 [2, groups, m]: of scales, of zeros."""
        pairs = unpack_pairs(self.stat_words.movedim(2, 0), self.spec.scale_bits)
        pairs = pairs.view(UNIT_OCTETS, 2, 2, self.tiles, self.units, 8, 4, 2)
        codes = pairs.permute(2, 4, 0, 6, 7, 3, 1, 5)
        codes = codes.reshape(2, self.units * UNIT_GROUPS, self.tiles * TILE_ROWS)
        return codes[:, : self.spec.groups, : self.spec.out_features]

    def _second_level(self) -> dict[str, torch.Tensor]:
        numbers = self["second_level"].permute(3, 1, 2, 4, 0)
        numbers = numbers.reshape(4, self.units * UNIT_GROUPS, self.spec.stats_groups)
        numbers = numbers[:, : self.spec.groups].contiguous()
        return dict(zip(SECOND_LEVEL, numbers.unbind(), strict=True))


def prepare(matrix: SpqrMatrix) -> PreparedMatrix:
    """Rearrange a weight, on the device where it is. Raises InputError unless `can_prepare`."""
    spec = matrix.spec
    if not can_prepare(matrix):
        raise InputError(f"a weight of these settings cannot be prepared: {spec}")
    tensors = to_runs(spec, matrix.tensors) if "outlier_values" in matrix.tensors else {}
    prepared = PreparedMatrix(spec, tensors)
    tensors["records"] = torch.cat(
        [code_words(matrix, prepared), stat_words(matrix, prepared)], dim=2
    )
    tensors["second_level"] = second_level(matrix, prepared)
    if "permutation" in matrix.tensors:
        tensors["target"] = inverse(matrix["permutation"])
    return prepared


def code_words(matrix: SpqrMatrix, prepared: PreparedMatrix) -> torch.Tensor:
    """int32 [tiles, units, words of its blocks]."""
    spec, tiles, units = matrix.spec, prepared.tiles, prepared.units
    codes = unpack_codes(matrix["codes"], spec.bits, spec.in_features)
    codes = padded(codes, units * UNIT_GROUPS * spec.group_size, tiles * TILE_ROWS)
    octets, per_quarter = octets_and_pairs(spec)
    codes = codes.view(-1, octets, 2, 4, QUARTERS, per_quarter, 2, tiles, 2, 8)
    pairs = codes.permute(1, 2, 5, 8, 7, 0, 9, 3, 4, 6).reshape(PAIRS, tiles, -1, LANES, 4, 2)
    words = pack_pairs(pairs, spec.bits).movedim(0, 2)
    words = words[..., sorted(range(LANES), key=place_of_lane), :]
    return words.reshape(tiles, units, -1)


def place_of_lane(lane: int) -> int:
    """Which of a warp's 32 loads of codes is a lane's."""
    return lane ^ lane >> 3


def stat_words(matrix: SpqrMatrix, prepared: PreparedMatrix) -> torch.Tensor:
    """int32 [tiles, units, words of its statistics]."""
    spec, tiles, units = matrix.spec, prepared.tiles, prepared.units
    codes = torch.stack(
        [
            padded(
                unpack_statistics(matrix[f"{name}_codes"], spec.scale_bits, spec.out_features),
                units * UNIT_GROUPS,
                tiles * TILE_ROWS,
            )
            for name in STATISTICS
        ]
    )
    codes = codes.view(2, units, UNIT_OCTETS, 4, 2, tiles, 2, 8)
    pairs = codes.permute(2, 6, 0, 5, 1, 7, 3, 4).reshape(PAIRS, tiles, units, LANES, 2)
    return pack_pairs(pairs, spec.scale_bits).movedim(0, 2).reshape(tiles, units, -1)


def second_level(matrix: SpqrMatrix, prepared: PreparedMatrix) -> torch.Tensor:
    """fp16 [stats_groups, 4 * units, 4, 4, 2]."""
    stats_groups = matrix.spec.stats_groups
    numbers = torch.stack(
        [padded(matrix[name], prepared.units * UNIT_GROUPS, stats_groups) for name in SECOND_LEVEL]
    )
    numbers = numbers.view(4, prepared.units * UNIT_OCTETS, 4, 2, stats_groups)
    return numbers.permute(4, 1, 2, 0, 3).contiguous()


def pack_pairs(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Sixteen pairs of codes to words: uint8 [16, ..., 2] -> int32 [bits, ...]."""
    words = torch.zeros((bits, *codes.shape[1:-1]), dtype=torch.int32, device=codes.device)
    for code, pair in enumerate(codes.to(torch.int32)):
        for word, shift, part, width in pair_places(bits, code):
            field = pair >> part & (1 << width) - 1
            words[word] |= field[..., 0] << shift | field[..., 1] << shift + HALF
    return words


def unpack_pairs(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_pairs`: int32 [bits, ...] -> uint8 [16, ..., 2]."""
    shape = PAIRS, *words.shape[1:], 2
    codes = torch.zeros(shape, dtype=torch.uint8, device=words.device)
    for code, pair in enumerate(codes):
        for word, shift, part, width in pair_places(bits, code):
            for half in range(2):
                field = words[word] >> shift + HALF * half & (1 << width) - 1
                pair[..., half] |= (field << part).to(torch.uint8)
    return codes


def pair_places(bits: int, pair: int) -> list[tuple[int, int, int, int]]:
    """Where a pair's lower code lies: (word, shift, first bit of the code, how many bits).

    The pairs 4j ... 4j + 3 are one operand, rows g and g + 8 in turns. Where they lie keeps
    `shift_and_place` simple: the codes of a row in one operand are at one place once they are in
    the mantissa of a half. And it keeps registers free: with groups of 16 `group_pairs` gives those
    of two words, but for half of the groups of codes of 3 bits. Of these a half of a word takes
    five; the pair SPREAD, the sixteenth, takes the last bit of each of the three words.
    """
    operand, register = divmod(pair, 4)
    if bits == 4:
        return [(operand % 2 * 2 + register // 2, operand // 2 * 8 + register % 2 * 4, 0, 4)]
    if bits == 3 and pair == SPREAD:
        return [(word, HALF - 1, word, 1) for word in range(bits)]
    word, shift = (PLACES_OF_2 if bits == 2 else PLACES_OF_3)[pair]
    return [(word, shift, 0, bits)]


def shift_and_place(bits: int, shift: int) -> tuple[int, int]:
    """How far a word moves to the right, and which bit a code at `shift` is at then: within the
    ten bits of a half's mantissa."""
    places = {2: 10, 3: 6, 4: 8}[bits] if shift + bits > MANTISSA_BITS else 0
    return places, shift - places


def group_pairs(pairs: int, octet: int, half: int) -> range:
    """Which of a quarter's pairs in a block are those of the group t or t + 4 (half) of an octet:
    of rows g and g + 8 in turns, for each of its `pairs`."""
    first = 2 * (2 * octet + half) * pairs
    return range(first, first + 2 * pairs)


def octets_and_pairs(spec: MatrixSpec) -> tuple[int, int]:
    """Octets a block, and code pairs of a quarter of a group."""
    return BLOCK_COLUMNS // (OCTET * spec.group_size), spec.group_size // OCTET


def padded(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """values [r, c] with zeros up to [rows, columns]."""
    missing = columns - values.shape[1], rows - values.shape[0]
    return torch.nn.functional.pad(values, (0, missing[0], 0, missing[1]))


def inverse(permutation: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes one, of the same dtype."""
    return permutation.to(torch.int32).argsort().to(permutation.dtype)
