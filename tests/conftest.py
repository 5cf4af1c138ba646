"""What every test may use: the devices, and random problems that look like a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .problems import Problem, make_problem


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each backend in turn."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """make_problem(rows, columns, seed=0, ...): a weight and the Hessian of its inputs."""
    return make_problem
