"""transformers learns to load our checkpoints: from_pretrained(OUT) after `import spqr_numba`.

`install`, which `import spqr_numba` runs, registers the quantization method "spqr". Importing
transformers' quantizers takes seconds, so when nobody has done so yet, the registration waits until
somebody does: a finder on sys.meta_path sees that import, registers behind it, and takes itself
away. Nothing heavy is imported here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["METHOD", "install", "is_ours"]

METHOD = "spqr"
QUANTIZERS_MODULE = "transformers.quantizers.auto"


def is_ours(settings: Mapping[str, Any]) -> bool:
    """Whether a config's quantization_config is of a checkpoint of ours, not of the reference's."""
    return settings.get("quant_method") == METHOD and "format_version" in settings


def install() -> None:
    """Register with transformers, now or as soon as its quantizers are imported."""
    if QUANTIZERS_MODULE in sys.modules:
        _register(sys.modules[QUANTIZERS_MODULE])
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Lets the import of transformers' quantizers go its way, and registers behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(auto: Any) -> None:
    """Put ours into transformers' tables, in front of its own entries for the same method."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _LazyConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = _make_quantizer


class _LazyConfig:
    """Stands for the class of quantization configs, whose module imports transformers'."""

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        """The quantization config for what stands in a config.json."""
        from .quantizer import SpqrQuantizationConfig

        return SpqrQuantizationConfig.from_dict(*args, **kwargs)


def _make_quantizer(*args: Any, **kwargs: Any) -> Any:
    """The quantizer for such a config."""
    from .quantizer import make_quantizer

    return make_quantizer(*args, **kwargs)
