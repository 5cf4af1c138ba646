"""The CUDA twin of the column loop: its PTX, its bits in Numba's simulator and on a GPU.

PTX and simulator need the package numba-cuda, and no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from spqr_numba.config import SpqrConfig
from spqr_numba.format.layout import MatrixSpec
from spqr_numba.kernels import columns, joint
from spqr_numba.kernels.joint import Levels

from ..gpu import NEW, OLD, needs_numba_cuda, ptx_of, run_in_simulator

INF = float("inf")
THRESHOLD = 4e-5  # on err^2 of `make_loop`: a few percent are outliers

NO_HESSIAN = {"use_hessian": False, "outlier_threshold": None, "permutation": "identity"}

# (rows, columns), columns a launch, T for the fit, T, settings
CASES: dict[str, tuple[tuple[int, int], int, float, float, dict[str, Any]]] = {
    "paper": ((20, 24), 16, THRESHOLD, THRESHOLD, {}),
    "8/8": ((35, 40), 24, THRESHOLD, THRESHOLD, {"group_size": 8, "stats_group_size": 8}),
    "whole row, fp16": (
        (33, 24), 12, INF, THRESHOLD, {"group_size": None, "scale_bits": 16, "zero_bits": 16},
    ),
    "joint": ((20, 24), 16, THRESHOLD, THRESHOLD, {"fit": "joint"}),
    "joint, 2/2, 8/8, whole row": (
        (35, 24), 12, INF, INF, {
            "fit": "joint", "scale_bits": 2, "zero_bits": 2,
            "group_size": None, "stats_group_size": 8,
        },
    ),
    "joint, 4/4, 8/32": (
        (35, 16), 8, THRESHOLD, THRESHOLD, {
            "fit": "joint", "scale_bits": 4, "zero_bits": 4, "group_size": 8,
            "stats_group_size": 32,
        },
    ),
    "joint, rtn": ((20, 24), 16, INF, INF, {"fit": "joint", **NO_HESSIAN}),
    "round zero": ((9, 20), 16, THRESHOLD, INF, {"round_zero": True, "bits": 4}),
}  # fmt: skip


def make_loop(
    rows: int, width: int, config: SpqrConfig
) -> tuple[Any, torch.Tensor | None, MatrixSpec]:
    """Buffers at the start of a walk, and U [n, n], or None where nothing is propagated."""
    random = torch.Generator().manual_seed(rows + width)
    weight = torch.randn(width, rows, generator=random) * 0.02
    weight[torch.rand(width, rows, generator=random) < 0.02] *= 6
    upper = torch.triu(torch.randn(width, width, generator=random) * 0.1)
    upper.diagonal().uniform_(0.5, 1.5, generator=random)
    spec = MatrixSpec.from_config(config, rows, width)
    loop = columns.ColumnLoop.start(weight, upper.diagonal().clone(), spec)
    loop = loop._replace(errors=torch.zeros_like(weight))
    return loop, upper if config.use_hessian else None, spec


def walk(name: str, device: str = "cpu") -> columns.ColumnLoop:
    """The buffers after walking all columns, on the CPU again."""
    shape, width, fit_threshold, threshold, settings = CASES[name]
    config = SpqrConfig(**settings)
    loop, upper, spec = make_loop(*shape, config)
    if device != "cpu":
        loop = columns.ColumnLoop(*(tensor.to(device) for tensor in loop))
        loop = loop._replace(sums=torch.zeros(spec.out_features, 2, device=device))
    step = columns.column_walk(
        loop,
        spec,
        None if upper is None else upper.to(device),
        fit_threshold=fit_threshold,
        threshold=threshold,
        round_zero=config.round_zero,
        joint=config.fit == "joint",
    )
    for start in range(0, spec.in_features, width):
        step(start, min(start + width, spec.in_features))
    return columns.ColumnLoop(*(tensor.cpu() for tensor in loop))


# compiled functions whose results the simulator adds up: called from Python they return float64
SUMMED_OUTSIDE = (
    "starting_levels",
    "refitted",
    "grid_of_pair",
    "cost_of_nothing",
    "error_term",
    "row_moments",
)


def in_float32(function: Callable) -> Callable:
    """A function from Python that returns float32 numbers, as it does inside compiled code."""

    def call(*arguments: Any) -> Any:
        found = function(*arguments)
        if not isinstance(found, tuple):
            return np.float32(found)
        return Levels(*map(np.float32, found)) if len(found) == 4 else tuple(map(np.float32, found))

    return call


def simulate(name: str) -> columns.ColumnLoop:
    """`walk`, by the CUDA kernel in the simulator; only where NUMBA_ENABLE_CUDASIM=1."""
    from numba import njit

    from spqr_numba.kernels import columns_cuda, joint_cuda, scalars

    columns_cuda.THREADS = 64  # each is a thread of the operating system
    columns_cuda.product = njit(lambda one, other: scalars.product(one, other))
    columns_cuda.float_to_half = njit(lambda value: scalars.float_to_half(value))
    columns_cuda.round_to_even = njit(lambda value: scalars.round_to_even(value))
    joint_cuda.float_to_half = columns_cuda.float_to_half
    joint_cuda.product = columns_cuda.product
    for name_of in SUMMED_OUTSIDE:
        setattr(joint_cuda, name_of, in_float32(getattr(joint, name_of)))
    shape, width, fit_threshold, threshold, settings = CASES[name]
    config = SpqrConfig(**settings)
    loop, upper, spec = make_loop(*shape, config)
    loop = loop._replace(sums=torch.zeros(spec.out_features, 2))
    tile_rows = columns.tile_rows(spec)
    chosen = columns.Settings(
        spec.bits,
        spec.scale_bits,
        spec.zero_bits,
        spec.group_size,
        spec.stats_group_size,
        tile_rows,
        config.round_zero,
        np.float32(fit_threshold),
        np.float32(threshold),
        config.fit == "joint",
    )
    given = np.empty((0, 0), np.float32) if upper is None else upper.numpy()
    threads = tile_rows, columns_cuda.THREADS // tile_rows
    inside = columns_cuda.fits_inside(tile_rows, spec.group_size)
    kernel = columns_cuda.walk_kernel(tile_rows, chosen.joint, inside)
    kernel = kernel[columns.tiles(spec), threads]
    for start in range(0, spec.in_features, width):
        stop = min(start + width, spec.in_features)
        kernel(loop.arrays(), given, chosen, start, stop)
    return loop


def assert_same_bits(ours: columns.ColumnLoop, theirs: columns.ColumnLoop) -> None:
    for name, one, other in zip(ours._fields, ours, theirs, strict=True):
        if name != "sums":
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
    ours_sum, theirs_sum = ours.sums.double().sum(0), theirs.sums.double().sum(0)
    torch.testing.assert_close(ours_sum, theirs_sum, rtol=1e-5, atol=0)


@needs_numba_cuda
@pytest.mark.slow
def test_same_bits_in_the_simulator() -> None:
    script = (
        f"from {__name__} import *\n"
        "for name in sorted(CASES.keys() - {'8/8', 'round zero'}):\n"
        "    assert_same_bits(walk(name), simulate(name))\n"
    )
    run_in_simulator(script)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_a_gpu(name: str) -> None:
    assert_same_bits(walk(name), walk(name, "cuda"))


@needs_numba_cuda
@pytest.mark.parametrize(  # each pair of two of them once, and the default's
    ("joint_fit", "inside", "width", "capability"),
    [
        (False, True, 32, OLD),
        (False, True, 64, NEW),
        (False, False, 128, OLD),
        (True, True, 32, NEW),
        (True, False, 64, OLD),
        (True, True, 64, NEW),
        (True, True, 128, NEW),
    ],
    ids=str,
)
def test_ptx(joint_fit: bool, inside: bool, width: int, capability: tuple[int, int]) -> None:
    """No float64, nothing in local memory, and no product fused that must be rounded."""
    from spqr_numba.kernels.columns_cuda import walk_kernel

    kernel = walk_kernel.__wrapped__(width, joint_fit, inside)
    ptx = ptx_of(kernel, signature(), capability)
    assert set(re.findall(r"fma\S*", ptx)) <= {"fma.rn.f32"}
    if not joint_fit:
        assert len(re.findall(r"fma\.rn\.f32", ptx)) == 2  # decoding a scale, decoding a zero


def signature() -> tuple[Any, ...]:
    """Numba's types of (loop, upper, settings, start, stop)."""
    from numba import types

    loop, _, _ = make_loop(4, 4, SpqrConfig())
    numbers = {
        torch.float32: types.float32,
        torch.float64: types.float32,  # the sums, which are float32 on a GPU
        torch.uint8: types.uint8,
        torch.uint16: types.uint16,
    }
    arrays = [types.Array(numbers[tensor.dtype], tensor.ndim, "C") for tensor in loop]
    settings = [types.int64] * 6 + [types.boolean] + [types.float32] * 2 + [types.boolean]
    return (
        types.NamedTuple(arrays, columns.ColumnLoop),
        types.Array(types.float32, 2, "C"),
        types.NamedTuple(settings, columns.Settings),
        types.int64,
        types.int64,
    )
