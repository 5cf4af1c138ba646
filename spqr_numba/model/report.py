"""What a compression run tells about itself: a row a layer, bits, seconds."""

from __future__ import annotations

import csv
import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config import SpqrConfig
from ..errors import CheckpointError
from ..format.layout import UNQUANTIZED_BITS, MatrixSpec, index_dtype

__all__ = [
    "LAYERS_FILE",
    "MODEL_TUNING_FILE",
    "TUNING_FILE",
    "Clock",
    "CompressionReport",
    "LayerRow",
    "TunedRow",
    "formula_bits",
    "read_rows",
    "rows_to_csv",
]

LAYERS_FILE = "layers.csv"
TUNING_FILE = "tuning.csv"
MODEL_TUNING_FILE = "model_tuning.csv"
SECOND_LEVEL_BITS = 2 * 16  # the scale and the zero of a statistic's codes
OUTLIER_VALUE_BITS = 16
ROW_OFFSET_BITS = 32

READERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: text == "True",
    "int | None": lambda text: int(text) if text else None,
    "float | None": lambda text: float(text) if text else None,
}
"""Type of a field, as it is annotated -> what reads it."""


@dataclass(frozen=True)
class LayerRow:
    """One compressed linear, as a line of layers.csv.

    layer           full module name
    rows, columns   out_features, in_features
    code_bits ... outlier_threshold   its settings
    loss            tr((W - W_hat) H (W - W_hat)^T); without H, the squared error
    relative_loss   loss over tr(W H W^T)
    outlier_share   outliers a weight
    threshold       the outlier threshold T on err^2, inf where no outliers are kept
    damping         share of mean(diag H) that was added in the end
    error_before    sum of err^2 as quantized, before outliers are taken out
    error_after     the same after
    bits            bits a weight, from the bytes on disk
    formula_bits    bits a weight, by `formula_bits`
    rounded         True where it was rounded to nearest, by setting or because H failed
    seconds         spent on this weight
    """

    layer: str
    rows: int
    columns: int
    code_bits: int
    group_size: int | None
    scale_bits: int
    zero_bits: int
    outlier_threshold: float | None
    loss: float
    relative_loss: float
    outlier_share: float
    threshold: float
    damping: float
    error_before: float
    error_after: float
    bits: float
    formula_bits: float
    rounded: bool
    seconds: float

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def settings(self, config: SpqrConfig) -> SpqrConfig:
        """`config` with what was chosen for this layer."""
        return replace(
            config,
            bits=self.code_bits,
            group_size=self.group_size,
            scale_bits=self.scale_bits,
            zero_bits=self.zero_bits,
            outlier_threshold=self.outlier_threshold,
        )

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return round(self.bits * self.weights / 8)


@dataclass(frozen=True)
class TunedRow:
    """One tuned block, as a line of tuning.csv; or a whole model, as that of model_tuning.csv.

    block           full module name; "model" for the whole, whose error is the Kullback-Leibler
                    divergence from the dense model's predictions, in nats a token
    error_before    mean over tokens of the squared error of its output over the square of the dense
                    block's, on windows that are held back from the training; before it
    error_after     the same after; equal where the block was left as it was
    steps           of training that led there, 0 where the block was left as it was
    seconds         spent on this block
    """

    block: str
    error_before: float
    error_after: float
    steps: int
    seconds: float


Row = TypeVar("Row", LayerRow, TunedRow)


@dataclass(frozen=True)
class CompressionReport:
    """A finished run.

    out       the folder
    layers    a row a compressed linear, in the order of the model
    seconds   phase -> seconds: prepare, gradients, survey, read, forward, hessian, factorise,
              quantize, tune, write (of this run only, where it continued another)
    bytes     of all files in the folder
    tuned     a row a tuned block, none without tuning; the losses in `layers` are those before it
    model     how tuning the whole model went, None without that
    """

    out: Path
    layers: list[LayerRow]
    seconds: dict[str, float]
    bytes: int
    tuned: list[TunedRow] = field(default_factory=list)
    model: TunedRow | None = None

    @property
    def bits(self) -> float:
        """Bits a weight over all compressed linears, from the bytes on disk."""
        return self._average("bits")

    @property
    def formula_bits(self) -> float:
        """Bits a weight over all compressed linears, by `formula_bits`."""
        return self._average("formula_bits")

    @property
    def outlier_share(self) -> float:
        """Outliers a weight over all compressed linears."""
        return self._average("outlier_share")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "out": str(self.out),
            "bits": self.bits,
            "formula_bits": self.formula_bits,
            "outlier_share": self.outlier_share,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "layers": [asdict(row) for row in self.layers],
            "tuned": [asdict(row) for row in self.tuned],
            "model": self.model and asdict(self.model),
        }

    def _average(self, column: str) -> float:
        weights = sum(row.weights for row in self.layers)
        return sum(row.weights * getattr(row, column) for row in self.layers) / weights


class Clock:
    """Seconds by phase; a phase inside another is not counted twice.

    clock = Clock()
    with clock("forward"):
        with clock("hessian"):
            ...

    A GPU works on behind our back, so each phase waits until `device` is done.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside for `phase`."""
        self._charge()
        self._running.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def formula_bits(config: SpqrConfig, spec: MatrixSpec, outlier_share: float) -> float:
    """Bits a weight by the formula of DESIGN.md, for a matrix of any size.

    Ragged groups and stats blocks, row offsets and the permutation are counted, which
    `SpqrConfig.formula_bits` leaves out because they vanish in large matrices.
    """
    rows, columns = spec.out_features, spec.in_features
    index_bits = 8 * index_dtype(columns).itemsize
    bits = float(spec.bits * rows * columns)
    for statistic_bits in (spec.scale_bits, spec.zero_bits):
        bits += statistic_bits * rows * spec.groups
        if statistic_bits != UNQUANTIZED_BITS:
            bits += SECOND_LEVEL_BITS * spec.stats_groups * spec.groups
    if config.outlier_threshold is not None:
        bits += outlier_share * rows * columns * (index_bits + OUTLIER_VALUE_BITS)
        bits += ROW_OFFSET_BITS * (rows + 1)
    if config.permutation != "identity":
        bits += index_bits * columns
    return bits / (rows * columns)


def rows_to_csv(rows: Sequence[LayerRow] | Sequence[TunedRow]) -> str:
    """layers.csv or tuning.csv: a header, then a line a row; "" for no rows."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, [f.name for f in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def read_rows(text: str, kind: type[Row]) -> list[Row]:
    """The rows of a layers.csv (kind LayerRow) or tuning.csv, as `rows_to_csv` wrote it.

    Raises CheckpointError where another version wrote it, or it is damaged.
    """
    readers = {f.name: READERS[str(f.type)] for f in fields(kind)}
    try:
        return [
            kind(**{name: readers[name](value) for name, value in line.items()})
            for line in csv.DictReader(io.StringIO(text))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the log of the layers is not what this version writes ({error}); compress again, or"
            " delete it: it tells of losses, and no weight depends on it"
        ) from error
