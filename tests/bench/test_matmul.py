"""The bench of the matrix product: what it measures is right, and its rows are whole."""

from __future__ import annotations

from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch

from spqr_numba.bench import matmul, matmul_cuda
from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.bench.rivals import RIVALS, spqr_quant_weight
from spqr_numba.errors import InputError, SpqrError
from tests.problems import make_spec


def test_rows(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A row a shape and batch, told as they come, with ratios that are those of the times."""
    caplog.set_level("INFO", "spqr_numba")
    monkeypatch.setattr(matmul, "ROUNDS", 1)
    monkeypatch.setattr(matmul, "COLD_BYTES", 1)
    monkeypatch.setattr(matmul, "READ_BYTES", 1 << 16)
    rows = matmul.measure(shapes=[(64, 96), (32, 64)], batches=[1, 3])
    assert [(row["m x n"], row["batch"]) for row in rows] == [
        ("64 x 96", 1), ("64 x 96", 3), ("32 x 64", 1), ("32 x 64", 3),
    ]  # fmt: skip
    assert all(row["spqr us"] > 0 and row["fp32 us"] > 0 and row["GB/s"] > 0 for row in rows)
    assert len(caplog.messages) == len(rows)
    assert caplog.messages[1] == f"64 x 96, batch 3: {rows[1]['spqr us']} us"


def test_a_wrong_product_is_not_timed() -> None:
    weight = torch.randn(8, 8)
    x = torch.randn(1, 8)
    matmul.check(x @ weight.T, x, weight)
    with pytest.raises(AssertionError, match="off by"):
        matmul.check(x @ weight.T + 1e-3, x, weight)


def test_turns_use_other_memory() -> None:
    matrices = matmul.cold(random_matrix(make_spec(32, 64)))
    assert len({matrix["codes"].data_ptr() for matrix in matrices}) == len(matrices) >= 3


def test_random_outliers() -> None:
    matrix = random_matrix(make_spec(4, 40), [0, 40, 1, 2])
    matrix.check_values()
    assert matrix["outlier_row_offsets"].tolist() == [0, 0, 40, 41, 43]
    assert random_matrix(make_spec(4, 40), None).outliers is None


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match="llama2-7b"):
        matmul.measure(shapes=["llama2-7b"])


@pytest.mark.parametrize("shape", [(16, 28672), (24, 512), (32, 500)], ids=str)
def test_the_reference_kernel_is_spared_what_it_would_read_beyond(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="takes multiples of 16"):
        RIVALS["spqr_quant"](*shape)


@pytest.mark.parametrize("shape", [(16, 16), (48, 512), (176, 4096)], ids=str)
def test_the_reference_kernel_gets_all_that_it_reads(shape: tuple[int, int]) -> None:
    rows, columns = shape
    *sizes, pairs, codes, offsets, outliers, count = spqr_quant_weight(*shape, "cpu")
    assert sizes == [rows, columns, 3, 16, 16]
    order = torch.stack([pairs & 0xFFFF, pairs >> 16])
    assert torch.equal(order.flatten().sort().values, torch.arange(columns, dtype=torch.int32))
    assert (codes.dtype, codes.shape) == (torch.int64, (rows * columns // 16,))
    assert (offsets.dtype, offsets.shape) == (torch.int32, (rows + 1,))
    assert offsets[0] == 0
    assert offsets[-1] == len(outliers) == count
    assert all(offsets.diff() == columns // 100)
    assert all(0 <= column < columns for column in outliers)


def test_a_rival_that_takes_the_gpu_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raised comes up again at every later call; what any other raises does not."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    matmul_cuda.leave_out("slow at 2 x 4", ImportError("No module named 'slow'"))
    fault = RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=fault))
    with pytest.raises(SpqrError, match=r"since wild at 2 x 4 \(RuntimeError: CUDA error.*ed\);"):
        matmul_cuda.leave_out("wild at 2 x 4", fault)


@pytest.mark.gpu
def test_rows_on_a_gpu() -> None:
    """Ours and at least torch's own."""
    [one, eight] = matmul.measure(shapes=[(256, 512)], batches=[1, 8], device="cuda")
    assert (one["batch"], eight["batch"]) == (1, 8)
    assert min(one["spqr us"], one["fp16 us"]) > 0
    assert 0 < one["share"] < 2
    assert set(one) == set(eight) >= {f"{name} us" for name in RIVALS}


@pytest.mark.gpu
def test_what_no_graph_holds_harms_no_other() -> None:
    """As a rival that waits for the device, and says nothing where it must not."""

    def waits(x: torch.Tensor) -> None:
        with suppress(RuntimeError):
            torch.cuda.synchronize()

    x = torch.randn(1, 64, device="cuda")
    with pytest.raises(RuntimeError):
        matmul_cuda.timed([waits], x)
    assert torch.randn(3, device="cuda").isfinite().all()
    assert min(matmul_cuda.timed([torch.relu], x)) > 0


@pytest.mark.gpu
def test_a_weight_is_made_before_it_is_multiplied_by() -> None:
    """As its offsets must be: a kernel that reads them sooner reads anywhere."""
    x = torch.ones(1, device="cuda")
    weight = x * torch.zeros_like(x)
    seen: list[torch.Tensor] = []
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)  # clocks: some 50 ms
    weight.fill_(1)
    matmul_cuda.timed([lambda x: seen.append(x * weight)], x)
    assert seen[0].item() == 1
