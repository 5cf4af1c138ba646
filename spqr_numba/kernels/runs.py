"""The sparse part of a prepared weight: outliers in the order in which a GPU takes them.

A *run* has the outliers of one tile (16 rows) in one *segment* (2048 columns, as they are stored)::

    words 0 ... 7   uint16 [16]  how many entries there are up to the end of each row
    words 8 ...     an entry     column in the segment | bits of the fp16 value << 16

Rows ascend, and so do the columns of a row; zeros fill the last 16 bytes. A run without an entry
has no words.

    buffer      dtype  shape                      instead of
    runs        int32  [words]                    outlier_columns, outlier_values
    run_starts  int32  [tiles * segments + 1]     outlier_row_offsets

run_starts counts 16 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from ..format.layout import MatrixSpec, ceil_div, index_dtype

__all__ = [
    "HALF_MASK",
    "HEADER_WORDS",
    "LOAD_WORDS",
    "SEGMENT_COLUMNS",
    "TILE_ROWS",
    "from_runs",
    "segments_of",
    "to_runs",
]

TILE_ROWS = 16
SEGMENT_COLUMNS = 2048
HEADER_WORDS = TILE_ROWS // 2
LOAD_WORDS = 4  # that a GPU copies at once
HALF_MASK = 0xFFFF


def segments_of(spec: MatrixSpec) -> int:
    """Runs of a tile."""
    return ceil_div(spec.in_features, SEGMENT_COLUMNS)


def to_runs(spec: MatrixSpec, csr: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The buffers of runs from those of the CSR."""
    offsets, columns = csr["outlier_row_offsets"], csr["outlier_columns"].to(torch.int64)
    rows = torch.arange(spec.out_features, device=offsets.device)
    rows = rows.repeat_interleave(offsets.diff().to(torch.int64))
    run = rows // TILE_ROWS * segments_of(spec) + columns // SEGMENT_COLUMNS
    run, order = run.sort(stable=True)
    ends = row_ends(spec, run, rows[order])
    counts = ends[:, -1]
    starts = run_starts(counts)
    runs = torch.zeros(int(starts[-1]), dtype=torch.int32, device=offsets.device)
    first = counts.cumsum(0) - counts
    places = starts[run] + HEADER_WORDS + torch.arange(len(run), device=run.device) - first[run]
    values = csr["outlier_values"][order].view(torch.int16).to(torch.int32) << 16
    runs[places] = values | (columns[order] % SEGMENT_COLUMNS).to(torch.int32)
    filled = counts > 0
    runs[header_places(starts[:-1][filled])] = ends[filled].to(torch.int16).view(torch.int32)
    return {"runs": runs, "run_starts": (starts // LOAD_WORDS).to(torch.int32)}


def from_runs(spec: MatrixSpec, buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `to_runs`."""
    runs, starts = buffers["runs"], buffers["run_starts"].to(torch.int64) * LOAD_WORDS
    filled = (starts.diff() > 0).nonzero()[:, 0]
    ends = runs.new_zeros(len(starts) - 1, TILE_ROWS, dtype=torch.int64)
    header = runs[header_places(starts[filled])].view(torch.int16)
    ends[filled] = header.to(torch.int64) & HALF_MASK
    counts = pad(ends, (1, 0)).diff(dim=1)  # of each row of each run
    run = torch.arange(len(counts), device=runs.device).repeat_interleave(ends[:, -1])
    in_tile = torch.arange(TILE_ROWS, device=runs.device).repeat(len(counts))
    rows = in_tile.repeat_interleave(counts.flatten()) + run // segments_of(spec) * TILE_ROWS
    first = ends[:, -1].cumsum(0) - ends[:, -1]
    places = starts[run] + HEADER_WORDS + torch.arange(len(run), device=run.device) - first[run]
    entries = runs[places]
    columns = (entries & HALF_MASK) + (run % segments_of(spec) * SEGMENT_COLUMNS)
    rows, order = rows.sort(stable=True)
    offsets = torch.bincount(rows, minlength=spec.out_features).cumsum(0)
    values = (entries[order] >> 16).to(torch.int16).view(torch.float16)
    return {
        "outlier_row_offsets": pad(offsets, (1, 0)).to(torch.int32),
        "outlier_columns": columns[order].to(index_dtype(spec.in_features)),
        "outlier_values": values,
    }


def row_ends(spec: MatrixSpec, run: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """int64 [runs, 16]: entries up to the end of each row of a run."""
    count = ceil_div(spec.out_features, TILE_ROWS) * segments_of(spec)
    cells = torch.bincount(run * TILE_ROWS + rows % TILE_ROWS, minlength=count * TILE_ROWS)
    return cells.view(count, TILE_ROWS).cumsum(1)


def run_starts(counts: torch.Tensor) -> torch.Tensor:
    """int64 [runs + 1]: the first word of each run."""
    entries = (counts + LOAD_WORDS - 1) // LOAD_WORDS * LOAD_WORDS
    words = torch.where(counts > 0, HEADER_WORDS + entries, 0)
    return pad(words.cumsum(0), (1, 0))


def header_places(starts: torch.Tensor) -> torch.Tensor:
    """Where the words of headers are: [runs, 8]."""
    return starts[:, None] + torch.arange(HEADER_WORDS, device=starts.device)
