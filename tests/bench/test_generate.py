"""The generation bench: random models that run, and rows that say what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spqr_numba.bench.generate import build, bytes_on_disk, measure
from spqr_numba.bench.random_model import model_config, random_model, random_weight
from spqr_numba.config import SpqrConfig
from spqr_numba.errors import CheckpointError, ConfigError
from spqr_numba.format.layout import MatrixSpec
from spqr_numba.model.blocks import find_blocks
from spqr_numba.model.compress import compress
from spqr_numba.nn import SpqrLinear

from ..test_generate import tiny_family
from ..tiny import save_tiny_llama, tiny_llama

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale_bits", [3, 16])
@pytest.mark.parametrize("outliers", [0, 0.05])
def test_a_random_weight_is_a_weight(bits: int, scale_bits: int, outliers: float) -> None:
    spec = MatrixSpec(96, 64, bits, 16, 16, scale_bits, scale_bits)
    matrix = random_weight(spec, outliers, CPU)
    matrix.check_values()
    assert matrix.outlier_share == pytest.approx(outliers, abs=0.01)
    weight = SpqrLinear(matrix).dequantize()
    assert 0.01 < weight.std() < 0.04
    assert abs(weight.mean()) < 0.01


@pytest.mark.parametrize("config", [SpqrConfig(), None], ids=["spqr", "dense"])
def test_a_random_model_runs(config: SpqrConfig | None) -> None:
    model = random_model(tiny_llama().config, config, CPU, torch.float32)
    compressed = [module for module in model.modules() if isinstance(module, SpqrLinear)]
    assert len(compressed) == (14 if config else 0)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    if config:
        addresses = {layer.codes.data_ptr() for layer in compressed}
        assert len(addresses) == len(compressed)


@pytest.mark.parametrize("family", ["llama", "opt", "falcon", "gemma2"])
def test_linears_of_one_input_have_one_order(family: str) -> None:
    settings = tiny_llama().config if family == "llama" else tiny_family(family).config
    model = random_model(settings, SpqrConfig(), CPU, torch.float32)
    orders: dict[bytes, list[str]] = {}
    for name, layer in find_blocks(model).modules[1].named_modules():
        if isinstance(layer, SpqrLinear):
            order = layer.permutation.numpy().tobytes()
            orders.setdefault(order, []).append(name.split(".")[-1])
    found = sorted(sorted(names) for names in orders.values() if len(names) > 1)
    assert (
        found
        == {
            "llama": [["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"]],
            "opt": [["k_proj", "q_proj", "v_proj"]],
            "falcon": [["dense_h_to_4h", "query_key_value"]],
            "gemma2": [["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"]],
        }[family]
    )


def test_the_shape_of_a_model() -> None:
    config = model_config("llama2-70b")
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (
        80,
        8192,
        8,
    )


def test_what_lies_at_a_path_is_loaded(tmp_path: Path) -> None:
    dense, out = save_tiny_llama(tmp_path / "dense"), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(600))), encoding="utf-8")
    compress(str(dense), out, SpqrConfig(bits=4), dataset=str(text), nsamples=2, seqlen=16)
    for path, config, bits in [
        (dense, None, None),
        (out, SpqrConfig(), 4),
        (dense, SpqrConfig(), 3),
    ]:
        linear = build(str(path), config, CPU, 0.01).model.layers[0].mlp.up_proj
        assert (linear.spec.bits if bits else None) == bits
    assert not isinstance(build(str(out), None, CPU, 0.01).model.layers[0].mlp.up_proj, SpqrLinear)
    tensors = [path.stat().st_size for path in out.glob("*.safetensors")]
    loaded = bytes_on_disk(build(str(out), SpqrConfig(), CPU, 0.01))
    assert 0.5 * sum(tensors) < loaded
    with pytest.raises(CheckpointError, match="there is no model"):
        build(str(tmp_path / "nowhere" / "at" / "all"), None, CPU, 0.01)


def test_rows_are_what_was_asked_for(tmp_path: Path) -> None:
    dense = save_tiny_llama(tmp_path / "dense")
    rows = measure(shape=str(dense), prompt_tokens=8, new_tokens=16)
    assert [(row["model"], row["engine"]) for row in rows] == [
        ("spqr", "eager"),
        ("dense", "eager"),
    ]
    assert rows[1]["x dense"] == 1
    assert all(row["tokens/s"] > 0 and row["GB / on disk"] == 1 for row in rows)
    [row] = measure(shape=str(dense), prompt_tokens=8, new_tokens=16, dense=False)
    assert row["x dense"] is None


def test_too_short_a_text() -> None:
    with pytest.raises(ConfigError, match="a text of 3 tokens are too short"):
        measure(new_tokens=3)
