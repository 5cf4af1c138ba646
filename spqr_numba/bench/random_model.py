"""Models that were never trained, of a known shape, made on the device where they run.

A compressed one is packed from the start: no dense weight of it ever exists. Weights of one shape
hold the same random numbers, each in memory of its own; those that share an input have one order of
columns, as in real models, where it comes from the input.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import SpqrConfig
from ..format.layout import MatrixSpec, index_dtype
from ..format.matrix import SpqrMatrix
from ..model.blocks import find_blocks, input_groups, plan
from ..model.skeleton import build_skeleton, move_buffers
from ..nn import SpqrLinear
from .quantize import MODEL_SHAPES

__all__ = ["BLOCKS", "model_config", "random_model"]

BLOCKS = {"llama2-7b": 32, "llama2-70b": 80}
VOCABULARY = 32000
CONTEXT = 4096
STANDARD_DEVIATION = 0.02


def model_config(shape: str) -> Any:
    """The transformers config of a shape in BLOCKS."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=BLOCKS[shape],
        max_position_embeddings=CONTEXT,
        **MODEL_SHAPES[shape],
    )


def random_model(
    model_config: Any,
    config: SpqrConfig | None,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    outliers: float = 0.01,
) -> Any:
    """A causal LM of a transformers config; config None leaves it dense, `outliers` is a share.

    Raises ModelError where its blocks are of an unknown kind.
    """
    model: Any = build_skeleton(model_config, dtype)
    move_buffers(model, device)
    if config is not None:
        compress_linears(model, config, device, outliers)
    for module in model.modules():
        fill_parameters(module, device)
    model.tie_weights()
    return model


def compress_linears(model: Any, config: SpqrConfig, device: torch.device, outliers: float) -> None:
    """Put a random SpqrLinear into the place of every linear that `config` compresses."""
    known = cache(lambda spec: random_weight(spec, outliers, device))
    settings_of = plan(find_blocks(model), config)
    orders = random_orders(model.config, settings_of)
    for name, settings in settings_of.items():
        linear = model.get_submodule(name)
        spec = MatrixSpec.from_config(settings, linear.out_features, linear.in_features)
        tensors = {name: tensor.clone() for name, tensor in known(spec).tensors.items()}
        if name in orders:
            tensors["permutation"].copy_(orders[name])
        model.set_submodule(name, SpqrLinear(SpqrMatrix(spec, tensors)))


def random_orders(model_config: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Name -> permutation of a linear's inputs, the same for those that share them.

    Which do, a twin that has neither weights nor results tells.
    """
    twin: Any = build_skeleton(model_config, torch.float16).to("meta")
    linears = {name: twin.get_submodule(name) for name in names}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        token = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        groups = input_groups(linears, lambda: twin(token, use_cache=False))
    random = torch.Generator().manual_seed(0)
    orders: dict[str, torch.Tensor] = {}
    for group in groups:
        n = linears[group.names[0]].in_features
        order = torch.randperm(n, generator=random).to(index_dtype(n))
        orders |= dict.fromkeys(group.names, order)
    return orders


def fill_parameters(module: nn.Module, device: torch.device) -> None:
    """Random numbers for what is still on the meta device; norms, of one axis, get ones."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            real = torch.empty_like(parameter, device=device)
            real.fill_(1) if real.ndim == 1 else real.normal_(0, STANDARD_DEVIATION)
            setattr(module, name, nn.Parameter(real, requires_grad=False))


def random_weight(spec: MatrixSpec, outliers: float, device: torch.device) -> SpqrMatrix:
    """Random codes, statistics of a layer's size, and as many outliers in every row."""
    random = torch.Generator(device).manual_seed(0)
    m, n = spec.out_features, spec.in_features
    count = round(outliers * n)
    buffers = spec.buffers(count * m or None, permuted=True)
    levels = 2**spec.bits - 1
    scale = STANDARD_DEVIATION / (levels / 12**0.5)  # of evenly spread codes
    values = {
        "scale_zero": 0.7 * scale,
        "scale_scale": 0.6 * scale / 2**spec.scale_bits,
        "scales": scale,
        "zero_zero": 0.4 * levels,
        "zero_scale": 0.2 * levels / 2**spec.zero_bits,
        "zeros": 0.5 * levels,
        "outlier_values": 4 * STANDARD_DEVIATION,
    }
    tensors = {}
    for name, (size, dtype) in buffers.items():
        tensors[name] = torch.empty(size, dtype=dtype, device=device)
        if name in values:
            tensors[name].fill_(values[name])
        elif dtype == torch.int32:  # words of codes: any bits are codes
            tensors[name].random_(-(2**31), 2**31 - 1, generator=random)
    tensors["permutation"] = torch.randperm(n, generator=random, device=device).to(index_dtype(n))
    if count:
        places = torch.rand(m, n, generator=random, device=device).topk(count).indices
        tensors["outlier_columns"] = places.sort().values.flatten().to(index_dtype(n))
        offsets = torch.arange(m + 1, device=device) * count
        tensors["outlier_row_offsets"] = offsets.to(torch.int32)
    return SpqrMatrix(spec, tensors)
