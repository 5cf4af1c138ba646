"""The kernels as operators of torch: what torch.compile, torch.export and autograd see of them.

    spqr_numba::matmul(Tensor x, Tensor[] buffers, str layout, Tensor? bias) -> Tensor
    spqr_numba::matmul_fused(Tensor x, Tensor[] buffers, str[] layouts, Tensor[] biases,
                             Tensor? beside, float? eps) -> Tensor
    spqr_numba::dequantize(Tensor[] buffers, str layout, ScalarType dtype) -> Tensor

A weight travels as its buffers and a string that says what they are, so that a traced graph holds
nothing but tensors and constants. The gradient goes to x (grad_y W_hat) and to the bias; the weight
has none. An operator costs 10 to 20 microseconds a call, which `needs_operator` helps to save.

Code compiled with such a string is of use for weights of the same settings only. Where one block's
code is to serve blocks of other settings (compiled/blocks.py), a weight travels as its number
instead, a tensor on the CPU, and the string says no more than its shape and its place in a whole.

`matmul_fused` is what passes (compiled/passes.py) make of a product, or of those of one x with all
parts of a whole (kernels/siblings.py), their outputs side by side; biases are one a part, or none.
With `beside`, x is given as it was before a norm or a gate (kernels/feed.py). It has no gradient,
as it comes into graphs that have theirs already.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import count, islice, zip_longest
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from .format.layout import MatrixSpec
from .format.matrix import SpqrMatrix
from .kernels.dequantize import dequantize
from .kernels.feed import Feed, matmul_fed
from .kernels.matmul import matmul
from .kernels.prepared import PreparedMatrix
from .kernels.siblings import whole_of

__all__ = ["Layout", "Weight", "describe", "needs_operator", "numbered", "parse", "remember"]

Weight = SpqrMatrix | PreparedMatrix
FORMS: Mapping[str, type[Weight]] = {cls.__name__: cls for cls in (SpqrMatrix, PreparedMatrix)}

# Kernels remember under a weight's object what they made of it, so the object has to be found again
# from the buffers. It lives as long as the layer that holds it.
_known: WeakValueDictionary[tuple[str | int, ...], Weight] = WeakValueDictionary()
_numbered: WeakValueDictionary[int, Weight] = WeakValueDictionary()
_numbers: WeakKeyDictionary[Weight, int] = WeakKeyDictionary()
_next_number = count()  # none comes twice: a number without its weight finds no other

NUMBERED = "number"  # the form of a weight that travels as its number


def needs_operator(x: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether a product has to go through the operator: it is traced, or has a gradient."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return True
    learns = x.requires_grad or (bias is not None and bias.requires_grad)
    return learns and torch.is_grad_enabled()


class Layout(NamedTuple):
    """What buffers are: their names, in order, and the form and spec of the weight that they make.

    Of a part, whole_rows has its whole, in which it begins at first_row; else both are 0. Of the
    form NUMBERED, the one buffer is the weight's number, and spec is None.
    """

    form: str
    out_features: int
    in_features: int
    names: tuple[str, ...]
    spec: MatrixSpec | None
    first_row: int
    whole_rows: int


def describe(weight: Weight) -> str:
    """The Layout of a weight as a string."""
    return _text(weight, type(weight).__name__, tuple(weight.tensors), weight.spec)


def numbered(weight: Weight) -> tuple[list[torch.Tensor], str]:
    """A number as a weight's only buffer, [1] int64, and its Layout; both for as long as it lives.

    Weights of one shape and one place in their wholes have equal Layouts. For products without
    gradients.
    """
    number = _numbers.setdefault(weight, next(_next_number))
    _numbered[number] = weight
    return [torch.tensor([number], device="cpu")], _text(weight, NUMBERED, (NUMBERED,), None)


def _text(weight: Weight, form: str, names: tuple[str, ...], spec: MatrixSpec | None) -> str:
    shape, place = (weight.spec.out_features, weight.spec.in_features), (0, 0)
    if isinstance(weight, PreparedMatrix) and weight.whole is not None:
        place = weight.first_row, weight.whole.spec.out_features
    fields = Layout(form, *shape, names, spec, *place)._asdict()
    return json.dumps(fields | {"spec": spec and asdict(spec)})


@cache
def parse(text: str) -> Layout:
    """The Layout that a string is of."""
    fields = json.loads(text)
    names, spec = tuple(fields.pop("names")), fields.pop("spec")
    return Layout(names=names, spec=spec and MatrixSpec(**spec), **fields)


def remember(weight: Weight) -> None:
    """Let the operators find this very object, for as long as it lives."""
    _known[_key(describe(weight), list(weight.tensors.values()))] = weight


def _weight(buffers: Sequence[torch.Tensor], layout: str) -> Weight:
    """The weight that these buffers are."""
    known = _known.get(_key(layout, buffers))
    if known is not None:
        return known
    what = parse(layout)
    if what.spec is None:
        return _numbered[int(buffers[0])]
    return FORMS[what.form](what.spec, dict(zip(what.names, buffers, strict=True)))


def _matrix(buffers: Sequence[torch.Tensor], layout: str) -> SpqrMatrix:
    weight = _weight(buffers, layout)
    return weight.canonical() if isinstance(weight, PreparedMatrix) else weight


def _key(layout: str, buffers: Sequence[torch.Tensor]) -> tuple[str | int, ...]:
    return (layout, *[buffer.data_ptr() for buffer in buffers])


# --- The operators

_library = torch.library.Library("spqr_numba", "DEF")
_library.define("matmul(Tensor x, Tensor[] buffers, str layout, Tensor? bias) -> Tensor")
_library.define(
    "matmul_fused(Tensor x, Tensor[] buffers, str[] layouts, Tensor[] biases, Tensor? beside,"
    " float? eps) -> Tensor"
)
_library.define("dequantize(Tensor[] buffers, str layout, ScalarType dtype) -> Tensor")


def _multiply(
    x: torch.Tensor, buffers: Sequence[torch.Tensor], layout: str, bias: torch.Tensor | None
) -> torch.Tensor:
    return matmul(x, _weight(buffers, layout), bias)


def _multiply_fake(
    x: torch.Tensor, buffers: Sequence[torch.Tensor], layout: str, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], parse(layout).out_features))


def _multiply_fused(
    x: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    layouts: Sequence[str],
    biases: Sequence[torch.Tensor],
    beside: torch.Tensor | None,
    eps: float | None,
) -> torch.Tensor:
    rest = iter(buffers)
    parts = [_weight(list(islice(rest, len(parse(text).names))), text) for text in layouts]
    whole = parts[0] if len(parts) == 1 else whole_of(parts)
    feed = None if beside is None else Feed(beside, eps)
    if whole is not None:
        bias = torch.cat(list(biases)) if len(biases) > 1 else next(iter(biases), None)
        return _multiply_fed(x, feed, whole, bias)
    products = [_multiply_fed(x, feed, part, bias) for part, bias in zip_longest(parts, biases)]
    return torch.cat(products, dim=-1)


def _multiply_fed(
    x: torch.Tensor, feed: Feed | None, weight: Weight, bias: torch.Tensor | None
) -> torch.Tensor:
    return matmul(x, weight, bias) if feed is None else matmul_fed(x, feed, weight, bias)


def _multiply_fused_fake(
    x: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    layouts: Sequence[str],
    biases: Sequence[torch.Tensor],
    beside: torch.Tensor | None,
    eps: float | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(parse(text).out_features for text in layouts)))


def _dequantize(buffers: Sequence[torch.Tensor], layout: str, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(_matrix(buffers, layout), dtype)


def _dequantize_fake(
    buffers: Sequence[torch.Tensor], layout: str, dtype: torch.dtype
) -> torch.Tensor:
    what = parse(layout)
    return buffers[0].new_empty((what.out_features, what.in_features), dtype=dtype)


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
    ("matmul_fused", _multiply_fused, _multiply_fused_fake),
    ("dequantize", _dequantize, _dequantize_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spqr_numba::{_name}", _fake, lib=_library)
torch.library.register_autograd("spqr_numba::matmul", _gradients, setup_context=_save, lib=_library)
