"""Training what is stored: steps at a falling rate, measurements, and what was best is kept.

    train       numbers as offsets from what is stored (quantize/trainable.py), by Adam in fp32 on
                batches of windows, at a rate that falls as a cosine does
    measure     ten times meanwhile, on windows that are held back from the training, of a part of
                the text that no other window touches
    keep        what was best, the start included

What is trained is a Task: a block towards the dense block's output (tuning.py), or a whole model
towards the dense model's predictions (model_tuning.py).
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from ..config import SpqrConfig
from ..errors import ConfigError
from ..format.matrix import SpqrMatrix
from ..quantize.trainable import StoredNumbers, TrainableMatrix

__all__ = [
    "MEASUREMENTS",
    "MOST_HELD_BACK",
    "Best",
    "Task",
    "TrainableBlock",
    "Tuning",
    "reproducible",
    "scaler_for",
    "train",
    "trainable_matrix",
    "trainable_norm",
]

HELD_BACK_SHARE = 8  # one window in so many measures
MOST_HELD_BACK = 16
MEASUREMENTS = 10
BETAS = (0.9, 0.95)

Scaler = torch.amp.GradScaler


@dataclass(frozen=True)
class Tuning:
    """How blocks are tuned; raises ConfigError for what cannot be.

    steps           of training each block, at most
    windows         of calibration text; the last ones are held back
    seed            of the order of windows
    learning_rate   at first: the share of its own size by which a step changes a number
    patience        measurements in a row without a better one, behind which training ends
    """

    steps: int
    windows: int
    seed: int = 0
    learning_rate: float = 1e-3
    patience: int = 3

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

    def batches(self, size: int, part: object) -> Iterator[list[int]]:
        """The `size` windows of each step, or all; all come once before any comes again.

        part    of the model, each with an order of its own
        """
        size = min(size, self.trained)
        order = random.Random(f"{self.seed} {part}")
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


class Task(Protocol):
    """What `train` trains."""

    def trained(self) -> list[nn.Parameter]:
        """The numbers that steps change."""
        ...

    def measure(self) -> float:
        """The error on the windows that are held back, of the numbers as they would be stored."""
        ...

    def backward(
        self, windows: Sequence[int], scale: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Add the gradients of scale(error) on `windows` to those of `trained`."""
        ...

    def show(self, steps: int, best: Best) -> None:
        """So many steps are taken, and measured."""
        ...


class Best:
    """Numbers at their best measurement.

    before, after   error of the first, error of the best
    steps           of training behind which it was best
    misses          measurements since then
    """

    def __init__(self, parameters: list[nn.Parameter], error: float) -> None:
        self.parameters = parameters
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


def train(task: Task, tuning: Tuning, batches: Iterable[Sequence[int]], scaler: Scaler) -> Best:
    """Train, a step a batch, and leave the numbers at their best.

    scaler    of gradients, enabled where those of the task are fp16
    """
    best = Best(task.trained(), task.measure())
    if not 0 < best.before < math.inf:
        return best
    optimizer = torch.optim.Adam(best.parameters, betas=BETAS)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = tuning.rate(step)
        _step(task, batch, best.before, optimizer, scaler)
        if tuning.measures_after(step + 1):
            best.offer(task.measure(), step + 1)
            task.show(step + 1, best)
            if best.misses == tuning.patience:
                break
    best.restore()
    return best


def _step(
    task: Task,
    batch: Sequence[int],
    unit: float,
    optimizer: torch.optim.Optimizer,
    scaler: Scaler,
) -> None:
    """One step of training, errors in multiples of `unit`.

    Where gradients pass the largest fp16 number the scaler takes no step and halves its scale: the
    batch comes again, until it is not the scale that is too large.
    """
    scale = math.inf
    while scaler.get_scale() < scale and scale > 1:
        scale = scaler.get_scale()
        optimizer.zero_grad()
        task.backward(batch, lambda error: scaler.scale(error / unit))
        scaler.step(optimizer)
        scaler.update()


def scaler_for(device: torch.device, dtype: torch.dtype) -> Scaler:
    """What scales gradients of numbers of `dtype`: those of fp16 alone need it."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def trainable_matrix(matrix: SpqrMatrix, config: SpqrConfig) -> TrainableMatrix:
    """A weight to train that was compressed with `config`; rounded zeros stay as they are."""
    trainable = TrainableMatrix(matrix)
    trainable.zero.requires_grad_(not config.round_zero)
    return trainable


def trainable_norm(norm: torch.Tensor, device: torch.device) -> StoredNumbers:
    """The weight of a norm to train, as the checkpoint has it."""
    return StoredNumbers(norm.to(device), norm.float().abs().mean().item())


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
