from __future__ import annotations

import pickle
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast.accounting import Counts, Fate
from kdb_fast.indexing import flushing
from kdb_fast.indexing.flushing import (
    CEILING_BYTES,
    FLOOR_BYTES,
    MAX_WAIT_SECONDS,
    MEMORY_SHARE,
    QUICK_SECONDS,
    SLOW_SECONDS,
    FlushPlanner,
    FlushSize,
    first_of,
)
from kdb_fast.indexing.key_ledger import KeyLedger
from kdb_fast.indexing.leases import SlotLease, SlotPool
from kdb_fast.ipc.messages import Flush, Flushed, row_bits
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record, Reject, content_hash

GIGABYTE = 10**9


class Memory:
    """Available memory that a test can change."""

    def __init__(self, available: int = 64 * GIGABYTE) -> None:
        self.available = available

    def __call__(self) -> int:
        return self.available


def test_the_first_flush_is_small_so_that_the_first_rows_are_safe_soon() -> None:
    assert FlushSize(10 * CEILING_BYTES, Memory()).target == FLOOR_BYTES


@pytest.mark.parametrize(
    ("capacity", "available", "ceiling", "limited_by"),
    [
        (10 * CEILING_BYTES, 64 * GIGABYTE, CEILING_BYTES, "ceiling"),
        (4_000_000, 64 * GIGABYTE, 4_000_000, "slots"),
        (10 * CEILING_BYTES, 128_000_000, 4_000_000, "memory"),
        (10 * CEILING_BYTES, 1_000_000, FLOOR_BYTES, "memory"),
        (1000, 64 * GIGABYTE, FLOOR_BYTES, "slots"),
    ],
)
def test_ceiling_is_the_least_of_slots_memory_and_a_fixed_size(
    capacity: int, available: int, ceiling: int, limited_by: str
) -> None:
    size = FlushSize(capacity, Memory(available))
    assert (size.ceiling, size.limited_by) == (ceiling, limited_by)


def test_quick_flushes_double_it_up_to_the_ceiling() -> None:
    size = FlushSize(10 * CEILING_BYTES, Memory())
    targets = [size.target]
    while size.target < size.ceiling:
        size.note(size.target, 0.01)
        targets.append(size.target)
    assert all(a < b <= 2 * a for a, b in pairwise(targets))
    assert targets[-1] == CEILING_BYTES
    size.note(size.target, 0.01)
    assert size.target == CEILING_BYTES


def test_a_slow_flush_halves_it_at_once() -> None:
    size = FlushSize(10 * CEILING_BYTES, Memory())
    size.target = 8_000_000
    size.note(8_000_000, SLOW_SECONDS + 0.1)
    assert (size.target, size.shrunk) == (4_000_000, 1)


def test_little_memory_halves_it_even_where_flushes_are_quick() -> None:
    memory = Memory(64 * GIGABYTE)
    size = FlushSize(10 * CEILING_BYTES, memory)
    size.target = 8_000_000
    memory.available = 15 * GIGABYTE
    size.note(8_000_000, 0.01)
    assert (size.target, size.shrunk) == (4_000_000, 1)


def test_neither_quick_nor_slow_leaves_it_as_it_is() -> None:
    size = FlushSize(10 * CEILING_BYTES, Memory())
    size.note(size.target, (QUICK_SECONDS + SLOW_SECONDS) / 2)
    assert (size.target, size.shrunk) == (FLOOR_BYTES, 0)


def test_a_flush_that_was_not_full_says_nothing_about_larger_ones() -> None:
    size = FlushSize(10 * CEILING_BYTES, Memory())
    size.note(size.target // 2 - 1, 0.001)
    assert size.target == FLOOR_BYTES


@settings(deadline=None)
@given(
    st.integers(0, 20 * CEILING_BYTES),
    st.integers(0, 100 * GIGABYTE),
    st.lists(st.tuples(st.integers(0, 2 * CEILING_BYTES), st.floats(0, 60), st.integers(0, 100 * GIGABYTE))),
)
def test_target_stays_between_floor_and_ceiling_whatever_happens(
    capacity: int, available: int, flushes: list[tuple[int, float, int]]
) -> None:
    memory = Memory(available)
    size = FlushSize(capacity, memory)
    assert FLOOR_BYTES <= size.ceiling <= max(FLOOR_BYTES, min(CEILING_BYTES, capacity, available // MEMORY_SHARE))
    for flushed, seconds, memory.available in flushes:
        before = size.target
        size.note(flushed, seconds)
        assert FLOOR_BYTES <= size.target <= size.ceiling
        if memory.available < available // 4 or seconds > SLOW_SECONDS:
            assert size.target == max(FLOOR_BYTES, before // 2)
        else:
            assert before <= size.target <= 2 * before
    if flushes:
        sizes = [flushed for flushed, _, _ in flushes]
        assert (size.largest, size.smallest) == (max(sizes), min(sizes))


def test_description_names_sizes_reason_and_shrinking() -> None:
    size = FlushSize(10 * CEILING_BYTES, Memory(128_000_000))
    assert size.describe() == "nothing to flush"
    size.note(500_000, 0.1)
    size.note(1_500_000, 10.0)
    assert size.describe() == ("0.5 to 1.5 MB, at most 4.0 MB (available memory 0.1 GB ÷ 32), shrunk 1 time")
    few = FlushSize(4_000_000, Memory())
    few.note(1_000_000, 2.0)
    assert few.describe() == "1.0 to 1.0 MB, at most 4.0 MB (the slots of the slab)"
    many = FlushSize(10 * CEILING_BYTES, Memory())
    many.note(1_000_000, 2.0)
    assert many.describe().endswith("at most 16.8 MB (the fixed ceiling)")


# -- the planner -------------------------------------------------------------------------------------------

SHAPE = SlabShape(8, 4, 3, 4096)


class Planner:
    """A planner with slots to fill, and a clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, unique_keys: bool = False) -> None:
        self.now = 100.0
        monkeypatch.setattr(flushing, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.counts = Counts()
        self.ledger = KeyLedger(self.counts, unique_keys=unique_keys)
        self.planner = FlushPlanner(self.counts, self.ledger)
        self.planner.start(SHAPE, 2)
        self.pool = SlotPool(Slab.local(SHAPE))
        self.sequence = 0

    def fill(self, *keys: str, fate: Fate = Fate.STORED) -> SlotLease:
        """A slot with a row of each key, whose vectors are there."""
        rows = []
        for key in keys:
            self.sequence += 1
            self.ledger.begin(("E", key))
            rows.append((Row(Record(("E", key), "text")), self.sequence, content_hash("text")))
        lease = self.pool.lease(rows, fate)
        self.planner.filled(lease)
        for key, (_, sequence, _) in zip(keys, rows, strict=True):
            self.ledger.has_vector(("E", key), sequence)
        return lease

    def answer(self, flush: Flush, **what: Any) -> list[SlotLease]:
        return self.planner.flushed(Flushed(flush.number, 0, 10, len(flush.deletes), 0.01, **what))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Planner:
    return Planner(monkeypatch)


def test_a_flush_is_due_when_it_is_full_or_late_or_nothing_else_comes(plan: Planner) -> None:
    planner = plan.planner
    assert not planner.is_due(tight=True, now=True), "there is nothing to write"
    lease = plan.fill("a")
    assert not planner.is_due(tight=False, now=False)
    assert planner.is_due(tight=True, now=False)
    assert planner.is_due(tight=False, now=True)
    plan.now += MAX_WAIT_SECONDS + 1
    assert planner.is_due(tight=False, now=False), "the oldest row has waited long enough"
    plan.now -= MAX_WAIT_SECONDS + 1
    assert planner.size is not None
    planner.size.target = lease.size
    assert planner.is_due(tight=False, now=False), "full"


def test_many_notices_are_written_without_waiting_for_vectors(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushing, "NOTICE_ROWS", 3)
    plan.planner.reject(Reject(("E", "r"), "why", "detail"))
    plan.planner.delete([("E", "a")])
    assert not plan.planner.is_due(tight=False, now=False)
    plan.planner.delete([("E", "b"), ("E", "a")])
    assert plan.planner.is_due(tight=False, now=False)
    assert (plan.planner.has_many_notices, plan.planner.has_too_many_notices) == (True, False)
    plan.planner.delete([("E", key) for key in "cde"])
    assert plan.planner.has_too_many_notices


def test_a_flush_takes_slots_in_order_up_to_its_size_and_gives_them_back_once_committed(plan: Planner) -> None:
    leases = [plan.fill(f"a{n}", f"b{n}") for n in range(3)]
    assert plan.planner.size is not None
    plan.planner.size.target = leases[0].size + 1
    flush = plan.planner.take()
    assert [(rows.slot, rows.lease, rows.skip) for rows in flush.slots] == [(n, n + 1, ()) for n in range(2)]
    assert (plan.planner.slots, plan.counts.flushes, plan.counts.stored) == (3, 1, 0), "nothing is counted yet"
    assert ("E", "a0") in plan.ledger.being_written
    assert plan.answer(flush) == leases[:2]
    assert (plan.planner.slots, plan.counts.stored, plan.counts.bytes_written) == (1, 4, 10)
    assert ("E", "a0") not in plan.ledger.being_written
    assert plan.planner.take().number == 2


def test_rows_of_which_a_newer_one_can_be_stored_are_left_out(plan: Planner) -> None:
    old = plan.fill("a", "b")
    new = plan.fill("a", "c", fate=Fate.REUSED)
    flush = plan.planner.take()
    assert [rows.skip for rows in flush.slots] == [(0,), ()]
    assert plan.counts.superseded == 1
    assert plan.answer(flush) == [old, new]
    assert plan.counts == Counts(stored=1, reused=2, superseded=1, flushes=1, bytes_written=10, write_seconds=0.01)
    assert ("E", "a") not in plan.ledger


def test_what_the_database_refuses_or_another_program_has_written_is_counted_so(plan: Planner) -> None:
    lease = plan.fill("a", "b", "c")
    flush = plan.planner.take()
    plan.answer(flush, superseded=row_bits([(lease.slot, 0)]), rejected=row_bits([(lease.slot, 2)]))
    assert (plan.counts.superseded, plan.counts.stored, plan.counts.rejected) == (1, 1, 1)


def test_a_record_that_was_emptied_and_written_again_stays_unless_the_database_refuses_it(plan: Planner) -> None:
    for refused in (False, True):
        plan.planner.delete([("E", "a"), ("E", "z")])
        lease = plan.fill("a")
        flush = plan.planner.take()
        assert flush.deletes == (("E", "z"),), "a flush writes first, then removes"
        plan.answer(flush, rejected=row_bits([(lease.slot, 0)] if refused else []))
        assert plan.planner.notices == refused
    assert plan.planner.take().deletes == (("E", "a"),)


def test_a_stored_record_that_leaves_the_index_is_superseded(plan: Planner) -> None:
    plan.fill("a")
    plan.answer(plan.planner.take())
    plan.planner.delete([("E", "a")])
    plan.answer(plan.planner.take())
    assert (plan.counts.stored, plan.counts.superseded, plan.counts.deleted) == (0, 1, 1)
    plan.planner.delete([("E", "b")])
    plan.planner.keep(("E", "b"))
    assert plan.planner.notices == 0


def test_rejects_stay_until_they_are_committed_and_are_cut_to_what_a_message_holds(plan: Planner) -> None:
    for n in range(500):
        plan.planner.reject(Reject(("E" * 999, "r" * 999), "why", "d" * 9999, b"", n))
    sent: list[int] = []
    while plan.planner.notices:
        flush = plan.planner.take()
        assert len(pickle.dumps(flush)) < 64 * 1024
        assert plan.planner.unwritten
        before = plan.planner.notices
        plan.answer(flush)
        assert plan.planner.notices == before - len(flush.rejects)
        sent += [reject.position for reject in flush.rejects]
    assert sent == list(range(500))
    assert len(flush.rejects[0].detail) == flushing.REJECT_DETAIL_CHARS


def test_slots_of_unique_keys_are_counted_at_once_and_row_by_row_where_one_was_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Planner(monkeypatch, unique_keys=True)
    plan.fill("a", "b")
    plan.fill("c", "d").skip.add(1)
    plan.answer(plan.planner.take())
    assert plan.counts.stored == 3
    assert ("E", "a") not in plan.ledger.being_written


@pytest.mark.parametrize(("size", "count"), [(0, 1), (64 + 3, 1), (2 * (64 + 3), 2), (10**6, 3)])
def test_first_of_gives_at_least_one_and_no_more_than_fit(size: int, count: int) -> None:
    assert first_of(["abc", "abc", "abc"], size) == count
    assert first_of([], size) == 0
