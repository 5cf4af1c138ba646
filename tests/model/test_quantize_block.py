"""One block beside its dense self, which gets other states."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from spqr_numba.config import SpqrConfig
from spqr_numba.model.activations import Activations, StopForward
from spqr_numba.model.blocks import InputGroup, find_blocks, plan
from spqr_numba.model.input_sums import InputSums
from spqr_numba.model.quantize_block import BlockQuantizer
from spqr_numba.model.report import Clock

from . import architectures

NEAREST = {"use_hessian": False, "outlier_threshold": None, "permutation": "identity"}


class Beside:
    """The first block of a tiny Llama, compressed on states that have drifted.

    block, original   as it is and as it was
    states, dense     what it got, and what it would have got in the dense model
    activations       behind the quantizer
    """

    def __init__(self, **settings: Any) -> None:
        config = SpqrConfig(damping=0.1, **settings)
        model = architectures.make("llama", torch.float32)
        blocks = find_blocks(model)
        random = torch.Generator().manual_seed(1)
        windows = torch.randint(0, 256, (9, 24), generator=random)
        dense = config.asymmetric
        self.activations = Activations.start(model, blocks.modules, windows, 2, dense=dense)
        states = self.activations.states
        self.dense = states.clone()
        states += 0.5 * states.std() * torch.randn(states.shape, generator=random)
        self.states = states.clone()
        self.block = blocks.modules[0]
        self.original = deepcopy(self.block)
        plans = {n: s for n, s in plan(blocks, config).items() if n.startswith(blocks.name(0))}
        quantizer = BlockQuantizer(self.block, blocks.name(0), 0, plans, Clock("cpu"))
        quantizer.quantize(self.activations, config.true_sequential)

    def output(self, block: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """What `block` makes of all of `states`."""
        twin = Activations(states.clone(), 2, self.activations.calls)
        twin.advance(block, 0)
        return twin.states


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "sequential"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"skip": ("down_proj",)},
        {"skip": (r"layers\.0\.",)},
        {"overrides": (("mlp", NEAREST),)},
        {"overrides": ((r"layers\.0\.", NEAREST),)},
    ],
    ids=["all", "not the last", "none", "the last to nearest", "to nearest"],
)
def test_dense_states_go_through_the_block_as_it_was(
    settings: dict[str, Any], sequential: bool
) -> None:
    beside = Beside(asymmetric=True, true_sequential=sequential, **settings)
    expected = beside.output(beside.original, beside.dense)
    assert beside.activations.dense is not None
    torch.testing.assert_close(beside.activations.dense, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(beside.activations.states, beside.states)


def test_the_compressed_weights_are_those_that_stay() -> None:
    """However often they have changed places with the dense ones."""
    beside = Beside(asymmetric=True, true_sequential=True)
    for name, linear in beside.block.named_modules():
        if isinstance(linear, nn.Linear):
            levels = linear.weight.unique().numel()
            assert levels < beside.original.get_submodule(name).weight.unique().numel() / 2, name


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "sequential"])
def test_the_output_comes_nearer_to_the_dense_one(sequential: bool) -> None:
    errors = []
    for asymmetric in (False, True):
        beside = Beside(asymmetric=asymmetric, true_sequential=sequential, bits=4)
        # not the sum that goes around the linears, which none of them can mend
        wanted = beside.output(beside.original, beside.dense) - beside.dense
        output = beside.output(beside.block, beside.states) - beside.states
        errors.append((output - wanted).square().mean().item())
    assert errors[1] < 0.95 * errors[0]


class Router(nn.Module):
    """Sends tokens above 0 to one expert and, after it, all of them to another."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.all = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.some(x[x[..., 0] > 0])
        return self.all(x.flatten(0, 1)).reshape(x.shape)


def test_tokens_are_weighed_where_it_is_known_which_they_are() -> None:
    router = Router()
    some, all_tokens = InputGroup(("some",), 1), InputGroup(("all",), 1)
    weights = torch.tensor([[3.0, 0.5]])
    linears = {some: router.some, all_tokens: router.all}
    sums = InputSums(router, linears, Clock("cpu"), lambda names: weights)
    x = torch.tensor([[[1.0, 2.0], [-1.0, 1.0]]])
    with sums.hooked(), pytest.raises(StopForward):
        router(x)
    assert sums.hessians[some].matrix.tolist() == [[2, 4], [4, 8]]
    expected = x[0].T @ (weights[0][:, None] * x[0])
    torch.testing.assert_close(sums.hessians[all_tokens].matrix, expected)


def test_tokens_that_cannot_be_told_apart_have_no_twins() -> None:
    router = Router()
    some, all_tokens = InputGroup(("some",), 1), InputGroup(("all",), 1)
    sums = InputSums(router, {some: router.some, all_tokens: router.all}, Clock("cpu"))
    x, dense = torch.tensor([[[[1.0, 2.0], [-1.0, 1.0]]], [[[-1.0, 0.0], [3.0, 0.0]]]])
    with sums.hooked():
        with sums.remembering(whole=True):
            router(dense)
        with pytest.raises(StopForward):
            router(x)
    assert sums.hessians[some].drift is None
    assert sums.hessians[some].matrix.tolist() == [[2, 4], [4, 8]]
    flat = (x.flatten(0, 1), dense.flatten(0, 1))
    expected = 2 / 2 * (flat[1] - flat[0]).T @ flat[0]
    assert torch.equal(sums.hessians[all_tokens].drift, expected)
