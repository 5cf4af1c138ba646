"""Products of a warpgroup on a Hopper GPU: wgmma, of operands in shared memory.

A warpgroup is four warps. Its product is sums [64, N] += A [64, K] B [N, K]^T of fp16 numbers, in
float32, and goes on while the threads do something else. Both operands lie in *cores* of eight rows
of eight columns, 16 bytes a row and 128 in a run; a `Tiled` says how far apart the cores are. The
thread 4g + t of warp w has the sums of the rows 16w + g and 16w + g + 8::

    sums[4j], sums[4j + 1]         row 16w + g          columns 8j + 2t and 8j + 2t + 1
    sums[4j + 2], sums[4j + 3]     row 16w + g + 8      the same

Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .ptx import FLOAT, Ptx, effect, i32
from .unit_cuda import WORD_BYTES, packed, unpacked

__all__ = [
    "CORE_BYTES",
    "CORE_ROWS",
    "CORE_ROW_BYTES",
    "STEP_COLUMNS",
    "WARPGROUP_ROWS",
    "Tiled",
    "let_tensor_cores_see",
    "products_done",
    "sums_writer",
    "warpgroup_product",
]

WARPGROUP_ROWS = 64
STEP_COLUMNS = 16  # of one wgmma
CORE_ROWS = 8
CORE_ROW_BYTES = 16
CORE_BYTES = CORE_ROWS * CORE_ROW_BYTES
UNIT_BYTES = 16  # in which a descriptor counts


@dataclass(frozen=True)
class Tiled:
    """How an operand's cores lie: bytes from one to the next, along the columns and the rows."""

    column_step: int
    row_step: int = CORE_BYTES

    @property
    def constant(self) -> int:
        """What a descriptor holds beside the address; no swizzle."""
        return self.column_step // UNIT_BYTES << 16 | self.row_step // UNIT_BYTES << 32


@cache
def warpgroup_product(inputs: int, steps: int, a: Tiled, b: Tiled) -> Any:
    """multiply(sums, a, b) -> sums, on their way: A [64, 16 steps] times B [inputs, 16 steps]^T.

    sums: float32 tuple of inputs / 2; a, b: shared addresses. For all threads of a warpgroup
    together; nothing may look at the sums before `products_done`.
    """

    @intrinsic
    def multiply(typingctx, sums, a_start, b_start):
        def codegen(context, builder, signature, arguments):
            sums, *starts = arguments
            grown = started(Ptx(builder), unpacked(builder, sums), starts, steps, (a, b))
            return packed(builder, grown)

        return sums(sums, types.int32, types.int32), codegen

    return multiply


def started(
    ptx: Ptx, sums: list[ir.Value], starts: list[ir.Value], steps: int, tiled: tuple[Tiled, Tiled]
) -> list[ir.Value]:
    """What `warpgroup_product` writes: one piece of assembly, since sums must stay where they are
    from the first product to the last."""
    count = len(sums)
    names = ", ".join(f"${i}" for i in range(count))
    kind = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k{STEP_COLUMNS}.f32.f16.f16"
    lines = ["{ .reg .b64 a, b; .reg .b32 word; .reg .pred add; setp.ne.b32 add, 1, 0;"]
    for name, place, operand in zip("ab", (count, count + 1), tiled, strict=True):
        lines.append(f"shr.u32 word, ${place}, 4; cvt.u64.u32 {name}, word;")
        lines.append(f"or.b64 {name}, {name}, {operand.constant};")
    lines.append("wgmma.fence.sync.aligned;")
    for step in range(steps):
        lines.append(f"{kind} {{{names}}}, a, b, add, 1, 1, 0, 0;")
        if step + 1 < steps:
            for name, operand in zip("ab", tiled, strict=True):
                distance = STEP_COLUMNS // CORE_ROWS * operand.column_step // UNIT_BYTES
                lines.append(f"add.s64 {name}, {name}, {distance};")
    lines.append("wgmma.commit_group.sync.aligned; }")
    constraints = ["=f"] * count + ["r", "r"] + [str(i) for i in range(count)] + ["~{memory}"]
    arguments = [*starts, *sums]
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


products_done = effect(
    "products_done",
    "wgmma.wait_group.sync.aligned 0",
    (),
    "Until the warpgroup's products have read their operands and left their sums.",
)
let_tensor_cores_see = effect(
    "let_tensor_cores_see",
    "fence.proxy.async.shared::cta",
    (),
    "What the thread wrote to shared memory, before a barrier behind which they are to read it.",
)
