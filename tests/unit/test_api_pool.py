"""The pool of threads that wait for a provider: it wakes whoever waits for it, and may be closed at any time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from kdb_fast.embedding.providers.base import EmbeddingProvider
from kdb_fast.engine.api_pool import ApiPool
from kdb_fast.engine.base import Event, SlotFilled, wait_for
from kdb_fast.errors import ProviderInputError, UsageError
from kdb_fast.ipc.row_block import NO_VALUE, ROW_NOT_ENCODABLE, ROW_OK
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record

DEADLINE = 30.0


class Gated(EmbeddingProvider):
    """Answers once its gate is open. It refuses the text "bad" and ends at the text "end"."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.asked = threading.Semaphore(0)

    @property
    def dimensions(self) -> int:
        return 2

    @property
    def model_name(self) -> str:
        return "gated"

    def embed(self, text: str) -> list[float]:
        return [1.0, 0.0]

    def embed_batch(self, texts: Sequence[str]) -> list[list[float]]:
        if "text" not in texts[0]:
            return [[1.0, 0.0] for _ in texts]
        self.asked.release()
        assert self.gate.wait(DEADLINE)
        for i, text in enumerate(texts):
            if "bad" in text:
                raise ProviderInputError(i, "not that one")
            if "end" in text:
                raise UsageError("the quota is exhausted")
        return [[1.0, 0.0] for _ in texts]


@pytest.fixture
def provider() -> Gated:
    return Gated()


@pytest.fixture
def pool(provider: Gated) -> Iterator[ApiPool]:
    pool = ApiPool(Slab.local(SlabShape(4, 4, 2, 4096)), provider, threads=2)
    yield pool
    provider.gate.set()
    pool.close()


def give(pool: ApiPool, slot: int, *texts: str) -> None:
    rows = [Row(Record(("E", f"r{i}"), f"text {text}")) for i, text in enumerate(texts)]
    pool._slab.slots[slot].put(slot + 10, rows, [NO_VALUE] * len(rows))
    pool.embed(slot, slot + 10, len(rows))


def filled(pool: ApiPool, slots: int) -> list[SlotFilled]:
    events: list[Event] = []
    while len(events) < slots:
        new = wait_for((pool,), DEADLINE)
        assert new, "nobody was woken"
        events += new
    return [event for event in events if isinstance(event, SlotFilled)]


def test_an_answer_wakes_who_waits(pool: ApiPool, provider: Gated) -> None:
    give(pool, 0, "a", "b")
    give(pool, 1, "c")
    assert not pool.wants_work()
    assert wait_for((pool,), 0.0) == []
    threading.Timer(0.05, provider.gate.set).start()
    assert sorted((event.slot, event.lease) for event in filled(pool, 2)) == [(0, 10), (1, 11)]
    assert pool.wants_work()
    assert pool._slab.slots[0].vectors[:2].tolist() == [[1, 0], [1, 0]]


def test_a_refused_text_is_marked_and_the_others_are_embedded(pool: ApiPool, provider: Gated) -> None:
    provider.gate.set()
    give(pool, 0, "a", "bad", "b")
    filled(pool, 1)
    slot = pool._slab.slots[0]
    assert slot.code[:3].tolist() == [ROW_OK, ROW_NOT_ENCODABLE, ROW_OK]
    assert slot.vectors[:3].tolist() == [[1, 0], [0, 0], [1, 0]]


def test_what_the_provider_cannot_go_on_for_is_raised(pool: ApiPool, provider: Gated) -> None:
    provider.gate.set()
    give(pool, 0, "end")
    with pytest.raises(UsageError, match="the quota is exhausted"):
        filled(pool, 1)


def test_only_what_no_thread_has_begun_is_cancelled(pool: ApiPool, provider: Gated) -> None:
    for slot in range(4):
        give(pool, slot, "a")
    for _ in range(2):
        assert provider.asked.acquire(timeout=DEADLINE)
    cancelled = pool.cancel()
    assert len(cancelled) == 2
    provider.gate.set()
    assert {event.slot for event in filled(pool, 2)} == {0, 1, 2, 3} - cancelled


def test_an_answer_after_the_end_is_thrown_away(
    provider: Gated, new_threads: Callable[[str], list[threading.Thread]]
) -> None:
    pool = ApiPool(Slab.local(SlabShape(1, 4, 2, 4096)), provider, threads=1)
    (thread,) = new_threads("provider-1")
    give(pool, 0, "a")
    assert provider.asked.acquire(timeout=DEADLINE)
    pool.close()
    pool.close()
    ends = os.pipe()  # most likely the same descriptors
    provider.gate.set()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    os.set_blocking(ends[0], False)
    with pytest.raises(BlockingIOError):
        os.read(ends[0], 1)
    for end in ends:
        os.close(end)
