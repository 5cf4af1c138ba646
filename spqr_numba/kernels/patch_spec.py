"""How a tile's outliers lie for the lanes that hold its weights (patch_cuda.py).

patch   fp16   [halves, group_size / 8, 16 rows, 4 lanes t, 8]    of the groups t, then t + 4
"""

from __future__ import annotations

from dataclasses import dataclass

from .prepared import QUAD
from .runs import TILE_ROWS
from .unit_cuda import HALF_BYTES

__all__ = ["PatchSpec"]


@dataclass(frozen=True)
class PatchSpec:
    """Of whole octets' groups, or of a half of each, and with room for so many bytes of a run."""

    group_size: int
    halves: int
    run_bytes: int

    @property
    def columns(self) -> int:
        """That are decoded at once."""
        return self.halves * QUAD * self.group_size

    @property
    def bytes(self) -> int:
        """Of a patch."""
        return HALF_BYTES * TILE_ROWS * self.columns
