from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import closing

import pytest
import torch
from transformers import LlamaConfig

from spqr_numba.errors import CheckpointError, ModelError, NumericsError
from spqr_numba.model.skeleton import ReadAhead, build_skeleton, load, release, stored_names

from . import architectures
from .architectures import ARCHITECTURES

CPU = torch.device("cpu")


class Memory:
    """A state dict as Weights."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loaded_skeleton_is_the_model(name: str) -> None:
    model = architectures.make(name)
    weights = Memory(model.state_dict())
    skeleton = build_skeleton(model.config, torch.float32)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    load(skeleton, stored_names(skeleton), weights, CPU, torch.float32)
    skeleton.tie_weights()
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(skeleton(tokens).logits, model.float()(tokens).logits)


def test_tied_tensors_have_one_name() -> None:
    tied, untied = architectures.make("llama"), architectures.make("mistral")
    assert "lm_head.weight" not in stored_names(tied)
    assert "lm_head.weight" in stored_names(untied)


def test_release_goes_back_to_meta() -> None:
    model = architectures.make("llama")
    names = [name for name in stored_names(model) if ".layers.0." in name]
    release(model, names)
    on_meta = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert on_meta == set(names)


def test_tensors_that_cannot_be_loaded() -> None:
    model = architectures.make("llama")
    weights = Memory(model.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    weights.tensors[name] = torch.full((96, 64), torch.inf)
    with pytest.raises(NumericsError, match=f"{name} holds NaN or inf"):
        load(model, [name], weights, CPU, torch.float32)
    weights.tensors[name] = torch.ones(3, 3)
    with pytest.raises(CheckpointError, match=rf"{name} is \[3, 3\] .* makes it\s\[96, 64\]"):
        load(model, [name], weights, CPU, torch.float32)


def test_a_config_that_makes_no_model() -> None:
    with pytest.raises(ModelError, match="cannot build a model of type llama"):
        build_skeleton(LlamaConfig(hidden_act="nope", num_hidden_layers=1), torch.float32)


class Slow(Memory):
    """Remembers in which thread it was asked for what."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.readers: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        self.readers[name] = threading.current_thread().name
        if name == "broken":
            raise CheckpointError("cannot read broken")
        return super().read(name)


def test_reading_ahead() -> None:
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(["a", "b", "broken"])}
    weights = Slow(tensors)
    with closing(ReadAhead(weights, ahead=True)) as ahead:
        ahead.expect(["b", "broken", "nowhere"])
        assert "a" in ahead
        assert "nowhere" not in ahead
        assert torch.equal(ahead.read("b"), tensors["b"])
        assert torch.equal(ahead.read("a"), tensors["a"])
        assert torch.equal(ahead.read("b"), tensors["b"])
        with pytest.raises(CheckpointError, match="cannot read broken"):
            ahead.read("broken")
    assert weights.readers["broken"].startswith("spqr-reader")
    assert weights.readers["a"] == weights.readers["b"] == threading.current_thread().name


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    weights = Slow({"a": torch.zeros(2)})
    with closing(ReadAhead(weights, ahead=False)) as ahead:
        ahead.expect(["a"])
        ahead.read("a")
    assert weights.readers["a"] == threading.current_thread().name
