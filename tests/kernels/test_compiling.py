"""Kernels compiled side by side: all of them, by several processes, whatever becomes of one."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.kernels import compiling, matmul
from spqr_numba.kernels.compiling import compile_together
from spqr_numba.kernels.feed import NORM, Feed, matmul_fed
from spqr_numba.kernels.launch import Kernel, Launcher
from spqr_numba.kernels.prepared import prepare

from ..gpu import needs_numba_cuda
from ..problems import make_spec
from .emulator import emulated
from .test_matmul import make_x
from .test_matmul_cuda import CASES, build

CPU = torch.device("cpu")
ENDLESS_SECONDS = 60


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


class Endless(Slow):
    def compiled(self) -> Any:
        time.sleep(ENDLESS_SECONDS)


def launchers(folder: Path, kinds: list[type[Slow]]) -> list[Any]:
    paths = [folder / f"{number}.cubin" for number in range(len(kinds))]
    made = [kind(partial(print, path), (), CPU) for kind, path in zip(kinds, paths, strict=True)]
    return [SimpleLauncher(kernel) for kernel in made]


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
    """Nobody waits for a process then."""

    def interrupt(running: Any, seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "wait", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compile_together(launchers(tmp_path, [Endless] * 8))
    assert time.monotonic() - started < ENDLESS_SECONDS / 2


def test_a_process_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SECONDS", 0.5)
    started = time.monotonic()
    compile_together(launchers(tmp_path, [Endless] * 8))
    assert time.monotonic() - started < ENDLESS_SECONDS / 2


def test_what_lies_about_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what is on the path without being a folder's name."""
    (tmp_path / "numba.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    folder = tmp_path / "kept"
    folder.mkdir()
    compile_together(launchers(folder, [Slow] * 4))
    assert len(list(folder.iterdir())) == 4


@needs_numba_cuda
def test_a_kernel_travels() -> None:
    from spqr_numba.kernels.product_cuda import SIGNATURE, product_kernel
    from spqr_numba.kernels.stream_cuda import KernelSpec
    from spqr_numba.kernels.unit_cuda import UnitSpec

    spec = KernelSpec(UnitSpec(3, 3, 16), torch.bfloat16, 16, 2, early=True, feed=NORM)
    make, signature, device = pickle.loads(
        pickle.dumps(Kernel(partial(product_kernel, spec), SIGNATURE, torch.device("cuda:1")))
    )
    assert make.func is product_kernel
    assert make.args == (spec,)
    assert signature == SIGNATURE
    assert device == torch.device("cuda:1")


# --- What is launched is known before


def noted(monkeypatch: pytest.MonkeyPatch, launcher: type, *, go_on: bool) -> set[Any]:
    """The launchers that are launched from now on; go_on: as before."""
    launched, launch = set(), launcher.launch

    def note(launcher: Any, *given: Any) -> None:
        launched.add(launcher)
        if go_on:
            launch(launcher, *given)

    monkeypatch.setattr(launcher, "launch", note)
    return launched


@pytest.mark.parametrize("name", ["ragged", "group 32, stats 64", "no outliers", "many units"])
@pytest.mark.parametrize("count", [1, 3, 16, 40])
def test_products(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 to 16 inputs at a time."""
    weight = prepare(build(name))
    x = matmul.aligned_rows(make_x(count, weight.spec.in_features, dtype=torch.float16))
    y = torch.empty(count, weight.spec.out_features, dtype=torch.float16)
    with emulated("late", "matmul_cuda") as room:
        launched = noted(monkeypatch, room.Launcher, go_on=False)
        room.multiply_in_turns(x, weight, None, y)
        assert launched == set(room.launchers_of(weight, torch.float16, count))


@pytest.mark.parametrize("splits", [1, 2])
def test_products_with_many(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = prepare(build("many units"))
    x = matmul.aligned_rows(make_x(40, weight.spec.in_features, dtype=torch.float16))
    y = torch.empty(40, weight.spec.out_features, dtype=torch.float16)
    with emulated("late", "matmul_many_cuda") as room:
        launched = noted(monkeypatch, room.Launcher, go_on=False)
        room.division_of = lambda spec, count, device: (32, splits)
        room.multiply_many(x, weight, None, y)
        assert launched == set(room.launchers_of(weight, torch.float16, 40))
        assert len(launched) == (2 if splits == 1 else 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1104, 90])
@pytest.mark.parametrize("permuted", [True, False])
def test_products_with_the_whole_weight(
    dtype: torch.dtype, columns: int, permuted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = prepare(random_matrix(make_spec(20, columns), 3, permuted=permuted))
    x = make_x(60, columns, dtype=dtype)
    with emulated("late", "prepared_cuda") as room:
        launched = noted(monkeypatch, room.Launcher, go_on=False)
        room.dequantize_stored(weight, dtype)
        room.stored_inputs(x, weight)
        assert launched == set(room.launchers_of(weight, dtype, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_products_on_a_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = prepare(build(name).to("cuda"))
    launched = noted(monkeypatch, Launcher, go_on=True)
    for count in (1, 8, 20, 70, 600):
        known = set(matmul.launchers_of(weight, dtype, count))
        launched.clear()
        matmul.matmul(make_x(count, weight.spec.in_features, dtype=dtype).to("cuda"), weight)
        assert launched <= known
        if weight.spec.in_features % 8 == 0:
            assert launched == known


@pytest.mark.gpu
@pytest.mark.parametrize("eps", [1e-5, None])
def test_fed_products_on_a_gpu(eps: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = prepare(random_matrix(make_spec(40, 1040), 3).to("cuda"))
    x, beside = make_x(2, 1040, dtype=torch.float16).to("cuda")
    launched = noted(monkeypatch, Launcher, go_on=True)
    feed = Feed(beside, eps)
    matmul_fed(x, feed, weight)
    assert launched == set(matmul.launchers_of(weight, torch.float16, 1, feed.kind))
