"""A norm or a gate in front of products, compiled: the products make it, and it is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import silu

from spqr_numba.compiled import feed_products
from spqr_numba.compiled.passes import ProductPasses
from spqr_numba.kernels.feed import Feed, fed

from .graphs import ALONE, COLUMNS, JOINED, count, make_linear

MULTIPLY = torch.ops.aten.mul.Tensor
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_products, "FED_ON", ("cpu",))


def norm(x: torch.Tensor, beside: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    floats = x.to(torch.float32)
    made = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + EPS)
    return beside * made.to(dtype or x.dtype)


def gate(x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    return silu(x) * beside


def by_a_sigmoid(x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    floats = x.float()
    return (floats * torch.sigmoid(floats)).to(x.dtype) * beside


class Fed(nn.Module):
    """Products of what is made of x."""

    def __init__(self, make: Callable, use: Callable | None = None, bias: bool = False) -> None:
        super().__init__()
        self.make, self.use = make, use or (lambda made, one, other: (one(made), other(made)))
        self.one, self.other = make_linear(COLUMNS, 1, bias=bias), make_linear(32, 2)

    def forward(self, x: torch.Tensor, beside: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.use(self.make(x, beside), self.one, self.other)


def traced(module: nn.Module, *given: torch.Tensor) -> fx.GraphModule:
    """What inductor shows its passes, and what ours make of it."""
    from torch._inductor.decomposition import select_decomp_table

    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def forward(state: dict[str, torch.Tensor], *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.functional_call(module, state, given)

    with torch.no_grad():
        table = select_decomp_table()
        graph = make_fx(forward, table, tracing_mode="fake")(tensors, *given)
    ProductPasses()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def make_given(
    *shape: int, dtype: torch.dtype = torch.float16, beside: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, COLUMNS, generator=random).to(dtype)
    return x, torch.randn(COLUMNS, generator=random).to(beside or dtype).expand_as(x)[..., :]


def assert_same(graph: fx.GraphModule, module: nn.Module, *given: torch.Tensor) -> None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for found, expected in zip(graph(tensors, *given), module(*given), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize(
    ("make", "eps"),
    [
        (norm, EPS),
        (gate, None),
        (lambda x, beside: beside * silu(x), None),
        (by_a_sigmoid, None),
    ],
    ids=["norm", "gate", "the other way round", "by a sigmoid"],
)
def test_products_make_it(
    make: Callable, eps: float | None, shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    module, given = Fed(make, bias=bias), make_given(*shape, dtype=dtype)
    graph = traced(module.to(dtype), *given)
    assert (count(graph, ALONE), count(graph, JOINED), count(graph, MULTIPLY)) == (0, 2, 0)
    for node in graph.graph.find_nodes(op="call_function", target=JOINED):
        assert node.args[5] == eps
    assert_same(graph, module, *given)
    torch.testing.assert_close(make(*given), fed(given[0], Feed(given[1], eps)))


def test_with_a_residual() -> None:
    module = Fed(norm, lambda made, one, other: (one(made) + made.new_ones(made.shape),))
    given = make_given(1, 1)
    graph = traced(module, *given)
    assert (count(graph, ALONE), count(graph, JOINED)) == (0, 1)
    assert_same(graph, module, *given)


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (Fed(norm), make_given(1, 2)),
        (Fed(norm), make_given(1, 1, dtype=torch.float32)),
        (Fed(lambda x, beside: norm(x, beside).half()), make_given(1, beside=torch.float32)),
        (Fed(norm, lambda made, one, other: (one(made), made)), make_given(1)),
        (Fed(norm, lambda made, one, other: (one(made + 1),)), make_given(1)),
        (Fed(norm, lambda made, one, other: (one(made) + made,)), make_given(1)),
        (Fed(lambda x, beside: x * beside), make_given(1)),
        (Fed(lambda x, beside: silu(x.float()).half() + beside), make_given(1)),
        (Fed(lambda x, beside: norm(x, x.new_tensor(2.0))), make_given(1)),
    ],
    ids=[
        *("two inputs", "float32", "a weight in float32", "used elsewhere", "changed before"),
        *("the residual is what is made", "no norm", "a sum", "one number beside it"),
    ],
)
def test_what_stays_apart(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    graph = traced(module, *given)
    assert count(graph, JOINED) == 0
    assert count(graph, ALONE) >= 1
    assert_same(graph, module, *given)
