"""Which slots are free, and what an answer is about."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from kdb_fast.accounting import Fate
from kdb_fast.errors import KdbFastError
from kdb_fast.indexing.leases import ROW_OVERHEAD_BYTES, Numbered, SlotPool, microseconds
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record, content_hash

MOMENT = datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))


def pool_of(slots: int) -> SlotPool:
    return SlotPool(Slab.local(SlabShape(slots, 4, 3, 1024)))


def numbered(number: int) -> Numbered:
    return Row(Record(("E", f"r{number}"), "text", MOMENT), True, 7), number, content_hash(str(number))


def test_a_lease_puts_rows_into_a_free_slot_and_knows_what_is_in_it() -> None:
    pool = pool_of(2)
    lease = pool.lease([numbered(5), numbered(3)], Fate.STORED)
    slot = pool.slab.slots[lease.slot]
    assert slot.lease == lease.number
    assert slot.raw_rows() == [(b"E\0r5", b"text"), (b"E\0r3", b"text")]
    assert (slot.exists[:2].tolist(), slot.row_version[:2].tolist()) == ([1, 1], [7, 7])
    assert slot.source_at[:2].tolist() == [microseconds(MOMENT)] * 2
    assert (lease.sequences, lease.hashes, lease.fate) == ([5, 3], [content_hash("5"), content_hash("3")], Fate.STORED)
    assert lease.size == slot.text_bytes + 2 * (4 * 3 + ROW_OVERHEAD_BYTES)
    assert (pool.free, pool.leased) == (1, 1)
    assert pool.of(lease.slot, lease.number) is lease


def test_an_answer_about_an_earlier_use_of_a_slot_is_told() -> None:
    pool = pool_of(1)
    first = pool.lease([numbered(1)], Fate.STORED)
    pool.release(first.slot)
    second = pool.lease([numbered(2)], Fate.REUSED)
    assert (second.slot, pool.free) == (first.slot, 0)
    with pytest.raises(KdbFastError, match=r"filled for another use; this is a defect of kdb-fast"):
        pool.of(first.slot, first.number)


def test_a_slot_is_used_again_after_all_that_were_free_before_it() -> None:
    pool = pool_of(3)
    first = pool.lease([numbered(1)], Fate.STORED)
    pool.release(first.slot)
    assert [pool.lease([numbered(n)], Fate.STORED).slot for n in range(3)] == [1, 2, 0]
    with pytest.raises(IndexError):
        pool.lease([numbered(4)], Fate.STORED)


def test_microseconds_of_no_moment_and_of_one_without_a_zone() -> None:
    assert microseconds(None) == NO_VALUE
    assert (
        microseconds(datetime(1970, 1, 1, 0, 0, 1)) == microseconds(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)) == 10**6
    )
