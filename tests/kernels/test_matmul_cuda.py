"""The product of a prepared weight on a GPU: its PTX, and what it gives, element by element.

PTX needs the package numba-cuda, and no GPU; emulator.py runs small cases with neither.
test_matmul.py has matrices that stay canonical.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from spqr_numba.bench.random_matrix import random_matrix
from spqr_numba.format.matrix import SpqrMatrix
from spqr_numba.kernels.matmul import DENSE_FROM, ROUNDED_FROM, matmul, multiply_prepared
from spqr_numba.kernels.prepared import padded_columns, prepare
from spqr_numba.kernels.runs import SEGMENT_COLUMNS, segments_of

from ..gpu import assert_no_spills, each_capability, needs_numba_cuda, ptx_of
from ..problems import make_spec
from .emulator import emulated
from .test_matmul import assert_right, make_x

HALVES = [torch.float16, torch.bfloat16]
MOST_EXACT = 16  # inputs of fp16 or bf16; tensor cores multiply more by rounded weights
FOUR_BITS = {"bits": 4, "scale_bits": 4, "zero_bits": 4}
TWO_BITS = {"bits": 2, "scale_bits": 2, "zero_bits": 2}
GROUP_8 = {"group_size": 8, "stats_group_size": 64}
GROUP_32 = {"group_size": 32, "stats_group_size": 64}

# rows, columns, settings, outliers a row, permuted
CASES: dict[str, tuple[int, int, dict[str, int], Any, bool]] = {
    "paper": (64, 1024, {}, 10, True),
    "ragged": (37, 300, {}, 3, True),
    "no whole load": (37, 75, {}, 3, True),
    "one row": (1, 640, {}, 3, True),
    "one column": (20, 1, {}, 1, True),
    "no outliers": (40, 512, {}, None, True),
    "none found": (40, 512, {}, 0, True),
    "in order": (40, 520, {}, 2, False),
    "all outliers in one row": (40, 900, {}, [0] * 7 + [900] + [0] * 32, True),
    "4 bit": (50, 700, FOUR_BITS, 2, True),
    "2 bit": (50, 700, TWO_BITS, 2, True),
    "group 8, stats 64": (130, 700, GROUP_8, 2, True),
    "group 32, stats 64": (70, 1100, GROUP_32, 2, True),
    "4 bit, statistics of 3": (70, 700, {"bits": 4, "stats_group_size": 64}, 2, True),
    "3 bit, statistics of 4": (70, 1100, {**FOUR_BITS, **GROUP_32, "bits": 3}, 2, True),
    "4 bit, group 8": (70, 700, {**FOUR_BITS, **GROUP_8}, 2, True),
    "2 bit, statistics of 4": (70, 700, {**FOUR_BITS, "bits": 2}, None, True),
    "long": (48, 28672, {}, 290, True),
    "many units": (20, 6500, GROUP_8, 2, True),
    "tall": (9000, 64, {}, 1, True),
    "long runs": (20, 2100, {}, 70, True),
}


def build(name: str) -> SpqrMatrix:
    rows, columns, settings, outliers, permuted = CASES[name]
    spec = make_spec(rows, columns, **settings)
    return random_matrix(spec, outliers, permuted=permuted)


def run(x: torch.Tensor, matrix: SpqrMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product on a GPU, over memory that last held NaN."""
    weight = prepare(matrix.to("cuda"))
    torch.full((len(x), matrix.spec.out_features), float("nan"), dtype=x.dtype, device="cuda")
    bias = None if bias is None else bias.cuda()
    return matmul(x.cuda(), weight, bias).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_matrix(name: str, dtype: torch.dtype) -> None:
    matrix = build(name)
    x = make_x(2, matrix.spec.in_features, dtype=dtype)
    assert_right(run(x, matrix), x, matrix)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    "batch", [0, 1, 7, 16, 17, 33, 48, 49, 64, 65, 128, 130, DENSE_FROM - 1, DENSE_FROM]
)
def test_batches(batch: int, dtype: torch.dtype) -> None:
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    bias = make_x(matrix.spec.out_features, dtype=dtype, seed=1)
    assert_right(run(x, matrix, bias), x, matrix, bias, weights_of(batch, dtype))


def weights_of(batch: int, dtype: torch.dtype, major: int | None = None) -> torch.dtype:
    """What a product with so many inputs may round W_hat to, on a GPU of a compute capability."""
    if major is None:
        major = torch.cuda.get_device_properties("cuda").major
    if dtype != torch.float32 and major == 9 and MOST_EXACT < batch < DENSE_FROM:
        return torch.float16
    return torch.float32 if batch < ROUNDED_FROM else dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1e3, 1e-3, 1e-7, 6e4])
@pytest.mark.parametrize("batch", [3, 70])
def test_spikes(batch: int, size: float, dtype: torch.dtype) -> None:
    """Some inputs far larger or smaller than others, down to subnormal ones."""
    matrix = build("paper")
    x = make_x(batch, matrix.spec.in_features).clamp(-1, 1)
    x[:, ::7] *= size
    x = x.to(dtype)
    assert_right(run(x, matrix), x, matrix, weights=weights_of(batch, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("batch", [2, 70])
def test_the_range_of_bfloat(batch: int, size: float) -> None:
    matrix = build("paper")
    x = (make_x(batch, matrix.spec.in_features) * size).bfloat16()
    assert_right(run(x, matrix), x, matrix, weights=weights_of(batch, x.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("batch", [3, 70])
def test_bad_inputs_stay_in_their_row(batch: int, bad: float, dtype: torch.dtype) -> None:
    matrix = build("ragged")
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    x[1, 5] = bad
    y = run(x, matrix)
    assert not torch.isfinite(y[1]).any()
    assert_right(y[[0, 2]], x[[0, 2]], matrix, weights=weights_of(batch, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "batch"), [("long", 5), ("many units", 16)])
def test_clusters(
    name: str, batch: int, ranks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any size, and so slabs of the inputs."""
    from spqr_numba.kernels import matmul_cuda

    if torch.cuda.get_device_properties("cuda").major < matmul_cuda.HOPPER and ranks > 1:
        pytest.skip("this GPU has no clusters")
    monkeypatch.setattr(matmul_cuda, "RANKS", (ranks,))
    matrix = build(name)
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    assert_right(run(x, matrix), x, matrix)


EACH_CREW = pytest.mark.parametrize(
    "crew", [(10, 2, 1, 2), (10, 1, 2, 2), (8, 2, 2, 2), (16, 2, 1, 1)], ids=str
)


def give_crew(room: ModuleType, crew: tuple[int, ...], patch: pytest.MonkeyPatch) -> None:
    """Whatever there is to do."""
    patch.setattr(room, "crews_of", lambda *_, **__: [room.Crew(*crew)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@EACH_CREW
@pytest.mark.parametrize("name", ["ragged", "many units", "tall", "no outliers"])
def test_crews(
    name: str, crew: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spqr_numba.kernels import matmul_cuda

    give_crew(matmul_cuda, crew, monkeypatch)
    matrix = build(name)
    x = make_x(1, matrix.spec.in_features, dtype=dtype)
    assert_right(run(x, matrix), x, matrix)


@EACH_CREW
def test_crews_emulated(crew: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = build("many units")
    x = make_x(1, matrix.spec.in_features, dtype=torch.float16)
    with emulated("late") as room:
        give_crew(room, crew, monkeypatch)
        y = multiply_prepared(x, prepare(matrix), None)
    assert_right(y, x, matrix)


@pytest.mark.parametrize(
    ("tiles", "columns", "fed", "bits", "group_size", "first"),
    [
        (1, 64, False, 3, 16, (10, 2, 1, 2)),
        (2, 4096, False, 3, 16, (10, 2, 1, 2)),
        (2, 4096, False, 4, 16, (8, 2, 1, 2)),
        (2, 4096, False, 2, 32, (8, 2, 1, 2)),
        (2, 12499, False, 3, 16, (10, 2, 1, 2)),
        (2, 12500, False, 3, 16, (16, 2, 1, 1)),
        (2, 14336, False, 3, 16, (16, 2, 1, 1)),
        (2, 4096, True, 3, 16, (8, 2, 2, 2)),
        (3, 4096, False, 4, 8, (16, 2, 1, 1)),
        (4, 4096, False, 4, 8, (10, 1, 2, 2)),
        (6, 4096, False, 3, 16, (10, 1, 2, 2)),
        (6, 4096, False, 3, 32, (8, 2, 2, 2)),
        (4, 7500, False, 3, 16, (16, 2, 1, 1)),
        (3, 9999, True, 3, 16, (8, 2, 2, 2)),
        (3, 16666, True, 4, 16, (8, 2, 2, 2)),
        (3, 16667, True, 2, 16, (16, 2, 1, 1)),
        (2, 28672, False, 3, 8, (16, 2, 1, 1)),
    ],
)
def test_who_comes_first(
    tiles: int, columns: int, fed: bool, bits: int, group_size: int, first: tuple[int, ...]
) -> None:
    """Then others, the last of whom takes little shared memory."""
    with emulated("early") as room:
        crews = room.crews_of(room.UnitSpec(bits, 3, group_size), tiles, columns, fed=fed)
    assert crews[0] == first
    assert crews[-1] == (8, 1, 1, 1)
    assert all(crew.blocks <= crew.resident and crew.warps % 2 == 0 for crew in crews)


@pytest.mark.parametrize("columns", [500, 2100, 28672])
@pytest.mark.parametrize("rows", [16, 112, 1000])
@pytest.mark.parametrize("inputs", [1, 8, 16])
def test_room_for_the_table_of_runs(inputs: int, rows: int, columns: int) -> None:
    """Each block's, between the slots and the rings; and for what lies before the slots."""
    weight = prepare(random_matrix(make_spec(rows, columns), 3, permuted=True))
    with emulated("early") as room:
        for spec, plan, grid in room.plans(weight, torch.float16, inputs):
            tiles = -(-weight.tiles * spec.ranks // grid)
            words = tiles * segments_of(weight.spec) + 1
            if inputs > 1:
                sums = inputs * plan.columns // weight.spec.group_size
                shares = -(-tiles // spec.ranks) * spec.ranks * room.slot_floats(spec)
                assert plan.sums + sums <= plan.slots
                assert room.INPUTS_BEGIN + 4 * shares <= 4 * plan.slots
            slots = (tiles + spec.warps - 1) * room.slot_floats(spec)
            assert plan.slots + slots <= plan.starts
            assert 4 * (plan.starts + words) <= plan.ring


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 16, 70])
def test_same_bits_twice_and_in_a_graph(batch: int) -> None:
    weight = prepare(build("paper").to("cuda"))
    x = make_x(batch, weight.spec.in_features, dtype=torch.float16).cuda()
    expected = matmul(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul(x, weight)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("name", "batch", "dtype", "arrival"),
    [
        ("ragged", 1, torch.bfloat16, "late"),
        ("no whole load", 1, torch.float16, "early"),
        ("one column", 1, torch.float16, "late"),
        ("no outliers", 1, torch.float16, "late"),
        ("in order", 1, torch.float16, "early"),
        ("all outliers in one row", 1, torch.float16, "late"),
        ("4 bit", 1, torch.bfloat16, "early"),
        ("2 bit", 1, torch.float16, "late"),
        ("many units", 1, torch.float16, "late"),
        ("many units", 1, torch.float16, "early"),
        ("group 32, stats 64", 1, torch.bfloat16, "late"),
        ("group 32, stats 64", 3, torch.float16, "early"),
        ("4 bit, statistics of 3", 1, torch.float16, "early"),
        ("3 bit, statistics of 4", 1, torch.bfloat16, "late"),
        ("3 bit, statistics of 4", 5, torch.float16, "late"),
        ("4 bit, group 8", 1, torch.float16, "early"),
        ("2 bit, statistics of 4", 1, torch.float16, "late"),
        ("no whole load", 20, torch.float16, "late"),
    ],
    ids=str,
)
def test_emulated(name: str, batch: int, dtype: torch.dtype, arrival: str) -> None:
    matrix = build(name)
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    with emulated(arrival, major=9 if batch <= MOST_EXACT else 8) as room:
        give_rings(room, (4, 2), 1)
        y = multiply_prepared(x, prepare(matrix), None)
    assert_right(y, x, matrix)


def give_rings(room: ModuleType, ring: tuple[int, int], ranks: int) -> None:
    """Warps and stages of the products of several inputs, and blocks of a cluster."""
    room.RINGS |= dict.fromkeys((8, 16), (ring,))
    room.RANKS = (ranks,)


@pytest.mark.parametrize(
    ("name", "batch", "dtype", "arrival", "ring", "ranks"),
    [
        ("no outliers", 2, torch.float16, "late", (4, 2), 1),
        ("ragged", 3, torch.bfloat16, "late", (8, 1), 1),
        ("no whole load", 8, torch.float16, "early", (2, 2), 1),
        ("one column", 7, torch.bfloat16, "early", (2, 2), 1),
        ("none found", 8, torch.float16, "late", (4, 2), 1),
        ("in order", 9, torch.float16, "late", (4, 2), 2),
        ("all outliers in one row", 2, torch.float16, "late", (3, 2), 2),
        ("4 bit", 11, torch.bfloat16, "late", (4, 2), 2),
        ("2 bit", 2, torch.float16, "early", (4, 2), 2),
        ("many units", 5, torch.float16, "late", (4, 3), 4),
        ("many units", 16, torch.float16, "early", (4, 2), 2),
        ("long runs", 3, torch.float16, "late", (4, 2), 1),
    ],
    ids=str,
)
def test_clusters_emulated(
    name: str, batch: int, dtype: torch.dtype, arrival: str, ring: tuple[int, int], ranks: int
) -> None:
    matrix = build(name)
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    bias = make_x(matrix.spec.out_features, dtype=dtype, seed=1)
    with emulated(arrival) as room:
        give_rings(room, ring, ranks)
        y = multiply_prepared(x, prepare(matrix), bias)
    assert_right(y, x, matrix, bias)


@pytest.mark.parametrize(
    ("batch", "dtype", "ranks", "slabs", "arrival"),
    [
        (1, torch.float16, 1, 1, "late"),
        (1, torch.bfloat16, 1, 1, "late"),
        (2, torch.float16, 1, 1, "late"),
        (2, torch.bfloat16, 2, 1, "late"),
        (9, torch.float16, 2, 1, "late"),
        (9, torch.float16, 2, 1, "early"),
        (2, torch.float16, 2, 2, "late"),
        (2, torch.float16, 2, 2, "early"),
    ],
    ids=str,
)
def test_warps_meet_in_order(
    batch: int,
    dtype: torch.dtype,
    ranks: int,
    slabs: int,
    arrival: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a warp has written in shared memory another reads behind a barrier that makes it known,
    and what it has read another overwrites behind a barrier; so in other blocks of the cluster,
    where what is sent "early" is there before anybody waits for it."""
    outliers = 2 if slabs == 1 else None  # a run of which needs more columns than a slab would have
    matrix = random_matrix(make_spec(20, 1100, **GROUP_8), outliers, permuted=True)
    x = make_x(batch, matrix.spec.in_features, dtype=dtype)
    with emulated(arrival, watched=True) as room:
        give_rings(room, (6 if slabs == 1 else 2, 2), ranks)
        if slabs > 1:
            monkeypatch.setattr(room, "shared_memory", lambda device: 24 * 1024)
        weight = prepare(matrix)
        _, plan, _ = next(room.plans(weight, dtype, room.inputs_of(batch)))
        y = multiply_prepared(x, weight, None)
    assert plan.slabs == slabs
    assert_right(y, x, matrix)


@pytest.mark.parametrize("arrival", ["early", "late"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_slabs_emulated(ranks: int, arrival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where x' does not fit into shared memory at once."""
    matrix = build("many units")
    x = make_x(8, matrix.spec.in_features, dtype=torch.float16)
    with emulated(arrival) as room:
        give_rings(room, (4, 2), ranks)
        monkeypatch.setattr(room, "shared_memory", lambda device: 80 * 1024)
        weight = prepare(matrix)
        _, plan, _ = next(room.plans(weight, x.dtype, 8))
        y = multiply_prepared(x, weight, None)
    assert plan.slabs > 1
    assert_right(y, x, matrix)


@pytest.mark.parametrize("group_size", [8, 16])
@pytest.mark.parametrize("columns", [500, 4096, 11008, 28672])
@pytest.mark.parametrize(("ranks", "slabs"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 3), (4, 2)])
def test_parts(columns: int, group_size: int, ranks: int, slabs: int) -> None:
    """Each unit and each run is of one part, and x' of a part has room where the plan says."""
    settings = {"group_size": group_size, "stats_group_size": 64}
    weight = prepare(random_matrix(make_spec(16, columns, **settings), 3, permuted=True))
    slabs = min(slabs, weight.units // ranks) or 1
    ranks = min(ranks, weight.units)
    with emulated("early") as room:
        unit = room.UnitSpec.of(weight.spec, 8)
        spec = room.KernelSpec(unit, torch.float16, 16, 1, True, ranks)
        plan = room.plan_of_several(weight, spec, slabs, 1)
        stream = sys.modules["spqr_numba.kernels.stream_cuda"]
        part_of, columns_of = stream.parts_function(spec), stream.columns_function(spec)
        addresses = room.addresses(weight)
        units, runs = [], []
        for rank in range(ranks):
            for slab in range(slabs):
                part = part_of(addresses, plan, rank, slab)
                first, end = columns_of(addresses, part)
                units += range(part.unit, part.unit + part.units)
                runs += range(part.run, part.run + part.runs)
                assert end - first <= plan.columns
                assert first <= part.unit * unit.columns
                ends = (part.run + part.runs) * SEGMENT_COLUMNS
                assert not part.runs or min(ends, padded_columns(weight.spec)) <= end
                assert part.runs <= plan.most_runs
    assert units == list(range(weight.units))
    assert runs == list(range(segments_of(weight.spec)))


OLD, NEW = (8, 0), (9, 0)


@needs_numba_cuda
@pytest.mark.parametrize(
    ("bits", "stat_bits", "group_size", "dtype", "capability", "tiles"),
    [
        (3, 3, 16, torch.float16, OLD, 1),
        (3, 3, 16, torch.bfloat16, NEW, 100),
        (2, 2, 16, torch.float16, OLD, 5),
        (2, 3, 32, torch.float16, NEW, 1),
        (4, 4, 16, torch.bfloat16, NEW, 1),
        (4, 3, 8, torch.float16, NEW, 100),
        (4, 4, 32, torch.float16, NEW, 100),
        (3, 3, 8, torch.float16, NEW, 10),
        (3, 4, 32, torch.float16, NEW, 5),
    ],
    ids=str,
)
def test_ptx(
    bits: int, stat_bits: int, group_size: int, dtype: torch.dtype, capability: tuple[int, int],
    tiles: int, tmp_path: Path,
) -> None:  # fmt: skip
    """Tensor cores and copies of 16 bytes; no float64, nothing in local memory, no spills."""
    from spqr_numba.kernels.matmul_cuda import crews_of
    from spqr_numba.kernels.product_cuda import SIGNATURE, product_kernel
    from spqr_numba.kernels.stream_cuda import KernelSpec
    from spqr_numba.kernels.unit_cuda import UnitSpec

    unit = UnitSpec(bits, stat_bits, group_size)
    warps, stages, _, resident = crews_of(unit, tiles, columns=4096)[0]
    spec = KernelSpec(unit, dtype, warps, stages, capability >= NEW, resident=resident)
    kernel = product_kernel.__wrapped__(spec)
    ptx = ptx_of(kernel, SIGNATURE, capability)
    assert len(re.findall(PRODUCT.format(16), ptx)) == unit.columns // 16
    assert "cp.async.cg.shared.global" in ptx
    assert ("griddepcontrol.wait" in ptx) == (capability >= NEW)
    assert_no_spills(ptx, capability, tmp_path)


PRODUCT = r"mma\.sync\.aligned\.m16n8k{}\S*f32\.f16\.f16\.f32"


@needs_numba_cuda
@pytest.mark.parametrize(
    ("bits", "group_size", "inputs", "dtype", "capability"),
    [
        (3, 16, 8, torch.bfloat16, OLD),
        (3, 16, 8, torch.float16, NEW),
        (3, 16, 16, torch.bfloat16, NEW),
        (2, 16, 8, torch.float16, NEW),
        (4, 16, 16, torch.float16, OLD),
        (3, 8, 16, torch.float16, NEW),
    ],
    ids=str,
)
def test_ptx_of_several(
    bits: int,
    group_size: int,
    inputs: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    tmp_path: Path,
) -> None:
    """And ldmatrix; clusters where there are any."""
    from spqr_numba.kernels.matmul_cuda import RINGS
    from spqr_numba.kernels.several_cuda import SEVERAL, several_kernel
    from spqr_numba.kernels.stream_cuda import KernelSpec
    from spqr_numba.kernels.unit_cuda import UnitSpec

    unit, new = UnitSpec(bits, bits, group_size, inputs), capability >= NEW
    spec = KernelSpec(unit, dtype, *RINGS[inputs][0], new, 2 if new else 1)
    kernel = several_kernel.__wrapped__(spec)
    ptx = ptx_of(kernel, SEVERAL, capability)
    products = len(re.findall(PRODUCT.format(group_size), ptx))
    assert products >= unit.columns // group_size * (inputs // 8)
    assert "cp.async.cg.shared.global" in ptx
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in ptx
    for only_new in ("griddepcontrol.wait", "barrier.cluster.wait", "st.shared::cluster.v4.b32"):
        assert (only_new in ptx) == new
    assert_no_spills(ptx, capability, tmp_path)


@needs_numba_cuda
@each_capability
def test_ptx_of_staging(capability: tuple[int, int], tmp_path: Path) -> None:
    """No float64, nothing in local memory, no spills."""
    from spqr_numba.kernels.staging_cuda import CORES, cores_kernel
    from spqr_numba.kernels.stream_cuda import KernelSpec
    from spqr_numba.kernels.unit_cuda import UnitSpec

    spec = KernelSpec(UnitSpec(3, 3, 16, 8), torch.bfloat16, 16, 1, capability >= NEW)
    kernel = cores_kernel.__wrapped__(spec)
    ptx = ptx_of(kernel, CORES, capability)
    assert_no_spills(ptx, capability, tmp_path)
