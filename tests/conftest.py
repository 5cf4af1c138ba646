"""What every test may use: the devices, and who waits for one."""

from __future__ import annotations

import os

import numba
import pytest
import torch


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
