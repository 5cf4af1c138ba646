"""One decoder block: a Hessian for each of its inputs, then its linears one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ..config import SpqrConfig
from ..errors import ModelError, NumericsError
from ..quantize.hessian import Factorization, Hessian, factorize
from ..quantize.solver import QuantizedWeight, quantize_weight
from .activations import Activations
from .blocks import InputGroup, find_linears, input_groups
from .budget import Ration
from .gradients import TokenWeights
from .input_sums import InputSums, Weigh
from .report import Clock

__all__ = ["BlockQuantizer", "factorization_key", "named", "weigher"]

logger = logging.getLogger(__name__)


class BlockQuantizer:
    """Compresses the linears of one block and leaves in them what was stored.

    block       its weights loaded
    name        of the block in the model
    index       of the block
    settings    full module name -> settings, of every linear to compress; a ration changes them
    clock       for the seconds of each phase
    ration      chooses settings, and is told what each linear took
    weights     of tokens, in Hessians
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        index: int,
        settings: Mapping[str, SpqrConfig],
        clock: Clock,
        ration: Ration | None = None,
        weights: TokenWeights | None = None,
    ) -> None:
        self.weights = weights
        self.block, self.index, self.clock, self.ration = block, index, clock, ration
        full_names = {f"{name}.{linear}": module for linear, module in find_linears(block).items()}
        self.linears = {
            linear: module for linear, module in full_names.items() if linear in settings
        }
        self.settings = {linear: settings[linear] for linear in self.linears}
        self._keeps_dense = False
        self._dense: dict[str, torch.Tensor] = {}  # weights of linears that are compressed already

    def quantize(
        self, activations: Activations | None, sequential: bool
    ) -> dict[str, QuantizedWeight]:
        """Full module name -> result, for every linear of the block that `settings` names.

        activations are what the block gets, None where no linear needs a Hessian. sequential
        calibrates each linear on the outputs of the compressed ones before it. Raises NumericsError
        for inputs with NaN or inf, ModelError for a linear that no input reaches.
        """
        if activations is None:
            return {name: self._quantize(name, None) for name in self.linears}
        self._keeps_dense = sequential and activations.dense is not None
        results: dict[str, QuantizedWeight] = {}
        groups = self._input_groups(activations)
        stages = [[group] for group in groups] if sequential and groups else [groups]
        for stage in stages:
            hessians = self._accumulate(stage, activations, last=stage is stages[-1])
            for group in stage:
                results |= self._quantize_group(group, hessians.pop(group, None))
        return results

    def _input_groups(self, activations: Activations) -> list[InputGroup]:
        """The linears that share an input, in the order in which they run."""
        groups = input_groups(self.linears, lambda: activations.run_first(self.block, self.index))
        reached = {name for group in groups for name in group.names}
        for name in self.linears:
            if name not in reached and self.settings[name].use_hessian:
                raise ModelError(
                    f"{name} is never called on the calibration text, so there is nothing to"
                    " calibrate it on; leave it dense with a skip pattern"
                )
        return groups + [InputGroup((name,), 0) for name in self.linears if name not in reached]

    def _accumulate(
        self, groups: Sequence[InputGroup], activations: Activations, *, last: bool
    ) -> dict[InputGroup, Hessian]:
        """The Hessian of each group's input, where a linear of the group needs one.

        With the `last` groups of the block the dense states go on to the next, if there are any.
        """
        needing = {
            group: self.linears[group.names[0]]
            for group in groups
            if any(self.settings[name].use_hessian for name in group.names)
        }
        advance = last and activations.dense is not None
        if not needing and not advance:
            return {}
        sums = InputSums(self.block, needing, self.clock, weigher(self.weights, activations))
        with self.clock("forward"), sums.hooked():
            if activations.dense is None:
                activations.run_all(self.block, self.index)
            else:
                as_dense = partial(self._as_dense, sums, whole=advance)
                activations.run_pairs(self.block, self.index, as_dense, advance=advance)
        return sums.hessians

    @contextmanager
    def _as_dense(self, sums: InputSums, *, whole: bool) -> Iterator[None]:
        """Within, the block has its own weights, and `sums` remembers its inputs."""
        self._exchange_weights()
        try:
            with sums.remembering(whole=whole):
                yield
        finally:
            self._exchange_weights()

    def _exchange_weights(self) -> None:
        for name, weight in self._dense.items():
            parameter = self.linears[name].weight
            self._dense[name], parameter.data = parameter.data, weight

    def _quantize_group(
        self, group: InputGroup, hessian: Hessian | None
    ) -> dict[str, QuantizedWeight]:
        """Compress linears of one input; those with equal settings share permutation and U."""
        if hessian is None:
            return {name: self._quantize(name, None) for name in group.names}
        with self.clock("hessian"), named(group.names[0]):
            matrix, drift = hessian.matrix, hessian.drift
        del hessian  # as large as the matrix
        factorizations: dict[tuple, Factorization] = {}
        results = {}
        for name in group.names:
            key = factorization_key(name, self.settings[name])
            if key is not None and key not in factorizations:
                with self.clock("factorise"), named(name):
                    weight = self.linears[name].weight
                    factorizations[key] = factorize(matrix, self.settings[name], weight, drift)
            results[name] = self._quantize(name, factorizations.get(key) if key else None)
        return results

    def _quantize(self, name: str, factorization: Factorization | None) -> QuantizedWeight:
        """Compress one linear and put what was stored into it."""
        if self.ration is not None:
            self.settings[name] = self.ration.settings_of(name)
        linear, config = self.linears[name], self.settings[name]
        with self.clock("quantize"), named(name):
            result = quantize_weight(linear.weight, factorization, config)
            if self._keeps_dense:
                self._dense[name] = linear.weight.data.clone()
            linear.weight.copy_(result.weight)
        if self.ration is not None:
            self.ration.spend(name, result.matrix.nbytes)
        if config.use_hessian and result.report.damping > config.damping:
            logger.warning("%s: damping raised to %g", name, result.report.damping)
        return result


def weigher(weights: TokenWeights | None, activations: Activations) -> Weigh | None:
    """What weighs the tokens of the windows that run; None where nothing does."""
    if weights is None:
        return None
    return lambda names: weights.of(names, activations.running)


def factorization_key(name: str, config: SpqrConfig) -> tuple | None:
    """Equal for linears of one input that can share a Factorization; None where none is used.

    The order "spearman" looks at the weight too, so it is never shared.
    """
    if not config.use_hessian:
        return None
    own = name if config.permutation == "spearman" else None
    fallback = config.on_failed_factorization
    return (config.permutation, config.damping, config.shrinkage, fallback, own)


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put the layer's name in front of NumericsErrors."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{layer}: {error}") from error
