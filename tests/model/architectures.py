"""Ten families of causal LMs, each with two blocks of width 64 and random weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from spqr_numba.model.blocks import find_blocks
from spqr_numba.model.skeleton import Parts, build_skeleton
from spqr_numba.model.source import open_source

from ..tiny import byte_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
GROUPED: dict[str, Any] = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
SLIDING: dict[str, Any] = {**GROUPED, "head_dim": 16, "sliding_window": 8}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "opt": ("OPTConfig", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 32}),
    "falcon": ("FalconConfig", COMMON),
    "gpt-neox": ("GPTNeoXConfig", {**COMMON, "intermediate_size": 96}),
    "gemma2": ("Gemma2Config", SLIDING),
    "gemma3": (
        "Gemma3TextConfig",
        {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", GROUPED),
}


def make(name: str, dtype: torch.dtype = torch.float16, **changes: Any) -> Any:
    """A random model of one of ARCHITECTURES; any field of its config can be changed."""
    class_name, fields = ARCHITECTURES[name]
    return make_from_config(getattr(transformers, class_name)(**{**fields, **changes}), dtype)


def make_from_config(config: Any, dtype: torch.dtype = torch.float16) -> Any:
    """A random causal LM with norms and biases that matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.data = parameter.data.to(dtype)  # not the buffers: rotary frequencies are fp32
    return model


def save(model: Any, folder: Path) -> Path:
    """A whole model folder: config, weights, tokenizer."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def parts_of(folder: Path, device: str = "cpu") -> Parts:
    """A saved model's, with nothing of it loaded."""
    source = open_source(str(folder))
    model = build_skeleton(source.config, torch.float32)
    return Parts(
        model, find_blocks(model), source.weights(model), torch.device(device), torch.float32
    )


@cache
def text() -> str:
    """Six hundred characters that repeat themselves enough to be worth a Hessian."""
    return "".join(f"{i} times {i} is {i * i}; " for i in range(40))
