"""A tokenizer and a random model small enough to make in every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END_TOKEN = "<end>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte (0 to 255, in the byte-level alphabet's order), and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN)
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two blocks of width 32, random weights; any LlamaConfig field can be changed."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": None,
    } | changes
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def save_tiny_llama(folder: Path, chat: bool = False, **changes: Any) -> Path:
    """A whole model folder: config, fp16 weights, tokenizer."""
    tiny_llama(**changes).half().save_pretrained(folder)
    byte_tokenizer(chat).save_pretrained(folder)
    return folder
