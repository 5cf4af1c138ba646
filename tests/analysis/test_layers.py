"""Layers with their Hessians: as hooks on the whole model see them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spqr_numba.analysis.layers import Heads, calibrated_layers
from spqr_numba.errors import InputError
from spqr_numba.model.calibration import load_tokens, sample_windows
from spqr_numba.model.integration import load_model
from spqr_numba.quantize.hessian import Hessian

from ..tiny import save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("dense") / "model")


def test_weights_and_hessians_are_the_whole_models(folder: Path) -> None:
    layers = list(calibrated_layers(str(folder), nsamples=4))
    model, tokenizer = load_model(str(folder))
    assert len(layers) == 14
    windows = sample_windows([load_tokens(None, tokenizer)], 4, 64, 0)
    for layer in layers:
        linear = model.get_submodule(layer.name)
        hessian = Hessian(linear.in_features)
        with linear.register_forward_pre_hook(lambda _, args, h=hessian: h.add(args[0])):
            model(windows)
        torch.testing.assert_close(layer.weight, linear.weight.detach())
        torch.testing.assert_close(layer.hessian, hessian.matrix, rtol=1e-4, atol=1e-6)


def test_only_some_and_their_heads(folder: Path) -> None:
    pattern = r"layers\.1\.(self_attn\.[qvo]|mlp\.up)_proj"
    layers = list(calibrated_layers(str(folder), only=pattern, nsamples=2))
    assert [layer.heads for layer in layers] == [
        Heads(8, rotated=True),
        Heads(8),
        Heads(8, axis=1),
        None,
    ]
    with pytest.raises(InputError, match="the pattern 'nothing' matches no linear of"):
        next(calibrated_layers(str(folder), only="nothing"))
