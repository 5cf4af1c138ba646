"""The kernels that a model is about to launch, compiled before it does (kernels/compiling.py)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from .kernels.compiling import compile_together
from .kernels.feed import GATE, NORM
from .kernels.matmul import launchers_of
from .kernels.prepared import PreparedMatrix
from .nn import SpqrLinear

__all__ = ["compile_joined_kernels", "compile_kernels"]

Product = tuple[PreparedMatrix, int, str | None]
"""A weight, and how many inputs it multiplies, or one that a feed of a kind makes."""
_asked: set[Hashable] = set()  # of products, what decides on their kernels


def compile_kernels(model: Any, *counts: int) -> None:
    """Have the kernels compiled, several at a time, that the model's products with so many inputs
    need; those that this machine has not compiled before."""
    weights = prepared_weights(model)
    compile_products(model, [(weight, count, None) for weight in weights for count in counts])


def compile_joined_kernels(model: Any, count: int) -> None:
    """The same for compiled blocks: joined weights multiply as one, and one input comes mostly from
    a norm there, or from a gate elsewhere, which the product does (kernels/feed.py)."""
    products: list[Product] = []
    for weight in prepared_weights(model):
        feed = NORM if weight.whole else GATE
        products.append((weight.whole or weight, count, feed if count == 1 else None))
    compile_products(model, products)


def compile_products(model: Any, products: list[Product]) -> None:
    """Those of a model that nobody has asked for before."""
    if not products:
        return
    launchers, dtype = [], dtype_of(model)
    for weight, count, feed in products:
        key = weight.spec, tuple(weight.tensors), weight.device, dtype, count, feed
        if key not in _asked:
            _asked.add(key)
            launchers += launchers_of(weight, dtype, count, feed)
    compile_together(launchers)


def prepared_weights(model: Any) -> list[PreparedMatrix]:
    """Of its layers; a model that is no module has none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    weights = [layer._weight() for layer in modules if isinstance(layer, SpqrLinear)]
    return [weight for weight in weights if isinstance(weight, PreparedMatrix)]


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which it computes."""
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    dtypes = (parameter.dtype for parameter in model.parameters())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
