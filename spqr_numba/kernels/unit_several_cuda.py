"""A unit of a prepared weight (prepared.py) and eight or sixteen inputs.

The eight columns of an mma's second operand are inputs, and the columns of one group its depth::

    mma.m16n8k16    groups of 16        mma.m16n8k8    groups of 8

For that the lanes of a quad must all hold codes of the same group, and the lane t takes its quarter
t: where the words of a quad's lanes are laid transposed in shared memory (stream_cuda.py), each of
the four reads from all. Sums over one group come out, of rows g and g + 8 and the inputs 2t and
2t + 1, and take the scale of their row, which one lane of the quad has decoded.

What the zeros take away, the sum of scale * zero * X over an octet, is a product of matrices too:
mma.m16n8k8 of tf32 has eleven bits of a factor, so a factor is two, and the lower parts of both are
not multiplied with each other, which leaves out less than 2^-22 of it.
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

    def __init__(self, ptx, spec, unit, lane, x, x_step, x_sums, sums_step) -> None:
        """x: shared address of the lane's quarter of the unit's first group, of input g; x_step:
        bytes from there to input g + 8; x_sums: address of X of the group 2t of the unit's first
        octet, of input g, and sums_step: from there to input g + 8."""
        super().__init__(ptx, spec, unit, lane)
        row = self.builder.lshr(lane, i32(2))
        own = self.builder.add(self.times(row, LOAD_BYTES), self.times(self.in_quad, 4))
        self.codes = self.builder.add(unit, own)
        self.inputs, self.x_sums = [x], [x_sums]
        for _ in range(1, spec.inputs // AT_ONCE):
            self.inputs.append(self.builder.add(self.inputs[-1], x_step))
            self.x_sums.append(self.builder.add(self.x_sums[-1], sums_step))

    def add_block(self, totals: list[ir.Value], block: int) -> list[ir.Value]:
        """The groups of one lane of the quad after those of another, that few codes are held."""
        spec = self.spec
        first = block * spec.octets
        scales = []
        for octet in range(spec.octets):
            statistics = self.decoded(first + octet)
            totals = self.less_zeros(totals, statistics, first + octet)
            scales.append([self.of_all_groups(scale) for scale, _ in statistics])
        for quad_lane in range(4):
            pairs = self.codes_of(block, quad_lane)
            for octet in range(spec.octets):
                for half in range(2):
                    group = quad_lane + 4 * half
                    operand = 4 * octet * spec.pairs + 2 * half
                    a = [pairs[operand + 4 * p + row] for p in range(spec.pairs) for row in (0, 1)]
                    sums = self.group_sums(a, (first + octet) * OCTET + group)
                    rows = [self.of_group(words, group) for words in scales[octet]]
                    totals = [
                        self.builder.fma(rows[i // 2 % 2], sums[i], total)
                        for i, total in enumerate(totals)
                    ]
        return totals

    def of_all_groups(self, word: ir.Value) -> list[ir.Value]:
        """Of an octet, by twos, what the lanes of the quad hold of two groups each."""
        return [self.ptx.of_quad(word, lane) for lane in range(4)]

    def of_group(self, words: list[ir.Value], group: int) -> ir.Value:
        """The float32 of a group of an octet."""
        return self.ptx.floats(words[group // 2])[group % 2]

    def less_zeros(
        self, totals: list[ir.Value], statistics: list[Any], octet: int
    ) -> list[ir.Value]:
        """totals - the sum of scale * zero * X over an octet."""
        taken = []
        for scale, zero in statistics:
            factors = zip(self.ptx.floats(scale), self.ptx.floats(zero), strict=True)
            taken.append(
                [self.builder.fmul(self.builder.fsub(f32(-0.0), s), z) for s, z in factors]
            )
        parts = [self.ptx.tf32_parts(taken[row][group]) for group in range(2) for row in range(2)]
        high, low = ([part[i] for part in parts] for i in range(2))
        grown: list[ir.Value] = []
        for first, address in enumerate(self.x_sums):
            x_sums = self.ptx.load_shared_floats(self.at(address, 4 * OCTET * octet), 2)
            x_parts = [self.ptx.tf32_parts(x_sum) for x_sum in x_sums]
            x_high, x_low = ([part[i] for part in x_parts] for i in range(2))
            sums = totals[4 * first : 4 * first + 4]
            for a, b in ((high, x_low), (low, x_high), (high, x_high)):
                sums = self.ptx.mma_tf32(sums, a, b)
            grown += sums
        return grown

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
