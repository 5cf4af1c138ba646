"""A prepared weight back to numbers on a GPU: its PTX, its bits in Numba's simulator and on a GPU.

PTX and simulator need the package numba-cuda, and no GPU.
"""

from __future__ import annotations

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.dequantize import dequantize_reference, stored_order
from spqr_numba.kernels.prepared import prepare

from ..gpu import each_capability, needs_numba_cuda, ptx_of, run_in_simulator
from ..problems import make_spec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES: dict[str, tuple[int, int, dict[str, int]]] = {
    "3 bit": (20, 300, {}),
    "4 bit": (17, 70, {"bits": 4, "scale_bits": 4, "zero_bits": 4}),
    "2 bit": (5, 40, {"bits": 2, "scale_bits": 2, "zero_bits": 2}),
    "group 8, stats 64": (70, 90, {"group_size": 8, "stats_group_size": 64}),
}


def build(name: str) -> SpqrMatrix:
    rows, columns, settings = CASES[name]
    return random_matrix(make_spec(rows, columns, **settings), 3)


def expected(matrix: SpqrMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The reference's weight, columns as they are stored, rounded once."""
    stored = dequantize_reference(matrix)[:, stored_order(matrix).numpy()]
    return torch.from_numpy(stored.copy()).to(dtype)


def simulate(matrix: SpqrMatrix, dtype: torch.dtype) -> torch.Tensor:
    """By the kernel in the simulator; only where NUMBA_ENABLE_CUDASIM=1."""
    from numba import njit

    from spqr_numba.kernels import prepared_cuda, scalars

    prepared_cuda.THREADS = 64  # each is a thread of the operating system
    prepared_cuda.array_of = lambda tensor: tensor.numpy()
    prepared_cuda.stream_of = lambda device: 0
    prepared_cuda.half_to_float = njit(lambda bits: scalars.half_to_float(bits))
    prepared_cuda.float_to_half = njit(lambda value: scalars.float_to_half(value))
    prepared_cuda.float_to_bfloat = njit(lambda value: scalars.float_to_bfloat(value))
    return prepared_cuda.dequantize_stored(prepare(matrix), dtype)


def assert_same_bits(name: str, dtype: torch.dtype) -> None:
    matrix = build(name)
    assert torch.equal(simulate(matrix, dtype), expected(matrix, dtype)), name


@needs_numba_cuda
@pytest.mark.slow
def test_same_bits_in_the_simulator() -> None:
    script = (
        f"from {__name__} import *\n"
        "assert_same_bits('3 bit', torch.float32)\n"
        "assert_same_bits('4 bit', torch.bfloat16)\n"
        "assert_same_bits('2 bit', torch.float16)\n"
        "assert_same_bits('group 8, stats 64', torch.float32)\n"
    )
    run_in_simulator(script)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    from spqr_numba.kernels.prepared_cuda import dequantize_stored

    matrix = build(name)
    decoded = dequantize_stored(prepare(matrix.to("cuda")), dtype).cpu()
    assert torch.equal(decoded, expected(matrix, dtype))


@needs_numba_cuda
@each_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ptx(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """No float64, and nothing in local memory."""
    from numba import types

    from spqr_numba.kernels.prepared_cuda import Views, dequantize_kernel

    kernel = dequantize_kernel.__wrapped__(3, 3, 16, dtype)
    arrays = [
        types.Array(number, dimensions, "A" if dimensions in (4, 6) else "C")
        for number, dimensions in (
            (types.int32, 6),
            (types.int32, 4),
            (types.uint16, 5),
            (types.int32, 1),
            (types.int32, 1),
        )
    ]
    written = types.float32 if dtype == torch.float32 else types.uint16
    out = types.Array(written, 2, "C")
    signature = types.NamedTuple(arrays, Views), out, types.int64
    ptx_of(kernel, signature, capability)
