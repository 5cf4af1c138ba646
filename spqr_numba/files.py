"""Files that are never seen half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["check_writable", "sync", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], object], wait: bool = False) -> None:
    """write(a path beside it), then rename; with `wait`, not before it is on the disk.

    What could not be written whole is not left there either. It may be read as other new files are,
    whatever `write` says.
    """
    temporary = _beside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        if wait:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Raise OSError where `write_whole` could not begin with a path."""
    temporary = _beside(path)
    temporary.touch()
    temporary.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
