"""One budget for many layers: the search over curves, and what is left when layers differ."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spqr_numba.config import SpqrConfig
from spqr_numba.errors import CheckpointError, ConfigError
from spqr_numba.model.budget import (
    Curves,
    Layers,
    Option,
    Ration,
    Target,
    allocate,
    between,
    curves_to_csv,
    lower_hull,
    reach,
    read_curves,
)

Points = list[tuple[float, float]]
FLAT, STEEP = ("flat",), ("steep", "as steep")


def curve(*points: tuple[float, float]) -> list[Option]:
    """Options of so many bytes and so much loss."""
    return [Option(3, 16, 3, 3, 0.2, nbytes, loss) for nbytes, loss in points]


def total(chosen: dict[Layers, Option]) -> tuple[float, float]:
    """Bytes and loss of a choice."""
    return sum(o.nbytes for o in chosen.values()), sum(o.loss for o in chosen.values())


def largest_gain(curves: Curves) -> float:
    """The most that one step along a hull can bring."""
    hulls = [lower_hull(options) for options in curves.values()]
    return max((a.loss - b.loss for h in hulls for a, b in pairwise(h)), default=0)


points = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=1, max_size=5
)  # fmt: skip
many_curves = st.lists(points, min_size=1, max_size=4).map(
    lambda drawn: {(f"layer{i}",): curve(*layer) for i, layer in enumerate(drawn)}
)


def test_the_hull_by_hand() -> None:
    #  10 -> 6 falls 4 a byte, 6 -> 5 one a byte: (2, 9) lies above the line from (1, 10) to (3, 2)
    found = lower_hull(curve((3, 2), (1, 10), (2, 9), (4, 1), (5, 1), (1, 12)))
    assert [(option.nbytes, option.loss) for option in found] == [(1, 10), (3, 2), (4, 1)]


def test_the_steepest_step_is_taken_first() -> None:
    curves = {FLAT: curve((10, 5), (20, 4)), STEEP: curve((10, 9), (20, 1))}
    assert total(allocate(curves, 20)) == (20, 14)
    assert total(allocate(curves, 30)) == (30, 6)
    assert allocate(curves, 39)[FLAT].nbytes == 10
    assert total(allocate(curves, 1000)) == (40, 5)


def test_a_step_that_does_not_fit_leaves_its_bytes_to_smaller_ones() -> None:
    curves = {FLAT: curve((10, 5), (12, 4)), STEEP: curve((10, 100), (50, 0))}
    chosen = allocate(curves, 30)
    assert (chosen[STEEP].nbytes, chosen[FLAT].nbytes) == (10, 12)


def test_too_small_a_budget_takes_the_smallest() -> None:
    assert total(allocate({FLAT: curve((5, 3), (9, 0))}, 1)) == (5, 3)


@given(many_curves, st.integers(0, 250))
def test_the_budget_is_kept_and_no_other_choice_is_much_better(
    curves: Curves, budget: float
) -> None:
    """The bound of a greedy knapsack: what one step more would have brought."""
    chosen = allocate(curves, budget)
    nbytes, loss = total(chosen)
    least, most = reach(curves)
    assert nbytes <= max(budget, least)
    assert least <= nbytes <= most
    others = (dict(zip(curves, each, strict=True)) for each in product(*curves.values()))
    affordable = [total(other)[1] for other in others if total(other)[0] <= budget]
    if affordable:
        assert loss <= min(affordable) + largest_gain(curves)


@given(many_curves, st.floats(0, 500))
def test_at_any_price_it_is_what_every_layer_would_take(curves: Curves, price: float) -> None:
    """With the bytes that layers would take at one price, no choice has less loss than theirs."""
    alone = {
        layer: min(options, key=lambda o: (o.loss + price * o.nbytes, o.nbytes))
        for layer, options in curves.items()
    }
    nbytes, loss = total(alone)
    assert total(allocate(curves, nbytes))[1] == pytest.approx(loss)


@given(many_curves, st.integers(0, 250), st.integers(0, 50))
def test_more_bytes_never_lose_more(curves: Curves, budget: float, more: float) -> None:
    assert total(allocate(curves, budget + more))[1] <= total(allocate(curves, budget))[1]


@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=6),
    st.floats(0.2, 4),
    st.floats(0.05, 0.95),
)
def test_never_worse_than_one_threshold_for_all(
    scales: list[float], power: float, share: float
) -> None:
    """Layers whose losses differ in scale alone: to treat all alike is one of the choices."""
    steps = range(100, 405, 5)
    curves = {
        (str(i),): curve(*((nbytes, scale * nbytes**-power) for nbytes in steps))
        for i, scale in enumerate(scales)
    }
    alike = {layer: options[int(share * 60)] for layer, options in curves.items()}
    nbytes, loss = total(alike)
    assert total(allocate(curves, nbytes))[1] <= loss * (1 + 1e-9)


def test_between_thresholds_lie_powers() -> None:
    """Bytes and losses that are powers of the threshold are met exactly."""
    tried = [
        Option(3, 16, 3, 3, t, 1000 + 500 * t**-1.5 - 1, 3 * t**0.7) for t in (0.8, 0.4, 0.2, 0.05)
    ]
    options = between(tried, 1000, 4)
    assert len(options) == 13
    assert [option.outlier_threshold for option in options[::4]] == [0.8, 0.4, 0.2, 0.05]
    for option in options:
        threshold = option.outlier_threshold
        assert threshold is not None
        assert option.nbytes == pytest.approx(999 + 500 * threshold**-1.5, rel=1e-3)
        assert option.loss == pytest.approx(3 * threshold**0.7, rel=1e-3)


def test_between_thresholds_that_find_nothing() -> None:
    tried = [Option(3, 16, 3, 3, t, 1000, 0.0) for t in (0.4, 0.2)]
    assert all(o.nbytes == 1000 and o.loss < 1e-300 for o in between(tried, 1000, 8))


def steep(scale: float) -> list[Option]:
    return [
        Option(3, 16, 3, 3, 1 / k, 100 + 4 * k, scale / k) for k in range(1, 40)
    ]  # fmt: skip


@given(st.lists(st.floats(0.9, 1.1), min_size=6, max_size=12))
def test_what_layers_take_more_or_less_comes_from_the_others(misses: list[float]) -> None:
    curves = {(str(i),): steep(1 + i) for i in range(len(misses))}
    budget = 160 * len(misses)
    ration = Ration(curves, {name: SpqrConfig() for (name,) in curves}, budget)
    left = float(budget)
    for layers, miss in zip(curves, misses, strict=True):
        threshold = ration.settings_of(*layers).outlier_threshold
        planned = next(o.nbytes for o in curves[layers] if o.outlier_threshold == threshold)
        ration.spend(*layers, miss * planned)
        left -= miss * planned
    assert abs(left) <= abs(miss - 1) * planned + 4  # the last layer's own, and a step


def test_linears_that_are_chosen_together_get_the_same() -> None:
    """Whatever one of them takes; the next ones share what all of them left."""
    curves = {("q", "k"): steep(1), ("o",): steep(1)}
    ration = Ration(curves, dict.fromkeys("qko", SpqrConfig()), 320)
    first = ration.settings_of("q")
    ration.spend("q", 200)
    assert ration.settings_of("k") == first
    ration.spend("k", 10)
    threshold = ration.settings_of("o").outlier_threshold
    assert next(o.nbytes for o in curves["o",] if o.outlier_threshold == threshold) == 108


def test_what_was_spent_before_is_not_there() -> None:
    """As where a run goes on behind layers that it had compressed."""
    curves = {("q", "k"): steep(1), ("o",): steep(1)}
    ration = Ration(curves, dict.fromkeys("qko", SpqrConfig()), 320)
    ration.spend("q", 150)
    ration.spend("k", 50)
    threshold = ration.settings_of("o").outlier_threshold
    assert next(o.nbytes for o in curves["o",] if o.outlier_threshold == threshold) == 120


def test_an_option_changes_nothing_else() -> None:
    config = SpqrConfig(damping=0.1, stats_group_size=64)
    chosen = Option(4, None, 2, 4, None, 1, 1).settings(config)
    assert chosen == replace(
        config, bits=4, group_size=None, scale_bits=2, zero_bits=4, outlier_threshold=None
    )


def test_curves_survive_the_csv_exactly() -> None:
    curves = {
        ("a.b", "a.c"): [
            Option(3, None, 3, 3, None, 1e9, 1 / 3),
            Option(2, 8, 3, 3, 0.1 + 0.2, 7, 1e-300),
        ],
        ("c",): [Option(3, 16, 3, 3, 0.1, 8, 1)],
    }
    assert read_curves(curves_to_csv(curves)) == curves
    assert read_curves("") == {}


@pytest.mark.parametrize(("was", "instead"), [("scale_bits", "scale"), (",3,", ",three,")])
def test_curves_that_cannot_be_read(was: str, instead: str) -> None:
    text = curves_to_csv({FLAT: curve((8, 1))})
    with pytest.raises(CheckpointError, match="damaged or of another version; start afresh"):
        read_curves(text.replace(was, instead))


NO_OUTLIERS = SpqrConfig(outlier_threshold=None)
NEAREST = {"use_hessian": False, "outlier_threshold": None, "permutation": "identity"}


@pytest.mark.parametrize(
    ("target", "config", "message"),
    [
        (Target(4), SpqrConfig.rtn(4), "use_hessian=False has none"),
        (Target(4, False), NO_OUTLIERS, "outlier_threshold=None keeps no outliers"),
        (
            Target(4),
            SpqrConfig(overrides=(("q_proj", {"outlier_threshold": 0.1}),)),
            "the override for 'q_proj' sets outlier_threshold, which target_bits chooses",
        ),
        (Target(4), SpqrConfig(overrides=(("q_proj", {"bits": 4}),)), "sets bits"),
    ],
)
def test_targets_that_contradict(target: Target, config: SpqrConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target.check(config)


@pytest.mark.parametrize(
    ("target", "config"),
    [
        (Target(4, False), SpqrConfig(overrides=(("q_proj", {"bits": 4}),))),
        (Target(4), NO_OUTLIERS),
        (Target(4), SpqrConfig(overrides=(("q_proj", NEAREST),))),
    ],
)
def test_targets_that_do_not(target: Target, config: SpqrConfig) -> None:
    target.check(config)


@pytest.mark.parametrize("bits", [2.9, 6.1, -1.0, math.nan, math.inf])
def test_a_target_out_of_reach_says_what_is_in_reach(bits: float) -> None:
    with pytest.raises(ConfigError, match=r"reach 3\.00 to 6\.00 on this model"):
        Target(bits, False).check_reach(300, 600, 800)
    Target(3.0).check_reach(300, 600, 800)


def test_before_anything_is_measured_the_reach_has_no_end() -> None:
    with pytest.raises(ConfigError, match=r"reach 3\.00 bits and more on this model"):
        Target(2.0).check_reach(300, math.inf, 800)
