"""The two classes through which transformers knows a compressed checkpoint.

transformers has a method "spqr" of its own, for the reference implementation's checkpoints. Ours
are told apart by `format_version`; theirs still go where they went before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SpQRConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_spqr import SpQRHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import SpqrConfig
from ..errors import CheckpointError, FormatError
from ..format.layout import FORMAT_VERSION, MatrixSpec
from ..nn import SpqrLinear
from .blocks import find_blocks, plan
from .registration import METHOD
from .source import model_names, opened

__all__ = ["SpqrHfQuantizer", "SpqrQuantizationConfig", "make_quantizer"]

Shapes = Mapping[str, tuple[int, ...]]


class SpqrQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` in config.json: method, format version, every field of SpqrConfig."""

    def __init__(self, config: SpqrConfig) -> None:
        self.quant_method = METHOD
        self.config = config

    @classmethod
    def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Ours, or transformers' own where `format_version` is missing.

        Raises FormatError for another format version, ConfigError for unknown settings.
        """
        if "format_version" not in config_dict:
            return SpQRConfig.from_dict(config_dict, *args, **kwargs)
        settings = dict(config_dict)
        version = settings.pop("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"the checkpoint has format version {version}, and this spqr_numba reads"
                f" {FORMAT_VERSION}; install the version that wrote it"
            )
        settings.pop("quant_method")
        return cls(SpqrConfig.from_dict(settings))

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            **self.config.to_dict(),
        }

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def make_quantizer(quantization_config: Any, **kwargs: Any) -> HfQuantizer:
    """The quantizer for our checkpoints, or transformers' own for the reference's."""
    if isinstance(quantization_config, SpqrQuantizationConfig):
        return SpqrHfQuantizer(quantization_config, **kwargs)
    return SpQRHfQuantizer(quantization_config, **kwargs)


class SpqrHfQuantizer(HfQuantizer):
    """Replaces linears by SpqrLinear before the weights are loaded, and checks them after."""

    requires_calibration = True
    quantization_config: SpqrQuantizationConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        """Raises CheckpointError where a buffer is missing or of another shape."""
        shapes = stored_shapes(model, checkpoint_files or [])
        for name, config in plan(find_blocks(model), self.quantization_config.config).items():
            model.set_submodule(name, empty_layer(name, model.get_submodule(name), config, shapes))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Raises CheckpointError where indices or statistics of a layer are damaged."""
        for name, layer in spqr_linears(model):
            try:
                layer.matrix.check_values()
            except FormatError as error:
                raise CheckpointError(f"{name}: {error}") from error
            layer.prepare()
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """model.dequantize(): plain linears again."""
        for name, layer in spqr_linears(model):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            model.set_submodule(name, linear)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """save_pretrained writes the same checkpoint again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The codes are integers."""
        return False


def spqr_linears(model: nn.Module) -> list[tuple[str, SpqrLinear]]:
    """Name and module of every compressed linear."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, SpqrLinear)]


def stored_shapes(model: nn.Module, files: list[str]) -> Shapes:
    """Name in the model -> shape, for every tensor of some safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with opened(Path(path)) as file:
            names = list(file.keys())
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return {name: shapes[stored] for name, stored in model_names(model, shapes).items()}


def empty_layer(name: str, linear: nn.Linear, config: SpqrConfig, shapes: Shapes) -> SpqrLinear:
    """The layer that the stored tensors of `name` fit into; what they must be, config says."""
    spec = MatrixSpec.from_config(config, linear.out_features, linear.in_features)
    outliers = None
    if config.outlier_threshold is not None:
        outliers = shapes.get(f"{name}.outlier_values", (0,))[0]
    buffers = spec.buffers(outliers, config.permutation != "identity")
    for buffer, (shape, _) in buffers.items():
        stored = shapes.get(f"{name}.{buffer}")
        if stored != shape:
            found = "is missing" if stored is None else f"is {list(stored)}"
            raise CheckpointError(
                f"{name}.{buffer} {found}, and must be {list(shape)}; the checkpoint is damaged"
            )
    dtype = None if linear.bias is None else linear.bias.dtype
    return SpqrLinear.empty(spec, buffers, bias=linear.bias is not None, dtype=dtype)
