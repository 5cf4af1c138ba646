"""A checkpoint as one HTML page that needs nothing else: no script, no font, no request.

Charts are inline SVG that stretches with the page, their words are HTML, and the map is an embedded
PNG, so that all of it is readable on a telephone too.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from .checkpoint import PARTS, LayerSummary, by_depth_and_kind
from .findings import (
    bits_finding,
    loss_finding,
    map_finding,
    outlier_finding,
    structure_finding,
    totals,
)
from .maps import LayerMap
from .sensitivity import Floats

__all__ = ["checkpoint_page", "png"]

WORST = 10
MOST_APART = 60  # layers; between more, the gaps would only make a grey of the colours
DARK, LIGHT = (8, 48, 92), (247, 251, 255)  # one hue, so that a greyscale print reads the same
PART_COLORS = dict(zip(PARTS, ("#08306b", "#4a90c8", "#a9cfe8", "#d95f0e", "#8a8a8a"), strict=True))
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; }
.note { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; }
.facts div { background: #eff4f9; border-radius: .5rem; padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.35rem; line-height: 1.3; }
.facts span { color: #444; font-size: .85rem; }
.chart { display: grid; grid-template-columns: auto 1fr; column-gap: .5rem; }
.chart svg { display: block; width: 100%; height: 15rem; background: #f6f8fa; }
.ticks { display: flex; flex-direction: column; justify-content: space-between; text-align: right;
         font-size: .8rem; color: #444; line-height: 1; }
.below { grid-column: 2; display: flex; justify-content: space-between; font-size: .8rem;
         color: #444; margin-top: .25rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9rem; margin: .5rem 0; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
            border-radius: .15rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
        font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: right; padding: .2rem .3rem; vertical-align: bottom; }
td { text-align: right; padding: .2rem .3rem; border: 1px solid #fff; }
.worst td { border: 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
.worst td:first-child, .worst th:first-child { text-align: left; }
.worst td:not(:first-child) { white-space: nowrap; }
.heat { table-layout: fixed; text-align: center; }
.heat td, .heat th { text-align: center; padding: .25rem 0; }
.heat th { overflow-wrap: anywhere; }
.map { max-width: 36rem; }
.map img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid #ccc; }
.ramp { height: .8rem; margin-top: .5rem; border: 1px solid #ccc; }
@media (max-width: 30rem) { table { font-size: .72rem; } .chart svg { height: 11rem; } }
"""


def checkpoint_page(title: str, layers: Sequence[LayerSummary], picture: LayerMap) -> str:
    """The page of a checkpoint: its layers, and the map of one of them."""
    sections = [
        f"<h1>{escape(title)}</h1>",
        '<p class="note">Compressed with SpQR; every number is measured from the files.</p>',
        _facts(layers),
        _bits(layers),
        _heat(layers, "outlier_share", outlier_finding(layers), "Outliers, % of the weights."),
        *_losses(layers),
        _map(picture),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or a browser asks the server for one
        f"<title>{escape(title)} · SpQR</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def png(picture: Floats, logarithmic: bool = False) -> bytes:
    """Values [r, c], not negative, as a PNG: light is little, dark is much."""
    shades = _relative(picture, logarithmic)
    ramp = [np.array(LIGHT) + (np.array(DARK) - LIGHT) * i / 255 for i in range(256)]
    palette = np.array(ramp).round().astype(np.uint8)
    pixels = (255 * shades).round().astype(np.uint8)
    rows, columns = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: no filter
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits, of a palette
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", header),
            (b"PLTE", palette.tobytes()),
            (b"IDAT", zlib.compress(lines, 9)),
            (b"IEND", b""),
        )
    )


def _relative(values: Floats, logarithmic: bool) -> Floats:
    """Values as 0 ... 1; logarithmic ones over the three decades below the largest."""
    largest = float(values.max())
    if largest <= 0:
        return np.zeros_like(values)
    if not logarithmic:
        return values / largest
    return np.clip(1 + np.log10(np.maximum(values / largest, 1e-3)) / 3, 0, 1)


def _facts(layers: Sequence[LayerSummary]) -> str:
    total = totals(layers)
    facts = {
        "bits a weight": f"{total.bits:.2f}",
        "of all weights are outliers": f"{total.outlier_share:.2%}",
        "compressed weights": f"{total.weights / 1e6:,.1f} million",
        "in their buffers": f"{total.nbytes / 1e6:,.1f} MB",
        "compressed layers": f"{len(layers)}",
    }
    tiles = (f"<div><b>{value}</b><span>{name}</span></div>" for name, value in facts.items())
    return f'<div class="facts">{"".join(tiles)}</div>'


def _bits(layers: Sequence[LayerSummary]) -> str:
    """Bits a weight of each layer, stacked by part."""
    top = math.ceil(max(layer.bits for layer in layers))
    average = totals(layers).part_bits
    legend = "".join(
        f'<span><i style="background:{PART_COLORS[part]}"></i>{part}, {bits:.3f} on average</span>'
        for part, bits in average.items()
        if bits
    )
    ticks = "".join(f"<span>{tick}</span>" for tick in range(top, -1, -1))
    gap = 0.1 if len(layers) <= MOST_APART else 0.0
    bars = "".join(_bar(i, layer, top, gap) for i, layer in enumerate(layers))
    return (
        f"<h2>{escape(bits_finding(layers))}</h2>\n<p>Bits a weight of each layer, by what they are"
        f' for.</p>\n<div class="legend">{legend}</div>\n<div class="chart">'
        f'<div class="ticks">{ticks}</div><svg viewBox="0 0 {len(layers)} {top}"'
        f' preserveAspectRatio="none" shape-rendering="crispEdges" role="img"'
        f' aria-label="Bits a weight by layer">{bars}</svg>'
        f'<div class="below"><span>first layer</span><span>last layer</span></div></div>'
    )


def _bar(index: int, layer: LayerSummary, top: int, gap: float) -> str:
    parts, height = [], 0.0
    for part, bits in layer.part_bits.items():
        height += bits
        if bits:
            parts.append(
                f'<rect x="{index}" y="{top - height:.4f}" width="{1 - gap}" height="{bits:.4f}"'
                f' fill="{PART_COLORS[part]}"><title>{escape(layer.layer)}: {part}'
                f" {bits:.3f} bits</title></rect>"
            )
    return "".join(parts)


def _heat(layers: Sequence[LayerSummary], field: str, finding: str, caption: str) -> str:
    """A table of blocks and kinds, shaded by value; values are shares, shown in %."""
    kinds, table = by_depth_and_kind(layers, field)
    shades = _relative(np.nan_to_num(table - np.nanmin(table)).astype(np.float32), False)
    head = "".join(f"<th>{escape(kind.removesuffix('_proj'))}</th>" for kind in kinds)
    lines = "".join(
        f"<tr><th>{depth}</th>{''.join(map(_cell, values, shades[depth]))}</tr>"
        for depth, values in enumerate(table)
    )
    return (
        f"<h2>{escape(finding)}</h2>\n<p>{caption} A line is a decoder block, the first on top.</p>"
        f'\n<table class="heat"><tr><th>block</th>{head}</tr>{lines}</table>'
    )


def _cell(value: float, shade: float) -> str:
    if math.isnan(value):
        return "<td></td>"
    color = ",".join(
        str(round(a + (b - a) * float(shade))) for a, b in zip(LIGHT, DARK, strict=True)
    )
    ink = "#fff" if shade > 0.6 else "#1a1a1a"
    return f'<td style="background:rgb({color});color:{ink}">{100 * value:.2f}</td>'


def _losses(layers: Sequence[LayerSummary]) -> list[str]:
    """Loss by layer and the worst layers, where there is a log of losses."""
    worst = sorted(
        (layer for layer in layers if layer.relative_loss is not None),
        key=lambda layer: -(layer.relative_loss or 0),
    )[:WORST]
    if not worst:
        return [f'<p class="note">{loss_finding(layers)}.</p>']
    caption = "Squared error of the output, % of its square."
    heat = _heat(layers, "relative_loss", loss_finding(layers), caption)
    lines = "".join(_worst_line(layer) for layer in worst)
    head = "<th>layer</th><th>shape</th><th>bits</th><th>outliers %</th><th>loss %</th>"
    return [
        heat,
        f'<h2>The {len(worst)} worst layers</h2>\n<table class="worst"><tr>{head}</tr>{lines}'
        "</table>",
    ]


def _worst_line(layer: LayerSummary) -> str:
    name = escape(layer.layer).replace(".", ".<wbr>")  # where a narrow page may break it
    return (
        f"<tr><td>{name}</td><td>{layer.rows} × {layer.columns}</td>"
        f"<td>{layer.bits:.2f}</td><td>{100 * layer.outlier_share:.2f}</td>"
        f"<td>{100 * (layer.relative_loss or 0):.2f}</td></tr>"
    )


def _map(picture: LayerMap) -> str:
    logarithmic = picture.measure == "sensitivity"
    data = base64.b64encode(png(picture.picture, logarithmic)).decode()
    largest = f"{picture.picture.max():.3g}"
    least = "0.1 % of that or less" if logarithmic else "0"
    ramp = f"linear-gradient(90deg, rgb{LIGHT}, rgb{DARK})"
    height, width = picture.picture.shape
    cell = f"the mean of {picture.rows / height:.3g} × {picture.columns / width:.3g} weights"
    if picture.picture.shape == (picture.rows, picture.columns):
        cell = "one weight"
    return (
        f"<h2>{escape(map_finding(picture))}</h2>\n<p>{escape(structure_finding(picture))} A pixel"
        f" is {cell}. Down: the {picture.rows} outputs; across: the"
        f" {picture.columns} inputs, in the layer's own order.</p>\n"
        f'<div class="map"><img alt="Map of {escape(picture.layer)}"'
        f' src="data:image/png;base64,{data}"><div class="ramp" style="background:{ramp}"></div>'
        f'<div class="below"><span>{least}</span><span>{largest} {picture.measure}</span></div>'
        "</div>"
    )
