"""Linears that share an input, compiled: one product, and the same numbers as theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

from spqr_numba.bench.random_model import random_model
from spqr_numba.compiled.passes import ProductPasses
from spqr_numba.config import SpqrConfig
from spqr_numba.generate import generate
from spqr_numba.nn import join_siblings

from ..tiny import byte_tokenizer, tiny_llama
from .graphs import (
    ALONE,
    COLUMNS,
    JOINED,
    OTHER_ORDER,
    count,
    joined_graph,
    make_input,
    make_linear,
)

pytestmark = pytest.mark.usefixtures("launches")


class Block(nn.Module):
    """Three siblings, and one linear with the same input but an order of its own."""

    def __init__(self, bias: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(COLUMNS)
        self.q, self.k, self.v = (
            make_linear(rows, seed, bias=has)
            for rows, seed, has in zip((32, 16, 48), (1, 2, 3), bias, strict=True)
        )
        self.other = make_linear(16, 4, OTHER_ORDER)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.norm(x)
        q = self.q(x).view(*x.shape[:-1], -1, 16)
        v = self.v(x).flatten()  # called before its elder sibling
        return q.relu(), self.k(x) * 2, v, self.other(x)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_siblings_become_one_product(
    bias: bool, shape: tuple[int, ...], launches: list[int]
) -> None:
    block, x = Block((bias, bias, bias)), make_input(*shape)
    expected = block(x)
    graph = joined_graph(block, x)
    assert (count(graph, JOINED), count(graph, ALONE)) == (1, 1)
    launches.clear()
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    found = graph(state, x)
    assert launches == [96, 16]
    torch.testing.assert_close(found, expected)
    launches.clear()
    torch.testing.assert_close(graph({n: t.clone() for n, t in state.items()}, x), expected)
    assert launches == [32, 16, 48, 16]  # of buffers that are no longer neighbours


def test_linears_alone_go_on_as_they_were(launches: list[int]) -> None:
    block, x = Block(), make_input(2)
    expected = block(x)
    join_siblings(block)
    launches.clear()
    assert all(map(torch.equal, block(x), expected))
    assert launches == [32, 48, 16, 16]


class OtherInputs(Block):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x + 1)


class OneMissing(Block):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x)


class OneTwice(Block):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x), self.q(x)


@pytest.mark.parametrize(
    ("make", "products"),
    [(OtherInputs, 3), (OneMissing, 2), (OneTwice, 4), (lambda: Block((True, False, True)), 4)],
    ids=["other inputs", "one missing", "one twice", "not all with a bias"],
)
def test_what_stays_apart(make: Callable[[], nn.Module], products: int) -> None:
    graph = joined_graph(make(), make_input(2))
    assert (count(graph, JOINED), count(graph, ALONE)) == (0, products)


def test_ragged_rows_are_no_siblings() -> None:
    block = Block()
    block.k = make_linear(24, 2)
    join_siblings(block)
    assert block.q._weight().whole is block.v._weight().whole is not None
    assert block.k._weight().whole is None


def test_the_operator_is_sound() -> None:
    block = Block((True, True, True))
    join_siblings(block)
    layers = block.q, block.k, block.v
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    layouts, biases = [layer.layout for layer in layers], [layer.bias for layer in layers]
    for chosen in (biases, []):
        for beside, eps in ((None, None), (torch.ones(COLUMNS), 1e-6), (torch.ones(COLUMNS), None)):
            given = make_input(2), buffers, layouts, chosen, beside, eps
            torch.library.opcheck(JOINED, given)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_inductor_compiles_it(shape: tuple[int, ...], launches: list[int]) -> None:
    block, x = Block(), make_input(*shape)
    join_siblings(block)
    passes = inductor_config.patch(post_grad_custom_pre_pass=ProductPasses())
    with torch.inference_mode(), passes:
        expected = block(x)
        compiled = torch.compile(block, fullgraph=True)
        launches.clear()
        found = compiled(x)
    assert sorted(launches) == [16, 96]
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_decode_step_has_four_products_a_block(
    device: torch.device, launches: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Of 64 rows (q, k, v), 32, 96 (gate, up) and 32; a second text joins nothing again."""
    shape = tiny_llama(num_hidden_layers=3).config
    settings = SpqrConfig(), SpqrConfig(bits=4), SpqrConfig(bits=2, group_size=32)
    model, *others = (random_model(shape, config, device, torch.float32) for config in settings)
    for index, other in enumerate(others, 1):
        model.model.layers[index] = other.model.layers[index]
    expected = generate(model, byte_tokenizer(), "hello", max_new_tokens=16, graph=False).tokens
    for _ in range(2):
        launches.clear()
        found = generate(model, byte_tokenizer(), "hello", max_new_tokens=16, compile=True)
        assert found.tokens == expected
        assert (launches.count(16), launches.count(48)) == (3 * 2, 3 * 2)  # of the prefill
        steps = launches.count(64) // 3
        assert steps == 15 if device.type == "cpu" else steps <= 3
        assert launches.count(96) == 3 * steps
    assert not [r for r in caplog.records if r.name.startswith("spqr_numba")]
