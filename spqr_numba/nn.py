"""SpqrLinear: y = x W_hat^T + b with W_hat compressed, in the place of an nn.Linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from .errors import InputError
from .format.layout import MatrixSpec
from .format.matrix import SpqrMatrix
from .kernels.dequantize import dequantize
from .kernels.matmul import matmul

__all__ = ["SpqrLinear"]

TensorMeta = tuple[tuple[int, ...], torch.dtype]


class SpqrLinear(nn.Module):
    """A linear layer whose weight [out_features, in_features] is an SpqrMatrix.

    The matrix's tensors are buffers of the same names (`<module>.codes`, ...), so that they are
    saved, loaded and moved like any others; a cast to another dtype leaves them as they are, since
    what was calibrated is what is stored. bias [out_features] is a parameter, or None.
    """

    def __init__(self, matrix: SpqrMatrix, bias: torch.Tensor | None = None) -> None:
        """Raises InputError for a bias of another shape than [out_features]."""
        super().__init__()
        self._matrix: SpqrMatrix | None = matrix
        self._set_up(matrix.spec, matrix.tensors, bias)

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

        dtype is that of the bias.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        tensors = {
            name: torch.empty(shape, dtype=buffer_dtype, device=device)
            for name, (shape, buffer_dtype) in tensor_meta.items()
        }
        zeros = torch.zeros(spec.out_features, device=device, dtype=dtype) if bias else None
        layer._matrix = None
        layer._set_up(spec, tensors, zeros)
        return layer

    def _set_up(
        self, spec: MatrixSpec, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None
    ) -> None:
        if bias is not None and tuple(bias.shape) != (spec.out_features,):
            raise InputError(f"bias is {list(bias.shape)}; it must be [{spec.out_features}]")
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> SpqrMatrix:
        """The compressed weight, made of the buffers as they are now.

        Raises FormatError where they do not make one.
        """
        known = self._matrix
        if known is None or any(self._buffers[n] is not t for n, t in known.tensors.items()):
            known = SpqrMatrix(self.spec, {n: b for n, b in self._buffers.items() if b is not None})
            self._matrix = known
        return known

    def dequantize(self) -> torch.Tensor:
        """W_hat: fp32 [out_features, in_features], bit for bit what calibration used."""
        return dequantize(self.matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features] of the same dtype (fp32, fp16 or bf16)."""
        return matmul(x, self.matrix, self.bias)

    def extra_repr(self) -> str:
        """The settings, as nn.Module prints them."""
        spec = self.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features},"
            f" bias={self.bias is not None}, bits={spec.bits}, group_size={spec.group_size}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What .to(), .half() and .cuda() go through: buffers move, but keep their dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self
