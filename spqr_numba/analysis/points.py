"""Points of a sweep, the folder that keeps them, and what they say together.

sweep.json      what the points have in common, and every finished point
sweep.csv       the points as a table, for other programs
*-curves.csv    what the options of each layer are worth, where targets of bits ask for it
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from ..errors import CheckpointError
from ..files import write_whole

__all__ = [
    "DENSE",
    "SettingSummary",
    "SweepFolder",
    "SweepPoint",
    "excess",
    "find_dense",
    "frontier",
    "read_sweep",
    "summaries",
]

DENSE = "fp16"
POINTS_FILE = "sweep.json"
TABLE_FILE = "sweep.csv"
FAMILY = re.compile(r".+?(?=,| \d|$)")


@dataclass(frozen=True)
class SweepPoint:
    """What one setting is worth.

    name            of the setting; DENSE for the model as it was
    seed            of the choice of calibration windows; None where nothing is calibrated
    tune            steps of training each block (`compress`)
    tune_model      the same of all blocks together
    tune_codes      whether codes were trained with them
    config          every field of the setting; None for the dense model
    bits            bits a weight of the compressed linears, from the bytes of their buffers
    outlier_share   outliers a weight
    seconds         spent on quantizing weights, without forward passes and Hessians
    perplexity      name of a text -> perplexity of the whole model
    nats            name of a text -> nats a token from the dense model's predictions; None where
                    that was not measured beside it
    target_bits     that the thresholds of all layers were chosen for (`compress`), or None
    per_layer       whether bits, group size and the bits of scales and zeros of each were, too
    """

    name: str
    seed: int | None
    tune: int
    config: dict[str, Any] | None
    bits: float
    outlier_share: float
    seconds: float
    perplexity: dict[str, float]
    target_bits: float | None = None
    per_layer: bool = False
    tune_model: int = 0
    tune_codes: bool = False
    nats: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class SettingSummary:
    """A setting over all its seeds: bits on average, and the perplexity of one text.

    perplexity   geometric mean
    low, high    of the best and of the worst seed
    """

    name: str
    bits: float
    perplexity: float
    low: float
    high: float

    @property
    def family(self) -> str:
        """What it is a variation of: "balanced", "GPTQ"."""
        found = FAMILY.match(self.name)
        return found.group() if found else self.name


class SweepFolder:
    """A folder of points that differ in setting, seed, tuning and target alone.

    common   what they share, in words; points of another `common` cannot be compared with them

    Raises CheckpointError where the folder holds those, or anything else.
    """

    def __init__(self, path: Path, common: dict[str, str]) -> None:
        self.path = path
        self.common = common
        self.points: list[SweepPoint] = []
        if (path / POINTS_FILE).is_file():
            there, self.points = _read(path)
            self._check(there)
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists and holds no sweep; give another folder")
        path.mkdir(parents=True, exist_ok=True)
        self._write()

    def find(self, **wanted: Any) -> SweepPoint | None:
        """The first finished point that has these values in its fields."""
        return next((point for point in self.points if wanted.items() <= vars(point).items()), None)

    def add(self, point: SweepPoint) -> None:
        """Keep a finished point."""
        self.points.append(point)
        self._write()

    def _check(self, there: dict[str, str]) -> None:
        for key in [*self.common, *there]:
            if there.get(key) != self.common.get(key):
                raise CheckpointError(
                    f"{self.path} holds a sweep that this one cannot be compared with: its {key} is"
                    f" {there.get(key)}, and here it is {self.common.get(key)}; give another folder"
                )

    def _write(self) -> None:
        points = [point.to_dict() for point in self.points]
        document = {"common": self.common, "points": points}
        self.write_text(POINTS_FILE, json.dumps(document, indent=1) + "\n")
        self.write_text(TABLE_FILE, _to_csv(self.points))

    def write_text(self, name: str, text: str) -> None:
        """Write a file that is never seen half-written."""
        write_whole(self.path / name, lambda to: to.write_text(text, encoding="utf-8"))


def read_sweep(folder: Path | str) -> list[SweepPoint]:
    """Every finished point in a folder that `sweep` wrote. Raises CheckpointError."""
    return _read(Path(folder).expanduser())[1]


def find_dense(points: Iterable[SweepPoint]) -> SweepPoint | None:
    """The dense model's point among `points`."""
    return next((point for point in points if point.config is None), None)


def excess(point: SweepPoint, dense: SweepPoint) -> dict[str, float]:
    """Name of a text -> ln(perplexity / perplexity of the dense model)."""
    return {
        text: math.log(value / dense.perplexity[text]) for text, value in point.perplexity.items()
    }


def summaries(points: Iterable[SweepPoint], text: str) -> list[SettingSummary]:
    """Every setting among `points` on one text, in their order: all seeds of what was set alike."""
    seeds: dict[str, list[SweepPoint]] = {}
    for point in points:
        tuning = point.tune, point.tune_model, point.tune_codes
        setting = point.config, tuning, point.target_bits, point.per_layer
        seeds.setdefault(json.dumps(setting, sort_keys=True), []).append(point)
    return [_summarize(group[0].name, group, text) for group in seeds.values()]


def frontier(settings: Iterable[SettingSummary]) -> list[SettingSummary]:
    """Those that no other beats in bits and perplexity at once, by bits."""
    best: list[SettingSummary] = []
    for setting in sorted(settings, key=lambda setting: (setting.bits, setting.perplexity)):
        if not best or setting.perplexity < best[-1].perplexity:
            best.append(setting)
    return best


def _read(path: Path) -> tuple[dict[str, str], list[SweepPoint]]:
    """(what is common, points) of a folder."""
    try:
        document = json.loads((path / POINTS_FILE).read_text(encoding="utf-8"))
        return document["common"], [SweepPoint(**point) for point in document["points"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read a sweep from {path}: {error}") from error


def _summarize(name: str, points: Sequence[SweepPoint], text: str) -> SettingSummary:
    perplexities = [point.perplexity[text] for point in points]
    return SettingSummary(
        name,
        bits=fmean(point.bits for point in points),
        perplexity=geometric_mean(perplexities),
        low=min(perplexities),
        high=max(perplexities),
    )


def _to_csv(points: Sequence[SweepPoint]) -> str:
    """A header, then a line a point; the excess where the dense model is among them."""
    dense = find_dense(points)
    rows = [_row(point, dense) for point in points]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _row(point: SweepPoint, dense: SweepPoint | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "setting": point.name,
        "seed": point.seed,
        "tune": point.tune,
        "tune_model": point.tune_model,
        "tune_codes": point.tune_codes,
        "target_bits": point.target_bits,
        "per_layer": point.per_layer,
        "bits": point.bits,
        "outlier_share": point.outlier_share,
        "seconds": point.seconds,
    }
    row |= {f"perplexity {text}": value for text, value in point.perplexity.items()}
    if dense is not None:
        row |= {f"excess {text}": value for text, value in excess(point, dense).items()}
        nats = point.nats or dict.fromkeys(point.perplexity)
        row |= {f"nats {text}": value for text, value in nats.items()}
    return row
