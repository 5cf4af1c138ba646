"""A picture of one compressed layer: where it is sensitive, or where its outliers are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .checkpoint import open_checkpoint, read_matrix
from .layers import calibrated_layers, heads_of
from .sensitivity import Floats, outlier_mask, sensitivity
from .structure import StructureScores, structure_scores

__all__ = ["LayerMap", "layer_map", "pooled"]

PIXELS = 256
NSAMPLES = 16


@dataclass(frozen=True)
class LayerMap:
    """One layer as a picture.

    measure         "sensitivity" or "outlier share"
    picture         fp32, at most [PIXELS, PIXELS]: the mean of the measure over a cell of weights
    rows, columns   out_features, in_features
    structure       of its outliers
    """

    layer: str
    measure: str
    picture: Floats
    rows: int
    columns: int
    structure: StructureScores


def layer_map(folder: Path | str, layer: str, model: str | None = None) -> LayerMap:
    """The map of one layer of a compressed checkpoint.

    A checkpoint holds neither the original weight nor its inputs: without the dense `model` that it
    was made from, the map is of the outliers. Raises InputError for a layer that is not there or
    whose shape in `model` is another, and what `read_matrix` and `calibrated_layers` raise.
    """
    matrix = read_matrix(folder, layer)
    source, _, plans = open_checkpoint(folder)
    mask = outlier_mask(matrix)
    measure, values = "outlier share", mask.astype(np.float32)
    if model is not None:
        only = f"^{re.escape(layer)}$"
        dense = next(calibrated_layers(model, only=only, nsamples=NSAMPLES))
        if dense.weight.shape != mask.shape:
            raise InputError(
                f"{layer} is {list(mask.shape)} in the checkpoint and {list(dense.weight.shape)} in"
                f" {model}; give the model that the checkpoint was made from"
            )
        values = sensitivity(dense.weight, dense.hessian, plans[layer])
        measure = "sensitivity"
    structure = structure_scores(mask, heads_of(layer, source.config))
    rows, columns = mask.shape
    return LayerMap(layer, measure, pooled(values), rows, columns, structure)


def pooled(values: Floats, pixels: int = PIXELS) -> NDArray[np.float32]:
    """Values [m, n] as means over cells, at most [pixels, pixels]; cells differ by one at most."""
    for axis in (0, 1):
        length = values.shape[axis]
        if length > pixels:
            starts = np.arange(pixels) * length // pixels
            sizes = np.diff(np.append(starts, length))
            sums = np.add.reduceat(values, starts, axis=axis, dtype=np.float64)
            values = (sums / (sizes[:, None] if axis == 0 else sizes)).astype(np.float32)
    return values
