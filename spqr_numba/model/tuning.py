"""Tuning: a compressed block trained to give what the dense block gave.

    targets     outputs of the dense block, on what the compressed blocks before it give; or the
                dense model's, where `asymmetric` carries them along
    quantize    (quantize_block.py)
    train       codes fixed: second-level statistics, outlier values and weights of norms, by Adam
                in fp32 on batches of calibration windows, at a rate that falls as a cosine does
    measure     ten times meanwhile, on windows that are held back from the training, of a part of
                the text that no other window touches
    keep        what was best, the start included

Every pass uses numbers rounded as they would be stored, and what is measured is the block with just
these in it.
Errors are relative to the size of a token's target: what reads hidden states normalizes them token
by token, and the huge ones of a first token would otherwise be all that counts.
"""

from __future__ import annotations

import logging
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from ..config import SpqrConfig
from ..errors import ConfigError
from ..kernels.dequantize import dequantize
from ..quantize.solver import QuantizedWeight
from ..quantize.trainable import StoredNumbers, TrainableMatrix
from .activations import Activations
from .report import TunedRow

__all__ = ["BlockTuner", "TrainableBlock", "TunedBlock", "Tuning"]

HELD_BACK_SHARE = 8  # one window in so many measures
MOST_HELD_BACK = 16
MEASUREMENTS = 10
PATIENCE = 3  # measurements in a row without a better one, behind which training ends
BETAS = (0.9, 0.95)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """How blocks are tuned; raises ConfigError for what cannot be.

    steps           of training each block, at most
    windows         of calibration text; the last ones are held back
    seed            of the order of windows
    learning_rate   at first: the share of its own size by which a step changes a number
    """

    steps: int
    windows: int
    seed: int = 0
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"tuning takes {self.steps} steps; give at least 1, or do not tune")
        if self.windows < 2:
            raise ConfigError(
                f"nsamples is {self.windows}; tuning trains on some windows and measures on others,"
                " so it takes at least 2"
            )

    @property
    def trained(self) -> int:
        """How many windows are trained on, the first ones."""
        return self.windows - self.held_back

    @property
    def held_back(self) -> int:
        """How many windows are measured on, the last ones."""
        return min(max(1, self.windows // HELD_BACK_SHARE), MOST_HELD_BACK)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2

    def measures_after(self, steps: int) -> bool:
        """Whether there is a measurement behind so many steps."""
        return steps == self.steps or steps % max(1, self.steps // MEASUREMENTS) == 0

    def batches(self, size: int, block: int) -> Iterator[list[int]]:
        """The `size` windows of each step, or all; all come once before any comes again."""
        size = min(size, self.trained)
        order = random.Random(f"{self.seed} {block}")
        waiting: list[int] = []
        for _ in range(self.steps):
            while len(waiting) < size:
                waiting += order.sample(range(self.trained), self.trained)
            yield waiting[:size]
            waiting = waiting[size:]


class TrainableBlock(nn.Module):
    """A decoder block of which compressed weights and norms are trained.

    block      as it is otherwise
    matrices   name of a linear in the block -> its weight
    norms      name of a norm's weight in the block -> the weight
    """

    def __init__(
        self,
        block: nn.Module,
        matrices: Mapping[str, TrainableMatrix],
        norms: Mapping[str, StoredNumbers],
    ) -> None:
        super().__init__()
        self.block, self.matrices, self.norms = block, matrices, norms
        self.weights = nn.ModuleList([*matrices.values(), *norms.values()])
        self.names = [*(f"{name}.weight" for name in matrices), *norms]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives with all numbers as they would be stored."""
        return functional_call(self.block, self._parameters_of_block(), args, kwargs)

    @torch.no_grad()
    def settle(self) -> None:
        """Put all numbers as they would be stored into the block."""
        for name, parameter in self._parameters_of_block().items():
            self.block.get_parameter(name).copy_(parameter)

    def _parameters_of_block(self) -> dict[str, torch.Tensor]:
        return {
            name: weight().to(self.block.get_parameter(name).dtype)
            for name, weight in zip(self.names, self.weights, strict=True)
        }

    def trained(self) -> list[nn.Parameter]:
        """What training changes."""
        return [parameter for parameter in self.weights.parameters() if parameter.requires_grad]


class Best:
    """The numbers of a block at its best measurement.

    before, after   error of the first, error of the best
    steps           of training behind which it was best
    misses          measurements since then
    """

    def __init__(self, block: TrainableBlock, error: float) -> None:
        self.parameters = block.trained()
        self.before, self.after, self.steps, self.misses = error, error, 0, 0
        self.kept = [parameter.detach().clone() for parameter in self.parameters]

    def offer(self, error: float, steps: int) -> None:
        """Keep the numbers as they are now, if they are better."""
        self.misses += 1
        if error < self.after:
            self.after, self.steps, self.misses = error, steps, 0
            self.kept = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best numbers back."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(kept)


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
        matrices, norms = {}, {}
        for name, result in results.items():
            matrix = matrices[self._inside(name)] = TrainableMatrix(result.matrix)
            matrix.zero.requires_grad_(not settings[name].round_zero)
        for name, norm in self.norms.items():
            size = norm.float().abs().mean().item()
            norms[self._inside(name)] = StoredNumbers(norm.to(self.device), size)
        return TrainableBlock(self.block, matrices, norms)

    def _inside(self, name: str) -> str:
        """A name in the model, as it is in the block."""
        return name.removeprefix(f"{self.name}.")

    def _train(self, block: TrainableBlock) -> Best:
        """Train, and leave the block at its best."""
        best = Best(block, self._error(block))
        if not 0 < best.before < math.inf:
            return best
        optimizer = torch.optim.Adam(block.trained(), betas=BETAS)
        halves = next(self.block.parameters()).dtype == torch.float16
        scaler = torch.amp.GradScaler(self.device.type, enabled=halves)
        batches = self.tuning.batches(self.activations.batch_size, self.index)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = self.tuning.rate(step)
            self._step(block, batch, best.before, optimizer, scaler)
            if self.tuning.measures_after(step + 1):
                best.offer(self._error(block), step + 1)
                self._show(step + 1, best)
                if best.misses == PATIENCE:
                    break
        best.restore()
        block.settle()
        return best

    def _step(
        self,
        block: TrainableBlock,
        batch: Sequence[int],
        unit: float,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """One step of training, errors in multiples of `unit`.

        Where gradients pass the largest fp16 number the scaler takes no step and halves its scale:
        the batch comes again, until it is not the scale that is too large.
        """
        scale = math.inf
        while scaler.get_scale() < scale and scale > 1:
            scale = scaler.get_scale()
            optimizer.zero_grad()
            for error in self._errors(block, batch):
                scaler.scale(error / unit).backward()
            scaler.step(optimizer)
            scaler.update()

    def _show(self, steps: int, best: Best) -> None:
        left = f"{best.after / best.before:.1%} of the error left"
        self.say(f"{self.name}, tuning step {steps} of {self.tuning.steps}, {left}")

    def _error(self, block: TrainableBlock) -> float:
        """The mean error of a token of the windows that are held back."""
        block.settle()
        held_back = range(self.tuning.trained, self.tuning.windows)
        with torch.no_grad():
            return sum(error.item() for error in self._errors(self.block, held_back))

    def _errors(self, block: nn.Module, windows: Sequence[int]) -> Iterator[torch.Tensor]:
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


def log(row: TunedRow) -> None:
    """One line on what tuning did to a block."""
    if row.steps:
        logger.info(
            "%s: %d steps of tuning leave %.1f %% of the error of its output",
            row.block, row.steps, 100 * row.error_after / row.error_before,
        )  # fmt: skip
    else:
        logger.info("%s: tuning does not lower the error of its output; left as it was", row.block)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On a GPU, torch's algorithms that give the same bits each time; a CPU's do."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Of cuBLAS, which is only undetermined between streams, and of what has no other way.
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.use_deterministic_algorithms(
            before or device.type == "cuda", warn_only=only_warns or not before
        )
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=only_warns)
