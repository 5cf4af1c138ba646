"""A sweep's points against the model that `compress` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spqr_numba.analysis.sweep import sweep
from spqr_numba.config import SpqrConfig
from spqr_numba.evaluate.baselines import measure
from spqr_numba.model.compress import compress
from spqr_numba.model.integration import load_model

from ..tiny import save_tiny_llama


def test_points_are_those_of_compressed_models(tmp_path: Path) -> None:
    dense = str(save_tiny_llama(tmp_path / "dense", num_hidden_layers=1))
    windows = torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(0))
    configs = {"SpQR": SpqrConfig(), "RTN": SpqrConfig.rtn(4, 16), "GPTQ": SpqrConfig.gptq(3)}
    points = list(sweep(dense, configs, windows, nsamples=4))
    assert [point.name for point in points] == list(configs)
    for point, (name, config) in zip(points, configs.items(), strict=True):
        report = compress(dense, tmp_path / name, config, nsamples=4)
        stored, _ = load_model(str(tmp_path / name))
        expected = measure(stored, {"text": windows})
        assert point.bits == pytest.approx(expected.bits)
        assert point.outlier_share == pytest.approx(report.outlier_share)
        # one block: dense and compressed models calibrate alike, but for the rounding of fp16
        assert point.perplexity == pytest.approx(expected.perplexity["text"], rel=1e-3)
