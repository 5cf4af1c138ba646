"""What people multiply by small weights with on a GPU today, each as a product to time.

Weights are random, of the right shape and bytes: only time is asked for. A rival that is not
installed, or that cannot take a shape, raises, and is left out of a table with that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import linear

__all__ = ["RIVALS", "Product"]

Product = Callable[[torch.Tensor], Any]
"""y = W x of one weight: takes x fp16 [batch, columns]."""

GROUP = 32  # of the 4-bit weights
INNER_TILES = 8  # of torch's 4-bit layout
TILE = 16  # of spqr_quant, rows and columns
MOST_COLUMNS = 22 * 1024  # of spqr_quant: x and a table are in 48 KB of shared memory, unchecked


def dense(rows: int, columns: int) -> Product:
    """torch's product with an fp16 weight."""
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.float16)
    return lambda x: linear(x, weight)


def int4(rows: int, columns: int) -> Product:
    """torch's own 4-bit product: groups of 32, statistics and inputs in bf16."""
    codes = torch.randint(256, (rows, columns // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, INNER_TILES)
    shape = columns // GROUP, rows, 2
    statistics = torch.rand(shape, device="cuda", dtype=torch.bfloat16)

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm(x.view(torch.bfloat16), packed, GROUP, statistics)

    return product


def gemlite(rows: int, columns: int) -> Product:
    """gemlite's Triton kernels: 4 bits, groups of 32."""
    import gemlite

    layer = gemlite.GemLiteLinear(
        4,
        group_size=GROUP,
        in_features=columns,
        out_features=rows,
        input_dtype=gemlite.DType.FP16,
        output_dtype=gemlite.DType.FP16,
    )
    codes = torch.randint(16, (rows, columns), device="cuda", dtype=torch.uint8)
    shape = rows * columns // GROUP, 1
    scales = torch.rand(shape, device="cuda", dtype=torch.float16)
    layer.pack(codes, scales, 8 * scales, None)
    return layer


def bitsandbytes(rows: int, columns: int) -> Product:
    """bitsandbytes' NF4: groups of 64."""
    import bitsandbytes

    weight = torch.randn(rows, columns, device="cuda", dtype=torch.float16)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def spqr_quant(rows: int, columns: int) -> Product:
    """The reference's CUDA kernel: 3 bits, 16 and 16, 1 % outliers, permuted; token by token.

    As its QuantizedLinear calls it, but for the flag not to wait for the device after each token:
    a CUDA graph would not hold that.
    """
    if rows % TILE or columns % TILE or columns > MOST_COLUMNS:
        raise ValueError(f"takes multiples of {TILE}, and at most {MOST_COLUMNS} columns")
    from spqr_quant.inference import FeatureFlags
    from spqr_quant.inference_kernels.cuda_kernel import call_spqr_mul_fused

    weight = spqr_quant_weight(rows, columns, "cuda")
    flags = int(FeatureFlags.SPARSE_FUSED_FP32_ASYNC)

    def product(x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(len(x), rows)
        for token, out in zip(x, y, strict=True):
            call_spqr_mul_fused(*weight, token, flags, out, out)
        return y

    return product


def spqr_quant_weight(rows: int, columns: int, device: str) -> tuple[Any, ...]:
    """What its kernel takes of a weight: sizes, order of columns, codes, offsets, outliers.

    It checks none of it: a code of 8 bytes for each 16 columns of a row, rows + 1 offsets into the
    outliers, and a column below `columns` in each.
    """
    count = columns // 100
    tiles = rows // TILE * (columns // TILE)
    codes = torch.randint(2**62, (tiles * TILE,), device=device)
    offsets = torch.arange(rows + 1, device=device, dtype=torch.int32) * count
    places = torch.rand(rows, columns, device=device).topk(count).indices.sort().values
    outliers = places.flatten().to(torch.int32)
    order = torch.randperm(columns, device=device, dtype=torch.int32)
    pairs = order[::2] | order[1::2] << 16
    return rows, columns, 3, TILE, TILE, pairs, codes, offsets, outliers, outliers.numel()


RIVALS: Mapping[str, Callable[[int, int], Product]] = {
    "fp16": dense,
    "int4": int4,
    "gemlite": gemlite,
    "bitsandbytes": bitsandbytes,
    "spqr_quant": spqr_quant,
}
"""Name -> product(rows, columns) of a new random weight on the GPU."""
