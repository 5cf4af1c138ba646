"""SpqrConfig: every setting that shapes a compressed weight, checked, frozen, JSON in and out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

from .errors import ConfigError

__all__ = ["CHOSEN_FIELDS", "DEFAULT_BITS", "DEFAULT_PRESET", "PRESETS", "SpqrConfig"]

GROUP_SIZES = (8, 16, 32, 64, 128)
STATS_GROUP_SIZES = (8, 16, 32, 64, 128)
STATISTICS_BITS = (2, 3, 4, 16)
PERMUTATIONS = ("act-order", "identity", "spearman")
FITS = ("min-max", "joint")
OUTLIER_SEARCHES = ("leave-one-out", "simplified")
CALIBRATION_SWITCHES = ("true_sequential", "asymmetric", "token_weights")
SWITCHES = ("round_zero", "use_hessian", *CALIBRATION_SWITCHES)
FACTORIZATION_FALLBACKS = ("error", "round-to-nearest")
MODEL_LEVEL_FIELDS = ("skip", "overrides", *CALIBRATION_SWITCHES)
SECOND_LEVEL_BITS = 16
OUTLIER_BITS = 32


@dataclass(frozen=True)
class SpqrConfig:
    """Settings of one compression (names of the paper, arXiv 2306.03078, in brackets).

    A field that is not given is what the paper's 3-bit recipe has. To start from another point,
    change a preset: replace(PRESETS["balanced"], bits=4).

    bits                 bits of a weight code, 2 to 8 [b_w]
    group_size           input columns of a row that share a scale and a zero: 8, 16, 32, 64, 128,
                         or None for the whole row [beta_1]
    stats_group_size     rows whose scales (and zeros) share second-level statistics [beta_2]
    scale_bits           bits of a scale code: 2, 3, 4, or 16 for plain fp16 scales [b_s]
    zero_bits            the same for zeros [b_z]
    fit                  "min-max" fits scale and zero to a group's range and makes each a code for
                         itself, as the paper does; "joint" chooses both, and their statistics, by
                         the error that they leave
    outlier_threshold    a weight is kept in fp16 where its Hessian-weighted error exceeds this
                         share of the mean; None keeps no outliers [tau]
    outlier_search       "leave-one-out" finds outliers before a group's grid is fitted,
                         "simplified" only while quantizing
    permutation          order in which input columns are quantized
    damping              share of mean(diag H) added to diag H
    shrinkage            share of H off its diagonal that is taken for the calibration text's own,
                         and left out: on other text, inputs go together less
    round_zero           round each group's zero to an integer
    use_hessian          False rounds to nearest: no calibration, no error propagation
    true_sequential      quantize the linears of a block in the order in which they run, each
                         calibrated on the outputs of the ones before
    asymmetric           aim at what each linear returns in the dense model, where its inputs are
                         others; pays with true_sequential, which shows it a block's own errors
    token_weights        weigh calibration tokens, for each linear, by what the model's loss feels
                         of an error there: the square of its gradient
    on_failed_factorization  what to do with a Hessian that no damping makes positive definite
    skip                 regular expressions of module names to leave as they are
    overrides            (regular expression, {field: value}) pairs; the first match wins

    Raises ConfigError for a value out of range or a contradiction.
    """

    bits: int = 3
    group_size: int | None = 16
    stats_group_size: int = 16
    scale_bits: int = 3
    zero_bits: int = 3
    fit: str = "min-max"
    outlier_threshold: float | None = 0.2
    outlier_search: str = "leave-one-out"
    permutation: str = "act-order"
    damping: float = 1.0
    shrinkage: float = 0.0
    round_zero: bool = False
    use_hessian: bool = True
    true_sequential: bool = False
    asymmetric: bool = False
    token_weights: bool = False
    on_failed_factorization: str = "error"
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def __post_init__(self) -> None:
        if self.outlier_threshold == math.inf:
            object.__setattr__(self, "outlier_threshold", None)
        if isinstance(self.skip, str):
            raise ConfigError(f"skip is the string {self.skip!r}; it must be a list of patterns")
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", tuple((p, dict(v)) for p, v in self.overrides))
        self._check_ranges()
        self._check_combinations()
        self._check_patterns()

    @classmethod
    def rtn(cls, bits: int, group_size: int | None = None) -> SpqrConfig:
        """Round to nearest: fp16 statistics, no Hessian, no outliers."""
        return cls(
            bits=bits,
            group_size=group_size,
            scale_bits=16,
            zero_bits=16,
            outlier_threshold=None,
            permutation="identity",
            use_hessian=False,
        )

    @classmethod
    def gptq(cls, bits: int, group_size: int | None = None, damping: float = 0.01) -> SpqrConfig:
        """GPTQ (arXiv 2210.17323) with act-order: fp16 statistics, no outliers."""
        return cls(
            bits=bits,
            group_size=group_size,
            scale_bits=16,
            zero_bits=16,
            outlier_threshold=None,
            damping=damping,
        )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SpqrConfig:
        """Rebuild a config from `to_dict`; an unknown field is a ConfigError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON types."""
        settings = asdict(self)
        settings["skip"] = list(self.skip)
        settings["overrides"] = [[pattern, dict(values)] for pattern, values in self.overrides]
        return settings

    def for_module(self, name: str) -> SpqrConfig | None:
        """The settings for the linear called `name`, or None where it is to stay as it is."""
        if any(compiled(pattern).search(name) for pattern in self.skip):
            return None
        for pattern, values in self.overrides:
            if compiled(pattern).search(name):
                return self._overridden(values)
        return self

    def with_modules(self, modules: Mapping[str, SpqrConfig]) -> SpqrConfig:
        """These settings, with an override for each of `modules` whose own differ."""
        overrides = []
        for name, config in modules.items():
            settings = {
                field.name: value
                for field in fields(self)
                if field.name not in MODEL_LEVEL_FIELDS
                if (value := getattr(config, field.name)) != getattr(self, field.name)
            }
            if settings:
                overrides.append((f"^{re.escape(name)}$", settings))
        return replace(self, overrides=tuple(overrides))

    def formula_bits(self, outlier_share: float = 0.0, in_features: int | None = None) -> float:
        """Bits a weight by the paper's formula (section 4.2), for matrices large on both sides.

        in_features is the length of a whole-row group; without it such statistics count nothing.
        """
        columns = self.group_size or in_features or math.inf
        bits = self.bits + OUTLIER_BITS * outlier_share
        for statistic_bits in (self.scale_bits, self.zero_bits):
            bits += statistic_bits / columns
            if statistic_bits != 16:
                bits += 2 * SECOND_LEVEL_BITS / (columns * self.stats_group_size)
        return bits

    def _overridden(self, values: Mapping[str, Any]) -> SpqrConfig:
        """These settings for one module, to which what is one for all does not apply."""
        alike: dict[str, Any] = dict.fromkeys(CALIBRATION_SWITCHES, False)
        return replace(self, overrides=(), **alike | dict(values))

    def _check_ranges(self) -> None:
        self._check_member("bits", tuple(range(2, 9)))
        self._check_member("group_size", (*GROUP_SIZES, None))
        self._check_member("stats_group_size", STATS_GROUP_SIZES)
        self._check_member("scale_bits", STATISTICS_BITS)
        self._check_member("zero_bits", STATISTICS_BITS)
        self._check_member("fit", FITS)
        self._check_member("outlier_search", OUTLIER_SEARCHES)
        self._check_member("permutation", PERMUTATIONS)
        self._check_member("on_failed_factorization", FACTORIZATION_FALLBACKS)
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        self._check_number("damping")
        self._check_number("shrinkage")
        if self.outlier_threshold is not None:
            self._check_number("outlier_threshold")
        if self.outlier_threshold is not None and not self.outlier_threshold > 0:
            raise ConfigError(
                f"outlier_threshold is {self.outlier_threshold}; it must be positive"
                " (use None or inf to keep no outliers)"
            )
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ConfigError(f"damping is {self.damping}; it must be finite and not negative")
        if not 0 <= self.shrinkage < 1:
            raise ConfigError(f"shrinkage is {self.shrinkage}; it must be at least 0 and below 1")

    def _check_member(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed or isinstance(value, bool | float):
            choices = ", ".join("whole row" if a is None else str(a) for a in allowed)
            raise ConfigError(f"{name} is {value!r}; it must be one of {choices}")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} is {value!r}; it must be a number")

    def _check_combinations(self) -> None:
        if self.fit == "joint":
            self._check_joint()
        if self.use_hessian:
            return
        if self.outlier_threshold is not None:
            raise ConfigError(
                "outliers are found by their Hessian-weighted error: rounding to nearest"
                " (use_hessian=False) needs outlier_threshold=None"
            )
        if self.permutation == "act-order":
            raise ConfigError(
                "act-order sorts by the Hessian's diagonal: rounding to nearest"
                " (use_hessian=False) needs permutation='identity' or 'spearman'"
            )
        for name in CALIBRATION_SWITCHES:
            if getattr(self, name):
                raise ConfigError(f"{name} calibrates, and use_hessian=False does not")

    def _check_joint(self) -> None:
        for name in ("scale_bits", "zero_bits"):
            if getattr(self, name) == 16:
                raise ConfigError(
                    f"fit='joint' chooses among the codes of scales and zeros, and {name} is 16,"
                    " which has none; use 2, 3 or 4, or fit='min-max'"
                )
        if self.round_zero:
            raise ConfigError("fit='joint' chooses zeros that round_zero would change; drop one")

    def _check_patterns(self) -> None:
        for pattern in (*self.skip, *(p for p, _ in self.overrides)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error
        for pattern, values in self.overrides:
            fixed = sorted(set(values) & set(MODEL_LEVEL_FIELDS))
            if fixed:
                raise ConfigError(
                    f"the override for {pattern!r} sets {fixed[0]}, which is one for all modules"
                )
            known = [f.name for f in fields(self) if f.name not in MODEL_LEVEL_FIELDS]
            unknown = sorted(set(values) - set(known))
            if unknown:
                raise ConfigError(
                    f"the override for {pattern!r} sets unknown field {unknown[0]!r}; there are"
                    f" {', '.join(known)}"
                )
            self._overridden(values)


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """`re` keeps 512 patterns, and a large model may have more: an override a layer."""
    return re.compile(pattern)


JOINT = SpqrConfig(
    stats_group_size=64,
    scale_bits=4,
    zero_bits=4,
    fit="joint",
    damping=0.1,
    shrinkage=0.2,
    token_weights=True,
)

PRESETS = {
    "near-lossless": replace(JOINT, bits=4),
    "balanced": JOINT,
    "small": replace(JOINT, group_size=32, scale_bits=3, zero_bits=3, outlier_threshold=0.8),
    "paper": SpqrConfig(),
    "paper-4bit": SpqrConfig(bits=4, outlier_threshold=0.1),
}
"""Named settings, of about 4.7, 3.9 and 3.3 bits and, of the paper, 4.3 and 4.8. The first three
may become better in a later version; the paper's 3-bit recipe, which SpqrConfig() is too, and its
near-lossless 4-bit one stay what they are."""

DEFAULT_PRESET = "balanced"
DEFAULT_BITS = 3.9
"""What is done where nobody says otherwise: so many bits a weight, for which CHOSEN_FIELDS
are chosen layer by layer, and all else as the preset has it."""

CHOSEN_FIELDS = ("bits", "group_size", "scale_bits", "zero_bits", "outlier_threshold")
"""What a number of bits a weight leaves to be chosen layer by layer."""
