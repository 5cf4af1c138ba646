"""Compression, timed: one weight phase by phase, or decoder blocks of a model's shape.

Weights are random with heavy tails and inputs correlate, so that about one weight in a hundred is
an outlier, as in a trained layer. Blocks go the way of `compress`: forward passes, Hessians,
factors, columns, and the forward pass through what was stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from ..config import SpqrConfig
from ..errors import InputError
from ..format.layout import MatrixSpec
from ..kernels.columns import block_columns
from ..model.activations import Activations, record_calls
from ..model.blocks import find_blocks, plan
from ..model.quantize_block import BlockQuantizer
from ..model.report import Clock
from ..quantize.hessian import Factorization, Hessian, factorize
from ..quantize.solver import pack, quantize_weight, squared_output, walk_columns
from .reference import quantize_by_column

__all__ = ["MODEL_SHAPES", "measure"]

MODEL_SHAPES = {
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "llama2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
HEAVY_SHARE = 0.005
HEAVY_FACTOR = 5
REPEATS = 5
BATCH_TOKENS = 4096

Row = dict[str, str | int | float | None]


def measure(
    *,
    shapes: Sequence[str | tuple[int, int]] = ((4096, 4096),),
    device: str = "cpu",
    bits: int = 3,
    threads: int | None = None,
    blocks: int = 1,
    windows: int = 128,
    seqlen: int = 2048,
    offload_activations: bool = False,
    against: str | None = None,
) -> list[Row]:
    """Rows of a table, one a weight (out_features, in_features) or a block ("llama2-7b").

    Milliseconds for a weight, medians of five runs; seconds for a block, one run of each of
    `blocks`, on `windows` of `seqlen` tokens, where "quantize" is all that comes behind a
    factorization. against "reference" adds the time of a weight's columns one after the other in
    torch (reference.py). Raises InputError for an unknown shape, or where weights and blocks, whose
    rows differ, are asked for together.
    """
    if len({isinstance(shape, str) for shape in shapes}) > 1:
        raise InputError("weights and blocks make different tables; measure one kind at a time")
    if threads:
        torch.set_num_threads(threads)
    config, place = SpqrConfig(bits=bits), torch.device(device)
    rows: list[Row] = []
    with torch.no_grad():
        quantize_weight(*random_problem(64, 64, place), config)  # compiles the kernels
        for shape in shapes:
            if isinstance(shape, str):
                model = random_block(shape, place, seqlen)
                rows += [
                    measure_block(shape, model, config, windows, seqlen, offload_activations)
                    for _ in range(blocks)
                ]
            else:
                rows.append(measure_weight(shape, config, place, against))
    return rows


# --- One weight


def measure_weight(
    shape: tuple[int, int], config: SpqrConfig, device: torch.device, against: str | None
) -> Row:
    """Milliseconds of each phase, and of all with the factorization.

    One kernel fits a group and quantizes its columns, group after group, so their times are one.
    """
    weight, hessian = random_problem(*shape, device)
    total, result = timed(lambda: quantize_weight(weight, hessian, config), device)
    factorizing, factor = timed(lambda: factorize(hessian, config, weight), device)
    spec = MatrixSpec.from_config(config, *shape)
    columns = weight.T[factor.order]
    walking, walk = timed(lambda: walk_columns(columns, factor, spec, config), device)
    updating, _ = timed(lambda: replay_updates(walk.loop.errors, factor, spec), device)
    packing, _ = timed(lambda: pack(walk.loop, spec, factor.order, config), device)
    reporting, _ = timed(lambda: squared_output(columns, factor.hessian), device)
    row: Row = {
        "shape": f"{shape[0]}x{shape[1]}",
        "total ms": total,
        "factorise ms": factorizing,
        "fit + columns ms": walking - updating,
        "update ms": updating,
        "pack ms": packing,
        "loss ms": 2 * reporting,
        "outliers": result.report.outlier_share,
        "bits": result.report.bits_per_weight,
    }
    if against == "reference":
        reference, theirs = timed(lambda: quantize_by_column(weight, factor, config), device, 1)
        loss = squared_output(columns - theirs, factor.hessian).item()
        row |= {
            "reference ms": reference,
            "ratio": reference / (total - factorizing),
            "loss / reference": result.report.loss / loss,
        }
    return row


def replay_updates(errors: torch.Tensor, factor: Factorization, spec: MatrixSpec) -> None:
    """The trailing products of `walk_columns` alone."""
    behind, width = torch.zeros_like(errors), block_columns(spec, errors.device)
    for start in range(0, len(errors), width):
        stop = start + width
        assert factor.upper is not None
        upper = factor.upper[start:stop, stop:]
        behind[stop:].addmm_(upper.T, errors[start:stop], alpha=-1)


def random_problem(
    rows: int, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, columns] and the Hessian of 2 * columns inputs."""
    random = torch.Generator(device).manual_seed(0)
    weight = torch.empty(rows, columns, device=device)
    heavy_tailed(weight, random)
    mixing = torch.randn(columns, columns, generator=random, device=device) / columns**0.5
    mixing += torch.eye(columns, device=device)
    sizes = torch.exp(0.5 * torch.randn(columns, generator=random, device=device))
    hessian = Hessian(columns, device)
    for _ in range(0, 2 * columns, BATCH_TOKENS):
        inputs = torch.randn(BATCH_TOKENS, columns, generator=random, device=device) @ mixing
        hessian.add((inputs * sizes).to(torch.bfloat16))
    return weight, hessian.matrix


def heavy_tailed(weight: torch.Tensor, random: torch.Generator) -> None:
    """Fill a weight with normal numbers, a few of them much larger."""
    weight.normal_(0, 0.02, generator=random)
    weight[torch.rand(weight.shape, generator=random, device=weight.device) < HEAVY_SHARE] *= (
        HEAVY_FACTOR
    )


def timed(
    work: Callable[[], Any], device: torch.device, repeats: int = REPEATS
) -> tuple[float, Any]:
    """Median milliseconds of a few runs behind a first one, and the last result."""
    milliseconds = []
    for _ in range(repeats + 1 if repeats > 1 else 1):
        wait(device)
        started = time.perf_counter()
        result = work()
        wait(device)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return median(milliseconds[-repeats:]), result


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- One block


def random_block(shape: str, device: torch.device, seqlen: int) -> Any:
    """A causal LM of one decoder block of this shape, and of few tokens, in bf16."""
    if shape not in MODEL_SHAPES:
        raise InputError(f"the shape {shape!r} is none of {', '.join(MODEL_SHAPES)}, nor 4096x4096")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        num_hidden_layers=1,
        max_position_embeddings=seqlen,
        attn_implementation="sdpa",
        **MODEL_SHAPES[shape],
    )
    with device:
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure_block(
    shape: str, model: Any, config: SpqrConfig, windows: int, seqlen: int, offload: bool
) -> Row:
    """Seconds of each phase of compressing the one block of `model`, and of all of it."""
    blocks = find_blocks(model)
    [block] = blocks.modules
    device = next(block.parameters()).device
    random = torch.Generator(device).manual_seed(0)
    for linear in block.modules():
        if isinstance(linear, nn.Linear):
            heavy_tailed(linear.weight, random)
    activations = random_activations(model, blocks.modules, windows, seqlen, offload)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    started = time.perf_counter()
    quantizer = BlockQuantizer(block, blocks.name(0), 0, plan(blocks, config), clock)
    results = quantizer.quantize(activations, config.true_sequential)
    with clock("forward"):
        activations.advance(block, 0)
    total = time.perf_counter() - started
    matrices = [result.matrix for result in results.values()]
    weights = sum(matrix.spec.out_features * matrix.spec.in_features for matrix in matrices)
    on_gpu = device.type == "cuda"
    return {
        "shape": shape,
        "tokens": windows * seqlen,
        "total s": total,
        **{f"{phase} s": seconds for phase, seconds in clock.seconds.items()},
        "outliers": sum(matrix.outliers or 0 for matrix in matrices) / weights,
        "peak GB": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
    }


def random_activations(
    model: Any, blocks: Sequence[nn.Module], windows: int, seqlen: int, offload: bool
) -> Activations:
    """Correlated hidden states for the first block, of windows that its model never saw."""
    device, width = next(model.parameters()).device, model.config.hidden_size
    random = torch.Generator(device).manual_seed(1)
    mixing = torch.randn(width, width, generator=random, device=device) / width**0.5
    mixing += torch.eye(width, device=device)
    place = "cpu" if offload else device
    states = torch.empty(
        windows,
        seqlen,
        width,
        dtype=torch.bfloat16,
        device=place,
        pin_memory=offload and device.type == "cuda",
    )
    for window in states:
        window.copy_(torch.randn(seqlen, width, generator=random, device=device) @ mixing)
    batch_size = max(1, BATCH_TOKENS // seqlen)
    calls = {
        size: record_calls(model, blocks, torch.zeros(size, seqlen, dtype=torch.int64).to(device))
        for size in {1, batch_size, windows % batch_size or batch_size}
    }
    return Activations(states, batch_size, calls)
