"""Kernels that are not on disk yet (cache.py), compiled side by side before they are needed.

One takes seconds, of one processor; a model of many settings may need dozens before its first
answer. Each process of

    python -m spqr_numba.kernels.compiling

is asked for one kernel after the other, as pickles of `launch.Kernel` on its stdin; it compiles
them, which puts them on disk, and answers each with a byte. What fails there is left for the
process that launches it, which says why.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

from .launch import Kernel, Launcher

__all__ = ["compile_together"]

LEAST = 4  # kernels for which it pays to start processes: one needs as long as some kernels take
MOST_PROCESSES = 8  # each has some hundred megabytes
GPU_BYTES = 2**30  # of a process, for what the driver keeps there
SECONDS = 600  # a process that has not answered for so long never will
DONE = b"+"

logger = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


def compile_together(launchers: Iterable[Launcher]) -> None:
    """Put a GPU's kernels on disk that are not there, if they are so many that processes pay."""
    with _one_at_a_time:  # others may need the same
        kernels = [launcher.kernel for launcher in dict.fromkeys(launchers)]
        paths = [(kernel.path(), kernel) for kernel in kernels]
        missing = {path: kernel for path, kernel in paths if path and not path.exists()}
        if len(missing) < LEAST:
            return
        path, kernel = next(iter(missing.items()))
        count = min(len(missing), processes_for(kernel.device))
        if count < 2:
            return
        told = "%d kernels are compiled for this GPU, %d at a time, and kept in %s"
        logger.info(told, len(missing), count, path.parent)
        compile_by_processes(count, deque(missing.values()))
        left = [path for path in missing if not path.exists()]
        if left:
            logger.debug("%d of them were not", len(left))


def compile_by_processes(count: int, waiting: deque[Kernel]) -> None:
    """Have so many processes compile what waits; what they have not in SECONDS is left."""
    with ThreadPoolExecutor(count) as pool, ExitStack() as running:
        processes = []
        for _ in range(count):
            with suppress(OSError):  # no room for one more
                processes.append(running.enter_context(compiler()))
        wait([pool.submit(feed, process, waiting) for process in processes], SECONDS)


def processes_for(device: torch.device) -> int:
    """As many as torch has threads, and the GPU memory; none where there is no interpreter."""
    if not sys.executable or getattr(sys, "frozen", False):
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return min(MOST_PROCESSES, torch.get_num_threads(), free // GPU_BYTES)


@contextmanager
def compiler() -> Iterator[subprocess.Popen]:
    """A process, which does not outlive the block."""
    path = [folder or str(Path.cwd()) for folder in sys.path if isinstance(folder, str)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        bufsize=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def feed(process: subprocess.Popen, waiting: deque[Kernel]) -> None:
    """Have a process compile what waits, one after the other, until nothing does or it is gone."""
    assert process.stdin is not None
    assert process.stdout is not None
    while waiting:
        try:
            process.stdin.write(pickle.dumps(waiting.popleft()))
        except (IndexError, OSError):  # another thread was faster; the process is gone
            return
        if process.stdout.read(1) != DONE:
            return


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """What a process does."""
    while True:
        try:
            kernel = pickle.load(requests)
        except EOFError:
            return
        with suppress(Exception):  # it comes again where somebody sees it
            kernel.compiled()
        answers.write(DONE)
        answers.flush()


if __name__ == "__main__":
    own_answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where others may print
    serve(sys.stdin.buffer, own_answers)
