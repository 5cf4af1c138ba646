"""spqr generate: a model continues a prompt, or chats."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ._command import Command, emit, note
from ._options import device_option, model_argument

if TYPE_CHECKING:
    from spqr_numba.generate import Generation, Prompt

__all__ = ["generate"]


@click.command(cls=Command)
@model_argument
@click.option(
    "-p", "--prompt", "prompts", multiple=True, help="Text to answer; without it, a conversation."
)
@click.option("-n", "--max-new-tokens", default=128, show_default=True, help="Where to stop.")
@click.option(
    "--temperature", default=0.0, show_default=True, help="0 takes the most likely token."
)
@click.option("--top-k", type=int, help="Choose among this many most likely tokens.")
@click.option("--top-p", type=float, help="Choose among the tokens that make up this probability.")
@click.option("--seed", default=0, show_default=True, help="Of the random choice.")
@device_option
@click.option(
    "--compile", is_flag=True, help="Wait a minute for a faster step: for long texts on a GPU."
)
@click.option("--raw", is_flag=True, help="Continue the text as it stands: no chat template.")
def generate(
    model: str | None, prompts: tuple[str, ...], raw: bool, as_json: bool, **settings: Any
) -> None:
    """Let MODEL continue a prompt, or talk with it.

    MODEL is a folder, a hub name or a .gguf file, dense or compressed; without it, the bundled
    model. The text streams to stdout, its speed is said on stderr. Several --prompt make a batch.
    """
    if as_json and not prompts:
        raise click.UsageError("--json needs a --prompt: a conversation has no single result")
    session = Session(model, raw, **settings)
    if not prompts:
        session.converse()
    elif len(prompts) == 1 and not as_json:
        session.answer(session.prompt(prompts[0]))
    else:
        results = session.answer_all(prompts)
        emit([_to_json(result) for result in results], as_json, lambda: _show(prompts, results))


class Session:
    """A loaded model and how it is to answer."""

    def __init__(
        self,
        model: str | None,
        raw: bool,
        device: str,
        max_new_tokens: int,
        compile: bool,
        **sampling: Any,
    ) -> None:
        from spqr_numba.generate import Sampling
        from spqr_numba.model.integration import load_model

        self._max_new_tokens = max_new_tokens
        self._compile = compile
        self._sampling = Sampling(**sampling)
        self._model, self._tokenizer = load_model(model, device=device)
        self._chats = not raw and getattr(self._tokenizer, "chat_template", None) is not None

    def prompt(self, text: str) -> Prompt:
        """A text as this model wants it: a chat's first message, or the text itself."""
        return [{"role": "user", "content": text}] if self._chats else text

    def answer_all(self, texts: tuple[str, ...]) -> list[Generation]:
        """Answers to several texts at once, without streaming."""
        return self._generate([self.prompt(text) for text in texts])

    def answer(self, prompt: Prompt) -> Generation:
        """Stream one answer to stdout, and say its speed."""
        result = self._generate([prompt], stream=True)[0]
        click.echo()
        start_up = f", ready in {result.start_up_seconds:.2f} s" if result.start_up_seconds else ""
        cut_off = not result.ended and len(result.tokens) < self._max_new_tokens
        note(
            f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s"
            f" (prompt: {result.prompt_tokens} tokens in {result.prefill_seconds:.2f} s{start_up})"
            + ("; the model's context is full" if cut_off else "")
        )
        return result

    def converse(self) -> None:
        """Answer line after line until the end of the input; a chat remembers what was said."""
        if sys.stdin.isatty():
            note("Type a line; Ctrl-D ends.")
        messages: list[dict[str, str]] = []
        for line in _lines():
            if not self._chats:
                self.answer(line)
                continue
            messages.append({"role": "user", "content": line})
            answer = self.answer(messages)
            messages.append({"role": "assistant", "content": answer.text})

    def _generate(self, prompts: list[Prompt], stream: bool = False) -> list[Generation]:
        from spqr_numba.generate import generate_batch

        return generate_batch(
            self._model,
            self._tokenizer,
            prompts,
            max_new_tokens=self._max_new_tokens,
            sampling=self._sampling,
            compile=self._compile,
            stream=_echo_piece if stream else None,
        )


def _lines() -> Any:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _echo_piece(_: int, piece: str) -> None:
    click.echo(piece, nl=False)
    sys.stdout.flush()


def _show(prompts: tuple[str, ...], results: list[Generation]) -> None:
    for prompt, result in zip(prompts, results, strict=True):
        click.echo(f"> {prompt}\n{result.text}\n")


def _to_json(result: Generation) -> dict[str, Any]:
    return asdict(result) | {"tokens_per_second": result.tokens_per_second}
