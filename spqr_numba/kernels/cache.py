"""Compiled kernels on disk: a machine compiles each once, and not each process anew.

~/.cache/spqr_numba/<digest of the sources>/ holds what Numba keeps of the CPU's functions, and

    <digest>.cubin    one kernel of a GPU: a line with the SHA-256 of what follows, a line with
                      the kernel's name in it, and the code, as the driver loads it

whose digest is of all that the code depends on but the sources: who made the kernel and of what,
its arguments' types, the GPU's generation, and the compilers, their versions and options. Numba's
own cache cannot keep kernels that close over device functions, as all of ours do.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Cubin", "cubin_of", "kernel_cache", "path_of"]

PACKAGE = Path(__file__).parent.parent
COMPILERS = (
    "numba",
    "llvmlite",
    "numba-cuda",
    "cuda-core",
    "cuda-bindings",
    "nvidia-nvvm",
    "nvidia-nvjitlink",
    "nvidia-cuda-nvrtc",
)
MARK = b"\n"

logger = logging.getLogger(__name__)


@cache
def kernel_cache() -> Path | None:
    """~/.cache/spqr_numba/<digest of the sources>, made if need be; None where it cannot be."""
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    folder = Path(root or Path.home() / ".cache") / "spqr_numba" / first_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def source_digest() -> str:
    """A digest of all sources that compiled code can depend on."""
    digest = hashlib.sha256()
    for source in sorted([*PACKAGE.glob("kernels/*.py"), *PACKAGE.glob("format/*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def first_digest() -> str:
    """That of the sources as this process found them."""
    return source_digest()


class Cubin(NamedTuple):
    """A kernel as a GPU runs it."""

    name: str
    code: bytes


def cubin_of(make: partial, signature: tuple[Any, ...], capability: tuple[int, int]) -> Cubin:
    """The kernel that make() returns, compiled for GPUs of a generation: from disk, or kept there.

    make        a function of a module with its arguments, of which the kernel is all
    signature   Numba's types of the kernel's own arguments
    """
    path = path_of(make, signature, capability)
    if path is None:
        _tell_once("and there is no folder to keep them in")
        return _compiled(make, signature)
    found = _read(path)
    if found is None:
        _tell_once(f"and kept in {path.parent}")
        found = _compiled(make, signature)
        if source_digest() == first_digest():  # else the sources are edited while this runs
            _write(path, found)
    return found


def path_of(make: partial, signature: tuple[Any, ...], capability: tuple[int, int]) -> Path | None:
    """Where `cubin_of` keeps it; None where it cannot."""
    folder = kernel_cache()
    return None if folder is None else folder / f"{_key(make, signature, capability)}.cubin"


def _key(make: partial, signature: tuple[Any, ...], capability: tuple[int, int]) -> str:
    """Raises ValueError where `make` has an argument that only this process tells apart."""
    parts = (
        make.func.__module__,
        make.func.__qualname__,
        make.args,
        sorted(make.keywords.items()),
        [str(argument) for argument in signature],
        capability,
        _compilers(),
    )
    text = repr(parts)
    if re.search(r" at 0x[0-9a-f]+>", text):
        raise ValueError(f"{text} has no name that outlives this process")
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def _compilers() -> tuple[str | None, ...]:
    """Their versions, None where one is not a package here, and Numba's options."""
    from numba.cuda.core import config

    options = (config.OPT, config.CUDA_DEBUGINFO_DEFAULT, config.FORCE_CUDA_CC)
    return (*map(_version, COMPILERS), *map(str, options))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _tell_once(what_then: str) -> None:
    logger.info("kernels are compiled for this GPU, some seconds each, %s", what_then)


def _compiled(make: partial, signature: tuple[Any, ...]) -> Cubin:
    library = make().compile(signature)._codelibrary
    return Cubin(library._entry_name, bytes(library.get_cubin().code))


def _read(path: Path) -> Cubin | None:
    """What `_write` wrote; None where that is not, or not whole."""
    try:
        digest, kept = path.read_bytes().split(MARK, 1)
    except (OSError, ValueError):
        return None
    if hashlib.sha256(kept).hexdigest().encode() != digest:
        return None
    name, code = kept.split(MARK, 1)
    return Cubin(name.decode(), code)


def _write(path: Path, cubin: Cubin) -> None:
    """At once or not at all; a disk that is full is no reason to stop."""
    kept = cubin.name.encode() + MARK + cubin.code
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        beside.write_bytes(hashlib.sha256(kept).hexdigest().encode() + MARK + kept)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
