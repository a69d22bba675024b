from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast.embedding.batching import TOKEN_BUDGET
from kdb_fast.engine import plan
from kdb_fast.engine.plan import FLUSH_SLOTS, INLINE_ROWS, MEMORY_FOR_SLAB, WORKER_BYTES, Plan, inline_shape, make_plan
from kdb_fast.engine.sharding import SHARD_ROWS
from kdb_fast.ipc.slab import SlabShape

GIGABYTE = 10**9


def planned(
    *,
    cpus: int,
    memory: int = 64 * GIGABYTE,
    quota: float | None = None,
    workers: int | None = None,
    dimensions: int = 384,
    model_bytes: int = 180_000_000,
    shard_rows: int | None = None,
    elsewhere: bool = False,
) -> Plan:
    """A plan for a machine with so many CPUs and so much memory."""
    usable = cpus if quota is None else max(1, min(cpus, -int(-quota // 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "cpu_list", lambda: list(range(cpus)))
        patch.setattr(plan, "usable_cpus", lambda: usable)
        patch.setattr(plan, "cpu_quota", lambda: quota)
        patch.setattr(plan, "available_memory", lambda: memory)
        return make_plan(
            workers=workers,
            dimensions=dimensions,
            model_bytes=model_bytes,
            shard_rows=shard_rows,
            elsewhere=elsewhere,
        )


def test_one_worker_for_each_cpu() -> None:
    made = planned(cpus=8)
    assert (made.workers, made.cpus) == (8, list(range(8)))
    assert made.reasons[0] == "8 workers × 1 thread (8 CPUs usable)"
    assert planned(cpus=1).reasons[0] == "1 worker × 1 thread (1 CPU usable)"


def test_a_cpu_quota_is_named_as_the_reason() -> None:
    made = planned(cpus=8, quota=2.5)
    assert made.workers == 3
    assert made.reasons[0] == "3 workers × 1 thread (CPU quota 2.5)"
    assert "quota" not in planned(cpus=4, quota=16.0).reasons[0]


def test_little_memory_means_fewer_workers_but_always_one() -> None:
    made = planned(cpus=8, memory=2 * GIGABYTE)
    assert made.workers == int(2 * GIGABYTE * 0.7) // (WORKER_BYTES + 180_000_000) == 2
    assert made.reasons[0] == "2 workers × 1 thread (memory: 2.0 GB available, 0.53 GB each)"
    assert planned(cpus=8, memory=10_000_000).workers == 1


def test_a_larger_model_leaves_room_for_fewer_workers() -> None:
    assert planned(cpus=8, memory=8 * GIGABYTE, model_bytes=2_600_000_000).workers == 1


def test_workers_that_the_user_asked_for_are_taken_as_they_are() -> None:
    made = planned(cpus=2, memory=10_000_000, workers=16)
    assert made.workers == 16
    assert made.reasons[0] == "16 workers × 1 thread (--workers)"


def test_slots_follow_the_workers_and_the_memory() -> None:
    made = planned(cpus=4)
    assert made.shape.slots == 3 * 4 + FLUSH_SLOTS
    assert "limited" not in made.reasons[1]
    one = SlabShape(1, SHARD_ROWS, 384).slot_bytes
    tight = planned(cpus=4, workers=4, memory=20 * one * MEMORY_FOR_SLAB)
    assert tight.shape.slots == 20
    assert tight.reasons[1].endswith("limited by memory)")


def test_of_large_slots_there_are_fewer() -> None:
    small, usual, large = (planned(cpus=8, shard_rows=rows) for rows in (10, None, 2048))
    assert [made.shape.rows for made in (small, usual, large)] == [10, SHARD_ROWS, 2048]
    assert small.shape.slots == usual.shape.slots == 3 * 8 + FLUSH_SLOTS
    assert large.shape.slots == 2 * 8 + 2
    assert "18 slots of 2048 rows" in large.reasons[1]


def test_a_thousand_workers_elsewhere_have_room_for_flushes_in_a_sixth_of_the_memory() -> None:
    made = planned(cpus=2, memory=20 * GIGABYTE, workers=1024, elsewhere=True)
    assert made.shape.slots == 3 * 1024 + FLUSH_SLOTS
    assert made.shape.grows
    assert made.shape.slots * made.shape.first_bytes < 1_000_000_000
    assert made.shape.total_bytes > 3_000_000_000
    here = planned(cpus=2, memory=20 * GIGABYTE, workers=1024)
    assert not here.shape.grows
    assert here.reasons[1].endswith("limited by memory)")


@settings(deadline=None)
@given(
    cpus=st.integers(1, 64),
    memory=st.integers(0, 10**12),
    workers=st.one_of(st.none(), st.integers(1, 256)),
    dimensions=st.integers(1, 4096),
    model_bytes=st.integers(0, 5 * GIGABYTE),
)
def test_a_plan_for_any_machine_keeps_every_worker_busy(
    cpus: int, memory: int, workers: int | None, dimensions: int, model_bytes: int
) -> None:
    made = planned(cpus=cpus, memory=memory, workers=workers, dimensions=dimensions, model_bytes=model_bytes)
    assert made.workers == (workers or made.workers)
    assert 1 <= made.workers <= (workers or cpus)
    # Each worker holds two slots; two more let a flush go on meanwhile.
    assert made.shape.slots >= 2 * made.workers + 2
    least = (2 * made.workers + 2) * made.shape.slot_bytes
    assert made.shape.total_bytes <= max(least, memory // MEMORY_FOR_SLAB)
    assert (made.shape.rows, made.shape.dimensions, made.token_budget) == (SHARD_ROWS, dimensions, TOKEN_BUDGET)
    assert made.describe() == "; ".join(made.reasons)
    assert len(made.reasons) == 3


def test_a_run_in_this_process_takes_few_slots() -> None:
    shape = inline_shape(384)
    assert (shape.slots, shape.rows, shape.dimensions) == (4, SHARD_ROWS, 384)
    assert shape.slots * shape.rows >= INLINE_ROWS
