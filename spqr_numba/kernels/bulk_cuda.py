"""The copy engine of a Hopper GPU, and the barriers in shared memory that tell what it has done.

One thread asks for a run of bytes, however long, and goes on. A *barrier* passes, from phase to
phase, when as many threads have arrived as it was made for, and all bytes that they expect with it
are there. Who waits names the parity of the phase that he waits for: 0 for the first, 1 for the
next and, of one that nobody has used yet, for the one before the first.

Source: PTX ISA, "mbarrier", "cp.async.bulk" and "async proxy".
"""

from __future__ import annotations

from typing import Any

from numba import types

from .ptx import effect

__all__ = [
    "BARRIER_BYTES",
    "arrive",
    "bulk_copy",
    "expect_bytes",
    "forget_barrier",
    "let_copy_engine_overwrite",
    "let_copy_engine_see",
    "make_barrier",
    "wait_for_cluster_phase",
    "wait_for_phase",
]

BARRIER_BYTES = 8

make_barrier = effect(
    "make_barrier",
    "mbarrier.init.shared::cta.b64 [$0], $1",
    (types.int32, types.int32),
    "A barrier at a shared address, for so many threads to arrive.",
)
forget_barrier = effect(
    "forget_barrier",
    "mbarrier.inval.shared::cta.b64 [$0]",
    (types.int32,),
    "From here on the shared address is for something else.",
)
let_copy_engine_see = effect(
    "let_copy_engine_see",
    "fence.mbarrier_init.release.cluster",
    (),
    "Barriers that the thread has made, before others, behind a barrier, or it itself use them.",
)
let_copy_engine_overwrite = effect(
    "let_copy_engine_overwrite",
    "fence.proxy.async.shared::cta",
    (),
    "What the thread has written in shared memory, before others, behind a barrier, copy over it.",
)
arrive = effect(
    "arrive",
    "{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [$0]; }",
    (types.int32,),
    "At a barrier.",
)
expect_bytes = effect(
    "expect_bytes",
    "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [$0], $1; }",
    (types.int32, types.int32),
    "Arrive at a barrier, and let it wait for so many bytes.",
)
bulk_copy = effect(
    "bulk_copy",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3]",
    (types.int32, types.int64, types.int32, types.int32),
    "Copy bytes from global to shared memory, both where 16 divides, and tell a barrier.",
)


def _waiter(name: str, scope: str, doc: str) -> Any:
    """An intrinsic that waits for a phase of a barrier, which it makes known in a scope."""
    text = (
        f"{{ .reg .pred passed; again: mbarrier.try_wait.parity{scope}.shared::cta.b64"
        " passed, [$0], $1; @!passed bra again; }"
    )
    return effect(name, text, (types.int32, types.int32), doc)


wait_for_phase = _waiter(
    "wait_for_phase", "", "Until a barrier has passed its phase of this parity."
)
wait_for_cluster_phase = _waiter(
    "wait_for_cluster_phase",
    ".acquire.cluster",
    "Likewise, of a barrier that other blocks of the cluster have told something.",
)
