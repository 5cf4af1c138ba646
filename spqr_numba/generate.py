"""Text from a model: prompts become tokens, tokens more tokens (decoding.py), and those text.

Prompts of different lengths are padded on the left, so that every row ends at the same column
and the padding is masked away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from .decoding import Steps, cache_length, make_cache, prefill
from .errors import ConfigError, InputError
from .sampling import Sampling

__all__ = [
    "Generation",
    "Prompt",
    "Sampling",
    "TextStream",
    "encode_prompt",
    "generate",
    "generate_batch",
]

Prompt = str | Sequence[Mapping[str, str]]
"""Text to continue as it stands, or messages ({"role": ..., "content": ...}) of a chat."""

REPLACEMENT_CHARACTER = "\ufffd"
MAX_CONTEXT_TOKENS = 8  # of the prompt, enough for any tokenizer to see where a word starts


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    The first token comes from the prefill; start_up_tokens more were made within start_up_seconds,
    until the decode step was captured or compiled. tokens_per_second counts what came after.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: bool
    """True where the model ended the text itself, False where it ran into a limit."""
    prefill_seconds: float
    start_up_tokens: int
    start_up_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode speed of this one row of the batch."""
        steps = len(self.tokens) - 1 - self.start_up_tokens
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
    graph: bool | None = None,
    compile: bool = False,
) -> Generation:
    """Continue one prompt; `stream` gets each piece of text as it is made.

    The text ends at the model's end token, after max_new_tokens, or where the model's context is
    full. static_cache None means static on a GPU; graph None means that the decode step is then
    captured in a CUDA graph, unless the model forbids it, which is logged. compile compiles the
    step with torch.compile first: faster tokens after a minute of waiting. Raises InputError for an
    empty prompt or one that fills the context, ConfigError for settings out of range, NumericsError
    where the model's output is not finite.
    """
    return generate_batch(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed),
        stream=(lambda _, piece: stream(piece)) if stream else None,
        static_cache=static_cache,
        graph=graph,
        compile=compile,
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
    graph: bool | None = None,
    compile: bool = False,
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
    static, graph = _engine(model.device, static_cache, graph, compile)
    length = cache_length(max(map(len, encoded)) + max_new_tokens, compile)
    tokens, mask = _pad_left(encoded, length, model.device)
    choose = (sampling or Sampling()).chooser(model.device)

    started = time.perf_counter()
    logits, state = prefill(model, tokens, mask, make_cache(model, length, static))
    chosen = choose(logits)
    first = chosen[:, 0].tolist()  # waits for the device
    prefill_seconds = time.perf_counter() - started
    steps = Steps(state, chosen, choose, max_new_tokens - 1, graph=graph, compiled=compile)
    _collect(rows, chain([first], steps), _end_tokens(model))
    return [row.result(prefill_seconds, steps) for row in rows]


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

    def result(self, prefill_seconds: float, steps: Steps) -> Generation:
        """What the row has become."""
        start_up_tokens = min(steps.start_up_steps, len(self.tokens) - 1)
        return Generation(
            text="".join(self._pieces),
            tokens=tuple(self.tokens),
            prompt_tokens=len(self.prompt),
            ended=self.ended,
            prefill_seconds=prefill_seconds,
            start_up_tokens=start_up_tokens,
            start_up_seconds=steps.start_up_seconds,
            decode_seconds=max(self.seconds - steps.start_up_seconds, 0.0),
        )

    def _send(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._stream:
                self._stream(self._index, piece)


def _collect(rows: list[_Row], steps: Iterable[list[int]], ends: set[int]) -> None:
    """Fill the rows, a list of tokens a step, until all have ended."""
    started = time.perf_counter()
    for values in steps:
        seconds = time.perf_counter() - started
        for row, value in zip(rows, values, strict=True):
            row.push(value, ends, seconds)
        if all(row.ended for row in rows):
            break
    for row in rows:
        row.finish()


def _engine(
    device: torch.device, static_cache: bool | None, graph: bool | None, compile: bool
) -> tuple[bool, bool]:
    """Whether the cache is static, and whether the decode step is captured in a CUDA graph."""
    static = static_cache
    if static is None:
        static = bool(graph) or compile or device.type == "cuda"
    if graph is None:
        graph = static and device.type == "cuda"
    if graph and device.type != "cuda":
        raise ConfigError(f"graph=True needs a model on a GPU, and this one is on {device}")
    if not static and (graph or compile):
        raise ConfigError("graph and compile need a static cache; leave static_cache out")
    return static, graph


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


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)
