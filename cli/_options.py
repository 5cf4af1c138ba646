"""Options that several commands share, and the way from them to an SpqrConfig.

The names that the reference implementation gives to a setting are second names of ours, so that a
command line published for it works here as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from spqr_numba.config import (
    CHOSEN_FIELDS,
    DEFAULT_BITS,
    DEFAULT_PRESET,
    FITS,
    OUTLIER_SEARCHES,
    PERMUTATIONS,
    PRESETS,
    SpqrConfig,
)

__all__ = [
    "FILE",
    "Several",
    "calibration_options",
    "config_from",
    "config_options",
    "device_option",
    "grid_from",
    "grid_options",
    "model_argument",
    "seqlen_option",
    "skip_option",
    "target_bits_from",
    "text_options",
]

F = TypeVar("F", bound=Callable[..., Any])

WHOLE_ROW = "row"
FILE = click.Path(dir_okay=False, path_type=Path)
NEAREST = {
    "use_hessian": False,
    "outlier_threshold": None,
    "permutation": "identity",
    "fit": "min-max",
    "true_sequential": False,
    "asymmetric": False,
    "token_weights": False,
}


class GroupSize(click.ParamType):
    """A number of columns, or "row" (or the reference's -1) for all of them."""

    name = "integer|row"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return an int, or WHOLE_ROW."""
        if value in (WHOLE_ROW, "-1"):
            return WHOLE_ROW
        return click.INT.convert(value, param, ctx)


class Threshold(click.ParamType):
    """A number, or "none" for infinity: no weight is an outlier."""

    name = "float|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a float."""
        return math.inf if value == "none" else click.FLOAT.convert(value, param, ctx)


class Several(click.ParamType):
    """Values of one type, with commas between them."""

    name = "list"

    def __init__(self, one: click.ParamType) -> None:
        self.one = one

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """That of one value, and dots."""
        return f"{self.one.get_metavar(param, ctx) or self.one.name.upper()},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple."""
        if isinstance(value, tuple):
            return value
        return tuple(self.one.convert(each.strip(), param, ctx) for each in value.split(","))


class Dashed(click.Choice[str]):
    """A choice that takes act_order for act-order."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return one of the choices."""
        return super().convert(str(value).replace("_", "-"), param, ctx)


class Override(click.ParamType):
    """REGEX:field=value[,field=value...]: settings of the modules that REGEX finds."""

    name = "regex:field=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return (regex, {field: value})."""
        pattern, colon, assignments = value.rpartition(":")
        pairs = [assignment.partition("=") for assignment in assignments.split(",")]
        if not (colon and pattern and all(equals and field for field, equals, _ in pairs)):
            self.fail(f"{value!r} must look like 'q_proj|k_proj:bits=4,group_size=32'", param, ctx)
        return pattern, {field.strip(): _parse_value(text.strip()) for field, _, text in pairs}


def _parse_value(text: str) -> bool | int | float | str | None:
    words = {"true": True, "false": False, "none": None, WHOLE_ROW: None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Setting:
    """A field of SpqrConfig as an option; without it, what the preset says."""

    field: str
    names: tuple[str, ...]
    type: click.ParamType
    help: str

    def option(self) -> Callable[[F], F]:
        """One value."""
        return click.option(*self.names, self.field, type=self.type, help=self._help)

    def switch(self) -> Callable[[F], F]:
        """On, or off where the preset has it on."""
        first, *others = self.names
        both = f"{first}/--no-{first.removeprefix('--')}"
        return click.option(both, *others, self.field, default=None, help=self._help)

    def several(self) -> Callable[[F], F]:
        """A value or several of them."""
        metavar = "[on|off],..." if self.type is click.BOOL else None
        return click.option(
            *self.names, self.field, type=Several(self.type), metavar=metavar, help=self.help
        )

    @property
    def _help(self) -> str:
        """With what the default preset says."""
        default = getattr(PRESETS[DEFAULT_PRESET], self.field)
        return f"{self.help}  [{DEFAULT_PRESET}: {default}]"


def _refuse(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        raise click.BadParameter(
            "symmetric quantization is not supported: every grid has a zero of its own; drop"
            " this option",
            ctx,
            param,
        )


def _accepted(name: str, why: str) -> Callable[[F], F]:
    """An option of the reference implementation that changes nothing here."""
    return click.option(name, is_flag=True, expose_value=False, help=f"Accepted: {why}.")


def _refused(name: str) -> Callable[[F], F]:
    return click.option(name, is_flag=True, expose_value=False, hidden=True, callback=_refuse)


def _apply(options: Iterable[Callable[[F], F]]) -> Callable[[F], F]:
    """One decorator from several, whose options keep this order in the help."""

    def decorate(function: F) -> F:
        for option in reversed(list(options)):
            function = option(function)
        return function

    return decorate


model_argument = click.argument("model", required=False)


def _check_device(ctx: click.Context, param: click.Parameter, device: str) -> str:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise click.ClickException("torch finds no CUDA device here; use --device cpu")
    return device


device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    callback=_check_device,
    help="Where to run.",
)

seqlen_option = click.option(
    "--seqlen",
    "--model_seqlen",
    "seqlen",
    type=int,
    help="Tokens a window.  [default: the model's context, 2048 at most]",
)

text_options = _apply(
    [
        click.option(
            "--dataset",
            "datasets",
            metavar="DATASET",
            multiple=True,
            help="Text to predict, as for `spqr compress`.  [repeatable; default: Python's manual]",
        ),
        seqlen_option,
        click.option("--nsamples", type=int, help="Only so many windows of each text."),
    ]
)

calibration_options = _apply(
    [
        click.option(
            "--dataset",
            "--custom_data_path",
            "dataset",
            metavar="DATASET",
            multiple=True,
            help="Calibration text: a .txt, .jsonl, .safetensors, .npy or .pt file, a folder of"
            " text files, or wikitext2, ptb, c4, pajama, refinedweb; given several, windows are"
            " taken from each in turn.  [repeatable; default: Python's manual]",
        ),
        click.option("--nsamples", default=128, show_default=True, help="Calibration windows."),
        seqlen_option,
        click.option("--seed", default=0, show_default=True, help="Of the choice of windows."),
    ]
)

SETTINGS = [
    Setting("bits", ("--bits", "--wbits"), click.INT, "Bits of a weight code."),
    Setting(
        "group_size",
        ("--group-size", "--groupsize"),
        GroupSize(),
        "Columns of a row that share a scale and a zero.",
    ),
    Setting(
        "stats_group_size",
        ("--stats-group-size", "--qq_groupsize"),
        click.INT,
        "Rows whose scales and zeros share second-level statistics.",
    ),
    Setting(
        "scale_bits",
        ("--scale-bits", "--qq_scale_bits"),
        click.INT,
        "Bits of a scale; 16 keeps it in fp16.",
    ),
    Setting(
        "zero_bits",
        ("--zero-bits", "--qq_zero_bits"),
        click.INT,
        "Bits of a zero; 16 keeps it in fp16.",
    ),
    Setting(
        "fit",
        ("--fit",),
        click.Choice(FITS),
        "How scales and zeros are chosen: joint is closer at equal bits.",
    ),
    Setting(
        "outlier_threshold",
        ("--outlier-threshold", "--outlier_threshold"),
        Threshold(),
        "Relative error above which a weight is kept in fp16; none keeps none.",
    ),
    Setting(
        "permutation",
        ("--permutation", "--permutation_order"),
        Dashed(PERMUTATIONS),
        "Order in which input columns are quantized.",
    ),
    Setting(
        "damping",
        ("--damping", "--percdamp"),
        click.FLOAT,
        "Share of the mean of the Hessian's diagonal added to it.",
    ),
    Setting(
        "shrinkage",
        ("--shrinkage",),
        click.FLOAT,
        "Share of the Hessian off its diagonal taken for the calibration text's own.",
    ),
]
SWITCHES = [
    Setting(
        "true_sequential",
        ("--true-sequential", "--true_sequential"),
        click.BOOL,
        "Calibrate each linear on the outputs of the compressed ones before it.",
    ),
    Setting(
        "asymmetric",
        ("--asymmetric",),
        click.BOOL,
        "Aim at the dense model's outputs, so that later linears mend what earlier ones lost; best"
        " with --true-sequential.",
    ),
    Setting(
        "token_weights",
        ("--token-weights",),
        click.BOOL,
        "Weigh calibration tokens by what the model's loss feels of an error in each: a backward"
        " pass before all else.",
    ),
    Setting("round_zero", ("--round-zero",), click.BOOL, "Round zeros to integers."),
]
SEARCH = Setting(
    "outlier_search",
    ("--outlier-search",),
    click.Choice(OUTLIER_SEARCHES),
    "Find outliers before a group's grid is fitted, or only while quantizing.",
)
GRID = [*SETTINGS, SEARCH, *SWITCHES]

PRESET_HELP = (
    "near-lossless makes about 4.7 bits a weight, balanced 3.9, small 3.3; paper and paper-4bit are"
    " the paper's recipes, exactly."
)

skip_option = click.option(
    "--skip",
    metavar="REGEX",
    multiple=True,
    help="Leave modules whose name it finds as they are.  [repeatable]",
)

config_options = _apply(
    [
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            help=f"Settings to start from, which the options below change: {PRESET_HELP}"
            f"  [default: {DEFAULT_PRESET}]",
        ),
        *(setting.option() for setting in SETTINGS),
        *(switch.switch() for switch in SWITCHES),
        click.option(
            "--simplified-outliers",
            "--simplified_outliers",
            "simplified_outliers",
            is_flag=True,
            help="Skip the leave-one-out search for outliers.",
        ),
        click.option(
            "--round_zero",
            "round_zero_number",
            type=click.IntRange(0, 1),
            metavar="0|1",
            help="As --round-zero, in the reference implementation's form.",
        ),
        click.option(
            "--nearest",
            is_flag=True,
            help="Round to nearest: no calibration, no outliers.",
        ),
        click.option(
            "--on-failed-factorization",
            type=click.Choice(["error", "round-to-nearest"]),
            help="What to do with a layer whose Hessian no damping can factorise.",
        ),
        skip_option,
        click.option(
            "--override",
            "overrides",
            type=Override(),
            multiple=True,
            help="Other settings for the modules that it finds, as 'q_proj:bits=4'.  [repeatable]",
        ),
        _accepted("--perchannel", "every row has scales and zeros of its own"),
        _accepted("--fit_quantizer_without_outliers", "outliers never widen a group's grid"),
        _accepted("--skip_out_loss", "losses come from the Hessian and cost next to nothing"),
        _refused("--sym"),
        _refused("--qq_zero_sym"),
    ]
)

grid_options = _apply(
    [
        click.option(
            "--preset",
            "presets",
            type=Several(click.Choice(list(PRESETS))),
            default=DEFAULT_PRESET,
            show_default=True,
            help=f"Settings to start from: {PRESET_HELP}",
        ),
        *(setting.several() for setting in GRID),
    ]
)


def config_from(values: dict[str, Any]) -> SpqrConfig:
    """Take what `config_options` added out of `values`, and make a config of it.

    Raises ConfigError for settings out of range or at odds with each other.
    """
    preset = PRESETS[values.pop("preset") or DEFAULT_PRESET]
    if values.pop("round_zero_number"):
        values["round_zero"] = True
    if values.pop("simplified_outliers"):
        values["outlier_search"] = "simplified"
    settings: dict[str, Any] = dict(NEAREST) if values.pop("nearest") else {}
    for name in {field.name for field in fields(SpqrConfig)} & set(values):
        value = values.pop(name)
        if value is not None and value != ():
            settings[name] = value
    if settings.get("group_size") == WHOLE_ROW:
        settings["group_size"] = None
    if "overrides" in settings:
        settings["overrides"] = _merge(settings["overrides"])
    return replace(preset, **settings)


def target_bits_from(values: dict[str, Any]) -> float | None:
    """The bits a weight that are aimed at, without taking anything out of `values`.

    Where nothing says what layers are to be like, those that `compress` aims at by default.
    """
    overridden = {field for _, settings in values["overrides"] for field in settings}
    said = (
        values["nearest"]
        or any(values[name] is not None for name in ("preset", *CHOSEN_FIELDS))
        or not overridden.isdisjoint(CHOSEN_FIELDS)
    )
    if values["target_bits"] is None and not said:
        return DEFAULT_BITS
    return values["target_bits"]


def grid_from(values: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]:
    """Take what `grid_options` added out of `values`: (presets, field -> its values)."""
    given = {setting.field: values.pop(setting.field) for setting in GRID}
    return values.pop("presets"), {
        field: tuple(None if value == WHOLE_ROW else value for value in several)
        for field, several in given.items()
        if several is not None
    }


def _merge(overrides: Iterable[tuple[str, dict[str, Any]]]) -> tuple[tuple[str, Any], ...]:
    """Overrides given one field at a time, as one for each pattern."""
    merged: dict[str, dict[str, Any]] = {}
    for pattern, settings in overrides:
        merged.setdefault(pattern, {}).update(settings)
    return tuple(merged.items())
