"""The CUDA twin of dequantize: its PTX, its bits in Numba's simulator, and rows of any length.

test_dequantize.py has all kinds of matrices, on a GPU too. PTX and simulator need the package
numba-cuda, and no GPU.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.dequantize import dequantize, dequantize_reference

from ..gpu import NEW, OLD, needs_numba_cuda, ptx_of, run_in_simulator
from ..problems import make_spec
from .test_dequantize import build

EIGHT_BITS = {"bits": 8, "group_size": 8}
FP16_STATISTICS = {"scale_bits": 16, "zero_bits": 16}

# (rows, columns), settings, rows of a block, whether a row is in shared memory at once
SHAPES: dict[str, tuple[tuple[int, int], dict[str, int], int, bool]] = {
    "4096": ((19, 4096), {}, 8, True),
    "11008": ((19, 11008), {}, 4, True),
    "28672": ((19, 28672), {}, 2, True),
    "32768, 8 bit": ((5, 32768), EIGHT_BITS, 1, True),
    "40000, 8 bit": ((5, 40000), EIGHT_BITS, 1, False),
    "groups across runs": ((5, 45016), EIGHT_BITS | {"group_size": 40}, 1, False),
    "whole row": ((5, 50000), {"bits": 8, "group_size": 50000}, 1, False),
    "wide indices": ((3, 70001), FP16_STATISTICS, 1, True),
}


def build_long(name: str) -> SpqrMatrix:
    shape, settings, _, _ = SHAPES[name]
    return random_matrix(make_spec(*shape, **settings), 50)


@needs_numba_cuda
@pytest.mark.parametrize("name", SHAPES)
def test_blocks(name: str) -> None:
    """As many rows as shared memory holds."""
    from spqr_numba.kernels.dequantize_cuda import SHARED_WORDS, Decoding

    (rows, columns), settings, tile_rows, whole = SHAPES[name]
    spec = make_spec(rows, columns, **settings)
    how = Decoding.of(spec, sparse=True, dtype=torch.float32)
    chunks = how.chunks_at_once(spec)
    assert how.rows == tile_rows
    assert (chunks == spec.chunks) == whole
    assert how.words_of(spec, chunks) <= SHARED_WORDS


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_long_rows_on_a_gpu(name: str) -> None:
    matrix = build_long(name)
    weight = dequantize(matrix.to("cuda")).cpu().numpy()
    assert np.array_equal(weight, dequantize_reference(matrix))


def simulate(matrix: SpqrMatrix, dtype: torch.dtype, shared_words: int) -> torch.Tensor:
    """dequantize by the CUDA kernel in the simulator; only where NUMBA_ENABLE_CUDASIM=1."""
    from numba import njit

    from spqr_numba.kernels import dequantize_cuda, scalars

    dequantize_cuda.THREADS = 64  # each is a thread of the operating system
    dequantize_cuda.SHARED_WORDS = shared_words
    dequantize_cuda.array_of = lambda tensor: tensor.numpy()
    dequantize_cuda.stream_of = lambda device: 0
    dequantize_cuda.funnel_shift = njit(lambda *words: scalars.funnel_shift(*words))
    dequantize_cuda.integer_to_float = njit(lambda value: scalars.integer_to_float(value))
    dequantize_cuda.half_to_float = njit(lambda bits: scalars.half_to_float(bits))
    dequantize_cuda.float_to_half = njit(lambda value: scalars.float_to_half(value))
    dequantize_cuda.float_to_bfloat = njit(lambda value: scalars.float_to_bfloat(value))
    dequantize_cuda.dequantize_kernel.cache_clear()
    out = torch.empty(matrix.spec.out_features, matrix.spec.in_features, dtype=dtype)
    dequantize_cuda.launch_dequantize(matrix, out)
    return out


def assert_same_bits(name: str, dtype: torch.dtype, shared_words: int) -> None:
    matrix = build(name)
    expected = torch.from_numpy(dequantize_reference(matrix)).to(dtype)
    assert torch.equal(simulate(matrix, dtype, shared_words), expected), name


@needs_numba_cuda
@pytest.mark.slow
def test_same_bits_in_the_simulator() -> None:
    """Whole rows at once, and rows that go in several runs."""
    script = (
        f"from {__name__} import *\n"
        "assert_same_bits('ragged', torch.float32, 1024)\n"
        "assert_same_bits('2 bit', torch.bfloat16, 1024)\n"
        "assert_same_bits('5 bit', torch.float16, 8)\n"
        "assert_same_bits('no outliers', torch.float32, 1024)\n"
    )
    run_in_simulator(script)


@needs_numba_cuda
@pytest.mark.parametrize(
    ("dtype", "settings", "capability"),
    [
        (torch.float32, {}, OLD),
        (torch.float16, {"bits": 2, "scale_bits": 2, "zero_bits": 4, "group_size": 8}, NEW),
        (torch.bfloat16, {"bits": 5} | FP16_STATISTICS, OLD),
    ],
    ids=["paper", "2 bit", "5 bit"],
)
def test_ptx(
    dtype: torch.dtype,
    settings: dict[str, int],
    capability: tuple[int, int],
) -> None:
    """No float64, nothing in local memory, and no product fused that must be rounded."""
    from spqr_numba.kernels.dequantize_cuda import Decoding, dequantize_kernel

    spec = make_spec(64, 64, **settings)
    how = Decoding.of(spec, sparse=True, dtype=dtype)
    kernel = dequantize_kernel.__wrapped__(how)
    ptx = ptx_of(kernel, signature(how), capability)
    fused = re.findall(r"fma\S*", ptx)  # decoding scales and zeros
    assert set(fused) <= ({"fma.rn.f32"} if how.scale_bits < 16 else set())


def signature(how: Any) -> tuple[Any, ...]:
    """Numba's types of a kernel's arguments."""
    from numba import types

    from spqr_numba.kernels.dequantize_cuda import Outliers, Statistics

    def array(element: Any, dimensions: int) -> Any:
        return types.Array(element, dimensions, "C")

    def statistics(bits: int) -> Any:
        words, halves = array(types.uint32, 1), array(types.uint16, 2)
        arrays = [array(types.uint16, 1)] * 3 if bits == 16 else [words, halves, halves]
        return types.NamedTuple(arrays, Statistics)

    indices, halves = array(types.int32, 1), array(types.uint16, 1)
    written = types.float32 if how.dtype == torch.float32 else types.uint16
    return (
        array(types.uint32, 2),
        statistics(how.scale_bits),
        statistics(how.zero_bits),
        types.NamedTuple([indices, halves, halves], Outliers),
        indices,
        indices,
        array(written, 2),
        types.int32,
    )
