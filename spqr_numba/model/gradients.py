"""How much a model's loss feels an error in what a linear gives: a backward pass, block by block.

For outputs y of a linear with an error d the loss rises by about 1/2 (d . g)^2, g its gradient at y
(the Fisher matrix in the Hessian's place). With all outputs of a linear taken alike that is

    sensitivity * |d|^2 / 2,   sensitivity = mean of g^2 over its outputs and all tokens

so errors of different linears, each weighed by its sensitivity, may be added up. A linear that some
tokens pass by (an expert of a mixture) has no gradient there, and counts that much less. Tokens too
differ, by more than linears do: what one of them loses may never be heard of again.

    forward     block by block; what blocks get is kept in main memory, of some windows at a time
    backward    head, then block by block from the last: each runs again, with gradients

That walks over all weights twice for each portion of the windows. A large model would have many
small portions; there one block in several keeps what it gets, and on the way back the forward pass
is made again from one of them to the next: three walks, for far fewer portions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ModelError, NumericsError
from .activations import Activations, logits
from .progress import Progress, begin
from .skeleton import Parts

__all__ = ["TokenWeights", "sensitivities", "token_sensitivities"]

# The gradients of a wide fp16 model are near the smallest numbers that fp16 has; where they go
# beyond the largest, the second serves.
LOSS_SCALES = (256.0, 1.0)
KEPT_BYTES = 2**33  # of what blocks get; of a model so large that it is more,
KEPT_SHARE = 0.25  # of the bytes of its weights
BLOCK_INPUTS = 16  # whose weights are kept: each batch of windows asks for them again
LEAST_WEIGHT = 1e-4  # of a token: no input is lost to a Hessian
WITHOUT = "compress without token weights and target bits (--preset balanced --no-token-weights)"


def sensitivities(
    parts: Parts, linears: Collection[str], windows: torch.Tensor, progress: Progress
) -> dict[str, float]:
    """Full name -> mean squared gradient of the loss at the outputs of each of `linears`.

    As `token_sensitivities`, over all tokens; one that no gradient reaches in so little text is
    taken for an average one.
    """
    squares = token_sensitivities(parts, linears, windows, 1, progress)
    return mean_sensitivities(parts.model, squares)


def mean_sensitivities(model: nn.Module, squares: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Full name -> what `token_sensitivities` found, a token and an output."""
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in squares}
    found = {n: s.double().mean().item() / linears[n].out_features for n, s in squares.items()}
    reached = [mean for mean in found.values() if mean > 0] or [0.0]
    average = sum(reached) / len(reached)
    return {linear: mean or average for linear, mean in found.items()}


def token_sensitivities(
    parts: Parts,
    linears: Collection[str],
    windows: torch.Tensor,
    batch_size: int,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Full name -> squared gradient of the loss at each token's outputs of each of `linears`.

    Each is fp32 [N, L] in main memory, the sum over outputs; where some tokens pass a linear by,
    nobody knows which, and each gets its share. windows are int64 [N, L] tokens on the device of
    the parts, batch_size how many run at once; the loss is the sum over their tokens. Raises
    NumericsError where a gradient is not finite, ModelError where blocks cannot be run one by one.
    """
    some, span = _portions(parts, windows, batch_size)
    portions = windows.split(some)
    begin(progress, "weighing tokens", 2 * len(parts.blocks) * len(portions))
    found = [_finite_squares(parts, linears, few, batch_size, span, progress) for few in portions]
    return {name: torch.cat([squares[name] for squares in found]) for name in linears}


def _portions(parts: Parts, windows: torch.Tensor, batch_size: int) -> tuple[int, int]:
    """(windows at once, blocks from one whose input is kept to the next): the fewest walks over
    the weights for what may be kept."""
    count, width = len(parts.blocks), parts.model.config.get_text_config().hidden_size
    weights = sum(parameter.numel() for parameter in parts.model.parameters())
    kept = max(KEPT_BYTES, int(KEPT_SHARE * weights * parts.dtype.itemsize))
    batch_bytes = batch_size * windows.shape[1] * width * parts.dtype.itemsize
    plans = []
    for span, walks in ((1, 2), (round(count**0.5), 3)):
        states = -(-count // span) + span - 1
        some = batch_size * max(1, kept // (batch_bytes * states))
        plans.append((walks * -(-len(windows) // some), some, span))
    _, some, span = min(plans, key=lambda plan: plan[0])
    return some, span


def _finite_squares(
    parts: Parts,
    linears: Collection[str],
    windows: torch.Tensor,
    batch_size: int,
    span: int,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """`_squares`, with the first scale of the loss that leaves them finite."""
    for scale in LOSS_SCALES:
        squares = _squares(parts, linears, windows, batch_size, span, scale, progress)
        endless = next((name for name, s in squares.items() if not torch.isfinite(s).all()), None)
        if endless is None:
            return squares
        progress.update(-2 * len(parts.blocks))
    raise NumericsError(
        f"the loss has no finite gradient at {endless}; check the model's weights, or {WITHOUT}"
    )


def _squares(
    parts: Parts,
    linears: Collection[str],
    windows: torch.Tensor,
    batch_size: int,
    span: int,
    scale: float,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """`token_sensitivities` of so few windows that what some blocks get of them can be kept."""
    squares = _Squares(linears, windows.shape)
    activations, kept, gradients = _forward(parts, windows, batch_size, span, scale, progress)
    bounds = [*range(0, len(parts.blocks), span), len(parts.blocks)]
    for first, end in reversed(list(pairwise(bounds))):
        inputs = _inputs(parts, activations, kept.pop(), range(first, end))
        for index in reversed(range(first, end)):
            name = parts.blocks.name(index)
            with parts.block(index) as block, squares.watching(name, block):
                states = inputs.pop()
                for start in range(0, len(windows), batch_size):
                    squares.batch = slice(start, start + batch_size)
                    batch = gradients[squares.batch], states[squares.batch]
                    gradients[squares.batch] = _backward(activations, block, index, *batch)
            progress.update(1)
    return squares.scaled(scale)


def _forward(
    parts: Parts,
    windows: torch.Tensor,
    batch_size: int,
    span: int,
    scale: float,
    progress: Progress,
) -> tuple[Activations, list[torch.Tensor], torch.Tensor]:
    """(activations, what each `span`th block gets, the gradient at the last block's output)."""
    with parts.outside():
        activations = Activations.start(parts.model, parts.blocks.modules, windows, batch_size)
    kept = []
    for index in range(len(parts.blocks)):
        if index % span == 0:
            kept.append(activations.states.to("cpu", copy=True))
        with parts.block(index) as block:
            activations.advance(block, index)
        progress.update(1)
    gradients = activations.states.clone()
    with parts.outside():
        for window, states in zip(windows.split(1), gradients.split(1), strict=True):
            states.copy_(_head_gradient(parts, window, states, scale))
    return activations, kept, gradients


def _inputs(
    parts: Parts, activations: Activations, states: torch.Tensor, blocks: range
) -> list[torch.Tensor]:
    """What each of some blocks in a row gets, in main memory, of which the first gets `states`."""
    inputs = [states]
    if len(blocks) > 1:
        activations.states.copy_(states)
    for index in blocks[:-1]:
        with parts.block(index) as block:
            activations.advance(block, index)
        inputs.append(activations.states.to("cpu", copy=True))
    return inputs


def _head_gradient(
    parts: Parts, window: torch.Tensor, states: torch.Tensor, scale: float
) -> torch.Tensor:
    """The gradient of the loss at the last block's output [1, L, d], scaled."""
    leaf = states.detach().requires_grad_()
    with torch.enable_grad(), differentiable("the head"):
        made = logits(parts.model, parts.blocks.modules, window, leaf)[0, :-1]
        loss = F.cross_entropy(made.float(), window[0, 1:], reduction="sum")
        (gradient,) = torch.autograd.grad(scale * loss, leaf)
    return gradient


def _backward(
    activations: Activations,
    block: nn.Module,
    index: int,
    gradient: torch.Tensor,
    states: torch.Tensor,
) -> torch.Tensor:
    """The gradient at the input [B, L, d] of a block, given that at its output."""
    leaf = states.to(gradient.device).requires_grad_()
    # On a GPU the other kernels sum a gradient in any order, and a plan must not change by that.
    on_gpu = any(parameter.is_cuda for parameter in block.parameters())
    attention = sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext()
    with torch.enable_grad(), attention, differentiable(f"decoder block {index}"):
        output = activations.run(block, index, leaf)
        (gradient,) = torch.autograd.grad(output, leaf, gradient)
    return gradient


@contextmanager
def differentiable(part: str) -> Iterator[None]:
    """Say what to do where a part of the model cannot be run backward."""
    try:
        yield
    except (ModelError, RuntimeError) as error:
        raise ModelError(
            f"{part} cannot be run backward ({error}); {WITHOUT}, or, where memory is short, give a"
            " smaller batch size"
        ) from error


class _Squares:
    """Sums the squares of what comes back to the outputs of some linears.

    batch   the windows whose gradients come
    """

    def __init__(self, linears: Collection[str], shape: torch.Size) -> None:
        self._found = {linear: torch.zeros(shape) for linear in linears}
        self._here: dict[str, torch.Tensor] = {}  # of the block that runs, where it is
        self.batch = slice(0)

    @contextmanager
    def watching(self, name: str, block: nn.Module) -> Iterator[None]:
        """Within, gradients through the linears of the block called `name` are summed."""
        with ExitStack() as hooks:
            for path, module in block.named_modules():
                linear = f"{name}.{path}"
                if linear in self._found:
                    hooks.enter_context(module.register_forward_hook(self._hook(linear)))
            yield
        self._found |= {linear: squares.cpu() for linear, squares in self._here.items()}
        self._here.clear()

    def scaled(self, scale: float) -> dict[str, torch.Tensor]:
        """Linear -> squares, of the loss itself where `scale` of it was looked at."""
        return {linear: squares / scale**2 for linear, squares in self._found.items()}

    def _hook(self, linear: str) -> Callable:
        def add(gradient: torch.Tensor) -> None:
            squares = gradient.float().square().sum(-1)
            if linear not in self._here:
                self._here[linear] = torch.zeros_like(self._found[linear], device=squares.device)
            found = self._here[linear][self.batch]
            found += squares if squares.shape == found.shape else squares.sum() / found.numel()

        def hook(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return hook


class TokenWeights:
    """How much each token counts in the Hessian of an input: 1 on average over all of them.

    Of linears that share an input each has the same say: the loss feels values (v_proj) so much
    more than keys and queries that the sum would be the values' weights.

    squares   what `token_sensitivities` found
    device    where weights are made and kept, of some inputs at a time
    """

    def __init__(
        self, squares: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.squares, self._device = squares, device
        self._all = lru_cache(maxsize=BLOCK_INPUTS)(self._of_all)

    def of(self, linears: Iterable[str], windows: slice) -> torch.Tensor:
        """fp32 [B, L] for some of the windows, of an input that `linears` share."""
        return self._all(tuple(linears))[windows]

    def _of_all(self, linears: tuple[str, ...]) -> torch.Tensor:
        felt = [self.squares[name].to(self._device, torch.float32) for name in linears]
        shares = [one / mean if (mean := one.mean()) > 0 else torch.ones_like(one) for one in felt]
        return torch.stack(shares).mean(0).clamp(min=LEAST_WEIGHT)
