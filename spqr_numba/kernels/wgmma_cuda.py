"""Products of a warpgroup on a Hopper GPU: wgmma, A in registers and B in shared memory.

A warpgroup is four warps. Its product is sums [64, N] += A [64, K] B [N, K]^T of fp16 numbers, in
float32, and goes on while the threads do something else. B lies in *cores* of eight rows of eight
columns, 16 bytes a row and 128 in a run; a `Tiled` says how far apart the cores are. The thread
4g + t of warp w has, of the rows r = 16w + g and r + 8::

    words[4s], words[4s + 1]           A of r, of r + 8      columns 16s + 2t and 16s + 2t + 1
    words[4s + 2], words[4s + 3]       A of r, of r + 8      columns 16s + 2t + 8 and 16s + 2t + 9
    sums[4j], sums[4j + 1]             row r                 columns 8j + 2t and 8j + 2t + 1
    sums[4j + 2], sums[4j + 3]         row r + 8             the same

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .ptx import FLOAT, Ptx, effect, i32, unpacked
from .unit_cuda import WORD_BYTES

__all__ = [
    "CORE_BYTES",
    "CORE_ROWS",
    "CORE_ROW_BYTES",
    "STEP_COLUMNS",
    "STEP_WORDS",
    "Tiled",
    "products_done",
    "start_step",
    "sums_writer",
]

STEP_COLUMNS = 16  # of one wgmma
STEP_WORDS = 4  # of A that a lane has of one
CORE_ROWS = 8
CORE_ROW_BYTES = 16
CORE_BYTES = CORE_ROWS * CORE_ROW_BYTES
UNIT_BYTES = 16  # in which a descriptor counts


@dataclass(frozen=True)
class Tiled:
    """How B's cores lie: bytes from one to the next, along the columns and the rows."""

    column_step: int
    row_step: int = CORE_BYTES

    @property
    def constant(self) -> int:
        """What a descriptor holds beside the address; no swizzle."""
        return self.column_step // UNIT_BYTES << 16 | self.row_step // UNIT_BYTES << 32


def start_step(
    ptx: Ptx,
    sums: list[ir.Value],
    words: list[ir.Value],
    b_start: ir.Value,
    b: Tiled,
    step: int,
) -> list[ir.Value]:
    """sums, on their way: A [64, 16] B [inputs, 16]^T comes to them, where B is a step of more.

    sums: float32, half as many as inputs; words: four; b_start: shared address of the first step's
    B. For all threads of a warpgroup together; nothing may look at the sums, nor write to the
    words, before `products_done`. It is one piece of assembly, since sums must stay where they are
    from the first product to the last.
    """
    count = len(sums)
    names = ", ".join(f"${i}" for i in range(count))
    a = ", ".join(f"${count + 1 + i}" for i in range(STEP_WORDS))
    kind = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k{STEP_COLUMNS}.f32.f16.f16"
    distance = step * STEP_COLUMNS // CORE_ROWS * b.column_step // UNIT_BYTES
    lines = [
        "{ .reg .b64 b; .reg .b32 word; .reg .pred add; setp.ne.b32 add, 1, 0;",
        f"shr.u32 word, ${count}, 4; add.u32 word, word, {distance};",
        f"cvt.u64.u32 b, word; or.b64 b, b, {b.constant};",
        "wgmma.fence.sync.aligned;",
        f"{kind} {{{names}}}, {{{a}}}, b, add, 1, 1, 0;",
        "wgmma.commit_group.sync.aligned; }",
    ]
    constraints = ["=f"] * count + ["r"] * (1 + STEP_WORDS)
    constraints += [str(i) for i in range(count)] + ["~{memory}"]
    arguments = [b_start, *words, *sums]
    return ptx.emit(
        " ".join(lines), ",".join(constraints), [FLOAT] * count, arguments, ordered=True
    )


@cache
def sums_writer(row_floats: int) -> Any:
    """put(out, lane, sums): a warp's sums as float32 [inputs, row_floats], to shared memory.

    out: shared address of input 0 and the warp's first row.
    """

    @intrinsic
    def put(typingctx, out, lane, sums):
        def codegen(context, builder, signature, arguments):
            out, lane, sums = arguments
            put_sums(Ptx(builder), row_floats, out, lane, unpacked(builder, sums))
            return context.get_dummy_value()

        return types.none(types.int32, types.int32, sums), codegen

    return put


def put_sums(
    ptx: Ptx, row_floats: int, out: ir.Value, lane: ir.Value, sums: list[ir.Value]
) -> None:
    """What `sums_writer` writes."""
    builder = ptx.builder
    row, column = builder.lshr(lane, i32(2)), builder.and_(lane, i32(3))
    place = builder.add(
        builder.mul(row, i32(WORD_BYTES)), builder.mul(column, i32(2 * WORD_BYTES * row_floats))
    )
    place = builder.add(out, place)
    for i, value in enumerate(sums):
        eight, lower, input_ = i // 4, i // 2 % 2, i % 2
        distance = (8 * eight + input_) * row_floats + CORE_ROWS * lower
        ptx.store_shared_floats(builder.add(place, i32(WORD_BYTES * distance)), [value])


@cache
def products_done(but: int) -> Any:
    """An intrinsic that waits until the warpgroup's products, all but the latest `but`, have read
    their operands and left their sums."""
    text = f"wgmma.wait_group.sync.aligned {but}"
    return effect("wait_for_products", text, (), "Until earlier products have happened.")
