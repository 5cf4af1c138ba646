"""The matrix product on a GPU, timed beside what people use today (rivals.py).

A candidate's products with many copies of its weight, more than a cache holds, are captured in one
CUDA graph, as a decode step is; its replays are timed with the device's own clock, one candidate
after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from ..config import SpqrConfig
from ..decoding import capturing
from ..errors import SpqrError
from ..format.layout import MatrixSpec
from ..format.matrix import SpqrMatrix
from ..kernels.dequantize import dequantize
from ..kernels.matmul import matmul
from ..kernels.prepared import PreparedMatrix, can_prepare, prepare
from .random_model import random_weight
from .rivals import RIVALS, Product

__all__ = ["measure_shape", "read_bandwidth"]

COLD_BYTES = 320 * 2**20  # of a candidate's weights: several times an L2
LEAST_PRODUCTS = 24  # of a graph
ROUNDS = 20
TOLERANCE = 2e-3  # of the result's norm: fp16 has 2^-11
READ_BYTES = 2**30

logger = logging.getLogger(__name__)

Row = dict[str, str | int | float | None]
Weight = SpqrMatrix | PreparedMatrix


def measure_shape(
    rows: int, columns: int, batch: int, config: SpqrConfig, outliers: float, bandwidth: float
) -> Row:
    """One row of the table: SpQR and every rival that is installed and takes the shape.

    Raises AssertionError where our product is wrong, SpqrError where a rival takes the GPU down.
    """
    device = torch.device("cuda")
    spec = MatrixSpec.from_config(config, rows, columns)
    matrix = random_weight(spec, outliers, device)
    weight = prepare(matrix) if can_prepare(matrix) else matrix
    x = torch.randn(batch, columns, device=device, dtype=torch.float16)
    check(matmul(x, weight), x, dequantize(matrix))
    del matrix
    ours = [partial(_multiply, copy) for copy in cold(lambda: copy_of(weight), weight.nbytes)]
    times = {"spqr": timed(ours, x)}
    for name, make in RIVALS.items():
        try:
            times[name] = timed_rival(partial(make, rows, columns), x)
        except Exception as error:  # whatever a rival raises, the others are still to be timed
            leave_out(f"{name} at {rows} x {columns}, batch {batch}", error)
        torch.cuda.empty_cache()
    spqr = median(times["spqr"])
    low, _, high = quantiles(times["spqr"], n=4)
    row: Row = {
        "m x n": f"{rows} x {columns}",
        "batch": batch,
        "bits": round(8 * weight.nbytes / (rows * columns), 3),
        "spqr us": round(spqr, 2),
        "spread us": round(high - low, 2),
    }
    for name in RIVALS:
        row[f"{name} us"] = round(median(times[name]), 2) if name in times else None
    row["fp16 / spqr"] = round(median(times["fp16"]) / spqr, 2)
    row["GB/s"] = round(weight.nbytes / spqr / 1e3)
    row["read GB/s"] = round(bandwidth)
    row["share"] = round(weight.nbytes / spqr / 1e3 / bandwidth, 2)
    return row


def timed_rival(make: Callable[[], Product], x: torch.Tensor) -> list[float]:
    """`timed`, of as many random weights as it takes."""
    before = torch.cuda.memory_allocated()
    first = make()
    return timed([first, *cold(make, torch.cuda.memory_allocated() - before)], x)


def leave_out(rival: str, error: Exception) -> None:
    """Say why it is not timed; SpqrError where nothing else will be in this process either."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    logger.info("%s: left out: %s", rival, reason)
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise SpqrError(
            f"the GPU is lost to this process since {rival} ({reason}); uninstall that rival to"
            " time the others"
        ) from lost


def _multiply(weight: Weight, x: torch.Tensor) -> torch.Tensor:
    return matmul(x, weight)


def copy_of(weight: Weight) -> Weight:
    """The same numbers in other memory."""
    return type(weight)(weight.spec, {name: t.clone() for name, t in weight.tensors.items()})


def cold(make: Callable[[], Any], weight_bytes: int) -> list[Any]:
    """As many of something as it takes for none to be in a cache when its turn comes again."""
    return [make() for _ in range(max(3, -(-COLD_BYTES // weight_bytes)))]


def timed(products: Sequence[Product], x: torch.Tensor) -> list[float]:
    """Microseconds a product, of each replay of a graph of all products.

    Raises RuntimeError where a product cannot be captured; what is timed next is none the worse.
    """
    products = list(products) * -(-LEAST_PRODUCTS // len(products))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # there the weights may still be in the making
    with torch.cuda.stream(stream):
        for product in products:
            product(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream):
            for product in products:
                product(x)
    return [1e3 * milliseconds_of(graph.replay) / len(products) for _ in range(ROUNDS + 1)][1:]


def milliseconds_of(run: Callable[[], object]) -> float:
    """How long the device takes for what is queued."""
    before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    behind.record()
    behind.synchronize()
    return before.elapsed_time(behind)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise AssertionError where y is not x weight^T within what fp16 can hold."""
    exact = x.double() @ weight.double().T
    error = ((y - exact).norm() / exact.norm()).item()
    assert error < TOLERANCE, f"the product is off by {error:g} of its norm"


def read_bandwidth() -> float:
    """GB/s at which torch reads memory: the best of ten sums over 1 GB."""
    values = torch.ones(READ_BYTES // 4, device="cuda")
    values.sum()
    return READ_BYTES / min(milliseconds_of(values.sum) for _ in range(10)) / 1e6
