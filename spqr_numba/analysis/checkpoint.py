"""What a compressed checkpoint is made of, read from its headers and its log alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import SpqrConfig
from ..errors import CheckpointError, InputError
from ..format.layout import MatrixSpec
from ..format.matrix import BUFFER_NAMES, SpqrMatrix
from ..model.blocks import find_blocks, plan
from ..model.quantizer import SpqrQuantizationConfig, empty_layer, stored_shapes
from ..model.registration import is_ours
from ..model.report import LAYERS_FILE, LayerRow, read_rows
from ..model.skeleton import build_skeleton
from ..model.source import FolderSource

__all__ = [
    "PARTS",
    "LayerSummary",
    "by_depth_and_kind",
    "inspect_checkpoint",
    "open_checkpoint",
    "read_matrix",
]

UNKNOWN = (None, None)
PARTS = {
    "codes": ("codes",),
    "statistics": ("scale_codes", "zero_codes", "scales", "zeros"),
    "second level": ("scale_scale", "scale_zero", "zero_scale", "zero_zero"),
    "outliers": ("outlier_row_offsets", "outlier_columns", "outlier_values"),
    "permutation": ("permutation",),
}
"""Part of a compressed weight -> its buffers."""


@dataclass(frozen=True)
class LayerSummary:
    """One compressed linear as it lies on disk.

    rows, columns   out_features, in_features
    nbytes          bytes of all its buffers
    parts           part (PARTS) -> its bytes
    outlier_share   outliers a weight
    loss            tr((W - W_hat) H (W - W_hat)^T), from the log of the compression; None where
                    there is no log, or no Hessian was used
    relative_loss   the same over tr(W H W^T)
    """

    layer: str
    rows: int
    columns: int
    nbytes: int
    parts: dict[str, int]
    outlier_share: float
    loss: float | None
    relative_loss: float | None

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / (self.rows * self.columns)

    @property
    def kind(self) -> str:
        """What the model calls such linears: "q_proj"."""
        return self.layer.rpartition(".")[2]

    @property
    def depth(self) -> int:
        """Index of its decoder block."""
        return next(int(part) for part in self.layer.split(".") if part.isdecimal())

    @property
    def part_bits(self) -> dict[str, float]:
        """Part -> bits a weight; their sum is `bits`."""
        return {part: 8 * size / (self.rows * self.columns) for part, size in self.parts.items()}


def inspect_checkpoint(folder: Path | str) -> list[LayerSummary]:
    """A summary of each compressed linear, in the order of the model.

    No weight is read. Raises CheckpointError where `folder` holds no whole checkpoint of ours.
    """
    source, model, plans = open_checkpoint(folder)
    shapes = stored_shapes(model, [str(path) for path in source.path.glob("*.safetensors")])
    losses = _losses(source.path)
    layers = (
        (name, empty_layer(name, model.get_submodule(name), settings, shapes))
        for name, settings in plans.items()
    )
    return [_summarize(name, layer.matrix, *losses.get(name, UNKNOWN)) for name, layer in layers]


def open_checkpoint(folder: Path | str) -> tuple[FolderSource, Any, dict[str, SpqrConfig]]:
    """(source, skeleton of the dense model, name -> settings of each compressed linear).

    Raises CheckpointError where `folder` holds no checkpoint of ours.
    """
    source = FolderSource(Path(folder))
    config = _our_config(source)
    model: Any = build_skeleton(source.config, torch.float16)
    return source, model, plan(find_blocks(model), config)


def by_depth_and_kind(
    layers: Sequence[LayerSummary], field: str
) -> tuple[list[str], NDArray[np.float64]]:
    """(kinds, table [blocks, kinds]) of one field of the layers; NaN where there is no value."""
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    table = np.full((max(layer.depth for layer in layers) + 1, len(kinds)), np.nan)
    for layer in layers:
        value = getattr(layer, field)
        if value is not None:
            table[layer.depth, kinds.index(layer.kind)] = value
    return kinds, table


def read_matrix(folder: Path | str, layer: str) -> SpqrMatrix:
    """The compressed weight called `layer`, and no other, of a checkpoint of ours.

    Raises CheckpointError where `folder` holds none, InputError for a layer that it has not.
    """
    source, model, settings = open_checkpoint(folder)
    if layer not in settings:
        raise InputError(
            f"the checkpoint has no compressed layer {layer!r}; its layers look like"
            f" {', '.join(list(settings)[:3])}"
        )
    rows, columns = model.get_submodule(layer).weight.shape
    weights = source.weights(model)
    stored = {name: f"{layer}.{name}" for name in BUFFER_NAMES if f"{layer}.{name}" in weights}
    tensors = {name: weights.read(path) for name, path in stored.items()}
    return SpqrMatrix(MatrixSpec.from_config(settings[layer], rows, columns), tensors)


def _summarize(
    name: str, matrix: SpqrMatrix, loss: float | None, relative_loss: float | None
) -> LayerSummary:
    return LayerSummary(
        layer=name,
        rows=matrix.spec.out_features,
        columns=matrix.spec.in_features,
        nbytes=matrix.nbytes,
        parts={
            part: sum(matrix.tensors[name].nbytes for name in names if name in matrix.tensors)
            for part, names in PARTS.items()
        },
        outlier_share=matrix.outlier_share,
        loss=loss,
        relative_loss=relative_loss,
    )


def _our_config(source: FolderSource) -> Any:
    settings = getattr(source.config, "quantization_config", None) or {}
    if not is_ours(settings):
        raise CheckpointError(
            f"{source.label} is not a model that `spqr compress` wrote: its config.json names"
            f" {settings.get('quant_method', 'no quantization')!r}"
        )
    return SpqrQuantizationConfig.from_dict(settings).config


def _losses(folder: Path) -> dict[str, tuple[float | None, float | None]]:
    """Layer -> (loss, relative loss), as the compression logged them."""
    log = folder / LAYERS_FILE
    if not log.is_file():
        return {}
    rows = read_rows(log.read_text(encoding="utf-8"), LayerRow)
    return {row.layer: (_known(row.loss), _known(row.relative_loss)) for row in rows}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
