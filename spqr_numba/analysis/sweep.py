"""Many settings on one model: bits and perplexity of each, kept in a folder that can grow.

Each setting is compressed by `compress`, every block calibrated on what the compressed ones before
it give, and the folder that this wrote is loaded and measured: a point is what `spqr compress` and
`spqr eval` give for the setting. Nothing is shared between settings. Hessians of the dense model
could be made once for all, but they are not those that a setting meets: on the bundled model they
move its perplexity by up to a percent, and `true_sequential` would mean nothing.

The one exception is what targets of bits are reached by: what the options of each layer are worth
is the same for all targets of a setting, a seed and a number of calibrated windows, and found once:
OUT keeps it, in a file of its own.

In work, OUT also holds a checkpoint under a name made from its setting and seed, so that the same
call continues it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config import SpqrConfig
from ..errors import ConfigError, NumericsError
from ..evaluate.perplexity import perplexity, perplexity_beside
from ..model.blocks import check_causal, check_dense, find_blocks, plan
from ..model.budget import Curves, Target, read_curves
from ..model.calibration import Dataset, load_texts, window_length
from ..model.compress import COMPRESSING, CURVES_FILE, compress
from ..model.integration import load_model
from ..model.progress import Progress, begin
from ..model.report import LAYERS_FILE, LayerRow, read_rows
from ..model.skeleton import build_skeleton
from ..model.source import Source, open_source
from ..model.survey import check_target
from .checkpoint import inspect_checkpoint
from .findings import totals
from .points import DENSE, SweepFolder, SweepPoint

__all__ = ["sweep"]

DENSE_BITS = 16.0
KEYWORDS = ("tune", "tune_model", "tune_codes", "target_bits", "per_layer")
Tunings = tuple[int, int, bool]
"""tune, tune_model and tune_codes of `compress`."""
NO_TUNING: Tunings = (0, 0, False)
STEPS = 100  # of a progress bar for each point: half of them compress it, half measure it


def sweep(
    model: str | None,
    settings: Mapping[str, SpqrConfig],
    texts: Mapping[str, torch.Tensor],
    out: Path | str,
    *,
    seeds: Sequence[int] = (0,),
    tune: Sequence[int] = (0,),
    tune_model: Sequence[int] = (0,),
    tune_codes: bool = False,
    targets: Sequence[Target] = (),
    dataset: Dataset | Sequence[Dataset] = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    device: str = "cpu",
    dense: bool = True,
    progress: Progress | None = None,
) -> Iterator[SweepPoint]:
    """The point of the dense model and of each named setting, target, tuning and seed, one by one.

    model      folder, .gguf file, hub name, or None for the bundled model; opened once
    settings   name -> setting; of equal ones the first counts
    texts      name -> int64 [N, L] tokens to measure on
    out        folder that keeps the points; those that it holds are not made again
    seeds      of the choice of calibration windows
    tune       steps of training each block: a point for each, where anything is calibrated
    tune_model   the same of training all blocks together
    tune_codes   train codes too, where all blocks are trained
    targets    bits to come to: settings that keep outliers make a point for each, and none else
    dataset, nsamples, seqlen, device   as for `compress`
    dense      measure the dense model too, and predictions beside its own; it must fit in memory
               whole then, together with a compressed one
    progress   a bar over all that is still to do

    Raises CheckpointError where `out` holds anything else, and what `compress`, `load_model` and
    `perplexity` do, for a model or a setting that cannot be handled before any is measured; a
    NumericsError names the setting.
    """
    source = open_source(model)
    runs = _runs(settings, seeds, _tunings(tune, tune_model, tune_codes), targets, dense)
    _check(source, runs)
    calibrated_on = load_texts(dataset, source.tokenizer())
    calibration: dict[str, Any] = {
        "dataset": calibrated_on,
        "nsamples": nsamples,
        "seqlen": window_length(source.config, seqlen),
        "device": device,
    }
    folder = SweepFolder(Path(out).expanduser(), _common(source, calibrated_on, calibration, texts))
    job = Sweep(source, texts, calibration, folder, progress, beside=dense)
    yield from job.points(runs)


@dataclass(frozen=True)
class Run:
    """A point to be made; config None is the dense model, seed None calibrates nothing.

    target   the bits to come to, or None to leave the setting as it is
    """

    name: str
    config: SpqrConfig | None = None
    seed: int | None = None
    tune: int = 0
    tune_model: int = 0
    tune_codes: bool = False
    target: Target | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """What a point says that is made by this run, and by no other."""
        return {
            "config": None if self.config is None else self.config.to_dict(),
            "seed": self.seed,
            "tune": self.tune,
            "tune_model": self.tune_model,
            "tune_codes": self.tune_codes,
            "target_bits": self.target and self.target.bits,
            "per_layer": self.target is not None and self.target.per_layer,
        }

    @property
    def keywords(self) -> dict[str, Any]:
        """Those of `compress` in which runs differ."""
        return {name: self.fields[name] for name in KEYWORDS} | {"seed": self.seed or 0}

    @property
    def surveyed(self) -> str:
        """The same for runs in which the options of all layers are worth the same, as `key`."""
        same = {"tune": self.tune > 0, "tune_model": 0, "tune_codes": False, "target_bits": None}
        return _name({**self.fields, **same})

    @property
    def label(self) -> str:
        """For people."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def key(self) -> str:
        """The same for runs that make the same point, as a file's name."""
        return _name(self.fields)

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Put the label in front of what goes wrong with a setting."""
        try:
            yield
        except (ConfigError, NumericsError) as error:
            raise type(error)(f"{self.label}: {error}") from error


@dataclass(frozen=True)
class Sweep:
    """What all runs share.

    calibration   keywords of `compress`
    beside        measure compressed models beside the dense one
    """

    source: Source
    texts: Mapping[str, torch.Tensor]
    calibration: Mapping[str, Any]
    folder: SweepFolder
    progress: Progress | None
    beside: bool

    def points(self, runs: Sequence[Run]) -> Iterator[SweepPoint]:
        """The point of each run, found in the folder or made."""
        missing = [run for run in runs if not self._find(run)]
        if self.progress is not None:
            begin(self.progress, "sweeping", STEPS * len(missing))
        for run in runs:
            point = self._find(run)
            if point is None:
                place = f"{missing.index(run) + 1} of {len(missing)}: {run.label}"
                if self.progress is not None:
                    self.progress.set_postfix_str(place)
                with run.named_errors():
                    make = self._compressed if run.config else self._dense
                    point = make(run, place)
                self.folder.add(point)
            shutil.rmtree(self._checkpoint(run), ignore_errors=True)
            yield point

    def _find(self, run: Run) -> SweepPoint | None:
        return self.folder.find(**run.fields)

    def _checkpoint(self, run: Run) -> Path:
        return self.folder.path / run.key

    def _dense(self, run: Run, place: str) -> SweepPoint:
        Half(self.progress, place, 1).update()  # nothing to compress
        perplexity = self._measure(self.source, place)
        return SweepPoint(
            run.name, None, 0, None, DENSE_BITS, outlier_share=0, seconds=0, perplexity=perplexity
        )

    def _compressed(self, run: Run, place: str) -> SweepPoint:
        """Compress and measure."""
        checkpoint = self._checkpoint(run)
        if not checkpoint.exists():  # else an earlier run was killed while it measured
            self._compress(run, checkpoint, place)
        total = totals(inspect_checkpoint(checkpoint))
        model = str(checkpoint)
        if self.beside:
            perplexity, nats = self._measure_beside(model, place)
        else:
            perplexity, nats = self._measure(model, place), None
        rows = read_rows((checkpoint / LAYERS_FILE).read_text(encoding="utf-8"), LayerRow)
        return SweepPoint(
            name=run.name,
            **run.fields,
            bits=total.bits,
            outlier_share=total.outlier_share,
            seconds=sum(row.seconds for row in rows),
            perplexity=perplexity,
            nats=nats,
        )

    def _compress(self, run: Run, out: Path, place: str) -> None:
        """Keep what each layer's options are worth for runs that differ in their target alone."""
        assert run.config is not None
        compress(
            self.source,
            out,
            run.config,
            **self.calibration,
            **run.keywords,
            curves=self._curves(run),
            progress=Half(self.progress, place),
        )
        if run.target is not None:
            text = (out / CURVES_FILE).read_text(encoding="utf-8")
            self.folder.write_text(self._curves_name(run), text)

    def _curves(self, run: Run) -> Curves | None:
        """What a survey of an earlier run found, in this sweep or the one that it continues."""
        path = self.folder.path / self._curves_name(run)
        return read_curves(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _curves_name(self, run: Run) -> str:
        return f"{run.surveyed}-{CURVES_FILE}"

    def _measure(self, model: str | Source, place: str) -> dict[str, float]:
        """Name of each text -> perplexity of a model that is loaded for it."""
        loaded, half = self._load(model), self._half(place)
        return {
            name: perplexity(loaded, windows, half.update) for name, windows in self.texts.items()
        }

    def _measure_beside(self, model: str, place: str) -> tuple[dict[str, float], dict[str, float]]:
        """(perplexity, nats from the dense model), each by the name of a text."""
        loaded, dense, half = self._load(model), self._load(self.source), self._half(place)
        found = {
            name: perplexity_beside(loaded, dense, windows, half.update)
            for name, windows in self.texts.items()
        }
        first, second = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
        return first, second

    def _load(self, model: str | Source) -> Any:
        return load_model(model, device=self.calibration["device"])[0]

    def _half(self, place: str) -> Half:
        half = Half(self.progress, place, sum(map(len, self.texts.values())))
        half.set_postfix_str("perplexity")
        return half


class Half:
    """Progress of one half of a point, in units of its own, on the bar of the whole sweep.

    Of the stages of `compress` one fills it; the others, which come before and behind, tell where
    they are in words.
    """

    def __init__(self, whole: Progress | None, place: str, total: int = 0) -> None:
        self._whole, self._place, self._stage = whole, place, COMPRESSING
        self._total, self._done, self._shown = total, 0, 0

    def set_description_str(self, desc: str, refresh: bool = True) -> None:
        """The stage."""
        self._stage = desc

    def reset(self, total: int) -> None:
        """The stage has so many units."""
        self._total, self._done = total, 0

    def update(self, n: int = 1) -> None:
        """`n` more units are done."""
        self._done += n
        if self._stage != COMPRESSING:
            self.set_postfix_str(f"{self._stage}, {self._done} of {self._total}")
        elif self._whole is not None:
            steps = STEPS // 2 * self._done // self._total
            self._whole.update(steps - self._shown)
            self._shown = steps

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Say it behind which point it is."""
        if self._whole is not None and s:
            self._whole.set_postfix_str(f"{self._place}: {s}", refresh)


def _name(fields: Mapping[str, Any]) -> str:
    """A short name that is the same for the same values."""
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _check(source: Source, runs: Iterable[Run]) -> None:
    """Refuse now, and not behind hours of other points, what `compress` will refuse."""
    check_dense(source.config)
    check_causal(source.config)
    skeleton = build_skeleton(source.config, torch.float16)
    blocks = find_blocks(skeleton)
    for run in runs:
        if run.config is None:
            continue
        settings = plan(blocks, run.config)
        if run.target is not None:
            with run.named_errors():
                check_target(run.target, run.config, settings, skeleton)


def _common(
    source: Source,
    calibrated_on: Sequence[torch.Tensor],
    calibration: Mapping[str, Any],
    texts: Mapping[str, torch.Tensor],
) -> dict[str, str]:
    """Everything but what runs differ in that shapes a point, in words."""
    common = {
        "version": __version__,
        "model": f"{source.label} ({source.fingerprint[:12]})",
        "device": calibration["device"],
        "calibration": f"{calibration['nsamples']} windows of {calibration['seqlen']} tokens out of"
        f" {' and '.join(f'a text of {len(text)} ({_digest(text)})' for text in calibrated_on)}",
    }
    for name, windows in texts.items():
        count, length = windows.shape
        common[f"text {name}"] = f"{count} windows of {length} tokens ({_digest(windows)})"
    return common


def _digest(tokens: torch.Tensor) -> str:
    return sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:12]


def _runs(
    settings: Mapping[str, SpqrConfig],
    seeds: Sequence[int],
    tunings: Sequence[Tunings],
    targets: Sequence[Target],
    dense: bool,
) -> list[Run]:
    """What is asked for; a setting that calibrates nothing has no seed, target or tuning."""
    runs = [Run(DENSE)] if dense else []
    for name, config in settings.items():
        aims = targets if targets and config.outlier_threshold is not None else [None]
        calibrated = _calibrates(config)
        for variant in product(aims, tunings, seeds) if calibrated else [(None, NO_TUNING, None)]:
            run = _run(name, config, *variant)
            if not any(replace(run, name=other.name) == other for other in runs):
                runs.append(run)
    return runs


def _tunings(tune: Sequence[int], tune_model: Sequence[int], tune_codes: bool) -> list[Tunings]:
    return [
        (steps, all_steps, tune_codes and all_steps > 0)
        for steps, all_steps in product(tune, tune_model)
    ]


def _run(
    name: str,
    config: SpqrConfig,
    target: Target | None,
    tunings: Tunings,
    seed: int | None,
) -> Run:
    """Its name says all but the seed."""
    tune, tune_model, tune_codes = tunings
    words = [name]
    if target is not None:
        words.append(f"target {target.bits:g} bits" + " per layer" * target.per_layer)
    if tune:
        words.append(f"tune {tune}")
    if tune_model:
        words.append(f"tune model {tune_model}" + " with codes" * tune_codes)
    return Run(", ".join(words), config, seed, *tunings, target)


def _calibrates(config: SpqrConfig) -> bool:
    return config.use_hessian or any(
        values.get("use_hessian", False) for _, values in config.overrides
    )
