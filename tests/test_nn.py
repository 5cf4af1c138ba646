from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spqr_numba import nn as nn_module
from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.errors import FormatError, InputError
from spqr_numba.nn import SpqrLinear, join_siblings

from .problems import make_spec


def make_layer(bias: bool = True, seed: int = 0, **settings: int) -> SpqrLinear:
    matrix = random_matrix(make_spec(48, 40, **settings), seed=seed)
    return SpqrLinear(matrix, torch.linspace(-1, 1, 48) if bias else None)


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """The same names, dtypes and numbers."""
    return set(a) == set(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 17, 40)], ids=str)
def test_forward_is_the_product_with_the_dequantized_weight(
    shape: tuple[int, ...], bias: bool
) -> None:
    layer = make_layer(bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = F.linear(x, layer.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_buffers_have_the_names_of_the_matrix() -> None:
    layer = make_layer()
    assert set(layer.state_dict()) == {*layer.matrix.tensors, "bias"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_state_dict_round_trip_through_an_empty_layer() -> None:
    layer = make_layer()
    meta = {name: (tuple(t.shape), t.dtype) for name, t in layer.matrix.tensors.items()}
    empty = SpqrLinear.empty(layer.spec, meta, bias=True, device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.dequantize(), layer.dequantize())
    assert torch.equal(empty.bias, layer.bias)


def test_an_empty_layer_without_bias_on_meta() -> None:
    layer = make_layer(bias=False)
    meta = {name: (tuple(t.shape), t.dtype) for name, t in layer.matrix.tensors.items()}
    empty = SpqrLinear.empty(layer.spec, meta)
    assert empty.bias is None
    assert all(buffer.is_meta for buffer in empty.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_the_buffers_alone(dtype: torch.dtype) -> None:
    layer = make_layer(scale_bits=16)
    before = {name: tensor.clone() for name, tensor in layer.matrix.tensors.items()}
    layer.to(dtype)
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    for name, tensor in layer.matrix.tensors.items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name


def test_a_model_in_bf16_runs() -> None:
    model = nn.Sequential(make_layer(), nn.ReLU()).bfloat16()
    assert model(torch.ones(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_matrix_follows_its_buffers() -> None:
    layer = make_layer()
    first = layer.matrix
    assert layer.matrix is first
    other = copy.deepcopy(layer)
    assert torch.equal(other.dequantize(), layer.dequantize())
    layer.outlier_values = layer.outlier_values * 2
    assert layer.matrix is not first
    assert layer.matrix["outlier_values"] is layer.outlier_values
    assert not torch.equal(other.dequantize(), layer.dequantize())


def test_a_damaged_buffer_is_noticed() -> None:
    layer = make_layer()
    layer.codes = layer.codes[:1]
    with pytest.raises(FormatError, match=r"codes is torch\.int32"):
        layer(torch.ones(40))


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"bias is \[7\]; it must be \[48\]"):
        SpqrLinear(random_matrix(make_spec(48, 40)), torch.zeros(7))


def test_repr_says_what_it_is() -> None:
    assert "in_features=40, out_features=48, bias=True, bits=3" in repr(make_layer())


@pytest.mark.usefixtures("prepared")
def test_a_prepared_layer_shows_its_matrix() -> None:
    matrix = random_matrix(make_spec(48, 40))
    layer = SpqrLinear(matrix)
    assert "records" in dict(layer.named_buffers())
    assert "codes" not in dict(layer.named_buffers())
    assert same_tensors(layer.matrix.tensors, matrix.tensors)
    assert same_tensors(layer.state_dict(), matrix.tensors)
    assert torch.equal(layer.dequantize(), SpqrLinear(matrix).dequantize())
    other = copy.deepcopy(layer)
    assert same_tensors(other.matrix.tensors, matrix.tensors)


@pytest.mark.usefixtures("prepared")
def test_a_prepared_layer_loads_and_prepares_again() -> None:
    layer, other = make_layer(), SpqrLinear(random_matrix(make_spec(48, 40), seed=1))
    layer.load_state_dict(other.state_dict(), strict=False)
    assert "records" in dict(layer.named_buffers())
    assert same_tensors(layer.matrix.tensors, other.matrix.tensors)


def test_a_layer_is_prepared_where_it_moves_and_restored_where_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(bias=False)
    before = layer.state_dict()
    monkeypatch.setattr("spqr_numba.nn.PREPARED_ON", ("cpu",))
    layer.to(torch.float16)
    assert "records" in dict(layer.named_buffers())
    monkeypatch.undo()
    layer.to(torch.float32)
    assert same_tensors(layer.state_dict(), before)
    assert layer.matrix is layer.matrix


@pytest.mark.usefixtures("prepared")
def test_settings_without_a_fast_path_stay_as_they_are() -> None:
    layer = make_layer(scale_bits=16)
    assert "codes" in dict(layer.named_buffers())


@pytest.mark.usefixtures("prepared")
def test_siblings_are_joined_once_and_part_where_they_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = nn.ModuleList(make_layer(bias) for bias in (True, False))
    before = block.state_dict()
    with torch.inference_mode():
        join_siblings(block)
    first, second = block
    assert first.runs is second.runs
    assert not first.records.is_inference()
    assert same_tensors(block.state_dict(), before)
    held = first.records
    join_siblings(block)
    assert first.records is held
    other = copy.deepcopy(block)
    assert same_tensors(other.state_dict(), before)
    first.load_state_dict(make_layer(seed=1).state_dict())
    assert same_tensors(second.state_dict(), make_layer(bias=False).state_dict())
    assert first.runs is not second.runs
    monkeypatch.undo()
    assert same_tensors(other.to(torch.float32).state_dict(), before)


@pytest.mark.gpu
def test_to_a_gpu_and_back() -> None:
    layer = make_layer()
    before, x = layer.state_dict(), torch.ones(3, 40)
    expected = layer(x)
    layer.cuda()
    assert ("records" in dict(layer.named_buffers())) == ("cuda" in nn_module.PREPARED_ON)
    assert same_tensors({k: t.cpu() for k, t in layer.state_dict().items()}, before)
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)
    assert same_tensors(layer.cpu().state_dict(), before)
    assert torch.equal(layer(x), expected)
