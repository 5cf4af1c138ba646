"""Compiling kernels: once a machine, not once a process.

Numba keys its cache on the file of the function it compiles and not on what that function calls;
a cache that outlives a change elsewhere in the house would run old arithmetic. So the folder of the
cache is named after a digest of every source that kernels are made of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import njit

__all__ = ["compiled"]

PACKAGE = Path(__file__).parent.parent


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`njit(**options)` with a cache on disk, for functions that close over nothing compiled."""

    def decorate(function: Callable) -> Callable:
        with cache_folder() as folder:
            return njit(cache=folder is not None, **options)(function)

    return decorate


@contextmanager
def cache_folder() -> Iterator[Path | None]:
    """Numba's cache folder set to ours, and back again; None where it cannot be written."""
    folder = kernel_cache()
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or before)
    try:
        yield folder
    finally:
        numba.config.CACHE_DIR = before


@cache
def kernel_cache() -> Path | None:
    """~/.cache/spqr_numba/<digest of the sources>, made if need be."""
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    folder = Path(root or Path.home() / ".cache") / "spqr_numba" / source_digest()
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
