"""Names, bits and bytes of a comparison's rows."""

from __future__ import annotations

import pytest
import torch

from spqr_numba.config import PRESETS, SpqrConfig
from spqr_numba.evaluate.baselines import baseline_configs, describe, is_compressed, measure

from ..tiny import tiny_llama


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SpqrConfig.rtn(3, 16), "RTN 3 bit, group 16"),
        (SpqrConfig.rtn(4), "RTN 4 bit"),
        (SpqrConfig.gptq(3), "GPTQ 3 bit"),
        (SpqrConfig.gptq(4, 128), "GPTQ 4 bit, group 128"),
        (SpqrConfig(), "SpQR 3 bit, group 16"),
        (SpqrConfig(outlier_threshold=None), "SpQR 3 bit, group 16"),
        (PRESETS["paper-4bit"], "SpQR 4 bit, group 16"),
        (SpqrConfig(overrides=(("q", {"damping": 0.5}),)), "SpQR 3 bit, group 16"),
        (SpqrConfig(overrides=(("q", {"bits": 4}),)), "SpQR by layer"),
    ],
)
def test_describe(config: SpqrConfig, name: str) -> None:
    assert describe(config) == name


def test_baselines_straddle_what_spqr_stores() -> None:
    names = ["RTN 3 bit", "RTN 3 bit, group 16", "GPTQ 3 bit", "GPTQ 4 bit"]
    assert [describe(config) for config in baseline_configs(3)] == names
    assert [describe(config) for config in baseline_configs(8)][2:] == ["GPTQ 8 bit"]


def test_a_dense_model_counts_16_bits_a_weight_and_tied_weights_once() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    row = measure(model, {"zeros": torch.zeros(1, 4, dtype=torch.int64)})
    weights = sum(
        tensor.numel() for name, tensor in model.state_dict().items() if "lm_head" not in name
    )
    assert not is_compressed(model)
    assert (row.name, row.bits, row.nbytes) == ("fp16", 16, 2 * weights)
    assert list(row.to_dict()["perplexity"]) == ["zeros"]
