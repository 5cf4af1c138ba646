"""MatrixSpec and SpqrMatrix: the buffers they ask for, the bytes they count, damage they see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.config import SpqrConfig
from spqr_numba.errors import FormatError
from spqr_numba.format.layout import MatrixSpec, index_dtype
from spqr_numba.format.matrix import BUFFER_NAMES, SpqrMatrix

from ..problems import make_spec

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_features": 0}, "out_features is 0; it must be at least 1"),
        ({"in_features": -1}, "in_features is -1"),
        ({"group_size": 0}, "group_size is 0"),
        ({"stats_group_size": 0}, "stats_group_size is 0"),
        ({"bits": 1}, "bits is 1; it must be 2 to 8"),
        ({"bits": 9}, "bits is 9"),
        ({"scale_bits": 5}, "scale_bits is 5; it must be 2, 3, 4 or 16"),
        ({"zero_bits": 0}, "zero_bits is 0"),
        ({"group_size": 20}, r"group_size is 20; it must be a multiple of 8 or in_features (40)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_spec_refuses(settings: dict[str, int], message: str) -> None:
    good = {
        "out_features": 8,
        "in_features": 40,
        "bits": 3,
        "group_size": 16,
        "stats_group_size": 16,
        "scale_bits": 3,
        "zero_bits": 3,
    }
    with pytest.raises(FormatError) as caught:
        MatrixSpec(**(good | settings))
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_spec_of_a_config() -> None:
    spec = MatrixSpec.from_config(SpqrConfig(bits=4, group_size=8, stats_group_size=64), 100, 50)
    assert spec == make_spec(100, 50, bits=4, group_size=8, stats_group_size=64)
    assert (spec.groups, spec.stats_groups, spec.chunks) == (7, 2, 2)

    whole_row = MatrixSpec.from_config(SpqrConfig(group_size=None), 100, 50)
    assert (whole_row.group_size, whole_row.groups) == (50, 1)


def test_buffers_of_a_ragged_weight() -> None:
    """The table of layout.py, written out for m = 100, n = 50, 3 bits, 16 / 16, zeros in fp16."""
    spec = make_spec(100, 50, zero_bits=16)
    assert spec.nbytes(None, permuted=False) == random_matrix(spec, None, permuted=False).nbytes
    kept = random_matrix(spec, permuted=True)
    assert spec.nbytes(kept.outliers, permuted=True) == kept.nbytes
    assert spec.buffers(outliers=5, permuted=True) == {
        "codes": ((2, 3, 100), torch.int32),
        "scale_codes": ((4, 4, 3), torch.int32),
        "scale_scale": ((4, 7), torch.float16),
        "scale_zero": ((4, 7), torch.float16),
        "zeros": ((4, 100), torch.float16),
        "outlier_row_offsets": ((101,), torch.int32),
        "outlier_columns": ((5,), torch.uint16),
        "outlier_values": ((5,), torch.float16),
        "permutation": ((50,), torch.uint16),
    }
    assert set(spec.buffers(outliers=None, permuted=False)) == {
        "codes",
        "scale_codes",
        "scale_scale",
        "scale_zero",
        "zeros",
    }


def test_every_buffer_has_a_known_name() -> None:
    names = set(make_spec(4, 4).buffers(1, True))
    names |= set(make_spec(4, 4, scale_bits=16, zero_bits=16).buffers(1, True))
    assert names == set(BUFFER_NAMES)


def test_wide_weights_have_wide_indices() -> None:
    assert index_dtype(65536) == torch.uint16
    assert index_dtype(65537) == torch.int32


def test_sizes() -> None:
    # codes 2 * 3 * 4, statistics codes 2 * (1 * 3 * 3) words; second level 4 * 3 * 1 halves;
    # offsets 5 words, outliers 8 * (2 + 2) bytes; permutation 40 halves
    matrix = random_matrix(make_spec(4, 40), outliers=2)
    assert matrix.nbytes == 4 * (24 + 18) + 2 * 12 + 4 * 5 + 8 * 4 + 2 * 40
    assert matrix.bits_per_weight == 8 * matrix.nbytes / 160
    assert matrix.outliers == 8
    assert matrix.outlier_share == 8 / 160


def test_no_outliers_and_none_found_differ() -> None:
    off = random_matrix(make_spec(4, 40), outliers=None)
    none_found = random_matrix(make_spec(4, 40), outliers=0)
    assert off.outliers is None
    assert none_found.outliers == 0
    assert off.outlier_share == none_found.outlier_share == 0
    none_found.check_values()


def test_moving_keeps_the_buffers(device: torch.device) -> None:
    matrix = random_matrix(make_spec(4, 40))
    moved = matrix.to(device)
    assert moved.device.type == device.type
    for name, tensor in matrix.tensors.items():
        assert torch.equal(moved[name].cpu(), tensor)


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("codes"), "missing: ['codes']"),
        (drop("zero_zero"), "missing: ['zero_zero']"),
        (drop("outlier_columns"), "missing: ['outlier_columns']"),
        (drop("outlier_values"), "unknown: ['outlier_columns', 'outlier_row_offsets']"),
        (lambda t: t.__setitem__("codez", t["codes"]), "unknown: ['codez']"),
        (lambda t: t.__setitem__("scales", t["scale_scale"]), "unknown: ['scales']"),
        (put("codes", lambda t: t[:, :2].contiguous()), "codes is torch.int32 [2, 2, 4]; it must"),
        (put("codes", lambda t: t.long()), "codes is torch.int64 [2, 3, 4]"),
        (put("scale_scale", lambda t: t.float()), "scale_scale is torch.float32 [3, 1]"),
        (put("scale_zero", lambda t: t.bfloat16()), "scale_zero is torch.bfloat16"),
        (put("outlier_row_offsets", lambda t: t[:-1]), "outlier_row_offsets is torch.int32 [4]"),
        (put("outlier_columns", lambda t: t.int()), "outlier_columns is torch.int32 [8]"),
        (put("permutation", lambda t: t.int()), "permutation is torch.int32 [40]"),
        (put("codes", lambda t: t.mT.contiguous().mT), "codes must be contiguous"),
        (put("permutation", lambda t: t.to("meta")), "permutation is on meta, codes are on cpu"),
    ],
    ids=range(15),
)
def test_wrong_buffers(damage: Callable[[Tensors], None], message: str) -> None:
    tensors = dict(random_matrix(make_spec(4, 40)).tensors)
    damage(tensors)
    with pytest.raises(FormatError) as caught:
        SpqrMatrix(make_spec(4, 40), tensors)
    assert message in str(caught.value)


def set_item(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("outlier_row_offsets", set_item(0, 1)), "must rise from 0 to the number of outliers"),
        (put("outlier_row_offsets", set_item(-1, 7)), "outlier_row_offsets must rise"),
        (put("outlier_row_offsets", set_item(-1, 9)), "outlier_row_offsets must rise"),
        (put("outlier_row_offsets", set_item(2, 99)), "outlier_row_offsets must rise"),
        (put("outlier_row_offsets", set_item(2, -1)), "outlier_row_offsets must rise"),
        (put("outlier_columns", set_item(3, 40)), "outlier_columns must lie in 0 ... 39; found"),
        (put("permutation", set_item(0, 40)), "permutation must hold each of 0 ... 39 once"),
        (put("permutation", torch.zeros_like), "permutation must hold each"),
        (put("scale_scale", set_item(0, float("nan"))), "scale_scale holds NaN or inf"),
        (put("zero_zero", set_item(0, float("inf"))), "zero_zero holds NaN or inf"),
        (put("outlier_values", set_item(0, float("-inf"))), "outlier_values holds NaN or inf"),
    ],
    ids=range(11),
)
def test_damaged_contents(damage: Callable[[Tensors], None], message: str) -> None:
    tensors = dict(random_matrix(make_spec(4, 40)).tensors)
    SpqrMatrix(make_spec(4, 40), tensors).check_values()
    damage(tensors)
    with pytest.raises(FormatError) as caught:
        SpqrMatrix(make_spec(4, 40), tensors).check_values()
    assert message in str(caught.value)
