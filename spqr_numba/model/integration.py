"""Dense or compressed, from a folder, a hub name or a .gguf file: a model that runs."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CheckpointError, SpqrError
from .blocks import check_causal
from .registration import install
from .skeleton import build_skeleton, load, stored_names
from .source import FolderSource, Source, open_source

__all__ = ["load_model"]

MAX_NAMED = 3


def load_model(
    model: str | Source | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a dense or compressed model, as `open_source` finds it.

    dtype None is fp32 on a CPU and what config.json says elsewhere. Raises CheckpointError where
    the checkpoint cannot be read or is incomplete, ModelError where it is no causal LM.
    """
    source = open_source(model)
    check_causal(source.config)
    tokenizer = source.tokenizer()
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else source.config.dtype
    if isinstance(source, FolderSource):
        loaded = _from_folder(source, dtype)
    else:
        loaded = _from_source(source, dtype)
    return loaded.to(device).eval(), tokenizer


def _from_folder(source: FolderSource, dtype: torch.dtype) -> Any:
    """The model of a folder, by from_pretrained; nothing may be missing."""
    from transformers import AutoModelForCausalLM

    install()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, output_loading_info=True
        )
    except SpqrError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {source.label}: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{source.label} is incomplete: it holds no {', '.join(missing[:MAX_NAMED])}"
            f" ({len(missing)} tensors are missing)"
        )
    return model


def _from_source(source: Source, dtype: torch.dtype) -> Any:
    """The model of any source, tensor by tensor."""
    model: Any = build_skeleton(source.config, dtype)
    load(model, stored_names(model), source.weights(model), torch.device("cpu"), dtype)
    model.tie_weights()
    return model
