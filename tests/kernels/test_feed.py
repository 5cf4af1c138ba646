"""A norm or a gate that a product makes itself: the same numbers as in a launch of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spqr_numba.errors import InputError
from spqr_numba.kernels import feed as feeds
from spqr_numba.kernels.feed import Feed, fed, matmul_fed
from spqr_numba.kernels.matmul import matmul
from spqr_numba.kernels.prepared import prepare

from ..gpu import assert_no_spills, each_capability, needs_numba_cuda, ptx_of
from .emulator import emulated
from .test_matmul import assert_right, make_x
from .test_matmul_cuda import HALVES, build

NORM, GATE = 1e-5, None  # eps
NAMES = ["paper", "ragged", "no whole load", "one column", "in order", "long"]
each_feed = pytest.mark.parametrize("eps", [NORM, GATE], ids=["norm", "gate"])
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def make_feed(columns: int, eps: float | None, dtype: torch.dtype, size: float = 1.0) -> Feed:
    return Feed(make_x(columns, dtype=dtype, seed=2) * size, eps)


@each_feed
def test_by_hand(eps: float | None) -> None:
    """Of 3 and 4 the root of the mean square is 5 / sqrt(2)."""
    x, feed = torch.tensor([3.0, 4.0]), Feed(torch.tensor([1.0, 10.0]), eps and 0.0)
    norm = torch.tensor([3.0, 40.0]) * 2**0.5 / 5
    gate = torch.tensor([3.0, 40.0]) * torch.sigmoid(x)
    torch.testing.assert_close(fed(x, feed), norm if eps else gate)


@each_feed
@each_half
def test_it_rounds_as_models_do(dtype: torch.dtype, eps: float | None) -> None:
    x, feed = make_x(4, 300, dtype=dtype), make_feed(300, eps, dtype)
    exact = x.double()
    if eps is None:
        exact = exact * torch.sigmoid(exact)
    else:
        exact = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt()
    expected = exact.to(dtype) * feed.beside
    found = fed(x, feed)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


@each_feed
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_without_a_gpu(shape: tuple[int, ...], eps: float | None) -> None:
    matrix = build("ragged")
    columns = matrix.spec.in_features
    x, feed = make_x(*shape, columns, dtype=torch.float16), make_feed(columns, eps, torch.float16)
    assert torch.equal(matmul_fed(x, feed, matrix), matmul(fed(x, feed), matrix))
    with pytest.raises(InputError, match="in_features"):
        matmul_fed(x[..., 1:].contiguous(), Feed(feed.beside[1:], eps), matrix)


@each_feed
@each_half
@pytest.mark.parametrize("name", NAMES[1:5])
def test_emulated(name: str, dtype: torch.dtype, eps: float | None) -> None:
    matrix = build(name)
    columns = matrix.spec.in_features
    x, feed = make_x(1, 1, columns, dtype=dtype) * 3, make_feed(columns, eps, dtype)
    bias = make_x(matrix.spec.out_features, dtype=dtype, seed=1)
    with emulated("late"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeds, "fed", None)
        y = matmul_fed(x, feed, prepare(matrix), bias)
    assert y.shape == (1, 1, matrix.spec.out_features)
    assert_right(y[0], fed(x, feed)[0], matrix, bias)


@pytest.mark.gpu
@each_feed
@each_half
@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name: str, size: float, dtype: torch.dtype, eps: float | None) -> None:
    """Against the input made on a CPU: numbers of it may be rounded the other way."""
    matrix = build(name)
    columns = matrix.spec.in_features
    x, feed = make_x(1, columns, dtype=dtype) * size, make_feed(columns, eps, dtype, 1 / size)
    weight, on_gpu = prepare(matrix.to("cuda")), Feed(feed.beside.cuda(), eps)
    assert feeds.in_one_launch(x.cuda(), on_gpu, weight)
    y = matmul_fed(x.cuda(), on_gpu, weight)
    expected = matmul(fed(x.cuda(), on_gpu), weight)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-2 * expected.abs().max().item())
    error = (y.double() - expected.double()).norm() / expected.double().norm()
    assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.gpu
@each_feed
def test_what_lies_otherwise_is_made_before(eps: float | None) -> None:
    matrix = build("ragged")
    columns = matrix.spec.in_features
    weight, wide = prepare(matrix.to("cuda")), make_x(1, columns + 1, dtype=torch.float16).cuda()
    feed = make_feed(columns, eps, torch.float16)
    feed = Feed(feed.beside.cuda(), eps)
    for x in (wide[:, 1:], make_x(2, columns, dtype=torch.float16).cuda()):
        assert not feeds.in_one_launch(x, feed, weight)
        assert torch.equal(matmul_fed(x, feed, weight), matmul(fed(x, feed), weight))


@needs_numba_cuda
@each_feed
@each_half
@each_capability
@pytest.mark.parametrize("tiles", [1, 100])
def test_ptx(
    tiles: int, capability: tuple[int, int], dtype: torch.dtype, eps: float | None, tmp_path: Path
) -> None:
    """No float64, nothing in local memory, no spills."""
    from spqr_numba.kernels import stream_cuda
    from spqr_numba.kernels.matmul_cuda import crews_of
    from spqr_numba.kernels.product_cuda import SIGNATURE, product_kernel
    from spqr_numba.kernels.unit_cuda import UnitSpec

    kind = feeds.GATE if eps is None else feeds.NORM
    unit, early = UnitSpec(3, 3, 16), capability >= (9, 0)
    warps, stages, _, resident = crews_of(unit, tiles, columns=4096, fed=True)[0]
    spec = stream_cuda.KernelSpec(unit, dtype, warps, stages, early, feed=kind, resident=resident)
    kernel = product_kernel.__wrapped__(spec)
    ptx = ptx_of(kernel, SIGNATURE, capability)
    assert ("rsqrt.approx" if eps else "ex2.approx") in ptx
    assert_no_spills(ptx, capability, tmp_path)
