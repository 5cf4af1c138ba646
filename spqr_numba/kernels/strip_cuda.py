"""A strip of a tile, decoded in a warp's registers and multiplied by many inputs as it is.

A strip is four groups of an octet (prepared.py): those that the lanes t own as their groups t, or
t + 4. Sixteen of its columns are a *step* of tensor cores (wgmma_cuda.py), which multiply by them
while the lanes decode the next. The k-th eight columns of the product are columns 2k and 2k + 1 of
each group, as lanes hold them, and staging_cuda.py lays the inputs out likewise.

    W = scale * code + (-scale * zero + patch)      fp16, rounded at -scale * zero, in brackets, and
                                                    in the end
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .codes_cuda import both, exact_codes
from .prepared import QUARTERS, group_pairs
from .ptx import Ptx, i32, packed, unpacked
from .unit_cuda import LOAD_BYTES, WORD_BYTES, Unit, UnitSpec
from .unit_numbers_cuda import loaded_words, owners, taken_words
from .wgmma_cuda import STEP_WORDS, Tiled, start_step

__all__ = ["Strip", "strip_multiplier"]

LOAD_WORDS = LOAD_BYTES // WORD_BYTES


@cache
def strip_multiplier(spec: UnitSpec, octet: int, half: int, patched: bool, b: Tiled) -> Any:
    """multiply(sums, codes, statistics, lane, patch, inputs) -> sums, on their way.

    sums: float32 tuple; codes, statistics: shared addresses of the octet's block and of the unit's
    statistics; patch: of what is added to the strip (patch_cuda.py) where `patched` says so, all
    zeros behind it; inputs: of the strip's B.
    """

    @intrinsic
    def multiply(typingctx, sums, codes, statistics, lane, patch, inputs):
        def codegen(context, builder, signature, arguments):
            sums, codes, statistics, lane, patch, inputs = arguments
            ptx, grown = Ptx(builder), unpacked(builder, sums)
            strip = Strip(ptx, spec, codes, statistics, lane, patch if patched else None)
            for step, words in enumerate(strip.steps(octet, half)):
                grown = start_step(ptx, grown, words, inputs, b, step)
            return packed(builder, grown)

        return sums(sums, *(types.int32,) * 5), codegen

    return multiply


class Strip(Unit):
    """Four groups of an octet, one a lane of each quad, two weights at a time in halves."""

    def __init__(self, ptx, spec, codes, statistics, lane, patch) -> None:
        unit = ptx.builder.add(statistics, i32(-spec.blocks * spec.block_bytes))
        super().__init__(ptx, spec, unit, lane)
        self.codes = self.builder.add(codes, self.times(lane, LOAD_BYTES))
        self.patch = (
            None if patch is None else self.builder.add(patch, self.times(lane, LOAD_BYTES))
        )
        self.sources, odd = owners(self)
        self.chosen = self.builder.add(self.times(odd, 0x2222), i32(0x1010))  # bytes of both halves

    def steps(self, octet: int, half: int) -> Iterator[list[ir.Value]]:
        """Words of each step, of rows g and g + 8 in turns."""
        words: list[ir.Value] = []
        for word in self.words_of(octet, half):
            words.append(word)
            if len(words) == STEP_WORDS:
                yield words
                words = []

    def words_of(self, octet: int, half: int) -> Iterator[ir.Value]:
        """Words of rows g and g + 8 in turns, from the group's first two columns on."""
        scales, offsets = zip(*self.statistics(octet, half), strict=True)
        which = group_pairs(self.spec.pairs, octet % self.spec.octets, half)
        loaded, rows, number = loaded_words(self, self.codes), len(scales), 0
        for quarter in range(QUARTERS):
            for code in exact_codes(self.ptx, [word[quarter] for word in loaded], which):
                pair, row = divmod(number, rows)
                if row == 0 and pair % LOAD_WORDS == 0:
                    patches = [self.patch_of(row, pair // LOAD_WORDS) for row in range(rows)]
                offset = self.patched(offsets[row], patches[row], pair % LOAD_WORDS)
                yield self.ptx.fma_halves(code, scales[row], offset)
                number += 1

    def statistics(self, octet: int, half: int) -> list[tuple[ir.Value, ir.Value]]:
        """scale and -scale * zero of the lane's group of rows g and g + 8, twice each."""
        found = []
        for statistics in self.decoded(octet):
            scale, zero = (self.own(word, half) for word in statistics)
            minus = self.ptx.negated(scale)
            found.append((scale, self.ptx.fma_halves(minus, zero, both(-0.0))))
        return found

    def own(self, word: ir.Value, half: int) -> ir.Value:
        """The halves of the group t or t + 4, twice."""
        word = self.ptx.of_quad_lane(word, self.sources[half])
        return self.ptx.bytes_of(word, self.chosen)

    def patch_of(self, row: int, part: int) -> list[ir.Value]:
        """`taken_words`; none without a patch."""
        return [] if self.patch is None else taken_words(self, self.patch, part, row)

    def patched(self, offset: ir.Value, patch: list[ir.Value], pair: int) -> ir.Value:
        """The offset of two weights, with what their patch adds."""
        return self.ptx.fma_halves(offset, both(1.0), patch[pair]) if patch else offset
