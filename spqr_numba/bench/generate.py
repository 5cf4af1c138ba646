"""Generation, timed end to end: a compressed model beside its dense twin in the same loop.

One prompt of random tokens is continued greedily. The first run pays for all that happens once:
kernels, torch.compile. The speed is that of the runs behind it, after their own start-up.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..config import SpqrConfig
from ..decoding import Steps, cache_length, make_cache, prefill
from ..errors import ConfigError
from ..model.integration import load_model
from ..model.source import open_source
from ..nn import SpqrLinear
from ..sampling import Sampling
from .random_model import BLOCKS, model_config, random_model

__all__ = ["measure"]

LEAST_NEW_TOKENS = 16
RUNS = 4

Row = dict[str, str | int | float | None]


def measure(
    *,
    shape: str | None = None,
    device: str = "cpu",
    engines: Sequence[str] = (),
    bits: int = 3,
    outliers: float = 0.01,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    dense: bool = True,
    threads: int | None = None,
) -> list[Row]:
    """Rows of a table, one a model ("spqr", "dense") and engine.

    shape is in BLOCKS, or a model as `open_source` finds it, None for the bundled one. A model that
    is there is loaded; its twin, and both for a shape, are random (random_model.py). engines () are
    graph and compiled on a GPU, eager on a CPU. "GB" is what the loaded model takes, "GB on disk"
    what its checkpoint does; "ready s" is what passes from the prompt to full speed, at first and
    again. Raises ConfigError where a text is too short to measure, and as `load_model`.
    """
    if prompt_tokens < 1 or new_tokens < LEAST_NEW_TOKENS:
        raise ConfigError(
            f"a prompt of {prompt_tokens} and a text of {new_tokens} tokens are too short to"
            f" measure; they need 1 and {LEAST_NEW_TOKENS}"
        )
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device)
    engines = engines or (("graph", "compiled") if place.type == "cuda" else ("eager",))
    rows: list[Row] = []
    for compressed in (True, False) if dense else (True,):
        before = bytes_taken(place)
        model = build(shape, SpqrConfig(bits=bits) if compressed else None, place, outliers)
        size = bytes_taken(place) - before or bytes_of(model)
        for engine in engines:
            runs = [run(model, engine, prompt_tokens, new_tokens) for _ in range(RUNS)]
            head: Row = {"model": "spqr" if compressed else "dense", "engine": engine}
            rows.append(head | timings(runs) | sizes(size, bytes_on_disk(model)))
        del model
        torch.compiler.reset()
    return [row | {"x dense": speed_ratio(row, rows)} for row in rows]


# --- The models


def build(
    shape: str | None, config: SpqrConfig | None, device: torch.device, outliers: float
) -> Any:
    """The model of a shape, or at a path where it is what `config` asks for; else its twin."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if shape in BLOCKS:
        return random_model(model_config(shape), config, device, dtype, outliers)
    settings = deepcopy(open_source(shape).config)
    if hasattr(settings, "quantization_config") == (config is not None):
        return load_model(shape, dtype, device)[0]
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    return random_model(settings, config, device, dtype, outliers)


def bytes_taken(device: torch.device) -> int:
    """What tensors take of a GPU; 0 on a CPU."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def bytes_of(model: Any) -> int:
    """What a model's parameters and buffers take."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def bytes_on_disk(model: Any) -> int:
    """What a model's tensors take in its checkpoint: weights in their own order, nothing twice."""
    layers = [module for module in model.modules() if isinstance(module, SpqrLinear)]
    matrices = sum(layer.matrix.nbytes for layer in layers)
    return matrices + sum(parameter.nbytes for parameter in model.parameters())


# --- The runs


@dataclass(frozen=True)
class Run:
    """Seconds of the parts of one run; the decode steps are those behind the start-up."""

    prefill_seconds: float
    start_up_seconds: float
    decode_steps: int
    decode_seconds: float


def run(model: Any, engine: str, prompt_tokens: int, new_tokens: int) -> Run:
    """Continue a random prompt."""
    device = model.device
    random = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    prompt = torch.randint(size, (1, prompt_tokens), generator=random).to(device)
    compiled, static = engine == "compiled", engine != "eager"
    cache = make_cache(model, cache_length(prompt_tokens + new_tokens, compiled), static)
    choose = Sampling().chooser(device)
    started = time.perf_counter()
    logits, state = prefill(model, prompt, None, cache)
    chosen = choose(logits)
    chosen.tolist()  # waits for the device
    prefilled = time.perf_counter()
    graph = static and device.type == "cuda"
    steps = Steps(state, chosen, choose, new_tokens - 1, graph=graph, compiled=compiled)
    for _ in steps:
        pass
    return Run(
        prefill_seconds=prefilled - started,
        start_up_seconds=steps.start_up_seconds,
        decode_steps=new_tokens - 1 - steps.start_up_steps,
        decode_seconds=time.perf_counter() - prefilled - steps.start_up_seconds,
    )


def timings(runs: Sequence[Run]) -> Row:
    """Columns about time, of a first run and those behind it."""
    first, *rest = runs
    milliseconds = median(1e3 * run.decode_seconds / run.decode_steps for run in rest)
    return {
        "tokens/s": round(1e3 / milliseconds, 1),
        "ms a token": round(milliseconds, 3),
        "prefill ms": round(1e3 * median(run.prefill_seconds for run in rest), 1),
        "ready s, first": round(first.prefill_seconds + first.start_up_seconds, 2),
        "ready s": round(median(run.prefill_seconds + run.start_up_seconds for run in rest), 2),
    }


def sizes(taken: int, stored: int) -> Row:
    """Columns about memory."""
    return {
        "GB": round(taken / 1e9, 3),
        "GB on disk": round(stored / 1e9, 3),
        "GB / on disk": round(taken / stored, 3),
    }


def speed_ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as fast as the dense model on the same engine; None where it was left out."""
    for other in rows:
        if other["engine"] == row["engine"] and other["model"] == "dense":
            return round(other["ms a token"] / row["ms a token"], 2)  # type: ignore[operator]
    return None
