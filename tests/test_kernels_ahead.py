"""Which products' kernels are looked for before a model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spqr_numba.kernels.feed import GATE, NORM
from spqr_numba.kernels.prepared import PreparedMatrix
from spqr_numba.kernels_ahead import compile_joined_kernels, compile_kernels
from spqr_numba.nn import join_siblings

from .test_nn import make_layer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The products whose kernels are looked for: rows, dtype, count and feed."""
    found: list[Any] = []

    def note(weight: PreparedMatrix, *product: Any) -> list[Any]:
        found.append((weight.spec.out_features, *product))
        return []

    monkeypatch.setattr("spqr_numba.kernels_ahead._asked", set())
    monkeypatch.setattr("spqr_numba.kernels_ahead.launchers_of", note)
    return found


@pytest.mark.usefixtures("prepared")
def test_kernels_are_asked_for_once(asked: list[Any]) -> None:
    """For all weights that differ, and all numbers of inputs."""
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), make_layer(), make_layer(seed=1))
    compile_kernels(model, 7, 1)
    assert asked == [(48, torch.bfloat16, 7, None), (48, torch.bfloat16, 1, None)]
    model.append(make_layer(bits=2))
    compile_kernels(model, 1)
    assert asked[2:] == [(48, torch.bfloat16, 1, None)]


@pytest.mark.usefixtures("prepared")
def test_kernels_of_compiled_blocks(asked: list[Any]) -> None:
    model = nn.ModuleList(
        [nn.LayerNorm(2), make_layer(), make_layer(bias=False), make_layer(bits=2)]
    )
    join_siblings(model)
    compile_joined_kernels(model, 1)
    assert asked == [(96, torch.float32, 1, NORM), (48, torch.float32, 1, GATE)]
    compile_joined_kernels(model, 3)
    assert asked[2:] == [(96, torch.float32, 3, None), (48, torch.float32, 3, None)]


def test_there_is_nothing_to_compile(asked: list[Any]) -> None:
    for model in (make_layer(), nn.Linear(2, 2), object()):
        compile_kernels(model, 1)
        compile_joined_kernels(model, 1)
    assert not asked


@pytest.mark.gpu
def test_kernels_of_autocast(asked: list[Any]) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        compile_kernels(make_layer().to("cuda"), 7)
    assert asked == [(48, torch.bfloat16, 7, None)]
