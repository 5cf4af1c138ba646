"""Tuning a whole model: trained to predict what the dense model predicts.

    dense       the last block's output of the dense model, on windows that are drawn for this:
                block by block, and kept in place of predictions, which are so much wider
    train       once all blocks are compressed: their second-level statistics and outlier values,
                the weights of all norms, together (training.py); codes too, if wanted
    error       the Kullback-Leibler divergence from the dense model's next-token distribution, in
                nats a token

A block that is tuned by itself (tuning.py) can mend what was lost inside it alone, and takes every
part of its output for equally worth mending.

Beside the model outside its blocks, the device holds about 1.5 bytes for each compressed weight (a
code as a byte, and the matrix), some 30 bytes for each number that is trained, what each block gets
of a batch, and what training one block takes: its weights are decoded for their turn, forward and
once more backward. Up to KEPT_WEIGHTS of them are decoded once, and that of all blocks is kept.
Logits are there for a few positions at a time. Codes that are trained take 16 bytes more each.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config import SpqrConfig
from ..format.layout import MatrixSpec
from ..format.matrix import SpqrMatrix
from ..quantize.trainable import StoredNumbers
from .activations import Activations, BlockCall, embed, logits
from .blocks import find_norms, outer_norms
from .progress import Progress, begin
from .report import TunedRow
from .skeleton import InMemory, Parts, load, release, stored_names
from .training import (
    MEASUREMENTS,
    MOST_HELD_BACK,
    Best,
    TrainableBlock,
    Tuning,
    reproducible,
    scaler_for,
    train,
    trainable_matrix,
    trainable_norm,
)

__all__ = ["ModelTuner", "Shards", "TunedModel", "model_tuning"]

LEARNING_RATE = 5e-4
MOST_TOKENS = 2**19  # of which a state of the dense model is kept
KEPT_WEIGHTS = 2**28  # up to which no block runs twice; all that gradients need is some 10 GB
POSITIONS = 512  # whose logits are in float32 at once

Shards = Callable[[int], Mapping[str, torch.Tensor]]
"""Index of a block -> full name of everything that is stored of it -> tensor."""

logger = logging.getLogger(__name__)


def model_tuning(
    steps: int, batch_size: int, seed: int, *, codes: bool, text: int, length: int
) -> Tuning:
    """How to tune on a text of so many windows of `length` tokens.

    Every step gets windows of its own, as far as MOST_TOKENS and the text, read twice, allow.
    """
    wanted = steps * batch_size + MOST_HELD_BACK
    windows = max(2, min(wanted, MOST_TOKENS // length, 2 * text))
    # Codes that have begun to move are worse, until the rate falls and they settle.
    return Tuning(steps, windows, seed, LEARNING_RATE, *([MEASUREMENTS] if codes else []))


class TunedModel(NamedTuple):
    """What is to be stored in place of what is.

    tensors   full name -> tensor, on the CPU
    row       how it went; the error is in nats a token
    """

    tensors: dict[str, torch.Tensor]
    row: TunedRow


class CompressedBlock:
    """A block with what training changes in it, and the rest loaded.

    parts      of the dense model, the block among them
    index      of the block
    settings   full name -> how it was compressed, of each linear in it that was
    shard      full name -> tensor, of everything that is stored of it
    codes      train codes too
    again      run it once more for gradients, and keep nothing of it until then
    """

    def __init__(
        self,
        parts: Parts,
        index: int,
        settings: Mapping[str, SpqrConfig],
        shard: Mapping[str, torch.Tensor],
        *,
        codes: bool,
        again: bool,
    ) -> None:
        self.again = again
        self.model, self.name = parts.model, parts.blocks.name(index)
        device = parts.device
        inside = [n for n in stored_names(parts.model) if n.startswith(f"{self.name}.")]
        self.loaded = [n for n in inside if n.removesuffix(".weight") not in settings]
        load(parts.model, self.loaded, InMemory(shard), device, parts.dtype)
        self.matrices = {
            name: trainable_matrix(self._matrix(name, config, shard).to(device), config)
            for name, config in settings.items()
        }
        if codes:
            for name, matrix in self.matrices.items():
                matrix.train_codes(parts.read(f"{name}.weight").to(device))
        self.norms = {
            name: trainable_norm(shard[name], device)
            for name in find_norms(parts.model, parts.blocks)
            if name in inside
        }
        self.block = TrainableBlock(
            parts.blocks.modules[index], self._inside(self.matrices), self._inside(self.norms)
        )

    def _inside(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """With names in the block in place of those in the model."""
        return {name.removeprefix(f"{self.name}."): value for name, value in named.items()}

    def _matrix(
        self, name: str, config: SpqrConfig, shard: Mapping[str, torch.Tensor]
    ) -> SpqrMatrix:
        linear = self.model.get_submodule(name)
        spec = MatrixSpec.from_config(config, linear.out_features, linear.in_features)
        prefix = f"{name}."
        buffers = {n.removeprefix(prefix): t for n, t in shard.items() if n.startswith(prefix)}
        buffers.pop("bias", None)
        return SpqrMatrix(spec, buffers)

    def run(self, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """What the block makes of hidden states; for gradients it may run once more."""
        if not self.again:
            return call.of(self.block, hidden)
        return checkpoint(
            lambda x: call.of(self.block, x), hidden, use_reentrant=False, preserve_rng_state=False
        )

    def stored(self) -> dict[str, torch.Tensor]:
        """Full name -> what was trained, as it is to be stored."""
        tensors = {
            f"{name}.{buffer}": tensor
            for name, trained in self.matrices.items()
            for buffer, tensor in trained.stored().tensors.items()
            if tensor is not trained.matrix[buffer]
        }
        return tensors | stored_norms(self.norms)

    def release(self) -> None:
        """Nothing of it stays loaded."""
        release(self.model, self.loaded)


class ModelTuner:
    """Tunes a model whose blocks are compressed.

    parts       its dense weights, and itself
    settings    full name -> how a linear is compressed
    windows     int64 [N, L] tokens: those to train on, and behind them those held back
    batch_size  windows of a step
    tuning      how
    progress    a bar
    codes       train codes too
    offload     keep the dense model's states in main memory
    """

    def __init__(
        self,
        parts: Parts,
        settings: Mapping[str, SpqrConfig],
        windows: torch.Tensor,
        batch_size: int,
        tuning: Tuning,
        progress: Progress,
        *,
        codes: bool = False,
        offload: bool = False,
    ) -> None:
        self.codes = codes
        self.parts, self.settings, self.tuning, self.progress = parts, settings, tuning, progress
        self.windows = windows.to(parts.device)
        self.batch_size, self.offload = batch_size, offload

    def tune(self, shards: Shards) -> TunedModel:
        """Train what `shards` hold. Raises ModelError where blocks cannot be run one by one."""
        started = time.perf_counter()
        dense = self._dense()
        again = self._weights() > KEPT_WEIGHTS
        blocks = [
            self._block(index, shards(index), again=again)
            for index in range(len(self.parts.blocks))
        ]
        try:
            with self.parts.outside(), reproducible(self.parts.device), torch.enable_grad():
                task = ModelTask(self, blocks, dense)
                begin(self.progress, "tuning the model", self.tuning.steps)
                batches = self.tuning.batches(self.batch_size, "model")
                scaler = scaler_for(self.parts.device, self.parts.dtype)
                best = train(task, self.tuning, batches, scaler)
        finally:
            for block in blocks:
                block.release()
        row = TunedRow("model", best.before, best.after, best.steps, time.perf_counter() - started)
        log(row)
        return TunedModel(task.stored() if best.steps else {}, row)

    def _dense(self) -> Activations:
        """With the dense model's states behind its last block."""
        with self.parts.outside():
            activations = Activations.start(
                self.parts.model,
                self.parts.blocks.modules,
                self.windows,
                self.batch_size,
                offload=self.offload,
            )
        begin(self.progress, "running the dense model", len(self.parts.blocks))
        for index in range(len(self.parts.blocks)):
            with self.parts.block(index) as block:
                activations.advance(block, index)
            self.progress.update(1)
        return activations

    def _weights(self) -> int:
        """How many are compressed."""
        linears = (self.parts.model.get_submodule(name) for name in self.settings)
        return sum(linear.weight.numel() for linear in linears)

    def _block(
        self, index: int, shard: Mapping[str, torch.Tensor], *, again: bool
    ) -> CompressedBlock:
        inside = f"{self.parts.blocks.name(index)}."
        settings = {name: c for name, c in self.settings.items() if name.startswith(inside)}
        return CompressedBlock(self.parts, index, settings, shard, codes=self.codes, again=again)


class ModelTask:
    """The training of `blocks` and of norms outside them, for `train`.

    tuner   whose parts outside the blocks are loaded
    dense   the dense model's states behind its last block
    """

    def __init__(
        self, tuner: ModelTuner, blocks: Sequence[CompressedBlock], dense: Activations
    ) -> None:
        self.tuner, self.parts, self.blocks, self.dense = tuner, tuner.parts, blocks, dense
        self.shown = 0  # steps
        # Those in front of the blocks too: they get no gradient, and stay.
        self.norms = {
            name: trainable_norm(self.parts.read(name), self.parts.device)
            for name in outer_norms(self.parts.model, self.parts.blocks)
        }

    def trained(self) -> list[nn.Parameter]:
        """The numbers that steps change."""
        outside = [parameter for norm in self.norms.values() for parameter in norm.parameters()]
        return [parameter for block in self.blocks for parameter in block.block.trained()] + outside

    def measure(self) -> float:
        """Nats a token on the windows that are held back."""
        tuning = self.tuner.tuning
        held_back = range(tuning.trained, tuning.windows)
        total = 0.0
        with torch.no_grad():
            for part in self.dense.parts(held_back):
                states = self._states(part)
                total += sum(
                    self._divergence(window, at, states[row, at]).item()
                    for row, window, at in self._pieces(part)
                )
        return total / self._tokens(held_back)

    def backward(
        self, windows: Sequence[int], scale: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Add the gradients of scale(nats a token) on `windows`.

        Through the head for a few positions at a time, and then at once through the blocks.
        """
        for part in self.dense.parts(windows):
            states = self._states(part)
            leaf = states.detach().requires_grad_()
            for row, window, at in self._pieces(part):
                divergence = self._divergence(window, at, leaf[row, at])
                scale(divergence / self._tokens(windows)).backward()
            states.backward(leaf.grad)

    def show(self, steps: int, best: Best) -> None:
        """How far it has come."""
        nats = f"{best.after:.4f} of {best.before:.4f} nats a token left"
        self.tuner.progress.set_postfix_str(nats, refresh=False)
        self.tuner.progress.update(steps - self.shown)
        self.shown = steps

    def stored(self) -> dict[str, torch.Tensor]:
        """Full name -> what was trained, as it is to be stored, on the CPU."""
        tensors = stored_norms(self.norms)
        for block in self.blocks:
            tensors |= block.stored()
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _tokens(self, windows: Sequence[int]) -> int:
        return len(windows) * self.tuner.windows.shape[1]

    def _states(self, windows: Sequence[int]) -> torch.Tensor:
        """What the last block gives for these windows: [B, L, d]."""
        tokens = self.tuner.windows[list(windows)]
        with torch.no_grad():
            hidden = embed(self.parts.model, self.parts.blocks.modules[0], tokens)
        for block, call in zip(self.blocks, self.dense.calls[len(windows)], strict=True):
            hidden = block.run(hidden, call)
        return hidden

    def _pieces(self, windows: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
        """(place among `windows`, window, positions) of a few predictions at a time."""
        for row, window in enumerate(windows):
            for start in range(0, self.tuner.windows.shape[1], POSITIONS):
                yield row, window, slice(start, start + POSITIONS)

    def _divergence(self, window: int, at: slice, hidden: torch.Tensor) -> torch.Tensor:
        """Summed over positions, from the dense model's predictions to those made of `hidden`."""
        with torch.no_grad():
            dense = self.dense.states[window, at].to(hidden.device)
            target = self._predictions(window, at, dense, {})
        norms = {name: norm() for name, norm in self.norms.items()}
        predicted = self._predictions(window, at, hidden, norms)
        return F.kl_div(predicted, target, reduction="sum", log_target=True)

    def _predictions(
        self, window: int, at: slice, hidden: torch.Tensor, norms: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """ln of the distributions: fp32 [positions, vocabulary], of hidden states [positions, d].

        norms: name -> weight, in place of the model's own.
        """
        model, dtype = self.parts.model, self.parts.dtype
        tokens = self.tuner.windows[window, at][None]
        weights = {name: weight.to(dtype) for name, weight in norms.items()}
        made = logits(model, self.parts.blocks.modules, tokens, hidden[None], weights)
        return F.log_softmax(made[0].float(), dim=-1)


def stored_norms(norms: Mapping[str, StoredNumbers]) -> dict[str, torch.Tensor]:
    """Name -> weight, as it is to be stored."""
    with torch.no_grad():
        return {name: norm().to(norm.dtype) for name, norm in norms.items()}


def log(row: TunedRow) -> None:
    """One line on what tuning did."""
    if row.steps:
        logger.info(
            "%d steps of tuning the model leave %.4f of %.4f nats a token",
            row.steps, row.error_after, row.error_before,
        )  # fmt: skip
    else:
        logger.info("tuning the model does not bring it nearer to the dense one; left as it was")
