"""The bundled model: whole, small, shaped for grouping, and literate enough to lose by rounding."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spqr_numba.demo import MODEL_PATH
from spqr_numba.demo.corpus import held_out_text
from spqr_numba.evaluate.perplexity import perplexity
from spqr_numba.model.calibration import consecutive_windows, tokenize

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
LARGEST_BYTES = 12_000_000

# Measured: 36.8 on the manual of Python 3.11, 37.1 on that of 3.13.
LARGEST_PERPLEXITY = 40.0
LEAST_HARM = 1.04  # of rounding to 3 bits: measured 1.075


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)


@pytest.fixture(scope="module")
def windows(tokenizer: Any) -> torch.Tensor:
    return consecutive_windows(tokenize(held_out_text(), tokenizer), 512)


def test_the_folder_holds_a_whole_model_and_stays_small() -> None:
    files = list(MODEL_PATH.iterdir())
    assert {file.name for file in files} == FILES
    assert sum(file.stat().st_size for file in files) <= LARGEST_BYTES


def test_weights_are_stored_in_half_precision() -> None:
    assert json.loads((MODEL_PATH / "config.json").read_text())["dtype"] == "float16"
    weights = load_file(MODEL_PATH / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_linears_in_blocks_take_multiples_of_32_inputs(model: Any) -> None:
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(linear.in_features % 32 == 0 for linear in linears)


def test_embeddings_are_tied(model: Any) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_is_greedy_and_ends(model: Any, tokenizer: Any) -> None:
    config = model.generation_config
    assert not config.do_sample
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    "text", ["", 'The "with" statement\n   indented', "naïve 漢字 🙂", "\t\r\n  "], ids=repr
)
def test_the_tokenizer_opens_a_text_and_keeps_every_byte(tokenizer: Any, text: str) -> None:
    first, *rest = tokenizer(text)["input_ids"]
    assert first == tokenizer.bos_token_id
    assert tokenizer.decode(rest) == text


def test_it_predicts_topics_that_it_has_not_read(model: Any, windows: torch.Tensor) -> None:
    assert perplexity(model, windows) < LARGEST_PERPLEXITY


def test_rounding_to_3_bits_visibly_hurts_it(model: Any, windows: torch.Tensor) -> None:
    rounded = copy.deepcopy(model)
    for module in rounded.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = round_to_nearest(module.weight.data, bits=3)
    few = windows[::4]
    assert perplexity(rounded, few) > LEAST_HARM * perplexity(model, few)


def round_to_nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """weight [m, n] on a min-max grid of 2^bits values a row."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return low + step * ((weight - low) / step).round()
