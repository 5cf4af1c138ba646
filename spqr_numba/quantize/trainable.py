"""A compressed weight as something to train: its fp16 numbers are variables, its codes may be.

    value    = start + size * offset       start: as stored; offset: fp32, trained from 0 on
    stored   = fp16(value)                 less the smaller of step and base, as layout.py has it
    scale    = fp16(code * step + base)    zero alike; or plain stored numbers
    weight   = scale * (code - zero), + outlier

Forward this is `dequantize` in torch, bit for bit: the product of a code and an fp16 number is
exact in fp32, so that a product and a sum make the rule's fused operation. Backward, every rounding
passes gradients on as if it were none (straight through). `size` is about what moves the weights
that a number is for by their own size, so that one learning rate suits every kind. A code that is
trained has a place between its neighbours, and is the nearest integer:

    code     = round(clamp(code as stored + size * offset))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ..format.layout import UNQUANTIZED_BITS
from ..format.matrix import SpqrMatrix
from ..format.packing import pack_codes, unpack_codes, unpack_statistics
from ..kernels.bilevel import BASE_BELOW_STEP, STEP_BELOW_BASE
from ..kernels.dequantize import stored_order

__all__ = ["StoredNumbers", "TrainableMatrix"]


NEAREST = 0.45  # of a code: what error propagation moved farther begins on its side of the middle
CODE_SIZE = 10.0  # a code moves by so many codes where a statistic moves by all of its size


class _Replaced(torch.autograd.Function):
    """Other numbers forward, the gradient of the first backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return stored

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _Reordered(torch.autograd.Function):
    """Rows of a matrix in another order, backward in the first: for a GPU, which would add up."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradients[0].index_select(0, order.argsort()), None


def rounded(value: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """fp32 numbers as `dtype` holds them, still fp32; straight through."""
    return _Replaced.apply(value, value.detach().to(dtype).float())


def storable(step: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.bilevel.storable`, straight through."""
    step, base = rounded(step), rounded(base)
    step_counts = step >= float(STEP_BELOW_BASE) * base.abs()
    base_counts = ~step_counts | (base.abs() >= float(BASE_BELOW_STEP) * step)
    return (
        _Replaced.apply(step, step.detach() * step_counts),
        _Replaced.apply(base, base.detach() * base_counts),
    )


class StoredNumbers(nn.Module):
    """Numbers of any shape and float dtype, and the fp32 offsets that are trained.

    size is a number or broadcasts to their shape.
    """

    start: torch.Tensor
    size: torch.Tensor

    def __init__(self, stored: torch.Tensor, size: torch.Tensor | float) -> None:
        super().__init__()
        start = stored.detach().float()
        self.dtype = stored.dtype
        self.register_buffer("start", start)
        self.register_buffer("size", torch.as_tensor(size, dtype=torch.float32).to(start.device))
        self.offset = nn.Parameter(torch.zeros_like(start))

    def value(self) -> torch.Tensor:
        """Before rounding: fp32."""
        return self.start + self.size * self.offset

    def forward(self) -> torch.Tensor:
        """As they would be stored: fp32."""
        return rounded(self.value(), self.dtype)


class PlainStatistic(nn.Module):
    """Scales or zeros that are stored one by one."""

    def __init__(self, matrix: SpqrMatrix, name: str, size: float | None) -> None:
        """size of a number; None where it is its own."""
        super().__init__()
        values = matrix[f"{name}s"]
        self.name = name
        self.values = StoredNumbers(values, values.float().abs() if size is None else size)

    def forward(self) -> torch.Tensor:
        """fp32 [groups, m]."""
        return self.values()

    def stored(self) -> dict[str, torch.Tensor]:
        """Name -> fp32 numbers that fp16 holds."""
        return {f"{self.name}s": self.values()}


class BilevelStatistic(nn.Module):
    """Scales or zeros that are codes of steps and bases: fp32 [groups, stats_groups] each."""

    codes: torch.Tensor

    def __init__(self, matrix: SpqrMatrix, name: str, bits: int, size: float | None) -> None:
        """size of what is decoded; None for that in the middle of what the codes stand for."""
        super().__init__()
        self.name, self.rows = name, matrix.spec.out_features
        step, base = matrix[f"{name}_scale"], matrix[f"{name}_zero"]
        largest = 2**bits - 1
        middle = base.float() + step.float() * (largest / 2) if size is None else torch.tensor(size)
        self.step = StoredNumbers(step, middle.abs() / largest)
        self.base = StoredNumbers(base, middle.abs())
        run = matrix.spec.stats_group_size
        codes = unpack_statistics(matrix[f"{name}_codes"], bits, self.rows)
        codes = pad(codes, (0, matrix.spec.stats_groups * run - self.rows))
        self.register_buffer("codes", codes.unflatten(1, (-1, run)))

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and base as they would be stored."""
        return storable(self.step.value(), self.base.value())

    def forward(self) -> torch.Tensor:
        """What they decode to: fp32 [groups, m]."""
        step, base = self.pair()
        decoded = rounded(self.codes * step[..., None] + base[..., None])
        return decoded.flatten(1)[:, : self.rows]

    def stored(self) -> dict[str, torch.Tensor]:
        """Name -> fp32 numbers that fp16 holds."""
        step, base = self.pair()
        return {f"{self.name}_scale": step, f"{self.name}_zero": base}


class TrainableMatrix(nn.Module):
    """An SpqrMatrix whose outlier positions and order stay, its codes too unless `train_codes` is
    called, and all else is trained.

    Called, it gives fp32 [m, n], columns in the layer's own order: `dequantize(self.stored())`.
    """

    codes: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor

    def __init__(self, matrix: SpqrMatrix) -> None:
        super().__init__()
        self.matrix, spec = matrix, matrix.spec
        codes = unpack_codes(matrix["codes"], spec.bits, spec.in_features)
        codes = pad(codes, (0, 0, 0, spec.groups * spec.group_size - spec.in_features))
        self.register_buffer("codes", codes.unflatten(0, (-1, spec.group_size)))
        self.offset: nn.Parameter | None = None
        self.register_buffer("columns", stored_order(matrix).argsort())
        self.scale = self._statistic("scale", spec.scale_bits, None)
        self.zero = self._statistic("zero", spec.zero_bits, (2**spec.bits - 1) / 2)
        self.outliers: StoredNumbers | None = None
        if matrix.outliers:
            values = matrix["outlier_values"]
            self.outliers = StoredNumbers(values, values.float().abs())
            self.register_buffer("positions", outlier_positions(matrix))

    def _statistic(self, name: str, bits: int, size: float | None) -> Any:
        if bits == UNQUANTIZED_BITS:
            return PlainStatistic(self.matrix, name, size)
        return BilevelStatistic(self.matrix, name, bits, size)

    def forward(self) -> torch.Tensor:
        """W_hat."""
        spec = self.matrix.spec
        weights = self.scale()[:, None] * (self.chosen_codes() - self.zero()[:, None])
        columns = weights.flatten(0, 1)[: spec.in_features]
        if self.outliers is not None:
            columns = columns.flatten().index_add(0, self.positions, self.outliers())
            columns = columns.unflatten(0, (-1, spec.out_features))
        return _Reordered.apply(columns, self.columns).T

    @torch.no_grad()
    def train_codes(self, weight: torch.Tensor) -> None:
        """Train the codes too, each of which begins as near to the next as `weight` is.

        weight [m, n], any float dtype: what was compressed. Outliers stay where they are.
        """
        spec = self.matrix.spec
        columns = weight.float().T.index_select(0, stored_order(self.matrix))
        if self.outliers is not None:
            columns = columns.flatten().index_add(0, self.positions, -self.outliers())
            columns = columns.unflatten(0, (-1, spec.out_features))
        columns = pad(columns, (0, 0, 0, spec.groups * spec.group_size - spec.in_features))
        scale = self.scale()[:, None]
        place = columns.unflatten(0, (-1, spec.group_size)) / scale + self.zero()[:, None]
        apart = torch.where(scale == 0, 0, place - self.codes).clamp(-NEAREST, NEAREST)
        self.offset = nn.Parameter(apart / CODE_SIZE)

    def chosen_codes(self) -> torch.Tensor:
        """The codes: fp32 integers where they are trained, uint8 where they stay."""
        if self.offset is None:
            return self.codes
        place = self.codes + CODE_SIZE * self.offset
        place = place.clamp(0, 2**self.matrix.spec.bits - 1)
        return _Replaced.apply(place, place.detach().round())

    @torch.no_grad()
    def stored(self) -> SpqrMatrix:
        """The matrix as it is now."""
        numbers = self.scale.stored() | self.zero.stored()
        if self.outliers is not None:
            numbers["outlier_values"] = self.outliers()
        tensors = {name: number.half() for name, number in numbers.items()}
        if self.offset is not None:
            codes = self.chosen_codes().to(torch.uint8).flatten(0, 1)
            spec = self.matrix.spec
            tensors["codes"] = pack_codes(codes[: spec.in_features], spec.bits)
        return SpqrMatrix(self.matrix.spec, dict(self.matrix.tensors) | tensors)


def outlier_positions(matrix: SpqrMatrix) -> torch.Tensor:
    """int64 [outliers]: where each lies in the flattened weight [n, m], columns in stored order."""
    rows = torch.arange(matrix.spec.out_features, device=matrix.device)
    counts = matrix["outlier_row_offsets"].diff()
    columns = matrix["outlier_columns"].to(torch.int64)
    return columns * matrix.spec.out_features + rows.repeat_interleave(counts)
