"""A GPU made of threads and NumPy, which runs the product's kernels where there is none.

A kernel's Python is run as it stands, by as many threads as a block has: greenlets, of which one
runs until it has to wait, and then another that may go on, by lot. What PTX would do is here in
NumPy: the lanes of a warp meet where they execute something together, and one of them does it on
arrays of 32. Shared memory is as large as was asked for, and full of NaN at first. Copies ahead
arrive, and products of tensor cores happen, at either end of what a GPU may do: at once ("early"),
or not until they are waited for ("late"). And watched, a block finds where warps meet in its shared
memory though no barrier has put them in order.
"""

from __future__ import annotations

import ctypes
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from greenlet import greenlet

__all__ = ["emulated"]

PACKAGE = "spqr_numba.kernels."
KERNELS = (
    "stream_cuda",
    "ring_cuda",
    "feed_cuda",
    "staging_cuda",
    "run_cuda",
    "run_several_cuda",
    "several_inputs_cuda",
    "product_cuda",
    "several_cuda",
    "prepared_cuda",
    "matmul_cuda",
    "patch_cuda",
    "many_tile_cuda",
    "many_results_cuda",
    "many_cuda",
    "matmul_many_cuda",
)  # that `jit` sees
SHARED_BYTES = 227 * 1024 - 2048  # of an H100
MULTIPROCESSORS = CLUSTERS = 1
RANK_STEP = 2**20  # from a block's shared memory to that of the next one of the cluster
LANES, WARPS = 32, 32  # of a warp, and at the most of a block
WARPGROUP = 128
LOAD_BYTES = 16
BARRIER_BYTES = 8
WORD, FLOAT, HALF = np.uint32, np.float32, np.float16
WATCHED = False  # whether blocks have a Watch


class Thread(greenlet):
    """One of a block's threads: its block, warp, copies, and barriers that it passed."""

    block: Block
    number: int
    warp: Meeting
    warpgroup: Meeting
    copies: list[list[Callable[[], None]]]
    passed: int
    arrived: int
    waited: int
    published: int
    seen: dict[int, int]


here: Thread  # the running one


@contextmanager
def emulated(
    arrival: str, room: str = "matmul_cuda", major: int = 9, *, watched: bool = False
) -> Iterator[ModuleType]:
    """A room, imported anew for this GPU; `arrival` of copies is "early" or "late", `major` the
    first part of its compute capability. Watched it is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "WATCHED", watched)
        for other, replaced in replacements(late=arrival == "late").items():
            module = importlib.import_module(PACKAGE + other)
            for name, value in replaced.items():
                patch.setattr(module, name, value)
        properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, major=major)
        patch.setattr("torch.cuda.get_device_properties", lambda device: properties)
        stream = SimpleNamespace(cuda_stream=0)
        patch.setattr("torch.cuda.current_stream", lambda device: stream)
        for other in KERNELS:
            patch.delitem(sys.modules, PACKAGE + other, raising=False)
        yield importlib.import_module(PACKAGE + room)
        for other in KERNELS:
            sys.modules.pop(PACKAGE + other, None)


def replacements(*, late: bool) -> dict[str, dict[str, Any]]:
    """Names, by room, that stand for a GPU or write its instructions."""
    nothing = dict.fromkeys(
        ("prefetch", "wait_for_dependencies", "let_dependents_start"), lambda *_: None
    )
    constants = {"i32": lambda value: WORD(value & 0xFFFFFFFF), "i64": np.int64, "f32": FLOAT}
    words_and_floats = {name: constants[name] for name in ("i32", "f32")}
    return {
        "launch": {
            "numba_cuda": lambda: Cuda,
            "Launcher": Launcher,
            "most_clusters": lambda device, ranks, threads: CLUSTERS,
            "shared_memory": lambda device: SHARED_BYTES,
        },
        "ptx": nothing
        | {
            "shared_address": lambda array: np.int32(0),
            "anew": lambda number: number,
            "load_int32": lambda address: read(address, ctypes.c_int32, np.int32),
            "load_uint16": lambda address: read(address, ctypes.c_uint16, np.uint16),
            "load_word": lambda address: read(address, ctypes.c_int32, np.int32),
            "load_float": lambda address: read(address, ctypes.c_float, FLOAT),
            "load_words": load_words,
            "shared_int32": partial(shared, np.int32),
            "shared_float": partial(shared, FLOAT),
            "shared_uint16": partial(shared, np.uint16),
            "to_shared_int32": partial(to_shared, np.int32),
            "to_shared_load": to_shared_load,
            "to_shared_uint16": partial(to_shared, np.uint16),
            "to_shared_float": partial(to_shared, FLOAT),
            "clear_shared": lambda address: to_shared(np.uint64, address, 0),
            "pair_rounder": pair_rounder,
            "pair_multiplier": pair_multiplier,
            "exp2": lambda number: FLOAT(np.exp2(number)),
            "reciprocal": lambda number: FLOAT(1 / number),
            "inverse_root": lambda number: FLOAT(1 / np.sqrt(number)),
            "divide": lambda one, other: np.int32(one // other),
            "divider": lambda by: lambda one: np.int32(one // by),
            "store_uint16": partial(write, ctypes.c_uint16, int),
            "store_float": partial(write, ctypes.c_float, float),
            "word_gatherer": word_gatherer,
            "of_rank": lambda address, rank: np.int32((rank + 1) * RANK_STEP + address),
            "four_floats": four_floats,
            "to_cluster_int32": partial(to_shared, np.int32),
            "to_cluster_load": to_shared_load,
            "send_floats": partial(send_floats, late),
            "pair_loader": pair_loader,
            "halves_taker": halves_taker,
            "arrive_in_cluster": lambda: arrive_in_cluster(published=False),
            "publish_in_cluster": lambda: arrive_in_cluster(published=True),
            "wait_for_cluster": wait_for_cluster,
            "copier": partial(copier, late),
            "copy_word": partial(copy_ahead, late, 4),
            "end_of_copies": lambda: here.copies.append([]),
            "copies_done": copies_done,
        },
        "scalars": {
            "half_to_float": lambda bits: FLOAT(np.uint16(bits).view(HALF)),
            "float_to_half": lambda value: HALF(value).view(np.uint16),
            "bfloat_to_float": lambda bits: WORD(int(bits) << 16).view(FLOAT),
            "float_to_bfloat": float_to_bfloat,
            "decoded_statistic": decoded_statistic,
            "weight_of": lambda code, scale, zero: FLOAT(scale * FLOAT(code - zero)),
            "power_of_two": lambda exponent: FLOAT(2.0 ** int(exponent)),
        },
        "unit_cuda": words_and_floats
        | {
            "unit_multiplier": unit_multiplier,
            "group_summer": group_summer,
            "add_to_shared": add_to_shared,
            "put_floats": put_floats,
        },
        "outlier_cuda": {
            "i32": constants["i32"],
            "add_entry": add_entry,
            "entries_adder": entries_adder,
        },
        "outlier_several_cuda": {
            "i32": constants["i32"],
            "entries_multiplier": entries_multiplier,
        },
        "unit_numbers_cuda": constants
        | {
            "part_writer": part_writer,
        },
        "strip_cuda": {
            "i32": constants["i32"],
            "strip_multiplier": partial(strip_multiplier, late),
        },
        "wgmma_cuda": {
            "i32": constants["i32"],
            "products_done": products_done,
            "sums_writer": sums_writer,
        },
        "bulk_cuda": {
            "make_barrier": make_barrier,
            "forget_barrier": lambda address: here.block.barriers.pop(int(address)),
            "let_copy_engine_overwrite": lambda: None,
            "let_copy_engine_see": lambda: None,
            "arrive": lambda address: here.block.barriers[int(address)].arrive(),
            "expect_bytes": lambda at, count: here.block.barriers[int(at)].expect(int(count)),
            "bulk_copy": partial(bulk_copy, late),
            "wait_for_phase": wait_for_phase,
            "wait_for_cluster_phase": wait_for_phase,
        },
        "unit_several_cuda": words_and_floats | {"pair_summer": pair_summer},
        "codes_cuda": {"i32": constants["i32"]},
    }


# --- Blocks, threads, and what they do together


class Barrier:
    """Where some threads wait for each other; the last to come does something before they go on."""

    def __init__(self, threads: int, act: Callable[[], None] = lambda: None) -> None:
        self.threads, self.act = threads, act
        self.waiting: list[Thread] = []

    def wait(self) -> None:
        """Until all have come."""
        self.waiting.append(here)
        if len(self.waiting) == self.threads:
            self.act()
            let_run(self.waiting)
        let_others_run()


READY: list[Thread] = []  # may go on


def let_run(waiting: list[Thread]) -> None:
    """Threads that wait may go on; nobody waits then."""
    READY.extend(waiting)
    waiting.clear()


def let_others_run() -> None:
    """Until somebody lets this thread run."""
    assert here.parent is not None
    here.parent.switch()


def run_all(threads: list[Thread]) -> None:
    """To their end. Raises what a thread raises, or AssertionError where all that are left wait."""
    global here
    lot = random.Random(len(threads))
    READY[:] = threads
    while READY:
        chosen = lot.randrange(len(READY))
        READY[chosen], READY[-1] = READY[-1], READY[chosen]
        here = READY.pop()
        here.switch()
    left = [thread.number for thread in threads if not thread.dead]
    assert not left, f"threads {left} wait for what never comes"


class Cluster:
    """Blocks that run together, and where all their threads wait for each other."""

    def __init__(self, indices: range, grid: int, threads: int, shared_bytes: int) -> None:
        self.barrier = Barrier(len(indices) * threads)
        self.published: dict[int, bool] = {}  # whether the arrival makes known what was written
        self.blocks = [Block(index, grid, threads, shared_bytes) for index in indices]
        for block in self.blocks:
            block.cluster = self


class Block:
    """A running block: its shared memory, and where its threads wait for each other."""

    cluster: Cluster

    def __init__(self, index: int, grid: int, threads: int, shared_bytes: int) -> None:
        self.index, self.grid = index, grid
        self.memory = np.full(shared_bytes, 0xFF, np.uint8)
        self.arrays: dict[Any, np.ndarray] = {}
        self.barriers: dict[int, Phases] = {}
        self.barrier = Barrier(threads)
        self.watch = Watch(shared_bytes) if WATCHED else None
        self.warps = [Meeting(LANES) for _ in range(threads // LANES)]
        self.warpgroups = [Meeting(WARPGROUP) for _ in range(0, threads, WARPGROUP)]


class Meeting:
    """Where the threads of a warp, or of a warpgroup, meet."""

    def __init__(self, threads: int) -> None:
        self.barrier = Barrier(threads, self.act)
        self.given: list[Any] = [None] * threads
        self.function: Callable[[list[Any]], Any] = list
        self.results: Any = None
        self.pending: list[Callable[[], None]] = []  # products of a warpgroup

    def together(self, function: Callable[[list[Any]], Any], given: Any = None) -> Any:
        """What `function` of all threads' arguments has for this one."""
        own = here.number % len(self.given)
        self.given[own], self.function = given, function
        self.barrier.wait()
        return self.results[own]

    def act(self) -> None:
        """What the last to come does before all go on."""
        self.results = self.function(list(self.given))


class Watch:
    """Of each two bytes of a block's shared memory, which warp wrote and, since then, which read
    last, and how many barriers of its block it had passed then, and at how many of the cluster it
    had arrived; of those that were sent, in which phase of which barrier of bulk_cuda."""

    MANY, SENT = -2, -3

    def __init__(self, size: int) -> None:
        self.last = {
            written: np.full((3, size // 2), -1, np.int64) for written in (False, True)
        }  # [warp, passed, arrived]; [SENT, phase, barrier]

    def note(self, places: np.ndarray, *, written: bool, sent: tuple[int, int] = (0, 0)) -> None:
        """The running thread's warp is there: what others wrote must lie behind a barrier that made
        it known, and where it writes, what they read behind any. sent: phase and barrier."""
        own, unread = warp_number(), self.last[False][0, places] == -1
        for before in (False, True) if written else (True,):
            warp, passed, arrived = self.last[before][:, places]
            known = self.known(warp, passed, arrived, published=before)
            if written and before:
                known |= ~unread  # behind them
            unordered = (warp != -1) & (warp != own) & ~known
            if unordered.any():
                verbs = {False: "reads", True: "writes"}
                raise AssertionError(
                    f"warp {own} {verbs[written]} what warp {warp[unordered][0]} {verbs[before]},"
                    f" at {2 * places[unordered][0]}, in no order"
                )
        last = self.last[written]
        if not written:
            warp, passed, arrived = last[:, places]
            known = self.known(warp, passed, arrived, published=False)
            own = np.where((warp == -1) | (warp == own) | known, own, self.MANY)
        else:
            self.last[False][0, places] = -1
        last[0, places], last[1, places], last[2, places] = own, here.passed, here.arrived
        if sent[1]:
            last[0, places], last[1, places], last[2, places] = self.SENT, *sent

    def known(
        self, warp: np.ndarray, passed: np.ndarray, arrived: np.ndarray, *, published: bool
    ) -> np.ndarray:
        """Whether a barrier lies between what a warp did then and what the running thread does."""
        of_block = (warp // WARPS == warp_number() // WARPS) | (warp == self.MANY)
        behind = here.published if published else here.waited
        known = (warp >= self.MANY) & (of_block & (passed < here.passed) | (arrived < behind))
        for barrier in np.unique(arrived[warp == self.SENT]):
            seen = here.seen.get(int(barrier), 0)
            known |= (warp == self.SENT) & (arrived == barrier) & (passed < seen)
        return known


def warp_number() -> int:
    """Of the running thread's warp, among all of its cluster."""
    block = here.block
    return block.cluster.blocks.index(block) * WARPS + here.number // LANES


def note(
    address: Any, size: int, *, written: bool, block: Block | None = None, **sent: tuple[int, int]
) -> None:
    """Some lanes read or write `size` bytes each, in a block that may be watched."""
    watch = (block or here.block).watch
    if watch is not None:
        starts = np.asarray(address, np.int64).reshape(-1, 1) // 2
        watch.note((starts + np.arange(size // 2)).ravel(), written=written, **sent)


def arrive_in_cluster(*, published: bool) -> None:
    """ptx.publish_in_cluster, or arrive_in_cluster, which makes nothing known to others."""
    here.arrived += 1
    assert here.block.cluster.published.setdefault(here.arrived, published) == published


def wait_for_cluster() -> None:
    """ptx.wait_for_cluster."""
    cluster = here.block.cluster
    cluster.barrier.wait()
    here.waited += 1
    if cluster.published[here.waited]:
        here.published = here.waited


class Launcher:
    """launch.Launcher: runs a kernel, cluster by cluster."""

    def __init__(self, make, signature, device, *, threads, shared_bytes, early, ranks=1):
        self.kernel, self.threads, self.signature, self.ranks = make(), threads, signature, ranks
        assert shared_bytes <= SHARED_BYTES

    def launch(self, grid: int, shared_bytes: int, stream: int, *numbers: int) -> None:
        """All clusters, one after the other; the first error of a thread is raised."""
        rest, arguments = iter(numbers), []
        for argument in self.signature:
            kinds = getattr(argument, "types", [argument])
            values = [getattr(np, kind.name)(next(rest)) for kind in kinds]
            arguments.append(argument.instance_class(*values) if len(values) > 1 else values[0])
        assert not list(rest)
        assert grid % self.ranks == 0
        for first in range(0, grid, self.ranks):
            indices = range(first, first + self.ranks)
            self.run_cluster(Cluster(indices, grid, self.threads, shared_bytes), arguments)

    def run_cluster(self, cluster: Cluster, arguments: list[Any]) -> None:
        """Raises what a thread raised."""
        run_all(
            [
                self.thread_of(block, number, arguments)
                for block in cluster.blocks
                for number in range(self.threads)
            ]
        )

    def thread_of(self, block: Block, number: int, arguments: list[Any]) -> Thread:
        """One thread, that has yet to begin."""

        def run() -> None:
            with np.errstate(all="ignore"):
                self.kernel(*arguments)

        thread = Thread(run)
        thread.block, thread.number = block, number
        thread.warp, thread.copies = block.warps[number // LANES], [[]]
        thread.warpgroup = block.warpgroups[number // WARPGROUP]
        thread.passed = thread.arrived = thread.waited = thread.published = 0
        thread.seen = {}
        return thread


class Cuda:
    """The module numba.cuda, as far as kernels use it."""

    class Index:
        """threadIdx, blockIdx, gridDim: `x` by name."""

        def __init__(self, value: Callable[[], int]) -> None:
            self.value = value

        @property
        def x(self) -> int:
            """Along the one axis that there is."""
            return self.value()

    threadIdx = Index(lambda: here.number)  # noqa: N815 - numba's name
    blockIdx = Index(lambda: here.block.index)  # noqa: N815
    gridDim = Index(lambda: here.block.grid)  # noqa: N815

    @staticmethod
    def jit(**options: Any) -> Callable:
        """Leave a function as it is."""
        return lambda function: function

    @staticmethod
    def syncthreads() -> None:
        """Wait for the block."""
        here.block.barrier.wait()
        here.passed += 1

    @staticmethod
    def syncwarp() -> None:
        """Wait for the warp."""
        here.warp.together(list)

    @staticmethod
    def shfl_xor_sync(lanes: int, value: Any, distance: int) -> Any:
        """The value of the lane whose number differs in these bits."""
        return here.warp.together(lambda all_: [all_[i ^ distance] for i in range(LANES)], value)

    @staticmethod
    def shfl_sync(lanes: int, value: Any, lane: int) -> Any:
        """The value of one lane."""
        return here.warp.together(lambda all_: [all_[lane]] * LANES, value)

    class shared:  # noqa: N801 - numba's name
        """Shared memory."""

        @staticmethod
        def array(shape: int, dtype: Any) -> np.ndarray:
            """The block's whole memory where shape is 0; else an array of its own."""
            if shape == 0:
                memory = here.block.memory
                return memory[: len(memory) // 8 * 8].view(dtype)
            return here.block.arrays.setdefault((shape, dtype), np.zeros(shape, dtype))


# --- Memory


def read(address: int, kind: Any, dtype: Any) -> Any:
    """A number at an address."""
    return dtype(kind.from_address(int(address)).value)


def load_words(address: int) -> tuple[Any, ...]:
    """Four int32."""
    assert int(address) % LOAD_BYTES == 0
    return tuple(read(address + 4 * i, ctypes.c_int32, np.int32) for i in range(4))


def pair_rounder(kind: str) -> Callable[[Any, Any], Any]:
    """ptx.pair_rounder."""
    rounded = float_to_bfloat if kind == "bf16" else lambda value: HALF(value).view(np.uint16)
    return lambda low, high: np.array([rounded(low), rounded(high)], np.uint16).view(np.int32)[0]


def pair_multiplier(kind: str) -> Callable[[Any, Any], Any]:
    """ptx.pair_multiplier."""
    rounded_pair = pair_rounder(kind)

    def numbers(word: Any) -> np.ndarray:
        halves = np.array([word], np.int32).view(np.uint16)
        if kind == "bf16":
            return (halves.astype(WORD) << 16).view(FLOAT)
        return halves.view(HALF).astype(FLOAT)

    return lambda one, other: rounded_pair(*(numbers(one) * numbers(other)))


def pair_loader(rows: int) -> Callable[..., Any]:
    """ptx.pair_loader."""

    def load(x: Any, step: Any, count: Any, column: Any) -> tuple[Any, ...]:
        firsts = [x + min(row, int(count) - 1) * step for row in range(rows)]
        return tuple(read(first + 2 * int(column), ctypes.c_int32, np.int32) for first in firsts)

    return load


def halves_taker(half: int) -> Callable[[Any], Any]:
    """ptx.halves_taker."""

    def take(words: Any) -> tuple[Any, ...]:
        halves = np.array(words, np.int32).view(np.uint16)[half::2]
        return tuple(halves.copy().view(np.int32))

    return take


def word_gatherer(*distances: int) -> Callable[[Any, Any], None]:
    """ptx.word_gatherer."""

    def gather(address: int, source: Any) -> None:
        assert int(address) % LOAD_BYTES == 0
        for i, distance in enumerate(distances):
            word = shared(np.uint32, source + distance)
            write(ctypes.c_uint32, int, int(address) + 4 * i, word)

    return gather


def shared(dtype: Any, address: Any) -> Any:
    """A number in shared memory."""
    block, place, size = place_in_shared(dtype, address)
    note(place, size, written=False, block=block)
    return block.memory[place : place + size].view(dtype)[0]


def four_floats(address: Any) -> tuple[Any, ...]:
    """Four float32 in shared memory."""
    assert address % LOAD_BYTES == 0
    return tuple(shared(FLOAT, address + 4 * i) for i in range(4))


def to_shared(dtype: Any, address: Any, value: Any) -> None:
    """A number to shared memory; who writes what is there already does no harm to others."""
    block, place, size = place_in_shared(dtype, address)
    new = np.empty(1, dtype)
    new[0] = value
    there = block.memory[place : place + size]
    if (there != new.view(np.uint8)).any():
        note(place, size, written=True, block=block)
    there[:] = new.view(np.uint8)


def to_shared_load(address: Any, *words: Any) -> None:
    """Four words to shared memory."""
    assert address % LOAD_BYTES == 0
    for i, word in enumerate(words):
        to_shared(np.int32, address + 4 * i, word)


def send_floats(late: bool, address: Any, *given: Any) -> None:
    """ptx.send_floats: now, or when the barrier is waited for."""
    *values, barrier = given
    block, place, _ = place_in_shared(FLOAT, address)
    rank, barrier_place = divmod(int(barrier), RANK_STEP)
    assert place % LOAD_BYTES == 0
    assert block is here.block.cluster.blocks[rank - 1]
    phases = block.barriers[barrier_place]

    def happen() -> None:
        sent = phases.passed, barrier_place
        note(place, LOAD_BYTES, written=True, block=block, sent=sent)
        block.memory[place : place + LOAD_BYTES] = np.array(values, FLOAT).view(np.uint8)
        phases.receive(LOAD_BYTES)

    phases.have(happen, late=late)


def place_in_shared(dtype: Any, address: Any) -> tuple[Block, int, int]:
    """In which block it lies, where in its memory, and how many bytes; in another one where
    `of_rank` says."""
    rank, place = divmod(int(address), RANK_STEP)
    block = here.block.cluster.blocks[rank - 1] if rank else here.block
    size = np.dtype(dtype).itemsize
    assert place % size == 0
    assert 0 <= place <= len(block.memory) - size
    assert place // BARRIER_BYTES * BARRIER_BYTES not in block.barriers  # nothing else lies there
    return block, place, size


def write(kind: Any, number: Any, address: int, value: Any) -> None:
    """A number to an address."""
    kind.from_address(int(address)).value = number(value)


def copier(late: bool, *distances: int) -> Callable[[Any, Any], None]:
    """ptx.copier."""

    def copy_loads(to: Any, source: Any) -> None:
        for distance in distances:
            copy_ahead(late, LOAD_BYTES, to + distance, source + distance)

    return copy_loads


def copy_ahead(late: bool, size: int, to: Any, source: Any) -> None:
    """Some bytes to shared memory: now, or when their group is waited for."""
    assert to % size == source % size == 0
    memory = here.block.memory
    assert 0 <= to <= len(memory) - size
    assert_no_barrier(to, size)

    def copy() -> None:
        note(to, size, written=True)
        ctypes.memmove(memory.ctypes.data + int(to), int(source), size)

    here.copies[-1].append(copy)
    if not late:
        done(here.copies[-1:])


def copies_done(groups: int) -> Callable[[], None]:
    """wait(): all groups but the latest `groups` are there."""
    return lambda: done(here.copies[: len(here.copies) - 1 - groups])


def done(groups: list[list[Callable[[], None]]]) -> None:
    """Copy what these groups hold."""
    for group in groups:
        for copy in group:
            copy()
        group.clear()


def float_to_bfloat(value: Any) -> Any:
    """bf16 bits, half to even; NaN stays one."""
    bits = int(FLOAT(value).view(WORD))
    if np.isnan(value):
        return np.uint16(bits >> 16 | 0x40)
    return np.uint16(bits + 0x7FFF + (bits >> 16 & 1) >> 16)


def decoded_statistic(code: Any, step: Any, base: Any) -> Any:
    """scalars.decoded_statistic."""
    return FLOAT(HALF(FLOAT(np.float64(code) * step + base)))


# --- The copy engine


class Phases:
    """A barrier in shared memory: passes when all have arrived and all bytes are there."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.parity = self.passed = 0
        self.copies: list[Callable[[], None]] = []  # that are late
        self.waiting: list[Thread] = []

    def arrive(self, expected: int = 0) -> None:
        """One thread, which lets the barrier wait for so many bytes."""
        self.bytes += expected
        self.missing -= 1
        assert self.missing >= 0
        self.pass_if_complete()

    expect = arrive

    def receive(self, count: int) -> None:
        """Bytes that have arrived."""
        self.bytes -= count
        self.pass_if_complete()

    def pass_if_complete(self) -> None:
        """To the next phase."""
        if self.missing == self.bytes == 0:
            self.missing, self.parity = self.count, 1 - self.parity
            self.passed += 1
            let_run(self.waiting)

    def have(self, copy: Callable[[], None], *, late: bool) -> None:
        """A copy, of which the barrier will be told."""
        if late:
            self.copies.append(copy)
            let_run(self.waiting)
        else:
            copy()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity has passed; by then late copies must be there."""
        while self.parity == parity:
            while self.copies:
                self.copies.pop(0)()
            if self.parity == parity:
                self.waiting.append(here)
                let_others_run()


def make_barrier(address: Any, count: Any) -> None:
    """bulk_cuda.make_barrier."""
    assert int(address) % 8 == 0
    here.block.barriers[int(address)] = Phases(int(count))


def assert_no_barrier(to: Any, count: Any) -> None:
    """Nothing else lies where one is."""
    assert not any(to - BARRIER_BYTES < place < to + count for place in here.block.barriers)


def bulk_copy(late: bool, to: Any, source: Any, count: Any, barrier: Any) -> None:
    """bulk_cuda.bulk_copy: now, or when the barrier is waited for."""
    assert int(to) % LOAD_BYTES == int(source) % LOAD_BYTES == int(count) % LOAD_BYTES == 0
    memory, phases = here.block.memory, here.block.barriers[int(barrier)]
    assert 0 <= to <= len(memory) - count
    assert_no_barrier(to, count)

    def happen() -> None:
        note(to, int(count), written=True)
        ctypes.memmove(memory.ctypes.data + int(to), int(source), int(count))
        phases.receive(int(count))

    phases.have(happen, late=late)


def wait_for_phase(at: Any, parity: Any) -> None:
    """bulk_cuda.wait_for_phase."""
    phases = here.block.barriers[int(at)]
    phases.wait(int(parity))
    here.seen[int(at)] = phases.passed


# --- Products of a warpgroup, whose second operand is read when they happen


def strip_multiplier(
    late: bool, spec: Any, octet: int, half: int, patched: bool, b: Any
) -> Callable[..., Any]:
    """strip_cuda.strip_multiplier; sums are arrays of one number, which products fill."""
    decode = strip_decoder(spec, octet, half, patched)

    def multiply(sums: Any, codes: Any, statistics: Any, lane: Any, patch: Any, inputs: Any) -> Any:
        words = decode(codes, statistics, lane, patch)
        for first in range(0, len(words), 4):
            start = partial(start_product, late, here.warpgroup, here.block.memory, b, first // 4)
            sums = here.warpgroup.together(start, (sums, words[first : first + 4], inputs))
        return tuple(sums)

    return multiply


def start_product(
    late: bool, group: Meeting, memory: np.ndarray, b: Any, step: int, given: list[Any]
) -> Any:
    """wgmma_cuda.start_step, for all threads of a warpgroup."""
    sums, words, b_starts = zip(*given, strict=True)
    assert len({*b_starts}) == 1
    grown = [[np.full((), np.nan, FLOAT) for _ in own] for own in sums]
    left = rows_of_words(np.array(words).astype(WORD))

    def happen() -> None:
        right = operand(memory, b_starts[0] + 2 * step * b.column_step, b, 2 * len(sums[0]))
        product = left @ right.T  # [w, half, g, j, t, pair] to [w, g, t], [j, half, pair]
        product = product.reshape(4, 2, 8, -1, 4, 2).transpose(0, 2, 4, 3, 1, 5)
        more = product.reshape(WARPGROUP, -1)
        for own, before, new in zip(grown, sums, more, strict=True):
            for place, old, value in zip(own, before, new, strict=True):
                place[...] = FLOAT(old + value)

    group.pending.append(happen)
    if not late:
        happen_all(group)
    return grown


def rows_of_words(words: np.ndarray) -> np.ndarray:
    """float64 [64, 16] from what the threads of a warpgroup hold of A."""
    # thread = 32 w + 4 g + t; words: [eight of k, half of rows]
    numbers = halves(words).reshape(4, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5)
    return numbers.reshape(WARPGROUP // 2, 16).astype(np.float64)


def operand(memory: np.ndarray, start: Any, tiled: Any, rows: int) -> np.ndarray:
    """float64 [rows, 16] from cores."""
    row, column = np.ogrid[:rows, :16]
    place = row // 8 * tiled.row_step + row % 8 * 16 + column // 8 * tiled.column_step
    place = int(start) + place + column % 8 * 2
    return memory[: len(memory) // 8 * 8].view(HALF)[place // 2].astype(np.float64)


def happen_all(group: Meeting, but: int = 0) -> None:
    """All products but the latest, in their order."""
    while len(group.pending) > but:
        group.pending.pop(0)()


def products_done(but: int) -> Callable[[], None]:
    """wgmma_cuda.products_done."""

    def wait() -> None:
        group = here.warpgroup
        group.together(lambda given: [happen_all(group, but)] * len(given))

    return wait


def sums_writer(row_floats: int) -> Callable[..., None]:
    """wgmma_cuda.sums_writer, of one lane."""
    from spqr_numba.kernels.wgmma_cuda import put_sums

    def put(out: Any, lane: Any, sums: Any) -> None:
        words = [np.array([int(number)]).astype(WORD) for number in (out, lane)]
        values = [np.array([FLOAT(value)]) for value in sums]
        put_sums(Instructions(here.block.memory), row_floats, *words, values)  # type: ignore[arg-type]

    return put


# --- Instructions, on arrays of 32 lanes


def unit_multiplier(spec: Any, kind: Any) -> Callable[..., Any]:
    """unit_cuda.unit_multiplier: a kind of unit, written onto lanes."""

    def run(memory: np.ndarray, given: list[Any]) -> list[Any]:
        places, totals = (np.array(part).T for part in zip(*given, strict=True))
        with np.errstate(all="ignore"):
            unit = kind(Instructions(memory), spec, *places.astype(WORD))
            grown = unit.add_to(list(totals.astype(FLOAT)))
        return list(zip(*grown, strict=True))

    return lambda *given: here.warp.together(partial(run, here.block.memory), given)


def part_writer(spec: Any, dtype: Any, part: int, patched: bool) -> Callable[..., None]:
    """unit_numbers_cuda.part_writer."""
    from spqr_numba.kernels.unit_numbers_cuda import Copying, UnitOfNumbers

    def run(memory: np.ndarray, given: list[Any]) -> list[None]:
        parts = [np.array(part) for part in zip(*given, strict=True)]
        words = [part if i in (4, 5) else part.astype(WORD) for i, part in enumerate(parts)]
        if not patched:
            words[2] = None
        with np.errstate(all="ignore"):
            UnitOfNumbers(Instructions(memory), Copying(spec, dtype), *words).write(part)
        return [None] * LANES

    return lambda *given: here.warp.together(partial(run, here.block.memory), given)


def strip_decoder(spec: Any, octet: int, half: int, patched: bool) -> Callable[..., Any]:
    """What strip_cuda.Strip decodes, of all steps."""
    from spqr_numba.kernels.strip_cuda import Strip

    def run(memory: np.ndarray, given: list[Any]) -> list[Any]:
        *places, patch = (np.array(part).astype(WORD) for part in zip(*given, strict=True))
        with np.errstate(all="ignore"):
            strip = Strip(Instructions(memory), spec, *places, patch if patched else None)
            words = [word for step in strip.steps(octet, half) for word in step]
        return list(zip(*words, strict=True))

    return lambda *given: here.warp.together(partial(run, here.block.memory), given)


def group_summer(group_size: int) -> Callable[[Any], Any]:
    """unit_cuda.group_summer, of one lane."""
    from spqr_numba.kernels.unit_cuda import group_sum

    def run(address: Any) -> Any:
        return group_sum(Instructions(here.block.memory), np.array([address], WORD), group_size)[0]

    return run


def add_to_shared(address: Any, totals: Any) -> None:
    """unit_cuda.add_to_shared, of one lane."""
    from spqr_numba.kernels.unit_cuda import add_floats

    values = [np.array([total]) for total in totals]
    add_floats(Instructions(here.block.memory), np.array([address], WORD), values)


def put_floats(address: Any, values: Any) -> None:
    """unit_cuda.put_floats, of one lane."""
    assert address % LOAD_BYTES == 0
    for i, value in enumerate(values):
        to_shared(FLOAT, address + 4 * i, value)


def add_entry(*given: Any) -> Any:
    """outlier_cuda.add_entry, of one lane."""
    from spqr_numba.kernels.outlier_cuda import grown_by_entry

    return of_one_lane(grown_by_entry, *given)


def entries_adder(at_once: int, stride: int) -> Callable[..., Any]:
    """outlier_cuda.entries_adder, of one lane."""
    from spqr_numba.kernels.outlier_cuda import grown_by_entries

    def written(ptx: Instructions, *given: Any) -> Any:
        return grown_by_entries(ptx, at_once, stride, *given)  # type: ignore[arg-type]

    return partial(of_one_lane, written)


def of_one_lane(write: Callable[..., Any], *given: Any) -> Any:
    """What instructions give that are written for numbers and, at the end, a total."""
    *numbers, total = given
    words = [np.array([int(number)]).astype(WORD) for number in numbers]
    return write(Instructions(here.block.memory), *words, np.array([FLOAT(total)]))[0]


def entries_multiplier(spec: Any) -> Callable[..., Any]:
    """outlier_several_cuda.entries_multiplier."""
    from spqr_numba.kernels.outlier_several_cuda import Entries

    def run(memory: np.ndarray, given: list[Any]) -> list[Any]:
        parts = [np.array(part).T for part in zip(*given, strict=True)]
        place, own, lane, x, x_step = (part.astype(WORD) for part in parts[:5])
        with np.errstate(all="ignore"):
            entries = Entries(Instructions(memory), spec, place, own, lane)  # type: ignore[arg-type]
            grown = entries.add_to(list(parts[5].astype(FLOAT)), x, x_step)
        return list(zip(*grown, strict=True))

    return lambda *given: here.warp.together(partial(run, here.block.memory), given)


def pair_summer(group_size: int) -> Callable[..., Any]:
    """unit_several_cuda.pair_summer."""
    from spqr_numba.kernels.unit_several_cuda import pair_sums

    def run(memory: np.ndarray, given: list[Any]) -> list[Any]:
        places = [np.array(part).astype(WORD) for part in zip(*given, strict=True)]
        with np.errstate(all="ignore"):
            sums = pair_sums(Instructions(memory), group_size, *places)  # type: ignore[arg-type]
        return list(zip(*sums, strict=True))

    return lambda *given: here.warp.together(partial(run, here.block.memory), given)


class Instructions:
    """ptx.Ptx and the builder of LLVM: each instruction is carried out, for all lanes at once."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.builder = memory, self

    add = staticmethod(lambda a, b: a + b if a.dtype == np.int64 else (a + b).astype(WORD))
    mul = staticmethod(lambda a, b: (a * b).astype(WORD))
    and_ = staticmethod(lambda a, b: a & b)
    or_ = staticmethod(lambda a, b: a | b)
    xor = staticmethod(lambda a, b: a ^ b)
    lshr = staticmethod(lambda a, b: a >> b)
    shl = staticmethod(lambda a, b: (a << b).astype(WORD))
    fadd = staticmethod(lambda a, b: FLOAT(a + b))
    fsub = staticmethod(lambda a, b: FLOAT(a - b))
    fmul = staticmethod(lambda a, b: FLOAT(a * b))
    fma = staticmethod(lambda a, b, c: (np.multiply(a, b, dtype=np.float64) + c).astype(FLOAT))

    @staticmethod
    def icmp_signed(sign: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a < b or a > b."""
        a, b = a.astype(np.int32), b.astype(np.int32)
        return {"<": a < b, ">": a > b}[sign]

    select = staticmethod(np.where)

    def shared(self, address: np.ndarray, count: int, dtype: Any) -> list[np.ndarray]:
        """`count` numbers of 4 bytes from each lane's address on, which their size divides."""
        assert (address % (4 * count) == 0).all()
        note(address, 4 * count, written=False)
        numbers = self.memory[: len(self.memory) // 8 * 8].view(dtype)
        return [numbers[address // 4 + i] for i in range(count)]

    def load_shared(self, address: np.ndarray, words: int = 4) -> list[np.ndarray]:
        """Some words."""
        return self.shared(address, words, WORD)

    def load_shared_floats(self, address: np.ndarray, count: int) -> list[np.ndarray]:
        """Some float32."""
        return self.shared(address, count, FLOAT)

    def load_shared_half(self, address: np.ndarray) -> np.ndarray:
        """An fp16 number, as float32."""
        assert (address % 2 == 0).all()
        note(address, 2, written=False)
        return self.memory[: len(self.memory) // 8 * 8].view(HALF)[address // 2].astype(FLOAT)

    def store_shared_floats(self, address: np.ndarray, values: list[np.ndarray]) -> None:
        """Some float32."""
        assert (address % (4 * len(values)) == 0).all()
        note(address, 4 * len(values), written=True)
        for i, value in enumerate(values):
            self.memory[: len(self.memory) // 8 * 8].view(FLOAT)[address // 4 + i] = value

    def store_shared(self, address: np.ndarray, words: list[np.ndarray]) -> None:
        """Four words."""
        assert (address % LOAD_BYTES == 0).all()
        note(address, LOAD_BYTES, written=True)
        for i, word in enumerate(words):
            self.memory[: len(self.memory) // 8 * 8].view(WORD)[address // 4 + i] = word

    def load_matrices(self, address: np.ndarray, count: int) -> list[np.ndarray]:
        """Matrices of 8 x 8 halves, transposed: a lane's row of each is its columns' halves."""
        assert (address % LOAD_BYTES == 0).all()
        note(address[: 8 * count], LOAD_BYTES, written=False)
        numbers = self.memory[: len(self.memory) // 8 * 8].view(np.uint16)
        rows = numbers[address[: 8 * count, None] // 2 + np.arange(8)].reshape(count, 8, 8)
        words = rows.transpose(0, 2, 1).astype(WORD).reshape(count, LANES, 2)
        return list(words[..., 0] | words[..., 1] << WORD(16))

    def meet_warp(self) -> None:
        """Nothing: lanes do everything together."""

    def of_quad_lane(self, word: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """The word of a lane of the own four."""
        return word[np.arange(LANES) // 4 * 4 + lane.astype(np.int64)]

    def word_of(self, value: np.ndarray) -> np.ndarray:
        """The bits."""
        return np.ascontiguousarray(value).view(WORD)

    def rounded_pair(self, low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
        """Two numbers, rounded, in a word."""
        if kind == "f16":
            rounded = [HALF(part).view(np.uint16).astype(WORD) for part in (low, high)]
        else:
            rounded = [
                np.array([float_to_bfloat(value) for value in part], WORD) for part in (low, high)
            ]
        return rounded[0] | rounded[1] << WORD(16)

    def store_global_where(self, there: np.ndarray, address: np.ndarray, words: list) -> None:
        """Four words from each lane for which `there` holds."""
        for lane in there.nonzero()[0]:
            assert address[lane] % LOAD_BYTES == 0
            for i, word in enumerate(words):
                write(ctypes.c_uint32, int, address[lane] + 4 * i, word[lane])

    def masked_or(self, word: np.ndarray, mask: int, other: np.ndarray) -> np.ndarray:
        """word & mask | other."""
        return word & WORD(mask) | other

    def fma_halves(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """a * b + c of both halves."""
        a, b, c = (halves(word).astype(np.float64) for word in np.broadcast_arrays(a, b, c))
        return np.ascontiguousarray((a * b + c).astype(HALF)).view(WORD)[..., 0]

    def negated(self, word: np.ndarray) -> np.ndarray:
        """Both halves, of the other sign."""
        return word ^ WORD(0x80008000)

    def shifted_left(self, word: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Nothing is left of it by 32 places."""
        return np.where(places < 32, word << np.minimum(places, 31), 0).astype(WORD)

    def signs(self, word: np.ndarray, first: int) -> np.ndarray:
        """Two halves full of a byte's highest bit."""
        low, high = (word >> WORD(8 * byte + 7) & WORD(1) for byte in (first, first + 1))
        return low * WORD(0xFFFF) | high * WORD(0xFFFF0000)

    def upper_halves(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Those of two words."""
        return low >> WORD(16) | high & WORD(0xFFFF0000)

    def bytes_of(self, word: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Four bytes by their numbers."""
        digits = [chosen >> WORD(4 * i) & WORD(3) for i in range(4)]
        parts = [
            (word >> digit * WORD(8) & WORD(0xFF)) << WORD(8 * i) for i, digit in enumerate(digits)
        ]
        return parts[0] | parts[1] | parts[2] | parts[3]

    def floats(self, word: np.ndarray) -> list[np.ndarray]:
        """Both halves."""
        return list(halves(word).astype(FLOAT).T)

    def tf32_parts(self, value: np.ndarray) -> list[np.ndarray]:
        """The first eleven bits, and the rest."""
        high = np.ascontiguousarray(value).view(WORD) & WORD(0xFFFFE000)
        return [high, FLOAT(value - high.view(FLOAT)).view(WORD)]

    def mma_tf32(self, sums: list, a: list, b: list) -> list[np.ndarray]:
        """mma.m16n8k8 of tf32, by the fragment tables of the PTX manual."""
        left, right = (
            np.stack([(word & WORD(0xFFFFE000)).view(FLOAT) for word in part]) for part in (a, b)
        )
        # lane = 4 g + t; A: [half of k, half of rows, g, t]; B: [half of k, n, t]
        rows = left.reshape(2, 2, 8, 4).transpose(1, 2, 0, 3).reshape(16, 8).astype(np.float64)
        columns = right.reshape(2, 8, 4).transpose(0, 2, 1).reshape(8, 8).astype(np.float64)
        product = (rows @ columns).reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, LANES)
        return [FLOAT(total + more) for total, more in zip(sums, product, strict=True)]

    def mma(self, sums: list, a: list, b: list) -> list[np.ndarray]:
        """mma.m16n8k16 or m16n8k8, by the fragment tables of the PTX manual."""
        left = np.stack([halves(word) for word in np.broadcast_arrays(*a, b[0])[:-1]]).astype(
            np.float64
        )
        right = np.stack([halves(word) for word in b]).astype(np.float64)
        # lane = 4 g + t; A: [eight of k, half of rows, g, t, pair]; B: [eight of k, n, t, pair]
        rows = left.reshape(-1, 2, 8, 4, 2).transpose(1, 2, 0, 3, 4).reshape(16, -1)
        columns = right.reshape(-1, 8, 4, 2).transpose(0, 2, 3, 1).reshape(-1, 8)
        product = (rows @ columns).reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, LANES)
        return [FLOAT(total + more) for total, more in zip(sums, product, strict=True)]


def halves(word: np.ndarray) -> np.ndarray:
    """fp16 [..., 2], the lower first."""
    return np.ascontiguousarray(word)[..., None].view(HALF)
