"""Where a model comes from: a folder, a hub name, a .gguf file, or the one that is bundled.

A Source knows config and tokenizer and reads one tensor at a time; nothing is kept in memory, no
code of a checkpoint is run and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError
from .skeleton import Weights

__all__ = ["FolderSource", "Source", "open_source", "opened"]

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
COMPANIONS = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "chat_template*",
    GENERATION_FILE,
    "merges.txt",
    "special_tokens_map.json",
)
"""What goes with the weights, by glob pattern; copied as it is."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Source(Protocol):
    """A model to read: what `open_source` returns.

    label    what to call it in messages
    """

    label: str

    @property
    def config(self) -> Any:
        """The transformers config."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the weights or the config do."""
        ...

    def tokenizer(self) -> Any:
        """The transformers tokenizer. Raises CheckpointError where there is none."""
        ...

    def weights(self, model: nn.Module) -> Weights:
        """The tensors under the names that `model` has for them."""
        ...

    def write_companions(self, folder: Path) -> None:
        """Put tokenizer and generation config into `folder`."""
        ...


def open_source(model: str | Source | None) -> Source:
    """The Source that `model` names: a folder, a .gguf file, a hub name, or None for the bundled.

    A Source is itself: to read config and tokenizer once for several uses, which takes seconds for
    a .gguf file.

    Raises CheckpointError where there is no readable model.
    """
    if model is None:
        from ..demo import MODEL_PATH

        return FolderSource(MODEL_PATH, "the bundled model")
    if not isinstance(model, str):
        return model
    path = Path(model).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return _open_file(path)
    if HUB_NAME.fullmatch(model) and not model.endswith(".gguf"):
        return FolderSource(_download(model), model)
    raise CheckpointError(f"there is no model folder or .gguf file at {model}")


def _open_file(path: Path) -> Source:
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path} is a file; a model is a folder with config.json and .safetensors, or a .gguf"
        )
    from .gguf import GgufSource

    return GgufSource(path)


def _download(name: str) -> Path:
    """The folder of a hub model, downloaded unless it is cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"there is no folder {name!r} here, and the Hugging Face hub gave no model of that name"
            f" ({type(error).__name__}: {reason})"
        ) from error


class FolderSource:
    """A folder of config.json, .safetensors (one or sharded) and a tokenizer."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        """Raises CheckpointError where `path` is not such a folder."""
        self.path = path
        self.label = label or str(path)
        if not path.exists():
            raise CheckpointError(f"there is no folder {path}")
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f"{path} is not a model folder: it holds no {CONFIG_FILE}")
        self._files = _tensor_files(path)

    @cached_property
    def config(self) -> Any:
        """The transformers config. Raises CheckpointError where it cannot be read."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"cannot read {self.path / CONFIG_FILE}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the config and of every weight file's header, size and time of change."""
        digest = sha256((self.path / CONFIG_FILE).read_bytes())
        for file in sorted(set(self._files.values())):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
            digest.update(_header(file))
        return digest.hexdigest()

    def tokenizer(self) -> Any:
        """The transformers tokenizer. Raises CheckpointError where there is none."""
        from transformers import AutoTokenizer

        if not any((self.path / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{self.path} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the"
                " tokenizer files of the original model there"
            )
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(f"cannot read the tokenizer in {self.path}: {error}") from error

    def weights(self, model: nn.Module) -> Weights:
        """The tensors under the names that `model` has for them."""
        return FolderWeights(self._files, model_names(model, self._files))

    def write_companions(self, folder: Path) -> None:
        """Copy tokenizer files and generation config into `folder`."""
        for pattern in COMPANIONS:
            for path in self.path.glob(pattern):
                copy = (
                    partial(shutil.copytree, dirs_exist_ok=True)
                    if path.is_dir()
                    else shutil.copyfile
                )
                copy(path, folder / path.name)
        if not (folder / GENERATION_FILE).is_file():
            write_generation_config(self.config, folder)


def write_generation_config(config: Any, folder: Path) -> None:
    """Write generation_config.json with what a model's config says about generation."""
    from transformers import GenerationConfig

    GenerationConfig.from_model_config(config).save_pretrained(folder)


class FolderWeights:
    """The tensors of safetensors files, under the names of a model."""

    def __init__(self, files: Mapping[str, Path], stored_names: Mapping[str, str]) -> None:
        self._files = files
        self._stored_names = stored_names

    def __contains__(self, name: str) -> bool:
        return name in self._stored_names

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in its stored dtype, on the CPU. Raises CheckpointError."""
        if name not in self._stored_names:
            raise CheckpointError(f"the checkpoint holds no tensor for {name}; it is incomplete")
        stored_name = self._stored_names[name]
        path = self._files[stored_name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored_name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {stored_name} from {path}: {error}") from error


def model_names(model: Any, stored: Mapping[str, object]) -> dict[str, str]:
    """Name in `model` -> name in the checkpoint, by the renamings that from_pretrained applies.

    Tensors that from_pretrained would convert, not just rename (merged experts), are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    names = {}
    for stored_name in stored:
        name, converted = rename_source_key(
            stored_name, renamings, converters, model.base_model_prefix, expected
        )
        if converted is None:
            names[name] = stored_name
        if stored_name in expected:
            names[stored_name] = stored_name
    for tied, original in model.all_tied_weights_keys.items():
        if original not in names and tied in names:
            names[original] = names[tied]
    return names


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every stored tensor -> its file. Raises CheckpointError where there are none."""
    if (folder / INDEX_FILE).is_file():
        return _indexed_files(folder)
    if (folder / SINGLE_FILE).is_file():
        return dict.fromkeys(_names_in(folder / SINGLE_FILE), folder / SINGLE_FILE)
    if any(path for pattern in UNSAFE_WEIGHTS for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} holds pickled weights (.bin or .pt), which can run code when read; convert"
            " them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes"
            " .safetensors"
        )
    raise CheckpointError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _indexed_files(folder: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {folder / INDEX_FILE}: {error}") from error
    files = {name: folder / Path(file).name for name, file in weight_map.items()}
    missing = sorted({path.name for path in files.values() if not path.is_file()})
    if missing:
        raise CheckpointError(f"{folder} is incomplete: {missing[0]} is missing")
    return files


def _names_in(path: Path) -> Iterator[str]:
    with opened(path) as file:
        yield from file.keys()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises CheckpointError where it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _header(path: Path) -> bytes:
    """The JSON header of a safetensors file: an 8-byte length, then the header."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
