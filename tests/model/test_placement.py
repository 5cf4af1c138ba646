"""What a GPU's memory has room for, and what is said about the ways that settings take."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import pytest
import torch

from spqr_numba.config import SpqrConfig
from spqr_numba.model.blocks import find_blocks, plan
from spqr_numba.model.placement import log_paths, states_crowd

from . import architectures

GB = 10**9


@pytest.mark.parametrize(
    ("free", "crowd"), [(80, False), (32, False), (31, True), (24, True)], ids=str
)
def test_a_70b_shape(free: int, crowd: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Six times H and W of [8192, 28672], 1.7 GB of weights and 4.3 GB of states: 31.4 GB."""
    caplog.set_level(logging.INFO, "spqr_numba")
    largest = 28672 * (28672 + 8192)
    states = 128 * 2048 * 8192 * 2
    assert states_crowd(states, largest, block=17 * GB // 10, free=free * GB) == crowd
    where = "in main memory" if crowd else "on the GPU"
    assert f"hidden states (4.3 GB) stay {where}" in caplog.text


@pytest.mark.skipif(find_spec("numba_cuda") is None, reason="needs the package numba-cuda")
def test_each_way_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spqr_numba")
    model = architectures.make("llama").to(torch.bfloat16)
    blocks = find_blocks(model)
    config = SpqrConfig(overrides=(("down_proj", {"stats_group_size": 128, "group_size": 128}),))
    log_paths(model, plan(blocks, config), torch.device("cuda"))
    first, second = (record.getMessage() for record in caplog.records)
    assert "Hessian by tensor cores, 32 rows x 128 columns at once, groups fitted there" in first
    assert "down_proj and alike: Hessian by tensor cores, 128 rows x 64 columns at once" in second
    assert "groups of 128 fitted in global memory (the general path)" in second
