"""A prepared weight back to numbers on a GPU: its PTX, and its bits, emulated and on a GPU.

PTX needs the package numba-cuda, and no GPU; emulator.py needs neither.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.dequantize import dequantize_reference, stored_order
from spqr_numba.kernels.prepared import prepare

from ..gpu import assert_no_spills, each_capability, needs_numba_cuda, ptx_of
from ..problems import make_spec
from .emulator import emulated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES: dict[str, tuple[int, int, dict[str, int]]] = {
    "3 bit": (20, 300, {}),
    "4 bit": (17, 70, {"bits": 4, "scale_bits": 4, "zero_bits": 4}),
    "2 bit": (5, 40, {"bits": 2, "scale_bits": 2, "zero_bits": 2}),
    "group 8, stats 64": (70, 90, {"group_size": 8, "stats_group_size": 64}),
    "group 32, stats 64": (20, 1100, {"group_size": 32, "stats_group_size": 64}),
}


def build(name: str) -> SpqrMatrix:
    rows, columns, settings = CASES[name]
    return random_matrix(make_spec(rows, columns, **settings), 3)


def expected(matrix: SpqrMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The reference's weight, columns as they are stored, rounded once."""
    stored = dequantize_reference(matrix)[:, stored_order(matrix).numpy()]
    return torch.from_numpy(stored.copy()).to(dtype)


@pytest.mark.parametrize("arrival", ["early", "late"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("3 bit", torch.float32),
        ("3 bit", torch.float16),
        ("4 bit", torch.bfloat16),
        ("2 bit", torch.float16),
        ("group 8, stats 64", torch.float16),
        ("group 8, stats 64", torch.float32),
        ("group 32, stats 64", torch.bfloat16),
        ("group 32, stats 64", torch.float32),
    ],
    ids=str,
)
def test_emulated(name: str, dtype: torch.dtype, arrival: str) -> None:
    matrix = build(name)
    with emulated(arrival, "prepared_cuda") as prepared_cuda:
        decoded = prepared_cuda.dequantize_stored(prepare(matrix), dtype)
    assert torch.equal(decoded, expected(matrix, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    from spqr_numba.kernels.prepared_cuda import dequantize_stored

    matrix = build(name)
    decoded = dequantize_stored(prepare(matrix.to("cuda")), dtype).cpu()
    assert torch.equal(decoded, expected(matrix, dtype))


@pytest.mark.parametrize(
    ("columns", "dtype", "places"),
    [
        (1104, torch.float16, 0),
        (1104, torch.bfloat16, 0),
        (64, torch.float16, 0),
        (1104, torch.float32, 0),
        (1100, torch.float16, 0),
        (1104, torch.float16, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_inputs_in_stored_order(device: str, columns: int, dtype: torch.dtype, places: int) -> None:
    """By the kernel, or where they are wider, ragged or begin elsewhere, without it."""
    from importlib import import_module

    matrix = random_matrix(make_spec(20, columns), 3)
    x = torch.randn(3, 2, columns + places).to(dtype).flatten()[places:][: 6 * columns]
    x = x.view(3, 2, columns)
    expected = x[..., stored_order(matrix)]
    if device == "cuda":
        room = import_module("spqr_numba.kernels.prepared_cuda")
        ordered = room.stored_inputs(x.cuda(), prepare(matrix.to("cuda"))).cpu()
    else:
        with emulated("late", "prepared_cuda") as room:
            ordered = room.stored_inputs(x, prepare(matrix))
    assert torch.equal(ordered, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_fits_into_every_gpu(group_size: int, bits: int, dtype: torch.dtype) -> None:
    """Those of compute capability 8.6 and 8.9 give a block 99 KB, of which the driver keeps one."""
    from spqr_numba.kernels.unit_cuda import UnitSpec

    with emulated("early", "prepared_cuda") as room:
        assert room.shared_bytes(UnitSpec(bits, bits, group_size), dtype) <= 97 * 1024


def test_a_run_without_room_emulated() -> None:
    """More outliers than are copied beside a unit, and none at all."""
    for outliers in (200, None):
        matrix = random_matrix(make_spec(20, 300), outliers)
        with emulated("late", "prepared_cuda") as prepared_cuda:
            assert outliers is None or 16 * outliers * 4 > prepared_cuda.RUN_BYTES
            decoded = prepared_cuda.dequantize_stored(prepare(matrix), torch.float16)
        assert torch.equal(decoded, expected(matrix, torch.float16))


@needs_numba_cuda
@each_capability
@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ptx(
    dtype: torch.dtype, group_size: int, capability: tuple[int, int], tmp_path: Path
) -> None:
    """16 bytes at a time; no float64, nothing in local memory, no spills."""
    from spqr_numba.kernels.prepared_cuda import SIGNATURE, dequantize_kernel
    from spqr_numba.kernels.unit_cuda import UnitSpec

    kernel = dequantize_kernel.__wrapped__(UnitSpec(3, 3, group_size), dtype, True)
    ptx = ptx_of(kernel, SIGNATURE, capability)
    assert "st.global.v4.b32" in ptx
    assert_no_spills(ptx, capability, tmp_path)


@needs_numba_cuda
@each_capability
def test_ptx_of_order(capability: tuple[int, int], tmp_path: Path) -> None:
    """16 bytes at a time; no float64, nothing in local memory, no spills."""
    from spqr_numba.kernels.staging_cuda import ORDERED, order_kernel
    from spqr_numba.kernels.stream_cuda import KernelSpec
    from spqr_numba.kernels.unit_cuda import UnitSpec

    kernel = order_kernel.__wrapped__(KernelSpec(UnitSpec(3, 3, 16), torch.float16, 16, 1, False))
    ptx = ptx_of(kernel, ORDERED, capability)
    assert "st.global.v4" in ptx
    assert_no_spills(ptx, capability, tmp_path)
