"""Graphs of modules with compressed linears, as torch.compile traces them, and what our passes make
of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.compiled.passes import ProductPasses
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.nn import SpqrLinear, join_siblings

from ..problems import make_spec

COLUMNS = 40
ORDER, OTHER_ORDER = (torch.arange(COLUMNS).roll(places).to(torch.uint16) for places in (7, 3))
JOINED, ALONE = torch.ops.spqr_numba.matmul_fused.default, torch.ops.spqr_numba.matmul.default


def make_linear(
    rows: int, seed: int, order: torch.Tensor = ORDER, bias: bool = False
) -> SpqrLinear:
    matrix = random_matrix(make_spec(rows, COLUMNS), seed, seed=seed)
    tensors = {**matrix.tensors, "permutation": order.clone()}
    return SpqrLinear(SpqrMatrix(matrix.spec, tensors), torch.arange(rows) / 8 if bias else None)


def make_input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(0))


def joined_graph(module: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """What the pass makes of a module whose siblings are joined."""
    join_siblings(module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def forward(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, state, x)

    with torch.no_grad():
        graph = make_fx(forward, tracing_mode="fake")(tensors, x)
    ProductPasses()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def count(graph: fx.GraphModule, target: Callable) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=target))
