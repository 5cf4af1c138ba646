"""Points against what `compress` and `perplexity` give one by one; folders that go on and grow."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spqr_numba.analysis import sweep as sweep_module
from spqr_numba.analysis.points import SweepPoint, excess, frontier, read_sweep, summaries
from spqr_numba.analysis.sweep import sweep
from spqr_numba.config import SpqrConfig
from spqr_numba.errors import CheckpointError, ConfigError, ModelError, NumericsError
from spqr_numba.evaluate.baselines import measure
from spqr_numba.evaluate.perplexity import perplexity_beside
from spqr_numba.model import compress as compress_module
from spqr_numba.model.budget import Target
from spqr_numba.model.compress import Compression, compress
from spqr_numba.model.integration import load_model
from spqr_numba.model.progress import Silent
from spqr_numba.model.survey import survey

from ..tiny import save_tiny_llama

SETTINGS = {"paper": SpqrConfig(), "RTN": SpqrConfig.rtn(4, 16)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A calibration that takes no time."""
    text = tmp_path_factory.mktemp("text") / "count.txt"
    text.write_text(" ".join(str(number) for number in range(100)))
    return {"dataset": str(text), "nsamples": 2, "seqlen": 32}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("dense") / "model"))


@pytest.fixture(scope="module")
def texts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, 256, (3, 32), generator=generator) for name in ("a", "b")}


@pytest.fixture
def compressions(monkeypatch: pytest.MonkeyPatch) -> list[SpqrConfig]:
    """The settings that are compressed, in order."""
    done: list[SpqrConfig] = []

    def counting(model: str, out: Path, config: SpqrConfig, **keywords: Any) -> Any:
        done.append(config)
        return compress(model, out, config, **keywords)

    monkeypatch.setattr(sweep_module, "compress", counting)
    return done


def test_points_are_those_of_compress_and_eval(
    dense: str, texts: dict[str, torch.Tensor], tmp_path: Path, quick: dict[str, Any]
) -> None:
    settings = SETTINGS | {
        "sequential": SpqrConfig(true_sequential=True),
        "skipping": SpqrConfig(skip=("down_proj",), overrides=(("q_proj", {"bits": 4}),)),
    }
    points = list(sweep(dense, settings, texts, tmp_path / "out", seeds=[1], **quick))
    assert [point.name for point in points] == ["fp16", *settings]
    first = measure(load_model(dense)[0], texts)
    assert (points[0].bits, points[0].perplexity) == (16, first.perplexity)
    for point, (name, config) in zip(points[1:], settings.items(), strict=True):
        report = compress(dense, tmp_path / name, config, seed=1, **quick)
        expected = measure(load_model(str(tmp_path / name))[0], texts)
        assert (point.bits, point.perplexity) == (expected.bits, expected.perplexity)
        model, beside = (load_model(each)[0] for each in (str(tmp_path / name), dense))
        nats = {text: perplexity_beside(model, beside, w)[1] for text, w in texts.items()}
        assert point.nats == nats
        assert min(nats.values()) > 0
        assert point.outlier_share == pytest.approx(report.outlier_share)
        assert point.config == config.to_dict()
        assert point.seconds > 0


def test_each_seed_and_tuning_makes_a_point_where_something_is_calibrated(
    dense: str, texts: dict[str, torch.Tensor], tmp_path: Path, quick: dict[str, Any]
) -> None:
    settings = SETTINGS | {"the same": SpqrConfig()}
    points = list(sweep(dense, settings, texts, tmp_path, seeds=[0, 1, 0], dense=False, **quick))
    assert [(p.name, p.seed) for p in points] == [("paper", 0), ("paper", 1), ("RTN", None)]
    more = list(sweep(dense, settings, texts, tmp_path, tune=[0, 2], dense=False, **quick))
    assert [p.name for p in more] == ["paper", "paper, tune 2", "RTN"]
    assert [p.tune for p in more] == [0, 2, 0]
    assert [more[0], more[2]] == [points[0], points[2]]
    compress(dense, tmp_path / "tuned", SETTINGS["paper"], tune=2, **quick)
    tuned = measure(load_model(str(tmp_path / "tuned"))[0], texts)
    assert more[1].perplexity == tuned.perplexity
    assert points[0].perplexity != points[1].perplexity


def test_each_tuning_of_the_model_makes_a_point(
    dense: str, texts: dict[str, torch.Tensor], tmp_path: Path, quick: dict[str, Any]
) -> None:
    points = list(
        sweep(dense, SETTINGS, texts, tmp_path, tune=[1], tune_model=[0, 2], dense=False, **quick)
    )
    names = ["paper, tune 1", "paper, tune 1, tune model 2", "RTN"]
    assert [point.name for point in points] == names
    assert [point.tune_model for point in points] == [0, 2, 0]
    compress(dense, tmp_path / "tuned", SETTINGS["paper"], tune=1, tune_model=2, **quick)
    tuned = measure(load_model(str(tmp_path / "tuned"))[0], texts)
    assert points[1].perplexity == tuned.perplexity
    assert points[1].bits == points[0].bits
    codes = list(
        sweep(
            dense,
            SETTINGS,
            texts,
            tmp_path,
            tune_model=[0, 2],
            tune_codes=True,
            dense=False,
            **quick,
        )
    )
    assert [p.name for p in codes] == ["paper", "paper, tune model 2 with codes", "RTN"]
    assert [p.tune_codes for p in codes] == [False, True, False]


def test_each_target_makes_a_point_where_outliers_are_kept_and_one_survey_serves_all(
    dense: str,
    texts: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick: dict[str, Any],
) -> None:
    surveys: list[bool] = []

    def counting(*args: Any, per_layer: bool, **keywords: Any) -> Any:
        surveys.append(per_layer)
        return survey(*args, per_layer=per_layer, **keywords)

    monkeypatch.setattr(compress_module, "survey", counting)
    targets = [Target(4.6, per_layer=True), Target(4.8, per_layer=True)]
    settings = {"paper": SpqrConfig(), "GPTQ": SpqrConfig.gptq(3)}
    points = list(sweep(dense, settings, texts, tmp_path, targets=targets, **quick, dense=False))
    assert surveys == [True]
    names = ["paper, target 4.6 bits per layer", "paper, target 4.8 bits per layer", "GPTQ"]
    assert [point.name for point in points] == names
    assert [(p.target_bits, p.per_layer) for p in points] == [
        (4.6, True),
        (4.8, True),
        (None, False),
    ]
    assert read_sweep(tmp_path) == points
    more = [Target(4.7, per_layer=True)]  # of a sweep that goes on
    list(sweep(dense, settings, texts, tmp_path, targets=more, **quick, dense=False))
    assert surveys == [True]
    compress(
        dense, tmp_path / "alone", SpqrConfig(), target_bits=4.8, per_layer=True, seed=0, **quick
    )
    alone = measure(load_model(str(tmp_path / "alone"))[0], texts)
    assert (points[1].bits, points[1].perplexity) == (alone.bits, alone.perplexity)


def test_a_target_out_of_reach_is_named_before_anything_is_compressed(
    dense: str, texts: dict[str, torch.Tensor], tmp_path: Path, quick: dict[str, Any]
) -> None:
    with pytest.raises(
        ConfigError, match="paper, target 2 bits per layer, seed 0: target_bits is 2"
    ):
        list(sweep(dense, SETTINGS, texts, tmp_path / "out", targets=[Target(2)], **quick))
    assert not (tmp_path / "out").exists()


def test_the_folder_grows_and_makes_nothing_twice(
    dense: str,
    texts: dict[str, torch.Tensor],
    tmp_path: Path,
    compressions: list[SpqrConfig],
    quick: dict[str, Any],
) -> None:
    first = list(sweep(dense, {"RTN": SETTINGS["RTN"]}, texts, tmp_path, **quick))
    both = list(sweep(dense, SETTINGS, texts, tmp_path, **quick))
    assert compressions == [SETTINGS["RTN"], SETTINGS["paper"]]
    assert [both[0], both[2]] == first
    assert read_sweep(tmp_path) == [*first, both[1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.json"]
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == ["fp16", "RTN", "paper"]
    assert float(rows[1]["perplexity b"]) == both[2].perplexity["b"]
    assert float(rows[1]["excess b"]) == excess(both[2], both[0])["b"]
    assert (rows[1]["seed"], rows[2]["seed"]) == ("", "0")


def test_an_interrupted_sweep_goes_on_inside_a_setting(
    dense: str,
    texts: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    quick: dict[str, Any],
) -> None:
    original = Compression._compress_block

    def interrupted(self: Any, index: int, *args: Any) -> None:
        if index == 1 and self.config == SETTINGS["paper"]:
            raise KeyboardInterrupt
        original(self, index, *args)

    settings = dict(reversed(SETTINGS.items()))
    with monkeypatch.context() as patch:
        patch.setattr(Compression, "_compress_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(sweep(dense, settings, texts, tmp_path / "one", **quick))
    assert [point.name for point in read_sweep(tmp_path / "one")] == ["fp16", "RTN"]
    with caplog.at_level("INFO", "spqr_numba"):
        points = list(sweep(dense, settings, texts, tmp_path / "one", **quick))
    assert "continuing behind 1 finished of 2 blocks" in caplog.text
    whole = list(sweep(dense, settings, texts, tmp_path / "two", **quick))
    assert [point.perplexity for point in points] == [point.perplexity for point in whole]
    assert len(list((tmp_path / "one").iterdir())) == 2


def test_killed_while_measuring(
    dense: str,
    texts: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compressions: list[SpqrConfig],
    quick: dict[str, Any],
) -> None:
    def killed(*args: Any) -> float:
        raise KeyboardInterrupt

    settings = {"paper": SETTINGS["paper"]}
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "perplexity", killed)
        with pytest.raises(KeyboardInterrupt):
            list(sweep(dense, settings, texts, tmp_path, dense=False, **quick))
    (point,) = sweep(dense, settings, texts, tmp_path, dense=False, **quick)
    assert point.perplexity["a"] > 1
    assert point.nats is None  # beside which model?
    assert len(compressions) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nsamples": 3}, "its calibration is 2 windows of 32 tokens out of a text of"),
        ({"seqlen": 16}, "and here it is 2 windows of 16 tokens"),
        ({"texts": {"a": torch.zeros(3, 32, dtype=torch.int64)}}, "its text a is 3 windows"),
        ({"texts": {}}, "its text a is 3 windows .* and here it is None"),
        ({"model": None}, "its model is .*, and here it is the bundled model"),
    ],
    ids=str,
)
def test_points_that_cannot_be_compared(
    dense: str,
    texts: dict[str, torch.Tensor],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    quick: dict[str, Any],
) -> None:
    list(sweep(dense, {}, texts, tmp_path, **quick))
    arguments = {"model": dense, "settings": {}, "texts": texts, "out": tmp_path} | quick | changes
    with pytest.raises(CheckpointError, match=message):
        list(sweep(**arguments))


def test_folders_that_hold_something_else(
    dense: str, texts: dict[str, torch.Tensor], tmp_path: Path, quick: dict[str, Any]
) -> None:
    (tmp_path / "precious").touch()
    for out in (tmp_path, tmp_path / "precious"):
        with pytest.raises(CheckpointError, match="exists and holds no sweep"):
            list(sweep(dense, {}, texts, out, **quick))
    with pytest.raises(CheckpointError, match="cannot read a sweep"):
        read_sweep(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sweep.json").write_text(json.dumps({"common": {}, "points": [{"bits": 3}]}))
    with pytest.raises(CheckpointError, match="cannot read a sweep"):
        list(sweep(dense, {}, texts, broken, **quick))


def test_nothing_is_measured_where_something_cannot_be_compressed(
    dense: str, texts: dict[str, torch.Tensor], tmp_path: Path, quick: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    settings = SETTINGS | {"nothing": SpqrConfig(skip=("nomatch",))}
    with pytest.raises(ConfigError, match="'nomatch' matches no weight"):
        list(sweep(dense, settings, texts, out, **quick))
    compressed = tmp_path / "compressed"
    compress(dense, compressed, SETTINGS["RTN"])
    with pytest.raises(ModelError, match="already quantized"):
        list(sweep(str(compressed), SETTINGS, texts, out, **quick))
    assert not out.exists()


def test_an_error_names_its_setting(
    dense: str,
    texts: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick: dict[str, Any],
) -> None:
    def failing(*args: Any) -> float:
        raise NumericsError("the loss is nan")

    monkeypatch.setattr(sweep_module, "perplexity", failing)
    with pytest.raises(NumericsError, match="paper, seed 0: the loss is nan"):
        list(sweep(dense, SETTINGS, texts, tmp_path, dense=False, **quick))


def test_progress_is_whole_when_all_is_done(
    dense: str, texts: dict[str, torch.Tensor], tmp_path: Path, quick: dict[str, Any]
) -> None:
    class Bar(Silent):
        total = done = 0.0
        labels: tuple[str, ...] = ()

        def reset(self, total: float) -> None:
            self.total = total

        def update(self, n: int = 1) -> None:
            self.done += n

        def set_postfix_str(self, s: str, refresh: bool = True) -> None:
            self.labels += (s,) * bool(s)

    for total, settings in ((200, {"RTN": SETTINGS["RTN"]}), (100, SETTINGS)):
        bar = Bar()
        list(sweep(dense, settings, texts, tmp_path, progress=bar, **quick))
        assert bar.done == bar.total == total
    assert all(label.startswith("1 of 1: paper, seed 0") for label in bar.labels)
    told = [label.rpartition(": ")[2] for label in bar.labels[1:5]]
    reading = ["reading the model", "reading its tokenizer", "reading text"]
    assert told == [*reading, "model.layers.0"]
    assert bar.labels[-1].endswith(": perplexity")


@pytest.mark.gpu
def test_on_a_gpu(
    dense: str, texts: dict[str, torch.Tensor], tmp_path: Path, quick: dict[str, Any]
) -> None:
    on_cpu, on_gpu = (
        list(sweep(dense, SETTINGS, texts, tmp_path / device, device=device, **quick))
        for device in ("cpu", "cuda")
    )
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other.name == one.name
        assert other.bits == pytest.approx(one.bits, rel=0.01)
        assert other.perplexity == pytest.approx(one.perplexity, rel=0.02)


def point(name: str, bits: float, *perplexities: float) -> list[SweepPoint]:
    return [
        SweepPoint(name, seed, 0, {"of": name, "bits": bits}, bits, 0.0, 0.0, {"a": perplexity})
        for seed, perplexity in enumerate(perplexities)
    ]


def test_seeds_are_summarized_and_the_frontier_is_what_none_beats() -> None:
    points = [*point("paper", 4.2, 8, 2), *point("small, bits 2", 3, 5), *point("RTN 3 bit", 4, 6)]
    settings = summaries(points, "a")
    assert [setting.family for setting in settings] == ["paper", "small", "RTN"]
    first = settings[0]
    assert (first.perplexity, first.low, first.high) == (pytest.approx(4), 2, 8)
    assert [setting.name for setting in frontier(settings)] == ["small, bits 2", "paper"]
    assert frontier([replace(first, bits=9), first]) == [first]


def test_settings_of_one_name_are_not_seeds_of_each_other() -> None:
    """A preset that has changed since a sweep began, say; or more steps of tuning."""
    before, now = point("balanced", 4, 8), point("balanced", 3.9, 7)
    tuned = [replace(now[0], tune=50)]
    assert len(summaries([*before, *now, *tuned], "a")) == 3
