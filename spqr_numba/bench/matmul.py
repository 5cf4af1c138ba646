"""The matrix product, timed beside torch's dense one; matmul_cuda.py does so on a GPU.

A candidate goes through its weights one after another, so many that none is left in a cache when
its turn comes again: that is how a model meets its layers. The candidates take turns, a round each,
so that what else the machine does hits all alike. Every product is checked against float64 before
it is timed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median, quantiles

import torch
from torch.nn.functional import linear

from ..config import SpqrConfig
from ..errors import InputError
from ..format.layout import MatrixSpec
from ..format.matrix import SpqrMatrix
from ..kernels.dequantize import dequantize
from ..kernels.matmul import matmul
from .random_matrix import random_matrix

__all__ = ["measure"]

COLD_BYTES = 96 * 2**20  # of a candidate's weights: three times a large L3
ROUNDS = 8
TOLERANCE = 1e-5
READ_BYTES = 256 * 2**20

logger = logging.getLogger(__name__)

Row = dict[str, str | int | float | None]
Product = Callable[[], object]


def measure(
    *,
    shapes: Sequence[str | tuple[int, int]] = ((4096, 4096),),
    batches: Sequence[int] = (1,),
    bits: int = 3,
    outliers: float = 0.01,
    device: str = "cpu",
    threads: int | None = None,
) -> list[Row]:
    """Rows of a table, one a shape (out_features, in_features) and batch.

    Microseconds are medians, "spread" the distance of the quartiles; GB/s count the bytes of the
    compressed weight, "share" is theirs of the bandwidth. Raises InputError for a shape that is no
    pair.
    """
    sizes = [pair_of(shape) for shape in shapes]
    config = SpqrConfig(bits=bits)
    if torch.device(device).type == "cuda":
        return measure_cuda(sizes, batches, config, outliers)
    if threads:
        torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    rows = []
    for size in sizes:
        spec = MatrixSpec.from_config(config, *size)
        matrices = cold(random_matrix(spec, round(outliers * spec.in_features) or None))
        rows += [noted(measure_shape(matrices, batch, bandwidth)) for batch in batches]
    return rows


def pair_of(shape: str | tuple[int, int]) -> tuple[int, int]:
    """The shape of a weight; InputError for the name of a model's."""
    if isinstance(shape, str):
        raise InputError(f"{shape!r} is no shape of a weight; give ROWSxCOLUMNS")
    return shape


def measure_cuda(
    sizes: Sequence[tuple[int, int]], batches: Sequence[int], config: SpqrConfig, outliers: float
) -> list[Row]:
    """`measure` on a GPU."""
    from . import matmul_cuda

    bandwidth = matmul_cuda.read_bandwidth()
    return [
        noted(matmul_cuda.measure_shape(*size, batch, config, outliers, bandwidth))
        for size in sizes
        for batch in batches
    ]


def noted(row: Row) -> Row:
    """The same row, told at once: all of them may take minutes."""
    logger.info("%s, batch %s: %s us", row["m x n"], row["batch"], row["spqr us"])
    return row


def cold(matrix: SpqrMatrix) -> list[SpqrMatrix]:
    """Copies of a matrix, at least three, that no cache holds together."""
    return [copy_of(matrix) for _ in range(copies(matrix.nbytes))]


def copies(weight_bytes: int) -> int:
    """How many copies of a weight it takes."""
    return max(3, -(-COLD_BYTES // weight_bytes))


def copy_of(matrix: SpqrMatrix) -> SpqrMatrix:
    """The same numbers in other memory."""
    return SpqrMatrix(matrix.spec, {name: t.clone() for name, t in matrix.tensors.items()})


def measure_shape(matrices: list[SpqrMatrix], batch: int, bandwidth: float) -> Row:
    """One row: SpQR, torch fp32 and torch bf16."""
    weight = dequantize(matrices[0])
    x = torch.randn(batch, weight.shape[1])
    check(matmul(x, matrices[0]), x, weight)
    dense = [weight.clone() for _ in range(copies(weight.nbytes))]
    halves = [weight.bfloat16() for _ in range(copies(weight.nbytes // 2))]
    x_half = x.bfloat16()
    times = in_turns(
        {
            "spqr": [partial(matmul, x, matrix) for matrix in matrices],
            "fp32": [partial(linear, x, other) for other in dense],
            "bf16": [partial(linear, x_half, other) for other in halves],
        }
    )
    ours, fp32, bf16 = (median(times[name]) for name in ("spqr", "fp32", "bf16"))
    gigabytes = matrices[0].nbytes / ours / 1e9
    low, _, high = quantiles(times["spqr"], n=4)
    return {
        "m x n": f"{weight.shape[0]} x {weight.shape[1]}",
        "batch": batch,
        "bits": round(matrices[0].bits_per_weight, 3),
        "spqr us": round(ours * 1e6, 1),
        "spread us": round((high - low) * 1e6, 1),
        "fp32 us": round(fp32 * 1e6, 1),
        "bf16 us": round(bf16 * 1e6, 1),
        "fp32 / spqr": round(fp32 / ours, 2),
        "bf16 / spqr": round(bf16 / ours, 2),
        "GB/s": round(gigabytes, 3),
        "read GB/s": round(bandwidth, 1),
        "share": round(gigabytes / bandwidth, 2),
    }


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise AssertionError where y is not x weight^T within fp32 accumulation."""
    exact = x.double() @ weight.double().T
    error = ((y - exact).norm() / exact.norm()).item()
    assert error < TOLERANCE, f"the product is off by {error:g} of its norm"


def in_turns(candidates: dict[str, list[Product]]) -> dict[str, list[float]]:
    """Seconds of each candidate's calls, in rounds over its products; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(ROUNDS + 1):
        for name, products in candidates.items():
            seconds = [seconds_of(product) for product in products]
            if turn:
                times[name] += seconds
    return times


def seconds_of(product: Product) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    product()
    return time.perf_counter() - started


def read_bandwidth() -> float:
    """GB/s at which torch's threads read memory: the best of five sums over 256 MB."""
    values = torch.ones(READ_BYTES // 4)
    return READ_BYTES / min(seconds_of(values.sum) for _ in range(5)) / 1e9
