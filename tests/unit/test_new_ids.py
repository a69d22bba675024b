"""Ids of new rows: UUIDs of version 7, in ascending order."""

from __future__ import annotations

import re
import time
import uuid

from kdb_fast.stores.new_ids import new_ids


def texts(n: int) -> list[str]:
    return [row.tobytes().decode() for row in new_ids(n)]


def test_ids_are_uuids_of_version_7_with_the_time_now() -> None:
    before = time.time_ns() // 1_000_000
    ids = texts(500)
    after = time.time_ns() // 1_000_000
    for text in ids:
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text)
        value = uuid.UUID(text)
        assert (value.variant, str(value)) == (uuid.RFC_4122, text)
        assert before <= value.int >> 80 <= after
    assert len(set(ids)) == 500


def test_ids_ascend_also_beyond_what_the_counter_holds() -> None:
    ids = texts(10_000)
    assert ids == sorted(ids)
    assert len(set(ids)) == 10_000
    # The counter starts anew in the next millisecond.
    assert [int(text[15:18], 16) for text in (ids[4095], ids[4096])] == [4095, 0]
    assert (uuid.UUID(ids[4096]).int >> 80) - (uuid.UUID(ids[4095]).int >> 80) == 1


def test_every_bit_behind_the_counter_varies() -> None:
    ones = zeros = 0
    for text in texts(500):
        ones |= uuid.UUID(text).int
        zeros |= ~uuid.UUID(text).int
    random_bits = (1 << 62) - 1
    assert ones & zeros & random_bits == random_bits


def test_ids_of_two_calls_differ() -> None:
    assert not set(texts(200)) & set(texts(200))


def test_none_are_made_for_no_rows() -> None:
    assert texts(0) == []
