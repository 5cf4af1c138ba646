"""The kernels as operators of torch: what torch.compile, torch.export and autograd see of them.

    spqr_numba::matmul(Tensor x, Tensor[] buffers, str layout, Tensor? bias) -> Tensor
    spqr_numba::dequantize(Tensor[] buffers, str layout, ScalarType dtype) -> Tensor

A weight travels as its buffers and a string that says what they are, so that a traced graph holds
nothing but tensors and constants. The gradient goes to x (grad_y W_hat) and to the bias; the weight
has none. An operator costs 10 to 20 microseconds a call, which `needs_operator` helps to save.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch

from .format.layout import MatrixSpec
from .format.matrix import SpqrMatrix
from .kernels.dequantize import dequantize
from .kernels.matmul import matmul
from .kernels.prepared import PreparedMatrix

__all__ = ["Weight", "describe", "needs_operator", "remember"]

Weight = SpqrMatrix | PreparedMatrix
FORMS: Mapping[str, type[Weight]] = {cls.__name__: cls for cls in (SpqrMatrix, PreparedMatrix)}

# Kernels remember under a weight's object what they made of it, so the object has to be found again
# from the buffers. It lives as long as the layer that holds it.
_known: WeakValueDictionary[tuple[str | int, ...], Weight] = WeakValueDictionary()


def needs_operator(x: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether a product has to go through the operator: it is traced, or has a gradient."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return True
    learns = x.requires_grad or (bias is not None and bias.requires_grad)
    return learns and torch.is_grad_enabled()


def describe(weight: Weight) -> str:
    """The layout of a weight: its form, its spec and the names of its buffers, in order."""
    form, names = type(weight).__name__, list(weight.tensors)
    return json.dumps({"form": form, **asdict(weight.spec), "buffers": names})


def remember(weight: Weight) -> None:
    """Let the operators find this very object, for as long as it lives."""
    _known[_key(describe(weight), list(weight.tensors.values()))] = weight


def _weight(buffers: Sequence[torch.Tensor], layout: str) -> Weight:
    """The weight that these buffers are."""
    known = _known.get(_key(layout, buffers))
    if known is not None:
        return known
    form, spec, names = _parsed(layout)
    return FORMS[form](spec, dict(zip(names, buffers, strict=True)))


def _matrix(buffers: Sequence[torch.Tensor], layout: str) -> SpqrMatrix:
    weight = _weight(buffers, layout)
    return weight.canonical() if isinstance(weight, PreparedMatrix) else weight


def _key(layout: str, buffers: Sequence[torch.Tensor]) -> tuple[str | int, ...]:
    return (layout, *[buffer.data_ptr() for buffer in buffers])


@cache
def _parsed(layout: str) -> tuple[str, MatrixSpec, tuple[str, ...]]:
    fields = json.loads(layout)
    form, names = fields.pop("form"), tuple(fields.pop("buffers"))
    return form, MatrixSpec(**fields), names


# --- The operators

_library = torch.library.Library("spqr_numba", "DEF")
_library.define("matmul(Tensor x, Tensor[] buffers, str layout, Tensor? bias) -> Tensor")
_library.define("dequantize(Tensor[] buffers, str layout, ScalarType dtype) -> Tensor")


def _multiply(
    x: torch.Tensor, buffers: Sequence[torch.Tensor], layout: str, bias: torch.Tensor | None
) -> torch.Tensor:
    return matmul(x, _weight(buffers, layout), bias)


def _multiply_fake(
    x: torch.Tensor, buffers: Sequence[torch.Tensor], layout: str, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _parsed(layout)[1].out_features))


def _dequantize(buffers: Sequence[torch.Tensor], layout: str, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(_matrix(buffers, layout), dtype)


def _dequantize_fake(
    buffers: Sequence[torch.Tensor], layout: str, dtype: torch.dtype
) -> torch.Tensor:
    spec = _parsed(layout)[1]
    return buffers[0].new_empty((spec.out_features, spec.in_features), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, buffers, ctx.layout, _ = inputs
    ctx.save_for_backward(*buffers)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """grad [..., m] of y -> of x [..., n] and of the bias [m]."""
    of_x = of_bias = None
    buffers = list(ctx.saved_tensors)
    if ctx.needs_input_grad[0]:
        of_x = grad @ torch.ops.spqr_numba.dequantize(buffers, ctx.layout, grad.dtype)
    if ctx.needs_input_grad[3]:
        of_bias = grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad
    return of_x, [None] * len(buffers), None, of_bias


for _name, _kernel, _fake in (
    ("matmul", _multiply, _multiply_fake),
    ("dequantize", _dequantize, _dequantize_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spqr_numba::{_name}", _fake, lib=_library)
torch.library.register_autograd("spqr_numba::matmul", _gradients, setup_context=_save, lib=_library)
