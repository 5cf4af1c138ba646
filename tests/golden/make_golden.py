"""Write format-<version>.safetensors: small compressed weights and the numbers they stand for.

    python -m tests.golden.make_golden

Run it for a new FORMAT_VERSION only, and keep the files of the old ones: whoever compressed a
model with them still has it. Buffers come from formulas and from the oracle's packing, the
expected weights (`<name>.weight`) from its decoding; nothing comes from spqr_numba's kernels.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from spqr_numba.format.layout import FORMAT_VERSION, MatrixSpec
from spqr_numba.format.matrix import SpqrMatrix

from .. import oracle
from ..problems import make_spec

FOLDER = Path(__file__).parent


def codes(count: int, lanes: int, bits: int) -> np.ndarray:
    """Codes [count, lanes] that fill their range, neighbours unequal."""
    return (7 * np.arange(count)[:, None] + 3 * np.arange(lanes)) % 2**bits


def halves(groups: int, width: int, step: float) -> torch.Tensor:
    """fp16 [groups, width], step, 2 step, ..."""
    numbers = 1 + np.arange(groups * width).reshape(groups, width)
    return torch.from_numpy((numbers * step).astype(np.float16))


def statistics(spec: MatrixSpec, name: str, bits: int, step: float) -> dict[str, torch.Tensor]:
    if bits == 16:
        return {f"{name}s": halves(spec.groups, spec.out_features, step)}
    packed = oracle.write_statistics(codes(spec.out_features, spec.groups, bits), bits)
    return {
        f"{name}_codes": torch.from_numpy(packed),
        f"{name}_scale": halves(spec.groups, spec.stats_groups, step / 4),
        f"{name}_zero": halves(spec.groups, spec.stats_groups, step),
    }


def outliers(spec: MatrixSpec) -> dict[str, torch.Tensor]:
    """Two in the first row, none in the next, three in the last."""
    offsets = [0] + [2] * (spec.out_features - 1) + [5]
    columns = [0, spec.in_features - 1, 1, 2, 3]
    return {
        "outlier_row_offsets": torch.tensor(offsets, dtype=torch.int32),
        "outlier_columns": torch.tensor(columns, dtype=torch.uint16),
        "outlier_values": torch.tensor([0.5, -1.25, 3e-5, 1000.1, -7], dtype=torch.float16),
    }


def build(spec: MatrixSpec, *, sparse: bool, permuted: bool) -> SpqrMatrix:
    packed = oracle.write_codes(codes(spec.in_features, spec.out_features, spec.bits), spec.bits)
    tensors = {"codes": torch.from_numpy(packed)}
    tensors |= statistics(spec, "scale", spec.scale_bits, 0.01)
    tensors |= statistics(spec, "zero", spec.zero_bits, 0.3)
    if sparse:
        tensors |= outliers(spec)
    if permuted:  # 11 has no factor in common with the widths below
        order = 11 * torch.arange(spec.in_features) % spec.in_features
        tensors["permutation"] = order.to(torch.uint16)
    return SpqrMatrix(spec, tensors)


def golden_matrices() -> dict[str, SpqrMatrix]:
    """Ragged in every direction, each width of codes and statistics that is packed by itself."""
    return {
        "paper": build(make_spec(18, 50), sparse=True, permuted=True),
        "two": build(
            make_spec(35, 13, bits=2, group_size=8, stats_group_size=8, scale_bits=2, zero_bits=4),
            sparse=False,
            permuted=True,
        ),
        "four": build(
            make_spec(9, 40, bits=4, group_size=32, scale_bits=16, zero_bits=16),
            sparse=True,
            permuted=False,
        ),
        "eight": build(make_spec(3, 34, bits=8, group_size=34), sparse=False, permuted=False),
    }


def main() -> None:
    tensors, specs = {}, {}
    for name, matrix in golden_matrices().items():
        specs[name] = asdict(matrix.spec)
        tensors |= {f"{name}.{buffer}": tensor for buffer, tensor in matrix.tensors.items()}
        tensors[f"{name}.weight"] = torch.from_numpy(oracle.decode(matrix).weight)
    metadata = {"format_version": str(FORMAT_VERSION), "specs": json.dumps(specs)}
    save_file(tensors, FOLDER / f"format-{FORMAT_VERSION}.safetensors", metadata)


if __name__ == "__main__":
    main()
