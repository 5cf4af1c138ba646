from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig, MixtralConfig, T5Config

from spqr_numba.config import SpqrConfig
from spqr_numba.errors import ConfigError, ModelError
from spqr_numba.model.blocks import (
    check_causal,
    check_dense,
    find_blocks,
    find_linears,
    input_groups,
    plan,
)

from . import architectures
from .architectures import ARCHITECTURES, GROUPED

PATHS = {
    "opt": "model.decoder.layers",
    "falcon": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_found(name: str) -> None:
    blocks = find_blocks(architectures.make(name))
    assert blocks.path == PATHS.get(name, "model.layers")
    assert len(blocks) == 2
    assert blocks.name(1) == f"{blocks.path}.1"


def test_the_outer_list_wins_over_lists_inside_the_blocks() -> None:
    model = nn.Module()
    model.towers = nn.ModuleList([nn.Linear(4, 4)])
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.blocks = nn.ModuleList([block])
    assert find_blocks(model).path == "blocks"


def test_no_list_of_blocks_is_an_error() -> None:
    with pytest.raises(ModelError, match="Linear has no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))


def test_linears_of_a_block_by_name() -> None:
    block = find_blocks(architectures.make("gpt-neox")).modules[0]
    assert set(find_linears(block)) == {
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    }


def test_plan_skips_and_overrides_by_full_name() -> None:
    config = SpqrConfig(skip=("up_proj",), overrides=((r"layers\.1\..*q_proj", {"bits": 4}),))
    planned = plan(find_blocks(architectures.make("llama")), config)
    assert len(planned) == 2 * 7 - 2
    assert "lm_head" not in planned
    assert not any("up_proj" in name for name in planned)
    assert planned["model.layers.0.self_attn.q_proj"].bits == 3
    assert planned["model.layers.1.self_attn.q_proj"].bits == 4


@pytest.mark.parametrize(
    "config",
    [SpqrConfig(skip=("querry",)), SpqrConfig(overrides=(("querry", {"bits": 4}),))],
    ids=["skip", "override"],
)
def test_a_pattern_that_matches_nothing_is_an_error(config: SpqrConfig) -> None:
    with pytest.raises(ConfigError, match=r"'querry' matches no weight .* look like model\."):
        plan(find_blocks(architectures.make("llama")), config)


def test_skipping_everything_is_an_error() -> None:
    with pytest.raises(ConfigError, match="skip leaves none of the 14 linears"):
        plan(find_blocks(architectures.make("llama")), SpqrConfig(skip=(".",)))


def test_conv1d_of_gpt2_is_named() -> None:
    model = architectures.make_from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(
        ModelError, match=r"transformer\.h\.0\.attn\.c_attn \(Conv1D\) holds weight"
    ):
        plan(find_blocks(model), SpqrConfig())


def test_fused_experts_are_named_and_can_be_skipped() -> None:
    config = MixtralConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)
    blocks = find_blocks(architectures.make_from_config(config))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.\S+ \(Mixtral\w+\) holds"):
        plan(blocks, SpqrConfig())
    assert len(plan(blocks, SpqrConfig(skip=("gate", "experts")))) == 2 * 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "t5 is an encoder-decoder"),
        (BertConfig(), "bert is not a causal language model"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM is not a causal"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "is not a causal"),
    ],
)
def test_only_causal_models_pass(config: object, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        check_causal(config)


def test_causal_models_pass_without_and_with_a_named_class() -> None:
    check_causal(LlamaConfig())
    check_causal(LlamaConfig(architectures=["LlamaForCausalLM"]))


def test_a_quantized_model_is_refused() -> None:
    config = LlamaConfig()
    check_dense(config)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match=r"already quantized \(gptq\)"):
        check_dense(config)


class Branches(nn.Module):
    """a and b see x, c sees a view of it, d sees x changed in place, e is never called."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(x) + self.a(input=x) + self.c(x * 1)
        x += 1
        return y + self.d(x)


def test_linears_are_grouped_by_the_identity_of_their_input() -> None:
    block = Branches()
    with torch.no_grad():
        groups = input_groups(find_linears(block), lambda: block(torch.ones(2, 4)))
    assert [group.names for group in groups] == [("b", "a"), ("c",), ("d",)]
    assert not any(linear._forward_pre_hooks for linear in find_linears(block).values())
