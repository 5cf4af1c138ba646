"""Which settings a sweep compares: combinations, what each part of a setting brings, baselines.

A setting's name says what it is, as a preset and what was changed in it: "balanced",
"balanced, bits 4", "paper, group_size 8, stats_group_size 64".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from ..config import PRESETS, SpqrConfig
from ..errors import ConfigError
from ..evaluate.baselines import describe

__all__ = ["ablation", "baselines", "grid"]

logger = logging.getLogger(__name__)

Settings = dict[str, SpqrConfig]

PARTS = (
    ("bits",),
    ("group_size", "stats_group_size"),
    ("scale_bits", "zero_bits"),
    ("fit",),
    ("outlier_threshold",),
    ("outlier_search",),
    ("permutation",),
    ("damping",),
    ("shrinkage",),
    ("round_zero",),
    ("true_sequential",),
    ("asymmetric",),
    ("token_weights",),
)
"""What an ablation changes at once: fields that one decides together."""

NO_OUTLIERS = {"outlier_threshold": None}
PLAIN = SpqrConfig(outlier_threshold=None, permutation="identity")  # goes with any one value


def grid(presets: Iterable[str], values: Mapping[str, Sequence[Any]]) -> Settings:
    """Each preset with every combination of `values` (field -> what to give it), by name.

    A combination that contradicts itself is left out, with a note. Raises ConfigError, with the
    setting's name, where that leaves none, and for a value that no setting can have.
    """
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    found: Settings = {}
    refused: list[ConfigError] = []
    for preset, changes in product(presets, combinations):
        try:
            name, config = _changed(preset, changes)
            found[name] = config
        except ConfigError as error:
            if not _possible(changes):
                raise
            refused.append(error)
    if refused and not found:
        raise refused[0]
    for reason in refused:
        logger.warning("left out %s", reason)
    return found


def ablation(preset: str, changes: Mapping[str, Any]) -> Settings:
    """What each part of a setting brings: added alone to the paper's recipe, and left out of it.

    The setting is `preset` with `changes`; its parts are where it differs from the paper's recipe
    of as many bits. Both ends stand beside themselves without outliers. Raises ConfigError where
    there is no difference.
    """
    name, config = _changed(preset, changes)
    start = _papers(config.bits)
    parts = [part for part in PARTS if _values(config, part) != _values(PRESETS[start], part)]
    if not parts:
        raise ConfigError(f"{name} is the paper's recipe: there is nothing to leave out of it")
    alone = [{}, *(_values(config, part) for part in parts), NO_OUTLIERS]
    left_out = [{}, *(_values(PRESETS[start], part) for part in parts), NO_OUTLIERS]
    return dict(
        [_changed(start, part) for part in alone]
        + [_changed(preset, {**changes, **part}) for part in left_out]
    )


def baselines(bits: Iterable[int]) -> Settings:
    """RTN for each row and each 16 columns, GPTQ for each row and each 128, at each of `bits`."""
    configs = (
        config
        for each in bits
        for config in (
            SpqrConfig.rtn(each),
            SpqrConfig.rtn(each, 16),
            SpqrConfig.gptq(each),
            SpqrConfig.gptq(each, 128),
        )
    )
    return {describe(config): config for config in configs}


def _papers(bits: int) -> str:
    """The preset with the paper's recipe for `bits`; for other bits that for three."""
    return "paper-4bit" if bits == PRESETS["paper-4bit"].bits else "paper"


def _values(config: SpqrConfig, part: Iterable[str]) -> dict[str, Any]:
    return {field: getattr(config, field) for field in part}


def _possible(changes: Mapping[str, Any]) -> bool:
    """Whether some setting can have each of these values, if not all of them together."""
    try:
        for field, value in changes.items():
            replace(PLAIN, **{field: value})
    except ConfigError:
        return False
    return True


def _changed(preset: str, changes: Mapping[str, Any]) -> tuple[str, SpqrConfig]:
    """(name, settings) of a preset with changes."""
    words = [f"{field} {_word(field, value)}" for field, value in changes.items()]
    name = ", ".join([preset, *words])
    try:
        return name, replace(PRESETS[preset], **changes)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _word(field: str, value: Any) -> str:
    if value is None or value == math.inf:
        return "row" if field == "group_size" else "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
