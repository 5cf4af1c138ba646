"""dequantize, its NumPy reference and the oracle's decoding: the same bits for any buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.errors import InputError
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.dequantize import dequantize, dequantize_reference

from .. import oracle
from ..problems import make_spec

# Few combinations of bits: each is compiled anew.
TWO_BITS = {"bits": 2, "scale_bits": 2, "zero_bits": 4}
FOUR_BITS = {"bits": 4, "scale_bits": 16, "zero_bits": 16}

# rows, columns, settings, outliers a row, permuted
CASES = {
    "paper": (48, 96, {}, 3, True),
    "ragged": (37, 75, {}, 3, True),
    "one row": (1, 75, {}, 3, True),
    "one column": (37, 1, {}, 1, True),
    "one weight": (1, 1, {}, None, False),
    "no outliers": (21, 64, {}, None, False),
    "none found": (21, 64, {}, 0, True),
    "all outliers in one row": (20, 50, {}, [0] * 7 + [50] + [0] * 12, True),
    "2 bit": (100, 72, TWO_BITS | {"group_size": 8, "stats_group_size": 64}, 2, True),
    "4 bit": (40, 200, FOUR_BITS | {"group_size": 128}, 2, False),
    "5 bit": (35, 70, {"bits": 5, "group_size": 32, "scale_bits": 16, "zero_bits": 2}, 2, True),
    "8 bit": (24, 70, {"bits": 8, "group_size": 70, "stats_group_size": 8}, 2, True),
}


def build(name: str) -> SpqrMatrix:
    rows, columns, settings, outliers, permuted = CASES[name]
    return random_matrix(make_spec(rows, columns, **settings), outliers, permuted=permuted)


@pytest.mark.parametrize("name", CASES)
def test_reference_decodes_as_the_oracle(name: str) -> None:
    matrix = build(name)
    assert np.array_equal(dequantize_reference(matrix), oracle.decode(matrix).weight)


@pytest.mark.parametrize("name", CASES)
def test_kernel_decodes_as_the_oracle(name: str, device: torch.device) -> None:
    matrix = build(name)
    weight = dequantize(matrix.to(device))
    assert weight.dtype == torch.float32
    assert weight.device.type == device.type
    assert weight.is_contiguous()
    assert np.array_equal(weight.cpu().numpy(), oracle.decode(matrix).weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "no outliers", "all outliers in one row"])
def test_other_dtypes_are_rounded_once(name: str, dtype: torch.dtype, device: torch.device) -> None:
    matrix = build(name).to(device)
    assert torch.equal(dequantize(matrix, dtype), dequantize(matrix).to(dtype))


def test_a_dtype_that_is_none() -> None:
    with pytest.raises(InputError, match=r"dtype is torch\.int8; it must be float32, float16"):
        dequantize(build("one weight"), torch.int8)


def test_no_kernel_for_a_device() -> None:
    with pytest.raises(InputError, match="no dequantize kernel for device meta"):
        dequantize(build("one weight").to("meta"))


def test_by_hand(device: torch.device) -> None:
    """Two rows, three columns, one group; every number in the comments."""
    spec = make_spec(2, 3, group_size=3, **TWO_BITS)
    matrix = SpqrMatrix(
        spec,
        {
            # rows hold codes (0, 1, 3) and (2, 2, 0), the first in the lowest bits
            "codes": torch.tensor([[[0b11_01_00, 0b00_10_10], [0, 0]]], dtype=torch.int32),
            # scales: codes 1 and 3 -> 0.25 * 1 + 0.5 = 0.75 and 0.25 * 3 + 0.5 = 1.25
            "scale_codes": torch.tensor([[[0b11_01, 0]]], dtype=torch.int32),
            "scale_scale": torch.tensor([[0.25]], dtype=torch.float16),
            "scale_zero": torch.tensor([[0.5]], dtype=torch.float16),
            # zeros: codes 1 and 2 -> 0.5 * 1 + 0.5 = 1 and 0.5 * 2 + 0.5 = 1.5
            "zero_codes": torch.tensor([[[0b0010_0001, 0, 0, 0]]], dtype=torch.int32),
            "zero_scale": torch.tensor([[0.5]], dtype=torch.float16),
            "zero_zero": torch.tensor([[0.5]], dtype=torch.float16),
            "outlier_row_offsets": torch.tensor([0, 0, 1], dtype=torch.int32),
            "outlier_columns": torch.tensor([2], dtype=torch.uint16),
            "outlier_values": torch.tensor([10.0], dtype=torch.float16),
            "permutation": torch.tensor([2, 0, 1], dtype=torch.uint16),
        },
    )
    # row 0, stored order: 0.75 * (0 - 1, 1 - 1, 3 - 1)   = (-0.75, 0, 1.5)
    # row 1, stored order: 1.25 * (2 - 1.5, 2 - 1.5, -1.5) = (0.625, 0.625, -1.875 + 10)
    # stored column 0 is input 2, stored column 1 is input 0, stored column 2 is input 1
    expected = torch.tensor([[0.0, 1.5, -0.75], [0.625, 8.125, 0.625]])
    assert torch.equal(dequantize(matrix.to(device)).cpu(), expected)


@pytest.mark.parametrize("smallest", [2**-24, 3 * 2**-24], ids=["smallest half", "three of them"])
def test_denormal_statistics(smallest: float, device: torch.device) -> None:
    """Halves below the normal range are numbers too: nothing may flush them to 0."""
    matrix = random_matrix(make_spec(17, 32, **FOUR_BITS), None)
    matrix["scales"].fill_(smallest)
    weight = dequantize(matrix.to(device)).cpu().numpy()
    assert np.array_equal(weight, oracle.decode(matrix).weight)
    assert np.count_nonzero(weight) == weight.size


def test_a_scale_of_zero_decodes_to_zero(device: torch.device) -> None:
    matrix = random_matrix(make_spec(17, 32, **FOUR_BITS), None)
    matrix["scales"].zero_()
    assert not dequantize(matrix.to(device)).any()
