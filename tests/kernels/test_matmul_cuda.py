"""The product of a prepared weight on a GPU: its PTX, and what it gives, element by element.

PTX needs the package numba-cuda, and no GPU; emulator.py runs small cases with neither.
test_matmul.py has matrices that stay canonical.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.matmul import DENSE_FROM, ROUNDED_FROM, matmul, multiply_prepared
from spqr_numba.kernels.prepared import prepare

from ..gpu import assert_no_spills, each_capability, needs_numba_cuda, ptx_of
from ..problems import make_spec
from .emulator import emulated
from .test_matmul import assert_right, make_x

HALVES = [torch.float16, torch.bfloat16]
MOST_EXACT = 16  # inputs of fp16 or bf16; tensor cores multiply more by rounded weights
FOUR_BITS = {"bits": 4, "scale_bits": 4, "zero_bits": 4}
TWO_BITS = {"bits": 2, "scale_bits": 2, "zero_bits": 2}
GROUP_8 = {"group_size": 8, "stats_group_size": 64}
GROUP_32 = {"group_size": 32, "stats_group_size": 64}

# rows, columns, settings, outliers a row, permuted
CASES: dict[str, tuple[int, int, dict[str, int], Any, bool]] = {
    "paper": (64, 1024, {}, 10, True),
    "ragged": (37, 300, {}, 3, True),
    "no whole load": (37, 75, {}, 3, True),
    "one row": (1, 640, {}, 3, True),
    "one column": (20, 1, {}, 1, True),
    "no outliers": (40, 512, {}, None, True),
    "none found": (40, 512, {}, 0, True),
    "in order": (40, 520, {}, 2, False),
    "all outliers in one row": (40, 900, {}, [0] * 7 + [900] + [0] * 32, True),
    "4 bit": (50, 700, FOUR_BITS, 2, True),
    "2 bit": (50, 700, TWO_BITS, 2, True),
    "group 8, stats 64": (130, 700, GROUP_8, 2, True),
    "group 32, stats 64": (70, 1100, GROUP_32, 2, True),
    "long": (48, 28672, {}, 290, True),
    "many units": (20, 6500, GROUP_8, 2, True),
    "tall": (9000, 64, {}, 1, True),
}


def build(name: str) -> SpqrMatrix:
    rows, columns, settings, outliers, permuted = CASES[name]
    spec = make_spec(rows, columns, **settings)
    return random_matrix(spec, outliers, permuted=permuted)


def run(x: torch.Tensor, matrix: SpqrMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product on a GPU, over memory that last held NaN."""
    weight = prepare(matrix.to("cuda"))
    torch.full((len(x), matrix.spec.out_features), float("nan"), dtype=x.dtype, device="cuda")
    bias = None if bias is None else bias.cuda()
    return matmul(x.cuda(), weight, bias).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_matrix(name: str, dtype: torch.dtype) -> None:
    matrix = build(name)
    x = make_x(2, matrix.spec.in_features, dtype=dtype)
    assert_right(run(x, matrix), x, matrix)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    "batch", [0, 1, 7, 16, 17, 33, 48, 49, 64, 65, 128, 130, DENSE_FROM - 1, DENSE_FROM]
)
def test_batches(batch: int, dtype: torch.dtype) -> None:
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    bias = make_x(matrix.spec.out_features, dtype=dtype, seed=1)
    assert_right(run(x, matrix, bias), x, matrix, bias, weights_of(batch, dtype))


def weights_of(batch: int, dtype: torch.dtype, major: int | None = None) -> torch.dtype:
    """What a product with so many inputs may round W_hat to, on a GPU of a compute capability."""
    if major is None:
        major = torch.cuda.get_device_properties("cuda").major
    if dtype != torch.float32 and major == 9 and MOST_EXACT < batch < DENSE_FROM:
        return torch.float16
    return torch.float32 if batch < ROUNDED_FROM else dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1e3, 1e-3, 1e-7, 6e4])
@pytest.mark.parametrize("batch", [3, 70])
def test_spikes(batch: int, size: float, dtype: torch.dtype) -> None:
    """Some inputs far larger or smaller than others, down to subnormal ones."""
    matrix = build("paper")
    x = make_x(batch, matrix.spec.in_features).clamp(-1, 1)
    x[:, ::7] *= size
    x = x.to(dtype)
    assert_right(run(x, matrix), x, matrix, weights=weights_of(batch, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("batch", [2, 70])
def test_the_range_of_bfloat(batch: int, size: float) -> None:
    matrix = build("paper")
    x = (make_x(batch, matrix.spec.in_features) * size).bfloat16()
    assert_right(run(x, matrix), x, matrix, weights=weights_of(batch, x.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("batch", [3, 70])
def test_bad_inputs_stay_in_their_row(batch: int, bad: float, dtype: torch.dtype) -> None:
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    x[1, 5] = bad
    y = run(x, matrix)
    assert not torch.isfinite(y[1]).any()
    assert_right(y[[0, 2]], x[[0, 2]], matrix, weights=weights_of(batch, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 70])
def test_same_bits_twice_and_in_a_graph(batch: int) -> None:
    weight = prepare(build("paper").to("cuda"))
    x = make_x(batch, weight.spec.in_features, dtype=torch.float16).cuda()
    expected = matmul(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul(x, weight)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("name", "batch", "dtype", "arrival"),
    [
        ("ragged", 1, torch.bfloat16, "late"),
        ("no whole load", 1, torch.float16, "early"),
        ("one column", 1, torch.float16, "late"),
        ("no outliers", 1, torch.float16, "late"),
        ("in order", 1, torch.float16, "early"),
        ("all outliers in one row", 1, torch.float16, "late"),
        ("4 bit", 1, torch.bfloat16, "early"),
        ("2 bit", 1, torch.float16, "late"),
        ("many units", 1, torch.float16, "late"),
        ("many units", 1, torch.float16, "early"),
        ("group 32, stats 64", 1, torch.bfloat16, "late"),
        ("group 32, stats 64", 3, torch.float16, "early"),
        ("ragged", 3, torch.bfloat16, "late"),
        ("no whole load", 8, torch.float16, "early"),
        ("no whole load", 20, torch.float16, "late"),
        ("4 bit", 11, torch.bfloat16, "late"),
        ("2 bit", 2, torch.float16, "late"),
        ("all outliers in one row", 2, torch.float16, "late"),
        ("many units", 5, torch.float16, "late"),
        ("many units", 16, torch.float16, "early"),
    ],
    ids=str,
)
def test_emulated(name: str, batch: int, dtype: torch.dtype, arrival: str) -> None:
    matrix = build(name)
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    with emulated(arrival, major=9 if batch <= MOST_EXACT else 8):
        y = multiply_prepared(x, prepare(matrix), None)
    assert_right(y, x, matrix)


OLD, NEW = (8, 0), (9, 0)


@needs_numba_cuda
@pytest.mark.parametrize(
    ("bits", "group_size", "inputs", "dtype", "capability"),
    [
        (3, 16, 1, torch.float16, OLD),
        (3, 16, 1, torch.bfloat16, NEW),
        (2, 16, 1, torch.float16, OLD),
        (4, 16, 1, torch.bfloat16, NEW),
        (3, 8, 1, torch.float16, NEW),
        (3, 32, 1, torch.float16, NEW),
        (3, 16, 8, torch.bfloat16, OLD),
        (3, 16, 8, torch.float16, NEW),
        (2, 16, 8, torch.float16, NEW),
        (4, 16, 16, torch.float16, OLD),
        (3, 8, 16, torch.float16, NEW),
    ],
    ids=str,
)
def test_ptx(
    bits: int,
    group_size: int,
    inputs: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tmp_path: Path,
) -> None:
    """Tensor cores and copies of 16 bytes; no float64, nothing in local memory, no spills."""
    from spqr_numba.kernels.matmul_cuda import RINGS
    from spqr_numba.kernels.product_cuda import SIGNATURE, product_kernel
    from spqr_numba.kernels.stream_cuda import KernelSpec
    from spqr_numba.kernels.unit_cuda import UnitSpec

    unit = UnitSpec(bits, bits, group_size, inputs)
    spec = KernelSpec(unit, dtype, *RINGS[inputs][0], capability[0] >= 9)
    kernel = product_kernel.__wrapped__(spec)
    bounds = kernel.targetoptions["launch_bounds"]
    ptx = ptx_of(kernel, SIGNATURE, capability, launch_bounds=bounds)
    depth = 16 if inputs == 1 else group_size
    products = len(re.findall(rf"mma\.sync\.aligned\.m16n8k{depth}\S*f32\.f16\.f16\.f32", ptx))
    assert products == unit.columns // depth * max(1, inputs // 8)
    assert "cp.async.cg.shared.global" in ptx
    assert ("griddepcontrol.wait" in ptx) == (capability[0] >= 9)
    assert_no_spills(ptx, capability, tmp_path)


@needs_numba_cuda
@each_capability
def test_ptx_of_staging(capability: tuple[int, int], tmp_path: Path) -> None:
    """No float64, nothing in local memory, no spills."""
    from spqr_numba.kernels.staging_cuda import CORES, STAGING, cores_kernel, staging_kernel
    from spqr_numba.kernels.stream_cuda import KernelSpec
    from spqr_numba.kernels.unit_cuda import UnitSpec

    unit = UnitSpec(3, 3, 16, 8)
    spec = KernelSpec(unit, torch.bfloat16, 16, 1, capability[0] >= 9)
    for make, signature in ((staging_kernel, STAGING), (cores_kernel, CORES)):
        kernel = make.__wrapped__(spec)
        bounds = kernel.targetoptions["launch_bounds"]
        ptx = ptx_of(kernel, signature, capability, launch_bounds=bounds)
        assert_no_spills(ptx, capability, tmp_path)
