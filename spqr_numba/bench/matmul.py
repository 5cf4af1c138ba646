"""The matrix product, timed beside torch's dense one.

Weights take turns, so many that none is left in a cache when its turn comes again: that is how a
model meets its layers. The candidates take turns too, so that what else the machine does hits all
alike. Every product is checked against float64 before it is timed.
"""

from __future__ import annotations

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

COLD_BYTES = 96 * 2**20  # of all weights that take turns: three times a large L3
REPEATS = 40
TOLERANCE = 1e-5
READ_BYTES = 256 * 2**20

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
    compressed weight. Raises InputError for another device or a shape that is no pair.
    """
    if torch.device(device).type != "cpu":
        raise InputError(f"the product has no kernel for {device} yet; use --device cpu")
    if threads:
        torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    rows = []
    for shape in shapes:
        if isinstance(shape, str):
            raise InputError(f"{shape!r} is no shape of a weight; give ROWSxCOLUMNS")
        spec = MatrixSpec.from_config(SpqrConfig(bits=bits), *shape)
        matrices = cold([random_matrix(spec, outliers)])
        rows += [measure_shape(matrices, batch, bandwidth) for batch in batches]
    return rows


def cold(matrices: list[SpqrMatrix]) -> list[SpqrMatrix]:
    """Copies of one matrix, at least three, that no cache holds together."""
    count = max(3, -(-COLD_BYTES // matrices[0].nbytes))
    return [copy_of(matrices[0]) for _ in range(count)]


def copy_of(matrix: SpqrMatrix) -> SpqrMatrix:
    """The same numbers in other memory."""
    return SpqrMatrix(matrix.spec, {name: t.clone() for name, t in matrix.tensors.items()})


def measure_shape(matrices: list[SpqrMatrix], batch: int, bandwidth: float) -> Row:
    """One row: SpQR, torch fp32 and torch bf16 in turns."""
    weight = dequantize(matrices[0])
    x = torch.randn(batch, weight.shape[1])
    check(matmul(x, matrices[0]), x, weight)
    dense = [weight.clone() for _ in range(3)]
    halves = [weight.bfloat16() for _ in range(4)]
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
    }


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise AssertionError where y is not x weight^T within fp32 accumulation."""
    exact = x.double() @ weight.double().T
    error = ((y - exact).norm() / exact.norm()).item()
    assert error < TOLERANCE, f"the product is off by {error:g} of its norm"


def in_turns(candidates: dict[str, list[Product]]) -> dict[str, list[float]]:
    """Seconds of each candidate's calls; each has several products, on other weights."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(REPEATS):
        for name, products in candidates.items():
            product = products[turn % len(products)]
            started = time.perf_counter()
            product()
            times[name].append(time.perf_counter() - started)
    return {name: seconds[len(seconds) // 10 :] for name, seconds in times.items()}


def read_bandwidth() -> float:
    """GB/s at which torch's threads read memory: the best of five sums over 256 MB."""
    values = torch.ones(READ_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    return READ_BYTES / best / 1e9
