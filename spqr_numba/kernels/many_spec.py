"""What the product with many inputs (many_cuda.py) is compiled for, and where its things lie.

    shared memory  dtype  shape
    barriers       int64  [2, stages]                               bulk_cuda.py
    place          int32  [3]                                       of the block among all
    B              fp16   [stages, columns / 8, inputs / 8, 8, 8]   x' of a strip
    of each warp:
    patch          fp16   [1, group_size / 8, 16, 4, 8]             patch_cuda.py; of a strip
    blocks         bytes  [2, block]                                codes
    statistics     bytes  [2, statistics of a unit]
    runs           bytes  [2, run]                                  as much of them as has room

A strip is four groups. The results take the place of all but the barriers in the end: a warp's last
arrival at one may be on its way still when others have written theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .bulk_cuda import BARRIER_BYTES
from .patch_spec import PatchSpec
from .prepared import LANES, QUAD, UNIT_GROUPS
from .runs import TILE_ROWS
from .unit_cuda import LOAD_BYTES, WORD_BYTES, UnitSpec
from .wgmma_cuda import CORE_ROW_BYTES, CORE_ROWS, STEP_COLUMNS, Tiled

__all__ = [
    "FIRST_STAGE",
    "PLACE",
    "STAGES",
    "UNIT_STRIPS",
    "ManySpec",
]

WARPS, FEW_WARPS = 16, 8
MOST_OF_MANY_WARPS = {True: 128, False: 64}
"""Whether there are outliers -> inputs whose sums fit into the registers that each has then; with
no outliers to wait for, the assembler holds more at once."""
STRIP_GROUPS = QUAD  # one a lane of a row
UNIT_STRIPS = UNIT_GROUPS // STRIP_GROUPS
STAGES = 4  # of B: a divisor of UNIT_STRIPS, so that each strip of a unit has one of its own
PLACE = 64  # where a block's place is, behind the barriers
FIRST_STAGE = 128  # where B begins, and the results
SHARED_BYTES = 224 * 1024  # of a multiprocessor, which has one block
LONGEST_RUN = 4096  # bytes
GAP_FLOATS = 4  # behind an input's results, so that stores of a warp meet different banks


@dataclass(frozen=True)
class ManySpec:
    """What a kernel is compiled for: the weight, the inputs of a block, the dtype of y."""

    unit: UnitSpec
    outliers: bool
    inputs: int
    kind: torch.dtype

    @property
    def warp_count(self) -> int:
        """Of a block."""
        return WARPS if self.inputs <= MOST_OF_MANY_WARPS[self.outliers] else FEW_WARPS

    @property
    def in_flight(self) -> int:
        """Products of the strip before that tensor cores may be at while a strip is begun: many
        warps need none, and have no registers for the words of two strips."""
        return 0 if self.warp_count == WARPS else self.columns // STEP_COLUMNS

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warp_count * LANES

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.warp_count * TILE_ROWS

    @property
    def columns(self) -> int:
        """Of a strip."""
        return STRIP_GROUPS * self.unit.group_size

    @property
    def b(self) -> Tiled:
        """How B lies."""
        return Tiled(self.inputs * CORE_ROW_BYTES)

    @property
    def block_strips(self) -> int:
        """Of a block of codes: as many pass between the end of one and what is copied there."""
        return 2 * self.unit.octets

    @property
    def strip_bytes(self) -> int:
        """Of x'."""
        return self.columns // CORE_ROWS * self.b.column_step

    @property
    def patch(self) -> PatchSpec:
        """How a strip's outliers are taken."""
        return PatchSpec(self.unit.group_size, 1, self.run_bytes)

    @property
    def patch_bytes(self) -> int:
        """Of a strip's outliers."""
        return PatchSpec(self.unit.group_size, 1, 0).bytes if self.outliers else 0

    @property
    def statistics_bytes(self) -> int:
        """Of a unit."""
        return self.unit.stat_bytes + self.unit.second_bytes

    @property
    def warps(self) -> int:
        """Where what is of the warps begins."""
        return FIRST_STAGE + STAGES * self.strip_bytes

    @property
    def blocks(self) -> int:
        """Where a warp's blocks begin, in what is its own."""
        return self.patch_bytes

    @property
    def statistics(self) -> int:
        """Where its statistics begin."""
        return self.blocks + 2 * self.unit.block_bytes

    @property
    def runs(self) -> int:
        """Where its runs begin."""
        return self.statistics + 2 * self.statistics_bytes

    @property
    def run_bytes(self) -> int:
        """Of a run, as much as is copied; the rest comes from global memory."""
        if not self.outliers:
            return 0
        room = (SHARED_BYTES - self.warps) // self.warp_count - self.runs
        return min(room // 2 // LOAD_BYTES * LOAD_BYTES, LONGEST_RUN)

    @property
    def warp_bytes(self) -> int:
        """Of what is a warp's own."""
        return self.runs + 2 * self.run_bytes

    @property
    def result_floats(self) -> int:
        """From an input's results to the next one's."""
        return self.rows + GAP_FLOATS

    @property
    def bytes(self) -> int:
        """Of a block's shared memory."""
        results = FIRST_STAGE + WORD_BYTES * self.result_floats * self.inputs
        return max(self.warps + self.warp_count * self.warp_bytes, results)

    def full(self, stage: int) -> int:
        """The barrier that passes when a stage's x' is there."""
        return BARRIER_BYTES * stage

    def empty(self, stage: int) -> int:
        """The one that passes when all warps have multiplied by it."""
        return BARRIER_BYTES * (STAGES + stage)

    def stage(self, stage: int) -> int:
        """Where a stage begins."""
        return FIRST_STAGE + stage * self.strip_bytes
