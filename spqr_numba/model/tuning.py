"""Tuning: a compressed block trained to give what the dense block gave.

    targets     outputs of the dense block, on what the compressed blocks before it give; or the
                dense model's, where `asymmetric` carries them along
    quantize    (quantize_block.py)
    train       all but the codes: second-level statistics, outlier values and weights of norms
                (training.py)

Every pass uses numbers rounded as they would be stored, and what is measured is the block with just
these in it.
Errors are relative to the size of a token's target: what reads hidden states normalizes them token
by token, and the huge ones of a first token would otherwise be all that counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from ..config import SpqrConfig
from ..kernels.dequantize import dequantize
from ..quantize.solver import QuantizedWeight
from .activations import Activations
from .report import TunedRow
from .training import (
    Best,
    TrainableBlock,
    Tuning,
    reproducible,
    scaler_for,
    train,
    trainable_matrix,
    trainable_norm,
)

__all__ = ["BlockTuner", "TunedBlock", "Tuning"]

logger = logging.getLogger(__name__)


class TunedBlock(NamedTuple):
    """What is to be stored of a block.

    results   full module name -> compressed linear
    norms     full name -> weight of a norm, as it is to be stored
    row       how it went
    """

    results: dict[str, QuantizedWeight]
    norms: dict[str, torch.Tensor]
    row: TunedRow


class BlockTuner:
    """Tunes a block to its outputs when this is made: before it is quantized.

    block         its weights loaded
    name, index   of the block in the model
    activations   what the block gets
    norms         full name -> weight of a norm, as the checkpoint has it
    tuning        how
    say           is told how far it has come, a few words now and then
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        index: int,
        activations: Activations,
        norms: Mapping[str, torch.Tensor],
        tuning: Tuning,
        say: Callable[[str], object],
    ) -> None:
        self.block, self.name, self.index = block, name, index
        self.activations, self.norms = activations, norms
        self.tuning, self.say = tuning, say
        # The dense model's states become the outputs of its block while that is being quantized.
        dense = activations.dense
        self.targets = activations.outputs(block, index) if dense is None else dense
        self.device = next(block.parameters()).device

    def tune(
        self, results: Mapping[str, QuantizedWeight], settings: Mapping[str, SpqrConfig]
    ) -> TunedBlock:
        """Tune the linears of `results` and the norms; the block holds what was best afterwards.

        settings: full module name -> how it was compressed; rounded zeros stay as they are.
        """
        started = time.perf_counter()
        block = self._trainable(results, settings)
        with reproducible(self.device), torch.enable_grad():
            best = self._train(block)
        stored = self._store(block, results) if best.steps else (dict(results), {})
        seconds = time.perf_counter() - started
        row = TunedRow(self.name, best.before, best.after, best.steps, seconds)
        log(row)
        return TunedBlock(*stored, row)

    def _trainable(
        self, results: Mapping[str, QuantizedWeight], settings: Mapping[str, SpqrConfig]
    ) -> TrainableBlock:
        matrices = {
            self._inside(name): trainable_matrix(result.matrix, settings[name])
            for name, result in results.items()
        }
        norms = {
            self._inside(n): trainable_norm(norm, self.device) for n, norm in self.norms.items()
        }
        return TrainableBlock(self.block, matrices, norms)

    def _inside(self, name: str) -> str:
        """A name in the model, as it is in the block."""
        return name.removeprefix(f"{self.name}.")

    def _train(self, block: TrainableBlock) -> Best:
        """Train, and leave the block at its best."""
        batches = self.tuning.batches(self.activations.batch_size, self.index)
        scaler = scaler_for(self.device, next(self.block.parameters()).dtype)
        best = train(BlockTask(self, block), self.tuning, batches, scaler)
        block.settle()
        return best

    def errors(self, block: nn.Module, windows: Sequence[int]) -> Iterator[torch.Tensor]:
        """The mean error of a token of `windows`, in summands."""
        for part in self.activations.parts(windows):
            states = self.activations.states[part]
            output = self.activations.run(block, self.index, states).float()
            target = self.targets[part].to(self.device).float()
            size = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            error = (output - target).square().sum(-1) / size
            yield error.mean() * (len(part) / len(windows))

    @torch.no_grad()
    def _store(
        self, block: TrainableBlock, results: Mapping[str, QuantizedWeight]
    ) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor]]:
        """What is to be stored."""
        tuned = {}
        for name, result in results.items():
            matrix = block.matrices[self._inside(name)].stored()
            tuned[name] = replace(result, matrix=matrix, weight=dequantize(matrix))
        norms = {
            name: block.norms[self._inside(name)]().to("cpu", norm.dtype)
            for name, norm in self.norms.items()
        }
        return tuned, norms


class BlockTask:
    """The training of `block` by `tuner`, for `train`."""

    def __init__(self, tuner: BlockTuner, block: TrainableBlock) -> None:
        self.tuner, self.block = tuner, block

    def trained(self) -> list[nn.Parameter]:
        """The numbers that steps change."""
        return self.block.trained()

    def measure(self) -> float:
        """The mean error of a token of the windows that are held back, of the block as stored."""
        self.block.settle()
        tuning = self.tuner.tuning
        with torch.no_grad():
            errors = self.tuner.errors(self.tuner.block, range(tuning.trained, tuning.windows))
            return sum(error.item() for error in errors)

    def backward(
        self, windows: Sequence[int], scale: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Add the gradients of scale(error) on `windows`."""
        for error in self.tuner.errors(self.block, windows):
            scale(error).backward()

    def show(self, steps: int, best: Best) -> None:
        """How far it has come."""
        left = f"{best.after / best.before:.1%} of the error left"
        self.tuner.say(
            f"{self.tuner.name}, tuning step {steps} of {self.tuner.tuning.steps}, {left}"
        )


def log(row: TunedRow) -> None:
    """One line on what tuning did to a block."""
    if row.steps:
        logger.info(
            "%s: %d steps of tuning leave %.1f %% of the error of its output",
            row.block, row.steps, 100 * row.error_after / row.error_before,
        )  # fmt: skip
    else:
        logger.info("%s: tuning does not lower the error of its output; left as it was", row.block)
