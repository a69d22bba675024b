"""Equal texts are embedded once, and each of their rows gets the vector."""

from __future__ import annotations

import numpy as np
import pytest

from kdb_fast.indexing.leases import Numbered
from kdb_fast.indexing.text_reuse import Placement, TextReuse
from kdb_fast.ipc.slab import Row
from kdb_fast.records import Record

FIT, UNFIT = np.zeros(1, np.uint8), np.full(1, 3, np.uint8)


def numbered(number: int, text: str) -> Numbered:
    return Row(Record(("E", f"r{number}"), text)), number, text.encode()


def vectors(*values: float) -> np.ndarray:
    return np.array([[value, 0.0] for value in values], dtype=np.float32)


def test_the_first_row_of_a_text_is_embedded_and_its_equals_wait_for_it() -> None:
    reuse = TextReuse(2)
    rows = [numbered(n, "same") for n in range(3)]
    assert [reuse.place(row) for row in rows] == [Placement.NEW, Placement.WAITING, Placement.WAITING]
    assert reuse.place(numbered(3, "other")) is Placement.NEW
    assert (reuse.waiting, reuse.ready) == (2, [])
    assert reuse.filled([b"same"], vectors(7), FIT) == [(rows[1:], 0)]
    assert (reuse.waiting, reuse.ready) == (0, rows[1:])
    late = numbered(4, "same")
    assert reuse.place(late) is Placement.CACHED
    assert reuse.take(9, 1000) == [*rows[1:], late]
    for _ in range(3):
        assert reuse.vector(b"same")[0] == 7
    with pytest.raises(KeyError):
        reuse.vector(b"same")


def test_a_vector_stays_for_the_rows_that_have_it_whatever_comes_meanwhile() -> None:
    reuse = TextReuse(2)
    reuse.place(numbered(0, "same"))
    reuse.filled([b"same"], vectors(7), FIT)
    reuse.place(numbered(1, "same"))
    capacity = reuse._cache.capacity
    for first in range(0, capacity, 64):
        hashes = [b"%d" % n for n in range(first, first + 64)]
        reuse.filled(hashes, vectors(*range(64)), np.zeros(64, np.uint8))
    assert reuse.place(numbered(2, "same")) is Placement.CACHED, "pinned"
    for _ in range(2):
        assert reuse.vector(b"same")[0] == 7
    assert reuse.place(numbered(3, "same")) is Placement.NEW, "forgotten"


def test_rows_that_wait_for_an_unfit_text_are_given_back_and_its_vector_is_not_kept() -> None:
    reuse = TextReuse(2)
    first, second = numbered(0, "bad"), numbered(1, "bad")
    reuse.place(first)
    reuse.place(second)
    assert reuse.filled([b"bad"], vectors(np.nan), UNFIT) == [([second], 3)]
    assert (reuse.waiting, reuse.ready) == (0, [])
    assert reuse.place(numbered(2, "bad")) is Placement.NEW


def test_rows_are_taken_as_many_as_fit_a_slot_and_at_least_one() -> None:
    reuse = TextReuse(2)
    reuse.place(numbered(0, "x" * 20))
    reuse.filled([b"x" * 20], vectors(1), FIT)
    rows = [numbered(n, "x" * 20) for n in range(1, 6)]
    for row in rows:
        reuse.place(row)
    assert reuse.take(2, 1000) == rows[:2]
    assert reuse.take(9, 50) == rows[2:4]  # 23 bytes each, with the key
    assert reuse.take(9, 1) == rows[4:]
    assert reuse.take(9, 1) == []


def test_what_waits_can_be_forgotten() -> None:
    reuse = TextReuse(2)
    reuse.place(numbered(0, "same"))
    reuse.place(numbered(1, "same"))
    reuse.forget_waiting()
    assert reuse.waiting == 0
    assert reuse.filled([b"same"], vectors(1), FIT) == []
