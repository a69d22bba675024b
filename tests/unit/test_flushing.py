from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast.flushing import CEILING_BYTES, FLOOR_BYTES, MEMORY_SHARE, QUICK_SECONDS, SLOW_SECONDS, FlushSize

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
            assert before <= size.target <= before * 3 // 2
    if flushes:
        sizes = [flushed for flushed, _, _ in flushes]
        assert (size.largest, size.smallest) == (max(sizes), min(sizes))


def test_description_names_sizes_reason_and_shrinking() -> None:
    size = FlushSize(10 * CEILING_BYTES, Memory(128_000_000))
    assert size.describe() == "nothing to flush"
    size.note(500_000, 0.1)
    size.note(1_500_000, 10.0)
    assert size.describe() == ("0.5 to 1.5 MB, at most 4.0 MB (available memory 0.1 GB ÷ 32), shrunk 1 times")
    few = FlushSize(4_000_000, Memory())
    few.note(1_000_000, 2.0)
    assert few.describe() == "1.0 to 1.0 MB, at most 4.0 MB (the slots of the slab)"
    many = FlushSize(10 * CEILING_BYTES, Memory())
    many.note(1_000_000, 2.0)
    assert many.describe().endswith("at most 16.8 MB (the fixed ceiling)")
