"""A unit of a prepared weight (prepared.py) and eight or sixteen inputs.

The eight columns of an mma's second operand are inputs, and the columns of one group its depth::

    mma.m16n8k16    groups of 16        mma.m16n8k8    groups of 8

For that the lanes of a quad must all hold codes of the same group, and the lane t takes its quarter
t: where the words of a quad's lanes are laid transposed in shared memory (stream_cuda.py), each of
the four reads from all. Sums over one group come out, of rows g and g + 8 and the inputs 2t and
2t + 1, and take the scale and the zero of their row, which one lane of the quad has decoded.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .codes_cuda import raw_codes
from .prepared import LANES, OCTET, QUARTERS
from .ptx import f32, i32
from .unit_cuda import HALF_BYTES, LOAD_BYTES, Unit

__all__ = ["AT_ONCE", "UnitOfSeveral"]

AT_ONCE = 8  # inputs of an mma


class UnitOfSeveral(Unit):
    """A unit and some eights of inputs; four totals for each eight: of row g and the inputs 2t and
    2t + 1, of row g + 8 and the same."""

    def __init__(self, ptx, spec, unit, lane, x, x_step, x_sums) -> None:
        """x: shared address of the lane's quarter of the unit's first group, of input g; x_step:
        bytes from there to input g + 8; x_sums: address of X of the unit's first group and input
        2t."""
        super().__init__(ptx, spec, unit, lane)
        row = self.builder.lshr(lane, i32(2))
        own = self.builder.add(self.times(row, LOAD_BYTES), self.times(self.in_quad, 4))
        self.codes = self.builder.add(unit, own)
        self.inputs = [x]
        for _ in range(1, spec.inputs // AT_ONCE):
            self.inputs.append(self.builder.add(self.inputs[-1], x_step))
        self.x_sums = x_sums

    def add_block(self, totals: list[ir.Value], block: int) -> list[ir.Value]:
        """The groups of one lane of the quad after those of another, that few codes are held."""
        spec = self.spec
        first = block * spec.octets
        statistics = [self.decoded(first + octet) for octet in range(spec.octets)]
        for quad_lane in range(4):
            pairs = self.codes_of(block, quad_lane)
            for octet in range(spec.octets):
                for half in range(2):
                    group = quad_lane + 4 * half
                    operand = 4 * octet * spec.pairs + 2 * half
                    a = [pairs[operand + 4 * p + row] for p in range(spec.pairs) for row in (0, 1)]
                    sums = self.group_sums(a, (first + octet) * OCTET + group)
                    x_sums = self.load_x_sums((first + octet) * OCTET + group)
                    totals = self.scaled(totals, sums, statistics[octet], group, x_sums)
        return totals

    def codes_of(self, block: int, quad_lane: int) -> list[ir.Value]:
        """Code pairs of the groups of a lane of the quad, of the own lane's quarter."""
        first = block * self.spec.block_bytes + quad_lane * LANES // QUARTERS * LOAD_BYTES
        words = [
            self.ptx.load_shared(self.at(self.codes, first + word * LANES * LOAD_BYTES), 1)[0]
            for word in range(self.spec.bits)
        ]
        return raw_codes(self.ptx, words)

    def group_sums(self, a: list[ir.Value], group: int) -> list[ir.Value]:
        """The sums over a group of the unit, as totals are."""
        place = group * self.spec.group_size * HALF_BYTES
        sums: list[ir.Value] = []
        for x in self.inputs:
            b = self.ptx.load_shared(self.at(x, place), self.spec.pairs)
            sums += self.ptx.mma([f32(0)] * 4, a, b)
        return sums

    def scaled(
        self,
        totals: list[ir.Value],
        sums: list[ir.Value],
        statistics: list[Any],
        group: int,
        x_sums: list[ir.Value],
    ) -> list[ir.Value]:
        """totals + scale * (sums - zero * X) of a group of an octet."""
        rows = [
            [self.ptx.floats(self.ptx.of_quad(word, group // 2))[group % 2] for word in words]
            for words in statistics
        ]
        grown = []
        for i, total in enumerate(totals):
            scale, zero = rows[i // 2 % 2]
            grown.append(self.grown(total, scale, sums[i], zero, x_sums[i // 4 * 2 + i % 2]))
        return grown

    def load_x_sums(self, group: int) -> list[ir.Value]:
        """X of a group and the inputs 2t and 2t + 1 of each eight."""
        found: list[ir.Value] = []
        for first in range(0, self.spec.inputs, AT_ONCE):
            place = 4 * (group * self.spec.inputs + first)
            found += self.ptx.load_shared_floats(self.at(self.x_sums, place), 2)
        return found
