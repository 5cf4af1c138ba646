"""A unit of a prepared weight (prepared.py) as numbers: what a warp writes of it.

A lane owns whole groups of the rows g and g + 8, t and t + 4 of each octet. It takes their scales
and zeros from the lane of the quad that has decoded them, and writes 16 bytes at a time. Each
weight is scale * (code - zero) in float32, bit for bit as elsewhere, and rounded to its dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .codes_cuda import SUBNORMAL_UNIT, code_place, masked_pair
from .prepared import LANES, OCTET, QUARTERS
from .ptx import Ptx, f32, i32, i64
from .unit_cuda import LOAD_BYTES, WORD_BYTES, Unit, UnitSpec

__all__ = ["unit_writer"]

LOAD_WORDS = LOAD_BYTES // WORD_BYTES


@cache
def unit_writer(spec: UnitSpec, dtype: torch.dtype) -> Any:
    """write_unit(unit, lane, out, below, rows, groups): a lane's part of a unit, to global memory.

    unit: shared address of its bytes; out: address of the first weight of row g and the group t;
    below: bytes from there to row g + 8; rows, groups: how many there are from these on.
    """

    @intrinsic
    def write_unit(typingctx, unit, lane, out, below, rows, groups):
        def codegen(context, builder, signature, arguments):
            UnitOfNumbers(Ptx(builder), spec, dtype, *arguments).write()
            return context.get_dummy_value()

        words, addresses = (types.int32,) * 2, (types.int64,) * 2
        return types.none(*words, *addresses, *words), codegen

    return write_unit


class UnitOfNumbers(Unit):
    """A unit, to be written as numbers of a dtype."""

    def __init__(self, ptx, spec, dtype, unit, lane, out, below, rows, groups) -> None:
        super().__init__(ptx, spec, unit, lane)
        self.codes = self.builder.add(unit, self.times(lane, LOAD_BYTES))
        self.dtype, self.groups = dtype, groups
        self.outs = out, self.builder.add(out, below)
        self.row_is_there = [self.builder.icmp_signed(">", rows, i32(8 * row)) for row in range(2)]
        low = self.builder.lshr(self.in_quad, i32(1))
        self.sources = low, self.builder.add(low, i32(2))  # lanes that decode groups t and t + 4
        self.shift = self.times(self.builder.and_(self.in_quad, i32(1)), 16)

    def write(self) -> None:
        """Block by block, octet by octet, a group of a row at a time."""
        spec = self.spec
        for block in range(spec.blocks):
            words = [
                self.ptx.load_shared(
                    self.at(self.codes, block * spec.block_bytes + word * LANES * LOAD_BYTES)
                )
                for word in range(spec.bits)
            ]
            for octet in range(spec.octets):
                statistics = self.decoded(block * spec.octets + octet)
                for half in range(2):
                    group = (block * spec.octets + octet) * OCTET + 4 * half
                    for row in range(2):
                        scale, zero = (self.own(word, half) for word in statistics[row])
                        numbers = self.numbers(words, octet, half, row, scale, zero)
                        self.store(group, row, numbers)

    def own(self, word: ir.Value, half: int) -> ir.Value:
        """The float32 of the group t or t + 4, from the lane that has two groups in a word."""
        word = self.ptx.of_quad_lane(word, self.sources[half])
        return self.ptx.floats(self.builder.lshr(word, self.shift))[0]

    def numbers(
        self, words: list, octet: int, half: int, row: int, scale: ir.Value, zero: ir.Value
    ) -> list[ir.Value]:
        """float32 weights of a group of a row."""
        spec, found = self.spec, []
        minus_zero = self.builder.fsub(f32(-0.0), zero)
        for quarter in range(QUARTERS):
            of_quarter = [word[quarter] for word in words]
            for part in range(spec.pairs):
                operand = octet * spec.pairs + part
                place = code_place(spec.bits, operand, row)
                codes = masked_pair(self.ptx, of_quarter, 4 * operand + 2 * half + row)
                for code in self.ptx.floats(codes):
                    unit = f32(2.0**-place / SUBNORMAL_UNIT)
                    steps = self.builder.fma(code, unit, minus_zero)
                    found.append(self.builder.fmul(scale, steps))
        return found

    def store(self, group: int, row: int, numbers: list[ir.Value]) -> None:
        """To the row, where it and the group are there."""
        there = self.builder.icmp_signed(">", self.groups, i32(group))
        there = self.builder.and_(there, self.row_is_there[row])
        if self.dtype == torch.float32:
            words = [self.ptx.word_of(number) for number in numbers]
        else:
            kind = "bf16" if self.dtype == torch.bfloat16 else "f16"
            pairs = zip(numbers[::2], numbers[1::2], strict=True)
            words = [self.ptx.rounded_pair(low, high, kind) for low, high in pairs]
        first = len(words) * WORD_BYTES * group
        for i in range(0, len(words), LOAD_WORDS):
            place = self.builder.add(self.outs[row], i64(first + i * WORD_BYTES))
            self.ptx.store_global_where(there, place, words[i : i + LOAD_WORDS])
