"""What a GPU's memory holds during a run, and which kernels the settings take: decided and said."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import SpqrConfig
from ..format.layout import MatrixSpec
from ..kernels.columns import describe_walk

__all__ = ["log_paths", "states_crowd"]

COPIES = 6  # of H, or of the weight in fp32, that quantizing one weight holds at once

logger = logging.getLogger(__name__)


def states_crowd(states: int, largest: int, block: int, free: int) -> bool:
    """Whether hidden states would leave a GPU too little memory for the work on a block.

    states    bytes of all hidden states
    largest   in_features * (in_features + out_features) of the largest linear: H and the weight
    block     bytes of a block's weights
    free      bytes that are free
    """
    work = COPIES * torch.float32.itemsize * largest + block
    crowd = states + work > free
    logger.info(
        "hidden states (%.1f GB) stay %s: of the GPU's memory %.1f GB are free, and the work on a"
        " block takes up to %.1f GB",
        states / 1e9, "in main memory" if crowd else "on the GPU", free / 1e9, work / 1e9,
    )  # fmt: skip
    return crowd


def log_paths(model: nn.Module, settings: Mapping[str, SpqrConfig], device: torch.device) -> None:
    """Say once for each way of computing that linears of `model` take on a GPU which it is.

    settings: name of each linear to compress -> its settings.
    """
    paths: dict[str, str] = {}
    for name, config in settings.items():
        linear: Any = model.get_submodule(name)
        spec = MatrixSpec.from_config(config, linear.out_features, linear.in_features)
        halves = linear.weight.dtype.itemsize == 2
        hessian = "none" if not config.use_hessian else "by tensor cores" if halves else "in fp32"
        paths.setdefault(f"Hessian {hessian}, {describe_walk(spec, device)}", name)
    for path, name in paths.items():
        logger.info("%s and alike: %s", name, path)
