"""The matrix product on a GPU: matmul.py's CUDA twin for 1 to 16 inputs.

product_cuda.py and several_cuda.py have the kernels; here they are planned, compiled and launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..format.layout import ceil_div
from .launch import Launcher, most_clusters, shared_memory
from .prepared import LANES, UNIT_GROUPS, PreparedMatrix
from .product_cuda import FACTOR_FLOATS, FLOAT_BYTES, SIGNATURE, product_kernel
from .runs import segments_of
from .several_cuda import SEVERAL, several_kernel
from .several_inputs_cuda import INPUTS_BEGIN, MOST_INPUTS
from .staging_cuda import ZERO_HALVES
from .stream_cuda import KernelSpec, Plan, Weight, addresses
from .unit_cuda import HALF_BYTES, UnitSpec
from .unit_several_cuda import AT_ONCE

if TYPE_CHECKING:
    from .feed import Feed

__all__ = [
    "MOST_INPUTS",
    "RINGS",
    "can_multiply",
    "launchers_of",
    "most_at_once",
    "multiply_few",
    "multiply_in_turns",
]

LARGEST_DEPTH = 16  # of an mma
ALIGNMENT = 128
RINGS = {
    8: ((16, 2), (16, 1), (12, 2), (8, 2), (8, 1)),
    16: ((12, 2), (12, 1), (8, 2), (8, 1)),
}
"""inputs -> warps of a block and stages of a warp's ring, the best first. More warps would leave
sixteen inputs too few registers."""
RANKS = 1, 2, 4, 8  # blocks of a cluster
HOPPER = 9  # the compute capability from which there is programmatic dependent launch, and clusters


class Crew(NamedTuple):
    """How a multiprocessor is manned for one input."""

    warps: int  # of a block; an even number
    stages: int  # of a warp's ring
    blocks: int  # of a product
    resident: int  # blocks that it has room for, the next product's included


ONE_LARGE = (Crew(16, 2, 1, 1),)
TWO_SHARING = Crew(10, 1, 2, 2), Crew(8, 2, 2, 2)
ROOM_FOR_NEXT = Crew(10, 2, 1, 2), Crew(8, 2, 1, 2)
TWO_FED = (Crew(8, 2, 2, 2),)
ANYTHING = Crew(8, 1, 2, 2), Crew(8, 2, 1, 1), Crew(8, 1, 1, 1)
FEW_TILES = 2  # of a multiprocessor; this and the next two lines are measured on an H200
FEW_COLUMNS, SOME_COLUMNS = 25_000, 30_000  # of all its tiles together
MANY_FED_COLUMNS = 50_000
LARGE_GROUP = 48  # bits of codes: larger ones take more registers
MOST_WARPS, MOST_WARPS_OF_LARGE = 20, 16  # of a multiprocessor, for whose registers there is room


class Call(NamedTuple):
    """A product with one weight, ready but for x, y and the bias."""

    launcher: Launcher
    grid: int
    shared_bytes: int
    addresses: Weight
    plan: Plan


Planned = tuple[KernelSpec, Plan, int]  # and blocks
_CALLS: WeakKeyDictionary[PreparedMatrix, dict[Any, Call]] = WeakKeyDictionary()
_FITS: WeakKeyDictionary[PreparedMatrix, dict[int, bool]] = WeakKeyDictionary()


def multiply_few(
    x: torch.Tensor,
    weight: PreparedMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    feed: Feed | None = None,
) -> None:
    """Fill out [count, rows] with x W_hat^T + bias, on torch's current stream.

    x fp16 or bf16 [count, columns], 1 to 16 inputs, each contiguous at an address that 16 divides,
    and room for an even number of columns; bias [rows] or None and out, contiguous, of the same
    dtype. `can_multiply` must hold. A feed makes one input of x first (feed.py); what lies beside x
    is aligned as x is.
    """
    call = call_of(weight, x.dtype, len(x), None if feed is None else feed.kind)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    given: list[float] = [x.data_ptr()]
    results = [out.data_ptr(), 0 if bias is None else bias.data_ptr()]
    if len(x) > 1:
        given.append(x.stride(0) * x.element_size())
        results.append(len(x))
    else:
        given += [0, 0.0] if feed is None else [feed.beside.data_ptr(), feed.eps or 0.0]
    numbers = *call.addresses, *given, *results, *call.plan
    call.launcher.launch(call.grid, call.shared_bytes, stream, *numbers)


def call_of(weight: PreparedMatrix, kind: torch.dtype, count: int, feed: str | None = None) -> Call:
    """The product with so many inputs; made once."""
    key = kind, inputs_of(count), feed
    calls = _CALLS.setdefault(weight, {})
    if key not in calls:
        calls[key] = make_call(weight, *key)
    return calls[key]


def launchers_of(
    weight: PreparedMatrix, kind: torch.dtype, count: int, feed: str | None = None
) -> list[Launcher]:
    """Of `multiply_in_turns`."""
    at_once = most_at_once(weight)
    counts = {min(count, at_once), count % at_once or at_once}
    return [call_of(weight, kind, some, feed).launcher for some in counts]


def inputs_of(count: int) -> int:
    """That a kernel for so many is compiled for."""
    return 1 if count == 1 else AT_ONCE * ceil_div(count, AT_ONCE)


def multiply_in_turns(
    x: torch.Tensor, weight: PreparedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """`multiply_few` of any number of inputs, as many in a launch as it takes."""
    at_once = most_at_once(weight)
    for first in range(0, len(x), at_once):
        some = slice(first, first + at_once)
        multiply_few(x[some], weight, bias, out[some])


def most_at_once(weight: PreparedMatrix) -> int:
    """Inputs of a launch; with groups too large for the depth of one product each has its own."""
    return MOST_INPUTS if weight.spec.group_size <= LARGEST_DEPTH else 1


def can_multiply(weight: PreparedMatrix, count: int) -> bool:
    """Whether so many inputs, or slabs of them, fit into the GPU's shared memory."""
    inputs = inputs_of(count)
    known = _FITS.setdefault(weight, {})
    if inputs not in known:
        known[inputs] = inputs <= MOST_INPUTS and any(plans(weight, torch.float16, inputs))
    return known[inputs]


def make_call(
    weight: PreparedMatrix, kind: torch.dtype, inputs: int, feed: str | None = None
) -> Call:
    """Choose the plan, and compile the kernel."""
    spec, plan, grid = next(plans(weight, kind, inputs, feed))
    launcher = launcher_of(spec, weight.device)
    return Call(launcher, grid, shared_bytes(spec, plan), addresses(weight), plan)


@cache
def launcher_of(spec: KernelSpec, device: torch.device) -> Launcher:
    """A kernel, compiled for a GPU, with as much shared memory as a plan may ask for."""
    alone = spec.unit.inputs == 1
    kernel, signature = (product_kernel, SIGNATURE) if alone else (several_kernel, SEVERAL)
    return Launcher(
        partial(kernel, spec),
        signature,
        device,
        threads=spec.threads,
        shared_bytes=shared_memory(device),
        early=spec.early,
        ranks=spec.ranks,
    )


def plans(
    weight: PreparedMatrix, kind: torch.dtype, inputs: int, feed: str | None = None
) -> Iterator[Planned]:
    """What fits into shared memory, the best first."""
    unit = UnitSpec.of(weight.spec, inputs)
    hopper = torch.cuda.get_device_properties(weight.device).major >= HOPPER
    if inputs == 1:
        return plans_of_one(weight, unit, kind, feed, early=hopper)
    return plans_of_several(weight, unit, kind, hopper=hopper)


def plans_of_one(
    weight: PreparedMatrix, unit: UnitSpec, kind: torch.dtype, feed: str | None, *, early: bool
) -> Iterator[Planned]:
    """What suits the work of a multiprocessor."""
    at_once = torch.cuda.get_device_properties(weight.device).multi_processor_count
    room, tiles = shared_memory(weight.device), ceil_div(weight.tiles, at_once)
    for crew in crews_of(unit, tiles, weight.spec.in_features, fed=feed is not None):
        warps, stages, blocks, resident = crew
        spec = KernelSpec(unit, kind, warps, stages, early, feed=feed, resident=resident)
        grid = min(weight.tiles, at_once * blocks)
        plan = plan_of_one(weight, spec, grid)
        if shared_bytes(spec, plan) <= room // resident:
            yield spec, plan, grid


def crews_of(unit: UnitSpec, tiles: int, columns: int, *, fed: bool = False) -> list[Crew]:
    """For so many tiles to a multiprocessor. Mostly a large block, which stages x once. With few
    tiles, what runs next already has a place beside them; and where two blocks share some evenly,
    one is busy while the other begins or ends.

    Where x is made first (fed), the rings wait for longer, and so hold more from the beginning.
    """
    work = tiles * columns
    crews: tuple[Crew, ...] = ()
    if fed and work < MANY_FED_COLUMNS:
        crews = TWO_FED
    elif not fed and tiles <= FEW_TILES and work < FEW_COLUMNS:
        crews = ROOM_FOR_NEXT
    elif not fed and tiles > FEW_TILES and tiles % 2 == 0 and work < SOME_COLUMNS:
        crews = TWO_SHARING
    large = unit.bits * unit.group_size > LARGE_GROUP
    most = MOST_WARPS_OF_LARGE if large else MOST_WARPS
    return [crew for crew in (*crews, *ONE_LARGE, *ANYTHING) if crew.warps * crew.resident <= most]


def plans_of_several(
    weight: PreparedMatrix, unit: UnitSpec, kind: torch.dtype, *, hopper: bool
) -> Iterator[Planned]:
    """A block to a multiprocessor; as few slabs as possible, and what is quick by `cost_of`."""
    room = shared_memory(weight.device)
    for slabs in range(1, weight.units + 1):
        found = []
        for (warps, stages), ranks in product(RINGS[unit.inputs], RANKS if hopper else (1,)):
            spec = KernelSpec(unit, kind, warps, stages, hopper, ranks)
            if ranks * slabs > weight.units:
                continue
            clusters = min(weight.tiles, clusters_of(spec, weight.device))
            plan = plan_of_several(weight, spec, slabs, clusters)
            if shared_bytes(spec, plan) <= room:
                found.append((spec, plan, clusters * ranks))
        yield from sorted(found, key=cost_of)


def clusters_of(spec: KernelSpec, device: torch.device) -> int:
    """How many run at a time."""
    if spec.ranks == 1:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return most_clusters(device, spec.ranks, spec.threads)


def cost_of(planned: Planned) -> float:
    """How long a product takes, in microseconds of an H200, but for what all its plans have in
    common: a block's items, the columns that it stages, and what a cluster's blocks wait for each
    other. Fitted to 82 plans of six shapes, when it took longer; what comes first is still within
    3 % of the best of eight shapes' plans."""
    spec, plan, _ = planned
    tiles, units = plan.tiles + (plan.longer > 0), plan.units + (plan.wider > 0)
    item = 0.115 + 0.008 * spec.unit.inputs
    item *= 1 + (16 - spec.warps) / 64 + (0.03 if spec.stages == 1 else 0)
    staged = 2 * plan.pairs * spec.unit.inputs
    return plan.slabs * (tiles * (units + plan.most_runs) * item + 1.1e-4 * staged) + spec.ranks / 2


def shared_bytes(spec: KernelSpec, plan: Plan) -> int:
    """That a block needs."""
    return plan.ring + spec.warps * spec.stages * spec.place_bytes


def slot_floats(spec: KernelSpec) -> int:
    """A warp's share of a tile."""
    return spec.slot_bytes // FLOAT_BYTES


def plan_of_one(weight: PreparedMatrix, spec: KernelSpec, grid: int) -> Plan:
    """The table of product_cuda.py, line by line."""
    columns = weight.units * spec.unit.columns
    sums = HALF_BYTES * (ZERO_HALVES + columns) // FLOAT_BYTES + FACTOR_FLOATS
    slots = sums + weight.units * UNIT_GROUPS
    tiles, longer = divmod(weight.tiles, grid)
    return Plan(
        tiles=tiles,
        longer=longer,
        slabs=1,
        units=weight.units,
        wider=0,
        most_runs=segments_of(weight.spec),
        pairs=0,
        columns=columns,
        sums=sums,
        slots=slots,
        **behind_slots(weight, spec, slots, tiles + (longer > 0)),
    )


def plan_of_several(weight: PreparedMatrix, spec: KernelSpec, slabs: int, clusters: int) -> Plan:
    """The table of several_cuda.py, line by line."""
    units, wider = divmod(weight.units, spec.ranks * slabs)
    tiles, longer = divmod(weight.tiles, clusters)
    columns, most_runs = part_sizes(weight, spec, units, wider, spec.ranks * slabs)
    sums = (INPUTS_BEGIN + HALF_BYTES * spec.unit.inputs * columns) // FLOAT_BYTES
    slots = sums + spec.unit.inputs * columns // spec.unit.group_size
    most = tiles + (longer > 0)
    shares = ceil_div(most, spec.ranks) * spec.ranks * slot_floats(spec)
    slots = max(slots, INPUTS_BEGIN // FLOAT_BYTES + shares)
    pairs = ceil_div(ceil_div(weight.spec.in_features, 2), spec.ranks)
    return Plan(
        tiles=tiles,
        longer=longer,
        slabs=slabs,
        units=units,
        wider=wider,
        most_runs=most_runs,
        pairs=ceil_div(pairs, LANES) * LANES,  # whole lines
        columns=columns,
        sums=sums,
        slots=slots,
        **behind_slots(weight, spec, slots, most),
    )


def part_sizes(
    weight: PreparedMatrix, spec: KernelSpec, units: int, wider: int, parts: int
) -> tuple[int, int]:
    """The most columns and the most runs that a part needs (stream_cuda.py)."""
    firsts = [part * units + min(part, wider) for part in range(parts + 1)]
    runs = [ceil_div(first, spec.segment_units) for first in firsts]
    if "runs" not in weight.tensors:
        runs = [0] * len(runs)
    ends = [
        max(end, min(run * spec.segment_units, weight.units))
        for end, run in zip(firsts[1:], runs[1:], strict=True)
    ]
    columns = max(end - first for first, end in zip(firsts, ends, strict=False))
    most_runs = max(end - first for first, end in pairwise(runs))
    return columns * spec.unit.columns, most_runs


def behind_slots(
    weight: PreparedMatrix, spec: KernelSpec, slots: int, tiles: int
) -> dict[str, int]:
    """Where the table of runs lies, behind the slots of so many tiles, and in bytes the rings."""
    starts = slots + (tiles + spec.warps - 1) * slot_floats(spec)
    end = starts + (tiles * segments_of(weight.spec) + 1 if "runs" in weight.tensors else 0)
    return {"starts": starts, "ring": ceil_div(FLOAT_BYTES * end, ALIGNMENT) * ALIGNMENT}
