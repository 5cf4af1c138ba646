"""SpqrMatrix: the buffers of one compressed weight, their checks, their measured size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import FormatError
from .layout import MatrixSpec

__all__ = ["BUFFER_NAMES", "SpqrMatrix"]

BUFFER_NAMES = (
    "codes",
    "scale_codes",
    "scale_scale",
    "scale_zero",
    "scales",
    "zero_codes",
    "zero_scale",
    "zero_zero",
    "zeros",
    "outlier_row_offsets",
    "outlier_columns",
    "outlier_values",
    "permutation",
)


@dataclass(frozen=True, eq=False)
class SpqrMatrix:
    """One compressed weight: a spec and the tensors that layout.py lists for it.

    Raises FormatError where a tensor is missing, unknown, or of another shape, dtype or device
    than the spec asks for. `check_values` looks at the contents too.
    """

    spec: MatrixSpec
    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        expected = self.spec.buffers(self.outliers, "permutation" in self.tensors)
        missing = sorted(set(expected) - set(self.tensors))
        unknown = sorted(set(self.tensors) - set(expected))
        if missing or unknown:
            raise FormatError(
                f"a compressed weight of {self.spec} needs exactly the buffers"
                f" {sorted(expected)}; missing: {missing}, unknown: {unknown}"
            )
        for name, (shape, dtype) in expected.items():
            self._check_tensor(name, shape, dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def device(self) -> torch.device:
        """Where all the buffers lie."""
        return self["codes"].device

    @property
    def outliers(self) -> int | None:
        """How many outliers are stored; None where the weight was compressed without any."""
        values = self.tensors.get("outlier_values")
        return None if values is None else values.numel()

    @property
    def outlier_share(self) -> float:
        """Outliers a weight."""
        return (self.outliers or 0) / (self.spec.out_features * self.spec.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, as they lie on disk."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Measured bits a weight: everything that is stored, over the number of weights."""
        return 8 * self.nbytes / (self.spec.out_features * self.spec.in_features)

    def to(self, device: torch.device | str) -> SpqrMatrix:
        """The same matrix on `device`."""
        return SpqrMatrix(self.spec, {k: v.to(device) for k, v in self.tensors.items()})

    def check_values(self) -> None:
        """Raise FormatError where indices or offsets point outside the weight, or a statistic is
        NaN or inf: what a kernel would otherwise read out of bounds."""
        self._check_outliers()
        self._check_permutation()
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise FormatError(f"{name} holds NaN or inf; the checkpoint is damaged")

    def _check_tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise FormatError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {dtype} {list(shape)}"
            )
        if tensor.device != self.device:
            raise FormatError(f"{name} is on {tensor.device}, codes are on {self.device}")
        if not tensor.is_contiguous():
            raise FormatError(f"{name} must be contiguous; call .contiguous() on it")

    def _check_outliers(self) -> None:
        if self.outliers is None:
            return
        offsets = self["outlier_row_offsets"].to(torch.int64)
        if offsets[0] != 0 or offsets[-1] != self.outliers or (offsets.diff() < 0).any():
            raise FormatError(
                "outlier_row_offsets must rise from 0 to the number of outliers"
                f" ({self.outliers}); the checkpoint is damaged"
            )
        columns = self["outlier_columns"].to(torch.int64)
        if self.outliers and not 0 <= columns.min() <= columns.max() < self.spec.in_features:
            raise FormatError(
                f"outlier_columns must lie in 0 ... {self.spec.in_features - 1};"
                f" found {columns.min().item()} ... {columns.max().item()}"
            )

    def _check_permutation(self) -> None:
        if "permutation" not in self.tensors:
            return
        order = self["permutation"].to(torch.int64).sort().values
        if not torch.equal(order, torch.arange(self.spec.in_features, device=order.device)):
            raise FormatError(
                f"permutation must hold each of 0 ... {self.spec.in_features - 1} once"
            )
