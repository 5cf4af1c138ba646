"""Codes to words and back, outliers to CSR and back: exactly, and as layout.py draws it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spqr_numba.errors import FormatError
from spqr_numba.format.packing import (
    csr_to_outliers,
    outliers_to_csr,
    pack_codes,
    pack_statistics,
    unpack_codes,
    unpack_statistics,
)

from .. import oracle


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(2, 8))
    shape = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    return draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


@given(codes_and_bits())
def test_codes_survive(codes_bits: tuple[np.ndarray, int]) -> None:
    codes, bits = codes_bits
    words = pack_codes(torch.from_numpy(codes), bits)
    assert words.dtype == torch.int32
    assert words.shape == (-(-len(codes) // 32), bits, codes.shape[1])
    unpacked = unpack_codes(words, bits, len(codes))
    assert unpacked.dtype == torch.uint8
    assert np.array_equal(unpacked.numpy(), codes)


@given(codes_and_bits())
def test_words_are_those_of_the_diagram(codes_bits: tuple[np.ndarray, int]) -> None:
    codes, bits = codes_bits
    words = pack_codes(torch.from_numpy(codes), bits).numpy()
    assert np.array_equal(words, oracle.write_codes(codes, bits))
    assert np.array_equal(oracle.read_codes(words, len(codes)), codes)


@given(codes_and_bits())
def test_statistics_take_turns_by_group(codes_bits: tuple[np.ndarray, int]) -> None:
    codes, bits = codes_bits  # [m, groups]
    words = pack_statistics(torch.from_numpy(codes).T, bits)
    assert words.is_contiguous()
    assert np.array_equal(words.numpy(), oracle.write_statistics(codes, bits))
    assert np.array_equal(unpack_statistics(words, bits, len(codes)).numpy(), codes.T)


def test_statistics_by_hand() -> None:
    # Two groups, three rows, 4 bits: a nibble a row from the lowest up, group after group.
    words = pack_statistics(torch.tensor([[1, 2, 3], [15, 0, 7]], dtype=torch.uint8), 4)
    assert words.tolist() == [[literal(0x321, 0, 0, 0)], [literal(0x70F, 0, 0, 0)]]


def literal(*words: int) -> list[int]:
    """Unsigned words as int32 stores them."""
    return np.array(words, np.uint32).view(np.int32).tolist()


def test_three_bits_by_hand() -> None:
    # q_k = k mod 8, in octal from q_31 down to q_0: 76543210 four times, and 0o76543210 = 0xFAC688
    codes = torch.arange(32, dtype=torch.uint8).remainder(8)[:, None]
    words = pack_codes(codes, 3)
    assert words.flatten().tolist() == literal(0x88FAC688, 0xC688FAC6, 0xFAC688FA)


def test_two_bits_ragged_by_hand() -> None:
    # Column 0: codes 1, 2, 3 are bits 01, 10, 11 from the lowest up. Column 1: 3, 0, 1.
    codes = torch.tensor([[1, 3], [2, 0], [3, 1]], dtype=torch.uint8)
    words = pack_codes(codes, 2)
    assert words.tolist() == [[literal(0b11_10_01, 0b01_00_11), literal(0, 0)]]


def test_five_bits_across_words_by_hand() -> None:
    # Only q_6 = 0b10011, at bits 30 to 34: 11 ends word 0, 100 starts word 1.
    codes = torch.zeros(33, 1, dtype=torch.uint8)
    codes[6], codes[32] = 0b10011, 1
    words = pack_codes(codes, 5)[..., 0]
    assert words.tolist() == [literal(0b11 << 30, 0b100, 0, 0, 0), literal(1, 0, 0, 0, 0)]


def test_eight_bits_are_bytes() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[:, None]
    assert pack_codes(codes, 8).flatten().numpy().tobytes() == bytes(range(32))


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_code_too_large(bits: int) -> None:
    codes = torch.tensor([[0], [2**bits]], dtype=torch.uint8)
    with pytest.raises(FormatError, match=f"code {2**bits} does not fit into {bits} bits"):
        pack_codes(codes, bits)


def test_outliers_by_hand() -> None:
    outliers = torch.zeros(4, 5, dtype=torch.float16)
    outliers[0, 4], outliers[2, 0], outliers[2, 3] = 0.5, -2, 7
    csr = outliers_to_csr(outliers)
    assert csr["outlier_row_offsets"].tolist() == [0, 1, 1, 3, 3]
    assert csr["outlier_columns"].tolist() == [4, 0, 3]
    assert csr["outlier_values"].tolist() == [0.5, -2, 7]
    assert csr["outlier_row_offsets"].dtype == torch.int32
    assert csr["outlier_columns"].dtype == torch.uint16
    assert torch.equal(csr_to_outliers(csr, 5), outliers)


@given(
    arrays(
        np.float16,
        st.tuples(st.integers(1, 9), st.integers(1, 40)),
        elements=st.sampled_from([0, 0, 0, 1, -0.25, 6e-8, 65504]),
    )
)
def test_outliers_survive(values: np.ndarray) -> None:
    outliers = torch.from_numpy(values)
    csr = outliers_to_csr(outliers)
    assert csr["outlier_values"].numel() == np.count_nonzero(values)
    assert torch.equal(csr_to_outliers(csr, values.shape[1]), outliers)


def test_wide_outliers() -> None:
    outliers = torch.zeros(1, 65537, dtype=torch.float16)
    outliers[0, 65536] = 1
    csr = outliers_to_csr(outliers)
    assert csr["outlier_columns"].dtype == torch.int32
    assert csr["outlier_columns"].tolist() == [65536]
    assert torch.equal(csr_to_outliers(csr, 65537), outliers)
