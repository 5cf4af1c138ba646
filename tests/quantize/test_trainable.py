"""A weight under training decodes as the kernels do, and has the gradients of its formula."""

from __future__ import annotations

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.config import SpqrConfig
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.bilevel import storable as stored_by_kernels
from spqr_numba.kernels.dequantize import dequantize, stored_order
from spqr_numba.quantize.solver import quantize_weight
from spqr_numba.quantize.trainable import TrainableMatrix, storable

from ..problems import make_problem, make_spec

# rows, columns, settings, outliers a row, permuted
CASES = {
    "paper": (48, 96, {}, 3, True),
    "ragged": (37, 75, {}, 3, True),
    "one weight": (1, 1, {}, None, False),
    "no outliers": (21, 64, {}, None, True),
    "none found": (21, 64, {}, 0, True),
    "identity": (48, 96, {}, 3, False),
    "balanced": (100, 72, {"group_size": 8, "stats_group_size": 64}, [0] * 99 + [72], True),
    "scales alone are codes": (40, 70, {"bits": 4, "scale_bits": 4, "zero_bits": 16}, 2, True),
    "zeros alone are codes": (40, 70, {"bits": 2, "scale_bits": 16, "zero_bits": 2}, 2, True),
    "whole rows": (40, 70, {"group_size": 70, "scale_bits": 16, "zero_bits": 16}, None, True),
    "groups beyond the row": (24, 70, {"bits": 8, "group_size": 128}, 2, True),
}


def build(name: str) -> SpqrMatrix:
    rows, columns, settings, outliers, permuted = CASES[name]
    return random_matrix(make_spec(rows, columns, **settings), outliers, permuted=permuted)


def disturb(trainable: TrainableMatrix, size: float) -> None:
    """Offsets as training might leave them."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter += size * torch.randn(parameter.shape, generator=random).to(parameter.device)


@pytest.mark.parametrize("name", CASES)
def test_untrained_is_what_is_stored(name: str, device: torch.device) -> None:
    matrix = build(name).to(device)
    trainable = TrainableMatrix(matrix)
    assert torch.equal(trainable(), dequantize(matrix))
    for buffer, tensor in trainable.stored().tensors.items():
        assert torch.equal(tensor, matrix[buffer]), buffer


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [0.03, 3.0], ids=["near", "far"])
def test_trained_is_what_will_be_stored(name: str, size: float, device: torch.device) -> None:
    """Far off, steps pass through 0 and bases become tiny beside them: what encoders drop."""
    matrix = build(name).to(device)
    trainable = TrainableMatrix(matrix)
    disturb(trainable, size)
    stored = trainable.stored()
    stored.check_values()
    assert torch.equal(trainable(), dequantize(stored))
    changed = {
        buffer for buffer in matrix.tensors if not torch.equal(stored[buffer], matrix[buffer])
    }
    assert changed == {b for b, t in matrix.tensors.items() if t.is_floating_point() and t.numel()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [0.0, 0.03, 3.0], ids=["at first", "near", "far"])
def test_codes_that_are_trained_are_what_will_be_stored(
    name: str, size: float, device: torch.device
) -> None:
    matrix = build(name).to(device)
    trainable = TrainableMatrix(matrix)
    random = torch.Generator().manual_seed(2)
    weight = dequantize(matrix).cpu()
    trainable.train_codes((weight + torch.randn(weight.shape, generator=random)).to(device))
    if not size:
        assert torch.equal(trainable(), dequantize(matrix))
        assert torch.equal(trainable.stored()["codes"], matrix["codes"])
    disturb(trainable, size)
    stored = trainable.stored()
    assert torch.equal(trainable(), dequantize(stored))
    if size and name != "one weight":
        assert not torch.equal(stored["codes"], matrix["codes"])
    for buffer in ("scale_codes", "zero_codes", "outlier_columns", "permutation"):
        assert buffer not in matrix.tensors or stored[buffer] is matrix[buffer]


def test_codes_begin_where_the_weight_is_and_go_where_the_gradient_leads() -> None:
    matrix = build("ragged")
    trainable = TrainableMatrix(matrix)
    with torch.no_grad():
        scale = trainable.scale().repeat_interleave(matrix.spec.group_size, 0)[:75].T
        scale = scale[:, stored_order(matrix).argsort()]
        wanted = dequantize(matrix) + 0.3 * scale
    trainable.train_codes(wanted)
    assert trainable.offset is not None
    places = (10 * trainable.offset.detach()).flatten(0, 1)[:75]
    kept = scale.T[stored_order(matrix)] != 0
    torch.testing.assert_close(places[kept], torch.full_like(places, 0.3)[kept], rtol=0, atol=1e-3)
    (trainable() - dequantize(matrix) - scale).square().sum().backward()
    with torch.no_grad():
        trainable.offset -= 0.03 * trainable.offset.grad.sign()  # 0.3 + 0.3 codes: the next one
    step = trainable().detach() - dequantize(matrix)
    assert ((step - scale).abs() < 1e-3 * scale.abs()).float().mean() > 0.5
    assert (step.abs() <= 1.001 * scale.abs()).all()


@pytest.mark.parametrize(
    "config",
    [
        SpqrConfig(damping=0.1),
        SpqrConfig(damping=0.1, fit="joint", group_size=8, stats_group_size=64),
        SpqrConfig(outlier_threshold=None, permutation="identity"),
        SpqrConfig.gptq(3),
    ],
    ids=["paper", "joint", "identity", "gptq"],
)
def test_it_goes_on_from_the_solver(config: SpqrConfig) -> None:
    problem = make_problem(40, 72)
    result = quantize_weight(problem.weight, problem.hessian, config)
    assert torch.equal(TrainableMatrix(result.matrix)(), result.weight)


def test_the_smaller_of_step_and_base_is_dropped_as_the_encoder_drops_it() -> None:
    random = torch.Generator().manual_seed(0)
    step, base = torch.randn(2, 500, generator=random) * 2.0 ** torch.randint(
        -14, 14, (2, 500), generator=random
    )
    found = torch.stack(storable(step, base)).T
    for pair, one, other in zip(found.tolist(), step.numpy(), base.numpy(), strict=True):
        assert pair == list(stored_by_kernels.py_func(one, other))


def test_gradients_are_those_of_the_formula() -> None:
    """weight = scale (code - zero) + outlier, with scale and zero = code * step + base."""
    matrix = build("ragged")
    trainable = TrainableMatrix(matrix)
    direction = torch.randn(trainable().shape, generator=torch.Generator().manual_seed(2))
    (trainable() * direction).sum().backward()

    by_column = direction.T[stored_order(matrix)]
    groups = torch.zeros(5 * 16, 37)
    groups[:75] = by_column
    groups = groups.unflatten(0, (5, 16))
    codes, scale, zero = trainable.codes.float(), trainable.scale(), trainable.zero()
    of_scale = (groups * (codes - zero[:, None])).sum(1)
    of_zero = -(groups * scale[:, None]).sum(1)
    for statistic, gradient in ((trainable.scale, of_scale), (trainable.zero, of_zero)):
        blocks = torch.nn.functional.pad(gradient, (0, 3 * 16 - 37)).unflatten(1, (3, 16))
        of_base = blocks.sum(-1) * statistic.base.size
        of_step = (blocks * statistic.codes).sum(-1) * statistic.step.size
        torch.testing.assert_close(statistic.base.offset.grad, of_base, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistic.step.offset.grad, of_step, rtol=1e-4, atol=1e-4)
    assert trainable.outliers is not None
    of_outliers = by_column.flatten()[trainable.positions] * trainable.outliers.size
    torch.testing.assert_close(trainable.outliers.offset.grad, of_outliers)
