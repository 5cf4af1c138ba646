"""Text from a model: prefill, then one token at a time through a key-value cache.

    prompts -> tokens [B, T] -> prefill -> logits [B, V] -> choose -> token [B, 1] --+
                                   ^                                                 |
                                   +------------- decode_one_token <----------------+

Prompts of different lengths are padded on the left, so that every row ends at the same column
and the padding is masked away. `decode_one_token` reads and advances a `Decoding`: with a static
cache nothing in it changes shape from step to step, so that a GPU can replay it as one graph.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError, InputError, NumericsError

__all__ = [
    "Decoding",
    "Generation",
    "Prompt",
    "Sampling",
    "TextStream",
    "decode_one_token",
    "encode_prompt",
    "generate",
    "generate_batch",
    "prefill",
]

Prompt = str | Sequence[Mapping[str, str]]
"""Text to continue as it stands, or messages ({"role": ..., "content": ...}) of a chat."""

REPLACEMENT_CHARACTER = "\ufffd"
MAX_CONTEXT_TOKENS = 8  # of the prompt, enough for any tokenizer to see where a word starts


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, or, with temperature > 0, at random.

    temperature   divides the logits; 0 is greedy
    top_k         keep only the k most likely tokens
    top_p         keep only the fewest most likely tokens whose probabilities reach top_p
    seed          of the random choice

    Raises ConfigError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError(
                "top_k and top_p choose among random tokens, and temperature 0 is greedy:"
                " set a temperature above 0"
            )

    def chooser(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from logits [B, V] to the chosen tokens [B, 1], int64."""
        if self.temperature == 0:
            return lambda logits: logits.argmax(dim=-1, keepdim=True)
        warpers = self._warpers()
        generator = torch.Generator(device).manual_seed(self.seed)

        def choose(logits: torch.Tensor) -> torch.Tensor:
            probabilities = warpers(None, logits.float()).softmax(dim=-1)
            return torch.multinomial(probabilities, 1, generator=generator)

        return choose

    def _warpers(self) -> Any:
        from transformers.generation import logits_process

        warpers = logits_process.LogitsProcessorList()
        warpers.append(logits_process.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            warpers.append(logits_process.TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(logits_process.TopPLogitsWarper(self.top_p))
        return warpers


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    tokens_per_second counts the decode steps alone: the first token comes from the prefill.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: bool
    """True where the model ended the text itself, False where it ran into a limit."""
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode speed of this one row of the batch."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if self.decode_seconds > 0 else 0.0


class TextStream:
    """Tokens in, text out, as soon as the text is certain.

    A piece never ends inside a UTF-8 character, and the pieces joined are the whole text. Each
    piece is decoded together with the one before it, because many tokenizers drop the space in
    front of the first word that they decode.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(context[-MAX_CONTEXT_TOKENS:])
        self._start = 0  # of the tokens that the next piece is decoded with
        self._sent = len(self._tokens)  # tokens whose text has left

    def push(self, token: int) -> str:
        """The text that `token` makes certain; empty while a character is incomplete."""
        self._tokens.append(token)
        piece = self._pending()
        return "" if piece.endswith(REPLACEMENT_CHARACTER) else self._send(piece)

    def finish(self) -> str:
        """The rest, incomplete characters as U+FFFD."""
        return self._send(self._pending())

    def _pending(self) -> str:
        return self._decode(self._start, None)[len(self._decode(self._start, self._sent)) :]

    def _send(self, piece: str) -> str:
        if piece:
            self._start, self._sent = self._sent, len(self._tokens)
        return piece

    def _decode(self, start: int, stop: int | None) -> str:
        return self._tokenizer.decode(
            self._tokens[start:stop],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )


@dataclass
class Decoding:
    """What a decode step reads and advances.

    cache           the model's keys and values
    attention_mask  [B, cache length] int64, 0 at the padding, or None where there is none
    positions       [B, 1] int64, of the next token in its own prompt
    step            tokens in the cache, padding included
    """

    model: Any
    cache: Any
    attention_mask: torch.Tensor | None
    positions: torch.Tensor
    step: int


def generate(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
    static_cache: bool | None = None,
) -> Generation:
    """Continue one prompt; `stream` gets each piece of text as it is made.

    The text ends at the model's end token, after max_new_tokens, or where the model's context is
    full. static_cache None means static on a GPU. Raises InputError for an empty prompt or one
    that fills the context, ConfigError for sampling settings out of range, NumericsError where
    the model's output is not finite.
    """
    return generate_batch(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        stream=(lambda _, piece: stream(piece)) if stream else None,
        static_cache=static_cache,
    )[0]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stream: Callable[[int, str], object] | None = None,
    static_cache: bool | None = None,
) -> list[Generation]:
    """Continue several prompts at once; `stream` gets (index of the prompt, piece of text).

    Raises as `generate`.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not prompts:
        return []
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    max_new_tokens = _fit_context(model, encoded, max_new_tokens)
    rows = [_Row(tokenizer, tokens, i, stream) for i, tokens in enumerate(encoded)]
    length = max(map(len, encoded)) + max_new_tokens
    tokens, mask = _pad_left(encoded, length, model.device)
    cache = _make_cache(model, length, static_cache)
    choose = (sampling or Sampling()).chooser(model.device)

    started = time.perf_counter()
    logits, state = prefill(model, tokens, mask, cache)
    chosen = choose(logits)
    chosen[0, 0].item()  # waits for the device
    prefill_seconds = time.perf_counter() - started
    _decode(state, rows, chosen, choose, max_new_tokens)
    return [row.result(prefill_seconds) for row in rows]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of a prompt; messages go through the tokenizer's chat template.

    Raises InputError where nothing is left to continue, or messages meet no chat template.
    """
    if isinstance(prompt, str):
        tokens = tokenizer(prompt)["input_ids"]
    elif getattr(tokenizer, "chat_template", None) is None:
        raise InputError("this tokenizer has no chat template; give the prompt as plain text")
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise InputError("the prompt is empty; give at least one word to continue")
    return tokens


@torch.inference_mode()
def prefill(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor | None, cache: Any
) -> tuple[torch.Tensor, Decoding]:
    """Run the prompts tokens [B, T], int64, and return the next token's logits [B, V].

    mask is [B, cache length], 0 at the padding, or None where no prompt is padded.
    """
    length = tokens.shape[1]
    if mask is None:
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    else:
        positions = (mask[:, :length].cumsum(dim=1) - 1).clamp(min=0)
    state = Decoding(model, cache, mask, positions, 0)
    logits = _forward(state, tokens)
    if not torch.isfinite(logits).all():
        raise NumericsError(
            "the model's output holds NaN or inf after the prompt; its weights are damaged, or"
            f" {logits.dtype} is too narrow for it (load it in float32)"
        )
    state.positions = positions[:, -1:].clone()
    state.positions += 1
    return logits, state


@torch.inference_mode()
def decode_one_token(state: Decoding, tokens: torch.Tensor) -> torch.Tensor:
    """Run the tokens [B, 1] just chosen, advance the state, return the next logits [B, V]."""
    logits = _forward(state, tokens)
    state.positions += 1
    return logits


def _forward(state: Decoding, tokens: torch.Tensor) -> torch.Tensor:
    state.step += tokens.shape[1]
    mask = state.attention_mask
    if mask is not None and not state.cache.is_compileable:
        mask = mask[:, : state.step]
    inputs = {"attention_mask": mask, "past_key_values": state.cache, "use_cache": True}
    if "position_ids" in inspect.signature(state.model.forward).parameters:
        inputs["position_ids"] = state.positions
    return state.model(tokens, **inputs).logits[:, -1]


class _Row:
    """One prompt of a batch while it grows."""

    def __init__(
        self,
        tokenizer: Any,
        prompt: list[int],
        index: int,
        stream: Callable[[int, str], object] | None,
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.ended = False
        self.seconds = 0.0
        self._text = TextStream(tokenizer, prompt)
        self._pieces: list[str] = []
        self._index = index
        self._stream = stream

    def push(self, token: int, end_tokens: set[int], seconds: float) -> None:
        """Take the next token, unless the row has ended."""
        if self.ended:
            return
        self.tokens.append(token)
        self.seconds = seconds
        self.ended = token in end_tokens
        if not self.ended:
            self._send(self._text.push(token))

    def finish(self) -> None:
        """Send what was held back."""
        self._send(self._text.finish())

    def result(self, prefill_seconds: float) -> Generation:
        """What the row has become."""
        return Generation(
            text="".join(self._pieces),
            tokens=tuple(self.tokens),
            prompt_tokens=len(self.prompt),
            ended=self.ended,
            prefill_seconds=prefill_seconds,
            decode_seconds=self.seconds,
        )

    def _send(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._stream:
                self._stream(self._index, piece)


def _decode(
    state: Decoding,
    rows: list[_Row],
    chosen: torch.Tensor,
    choose: Callable[[torch.Tensor], torch.Tensor],
    max_new_tokens: int,
) -> None:
    """Fill the rows: first the tokens that the prefill chose, then one decode step a token."""
    end_tokens = _end_tokens(state.model)
    started = time.perf_counter()
    for step in range(max_new_tokens):
        if step:
            chosen = choose(decode_one_token(state, chosen))
        values = chosen.flatten().tolist()  # waits for the device
        seconds = time.perf_counter() - started
        for row, value in zip(rows, values, strict=True):
            row.push(value, end_tokens, seconds)
        if all(row.ended for row in rows):
            break
    for row in rows:
        row.finish()


def _fit_context(model: Any, prompts: list[list[int]], max_new_tokens: int) -> int:
    """max_new_tokens, or fewer where the context is full before; InputError where it is full."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return max_new_tokens
    longest = max(map(len, prompts))
    if longest >= context:
        raise InputError(
            f"the prompt has {longest} tokens and the model's context holds {context}; shorten"
            " the prompt"
        )
    return min(max_new_tokens, context - longest)


def _pad_left(
    prompts: list[list[int]], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts as tokens [B, T] and their mask [B, length], None where all are equally long."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    # Any token serves as padding, for the mask hides it.
    tokens = torch.tensor(
        [[prompt[0]] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
    )
    if not any(pads):
        return tokens.to(device), None
    mask = torch.arange(length)[None, :] >= torch.tensor(pads)[:, None]
    return tokens.to(device), mask.to(device, torch.int64)


def _make_cache(model: Any, length: int, static: bool | None) -> Any:
    from transformers import DynamicCache, StaticCache

    if static is None:
        static = model.device.type == "cuda"
    if static:
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)
