"""The product of a prepared weight with many inputs: its PTX, and what it gives.

PTX needs the package numba-cuda, and no GPU; emulator.py runs small cases with neither.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from spqr_numba.kernels.many_spec import SHARED_BYTES, ManySpec
from spqr_numba.kernels.matmul import aligned_rows
from spqr_numba.kernels.prepared import prepare, units_of
from spqr_numba.kernels.unit_cuda import UnitSpec

from ..gpu import HOPPER, NEW, assert_no_spills, needs_numba_cuda, ptx_of
from .emulator import emulated
from .test_matmul import assert_right, make_x
from .test_matmul_cuda import CASES, build, run, weights_of


@pytest.mark.parametrize(
    ("name", "batch", "inputs", "splits", "dtype", "arrival"),
    [
        ("no outliers", 2, 32, 1, torch.bfloat16, "early"),
        ("all outliers in one row", 33, 32, 2, torch.float16, "late"),
        ("4 bit", 5, 32, 1, torch.float16, "late"),
        ("group 8, stats 64", 7, 32, 2, torch.bfloat16, "late"),
        ("2 bit", 3, 256, 1, torch.float16, "early"),
        ("group 32, stats 64", 5, 32, 1, torch.float16, "late"),
        ("3 bit, statistics of 4", 5, 32, 1, torch.float16, "late"),
        ("4 bit, group 8", 3, 32, 1, torch.float16, "early"),
        ("group 32, stats 64", 3, 64, 2, torch.float16, "early"),
    ],
    ids=str,
)
def test_emulated(
    name: str, batch: int, inputs: int, splits: int, dtype: torch.dtype, arrival: str
) -> None:
    matrix = build(name)
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    bias = make_x(matrix.spec.out_features, dtype=dtype, seed=1)
    y = torch.full((batch, matrix.spec.out_features), float("nan"), dtype=dtype)
    with emulated(arrival, "matmul_many_cuda") as room:
        room.division_of = lambda spec, count, device: (inputs, splits)
        room.STAGING_WARPS = 1  # of as many blocks as there are inputs
        room.multiply_many(aligned_rows(x), prepare(matrix), bias, y)
    assert_right(y, x, matrix, bias, torch.float16)


@needs_numba_cuda
@pytest.mark.parametrize(
    ("bits", "group_size", "outliers", "inputs"),
    [
        (3, 16, True, 128),
        (3, 16, True, 256),
        (2, 16, False, 64),
        (3, 16, False, 128),
        (2, 16, True, 128),
        (2, 16, True, 256),
        (4, 16, True, 128),
        (4, 16, True, 256),
        (3, 8, True, 32),
        (3, 8, True, 128),
        (3, 8, True, 256),
        (3, 32, True, 32),
        (3, 32, True, 64),
    ],
)
def test_ptx(bits: int, group_size: int, outliers: bool, inputs: int, tmp_path: Path) -> None:
    """Products of warpgroups and copies of 16 bytes and more; no float64, nothing in local memory,
    no spills, and no product that waits for the one before it."""
    from spqr_numba.kernels.many_cuda import SIGNATURE, many_kernel

    spec = ManySpec(UnitSpec(bits, bits, group_size), outliers, inputs, torch.float16)
    kernel = many_kernel.__wrapped__(spec)
    ptx = ptx_of(kernel, SIGNATURE, HOPPER)
    products = re.findall(rf"wgmma\.mma_async\.sync\.aligned\.m64n{inputs}k16\.f32\.f16\.f16", ptx)
    assert products
    assert len(products) % (2 * group_size) == 0
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.bulk.shared::cluster.global" in ptx
    assert_no_spills(ptx, HOPPER, tmp_path)


@needs_numba_cuda
def test_ptx_of_shares(tmp_path: Path) -> None:
    """No float64, nothing in local memory, no spills."""
    from spqr_numba.kernels.many_results_cuda import SHARES, shares_kernel

    kernel = shares_kernel.__wrapped__(torch.bfloat16)
    assert_no_spills(ptx_of(kernel, SHARES, NEW), NEW, tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [8, 16])
@pytest.mark.parametrize("inputs", [32, 64, 128, 256])
def test_a_block_fits(bits: int, group_size: int, inputs: int) -> None:
    """And so do its results, in the place of all else, and the outliers of a usual run."""
    spec = ManySpec(UnitSpec(bits, bits, group_size), True, inputs, torch.float16)
    assert 128 + 4 * inputs * spec.result_floats <= spec.bytes <= SHARED_BYTES
    assert spec.run_bytes >= 1024


@pytest.mark.gpu
@pytest.mark.parametrize("division", [None, (128, 1), (128, 2), (256, 1), (32, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_matrix(
    name: str, division: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divided as is best, or otherwise, and so little that a block walks many units."""
    from spqr_numba.kernels import matmul_many_cuda

    matrix = build(name)
    if division is not None:
        fit = matmul_many_cuda.inputs_that_fit(UnitSpec.of(matrix.spec))
        few = min(division[0], fit[-1]), min(division[1], units_of(matrix.spec))
        monkeypatch.setattr(matmul_many_cuda, "division_of", lambda *given: few)
    matmul_many_cuda.make_call.cache_clear()
    x = make_x(70, matrix.spec.in_features, dtype=torch.float16)
    assert_right(run(x, matrix), x, matrix, weights=weights_of(70, x.dtype))
    matmul_many_cuda.make_call.cache_clear()
