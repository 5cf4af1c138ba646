"""A pass over a graph that torch.compile has traced: norms and gates go into products of one input.

    n = norm(x) * weight                y = matmul_fused(x, part, beside: weight, eps)
    y = matmul(n, part)         ->
    h = silu(g) * u                     z = matmul_fused(g, part, beside: u)
    z = matmul(h, part)

kernels/feed.py says what that is. Only what goes into nothing but products does, on a GPU, in fp16
or bf16. It runs behind the passes that join products and add residuals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, Ignored, KeywordArg, Match

from ..kernels.feed import HALVES
from .join_products import call

__all__ = ["feed_products"]

FED_ON: tuple[str, ...] = ("cuda",)  # kinds of device

operators, aten = torch.ops.spqr_numba, torch.ops.aten
PRODUCTS = operators.matmul.default, operators.matmul_fused.default
CONVERT = torch.ops.prims.convert_element_type.default

# What models' norms and torch's silu are in a graph, but for what multiplies them.
FLOATS = CallFunction(CONVERT, KeywordArg("x"), torch.float32, _users=MULTIPLE)
MEAN = CallFunction(aten.mean.dim, CallFunction(aten.pow.Tensor_Scalar, FLOATS, 2), [-1], True)
ROOT = CallFunction(aten.rsqrt.default, CallFunction(aten.add.Tensor, MEAN, KeywordArg("eps")))
NEGATIVE = CallFunction(aten.neg.default, FLOATS)
ONE_MORE = CallFunction(aten.add.Tensor, CallFunction(aten.exp.default, NEGATIVE), 1)
SIGMOID = CallFunction(aten.sigmoid.default, FLOATS)
SHAPES = tuple(
    CallFunction(CONVERT, made, Ignored())  # the dtype: `are_alike` asks for it
    for made in (
        CallFunction(aten.mul.Tensor, FLOATS, ROOT),
        CallFunction(aten.div.Tensor, FLOATS, ONE_MORE),
        CallFunction(aten.mul.Tensor, FLOATS, SIGMOID),
    )
)


class Fed(NamedTuple):
    """A node that is a norm or a gate, and of what."""

    x: fx.Node
    beside: fx.Node
    eps: float | None


def feed_products(graph: fx.Graph) -> None:
    """Change the graph."""
    for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        found = fed_of(node)
        if found is not None and node.users and all(takes(user, node) for user in node.users):
            for product in list(node.users):
                put_into_product(graph, product, found)
            erase_unused(graph, node)


def fed_of(node: fx.Node) -> Fed | None:
    """What a product of two nodes is made of, where it is a norm or a gate."""
    for made, beside in (node.args, node.args[::-1]):
        if not (isinstance(made, fx.Node) and isinstance(beside, fx.Node)):
            continue
        for shape in SHAPES:
            match = shape.match(made)
            if isinstance(match, Match):
                found = Fed(match.kwargs["x"], beside, match.kwargs.get("eps"))
                return found if are_alike(found, node) else None
    return None


def are_alike(found: Fed, node: fx.Node) -> bool:
    """Whether all is of one dtype that a GPU's product takes, and one input long."""
    result, x, beside = (part.meta["val"] for part in (node, found.x, found.beside))
    alike = result.dtype == x.dtype == beside.dtype and x.dtype in HALVES
    one_input = result.numel() == x.numel() == beside.numel() == result.shape[-1]
    return alike and one_input and result.shape == x.shape and x.device.type in FED_ON


def takes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node is a product whose input this is."""
    return user.target in PRODUCTS and user.args[0] is node


def put_into_product(graph: fx.Graph, product: fx.Node, found: Fed) -> None:
    """Let a product take what its input is made of."""
    given: Any = product.args[1:4]
    if product.target is operators.matmul.default:
        buffers, text, bias = given
        given = buffers, [text], [] if bias is None else [bias]
    with graph.inserting_before(product):
        arguments: Any = *given, found.beside, found.eps
        y = call(graph, operators.matmul_fused.default, found.x, *arguments)
    product.replace_all_uses_with(y)
    graph.erase_node(product)


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Take a node out that nothing uses, and so what only it has used."""
    if node.users or node.op != "call_function":
        return
    before = node.all_input_nodes
    graph.erase_node(node)
    for other in before:
        erase_unused(graph, other)
