"""Static caches, compiled steps and CUDA graphs: the same tokens, or a word about why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.cache_utils import StaticLayer

from spqr_numba import decoding
from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.compiled import blocks
from spqr_numba.decoding import Decoding, capturable, make_cache, noticing_waits
from spqr_numba.errors import ConfigError
from spqr_numba.generate import encode_prompt, generate, generate_batch
from spqr_numba.model.integration import load_model
from spqr_numba.nn import SpqrLinear
from spqr_numba.sampling import Sampling

from .problems import make_spec
from .test_generate import PROMPTS, TOKENIZER, tiny_family
from .tiny import tiny_llama

gpu = pytest.mark.gpu
FAMILIES = pytest.mark.parametrize("family", ["llama", "opt", "falcon", "gpt-neox", "gemma2"])
SAMPLING = Sampling(temperature=1.5, top_k=100, top_p=0.95, seed=3)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was compiled, and said, before."""
    torch.compiler.reset()
    blocks.compiled_forward.cache_clear()
    decoding._note.cache_clear()
    yield
    blocks.compiled_forward.cache_clear()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Blocks are traced and functionalized, and not turned into machine code."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(blocks, "COMPILE_BACKEND", counter)
    return counter


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


def make_model(family: str) -> Any:
    return tiny_llama() if family == "llama" else tiny_family(family)


def compressed_llama() -> Any:
    """Nine blocks, each with its own settings and number of outliers, and one that is dense."""
    settings = [
        {"bits": bits, "group_size": group, "scale_bits": bits, "zero_bits": bits}
        for bits, group in product((2, 3, 4), (8, 16, 32))
    ]
    model = tiny_llama(num_hidden_layers=len(settings) + 1)
    random = torch.Generator().manual_seed(0)
    for block, changes in zip(model.model.layers[:-1], settings, strict=True):
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                spec = make_spec(module.out_features, module.in_features, **changes)
                outliers = torch.randint(5, (module.out_features,), generator=random).tolist()
                matrix = random_matrix(spec, outliers if spec.bits > 2 else None)
                block.set_submodule(name, SpqrLinear(matrix))
    return model


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package has logged; torch logs whatever it compiles."""
    return [r.message for r in caplog.records if r.name.startswith("spqr_numba")]


def tokens(model: Any, **settings: Any) -> list[tuple[int, ...]]:
    rows = generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=24, **settings)
    return [row.tokens for row in rows]


def test_a_static_cache_counts_in_tensors_alone() -> None:
    cache = make_cache(tiny_family("gemma2"), 20, static=True)
    assert [type(layer) for layer in cache.layers] == [StaticLayer, StaticLayer]
    assert {layer.get_max_length() for layer in cache.layers} == {20}


@FAMILIES
def test_only_the_last_token_of_a_prompt_is_predicted_from(family: str) -> None:
    """The logits of all would be more bytes than some models."""
    model, counts = make_model(family), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
    tokens(model)
    assert {*counts} == {1}


@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_are_compiled_first(
    compiled: bool, backend: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the prompts and of a step."""
    asked: list[Any] = []
    for name in ("compile_kernels", "compile_joined_kernels"):
        monkeypatch.setattr(decoding, name, partial(note_counts, asked, name))
    longest = max(len(encode_prompt(TOKENIZER, prompt)) for prompt in PROMPTS)
    tokens(tiny_llama(), compile=compiled)
    before_prefill = ("compile_kernels", longest * len(PROMPTS), len(PROMPTS))
    before_steps = ("compile_joined_kernels", len(PROMPTS))
    assert asked == [before_prefill, *([before_steps] if compiled else [])]


def note_counts(asked: list[Any], name: str, model: Any, *counts: int) -> None:
    asked.append((name, *counts))


# --- Compiled


@FAMILIES
def test_compiled_blocks_give_the_same_tokens(
    family: str, backend: CompileCounterWithBackend
) -> None:
    model = make_model(family)
    assert tokens(model, compile=True) == tokens(model)
    assert backend.frame_count == 1
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_compilation_serves_all_blocks_and_lengths(backend: CompileCounterWithBackend) -> None:
    model = tiny_llama(num_hidden_layers=5)
    for length in (5, 20, 30):
        result = generate(model, TOKENIZER, "a", max_new_tokens=length, compile=True)
        assert result.start_up_tokens == 2
        assert result.start_up_seconds > 0
    assert backend.frame_count == 1


def test_blocks_share_a_mask_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[torch.Tensor] = []

    def forward(block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        masks.append(kwargs["attention_mask"])
        return type(block).forward(block, *args, **kwargs)

    monkeypatch.setattr(blocks, "compiled_forward", lambda: forward)
    model = tiny_llama(num_hidden_layers=5)
    result = generate(model, TOKENIZER, "abc", max_new_tokens=3, compile=True)
    assert result.tokens == generate(model, TOKENIZER, "abc", max_new_tokens=3).tokens
    assert len(masks) == 2 * 5
    assert len({mask.data_ptr() for mask in masks[:5]}) == 1
    assert masks[0].dtype == torch.float32
    assert masks[0].flatten().tolist() == [0.0] * 4 + [-float("inf")] * (masks[0].numel() - 4)


def test_one_compilation_serves_all_settings(
    backend: CompileCounterWithBackend, caplog: pytest.LogCaptureFixture
) -> None:
    model = compressed_llama()
    assert tokens(model, compile=True) == tokens(model)
    assert backend.frame_count == 2  # one more for the block that is dense
    assert told(caplog) == []
    assert all(layer.number is None for layer in model.modules() if isinstance(layer, SpqrLinear))


def test_what_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Callable:
        raise RuntimeError("no compiler here\nand much advice")

    monkeypatch.setattr(blocks, "COMPILE_BACKEND", refuse)
    model = tiny_llama()
    assert tokens(model, compile=True) == tokens(model)
    [message] = told(caplog)
    assert message.startswith("LlamaForCausalLM cannot be compiled: ")
    assert "advice" not in message


def test_a_wrapped_block_keeps_its_wrapper(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    block = model.model.layers[0]
    wrapper = block.forward = block.forward
    assert tokens(model, compile=True) == tokens(model)
    assert vars(block)["forward"] is wrapper
    assert "already run through another wrapper" in told(caplog)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graph": True}, "graph=True needs a model on a GPU, and this one is on cpu"),
        ({"compile": True, "static_cache": False}, "graph and compile need a static cache"),
    ],
    ids=str,
)
def test_wishes_that_contradict_each_other(settings: dict[str, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(tiny_llama(), TOKENIZER, "a", **settings)


# --- Captured


def make_state(model: Any, cache: Any) -> Decoding:
    return Decoding(model, cache, None, torch.zeros(1, 1, dtype=torch.int64), 0)


def test_why_a_step_is_not_captured_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    assert capturable(make_state(model, make_cache(model, 8, static=True)))
    assert told(caplog) == []
    for _ in range(2):
        assert not capturable(make_state(model, make_cache(model, 8, static=False)))
    model._can_compile_fullgraph = False
    assert not capturable(make_state(model, make_cache(model, 8, static=True)))
    cache, decisions = told(caplog)
    assert "without a CUDA graph: its cache holds more than keys and values" in cache
    assert "without a CUDA graph: transformers knows of decisions" in decisions


@gpu
@pytest.mark.parametrize("family", ["llama", "opt", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampled"])
def test_a_graph_gives_the_tokens_of_the_steps(
    family: str, sampling: Sampling | None, cuda: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family).to(cuda)
    expected = tokens(model, sampling=sampling, graph=False)
    assert tokens(model, sampling=sampling) == expected
    assert told(caplog) == []
    assert tokens(model, sampling=sampling) == expected


@gpu
def test_a_graph_gives_the_tokens_of_a_cpu(cuda: torch.device) -> None:
    model = tiny_llama()
    expected = tokens(model)
    assert tokens(model.to(cuda)) == expected


@gpu
def test_the_bundled_model_says_the_same_on_both(cuda: torch.device) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model, tokenizer = load_model(None, torch.float32, device)
        results.append(generate(model, tokenizer, "The for statement", max_new_tokens=64).tokens)
    assert results[0] == results[1]


@gpu
def test_a_graph_streams_and_ends_where_the_text_ends(cuda: torch.device) -> None:
    model, pieces = tiny_llama().to(cuda), []
    free = generate(model, TOKENIZER, "a", max_new_tokens=40, stream=pieces.append)
    assert "".join(pieces) == free.text
    assert free.start_up_tokens == 2
    model.generation_config.eos_token_id = next(t for t in free.tokens if t not in free.tokens[:6])
    ended = generate(model, TOKENIZER, "a", max_new_tokens=40)
    assert ended.ended
    assert ended.tokens == free.tokens[: len(ended.tokens)]


@gpu
def test_waiting_for_the_gpu_is_noticed(cuda: torch.device) -> None:
    numbers = torch.ones(3, device=cuda)
    with noticing_waits() as waits:
        numbers.add_(1)
    assert waits == []
    with noticing_waits() as waits:
        numbers.sum().item()
    assert waits[0].startswith("test_decoding.py:")


@gpu
@pytest.mark.slow
def test_compiling_lets_a_model_be_captured(
    cuda: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Falcon takes its keys by a list of indices, which wait for the GPU unless compiled."""
    model = tiny_family("falcon").to(cuda)
    expected = tokens(model, graph=False)
    assert tokens(model, compile=True) == expected
    assert told(caplog) == []
    assert tokens(model) == expected
    assert "runs without a CUDA graph: its step waits for the GPU" in caplog.text


@gpu
def test_a_step_that_waits_is_not_captured(
    cuda: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama().to(cuda)
    expected = tokens(model, sampling=SAMPLING)
    model.model.norm.register_forward_hook(lambda *_: torch.ones((), device=cuda).item() and None)
    assert tokens(model, sampling=SAMPLING) == expected
    assert "runs without a CUDA graph: its step waits for the GPU" in caplog.text
    torch.rand(3, device=cuda)


@gpu
def test_a_capture_that_fails_leaves_everything_usable(
    cuda: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    def wait_in_a_capture(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.ones((), device=cuda).item()

    model = tiny_llama().to(cuda)
    expected = tokens(model, sampling=SAMPLING)
    model.model.norm.register_forward_hook(wait_in_a_capture)
    stream = torch.cuda.current_stream()
    assert tokens(model, sampling=SAMPLING) == expected
    assert "runs without a CUDA graph: " in caplog.text
    assert torch.cuda.current_stream() == stream
    torch.rand(3, device=cuda)
    assert torch.ones(3, device=cuda).sum().item() == 3


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("make", [tiny_llama, compressed_llama], ids=["dense", "compressed"])
def test_compiled_and_captured(
    make: Callable[[], Any],
    sampling: Sampling | None,
    cuda: torch.device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make().to(cuda)
    expected = tokens(model, sampling=sampling, graph=False)
    assert tokens(model, sampling=sampling, compile=True) == expected
    assert told(caplog) == []
