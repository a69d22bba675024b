"""How a flush is divided, so that no row is locked for long."""

from __future__ import annotations

import pytest

from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record
from kdb_fast.stores.base import FlushResult, FlushSlot
from kdb_fast.stores.flush_parts import AIM_SECONDS, FIRST_ROWS, PartSize, first_part


def slots(*sizes: int) -> list[FlushSlot]:
    """Slots of so many rows, of which the first is left out."""
    slab = Slab.local(SlabShape(len(sizes), max(sizes), 2))
    for slot, size in zip(slab.slots, sizes, strict=True):
        slot.put(1, [Row(Record((str(i),), "text")) for i in range(size)], [NO_VALUE] * size)
    return [FlushSlot(slot, frozenset({0})) for slot in slab.slots]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 100])
def test_each_row_is_in_one_part(rows: int) -> None:
    seen: list[tuple[int, int]] = []
    rest = slots(3, 5, 1, 4)
    while rest:
        part, rest = first_part(rest, rows)
        written = [(s.slot.number, i) for s in part for i in range(s.slot.rows) if i not in s.skip]
        assert len(written) == rows or (not rest and 0 < len(written) <= rows)
        seen += written
    assert seen == [(number, i) for number, size in enumerate((3, 5, 1, 4)) for i in range(1, size)]


def test_an_empty_flush_is_one_part() -> None:
    assert first_part([], 5) == ([], [])


def test_size_follows_the_time_that_a_row_takes() -> None:
    size = PartSize()
    for _ in range(5):
        size.note(size.rows, size.rows * 0.003)  # 3 ms a row, as with a large index
    assert size.rows == int(AIM_SECONDS / 0.003)
    for _ in range(5):
        size.note(size.rows, size.rows * 0.00003)
    assert size.rows == pytest.approx(AIM_SECONDS / 0.00003, abs=1)
    rows = size.rows
    size.note(10, 0.001)  # tells little
    assert size.rows == rows
    size.note(rows, 30.0)
    assert size.rows == int(rows * AIM_SECONDS / 30.0) < FIRST_ROWS
    size.note(1, 1.0)
    assert size.rows == 1
    size.note(0, 9.0)
    size.note(1, 0.0)
    assert size.rows == 4


def test_results_of_parts_add_up() -> None:
    one = FlushResult(1, 2, 3, ((0, 1),), ((0, 2, "a", "b"),))
    assert FlushResult().plus(one).plus(FlushResult(4, 0, 1, ((1, 1),))) == FlushResult(
        5, 2, 4, ((0, 1), (1, 1)), ((0, 2, "a", "b"),)
    )
