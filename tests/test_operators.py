"""The operators: traced without a graph break, differentiated, and checked by torch itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spqr_numba import operators
from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.nn import SpqrLinear
from spqr_numba.operators import describe, numbered

from .problems import make_spec

BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """What another test compiled counts towards the limit of recompilations."""
    torch.compiler.reset()


def make_layer(device: torch.device, dtype: torch.dtype = torch.float32) -> SpqrLinear:
    matrix = random_matrix(make_spec(48, 40))
    return SpqrLinear(matrix, torch.linspace(-1, 1, 48)).to(device, dtype)


def make_input(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(*shape, 40, generator=random).to(device, dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("learns", [False, True], ids=["", "grad"])
def test_torch_finds_nothing_wrong(device: torch.device, learns: bool) -> None:
    layer = make_layer(device)
    x = make_input(device, torch.float32, 2, 3).requires_grad_(learns)
    buffers, layout = list(layer.buffers()), layer.layout
    torch.library.opcheck(torch.ops.spqr_numba.matmul.default, (x, buffers, layout, layer.bias))
    torch.library.opcheck(torch.ops.spqr_numba.matmul.default, (x, buffers, layout, None))
    torch.library.opcheck(
        torch.ops.spqr_numba.dequantize.default, (buffers, layout, torch.bfloat16)
    )


def test_the_operators_do_what_the_kernels_do(device: torch.device) -> None:
    layer = make_layer(device)
    x = make_input(device, torch.float32, 3)
    buffers, layout = list(layer.buffers()), layer.layout
    product = torch.ops.spqr_numba.matmul(x, buffers, layout, layer.bias)
    assert torch.equal(product, layer(x))
    weight = torch.ops.spqr_numba.dequantize(buffers, layout, torch.float32)
    assert torch.equal(weight, layer.dequantize())


def test_a_layer_in_use_is_found_again_and_another_one_made_anew() -> None:
    layer = make_layer(torch.device("cpu"))
    buffers = list(layer.buffers())
    assert operators._weight(buffers, layer.layout) is layer.matrix
    copies = [buffer.clone() for buffer in buffers]
    assert operators._weight(copies, layer.layout) is not layer.matrix
    layer.to(torch.float64)
    assert operators._weight(list(layer.buffers()), layer.layout) is layer.matrix
    assert layer.layout == describe(layer.matrix)


def test_a_weight_is_found_by_its_number(device: torch.device) -> None:
    layer, x = make_layer(device), make_input(device, torch.float32, 3)
    number, layout = numbered(layer._weight())
    multiply = torch.ops.spqr_numba.matmul
    assert torch.equal(multiply(x, number, layout, layer.bias), layer(x))
    torch.library.opcheck(multiply.default, (x, number, layout, None))
    other = SpqrLinear(random_matrix(make_spec(48, 40, bits=4), None)).to(device)
    other_number, other_layout = numbered(other._weight())
    assert other_layout == layout
    assert torch.equal(multiply(x, other_number, layout, None), other(x))
    del other
    with pytest.raises(KeyError):
        multiply(x, other_number, layout, None)


@BACKENDS
@DTYPES
def test_compile_traces_through(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    model = nn.Sequential(nn.LayerNorm(40), make_layer(device), nn.ReLU()).to(device, dtype)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for shape in [(1,), (5,), (2, 3)]:
        x = make_input(device, dtype, *shape)
        with torch.no_grad():
            assert_close(compiled(x), model(x), dtype)
    with torch.inference_mode():
        assert_close(compiled(x), model(x), dtype)


@DTYPES
def test_export_keeps_the_operator(dtype: torch.dtype, device: torch.device) -> None:
    layer = make_layer(device, dtype)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        layer, (make_input(device, dtype, 3),), dynamic_shapes={"x": batch}
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.spqr_numba.matmul.default]
    x = make_input(device, dtype, 7)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@DTYPES
def test_gradients_are_those_of_the_dense_weight(
    dtype: torch.dtype, shape: tuple[int, ...], backend: str | None, device: torch.device
) -> None:
    layer = make_layer(device, dtype)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    forward = torch.compile(layer, backend=backend, fullgraph=True) if backend else layer
    x = make_input(device, dtype, *shape).requires_grad_()
    y = forward(x)
    upstream = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(dtype)
    y.backward(upstream)

    weight = layer.dequantize().to(dtype)
    dense_x, dense_bias = (t.detach().clone().requires_grad_() for t in (x, layer.bias))
    F.linear(dense_x, weight, dense_bias).backward(upstream)
    assert x.grad is not None
    assert dense_x.grad is not None
    assert_close(x.grad, dense_x.grad, dtype)
    assert_close(layer.bias.grad, dense_bias.grad, dtype)
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_an_adapter_learns_below_a_compressed_layer(device: torch.device) -> None:
    adapter = nn.Linear(40, 40, device=device)
    model = nn.Sequential(adapter, make_layer(device))
    x, wanted = make_input(device, torch.float32, 16), torch.zeros(16, 48, device=device)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("learns", [False, True], ids=["", "grad"])
def test_autocast_gives_its_dtype(learns: bool, device: torch.device) -> None:
    layer = make_layer(device)
    x = make_input(device, torch.float32, 3).requires_grad_(learns)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, F.linear(x, layer.dequantize(), layer.bias).bfloat16(), torch.bfloat16)
    if learns:
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float32


@BACKENDS
def test_autocast_is_traced(backend: str, device: torch.device) -> None:
    layer = make_layer(device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return layer(x)

    x = make_input(device, torch.float32, 3)
    compiled = torch.compile(forward, backend=backend, fullgraph=True)(x)
    assert compiled.dtype == torch.bfloat16
    assert_close(compiled, forward(x), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 17])
def test_a_cuda_graph_replays_it_on_any_stream(batch: int) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    layer = make_layer(device, torch.float16)
    x = make_input(device, torch.float16, batch)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.inference_mode(), torch.cuda.stream(stream):
        layer(x)
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(x.flip(-1))
        graph.replay()
        torch.cuda.current_stream().synchronize()
        assert torch.equal(y, layer(x))
