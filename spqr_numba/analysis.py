"""What a compressed checkpoint is made of, read from its headers and its log alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .format.matrix import SpqrMatrix
from .model.blocks import find_blocks, plan
from .model.quantizer import SpqrQuantizationConfig, empty_layer, stored_shapes
from .model.registration import METHOD
from .model.report import LAYERS_FILE, read_rows
from .model.skeleton import build_skeleton
from .model.source import FolderSource

__all__ = ["LayerSummary", "inspect_checkpoint"]

UNKNOWN = (None, None)


@dataclass(frozen=True)
class LayerSummary:
    """One compressed linear as it lies on disk.

    rows, columns   out_features, in_features
    nbytes          bytes of all its buffers
    outlier_share   outliers a weight
    loss            tr((W - W_hat) H (W - W_hat)^T), from the log of the compression; None where
                    there is no log, or no Hessian was used
    relative_loss   the same over tr(W H W^T)
    """

    layer: str
    rows: int
    columns: int
    nbytes: int
    outlier_share: float
    loss: float | None
    relative_loss: float | None

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / (self.rows * self.columns)


def inspect_checkpoint(folder: Path | str) -> list[LayerSummary]:
    """A summary of each compressed linear, in the order of the model.

    No weight is read. Raises CheckpointError where `folder` holds no whole checkpoint of ours.
    """
    source = FolderSource(Path(folder))
    config = _our_config(source)
    model: Any = build_skeleton(source.config, torch.float16)
    shapes = stored_shapes(model, [str(path) for path in source.path.glob("*.safetensors")])
    losses = _losses(source.path)
    layers = (
        (name, empty_layer(name, model.get_submodule(name), settings, shapes))
        for name, settings in plan(find_blocks(model), config).items()
    )
    return [_summarize(name, layer.matrix, *losses.get(name, UNKNOWN)) for name, layer in layers]


def _summarize(
    name: str, matrix: SpqrMatrix, loss: float | None, relative_loss: float | None
) -> LayerSummary:
    return LayerSummary(
        layer=name,
        rows=matrix.spec.out_features,
        columns=matrix.spec.in_features,
        nbytes=matrix.nbytes,
        outlier_share=matrix.outlier_share,
        loss=loss,
        relative_loss=relative_loss,
    )


def _our_config(source: FolderSource) -> Any:
    settings = getattr(source.config, "quantization_config", None) or {}
    if settings.get("quant_method") != METHOD or "format_version" not in settings:
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
    rows = read_rows(log.read_text(encoding="utf-8"))
    return {row.layer: (_known(row.loss), _known(row.relative_loss)) for row in rows}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
