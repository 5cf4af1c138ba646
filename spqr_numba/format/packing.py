"""Codes to words and back, outliers to CSR and back: layout.py's diagram, in a few lines."""

from __future__ import annotations

import torch

from ..errors import FormatError
from .layout import CODES_PER_CHUNK, ceil_div, index_dtype

__all__ = [
    "csr_to_outliers",
    "outliers_to_csr",
    "pack_codes",
    "pack_statistics",
    "unpack_codes",
    "unpack_statistics",
]

WORD_BITS = 32


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes 32 at a time along their first axis, on the device where they are.

    codes [count, width] uint8, each below 2^bits -> words [ceil(count/32), bits, width] int32.
    Raises FormatError for a code that does not fit.
    """
    if codes.numel() and (largest := int(codes.max())) >> bits:
        raise FormatError(f"code {largest} does not fit into {bits} bits")
    count, width = codes.shape
    chunks = ceil_div(count, CODES_PER_CHUNK)
    words = torch.zeros(chunks, bits, width, dtype=torch.int32, device=codes.device)
    whole, rest = count // CODES_PER_CHUNK, count % CODES_PER_CHUNK
    pack_chunks(codes[: count - rest].view(whole, CODES_PER_CHUNK, width), bits, words[:whole])
    if rest:
        pack_chunks(codes[count - rest :].unsqueeze(0), bits, words[whole:])
    return words


def pack_chunks(codes: torch.Tensor, bits: int, words: torch.Tensor) -> None:
    """Fill words [chunks, bits, width] from codes [chunks, 32 or fewer, width]."""
    starts = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) * bits
    for word in range(bits):
        first, last = word * WORD_BITS // bits, ceil_div((word + 1) * WORD_BITS, bits)
        shifts = starts[first:last, None] - word * WORD_BITS  # below 0 where a code began before
        here = codes[:, first:last].to(torch.int32) >> (-shifts).clamp_(min=0)
        torch.sum(here << shifts.clamp_(min=0), dim=1, dtype=torch.int32, out=words[:, word])


def unpack_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_codes`: words [chunks, bits, width] int32 -> [count, width] uint8."""
    chunks, _, width = words.shape
    codes = torch.empty((chunks, CODES_PER_CHUNK, width), dtype=torch.uint8, device=words.device)
    for k, word, shift in code_positions(bits):
        lane = words[:, word] >> shift
        if shift + bits > WORD_BITS:
            lane = lane & (1 << WORD_BITS - shift) - 1 | words[:, word + 1] << WORD_BITS - shift
        codes[:, k] = lane & (1 << bits) - 1
    return codes.view(-1, width)[:count]


def pack_statistics(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack scale or zero codes: [groups, m] uint8 -> words [groups, ceil(m/32), bits] int32."""
    return pack_codes(codes.T, bits).permute(2, 0, 1).contiguous()


def unpack_statistics(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """The inverse of `pack_statistics`: [groups, ceil(m/32), bits] int32 -> [groups, m] uint8."""
    return unpack_codes(words.permute(1, 2, 0), bits, rows).T


def code_positions(bits: int) -> list[tuple[int, int, int]]:
    """(k, word, shift) of the 32 codes of a chunk: code k starts at bit `shift` of `word`."""
    return [(k, *divmod(k * bits, WORD_BITS)) for k in range(CODES_PER_CHUNK)]


def outliers_to_csr(outliers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compress outliers [out_features, in_features] fp16 (0 where there is none) to CSR buffers."""
    rows, columns = outliers.nonzero(as_tuple=True)
    offsets = torch.zeros(outliers.shape[0] + 1, dtype=torch.int64, device=outliers.device)
    offsets[1:] = torch.bincount(rows, minlength=outliers.shape[0]).cumsum(0)
    return {
        "outlier_row_offsets": offsets.to(torch.int32),
        "outlier_columns": columns.to(index_dtype(outliers.shape[1])),
        "outlier_values": outliers[rows, columns],
    }


def csr_to_outliers(csr: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
    """The inverse of `outliers_to_csr`: CSR buffers -> [out_features, in_features] fp16."""
    offsets = csr["outlier_row_offsets"].to(torch.int64)
    outliers = torch.zeros(len(offsets) - 1, in_features, dtype=torch.float16)
    rows = torch.repeat_interleave(torch.arange(len(outliers)), offsets.diff())
    outliers[rows, csr["outlier_columns"].to(torch.int64)] = csr["outlier_values"]
    return outliers
