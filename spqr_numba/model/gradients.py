"""How much a model's loss feels an error in what a linear gives: a backward pass, block by block.

For outputs y of a linear with an error d the loss rises by about 1/2 (d . g)^2, g its gradient at y
(the Fisher matrix in the Hessian's place). With all outputs of a linear taken alike that is

    sensitivity * |d|^2 / 2,   sensitivity = mean of g^2 over its outputs and all tokens

so errors of different linears, each weighed by its sensitivity, may be added up. A linear that some
tokens pass by (an expert of a mixture) has no gradient there, and counts that much less.

    forward     block by block; what each gets is kept in main memory
    backward    head, then block by block from the last: each runs again, with gradients
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import NumericsError
from .activations import Activations, logits
from .skeleton import Parts

__all__ = ["sensitivities"]

# The gradients of a wide fp16 model are near the smallest numbers that fp16 has.
LOSS_SCALE = 256.0


def sensitivities(
    parts: Parts, linears: Collection[str], windows: torch.Tensor, note: Callable[[str], object]
) -> dict[str, float]:
    """Full name -> mean squared gradient of the loss at the outputs of each of `linears`.

    One that no gradient reaches in so little text is taken for an average one. windows are int64
    [N, L] tokens on the device of the parts; the loss is the sum over their tokens. note is told
    what is being done. Raises NumericsError where a gradient is not finite, ModelError where blocks
    cannot be run one by one.
    """
    squares = _Squares(linears)
    activations, inputs, gradients = _forward(parts, windows)
    for index in reversed(range(len(parts.blocks))):
        name = parts.blocks.name(index)
        note(f"{name}, gradients")
        with parts.block(index) as block, squares.watching(name, block):
            pairs = zip(inputs.pop().split(1), gradients, strict=True)
            gradients = [_backward(activations, block, index, *pair) for pair in pairs]
    return squares.means(windows.numel())


def _forward(
    parts: Parts, windows: torch.Tensor
) -> tuple[Activations, list[torch.Tensor], list[torch.Tensor]]:
    """(activations, what each block gets, the gradient of the loss at the last block's output)."""
    with parts.outside():
        activations = Activations.start(parts.model, parts.blocks.modules, windows, batch_size=1)
    inputs = []
    for index in range(len(parts.blocks)):
        inputs.append(activations.states.to("cpu", copy=True))
        with parts.block(index) as block:
            activations.advance(block, index)
    with parts.outside():
        states = activations.states.split(1)
        pairs = zip(windows.split(1), states, strict=True)
        return activations, inputs, [_head_gradient(parts, *pair) for pair in pairs]


def _head_gradient(parts: Parts, window: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss at the last block's output [1, L, d], scaled."""
    leaf = states.detach().requires_grad_()
    with torch.enable_grad():
        made = logits(parts.model, parts.blocks.modules, window, leaf)[0, :-1]
        loss = F.cross_entropy(made.float(), window[0, 1:], reduction="sum")
        (gradient,) = torch.autograd.grad(LOSS_SCALE * loss, leaf)
    return gradient


def _backward(
    activations: Activations,
    block: nn.Module,
    index: int,
    states: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """The gradient at the input [1, L, d] of a block, given that at its output."""
    leaf = states.to(gradient.device).requires_grad_()
    # On a GPU the other kernels sum a gradient in any order, and a plan must not change by that.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        output = activations.run(block, index, leaf)
        (gradient,) = torch.autograd.grad(output, leaf, gradient)
    return gradient


class _Squares:
    """Sums the squares of what comes back to the outputs of some linears."""

    def __init__(self, linears: Collection[str]) -> None:
        self._sums = dict.fromkeys(linears, 0.0)

    @contextmanager
    def watching(self, name: str, block: nn.Module) -> Iterator[None]:
        """Within, gradients through the linears of the block called `name` are summed."""
        with ExitStack() as hooks:
            for path, module in block.named_modules():
                linear = f"{name}.{path}"
                if linear in self._sums:
                    hooks.enter_context(module.register_forward_hook(self._hook(linear)))
            yield

    def means(self, tokens: int) -> dict[str, float]:
        """Linear -> mean square a token. Raises NumericsError where one is not finite."""
        for linear, total in self._sums.items():
            if not math.isfinite(total):
                raise NumericsError(
                    f"the loss has no finite gradient at {linear}; check the model's weights, or"
                    " compress without target_bits"
                )
        reached = [total for total in self._sums.values() if total > 0] or [0.0]
        average = sum(reached) / len(reached)
        scale = LOSS_SCALE**2 * tokens
        return {linear: (total or average) / scale for linear, total in self._sums.items()}

    def _hook(self, linear: str) -> Callable:
        def add(gradient: torch.Tensor) -> None:
            squares = gradient.float().square().sum(dtype=torch.float64)
            self._sums[linear] += squares.item() / gradient.shape[-1]

        def hook(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return hook
