"""The bit layout of one compressed weight: the diagram, the sizes, and nothing else.

A weight W [m = out_features, n = in_features] is cut into groups of `group_size` consecutive
columns (in permuted order) and stats blocks of `stats_group_size` consecutive rows::

                group 0            group 1          ...
            +----------------+----------------+----
    row 0   | codes, 1 scale | codes, 1 scale |         one scale and one zero a row and group,
    row 1   |        1 zero  |        1 zero  |         themselves codes of scale_bits, zero_bits
      ...   |                |                |
            +- - - - - - - - +- - - - - - - - +- -      one stats block: 4 fp16 numbers a group
      ...   |                |                |         (scale_scale, scale_zero,
            +----------------+----------------+----      zero_scale, zero_zero)

Codes are packed 32 at a time. The 32 codes q_0 ... q_31 of `bits` bits each form one integer,
sum_k q_k * 2^(k * bits), of exactly `bits` little-endian words of 32 bits::

    bits = 3   word 0                                    word 1           word 2
               31 30|29 28 27| ... |5 4 3|2 1 0      |...|1|0   ...    |31 30 29| ...
               q_10 |  q_9   |     | q_1 | q_0        q_11 |q_10 (top)  |  q_31  |

Weight codes take 32 consecutive columns of a row, and rows are the fastest axis, so that kernels
read consecutive rows from consecutive words. Scale and zero codes take 32 consecutive rows of a
group, and the words of a group follow each other: 8 rows are the next scale_bits bytes. A last,
ragged run of 32 is padded with zeros.

    buffer               dtype   shape                            when
    codes                int32   [ceil(n/32), bits, m]            always
    scale_codes          int32   [groups, ceil(m/32), scale_bits] scale_bits < 16
    scale_scale          fp16    [groups, stats_groups]           scale_bits < 16
    scale_zero           fp16    [groups, stats_groups]           scale_bits < 16
    scales               fp16    [groups, m]                      scale_bits = 16
    zero_codes, zero_scale, zero_zero, zeros                      the same for zero_bits
    outlier_row_offsets  int32   [m + 1]                          with outliers
    outlier_columns      uint16  [outliers] (int32 if n > 65536)  with outliers; permuted columns
    outlier_values       fp16    [outliers]                       with outliers
    permutation          uint16  [n] (int32 if n > 65536)         unless identity

Decoding, to the last rounding (kernels/scalars.py is the one implementation)::

    scale  = fp16(fp32(scale_code * scale_scale + scale_zero))   fused: no rounding of the product
    zero   = fp16(fp32(zero_code * zero_scale + zero_zero))
    dense  = fp32(scale * fp32(code - zero))
    weight = fp32(dense + outlier)                               column j of this order is input
                                                                 permutation[j] of the layer

So scale_zero is the scale that code 0 stands for, an offset in the scale's own unit (the reference
implementation subtracts a zero in code units instead, which fp16 holds less well). Of the pair
(scale_scale, scale_zero) the encoder drops the smaller where it is below 2^-12 (scale_scale) or
2^-8 (scale_zero) of the other: then the inner sum is exact in fp32, the outer rounding is the only
one, and a half-precision fma decodes the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..config import SpqrConfig
from ..errors import FormatError

__all__ = [
    "CODES_PER_CHUNK",
    "FORMAT_VERSION",
    "UNQUANTIZED_BITS",
    "MatrixSpec",
    "index_dtype",
]

FORMAT_VERSION = 1
CODES_PER_CHUNK = 32
UNQUANTIZED_BITS = 16
MAX_UINT16_INDICES = 65536

Shape = tuple[int, ...]


def index_dtype(in_features: int) -> torch.dtype:
    """The dtype that stores a column index of a weight with `in_features` columns."""
    return torch.uint16 if in_features <= MAX_UINT16_INDICES else torch.int32


def ceil_div(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)


@dataclass(frozen=True)
class MatrixSpec:
    """The shape and settings of one compressed weight; sizes follow from them.

    group_size is the number of columns of a group, in_features for whole-row groups. Raises
    FormatError where a number is out of range.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    stats_group_size: int
    scale_bits: int
    zero_bits: int

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features", "group_size"):
            if getattr(self, name) < 1:
                raise FormatError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.stats_group_size not in (8, 16, 32, 64, 128):
            raise FormatError(
                f"stats_group_size is {self.stats_group_size}; it must be 8, 16, 32, 64 or 128"
            )
        if not 2 <= self.bits <= 8:
            raise FormatError(f"bits is {self.bits}; it must be 2 to 8")
        for name in ("scale_bits", "zero_bits"):
            if getattr(self, name) not in (2, 3, 4, UNQUANTIZED_BITS):
                raise FormatError(f"{name} is {getattr(self, name)}; it must be 2, 3, 4 or 16")
        if self.group_size % 8 and self.group_size != self.in_features:
            raise FormatError(
                f"group_size is {self.group_size}; it must be a multiple of 8 or in_features"
                f" ({self.in_features})"
            )

    @classmethod
    def from_config(cls, config: SpqrConfig, out_features: int, in_features: int) -> MatrixSpec:
        """The spec of a weight [out_features, in_features] compressed with `config`."""
        return cls(
            out_features=out_features,
            in_features=in_features,
            bits=config.bits,
            group_size=config.group_size or in_features,
            stats_group_size=config.stats_group_size,
            scale_bits=config.scale_bits,
            zero_bits=config.zero_bits,
        )

    @property
    def groups(self) -> int:
        """Groups of columns in a row; the last may be ragged."""
        return ceil_div(self.in_features, self.group_size)

    @property
    def stats_groups(self) -> int:
        """Stats blocks of rows; the last may be ragged."""
        return ceil_div(self.out_features, self.stats_group_size)

    @property
    def chunks(self) -> int:
        """Runs of 32 columns in a row; the last may be ragged."""
        return ceil_div(self.in_features, CODES_PER_CHUNK)

    def buffers(self, outliers: int | None, permuted: bool) -> dict[str, tuple[Shape, torch.dtype]]:
        """Name -> (shape, dtype) of every buffer; `outliers` is their count, None for none kept."""
        buffers: dict[str, tuple[Shape, torch.dtype]] = {
            "codes": ((self.chunks, self.bits, self.out_features), torch.int32)
        }
        buffers |= self._statistic_buffers("scale", self.scale_bits)
        buffers |= self._statistic_buffers("zero", self.zero_bits)
        if outliers is not None:
            buffers["outlier_row_offsets"] = ((self.out_features + 1,), torch.int32)
            buffers["outlier_columns"] = ((outliers,), index_dtype(self.in_features))
            buffers["outlier_values"] = ((outliers,), torch.float16)
        if permuted:
            buffers["permutation"] = ((self.in_features,), index_dtype(self.in_features))
        return buffers

    def nbytes(self, outliers: int | None, permuted: bool) -> int:
        """Bytes of all `buffers`."""
        sizes = self.buffers(outliers, permuted).values()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)

    def _statistic_buffers(self, name: str, bits: int) -> dict[str, tuple[Shape, torch.dtype]]:
        if bits == UNQUANTIZED_BITS:
            return {f"{name}s": ((self.groups, self.out_features), torch.float16)}
        row_chunks = ceil_div(self.out_features, CODES_PER_CHUNK)
        second_level = ((self.groups, self.stats_groups), torch.float16)
        return {
            f"{name}_codes": ((self.groups, row_chunks, bits), torch.int32),
            f"{name}_scale": second_level,
            f"{name}_zero": second_level,
        }
