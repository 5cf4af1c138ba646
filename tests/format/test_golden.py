"""The golden files: what was written by any version of the format decodes as it did then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from spqr_numba.format.layout import FORMAT_VERSION, MatrixSpec
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.format.packing import pack_codes, unpack_codes
from spqr_numba.kernels.dequantize import dequantize

from .. import oracle
from ..golden import make_golden

FILES = sorted(make_golden.FOLDER.glob("format-*.safetensors"))
GOLDEN = dict[str, tuple[SpqrMatrix, torch.Tensor]]


def read(path: Path) -> GOLDEN:
    """Name -> the matrix and the weight that it stands for."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    golden = {}
    for name, settings in json.loads(metadata["specs"]).items():
        buffers = {k.split(".")[1]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        weight = buffers.pop("weight")
        golden[name] = SpqrMatrix(MatrixSpec(**settings), buffers), weight
    return golden


def test_this_version_has_one() -> None:
    assert make_golden.FOLDER / f"format-{FORMAT_VERSION}.safetensors" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_weights(path: Path, device: torch.device) -> None:
    for matrix, weight in read(path).values():
        matrix.check_values()
        assert torch.equal(dequantize(matrix.to(device)).cpu(), weight)
        assert np.array_equal(oracle.decode(matrix).weight, weight.numpy())


def test_golden_words() -> None:
    """Packing gives the words of the file; they were packed without it."""
    for matrix, _ in read(make_golden.FOLDER / f"format-{FORMAT_VERSION}.safetensors").values():
        spec = matrix.spec
        codes = make_golden.codes(spec.in_features, spec.out_features, spec.bits)
        packed = pack_codes(torch.from_numpy(codes.astype(np.uint8)), spec.bits)
        assert torch.equal(packed, matrix["codes"])
        unpacked = unpack_codes(matrix["codes"], spec.bits, spec.in_features)
        assert np.array_equal(unpacked.numpy(), codes)


def test_a_word_of_the_golden_file() -> None:
    """One written out, should everything else change together: codes (7 k) mod 8, k = 0 ... 9."""
    matrix, _ = read(make_golden.FOLDER / "format-1.safetensors")["paper"]
    assert int(matrix["codes"][0, 0, 0]) & 0x3FFFFFFF == 0o7012345670
