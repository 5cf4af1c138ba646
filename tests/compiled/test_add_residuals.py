"""What is added to a product, compiled: the product adds it, and the sum is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from .graphs import ALONE, COLUMNS, count, joined_graph, make_input, make_linear

ADD = torch.ops.aten.add.Tensor


class Residual(nn.Module):
    """x + linear(x), or another use of both."""

    def __init__(self, use: Callable[..., torch.Tensor], bias: bool = False) -> None:
        super().__init__()
        self.use, self.linear = use, make_linear(COLUMNS, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(x, self.linear(x))


def run(graph: fx.GraphModule, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return graph({**dict(module.named_parameters()), **dict(module.named_buffers())}, x)


@pytest.mark.parametrize(
    "use", [lambda x, y: x + y, lambda x, y: y + x, lambda x, y: (x + y).relu()]
)
@pytest.mark.parametrize("shape", [(1, 1), (1,), ()], ids=str)
def test_the_product_adds_it(
    use: Callable[..., torch.Tensor], shape: tuple[int, ...], launches: list[int]
) -> None:
    module, x = Residual(use), make_input(*shape)
    expected = module(x)
    graph = joined_graph(module, x)
    assert (count(graph, ALONE), count(graph, ADD)) == (1, 0)
    found = run(graph, module, x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("use", "shape", "bias"),
    [
        (lambda x, y: x + y, (1, 2), False),
        (lambda x, y: x + y, (1, 1), True),
        (lambda x, y: x + y + y, (1, 1), False),
        (lambda x, y: torch.add(x, y, alpha=2), (1, 1), False),
        (lambda x, y: y + 1, (1, 1), False),
        (lambda x, y: y + y, (1, 1), False),
        (lambda x, y: x.double() + y, (1, 1), False),
        (lambda x, y: x[..., :1] + y, (1, 1), False),
    ],
    ids=[
        *("two inputs", "a bias already", "used twice", "a factor", "a number", "added to itself"),
        *("another dtype", "another shape"),
    ],
)
def test_what_stays_a_sum(
    use: Callable[..., torch.Tensor], shape: tuple[int, ...], bias: bool, launches: list[int]
) -> None:
    module, x = Residual(use, bias), make_input(*shape)
    expected = module(x)
    graph = joined_graph(module, x)
    assert count(graph, ADD) >= 1
    torch.testing.assert_close(run(graph, module, x), expected)
