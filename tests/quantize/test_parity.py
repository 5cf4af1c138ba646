"""The solver against the float64 oracle, and the bits it returns against the bits it stores."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.dequantize import dequantize

from .. import oracle
from .parity import CASES, compare, solve


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name: str, device: torch.device) -> None:
    """A choice close to a tie may fall otherwise in fp32, and with it a whole stats block."""
    agreement = compare(name, device.type)
    assert all(agreement.orders)
    assert median(agreement.codes) >= 0.999
    assert median(agreement.outliers) >= 0.999
    assert abs(median(agreement.losses)) <= 0.0002
    assert max(agreement.losses) <= 0.001
    assert abs(agreement.worst_loss) <= 0.002


@pytest.mark.parametrize("name", CASES)
def test_what_was_calibrated_is_what_is_stored(
    name: str, device: torch.device, tmp_path: Path
) -> None:
    """dequantize(load(save(quantize(W)))) is, bit for bit, the weight that the solver used."""
    _, quantized = solve(name, device=device.type)
    quantized.matrix.check_values()
    save_file(dict(quantized.matrix.tensors), tmp_path / "weight.safetensors")
    loaded = SpqrMatrix(quantized.matrix.spec, load_file(tmp_path / "weight.safetensors"))
    assert torch.equal(dequantize(loaded.to(device)), quantized.weight)
    assert np.array_equal(oracle.decode(loaded).weight, quantized.weight.cpu().numpy())


@pytest.mark.parametrize("name", ["paper", "ragged, 32/64", "gptq"])
def test_same_input_same_bytes(name: str) -> None:
    first, second = (solve.__wrapped__(name)[1].matrix.tensors for _ in range(2))
    assert first.keys() == second.keys()
    for buffer in first:
        assert torch.equal(first[buffer], second[buffer])


@pytest.mark.parametrize("name", ["paper", "2 bit, 8/64", "4 bit, 32/8"])
def test_second_level_sums_are_exact_in_fp32(name: str) -> None:
    """What lets a half-precision fma decode the same bits (layout.py)."""
    matrix = solve(name)[1].matrix
    for statistic in ("scale", "zero"):
        step, base = (matrix[f"{statistic}_{part}"].abs().double() for part in ("scale", "zero"))
        assert ((step == 0) | (step >= base * 2**-12)).all()
        assert ((base == 0) | (base >= step * 2**-8)).all()
