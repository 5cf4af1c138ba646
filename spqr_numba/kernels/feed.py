"""What stands before a product in a model, as a part of it: a norm, or a gate.

    norm    x / sqrt(mean(x^2) + eps) * beside      eps is a number; "RMSNorm", arXiv 1910.07467
    gate    silu(x) * beside                        eps is None; "SwiGLU", arXiv 2002.05202

in float32, rounded to x's dtype behind the norm or silu, and behind `beside`, as models have it. On
a GPU the blocks of a product with one input each need all of x: they make it of what is given while
they stage it (feed_cuda.py), and a kernel less has to begin and to end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import silu

from ..format.matrix import SpqrMatrix
from .matmul import GPU_LOAD_BYTES, check_input, matmul, product_of
from .prepared import PreparedMatrix

__all__ = ["GATE", "HALVES", "NORM", "Feed", "fed", "matmul_fed"]

NORM, GATE = "norm", "gate"
HALVES = torch.float16, torch.bfloat16  # of what a launch makes itself


class Feed(NamedTuple):
    """What makes the input of a product: beside has x's dtype and as many numbers as its rows."""

    beside: torch.Tensor
    eps: float | None

    @property
    def kind(self) -> str:
        """NORM or GATE."""
        return GATE if self.eps is None else NORM


def fed(x: torch.Tensor, feed: Feed) -> torch.Tensor:
    """The input of the product, of x's shape and dtype."""
    made = x.float()
    if feed.eps is None:
        made = silu(made)
    else:
        made = made * torch.rsqrt(made.square().mean(-1, keepdim=True) + feed.eps)
    return made.to(x.dtype) * feed.beside


def matmul_fed(
    x: torch.Tensor,
    feed: Feed,
    matrix: SpqrMatrix | PreparedMatrix,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`matmul` of `fed(x, feed)`, in one launch where a GPU has one input of fp16 or bf16."""
    if not isinstance(matrix, PreparedMatrix) or not in_one_launch(x, feed, matrix):
        return matmul(fed(x, feed), matrix, bias)
    from .matmul_cuda import multiply_few

    check_input(x, matrix, bias)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(1, matrix.spec.out_features)
    multiply_few(x.reshape(1, -1), matrix, bias, y, feed)
    return y.view(*x.shape[:-1], -1)


def in_one_launch(x: torch.Tensor, feed: Feed, weight: PreparedMatrix) -> bool:
    """Whether the kernel of one input can make it of x as it lies in memory."""
    columns = weight.spec.in_features
    if x.dtype not in HALVES or x.numel() != columns or feed.beside.dtype != x.dtype:
        return False
    given = x, feed.beside
    as_they_lie = all(
        tensor.numel() == columns
        and tensor.is_contiguous()
        and tensor.device == weight.device
        and tensor.data_ptr() % GPU_LOAD_BYTES == 0
        for tensor in given
    )
    return as_they_lie and product_of(weight, 1) is not None
