"""load_model, and from_pretrained on compressed folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from spqr_numba.config import SpqrConfig
from spqr_numba.errors import CheckpointError, ModelError
from spqr_numba.model.compress import compress
from spqr_numba.model.integration import load_model
from spqr_numba.nn import SpqrLinear

from ..tiny import byte_tokenizer

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def compressed(
    folder_of: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A compressed Qwen2: biases, untied embeddings. Not to be written to."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    source = str(folder_of("qwen2"))
    compress(source, out, SpqrConfig(), dataset=str(text_file), nsamples=4, seqlen=24)
    return out


@pytest.fixture
def folder(compressed: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(compressed, tmp_path / "model"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_pretrained_in_every_dtype(dtype: torch.dtype, compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=dtype)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, SpqrLinear)
    assert layer.bias.dtype == model.lm_head.weight.dtype == dtype
    stored = load_file(compressed / "model-00001-of-00003.safetensors")
    for name, buffer in layer.matrix.tensors.items():
        expected = stored[f"model.layers.0.self_attn.q_proj.{name}"]
        assert buffer.dtype == expected.dtype, name
        assert torch.equal(buffer, expected), name
    exact = logits(load_model(str(compressed))[0])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(model), exact, rtol=tolerance, atol=tolerance)


def test_load_model_takes_fp32_on_a_cpu(compressed: Path, folder_of: Callable[[str], Path]) -> None:
    for path in (compressed, folder_of("qwen2")):
        model, tokenizer = load_model(str(path))
        assert model.dtype == torch.float32
        assert not model.training
        assert tokenizer("a")["input_ids"]
    assert load_model(str(compressed), torch.bfloat16)[0].dtype == torch.bfloat16


def test_save_pretrained_writes_the_same_model(compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    saved, original = (
        {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
        for folder in (tmp_path, compressed)
    )
    assert set(saved) == set(original)
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, compressed)
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load_model(str(tmp_path))[0]), logits(load_model(str(compressed))[0]))


def test_dequantize_gives_plain_linears(compressed: Path) -> None:
    model, _ = load_model(str(compressed))
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, SpqrLinear) for module in dense.modules())
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


def test_the_model_generates(compressed: Path) -> None:
    model, tokenizer = load_model(str(compressed))
    tokens = tokenizer("2 times", return_tensors="pt")["input_ids"]
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] > tokens.shape[1]


def without(name: str) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        del tensors[name]

    return spoil


def replaced(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return spoil


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without(f"{LAYER}.codes"), r"up_proj\.codes is missing, and must be \[2, 3, 96\]"),
        (without(f"{LAYER}.permutation"), r"up_proj\.permutation is missing"),
        (without(f"{LAYER}.scale_zero"), r"up_proj\.scale_zero is missing"),
        (without(f"{LAYER}.outlier_values"), r"outlier_columns is \[\d+\], and must be \[0\]"),
        (
            replaced(f"{LAYER}.outlier_values", lambda t: torch.cat([t, t])),
            r"outlier_columns is \[\d+\], and must be \[\d+\]",
        ),
        (
            replaced(f"{LAYER}.codes", lambda t: t[:, :2]),
            r"codes is \[2, 2, 96\], and must be \[2, 3, 96\]; the checkpoint is damaged",
        ),
        (
            replaced(f"{LAYER}.permutation", torch.zeros_like),
            rf"{LAYER}: permutation must hold each of 0 \.\.\. 63 once",
        ),
        (
            replaced(f"{LAYER}.outlier_row_offsets", lambda t: t.flip(0)),
            rf"{LAYER}: outlier_row_offsets must rise",
        ),
        (
            replaced(f"{LAYER}.scale_zero", lambda t: t * torch.nan),
            rf"{LAYER}: scale_zero holds NaN or inf",
        ),
        (
            replaced(f"{LAYER}.codes", lambda t: t.to(torch.int64)),
            rf"{LAYER}: codes is torch\.int64",
        ),
        (
            without("model.layers.0.input_layernorm.weight"),
            r"is incomplete: it holds no model\.layers\.0\.input_layernorm\.weight",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    spoil: Callable[[Tensors], None], message: str, folder: Path
) -> None:
    shard = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    spoil(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder))


def test_a_shard_that_is_cut_short_is_refused(folder: Path) -> None:
    shard = folder / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a whole safetensors file"):
        load_model(str(folder))


def test_another_format_version_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format version 99, and this spqr_numba reads 1"):
        load_model(str(folder))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=257,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for act in (load_model, lambda path: compress(path, tmp_path / "out", SpqrConfig())):
        with pytest.raises(ModelError, match="BertForMaskedLM is not a causal language model"):
            act(str(tmp_path))


REGISTERED = """
import sys
import spqr_numba
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""

REFERENCE = """
import transformers.quantizers.auto as auto
import spqr_numba
from transformers import SpQRConfig
config = auto.AutoQuantizationConfig.from_dict(SpQRConfig(shapes={"a": 1}).to_dict())
quantizer = auto.AutoHfQuantizer.from_config(config, pre_quantized=True)
print(type(config).__name__, type(quantizer).__name__)
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [(REGISTERED, "SpqrLinear"), (REFERENCE, "SpQRConfig SpQRHfQuantizer")],
    ids=["before transformers", "behind transformers, a reference checkpoint"],
)
def test_importing_the_package_is_enough(program: str, expected: str, compressed: Path) -> None:
    """In a fresh interpreter: nothing heavy is imported, and the registration happens."""
    result = subprocess.run(
        [sys.executable, "-c", program, str(compressed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == expected, result.stderr
