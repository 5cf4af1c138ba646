"""What tests of CUDA kernels share: PTX without a GPU, and Numba's simulator."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

__all__ = [
    "HOPPER",
    "NEW",
    "OLD",
    "each_capability",
    "needs_numba_cuda",
    "ptx_of",
    "run_in_simulator",
]

needs_numba_cuda = pytest.mark.skipif(
    find_spec("numba_cuda") is None, reason="needs the package numba-cuda"
)
OLD, NEW = (8, 0), (9, 0)  # compute capabilities
HOPPER = (9, 0, "a")  # with what only this generation has
each_capability = pytest.mark.parametrize("capability", [OLD, NEW], ids=["sm_80", "sm_90"])


def ptx_of(kernel: Any, signature: tuple[Any, ...], capability: tuple[Any, ...]) -> str:
    """The PTX of a kernel within its launch bounds; no float64, nothing in local memory."""
    from numba import cuda
    from numba.cuda import dispatcher

    device = SimpleNamespace(compute_capability=capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "get_current_device", lambda: device)
        bounds = kernel.targetoptions.get("launch_bounds")
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=capability, launch_bounds=bounds)
    assert ".f64" not in ptx
    assert ".local" not in ptx
    return ptx


def run_in_simulator(script: str) -> None:
    """Run Python code in a process where Numba simulates a GPU."""
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def assert_no_spills(ptx: str, capability: tuple[Any, ...], folder: Path) -> None:
    """Nor products of tensor cores that wait for each other: by the assembler's own account, where
    there is one; an older one knows these instructions."""
    assembler = shutil.which("ptxas")
    if assembler is None:
        return
    source = folder / "kernel.ptx"
    source.write_text(re.sub(r"\.version \d+\.\d+", ".version 8.6", ptx))
    target = "sm_" + "".join(str(part) for part in capability)
    command = [assembler, "-v", f"-arch={target}", str(source), "-o", str(folder / "kernel.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0 bytes spill stores, 0 bytes spill loads" in result.stderr
    assert "serialized" not in result.stderr
