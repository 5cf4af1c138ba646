"""The decode loop against transformers' own, and text that streams whole characters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from spqr_numba.errors import ConfigError, InputError, NumericsError
from spqr_numba.generate import Sampling, TextStream, encode_prompt, generate, generate_batch

from .tiny import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer(chat=True)
CHAT = [{"role": "user", "content": "hi"}]
PROMPTS = ["a longer prompt", "b", CHAT]
CACHES = pytest.mark.parametrize("static_cache", [False, True], ids=["dynamic", "static"])


def tiny_family(name: str) -> PreTrainedModel:
    """A random model of a family that handles positions or windows in its own way."""
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "eos_token_id": 256}
    mlp = {"intermediate_size": 48, "max_position_embeddings": 64}
    models = {
        "opt": lambda: OPTForCausalLM(
            OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
        ),
        "falcon": lambda: FalconForCausalLM(FalconConfig(**shape)),
        "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **mlp)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**shape, **mlp, num_key_value_heads=2, head_dim=8, sliding_window=6)
        ),
    }
    return models[name]().eval()


@CACHES
def test_greedy_is_what_transformers_generates(static_cache: bool) -> None:
    model = tiny_llama()
    inputs = TOKENIZER("hello wörld", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    ours = generate(model, TOKENIZER, "hello wörld", max_new_tokens=20, static_cache=static_cache)
    assert list(ours.tokens) == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert ours.prompt_tokens == 12
    assert not ours.ended
    assert ours.tokens_per_second > 0


@CACHES
@pytest.mark.parametrize("family", ["opt", "falcon", "gpt-neox", "gemma2"])
def test_a_batch_gives_what_its_prompts_give_alone(family: str, static_cache: bool) -> None:
    model = tiny_family(family)
    together = generate_batch(
        model, TOKENIZER, PROMPTS, max_new_tokens=8, static_cache=static_cache
    )
    alone = [generate(model, TOKENIZER, prompt, max_new_tokens=8) for prompt in PROMPTS]
    assert [row.tokens for row in together] == [row.tokens for row in alone]


def test_no_prompts_give_nothing() -> None:
    assert generate_batch(tiny_llama(), TOKENIZER, []) == []


def test_the_end_token_ends_the_text() -> None:
    model = tiny_llama()
    free = generate(model, TOKENIZER, "a", max_new_tokens=8)
    model.generation_config.eos_token_id = [999, free.tokens[3]]
    ended = generate(model, TOKENIZER, "a", max_new_tokens=8)
    assert ended.ended
    assert ended.tokens == free.tokens[:4]
    assert ended.text == TOKENIZER.decode(free.tokens[:3])


def test_a_row_that_ended_stays_as_it_is_while_others_go_on() -> None:
    model = tiny_llama()
    first, second = generate_batch(model, TOKENIZER, ["a", "b"], max_new_tokens=8)
    end = next(t for t in first.tokens if t not in second.tokens)
    model.generation_config.eos_token_id = end
    ended, going = generate_batch(model, TOKENIZER, ["a", "b"], max_new_tokens=8)
    assert ended.tokens == first.tokens[: first.tokens.index(end) + 1]
    assert going.tokens == second.tokens


def test_the_context_limits_the_text() -> None:
    model = tiny_llama(max_position_embeddings=16)
    assert len(generate(model, TOKENIZER, "x" * 10, max_new_tokens=50).tokens) == 6
    with pytest.raises(InputError, match="16 tokens and the model's context holds 16"):
        generate(model, TOKENIZER, "x" * 16)


def test_same_seed_same_text() -> None:
    model = tiny_llama()

    def sample(seed: int) -> tuple[int, ...]:
        return generate(
            model,
            TOKENIZER,
            "a",
            max_new_tokens=12,
            temperature=1.5,
            top_k=100,
            top_p=0.95,
            seed=seed,
        ).tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(1.0, top_k=2), {0, 1}),
        (Sampling(1.0, top_p=0.6), {0, 1}),
        (Sampling(1.0, top_p=0.4), {0}),
        (Sampling(0.01), {0}),
        (Sampling(1.0), {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_sampling_keeps_what_it_says(sampling: Sampling, possible: set[int]) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(500, 1)
    chosen = sampling.chooser(torch.device("cpu"))(logits)
    assert chosen.shape == (500, 1)
    assert set(chosen.flatten().tolist()) == possible


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 5}, "temperature 0 is greedy"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(tiny_llama(), TOKENIZER, "a", **settings)  # type: ignore[arg-type]


def test_messages_go_through_the_chat_template() -> None:
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, CHAT)) == "<user>hi<assistant>"
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(byte_tokenizer(), CHAT)


def test_an_empty_prompt_is_an_error() -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(tiny_llama(), TOKENIZER, "")


def test_damaged_weights_are_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NumericsError, match="NaN or inf after the prompt"):
        generate(model, TOKENIZER, "a")


@given(st.text(max_size=12), st.text(min_size=1, max_size=30))
@settings(deadline=None)
def test_a_stream_sends_whole_characters_and_all_of_them(context: str, text: str) -> None:
    stream = TextStream(TOKENIZER, TOKENIZER(context)["input_ids"])
    pieces = [stream.push(token) for token in TOKENIZER(text)["input_ids"]]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_that_never_completes_is_sent_at_the_end() -> None:
    stream = TextStream(TOKENIZER)
    tokens = TOKENIZER("a€")["input_ids"]
    assert [stream.push(token) for token in tokens[:-1]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_pieces_join_to_the_text() -> None:
    pieces: list[str] = []
    result = generate(tiny_llama(), TOKENIZER, "a", max_new_tokens=30, stream=pieces.append)
    assert "".join(pieces) == result.text
    assert len(pieces) > 1


def test_a_batch_streams_by_index() -> None:
    pieces = {0: "", 1: ""}

    def take(index: int, piece: str) -> None:
        pieces[index] += piece

    rows = generate_batch(tiny_llama(), TOKENIZER, ["a", "bc"], max_new_tokens=9, stream=take)
    assert [row.text for row in rows] == [pieces[0], pieces[1]]
