"""A pass over a graph that torch.compile has traced: what is added to one input's product goes in.

    y = matmul(x, part, no bias)        ->      z = matmul(x, part, residual as the bias)
    z = residual + y

A decode step has one input, so a residual has as many numbers as a bias, which a product adds to
its float32 sums before it rounds them: one kernel less, and one rounding. It runs where
join_products.py does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .join_products import call

__all__ = ["add_residuals"]

operators, aten = torch.ops.spqr_numba, torch.ops.aten


def add_residuals(graph: fx.Graph) -> None:
    """Change the graph."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        parts = product_and_residual(node)
        if parts is not None:
            put_into_product(graph, node, *parts)


def product_and_residual(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two summands of a sum that is the only one to use a product of one input."""
    for product, other in (node.args[:2], node.args[1::-1]):
        if node.kwargs or not (isinstance(product, fx.Node) and isinstance(other, fx.Node)):
            continue
        if product.target is operators.matmul.default and takes(product, other):
            return product, other
    return None


def takes(product: fx.Node, other: fx.Node) -> bool:
    """Whether a product can take another tensor for its bias."""
    y, given = product.meta["val"], other.meta["val"]
    one_input = y.numel() == y.shape[-1]
    alike = (y.shape, y.dtype, y.device) == (given.shape, given.dtype, given.device)
    alone = len(product.users) == 1 and product is not other
    return alone and one_input and alike and product.args[3] is None


def put_into_product(graph: fx.Graph, node: fx.Node, product: fx.Node, residual: fx.Node) -> None:
    """Let a product of its own give the sum, where the sum was."""
    x, buffers, text, _ = product.args
    arguments: Any = x, buffers, text
    with graph.inserting_before(node):
        bias = call(graph, aten.reshape.default, residual, [residual.meta["val"].numel()])
        total = call(graph, operators.matmul.default, *arguments, bias)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    graph.erase_node(product)
