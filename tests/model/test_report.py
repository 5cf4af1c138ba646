from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.config import SpqrConfig
from spqr_numba.errors import CheckpointError
from spqr_numba.format.layout import MatrixSpec
from spqr_numba.model.report import (
    Clock,
    CompressionReport,
    LayerRow,
    TunedRow,
    formula_bits,
    read_rows,
    rows_to_csv,
)


def row(layer: str = "a.b", rows: int = 4, bits: float = 3.0, rounded: bool = False) -> LayerRow:
    return LayerRow(
        layer, rows, 8, 3, 16, 3, 4, 0.2, 0.1, 1e-9, 1 / 3, float("inf"), 1.0, 2.5, 0.5, bits, 3.5,
        rounded, 0.25,
    )  # fmt: skip


def test_rows_survive_the_csv_exactly() -> None:
    rows = [row(), row("c,d", rounded=True)]
    rows.append(replace(row(), group_size=None, outlier_threshold=None))
    assert read_rows(rows_to_csv(rows), LayerRow) == rows
    tuned = [TunedRow("a", 1 / 3, 0.1, 20, 0.5), TunedRow("b", 0.25, 0.25, 0, 1.0)]
    assert read_rows(rows_to_csv(tuned), TunedRow) == tuned
    assert read_rows("", LayerRow) == []
    for damaged in ("layer,rows\na,1\n", "layer,color\na,blue\n", rows_to_csv(rows)[:-30]):
        with pytest.raises(CheckpointError, match="log of the layers is not what this version"):
            read_rows(damaged, LayerRow)
    assert rows_to_csv([]) == ""


def test_a_row_knows_what_it_was_given() -> None:
    chosen = replace(row(bits=3.5), code_bits=4, group_size=8, outlier_threshold=None)
    config = SpqrConfig(damping=0.1)
    expected = replace(config, bits=4, group_size=8, zero_bits=4, outlier_threshold=None)
    assert chosen.settings(config) == expected
    assert chosen.nbytes == 14


def test_averages_are_weighed_by_size() -> None:
    report = CompressionReport(Path("x"), [row(rows=1, bits=2.0), row(rows=3, bits=6.0)], {}, 10)
    assert report.bits == 5.0
    assert report.to_dict()["bits"] == 5.0
    assert report.to_dict()["layers"][0]["layer"] == "a.b"


def test_a_phase_inside_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 2.0, 7.0, 8.0])  # made, outer, inner, out of inner, out of outer
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock("outer"), clock("inner"):
        pass
    assert (clock.seconds["outer"], clock.seconds["inner"]) == (3, 5)


@pytest.mark.parametrize(
    "config",
    [
        SpqrConfig(),
        SpqrConfig(bits=4, group_size=32, stats_group_size=64, scale_bits=2, zero_bits=4),
        SpqrConfig(scale_bits=16, zero_bits=16, outlier_threshold=None),
        SpqrConfig.rtn(8),
        SpqrConfig(group_size=128, permutation="identity"),
    ],
)
def test_the_formula_is_what_the_buffers_take(config: SpqrConfig) -> None:
    spec = MatrixSpec.from_config(config, 256, 512)
    outliers = None if config.outlier_threshold is None else 3
    matrix = random_matrix(spec, outliers, permuted=config.permutation != "identity")
    by_formula = formula_bits(config, spec, matrix.outlier_share)
    assert by_formula == pytest.approx(matrix.bits_per_weight, rel=1e-9)
    simple = config.formula_bits(matrix.outlier_share)
    assert by_formula == pytest.approx(simple, abs=0.2)


def test_ragged_groups_are_counted() -> None:
    config = SpqrConfig(outlier_threshold=None, permutation="identity")
    spec = MatrixSpec.from_config(config, 17, 20)
    expected = (3 * 17 * 20 + 6 * 17 * 2 + 64 * 2 * 2) / (17 * 20)
    assert formula_bits(config, spec, 0.0) == pytest.approx(expected)
