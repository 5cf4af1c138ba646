"""Kernels compiled side by side: all of them, by several processes, whatever becomes of one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spqr_numba.kernels import compiling, matmul
from spqr_numba.kernels.compiling import compile_together
from spqr_numba.kernels.launch import Kernel
from spqr_numba.kernels.prepared import prepare

from .emulator import emulated
from .test_matmul import make_x
from .test_matmul_cuda import CASES, build

CPU = torch.device("cpu")


class Slow(Kernel):
    """One that takes a while, and notes which process it was."""

    def path(self) -> Path:
        return self.make.args[0]

    def compiled(self) -> Any:
        time.sleep(0.1)
        self.path().write_text(str(os.getpid()))


class Failing(Slow):
    def compiled(self) -> Any:
        raise RuntimeError("no such instruction")


class Deadly(Slow):
    def compiled(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def launchers(folder: Path, kinds: list[type[Slow]]) -> list[Any]:
    paths = [folder / f"{number}.cubin" for number in range(len(kinds))]
    made = [kind(partial(print, path), (), CPU) for kind, path in zip(kinds, paths, strict=True)]
    return [SimpleLauncher(kernel) for kernel in made]


def noting(launched: set[Any]) -> Callable[..., None]:
    def launch(launcher: Any, *_: Any) -> None:
        launched.add(launcher)

    return launch


class SimpleLauncher(SimpleNamespace):
    __hash__ = object.__hash__

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel=kernel)


@pytest.fixture(autouse=True)
def three_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "processes_for", lambda device: 3)


def test_side_by_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="spqr_numba")
    made = launchers(tmp_path, [Slow] * 8)
    compile_together(made + made)
    own = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 8
    assert 2 <= len(own) <= 3
    assert os.getpid() not in own
    told = f"8 kernels are compiled for this GPU, 3 at a time, and kept in {tmp_path}"
    assert [record.message for record in caplog.records] == [told]


def test_what_fails_is_left(tmp_path: Path) -> None:
    compile_together(launchers(tmp_path, [Slow, Failing, Slow, Deadly, Slow, Slow]))
    found = sorted(path.stem for path in tmp_path.iterdir())
    assert found == ["0", "2", "4", "5"]


@pytest.mark.parametrize("kept", [0, 2])
def test_few_are_left_to_who_launches_them(tmp_path: Path, kept: int) -> None:
    made = launchers(tmp_path, [Slow] * (compiling.LEAST - 1 + kept))
    for launcher in made[:kept]:
        launcher.kernel.path().touch()
    compile_together(made)
    assert len(list(tmp_path.iterdir())) == kept


def test_one_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "processes_for", lambda device: 1)
    compile_together(launchers(tmp_path, [Slow] * 8))
    assert not list(tmp_path.iterdir())


def test_no_room_for_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    compile_together(launchers(tmp_path, [Slow] * 8))
    assert not list(tmp_path.iterdir())


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes on behind the back of who has had enough."""

    def interrupt(running: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compile_together(launchers(tmp_path, [Slow] * 50))
    found = len(list(tmp_path.iterdir()))
    assert found < 50
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == found


@pytest.mark.parametrize("name", ["ragged", "group 32, stats 64", "no outliers"])
@pytest.mark.parametrize("count", [1, 3, 16, 40])
def test_what_is_launched_is_known_before(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of products of 1 to 16 inputs at a time, and of many."""
    weight = prepare(build(name))
    x = matmul.aligned_rows(make_x(count, weight.spec.in_features, dtype=torch.float16))
    y = torch.empty(count, weight.spec.out_features, dtype=torch.float16)
    rooms = [("matmul_cuda", "multiply_in_turns"), ("matmul_many_cuda", "multiply_many")]
    for room_name, function in rooms if count > 1 else rooms[:1]:
        with emulated("late", room_name) as room:
            launched: set[Any] = set()
            monkeypatch.setattr(room.Launcher, "launch", noting(launched))
            getattr(room, function)(x, weight, None, y)
            known = room.launchers_of(weight, torch.float16, count)
        assert launched == set(known)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_nothing_else_is_compiled(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spqr_numba.kernels import cache

    weight = prepare(build(name).to("cuda"))
    for count in (1, 8, 20, 70, 600):
        for launcher in matmul.launchers_of(weight, dtype, count):
            launcher.kernel.compiled()
    monkeypatch.setattr(cache, "_compiled", None)  # whoever compiles now, fails
    for count in (1, 8, 20, 70, 600):
        x = make_x(count, weight.spec.in_features, dtype=dtype).to("cuda")
        matmul.matmul(x, weight)
