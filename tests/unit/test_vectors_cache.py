from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kdb_fast.embedding.vector_cache import CACHE_BYTES, VectorCache

DIMENSIONS = 3


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def vectors(numbers: list[int]) -> np.ndarray:
    """The vector of each text, told from all others by its numbers."""
    return np.array([[n, n + 0.5, -n] for n in numbers], dtype=np.float32).reshape(len(numbers), DIMENSIONS)


def put(cache: VectorCache, numbers: list[int]) -> None:
    cache.put([digest(n) for n in numbers], vectors(numbers))


def take(cache: VectorCache, number: int) -> list[float]:
    return [float(v) for v in cache.take(digest(number))]


def expected(number: int) -> list[float]:
    return [float(v) for v in vectors([number])[0]]


@pytest.fixture
def cache() -> VectorCache:
    return VectorCache(DIMENSIONS, 0)


def test_size_follows_bytes_and_dimensions_but_is_never_tiny() -> None:
    assert VectorCache(384).capacity == CACHE_BYTES // (4 * 384)
    assert VectorCache(384, 0).capacity == 256


def test_what_is_pinned_can_be_taken_as_often(cache: VectorCache) -> None:
    put(cache, [1, 2])
    cache.pin(digest(1))
    cache.pin(digest(1))
    assert take(cache, 1) == expected(1)
    assert take(cache, 1) == expected(1)
    with pytest.raises(KeyError):
        cache.take(digest(1))
    assert digest(1) in cache, "it is still in the ring"


def test_only_what_is_in_the_cache_can_be_pinned(cache: VectorCache) -> None:
    with pytest.raises(KeyError):
        cache.pin(digest(1))
    put(cache, [1])
    with pytest.raises(KeyError):
        cache.take(digest(1))


def test_the_oldest_go_first(cache: VectorCache) -> None:
    put(cache, list(range(cache.capacity)))
    put(cache, [1000])
    assert digest(0) not in cache
    assert digest(1) in cache
    assert digest(1000) in cache


def test_a_put_across_the_end_of_the_ring_keeps_every_row_with_its_text(cache: VectorCache) -> None:
    put(cache, list(range(200)))
    put(cache, list(range(200, 400)))
    for number in range(400):
        assert (digest(number) in cache) == (number >= 400 - cache.capacity)
    for number in range(400 - cache.capacity, 400):
        cache.pin(digest(number))
        assert take(cache, number) == expected(number)


def test_more_than_fits_at_once_leaves_the_last(cache: VectorCache) -> None:
    put(cache, list(range(700)))
    assert [n for n in range(700) if digest(n) in cache] == list(range(700 - cache.capacity, 700))


def test_a_pinned_vector_outlives_its_place_in_the_ring(cache: VectorCache) -> None:
    put(cache, [7])
    cache.pin(digest(7))
    put(cache, list(range(1000, 1000 + cache.capacity)))
    assert digest(7) in cache
    cache.pin(digest(7))
    assert take(cache, 7) == expected(7)
    assert digest(7) in cache
    assert take(cache, 7) == expected(7)
    assert digest(7) not in cache


def test_a_text_put_again_is_kept_from_its_newer_place(cache: VectorCache) -> None:
    put(cache, [7])
    put(cache, list(range(1000, 1100)))
    put(cache, [7])
    put(cache, list(range(2000, 2000 + cache.capacity - 101)))  # the older place is overwritten
    assert digest(7) in cache
    cache.pin(digest(7))
    assert take(cache, 7) == expected(7)


def test_what_was_dropped_is_gone_and_may_come_again(cache: VectorCache) -> None:
    put(cache, [7])
    cache.drop(digest(7))
    cache.drop(digest(7))
    assert digest(7) not in cache
    put(cache, list(range(1000, 1000 + cache.capacity)))
    put(cache, [7])
    assert digest(7) in cache


def test_a_vector_taken_is_not_changed_by_what_comes_later(cache: VectorCache) -> None:
    put(cache, [7])
    cache.pin(digest(7))
    vector = cache.take(digest(7))
    put(cache, list(range(1000, 1000 + 2 * cache.capacity)))
    assert [float(v) for v in vector] == expected(7)


def test_nothing_put_changes_nothing(cache: VectorCache) -> None:
    put(cache, [])
    assert digest(0) not in cache


class CacheModel(RuleBasedStateMachine):
    """The cache against a list of all that was ever put, a set of what was dropped and counts of pins."""

    numbers = st.integers(0, 600)

    @initialize()
    def start(self) -> None:
        self.cache = VectorCache(DIMENSIONS, 0)
        self.put_so_far: list[int | None] = []
        self.pins: dict[int, int] = {}

    def ring(self) -> set[int]:
        """Texts whose last put is among the last ``capacity`` ones."""
        recent = self.put_so_far[-self.cache.capacity :]
        return {n for n in recent if n is not None}

    @rule(first=numbers, count=st.integers(0, 300), step=st.sampled_from([1, 2, 7]))
    def put(self, first: int, count: int, step: int) -> None:
        numbers = list(dict.fromkeys((first + i * step) % 600 for i in range(count)))
        put(self.cache, numbers)
        # A text has one place, the newest.
        again = set(numbers)
        self.put_so_far = [None if n in again else n for n in self.put_so_far]
        self.put_so_far += numbers

    @rule(number=numbers)
    def pin(self, number: int) -> None:
        if number in self.ring() or number in self.pins:
            self.cache.pin(digest(number))
            self.pins[number] = self.pins.get(number, 0) + 1
        else:
            assert digest(number) not in self.cache

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.pins)))
        assert take(self.cache, number) == expected(number)
        self.pins[number] -= 1
        if not self.pins[number]:
            del self.pins[number]

    @rule(number=numbers)
    def drop(self, number: int) -> None:
        self.cache.drop(digest(number))
        self.put_so_far = [None if n == number else n for n in self.put_so_far]

    @invariant()
    def the_same_texts_are_there(self) -> None:
        if hasattr(self, "cache"):
            there = {n for n in range(600) if digest(n) in self.cache}
            assert there == self.ring() | set(self.pins)


TestCacheModel = CacheModel.TestCase
TestCacheModel.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
