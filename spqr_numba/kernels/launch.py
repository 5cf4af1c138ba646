"""Where torch meets Numba: views of tensors, streams, and kernels compiled once a machine.

Numba keys its cache on the file of the function it compiles and not on what that function calls;
a cache that outlives a change elsewhere in the house would run old arithmetic. So it is kept in the
folder of cache.py, which is named after a digest of every source that kernels are made of.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numba
import torch
from numba import njit

from ..errors import InputError
from .cache import Cubin, cubin_of, kernel_cache, path_of

__all__ = [
    "Kernel",
    "Launcher",
    "array_of",
    "compiled",
    "most_clusters",
    "numba_cuda",
    "prepared_launch",
    "shared_memory",
    "stream_of",
]


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`njit(**options)` with a cache on disk, for functions that close over nothing compiled."""

    def decorate(function: Callable) -> Callable:
        with cache_folder() as folder:
            return njit(cache=folder is not None, no_cfunc_wrapper=True, **options)(function)

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
def numba_cuda() -> Any:
    """The module `numba.cuda`, of the package numba-cuda; InputError where that is missing."""
    try:
        import numba_cuda  # noqa: F401 - the numba.cuda that comes with Numba itself is an old one
        from numba import cuda
        from numba.cuda.core import config
    except ImportError as error:
        raise InputError(
            "tensors on a GPU need the package numba-cuda: pip install 'spqr-numba[cuda]'"
        ) from error
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a small weight makes a small grid
    return cuda


def array_of(tensor: torch.Tensor) -> Any:
    """The Numba array over a tensor's memory: NumPy's on a CPU, a device array on a GPU.

    Costs microseconds on a CPU and tens of them on a GPU: keep it where a kernel runs often.
    """
    if tensor.device.type == "cpu":
        return tensor.numpy()
    return numba_cuda().as_cuda_array(tensor, sync=False)


def stream_of(device: torch.device) -> Any:
    """torch's current stream on a GPU, for Numba to launch on."""
    return _stream(torch.cuda.current_stream(device).cuda_stream)


@cache
def _stream(pointer: int) -> Any:
    return numba_cuda().external_stream(pointer)


def prepared_launch(
    make: partial,
    grid: int,
    block: tuple[int, int],
    device: torch.device,
    *arguments: Any,
    more: int,
) -> Callable[..., None]:
    """launch(*integers): make()'s kernel on these arguments, and `more` int64 behind them.

    On what is torch's current stream now. Numba looks at every array at every launch, and at twenty
    it looks longer than such a kernel runs; here it does so once.
    """
    from cuda.core import LaunchConfig, launch

    kernel, given = make(), (*arguments, *[0] * more)
    signature = tuple(map(kernel.typeof_pyval, given))
    ready = flattened(signature, given)
    stream = kernel[grid, block, stream_of(device)].stream
    config = LaunchConfig(grid=grid, block=block)
    _, function = loaded(make.func, make.args, signature, device)

    def launch_with(*integers: int) -> None:
        for place, integer in zip(ready[-more:], integers, strict=True):
            place.value = integer
        launch(stream, config, function, *ready)

    return launch_with


@cache
def loaded(
    factory: Callable[..., Any],
    given: tuple[Any, ...],
    signature: tuple[Any, ...],
    device: torch.device,
) -> tuple[Any, Any]:
    """The kernel that factory(*given) returns, on a GPU: its code, which must stay, and itself."""
    from cuda.core import ObjectCode

    with torch.cuda.device(device):
        cubin = Kernel(partial(factory, *given), signature, device).compiled()
        code = ObjectCode.from_cubin(cubin.code)
        return code, code.get_kernel(cubin.name)


def flattened(signature: tuple[Any, ...], given: tuple[Any, ...]) -> list[Any]:
    """What a kernel of Numba gets for arguments: of an array its address, shape and strides."""
    from numba.cuda.dispatcher import _Kernel

    ready: list[Any] = []
    kernel = SimpleNamespace(extensions=[])
    kernel._prepare_args = partial(_Kernel._prepare_args, kernel)
    for numba_type, value in zip(signature, given, strict=True):
        kernel._prepare_args(numba_type, value, 0, [], ready)
    return ready


RESERVED_BYTES = 2048  # of a block's shared memory: the driver's, and what kernels name themselves


@cache
def shared_memory(device: torch.device) -> int:
    """How many bytes of shared memory a block may ask for when it is launched."""
    from cuda.bindings import driver

    most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    return _result(driver.cuDeviceGetAttribute(most, _result(driver.cuDeviceGet(ordinal)))) - (
        RESERVED_BYTES
    )


class Kernel(NamedTuple):
    """What is compiled, with which arguments, and for which GPU."""

    make: partial
    signature: tuple[Any, ...]
    device: torch.device

    def compiled(self) -> Cubin:
        """From disk, or kept there."""
        with torch.cuda.device(self.device):
            capability = torch.cuda.get_device_capability(self.device)
            return cubin_of(self.make, self.signature, capability)

    def path(self) -> Path | None:
        """Where it is kept, or will be; None where it cannot be."""
        return path_of(self.make, self.signature, torch.cuda.get_device_capability(self.device))


class Launcher:
    """A kernel of plain numbers on one GPU, launched by its handle: a few microseconds a call.

    early: it may start before the kernel ahead of it ends, and waits for it by itself
    ("programmatic dependent launch"). ranks: how many blocks make a cluster.
    """

    def __init__(
        self,
        make: partial,
        signature: tuple[Any, ...],
        device: torch.device,
        *,
        threads: int,
        shared_bytes: int,
        early: bool,
        ranks: int = 1,
    ) -> None:
        """The kernel that make() returns, compiled when it is first launched (`cache.cubin_of`).

        signature: Numba's, of int32, int64, float32 and named tuples of them.
        """
        from cuda.bindings import driver

        self.kernel, self._shared_bytes = Kernel(make, signature, device), shared_bytes
        self._driver, self._types = driver, argument_types(signature)
        config = self._config = driver.CUlaunchConfig()
        config.gridDimX = ranks
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = threads
        config.attrs = [*early_attributes(driver, early), *cluster_attributes(driver, ranks)]
        config.numAttrs = len(config.attrs)

    @cached_property
    def _function(self) -> Any:
        """The driver's handle."""
        driver = self._driver
        with torch.cuda.device(self.kernel.device):
            cubin = self.kernel.compiled()
            library = driver.cuLibraryLoadData(cubin.code, [], [], 0, [], [], 0)
            loaded = driver.cuLibraryGetKernel(_result(library), cubin.name.encode())
            function = _result(driver.cuKernelGetFunction(_result(loaded)))
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _result(driver.cuFuncSetAttribute(function, most, self._shared_bytes))
        return function

    def clusters(self, shared_bytes: int) -> int:
        """How many clusters the GPU runs at a time."""
        self._config.sharedMemBytes = shared_bytes
        return _result(self._driver.cuOccupancyMaxActiveClusters(self._function, self._config))

    def launch(self, grid: int, shared_bytes: int, stream: int, *arguments: float) -> None:
        """Queue the kernel on a stream (its address)."""
        self._config.gridDimX = grid
        self._config.sharedMemBytes = shared_bytes
        self._config.hStream = stream
        values = arguments, self._types
        _result(self._driver.cuLaunchKernelEx(self._config, self._function, values, 0))


def early_attributes(driver: Any, early: bool) -> list[Any]:
    """Of a launch: may it start before the one ahead of it ends."""
    if not early:
        return []
    attribute = driver.CUlaunchAttribute()
    names = driver.CUlaunchAttributeID
    attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return [attribute]


def cluster_attributes(driver: Any, ranks: int) -> list[Any]:
    """Of a launch: how many blocks make a cluster."""
    if ranks == 1:
        return []
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster = attribute.value.clusterDim
    cluster.x, cluster.y, cluster.z = ranks, 1, 1
    return [attribute]


@cache
def most_clusters(device: torch.device, ranks: int, threads: int) -> int:
    """How many clusters of blocks, each alone on its multiprocessor, a GPU runs at a time."""

    room = shared_memory(device)
    launcher = Launcher(
        partial(idle_kernel),
        (),
        device,
        threads=threads,
        shared_bytes=room,
        early=False,
        ranks=ranks,
    )
    return launcher.clusters(room)


def idle_kernel() -> Any:
    """One that does nothing."""

    @numba_cuda().jit
    def idle():
        pass

    return idle


CTYPES = {"int32": "c_int32", "int64": "c_int64", "float32": "c_float"}


def argument_types(signature: tuple[Any, ...]) -> tuple[Any, ...]:
    """The ctypes of a kernel's numbers, those of a tuple one after the other."""
    kinds = [kind for argument in signature for kind in getattr(argument, "types", [argument])]
    return tuple(getattr(ctypes, CTYPES[kind.name]) for kind in kinds)


def _result(answer: tuple[Any, ...]) -> Any:
    """What the driver answered; RuntimeError where it refused."""
    if int(answer[0]):
        raise RuntimeError(f"the CUDA driver answered {answer[0].name}")
    return answer[1] if len(answer) > 1 else None
