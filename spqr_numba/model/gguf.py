"""A .gguf file as a Source: config, tokenizer and dequantized weights, by transformers' own tables.

from_pretrained(gguf_file=...) would dequantize the whole model into memory at once, and wants
accelerate; here one tensor is dequantized at a time. Weights become fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CheckpointError
from .skeleton import Weights
from .source import write_generation_config

__all__ = ["GgufSource"]

DTYPE = torch.float16
HASHED_BYTES = 1 << 20


class GgufSource:
    """A .gguf file of any architecture that transformers can dequantize."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the package gguf is missing or `path` is no gguf file."""
        self.path = path
        self.label = str(path)
        self._weights: GgufWeights | None = None
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise CheckpointError(
                f"reading {path} needs the package gguf: pip install 'spqr-numba[gguf]'"
            ) from error
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is not a gguf file (it does not begin with GGUF)")

    @cached_property
    def config(self) -> Any:
        """The transformers config. Raises CheckpointError for an unknown architecture."""
        from transformers import AutoConfig

        config = self._from_file(AutoConfig)
        config.dtype = DTYPE
        return config

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the file's beginning, its size and time of change."""
        status = self.path.stat()
        with self.path.open("rb") as file:
            digest = sha256(file.read(HASHED_BYTES))
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self._from_file(AutoTokenizer)

    def tokenizer(self) -> Any:
        """The transformers tokenizer. Raises CheckpointError where there is none."""
        return self._tokenizer

    def weights(self, model: nn.Module) -> Weights:
        """The tensors under the names that `model`, one of this config, has for them."""
        if self._weights is None:  # finding the names takes seconds
            self._weights = GgufWeights(self.path, model)
        return self._weights

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer into `folder`, and what the config says about generation."""
        self.tokenizer().save_pretrained(folder)
        write_generation_config(self.config, folder)

    def _from_file(self, auto_class: Any) -> Any:
        try:
            return auto_class.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise CheckpointError(
                f"cannot read {self.path}; is it whole, and of a model that transformers knows?"
                f" ({error})"
            ) from error


class GgufWeights:
    """The tensors of a .gguf file, dequantized when read, under the names of a model."""

    def __init__(self, path: Path, model: Any) -> None:
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._path = path
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        processor_class: Callable = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = processor_class(config=model.config.to_dict())
        names = get_gguf_hf_weights_map(model, self._processor)
        self._tensors = {names[t.name]: t for t in reader.tensors if t.name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as fp16, on the CPU. Raises CheckpointError where there is none."""
        from gguf import dequantize

        if name not in self._tensors:
            raise CheckpointError(f"{self._path} holds no tensor for {name}")
        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        # Undoes what the conversion to gguf did to the values (the row order of q and k in Llama).
        values = self._processor.process(values, tensor.name).weights
        return torch.from_numpy(np.array(values, dtype=np.float16))
