"""Kernels kept on disk: compiled once, told apart, and not believed where they are damaged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.config import SpqrConfig
from spqr_numba.format.layout import MatrixSpec
from spqr_numba.kernels import cache
from spqr_numba.kernels.cache import Cubin, cubin_of
from spqr_numba.kernels.matmul import matmul
from spqr_numba.kernels.prepared import prepare

from ..gpu import needs_numba_cuda

made: list[Any] = []


class Kernel:
    """What a kernel of Numba has that counts here."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def compile(self, signature: tuple[Any, ...]) -> Any:
        made.append((self.given, signature))
        code = SimpleNamespace(code=b"\n".join([repr(self.given).encode(), bytes(range(256))]))
        library = SimpleNamespace(_entry_name="its_name", get_cubin=lambda: code)
        return SimpleNamespace(_codelibrary=library)


def kernel(*given: Any) -> Kernel:
    return Kernel(*given)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "kernel_cache", lambda: tmp_path)
    cache._tell_once.cache_clear()
    made.clear()
    return tmp_path


@needs_numba_cuda
def test_a_kernel_is_compiled_once(folder: Path) -> None:
    first = cubin_of(partial(kernel, 3, torch.float16), ("int32",), (9, 0))
    assert first == Cubin("its_name", b"(3, torch.float16)\n" + bytes(range(256)))
    assert cubin_of(partial(kernel, 3, torch.float16), ("int32",), (9, 0)) == first
    assert made == [((3, torch.float16), ("int32",))]
    assert len(list(folder.iterdir())) == 1


@needs_numba_cuda
def test_another_is_another(folder: Path) -> None:
    cubin_of(partial(kernel, 3), ("int32",), (9, 0))
    cubin_of(partial(kernel, 4), ("int32",), (9, 0))
    cubin_of(partial(kernel, 3), ("int64",), (9, 0))
    cubin_of(partial(kernel, 3), ("int32",), (8, 0))
    cubin_of(partial(Kernel, 3), ("int32",), (9, 0))
    assert len(made) == len(list(folder.iterdir())) == 5
    with pytest.raises(ValueError, match="no name that outlives this process"):
        cubin_of(partial(kernel, object()), ("int32",), (9, 0))


@needs_numba_cuda
def test_who_waits_is_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="spqr_numba")
    for number in (3, 4, 3):
        cubin_of(partial(kernel, number), ("int32",), (9, 0))
    told = f"kernels are compiled for this GPU, some seconds each, and kept in {folder}"
    assert [record.message for record in caplog.records] == [told]


@needs_numba_cuda
def test_other_compilers_compile_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubin_of(partial(kernel, 3), ("int32",), (9, 0))
    monkeypatch.setattr(cache, "_compilers", lambda: ("0.68.1", "13.6"))
    cubin_of(partial(kernel, 3), ("int32",), (9, 0))
    assert len(made) == len(list(folder.iterdir())) == 2


@needs_numba_cuda
def test_sources_edited_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "source_digest", lambda: "another")
    cubin_of(partial(kernel, 3), ("int32",), (9, 0))
    assert made
    assert not list(folder.iterdir())


@needs_numba_cuda
@pytest.mark.parametrize("kept", [b"", b"no line", b"digest\nname\ncode"])
def test_what_is_damaged_is_compiled_anew(folder: Path, kept: bytes) -> None:
    whole = cubin_of(partial(kernel, 3), ("int32",), (9, 0))
    (path,) = folder.iterdir()
    text = path.read_bytes()
    for damaged in (kept, text[:-1], text[:80] + b"x" + text[81:]):
        path.write_bytes(damaged)
        assert cubin_of(partial(kernel, 3), ("int32",), (9, 0)) == whole
        assert path.read_bytes() == text
    assert len(made) == 4


@needs_numba_cuda
def test_without_a_folder_to_write_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (lambda: None, lambda: folder / "nowhere"):
        monkeypatch.setattr(cache, "kernel_cache", place)
        assert cubin_of(partial(kernel, 3), ("int32",), (9, 0)).name == "its_name"
    assert len(made) == 2
    assert not list(folder.iterdir())


@needs_numba_cuda
def test_a_disk_that_fills_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: Path, kept: bytes) -> None:
        with place.open("wb") as file:
            file.write(kept[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cubin_of(partial(kernel, 3), ("int32",), (9, 0)).name == "its_name"
    assert not list(folder.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [1, 8, 100])
def test_a_kept_kernel_multiplies_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch, inputs: int
) -> None:
    from spqr_numba.kernels import matmul_cuda, matmul_many_cuda

    def forget() -> None:
        for room in (matmul_cuda, matmul_many_cuda):
            for function in vars(room).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()

    weight = prepare(random_matrix(MatrixSpec.from_config(SpqrConfig(), 208, 480), 20).to("cuda"))
    x = torch.randn(inputs, 480, device="cuda", dtype=torch.float16)
    forget()
    first = matmul(x, weight)
    assert list(folder.iterdir())
    forget()
    monkeypatch.setattr(cache, "_compiled", None)  # whoever compiles now, fails
    assert torch.equal(matmul(x, weight), first)
    forget()
