"""Maps, the page and the figures: what they show is what was computed, and nothing is fetched."""

from __future__ import annotations

import re
import struct
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from spqr_numba.analysis import plots
from spqr_numba.analysis.checkpoint import by_depth_and_kind, inspect_checkpoint
from spqr_numba.analysis.maps import LayerMap, layer_map, pooled
from spqr_numba.analysis.page import checkpoint_page, png
from spqr_numba.analysis.points import SweepPoint
from spqr_numba.analysis.sensitivity import second_level_effect
from spqr_numba.config import SpqrConfig
from spqr_numba.errors import InputError, SpqrError
from spqr_numba.model.compress import compress

from ..problems import make_problem
from ..tiny import save_tiny_llama

LAYER = "model.layers.1.self_attn.k_proj"
SWEEP = [
    SweepPoint(name, seed, 0, config, bits, 0.0, 0.0, {"a": perplexity, "b": perplexity})
    for name, seed, config, bits, perplexity in [
        ("fp16", None, None, 16.0, 10.0),
        ("balanced", 0, {"of": "balanced"}, 3.9, 11.0),
        ("balanced", 1, {"of": "balanced"}, 3.9, 11.5),
        ("paper", 0, {"of": "paper"}, 4.2, 12.0),
        ("small", 0, {"of": "small"}, 3.3, 13.0),
        ("RTN 3 bit", None, {"of": "RTN"}, 3.0, 24714.0),
    ]
]
VOID = {"meta", "link", "img", "rect", "wbr"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def folder(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "model"
    compress(str(dense), out, SpqrConfig(), nsamples=4)
    return out


@pytest.fixture(scope="module")
def picture(folder: Path) -> LayerMap:
    return layer_map(folder, LAYER)


class Tags(HTMLParser):
    """Checks that tags close in order, and keeps every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def decode(data: bytes) -> np.ndarray:
    """The palette indices of a PNG that `png` made."""
    columns, rows = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    lines = zlib.decompress(data[start + 4 : start + 4 + length])
    return np.frombuffer(lines, np.uint8).reshape(rows, columns + 1)[:, 1:]


def test_bits_by_part_add_up(folder: Path) -> None:
    for layer in inspect_checkpoint(folder):
        assert sum(layer.parts.values()) == layer.nbytes
        assert sum(layer.part_bits.values()) == pytest.approx(layer.bits)
        assert layer.part_bits["codes"] >= 3


def test_a_table_by_depth_and_kind(folder: Path) -> None:
    layers = inspect_checkpoint(folder)
    kinds, table = by_depth_and_kind(layers, "outlier_share")
    assert table.shape == (2, 7)
    shares = {layer.layer: layer.outlier_share for layer in layers}
    assert table[1, kinds.index("k_proj")] == shares[LAYER]


def test_the_map_is_of_outliers_or_with_the_dense_model_of_sensitivities(
    folder: Path, dense: Path, picture: LayerMap
) -> None:
    shares = {layer.layer: layer.outlier_share for layer in inspect_checkpoint(folder)}
    assert picture.picture.mean() == pytest.approx(shares[LAYER])
    sensitive = layer_map(folder, LAYER, str(dense))
    assert (picture.measure, sensitive.measure) == ("outlier share", "sensitivity")
    assert sensitive.structure == picture.structure
    assert (sensitive.picture >= 0).all()
    assert (sensitive.picture > 0).mean() > 0.9


def test_a_layer_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no compressed layer 'model\.norm'; its layers"):
        layer_map(folder, "model.norm")
    other = save_tiny_llama(tmp_path / "other", hidden_size=64)
    with pytest.raises(InputError, match=r"is \[16, 32\] in the checkpoint and \[32, 64\] in"):
        layer_map(folder, LAYER, str(other))


def test_pooling_takes_means_of_cells() -> None:
    values = np.arange(15, dtype=np.float32).reshape(3, 5)
    np.testing.assert_array_equal(pooled(values), values)
    expected = [[0.5, 3], [8, 10.5]]  # rows 0 and 1 to 2, columns 0 to 1 and 2 to 4
    np.testing.assert_allclose(pooled(values, 2), expected)


def test_a_png_is_its_values() -> None:
    values = np.array([[0, 1, 2], [4, 0.004, 0.4]], dtype=np.float32)
    np.testing.assert_array_equal(decode(png(values)), [[0, 64, 128], [255, 0, 26]])
    shades = decode(png(values, logarithmic=True))
    np.testing.assert_array_equal(shades, [[0, 204, 229], [255, 0, 170]])
    assert not decode(png(0 * values)).any()


def test_the_page_asks_for_nothing_and_has_every_layer(folder: Path, picture: LayerMap) -> None:
    layers = inspect_checkpoint(folder)
    page = checkpoint_page("a <model>", layers, picture)
    tags = Tags()
    tags.feed(page.removeprefix("<!doctype html>"))
    assert not tags.open
    assert all(address and address.startswith("data:") for address in tags.addresses)
    assert not re.search(r"https?:|@import|url\(|<script", page)
    assert "<h1>a &lt;model&gt;</h1>" in page
    assert 'name="viewport"' in page
    for layer in layers:
        assert f"<title>{layer.layer}: codes {layer.part_bits['codes']:.3f} bits" in page


def test_the_page_of_a_checkpoint_without_outliers_and_log(dense: Path, tmp_path: Path) -> None:
    compress(str(dense), tmp_path / "rtn", SpqrConfig.rtn(4))
    (tmp_path / "rtn" / "layers.csv").unlink()
    layers = inspect_checkpoint(tmp_path / "rtn")
    page = checkpoint_page("rtn", layers, layer_map(tmp_path / "rtn", LAYER))
    for sentence in ("There are no outliers", "There is no log of losses", "It has no outliers."):
        assert sentence in page
    assert plots.plot_checkpoint(layers, layer_map(tmp_path / "rtn", LAYER)).axes


def test_every_figure_has_words_on_its_axes(folder: Path, picture: LayerMap) -> None:
    weight = make_problem(32, 64).weight
    shares = np.array([0.01, 0.1, 1])
    scores = {"q_proj": picture.structure.to_dict(), "k_proj": picture.structure.to_dict()}
    figures = [
        plots.plot_checkpoint(inspect_checkpoint(folder), picture),
        plots.plot_sensitivity(weight.square().numpy(), "title"),
        plots.plot_structure(scores, "title"),
        plots.plot_error_share(shares, {"q_proj": shares}, "title"),
        plots.plot_statistics(second_level_effect(weight, SpqrConfig()), "title"),
        plots.plot_frontier({"SpQR": [(4, 10), (3, 12)]}, 9.5, "title"),
        plots.plot_sweep(SWEEP),
        plots.plot_sweep(SWEEP[:2]),
    ]
    for figure in figures:
        for axes in figure.axes:
            assert axes.get_xlabel() or axes.get_ylabel()
        assert figure.get_suptitle() or figure.axes[0].get_title()
        figure.canvas.draw()


def test_a_frontier_is_cut_off_below_what_would_flatten_it() -> None:
    near, far = {"SpQR": [(4.0, 10.0), (3.0, 12.0)]}, {"RTN": [(3.0, 30118.0)]}
    [axes] = plots.plot_frontier(near, 9.5, "title").axes
    assert not axes.texts
    [axes] = plots.plot_frontier(near | far, 9.5, "title").axes
    assert [text.get_text() for text in axes.texts] == ["↑ RTN: 30,118"]
    assert axes.get_ylim()[1] < 30
    [axes] = plots.plot_frontier(far, 9.5, "title").axes
    assert axes.get_ylim()[1] > 30000


def test_a_sweep_names_its_best_settings_and_those_far_off() -> None:
    panels = plots.plot_sweep(SWEEP).axes
    assert [axes.get_title().partition(":")[0] for axes in panels] == ["a", "b"]
    for axes in panels:
        assert "2 of 3 settings" in axes.get_title()
        assert axes.get_title().endswith("not shown: RTN 3 bit (24,714)")
        assert [text.get_text() for text in axes.texts] == ["1", "2"]
        names = {text.get_text() for text in axes.get_legend().get_texts()}
        assert names == {"1  small", "2  balanced"}
    with pytest.raises(InputError, match="nothing to draw"):
        plots.plot_sweep(SWEEP[:1])


def test_saving(picture: LayerMap, tmp_path: Path) -> None:
    figure = plots.plot_sensitivity(picture.picture, "title")
    plots.save(figure, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"cannot write .*map\.xyz"):
        plots.save(figure, tmp_path / "map.xyz")


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SpqrError, match=r"pip install 'spqr-numba\[notebooks\]'"):
        plots.plot_sensitivity(np.ones((2, 2), np.float32), "title")
