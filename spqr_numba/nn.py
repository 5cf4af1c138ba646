"""SpqrLinear: y = x W_hat^T + b with W_hat compressed, in the place of an nn.Linear."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Self

import torch
from torch import nn

from .errors import InputError
from .format.layout import MatrixSpec
from .format.matrix import SpqrMatrix
from .kernels.dequantize import dequantize
from .kernels.matmul import matmul
from .kernels.prepared import PreparedMatrix, can_prepare, prepare
from .kernels.siblings import join, kinship
from .operators import Weight, describe, needs_operator, numbered, remember

__all__ = ["ByNumber", "SpqrLinear", "join_siblings"]

TensorMeta = tuple[tuple[int, ...], torch.dtype]
PREPARED_ON: tuple[str, ...] = ("cuda",)  # kinds of device whose product reads a PreparedMatrix


class SpqrLinear(nn.Module):
    """A linear layer whose weight [out_features, in_features] is an SpqrMatrix.

    The matrix's tensors are buffers of the same names (`<module>.codes`, ...), so that they are
    saved, loaded and moved like any others; a cast to another dtype leaves them as they are, since
    what was calibrated is what is stored. On a GPU, where the kernels know a faster order, the
    buffers are those of a PreparedMatrix instead, and `state_dict` still gives the matrix's. bias
    [out_features] is a parameter, or None.
    """

    number: tuple[list[torch.Tensor], str] | None = None  # while ByNumber has it set

    def __init__(self, matrix: SpqrMatrix, bias: torch.Tensor | None = None) -> None:
        """Raises InputError for a bias of another shape than [out_features]."""
        super().__init__()
        self._set_up(matrix.spec, bias)
        self._hold(matrix)
        self.prepare()

    @classmethod
    def empty(
        cls,
        spec: MatrixSpec,
        tensor_meta: Mapping[str, TensorMeta],
        bias: bool = False,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer to load a checkpoint into: buffers name -> (shape, dtype), uninitialised.

        dtype is that of the bias. Whoever fills the buffers one by one calls `prepare` at last.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        zeros = torch.zeros(spec.out_features, device=device, dtype=dtype) if bias else None
        layer._set_up(spec, zeros)
        tensors = {
            name: torch.empty(shape, dtype=buffer_dtype, device=device)
            for name, (shape, buffer_dtype) in tensor_meta.items()
        }
        layer._hold(SpqrMatrix(spec, tensors))
        return layer

    def _set_up(self, spec: MatrixSpec, bias: torch.Tensor | None) -> None:
        if bias is not None and tuple(bias.shape) != (spec.out_features,):
            raise InputError(f"bias is {list(bias.shape)}; it must be [{spec.out_features}]")
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _hold(self, weight: Weight) -> None:
        """Make a weight's tensors the buffers, in place of those there were."""
        for name in list(self._buffers):
            delattr(self, name)
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor, persistent=isinstance(weight, SpqrMatrix))
        self._known = weight
        self.layout = describe(weight)
        remember(weight)

    def _weight(self) -> Weight:
        """The compressed weight, made of the buffers as they are now."""
        known = self._known
        if any(self._buffers[name] is not tensor for name, tensor in known.tensors.items()):
            tensors = {n: b for n, b in self._buffers.items() if b is not None}
            known = self._known = type(known)(self.spec, tensors)
            self.layout = describe(known)
            remember(known)
        return known

    @property
    def matrix(self) -> SpqrMatrix:
        """The compressed weight; computed anew where it is held in another order.

        Raises FormatError where the buffers do not make one.
        """
        weight = self._weight()
        return weight.canonical() if isinstance(weight, PreparedMatrix) else weight

    def prepare(self) -> None:
        """On a GPU, put the weight into the order of its kernels; nothing where that is done."""
        weight = self._weight()
        if isinstance(weight, PreparedMatrix) or weight.device.type not in PREPARED_ON:
            return
        if can_prepare(weight):
            self._hold(prepare(weight))

    def _restore(self) -> None:
        """Back to the matrix's own order, in which weights are saved, loaded and moved."""
        if isinstance(self._known, PreparedMatrix):
            self._hold(self.matrix)

    def dequantize(self) -> torch.Tensor:
        """W_hat: fp32 [out_features, in_features], bit for bit what calibration used."""
        return dequantize(self.matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features] of the same dtype (fp32, fp16 or bf16).

        Under autocast, of its dtype, as with nn.Linear.
        """
        bias: torch.Tensor | None = self.bias
        device = x.device.type
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
            bias = None if bias is None else bias.to(x.dtype)
        if needs_operator(x, bias):
            if self.number is not None:
                return torch.ops.spqr_numba.matmul(x, *self.number, bias)
            buffers = list(self._buffers.values())
            return torch.ops.spqr_numba.matmul(x, buffers, self.layout, bias)
        return matmul(x, self._weight(), bias)

    def extra_repr(self) -> str:
        """The settings, as nn.Module prints them."""
        spec = self.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features},"
            f" bias={self.bias is not None}, bits={spec.bits}, group_size={spec.group_size}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What .to(), .half() and .cuda() go through: buffers move, but keep their dtype."""
        self._restore()
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.prepare()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self._known, PreparedMatrix):
            for name, tensor in self.matrix.tensors.items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()


@torch.inference_mode(False)
def join_siblings(block: nn.Module) -> None:
    """Put the prepared weights of linears of a block that share an input side by side in memory.

    Each layer works as before; compiled (compiled/), they are one product. Joined weights
    stay as they are.
    """
    families: dict[Hashable, list[tuple[SpqrLinear, PreparedMatrix]]] = {}
    for layer in block.modules():
        if isinstance(layer, SpqrLinear) and isinstance(weight := layer._weight(), PreparedMatrix):
            families.setdefault(kinship(weight), []).append((layer, weight))
    families.pop(None, None)
    for siblings in families.values():
        if len(siblings) > 1:
            parts = join([weight for _, weight in siblings])
            for (layer, _), part in zip(siblings, parts, strict=True):
                layer._hold(part)


class ByNumber:
    """`with ByNumber(model):` what is traced of its products fits weights of other settings too.

    May be entered again and again, as long as no layer gets another weight.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, SpqrLinear)]
        self._numbers = [(vars(layer), numbered(layer._weight())) for layer in layers]

    def __enter__(self) -> None:
        for attributes, number in self._numbers:
            attributes["number"] = number

    def __exit__(self, *_: object) -> None:
        for attributes, _number in self._numbers:
            attributes.pop("number", None)  # another thread may have left before
