"""spqr generate: streams, chats, batches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spqr_numba.compiled import blocks
from spqr_numba.generate import generate
from spqr_numba.model.integration import load_model

from .conftest import Run


@pytest.mark.parametrize("model", ["dense", "compressed"])
@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
def test_one_prompt(run: Run, request: pytest.FixtureRequest, model: str, raw: bool) -> None:
    folder: Path = request.getfixturevalue(model)
    result = run(f"generate {folder} -p hi -n 6 {'--raw' if raw else ''}")
    assert result.exit_code == 0, result.output
    prompt = "hi" if raw else [{"role": "user", "content": "hi"}]
    expected = generate(*load_model(str(folder)), prompt, max_new_tokens=6)
    assert result.stdout == expected.text + "\n"
    assert re.search(r"6 tokens, [\d.]+ tokens/s \(prompt: \d+ tokens", result.stderr)


def test_a_full_context_is_told(run: Run, dense: Path) -> None:
    room = load_model(str(dense))[0].config.max_position_embeddings
    result = run(f"generate {dense} -p hi -n {room + 1} --raw")
    assert re.search(
        rf"^{room - 2} tokens, .*\); the model's context is full$", result.stderr, re.M
    )
    assert "context" not in run(f"generate {dense} -p hi -n {room - 2} --raw").stderr


def test_sampling_is_seeded(run: Run, dense: Path) -> None:
    line = f"generate {dense} -p hi -n 8 --temperature 2 --top-k 200 --top-p 0.99 --raw --json"
    first, again, other = (
        json.loads(run(f"{line} --seed {seed}").stdout)[0]["tokens"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_batch(run: Run, dense: Path) -> None:
    line = f"generate {dense} -p a -p 'longer prompt' -n 5 --raw"
    results = json.loads(run(f"{line} --json").stdout)
    assert [result["prompt_tokens"] for result in results] == [1, 13]
    output = run(line).stdout
    for prompt, result in zip(["a", "longer prompt"], results, strict=True):
        assert f"> {prompt}\n{result['text']}\n" in output


def test_compiled(run: Run, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "COMPILE_BACKEND", "eager")
    blocks.compiled_forward.cache_clear()
    line = f"generate {dense} -p hi -n 6"
    result = run(f"{line} --compile")
    blocks.compiled_forward.cache_clear()
    assert result.stdout == run(line).stdout
    assert re.search(r"tokens in [\d.]+ s, ready in [\d.]+ s\)", result.stderr)


def test_a_gpu_that_is_not_there(run: Run, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run(f"generate {dense} -p hi --device cuda")
    assert result.exit_code == 1
    assert "torch finds no CUDA device here" in result.stderr


def test_a_conversation_remembers(run: Run, dense: Path) -> None:
    """The second answer has the first question and answer in its prompt."""
    result = run(f"generate {dense} -n 4", input="hi\n\nyou\n")
    assert result.exit_code == 0, result.output
    prompts = [int(tokens) for tokens in re.findall(r"prompt: (\d+) tokens", result.stderr)]
    assert prompts[0] == len("<user>hi<assistant>")
    assert prompts[1] > prompts[0] + len("<user>you<assistant>")


def test_raw_lines_stand_alone(run: Run, dense: Path) -> None:
    result = run(f"generate {dense} -n 4 --raw", input="ab\nab\n")
    first, second = result.stdout.splitlines()
    assert first == second


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("nowhere/at/all -p hi", 1, "there is no model"),
        ("{dense} -p hi --temperature -1", 1, "temperature is -1"),
        ("{dense} -p hi --top-k 5", 1, "temperature 0 is greedy"),
        ("{dense} -p hi -n 0", 1, "max_new_tokens is 0"),
        ("{dense} -p '' --raw", 1, "the prompt is empty"),
        ("{dense} -p 1234567890123456789012345678901234567890123456789012345", 1, "shorten"),
        ("{dense} --json", 2, "--json needs a --prompt"),
    ],
)
def test_bad_input(run: Run, dense: Path, line: str, code: int, message: str) -> None:
    result = run("generate " + line.format(dense=dense))
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
