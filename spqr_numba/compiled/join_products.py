"""A pass over a graph that torch.compile has traced: one product for linears that share an input.

    q = matmul(x, part 1)               y = matmul_fused(x, parts 1, 2 and 3)
    k = matmul(x, part 2)      ->       q, k, v = slices of y
    v = matmul(x, part 3)

Inductor runs it where it runs passes of others: the graph is functional then, so that nothing
changes x between the products, and gradients are in the graph. Layouts say what is joined: where
one x meets all parts of a whole (kernels/siblings.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ..operators import Layout, parse

__all__ = ["call", "join_all_products"]

operators, aten = torch.ops.spqr_numba, torch.ops.aten


class Product(NamedTuple):
    """A node that multiplies x by one weight, and what it is given."""

    node: fx.Node
    x: fx.Node
    buffers: Sequence[fx.Node]
    text: str
    bias: fx.Node | None

    @property
    def part(self) -> Layout:
        """What the weight is, and of which whole."""
        return parse(self.text)

    @property
    def family(self) -> Hashable:
        """Equal for what may become one product; None for what cannot."""
        given = self.buffers if self.bias is None else (*self.buffers, self.bias)
        if not self.part.whole_rows or any(node.op != "placeholder" for node in given):
            return None
        return self.x, self.bias is None, self.part.whole_rows


def join_all_products(graph: fx.Graph) -> None:
    """Change the graph."""
    families: dict[Hashable, list[Product]] = {}
    for node in graph.find_nodes(op="call_function", target=operators.matmul.default):
        args: Any = node.args
        product = Product(node, *args)
        families.setdefault(product.family, []).append(product)
    families.pop(None, None)
    for products in families.values():
        first = products[0].node
        products.sort(key=lambda product: product.part.first_row)
        if are_all_parts([product.part for product in products]):
            join_products(graph, products, first)


def are_all_parts(parts: Sequence[Layout]) -> bool:
    """Whether these are a whole, one behind the other."""
    row = 0
    for part in parts:
        if part.first_row != row:
            return False
        row += part.out_features
    return row == parts[0].whole_rows


def join_products(graph: fx.Graph, products: Sequence[Product], first: fx.Node) -> None:
    """Put one product into the place of some, of which `first` comes first."""
    x = products[0].x
    buffers = [buffer for product in products for buffer in product.buffers]
    texts = [product.text for product in products]
    biases = [product.bias for product in products if product.bias is not None]
    with graph.inserting_before(first):
        y = call(graph, operators.matmul_fused.default, x, buffers, texts, biases, None, None)
        slices = [slice_of(graph, y, product.part) for product in products]
    for product, own in zip(products, slices, strict=True):
        product.node.replace_all_uses_with(own)
        graph.erase_node(product.node)


def slice_of(graph: fx.Graph, y: fx.Node, part: Layout) -> fx.Node:
    """A part's outputs, contiguous, as what reads them may expect."""
    last_row = part.first_row + part.out_features
    own = call(graph, aten.slice.Tensor, y, -1, part.first_row, last_row)
    if own.meta["val"].is_contiguous():
        return own
    return call(graph, aten.clone.default, own, memory_format=torch.contiguous_format)


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node, which knows what its value is like, as all nodes do."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*fx.map_arg(args, lambda given: given.meta["val"]), **kwargs)
    return node
