"""The pipeline against an engine and a store that a test (or chance, by a seed) controls.

The fake writer has the rules of the real ones: one flush at a time, a row is written if there is none of its key,
if the index's row is the one the parent saw, or if this run wrote it; else it is lost to another program.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from zlib import crc32

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdb_fast.accounting import Counts
from kdb_fast.embedding.vector_cache import VectorCache
from kdb_fast.engine.base import Engine, Event, Note, Pool, SlotFilled, Writer
from kdb_fast.errors import RejectLimitError
from kdb_fast.indexing import flushing, intake
from kdb_fast.indexing import pipeline as module
from kdb_fast.indexing.flushing import FlushSize
from kdb_fast.indexing.leases import microseconds
from kdb_fast.indexing.piece_ledger import PieceLedger
from kdb_fast.indexing.pipeline import Pipeline, StopRequested
from kdb_fast.indexing.progress import Silent
from kdb_fast.ipc.messages import (
    Busy,
    Finish,
    Finished,
    Flush,
    Flushed,
    IndexPrepared,
    PrepareIndex,
    row_bits,
    rows_of_bits,
)
from kdb_fast.ipc.row_block import NO_VALUE, ROW_NOT_FINITE
from kdb_fast.ipc.slab import Slab, SlabShape
from kdb_fast.records import MAX_CONTENT_BYTES, Key, Record, Reject, content_hash, decode_key
from kdb_fast.settings import RejectLimit
from kdb_fast.stores.base import Answer, Found, Store, Stored
from kdb_fast.tables.index_policy import IndexAction, IndexOutcome
from kdb_fast.tables.kdb_search import unfit
from kdb_fast.tables.pieces import piece_of, record_key

FINGERPRINT = "of this model"
DIMENSIONS = 4
BAD = "☠"
"""A text with this character is one that the model cannot embed."""
REFUSED = "⛔"
"""A text with this character is one that the database refuses."""
NO_LIMIT = RejectLimit(share=1.0)
Item = Record | Reject


def vector_of(text: str) -> np.ndarray:
    """The vector of a text: four numbers that no other text has."""
    raw = np.frombuffer(hashlib.sha256(text.encode()).digest()[: 2 * DIMENSIONS], dtype=np.uint16)
    return raw.astype(np.float32) + 1


class Entry(NamedTuple):
    """A row of the index."""

    content: str
    row_version: int
    fingerprint: str | None = None
    run: int | None = None


@dataclass
class Index:
    """The search index, the rejects and what was deleted: what a database would hold."""

    rows: dict[Key, Entry] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    deletes: list[Key] = field(default_factory=list)
    has_vector_index: bool = False
    run: int = 1
    clock: int = 0
    lookups: int = 0

    def write(self, key: Key, content: str, fingerprint: str | None, run: int | None) -> None:
        self.clock += 1
        self.rows[key] = Entry(content, self.clock, fingerprint, run)

    def contents(self) -> dict[Key, str]:
        return {key: entry.content for key, entry in self.rows.items()}

    # What the pipeline asks of a store.

    def count(self) -> int:
        return len(self.rows)

    def is_empty(self) -> bool:
        return not self.rows

    def build_outlook(self, rows: int, dimensions: int) -> tuple[str, ...]:
        return (f"An index of {rows} vectors of {dimensions} numbers is large",) if rows >= 1000 else ()

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        self.lookups += 1
        found = {key: self.rows[key] for key in keys if key in self.rows}
        return {key: Stored(content_hash(e.content), e.fingerprint, e.row_version) for key, e in found.items()}

    def compare(self, records: Sequence[Record], hashes: Sequence[bytes], fingerprint: str) -> Answer:
        return lambda: self._compare([record.key for record in records], hashes, fingerprint)

    def _compare(self, keys: Sequence[Key], hashes: Sequence[bytes], fingerprint: str) -> Found:
        rows, wanted = self.lookup(keys), dict(zip(keys, hashes, strict=True))
        same = {k for k, row in rows.items() if (row.content_hash, row.fingerprint) == (wanted[k], fingerprint)}
        places = {place for place, key in enumerate(keys) if key in same}
        return Found({key: row for key, row in rows.items() if key not in same}, places)


class Watch(Silent):
    """Hears what a run tells."""

    def __init__(self, on_update: Callable[[], None] = lambda: None) -> None:
        self.notes: list[str] = []
        self.done: list[str] = []
        self.steps: list[str] = []
        self._on_update = on_update

    def step(self, text: str) -> None:
        self.steps.append(text)

    def update(self, counts: Counts) -> None:
        self._on_update()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def doing(self, text: str) -> None:
        self.done.append(text)


class FakeEngine(Engine, Pool, Writer):
    """Embeds and writes when it is polled, in an order that ``choose`` decides.

    Args:
        choose: Given what could happen now, as (kind, slot) pairs, returns what happens, in order.
    """

    def __init__(
        self,
        index: Index,
        shape: SlabShape,
        workers: int = 2,
        choose: Callable[[list[tuple[str, int]]], list[tuple[str, int]]] | None = None,
    ) -> None:
        self.slab = Slab.local(shape)
        self.pool = self.writer = self
        self.workers = workers
        self.index = index
        self.choose = choose or (lambda possible: possible)
        self.embedded: Counter[str] = Counter()
        self.delivered: set[Key] = set()
        self.requests: list[Flush | PrepareIndex | Finish] = []
        self.starts: list[tuple[int, bool]] = []
        self.prepare_outcome = IndexOutcome(IndexAction.DROPPED)
        self.finish_outcome = IndexOutcome(IndexAction.KEPT)
        self.before_poll: Callable[[], None] = lambda: None
        self.notes: list[str] = []
        self.busy: list[str] = []
        self._orders: dict[int, tuple[int, int, list[tuple[bytes, bytes]]]] = {}
        self._crcs: dict[tuple[int, int], tuple[tuple[int, int, int], ...]] = {}
        self._request: Flush | PrepareIndex | Finish | None = None
        self._in_vain = 0

    # -- the engine's face

    def embed(self, slot: int, lease: int, rows: int) -> None:
        assert slot not in self._orders, "a slot is embedded twice at a time"
        assert slot not in self._slots_of_flush(), "a slot is used again before it was written"
        assert self.slab.slots[slot].lease == lease
        self._orders[slot] = (lease, rows, self.slab.slots[slot].raw_rows())

    def wants_work(self) -> bool:
        return len(self._orders) < 2 * max(1, self.workers)

    def request(self, message: Flush | PrepareIndex | Finish) -> None:
        assert self._request is None, "the writer is given one thing at a time"
        if isinstance(message, Flush):
            assert message.number == len([r for r in self.requests if isinstance(r, Flush)]) + 1
        self._request = message
        self.requests.append(message)

    @property
    def idle(self) -> bool:
        return self._request is None

    def waitables(self) -> list[Any]:
        return []

    def collect(self, ready: set[Any]) -> list[Event]:
        raise AssertionError("poll() is all of it")

    def poll(self, timeout: float) -> list[Event]:
        self.before_poll()
        possible = [("embed", slot) for slot in self._orders]
        if self._request is not None:
            possible.append(("write", -1))
        self._in_vain = 0 if possible else self._in_vain + 1
        assert self._in_vain < 1000, "the pipeline waits for something that will never come"
        events: list[Event] = [Note(self.notes.pop())] if self.notes else []
        events += [Busy(self.busy.pop())] if self.busy else []
        for kind, slot in self.choose(possible):
            events.append(self._embed(slot) if kind == "embed" else self._answer())
        return events

    def cancel(self) -> set[int]:
        cancelled = set(list(self._orders)[max(1, self.workers) :])
        for slot in cancelled:
            del self._orders[slot]
        return cancelled

    def close(self, *, kill: bool = False) -> None:
        self.slab.close()

    # -- what workers and writer do

    def _embed(self, number: int) -> SlotFilled:
        lease, rows, raw = self._orders.pop(number)
        slot = self.slab.slots[number]
        assert (slot.lease, slot.rows, slot.raw_rows()) == (lease, rows, raw), "the slot was touched"
        for i, (key, text) in enumerate(raw):
            content = text.decode()
            self.embedded[content] += 1
            if BAD in content:
                slot.vectors[i] = np.nan
                slot.code[i] = ROW_NOT_FINITE
            else:
                slot.vectors[i] = vector_of(content)
                self.delivered.add(decode_key(key))
        middle = rows // 2
        crcs = tuple((a, b, crc32(slot.vectors[a:b].data.cast("B"))) for a, b in ((0, middle), (middle, rows)) if b > a)
        self._crcs[number, lease] = crcs
        return SlotFilled(number, lease, 3 * rows, 4 * rows, 0, 0.01, crcs)

    def _answer(self) -> Flushed | IndexPrepared | Finished:
        message, self._request = self._request, None
        if isinstance(message, Flush):
            return self._write(message)
        if isinstance(message, PrepareIndex):
            return IndexPrepared(self.prepare_outcome)
        assert isinstance(message, Finish)
        return Finished(len(message.prune), self.finish_outcome, 0.5, ("said at the end",))

    def _write(self, message: Flush) -> Flushed:
        lost, refused, seen = [], [], set()
        rows = 0
        for given_rows in message.slots:
            slot = self.slab.slots[given_rows.slot]
            assert slot.lease == given_rows.lease
            assert given_rows.slot not in self._orders, "a slot is written while it is embedded"
            assert given_rows.crcs == self._crcs.get((given_rows.slot, given_rows.lease), ())
            for start, stop, crc in given_rows.crcs:
                assert crc32(slot.vectors[start:stop].data.cast("B")) == crc
            for i, (raw_key, text) in enumerate(slot.raw_rows()):
                if i in given_rows.skip:
                    continue
                key, content = decode_key(raw_key), text.decode()
                assert slot.code[i] == 0
                assert key not in seen, "a key is twice in one transaction"
                seen.add(key)
                np.testing.assert_array_equal(slot.vectors[i], vector_of(content), "a vector of another text")
                there = self.index.rows.get(key)
                if REFUSED in content:
                    refused.append((slot.number, i))
                elif (
                    there is None
                    or there.run == self.index.run
                    or (slot.exists[i] and slot.row_version[i] == there.row_version)
                ):
                    self.index.write(key, content, FINGERPRINT, self.index.run)
                    rows += 1
                else:
                    lost.append((slot.number, i))
        self.index.rejects += message.rejects
        self.index.deletes += message.deletes
        for key in message.deletes:
            self.index.rows.pop(key, None)
        return Flushed(message.number, rows, 10 * rows, len(message.deletes), 0.01, row_bits(lost), row_bits(refused))

    def _slots_of_flush(self) -> set[int]:
        return {rows.slot for rows in self._request.slots} if isinstance(self._request, Flush) else set()


def by_chance(seed: int) -> Callable[[list[tuple[str, int]]], list[tuple[str, int]]]:
    """Some of what is possible, in any order; now and then nothing."""
    chance = random.Random(seed)
    return lambda possible: chance.sample(possible, chance.randint(0, len(possible)))


class Run:
    """A pipeline with its fakes, and what it knows at the end."""

    def __init__(
        self,
        index: Index | None = None,
        *,
        shape: SlabShape | None = None,
        workers: int = 2,
        choose: Callable[[list[tuple[str, int]]], list[tuple[str, int]]] | None = None,
        max_rejects: RejectLimit = NO_LIMIT,
        **options: Any,
    ) -> None:
        self.index = index if index is not None else Index()
        self.engine = FakeEngine(self.index, shape or SlabShape(6, 4, DIMENSIONS, 8192), workers, choose)
        self.phases: set[str] = set()
        self.pipeline = Pipeline(
            store=cast(Store, self.index),
            start_engine=self._start,
            fingerprint=FINGERPRINT,
            dimensions=DIMENSIONS,
            read_chars=100,
            max_rejects=max_rejects,
            on_phase=self.phases.add,
            **options,
        )

    def _start(self, rows: int, more: bool) -> Engine:
        self.engine.starts.append((rows, more))
        return self.engine

    @property
    def counts(self) -> Counts:
        return self.pipeline.counts

    def go(self, items: Sequence[Item], page: int = 5, **options: Any) -> Run:
        self.pipeline.run(pages(items, page), **options)
        return self

    def assert_all_is_given_back(self) -> None:
        p = self.pipeline
        if p._slots is not None:
            assert sorted(p._slots._free) == list(range(self.engine.slab.shape.slots)), "every slot is free"
            assert not p._slots._leased
        f = p.flushes
        for left in (f._filled, f._writing, p._reuse.ready, p._shards, p._intake.window, f._rejects, f._deletes):
            assert not left
        assert not p._reuse._on_the_way
        assert p._reuse.waiting == f._filled_bytes == 0
        assert not p._reuse._cache._pinned, "every pinned vector was taken"
        assert not p._ledger._latest
        assert not p._ledger._in_flight, "nothing in flight is remembered"

    def assert_all_is_accounted_for(self, items: Sequence[Item]) -> None:
        c = self.counts
        assert c.read == len(items)
        assert c.read == c.stored + c.unchanged + c.reused + c.superseded + c.rejected
        assert min(c.stored, c.unchanged, c.reused, c.superseded, c.rejected) >= 0


def pages(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def record(number: int, content: str, entity: str = "E") -> Record:
    return Record((entity, f"r{number}"), content)


def is_good(item: Item) -> bool:
    """Whether a record ends in the index, if no later one of its key does."""
    return isinstance(item, Record) and unfit(item) is None and BAD not in item.content and REFUSED not in item.content


def last_good(items: Sequence[Item], initial: dict[Key, str]) -> dict[Key, str]:
    """The index as it must be at the end: the last fit record of each key wins."""
    return initial | {i.key: i.content for i in items if is_good(i) and isinstance(i, Record)}


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds at the size of the tests, and no look at the machine's memory."""
    with_small_thresholds(monkeypatch)


def with_small_thresholds(patch: pytest.MonkeyPatch, *, eager: bool = False, window: int = 16) -> None:
    patch.setattr(module, "SHARD_ROWS", 4)
    for each in (module, intake):
        patch.setattr(each, "WINDOW_ROWS", window)
    patch.setattr(flushing, "FlushSize", lambda capacity: FlushSize(capacity, lambda: 10**10))
    # An eager pipeline writes whatever is filled; the other waits until slots are short or all is embedded.
    patch.setattr(flushing, "MAX_WAIT_SECONDS", -1.0 if eager else 1e9)


# -- any stream, any order ---------------------------------------------------------------------------------

TEXTS = ["red", "green", "a blue one", "yellow and long " * 3, "ünïcödé 日本", "red ", "x"]
UNFIT = ["", "  \n", "nul\0", "\ud800"]
ITEMS = st.lists(
    st.one_of(
        st.builds(record, st.integers(0, 7), st.sampled_from(TEXTS), st.sampled_from(["E", "F"])),
        st.builds(record, st.integers(0, 40), st.integers(0, 60).map(lambda n: f"text {n}")),
        st.builds(record, st.integers(0, 7), st.sampled_from([*UNFIT, f"{BAD}1", f"{BAD}2"])),
        st.builds(Reject, st.just("E"), st.just("r1"), st.just("broken_line"), st.just("not JSON")),
    ),
    max_size=70,
)
INITIAL = st.dictionaries(
    st.tuples(st.sampled_from(["E", "F"]), st.integers(0, 9).map(lambda n: f"r{n}")),
    st.tuples(st.sampled_from(TEXTS), st.sampled_from([FINGERPRINT, "of another model", None])),
    max_size=8,
)


class Setup(NamedTuple):
    """How a run is carried out: all of it must make no difference to what is in the index at the end."""

    seed: int
    page: int
    workers: int
    slots: int
    eager: bool
    window: int
    goal: int
    cache: int
    force: bool
    full_shards: bool

    def run(self, index: Index, patch: pytest.MonkeyPatch, pieces: bool = False, **options: Any) -> Run:
        if pieces:
            patch.setattr(sys.modules[__name__], "FakeEngine", PieceEngine)
            options["split"] = in_fives
        with_small_thresholds(patch, eager=self.eager, window=self.window)
        shape = SlabShape(self.slots, 4, DIMENSIONS, 8192)
        choose = by_chance(self.seed)
        run = Run(index, shape=shape, workers=self.workers, choose=choose, force=self.force, **options)
        run.pipeline._intake._goal = self.goal
        run.pipeline._reuse._cache = small_cache(self.cache)
        run.engine.full_shards = self.full_shards
        return run


SETUPS = st.builds(
    Setup,
    seed=st.integers(0, 2**32 - 1),
    page=st.integers(1, 20),
    workers=st.integers(0, 3),
    slots=st.integers(2, 9),
    eager=st.booleans(),
    window=st.integers(1, 24),
    goal=st.integers(1, 24),
    cache=st.sampled_from([4, 6, 256]),
    force=st.booleans(),
    full_shards=st.booleans(),
)


def small_cache(capacity: int) -> VectorCache:
    cache = VectorCache(DIMENSIONS, 0)
    cache.capacity = capacity
    cache._ring, cache._owner = cache._ring[:capacity], cache._owner[:capacity]
    return cache


def is_written(index: Index, key: Key, items: Sequence[Item]) -> bool:
    """Whether this run has written the row; or a record equals what was stored, and so outdates those before it."""
    entry = index.rows[key]
    return entry.run == index.run or any(
        i.key == key and isinstance(i, Record) and i.content == entry.content for i in items
    )


def index_of(initial: dict[Key, tuple[str, str | None]]) -> Index:
    index = Index(run=2)
    for key, (content, fingerprint) in initial.items():
        index.write(key, content, fingerprint, run=None if fingerprint is None else 1)
    return index


@settings(deadline=None, max_examples=300)
@given(ITEMS, INITIAL, SETUPS)
def test_any_stream_ends_with_the_last_fit_record_of_each_key(
    items: list[Item], initial: dict[Key, tuple[str, str | None]], setup: Setup
) -> None:
    index = index_of(initial)
    before = index.contents()
    with pytest.MonkeyPatch.context() as patch:
        run = setup.run(index, patch).go(items, setup.page)
    run.assert_all_is_accounted_for(items)
    run.assert_all_is_given_back()
    assert index.contents() == last_good(items, before)
    good = [i for i in items if is_good(i)]
    keys = {i.key for i in good}
    counts = run.counts
    assert counts.rejected == len(items) - len(good) == len(index.rejects)
    assert counts.stored + counts.reused + counts.unchanged == len(keys)
    assert counts.superseded == len(good) - len(keys)
    assert all(index.rows[key].fingerprint == FINGERPRINT for key in keys)
    if setup.force:
        assert counts.unchanged == 0
    if setup.cache == 256:
        twice = [text for text, times in run.engine.embedded.items() if times > 1 and BAD not in text]
        assert twice == [], "a text is embedded once"


# -- records in pieces -------------------------------------------------------------------------------------


def in_fives(text: str) -> list[tuple[int, int]]:
    """Pieces of five characters."""
    return [(start, min(start + 5, len(text))) for start in range(0, len(text), 5)]


class PieceEngine(FakeEngine):
    """Writes as a store of pieces does: a record becomes visible with its last piece, after what is deleted is gone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.aside: dict[int, dict[int, str]] = {}

    def _write(self, message: Flush) -> Flushed:
        refused, rows = [], 0
        self.index.deletes += message.deletes
        for key in message.deletes:
            self.index.rows.pop(key, None)
        for given_rows in message.slots:
            slot = self.slab.slots[given_rows.slot]
            for i, (raw_key, text) in enumerate(slot.raw_rows()):
                if i in given_rows.skip:
                    continue
                np.testing.assert_array_equal(slot.vectors[i], vector_of(text.decode()))
                if REFUSED in text.decode():
                    refused.append((slot.number, i))
                    continue
                rows += 1
                piece = piece_of(decode_key(raw_key))
                found = self.aside.setdefault(piece.revision, {})
                assert piece.number not in found
                found[piece.number] = text.decode()
                if len(found) == piece.of:
                    content = "".join(found[number] for number in range(piece.of))
                    assert content_hash(content) == piece.content_hash
                    assert sum(map(len, found.values())) == len(content)
                    self.index.write(record_key(decode_key(raw_key)), content, FINGERPRINT, self.index.run)
        self.index.rejects += message.rejects
        return Flushed(message.number, rows, 10 * rows, len(message.deletes), 0.01, (), row_bits(refused))


def test_a_long_text_does_not_exhaust_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a hundred times as many pieces as all slots together have rows."""
    monkeypatch.setattr(sys.modules[__name__], "FakeEngine", PieceEngine)
    text = " ".join(map(str, range(1000)))
    items = [record(0, text), record(1, "short")]
    run = Run(shape=SlabShape(3, 4, DIMENSIONS, 8192), split=in_fives).go(items)
    run.assert_all_is_accounted_for(items)
    run.assert_all_is_given_back()
    assert (run.counts.stored, run.counts.chunks) == (2, len(in_fives(text)) + 1)
    assert run.index.contents() == {("E", "r0"): text, ("E", "r1"): "short"}


def test_a_text_that_the_tokenizer_refuses_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FakeEngine", PieceEngine)

    def split(text: str) -> list[tuple[int, int]]:
        if BAD in text:
            raise ValueError
        return in_fives(text)

    items = [record(0, f"a {BAD} text"), record(1, "short")]
    run = Run(split=split).go(items)
    run.assert_all_is_accounted_for(items)
    assert (run.counts.stored, run.counts.rejected) == (1, 1)
    assert [(reject.key, reject.reason) for reject in run.index.rejects] == [(("E", "r0"), "not_encodable")]


def test_a_page_of_long_texts_is_taken_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FakeEngine", PieceEngine)
    monkeypatch.setattr(intake, "TAKEN_CHARS", 100)
    items = [record(n, f"{n} " * 40) for n in range(20)]
    run = Run(split=in_fives)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, len(run.pipeline._intake.window))

    run.engine.before_poll = look
    run.pipeline._intake._goal = 16
    run.go(items, page=20)
    assert run.counts.stored == 20
    assert most < 100


class Emptied(NamedTuple):
    """A record that has no text, of the first key of :data:`TEXTS`'s records."""

    key: Key


WITH_EMPTIED = st.lists(
    st.one_of(
        st.builds(record, st.integers(0, 3), st.sampled_from([*TEXTS, f"{BAD}1"])),
        st.builds(record, st.integers(0, 3), st.integers(0, 60).map(lambda n: f"text {n}")),
        st.builds(Emptied, st.integers(0, 3).map(lambda n: ("E", f"r{n}"))),
    ),
    max_size=50,
)


@settings(deadline=None, max_examples=150)
@given(ITEMS, INITIAL, SETUPS)
def test_a_record_in_pieces_is_stored_whole_and_counted_once(
    items: list[Item], initial: dict[Key, tuple[str, str | None]], setup: Setup
) -> None:
    index = index_of(initial)
    before = index.contents()
    with pytest.MonkeyPatch.context() as patch:
        run = setup.run(index, patch, pieces=True).go(items, setup.page)
    run.assert_all_is_accounted_for(items)
    run.assert_all_is_given_back()
    ledger = run.pipeline._ledger
    assert isinstance(ledger, PieceLedger)
    assert not ledger._open
    assert not ledger._rejected
    assert index.contents() == last_good(items, before)
    good = [i for i in items if is_good(i)]
    counts = run.counts
    assert counts.rejected == len(items) - len(good)
    assert {(reject.key, reject.content_hash) for reject in index.rejects if len(reject.key) == 2} == {
        (i.key, content_hash(i.content)) for i in items if isinstance(i, Record) and not is_good(i)
    }
    assert counts.stored + counts.reused + counts.unchanged == len({i.key for i in good})
    if not setup.force and not initial:
        assert counts.chunks >= sum(len(in_fives(content)) for content in index.contents().values())


@pytest.mark.parametrize("pieces", [False, True])
def test_a_record_that_is_emptied_leaves_the_index_whatever_came_before_and_after(pieces: bool) -> None:
    @settings(deadline=None, max_examples=300)
    @given(WITH_EMPTIED, INITIAL, SETUPS)
    @example(
        [record(0, "one"), Emptied(("E", "r0")), record(0, f"{REFUSED}1")],
        {("E", "r0"): ("red", FINGERPRINT)},
        Setup(0, 5, 1, 3, False, 4, 4, 256, False, False),
    )
    def holds(items: list[Record | Emptied], initial: dict[Key, tuple[str, str | None]], setup: Setup) -> None:
        check_emptied(items, initial, setup, pieces)

    holds()


def check_emptied(
    items: list[Record | Emptied], initial: dict[Key, tuple[str, str | None]], setup: Setup, pieces: bool
) -> None:
    index = index_of(initial)
    expected = index.contents()
    emptied: list[Key] = []
    for item in items:
        if isinstance(item, Emptied):
            expected.pop(item.key, None)
        elif is_good(item):
            expected[item.key] = item.content

    def source() -> Iterator[list[Item]]:
        # As a source gives them: what is emptied comes behind its page, so a page ends before a text that follows it.
        page: list[Item] = []
        pending: list[Key] = []
        for item in items:
            if len(page) + len(pending) >= setup.page or item.key in pending:
                emptied[:] = pending
                yield page
                page, pending = [], []
            if isinstance(item, Emptied):
                pending.append(item.key)
            else:
                page.append(item)
        emptied[:] = pending
        yield page

    with pytest.MonkeyPatch.context() as patch:
        run = setup.run(index, patch, pieces)
        run.pipeline.run(source(), lambda: [emptied.pop(0) for _ in range(len(emptied))])
    assert index.contents() == expected
    run.assert_all_is_given_back()
    run.assert_all_is_accounted_for([item for item in items if isinstance(item, Record)])
    ended = run.counts.stored + run.counts.reused + run.counts.unchanged
    assert ended == len(set(expected) & {item.key for item in items if isinstance(item, Record) and is_good(item)})


@settings(deadline=None, max_examples=150)
@given(ITEMS, INITIAL, SETUPS)
def test_a_second_run_finds_all_unchanged_where_no_key_came_twice(
    items: list[Item], initial: dict[Key, tuple[str, str | None]], setup: Setup
) -> None:
    once = list({i.key: i for i in items}.values())
    index = index_of(initial)
    with pytest.MonkeyPatch.context() as patch:
        setup.run(index, patch, unique_keys=True).go(once, setup.page)
        after = index.contents()
        index.run = 3
        again = setup._replace(force=False).run(index, patch, unique_keys=True).go(once, setup.page)
    assert again.counts.unchanged == len([i for i in once if is_good(i)])
    assert again.counts.stored == again.counts.reused == 0
    assert index.contents() == after
    again.assert_all_is_accounted_for(once)


@settings(deadline=None, max_examples=200)
@given(ITEMS, INITIAL, SETUPS, st.integers(1, 60))
def test_a_run_that_was_stopped_is_completed_by_the_next(
    items: list[Item], initial: dict[Key, tuple[str, str | None]], setup: Setup, turns: int
) -> None:
    index = index_of(initial)
    before = index.contents()
    possible = {key: {content} for key, content in before.items()}
    for item in items:
        if is_good(item):
            possible.setdefault(item.key, set()).add(cast(Record, item).content)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > turns

    with pytest.MonkeyPatch.context() as patch:
        run = setup.run(index, patch, should_stop=should_stop)
        try:
            run.go(items, setup.page)
        except StopRequested:
            p = run.pipeline
            assert not any((p.flushes._filled, p._reuse.ready, p.flushes._writing, p._reuse._cache._pinned))
            # No process is started to write rejects only; the next run finds them again.
            assert not p.flushes._rejects or p.engine is None
            assert run.engine.idle
            for key in run.engine.delivered:
                assert is_written(index, key, items), "what was embedded is written"
            assert run.counts.accounted <= run.counts.read
        for key, content in index.contents().items():
            assert content in possible[key]
        index.run = 3
        run = setup._replace(seed=setup.seed ^ 1).run(index, patch).go(items, setup.page)
    run.assert_all_is_accounted_for(items)
    run.assert_all_is_given_back()
    assert index.contents() == last_good(items, before)


@settings(deadline=None, max_examples=150)
@given(ITEMS, INITIAL, SETUPS, st.integers(0, 10))
def test_a_run_over_its_reject_limit_ends_after_writing_what_is_embedded(
    items: list[Item], initial: dict[Key, tuple[str, str | None]], setup: Setup, limit: int
) -> None:
    index = index_of(initial)
    bad = [i for i in items if not is_good(i)]
    with pytest.MonkeyPatch.context() as patch:
        run = setup.run(index, patch, max_rejects=RejectLimit(count=limit, share=None))
        if len(bad) <= limit:
            run.go(items, setup.page)
            return
        with pytest.raises(RejectLimitError, match=rf"w(as|ere) rejected; --max-rejects allows {limit}\. ") as caught:
            run.go(items, setup.page)
    assert caught.value.remedy
    assert run.counts.rejected > limit
    p = run.pipeline
    assert not any((p.flushes._filled, p._reuse.ready, p.flushes._writing, p.flushes._rejects, p._embedding()))
    assert len(index.rejects) == run.counts.rejected, "every reject can be looked up"
    for key in run.engine.delivered:
        assert is_written(index, key, items), "what was embedded is written"


FOREIGN = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7)), max_size=6)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.builds(record, st.integers(0, 7), st.sampled_from([*TEXTS, f"{REFUSED}1", f"{REFUSED}2", f"{BAD}1"])),
            st.builds(record, st.integers(0, 40), st.integers(0, 60).map(lambda n: f"text {n}")),
        ),
        max_size=70,
    ),
    INITIAL,
    SETUPS,
    FOREIGN,
)
def test_what_the_database_refuses_or_another_program_changes_is_accounted_for(
    items: list[Item], initial: dict[Key, tuple[str, str | None]], setup: Setup, edits: list[tuple[int, int]]
) -> None:
    index = index_of(initial)
    before = index.contents()
    edited: set[Key] = set()
    polls = 0

    def edit() -> None:
        nonlocal polls
        polls += 1
        for poll, number in edits:
            if poll == polls:
                index.write(("E", f"r{number}"), "written by another program", None, None)
                edited.add(("E", f"r{number}"))

    with pytest.MonkeyPatch.context() as patch:
        run = setup.run(index, patch)
        run.engine.before_poll = edit
        run.go(items, setup.page)
    run.assert_all_is_accounted_for(items)
    run.assert_all_is_given_back()
    expected = last_good(items, before)
    refused = {i.key for i in items if isinstance(i, Record) and REFUSED in i.content}
    contents = index.contents()
    for key in expected.keys() - edited - refused:
        assert contents[key] == expected[key]
    for key in refused - edited:
        last = [i for i in items if i.key == key][-1]
        if is_good(last):
            assert contents[key] == cast(Record, last).content
    assert not any(REFUSED in content for content in contents.values())


# -- order -------------------------------------------------------------------------------------------------


def one_row_shards(choose: Callable[[list[tuple[str, int]]], list[tuple[str, int]]], **options: Any) -> Run:
    """A run in which each record is a shard of its own and slots are filled in the order of reading."""
    run = Run(shape=SlabShape(9, 1, DIMENSIONS, 8192), choose=choose, **options)
    run.pipeline._intake._goal = 1
    return run


def held_back(slot: int, until_written: int) -> Callable[[list[tuple[str, int]]], list[tuple[str, int]]]:
    """All that is possible, except that the first use of a slot is embedded only after so many flushes."""
    written = 0

    def choose(possible: list[tuple[str, int]]) -> list[tuple[str, int]]:
        nonlocal written
        now = [p for p in possible if p != ("embed", slot) or written >= until_written]
        written += ("write", -1) in now
        return now

    return choose


def test_an_older_record_never_overwrites_a_newer_one_that_was_written_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with_small_thresholds(monkeypatch, eager=True)
    run = one_row_shards(held_back(0, until_written=1))
    run.go([record(1, "old and longer"), record(1, "new")], page=2)
    assert run.engine.embedded == {"old and longer": 1, "new": 1}
    assert run.index.contents() == {("E", "r1"): "new"}
    assert (run.counts.stored, run.counts.superseded) == (1, 1)
    run.assert_all_is_given_back()


def test_an_older_record_is_written_where_the_newer_cannot_be_embedded() -> None:
    run = one_row_shards(lambda possible: possible).go([record(1, "old and longer"), record(1, f"new {BAD}")], page=2)
    assert run.index.contents() == {("E", "r1"): "old and longer"}
    assert (run.counts.stored, run.counts.rejected, run.counts.superseded) == (1, 1, 0)


def test_a_newer_record_is_written_where_the_older_cannot_be_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    with_small_thresholds(monkeypatch, eager=True)
    for until in (0, 1):
        run = one_row_shards(held_back(0, until)).go([record(1, f"longer {BAD}"), record(1, "new")], page=2)
        assert run.index.contents() == {("E", "r1"): "new"}
        assert (run.counts.stored, run.counts.rejected, run.counts.superseded) == (1, 1, 0)


def test_a_record_is_embedded_again_where_its_key_is_in_flight_with_another_text() -> None:
    index = index_of({("E", "r1"): ("first", FINGERPRINT)})
    run = Run(index).go([record(1, "second"), record(1, "first")], page=1)
    assert index.contents() == {("E", "r1"): "first"}
    run.assert_all_is_accounted_for([record(1, ""), record(1, "")])


def test_a_file_with_a_key_twice_stores_nothing_the_second_time() -> None:
    items = [record(1, "first"), record(2, "other"), record(1, "last")]
    index = Run().go(items).index
    again = Run(index).go(items)
    assert (again.counts.stored, again.counts.reused) == (0, 0)
    assert (again.counts.unchanged, again.counts.superseded) == (2, 1)
    assert index.contents() == {("E", "r1"): "last", ("E", "r2"): "other"}
    again.assert_all_is_given_back()


def test_a_stop_writes_an_embedded_record_whose_newer_one_is_not_embedded_yet() -> None:
    stopping = False
    run = one_row_shards(
        lambda possible: [p for p in possible if stopping or p == ("embed", 0) or p[0] == "write"],
        workers=1,
        should_stop=lambda: stopping,
    )

    def stop_when_the_first_is_embedded() -> None:
        nonlocal stopping
        stopping = bool(run.engine.embedded)

    run.engine.before_poll = stop_when_the_first_is_embedded
    # Both are read; the newer one waits behind all others when the stop comes.
    items = [record(1, "old and the longest"), *(record(9, "filler" + "!" * n) for n in range(8)), record(1, "new")]
    with pytest.raises(StopRequested):
        run.go(items, page=20)
    assert run.index.contents()["E", "r1"] == "old and the longest"


def test_a_record_whose_key_is_in_flight_is_written_over_what_this_run_writes_only() -> None:
    run = one_row_shards(lambda possible: possible).go([record(1, "old and longer"), record(1, "new")], page=2)
    slots = run.engine.slab.slots[:2]
    rows = {slot.contents(0, 1)[0]: (int(slot.exists[0]), int(slot.row_version[0])) for slot in slots}
    assert rows == {"old and longer": (0, NO_VALUE), "new": (1, intake.IN_FLIGHT_VERSION)}


def test_a_row_that_another_program_wrote_meanwhile_stays_and_ours_counts_as_superseded() -> None:
    index = index_of({("E", "r1"): ("old", FINGERPRINT)})
    run = Run(index)
    run.engine.before_poll = lambda: index.write(("E", "r1"), "written by another program", None, None)
    run.go([record(1, "new"), record(2, "two")])
    assert index.contents() == {("E", "r1"): "written by another program", ("E", "r2"): "two"}
    assert run.counts == Counts(
        read=2, stored=1, superseded=1, tokens=6, padded_tokens=8, flushes=1, bytes_written=10,
        embed_seconds=0.01, write_seconds=0.01,
    )  # fmt: skip


def test_a_row_that_the_database_refuses_is_rejected_and_all_others_are_written() -> None:
    run = Run().go([record(1, "one"), record(2, f"two {REFUSED}"), record(3, "three")])
    assert run.index.contents() == {("E", "r1"): "one", ("E", "r3"): "three"}
    assert (run.counts.stored, run.counts.rejected) == (2, 1)
    assert run.index.rejects == [], "the writer itself records what the database refuses"


# -- one text, many records --------------------------------------------------------------------------------


def test_equal_texts_are_embedded_once_and_stored_for_every_key() -> None:
    items = [record(n, f"text {n % 3}") for n in range(60)]
    run = Run().go(items)
    assert run.engine.embedded == {"text 0": 1, "text 1": 1, "text 2": 1}
    assert (run.counts.stored, run.counts.reused) == (3, 57)
    assert len(run.index.rows) == 60
    run.assert_all_is_given_back()


def test_equals_of_a_text_that_cannot_be_embedded_are_rejected_with_it() -> None:
    items = [record(n, f"same {BAD}", "E") for n in range(5)] + [record(n, "fine") for n in range(5, 9)]
    run = Run().go(items, page=20)
    assert run.engine.embedded == {f"same {BAD}": 1, "fine": 1}
    assert run.counts.rejected == 5
    assert {(r.key[1], r.reason) for r in run.index.rejects} == {(f"r{n}", "not_finite") for n in range(5)}
    assert {r.content_hash for r in run.index.rejects} == {content_hash(f"same {BAD}")}
    run.assert_all_is_given_back()


def test_texts_beyond_the_cache_are_embedded_again_and_rightly() -> None:
    run = Run(unique_keys=True)
    run.pipeline._reuse._cache = small_cache(8)
    run.pipeline._intake._goal = 16
    items = [record(n, f"text {n % 300}") for n in range(600)]
    run.go(items, page=10)
    assert set(run.engine.embedded.values()) == {2}
    assert len(run.index.rows) == 600
    run.assert_all_is_given_back()


# -- memory ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    distinct=st.sampled_from([1, 2, 5, 40, 10_000]),
    # At least two shards, as it is with the real sizes: one that is not full may wait with its equals behind it.
    window=st.integers(8, 24),
    page=st.integers(1, 12),
    slots=st.integers(2, 8),
    workers=st.integers(1, 3),
    full_shards=st.booleans(),
)
def test_rows_held_do_not_grow_with_the_stream(
    seed: int, distinct: int, window: int, page: int, slots: int, workers: int, full_shards: bool
) -> None:
    chance = random.Random(seed)
    setup = Setup(seed, page, workers, slots, False, window, window, 256, False, full_shards)
    items = [record(n, f"text {chance.randrange(distinct)}") for n in range(600)]
    most = 0
    with pytest.MonkeyPatch.context() as patch:
        run = setup.run(Index(), patch, unique_keys=True, progress=Watch(lambda: watch()))
        p = run.pipeline

        def watch() -> None:
            nonlocal most
            # Rows that came before this page, those of the page, and what a slot just filled set free.
            assert len(p._intake.window) + p._reuse.waiting <= window + page
            most = max(most, len(p._intake.window) + p._reuse.waiting + len(p._reuse.ready) + sum(map(len, p._shards)))

        run.go(items, page)
    # The window, what waits for its shards, and rows whose vector is there and that wait for a slot.
    assert most <= 4 * (window + page) + 4 * 4
    assert sum(len(v or ()) for v in p._reuse._on_the_way.values()) == 0
    run.assert_all_is_accounted_for(items)


@pytest.mark.parametrize("kind", ["rejects", "deletes"])
def test_rejects_and_deletions_are_written_as_they_come(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushing, "NOTICE_ROWS", 20)
    run = Run()
    most = 0
    number = 0

    def emptied() -> list[Key]:
        nonlocal number
        number += 5
        return [("E", f"e{number - k}") for k in range(5)] if kind == "deletes" else []

    def watch() -> None:
        nonlocal most
        most = max(most, run.pipeline.flushes.notices)

    polls = 0

    def slow_writer(possible: list[tuple[str, int]]) -> list[tuple[str, int]]:
        nonlocal polls
        polls += 1
        return possible if polls % 9 == 0 else []

    run.engine.before_poll, run.engine.choose = watch, slow_writer
    items = [Reject(("E", f"r{n}"), "broken_line", "not JSON") for n in range(500)] if kind == "rejects" else []
    stream = pages(items, 5) if items else iter([[] for _ in range(100)])
    run.pipeline.run(stream, emptied)
    assert most <= 2 * 20 + 5
    assert len(run.index.rejects) + len(run.index.deletes) == 500
    assert len(set(run.index.deletes)) == len(run.index.deletes)
    run.assert_all_is_given_back()


def test_no_message_is_larger_than_a_pipe_holds() -> None:
    run = Run()
    names = [f"{n} 𝄞" * 30 for n in range(2000)]
    deletes: list[Key] = [("E" * 255, name) for name in names]
    run.pipeline.run(
        [[Reject((name, name), "broken_line", name * 20, bytes([n % 256]) * 32, n) for n, name in enumerate(names)]],
        lambda: [deletes.pop() for _ in range(len(deletes))],
    )
    run.pipeline.finish(tuple(names))
    assert max(len(pickle.dumps(message)) for message in run.engine.requests) < 64 * 1024
    assert [reject.position for reject in run.index.rejects] == list(range(2000))
    assert sorted(str(key[1]) for key in run.index.deletes) == sorted(names)
    pruned = [message for message in run.engine.requests if isinstance(message, Finish)]
    assert [name for message in pruned for name in message.prune] == names
    assert [message.build_index for message in pruned] == [False] * (len(pruned) - 1) + [True]
    run.assert_all_is_given_back()


def test_the_answer_to_a_flush_is_small_whatever_became_of_its_rows() -> None:
    rows = [(slot, row) for slot in range(80) for row in range(0, 128, 3)]
    assert rows_of_bits(row_bits(rows)) == set(rows)
    assert rows_of_bits(row_bits([])) == set()
    assert len(pickle.dumps(Flushed(1, 0, 0, 0, 0.0, row_bits(rows), row_bits(rows)))) < 8 * 1024


# -- what is not embedded ----------------------------------------------------------------------------------


def test_an_index_that_is_up_to_date_starts_no_engine() -> None:
    index = index_of({("E", f"r{n}"): (f"text {n}", FINGERPRINT) for n in range(30)})
    items = [record(n, f"text {n}") for n in range(30)]
    run = Run(index).go(items)
    assert run.engine.starts == []
    assert run.counts == Counts(read=30, unchanged=30)


def test_another_model_or_a_change_by_another_program_means_embedding_again() -> None:
    index = index_of({("E", "r1"): ("one", FINGERPRINT), ("E", "r2"): ("two", "other"), ("E", "r3"): ("three", None)})
    run = Run(index).go([record(1, "one"), record(2, "two"), record(3, "three")])
    assert (run.counts.unchanged, run.counts.stored) == (1, 2)
    assert {e.fingerprint for e in index.rows.values()} == {FINGERPRINT}


def test_an_empty_index_is_not_asked_for_each_key_where_keys_are_unique() -> None:
    items = [record(n, f"text {n}") for n in range(30)]
    assert Run(unique_keys=True).go(items).index.lookups == 0
    assert Run(unique_keys=False).go(items).index.lookups > 0


def test_an_empty_stream_does_nothing() -> None:
    run = Run().go([])
    assert run.engine.starts == []
    assert run.counts == Counts()
    run.assert_all_is_given_back()


def test_a_stop_is_seen_while_pages_are_empty() -> None:
    read = 0

    def empty_pages() -> Iterator[list[Item]]:
        nonlocal read
        while read < 1000:
            read += 1
            yield []

    watch = Watch()
    run = Run(should_stop=lambda: read >= 3, progress=watch)
    with pytest.raises(StopRequested):
        run.pipeline.run(empty_pages())
    assert read == 3
    assert watch.steps == ["writing what is embedded; again ends at once"]


def test_unfit_records_alone_are_written_as_rejects() -> None:
    items: list[Item] = [record(1, ""), record(2, "a\0"), Reject(("E", "x" * 1000), "id_too_long", "too long", b"h", 7)]
    run = Run().go(items)
    assert [r.reason for r in run.index.rejects] == ["empty_text", "nul_byte", "id_too_long"]
    assert run.index.rejects[2].position == 7
    assert len(str(run.index.rejects[2].key[1])) <= flushing.REJECT_KEY_CHARS
    assert run.engine.starts == [(0, False)]
    run.assert_all_is_given_back()


@pytest.mark.parametrize("value", [None, 7, ["x"], b"x"])
def test_values_of_the_wrong_type_are_rejected_and_not_raised(value: Any) -> None:
    items = [Record(("E", "r1"), value), Record(("E", value), "text"), Record((value, "r1"), "text"), record(2, "fine")]
    run = Run().go(items)
    assert [r.reason for r in run.index.rejects] == ["wrong_type"] * 3
    assert run.index.contents() == {("E", "r2"): "fine"}


def test_a_text_too_long_for_the_table_is_cut_on_its_way() -> None:
    run = Run(shape=SlabShape(4, 4, DIMENSIONS)).go([record(1, "é" * MAX_CONTENT_BYTES)])
    assert run.index.contents() == {("E", "r1"): "é" * (MAX_CONTENT_BYTES // 2)}
    assert run.counts.truncated == 1


def test_what_was_known_of_a_row_travels_with_it() -> None:
    index = index_of({("E", "r1"): ("old", FINGERPRINT)})
    moment = datetime(2024, 5, 1, 12, 0, 0, 123, tzinfo=timezone(timedelta(hours=2)))
    run = Run(index)
    run.go([Record(("E", "r1"), "new", moment), Record(("E", "r2"), "new two")])
    slots = run.engine.slab.slots
    rows = {decode_key(raw[0]): (s, i) for s in slots for i, raw in enumerate(s.raw_rows())}
    slot, i = rows["E", "r1"]
    assert (slot.exists[i], slot.row_version[i]) == (1, 1)
    assert slot.source_at[i] == int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))
    slot, i = rows["E", "r2"]
    assert (slot.exists[i], slot.row_version[i], slot.source_at[i]) == (0, NO_VALUE, NO_VALUE)


@settings(deadline=None)
@given(st.datetimes(timezones=st.one_of(st.none(), st.just(UTC), st.just(timezone(timedelta(hours=-11))))))
def test_a_moment_becomes_exact_microseconds(moment: datetime) -> None:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    value = microseconds(moment)
    assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value) == aware
    assert microseconds(None) == NO_VALUE


# -- ending early ------------------------------------------------------------------------------------------


def test_a_refusal_by_the_database_over_the_limit_loses_no_other_answer() -> None:
    # The answer with the refusal and a filled slot come in one poll.
    run = one_row_shards(lambda possible: possible, max_rejects=RejectLimit(count=0, share=None))
    order: list[str] = []

    def choose(possible: list[tuple[str, int]]) -> list[tuple[str, int]]:
        writes = [p for p in possible if p[0] == "write"]
        embeds = [p for p in possible if p[0] == "embed"]
        if not order:
            order.append("first embed")
            return embeds[:1]
        return [*writes, *embeds] if writes else []

    run.engine.choose = choose
    with_eager = pytest.MonkeyPatch()
    with_small_thresholds(with_eager, eager=True)
    with pytest.raises(RejectLimitError):
        run.go([record(1, f"the longest {REFUSED}"), record(2, "short")], page=2)
    with_eager.undo()
    assert run.index.contents() == {("E", "r2"): "short"}
    assert not run.pipeline._embedding()


def test_a_share_is_judged_when_all_is_done_also_for_what_the_model_cannot_embed() -> None:
    items = [record(n, f"{BAD} {n}") for n in range(20)] + [record(n, f"text {n}") for n in range(20, 40)]
    run = Run(max_rejects=RejectLimit(share=0.01))
    with pytest.raises(RejectLimitError, match=r"\d+ of 40 records were rejected; --max-rejects allows 1%"):
        run.go(items, page=100)
    assert set(run.index.rows) == run.engine.delivered
    assert len(run.index.rejects) == run.counts.rejected > 1


def test_one_bad_record_in_a_small_table_is_no_reason_to_stop() -> None:
    run = Run(max_rejects=RejectLimit(share=0.01)).go([record(1, ""), record(2, "fine")])
    assert run.counts.rejected == 1
    assert run.index.contents() == {("E", "r2"): "fine"}


def test_a_worker_that_never_answers_is_given_up_when_the_run_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def monotonic() -> float:
        return now

    for each in (module, flushing):
        monkeypatch.setattr(each, "time", SimpleNamespace(monotonic=monotonic))
    polls = 0
    # So many slots that none of them is written for want of room.
    run = Run(
        shape=SlabShape(40, 1, DIMENSIONS, 8192),
        choose=lambda possible: [p for p in possible if p != ("embed", 0)],
        should_stop=lambda: polls > 3,
    )
    first_written = 0.0

    def pass_time() -> None:
        nonlocal now, polls, first_written
        polls += 1
        now += 0.2
        if run.index.rows and not first_written:
            first_written = now

    run.engine.before_poll = pass_time
    monkeypatch.setattr(flushing, "MAX_WAIT_SECONDS", 5.0)
    with pytest.raises(StopRequested):
        run.go([record(n, f"text {n}" + "!" * (9 - n)) for n in range(6)], page=6)
    assert ("E", "r0") not in run.index.rows
    assert ("E", "r1") in run.index.rows
    assert 0 < first_written < 2, "what is embedded does not wait for the one that hangs"
    assert 2 < now < 20


def test_a_stop_before_anything_was_read_is_a_stop() -> None:
    run = Run(should_stop=lambda: True)
    with pytest.raises(StopRequested):
        run.go([record(1, "text")])
    assert run.index.rows == {}


def test_notes_reach_the_user_and_the_receipt() -> None:
    watch = Watch()
    run = Run(progress=watch)
    run.engine.notes = ["worker-1 was replaced"]
    run.go([record(1, "text")])
    assert run.pipeline.warnings == watch.notes == ["worker-1 was replaced"]


def test_what_takes_the_writer_long_is_over_with_its_answer() -> None:
    watch = Watch()
    run = Run(progress=watch)
    run.engine.busy = ["waiting for the database"]
    run.go([record(1, "text")])
    first, *rest = watch.done
    assert first == "waiting for the database"
    assert rest
    assert set(rest) == {""}


def test_tokens_bytes_and_seconds_are_added_up() -> None:
    run = Run().go([record(n, f"text {n}") for n in range(10)])
    c = run.counts
    assert (c.tokens, c.padded_tokens, c.bytes_written) == (30, 40, 100)
    flushes = [r for r in run.engine.requests if isinstance(r, Flush)]
    assert c.flushes == len(flushes)
    assert c.write_seconds == pytest.approx(0.01 * len(flushes))
    assert c.embed_seconds > 0
    assert run.phases == {"embed"}


def test_engine_is_told_how_many_rows_wait_and_whether_more_may_come() -> None:
    assert Run().go([record(n, f"text {n}") for n in range(7)]).engine.starts == [(7, False)]
    run = Run()
    run.pipeline._intake._goal = 10
    assert run.go([record(n, f"text {n % 8}") for n in range(30)]).engine.starts == [(10, True)]


# -- the vector index --------------------------------------------------------------------------------------


def with_vector_index(stored: int, **options: Any) -> Run:
    """A run into an index of so many rows that nobody reads here, and that has a vector index."""
    index = Index(run=2, has_vector_index=True)
    for n in range(stored):
        index.write(("Other", f"o{n}"), "other", FINGERPRINT, 1)
    return Run(index, shape=SlabShape(8, 64, DIMENSIONS, 8192), unique_keys=True, **options)


def kinds(run: Run) -> list[str]:
    return [type(r).__name__ for r in run.engine.requests]


def test_a_first_load_drops_the_index_before_the_first_flush_and_builds_it_at_the_end() -> None:
    run = with_vector_index(0, estimate=1000).go([record(n, f"text {n}") for n in range(1000)], page=100)
    run.engine.finish_outcome = IndexOutcome(IndexAction.BUILT, "ix_kdb_search_vector")
    run.pipeline.finish(())
    assert kinds(run)[:2] == ["PrepareIndex", "Flush"]
    assert kinds(run).count("PrepareIndex") == 1
    assert run.engine.requests[0] == PrepareIndex()
    assert run.engine.requests[-1] == Finish((), True)
    assert run.pipeline.warnings[0] == f"An index of 1000 vectors of {DIMENSIONS} numbers is large"
    text = run.pipeline.index.text
    assert text.startswith("deferred: about 1,000 of 1,000 rows change, a quarter or more")
    assert text.endswith("; built ix_kdb_search_vector")
    assert len(run.index.rows) == 1000


def test_a_small_change_of_a_large_index_keeps_it() -> None:
    run = with_vector_index(5000, estimate=300).go([record(n, f"text {n}") for n in range(300)], page=50)
    run.pipeline.finish(())
    assert "PrepareIndex" not in kinds(run)
    assert run.pipeline.index.text == "kept: about 300 of 5,000 rows change, under a quarter"


def test_a_handful_of_rows_keeps_the_index_whatever_their_share() -> None:
    run = with_vector_index(0, estimate=50).go([record(n, f"text {n}") for n in range(50)])
    assert "PrepareIndex" not in kinds(run)
    assert run.pipeline.index.text == "kept: only about 50 rows change"


def test_unchanged_records_do_not_count_as_rows_to_write() -> None:
    run = with_vector_index(0, estimate=1000)
    for n in range(900):
        run.index.write(("E", f"r{n}"), f"text {n}", FINGERPRINT, 1)
    run.go([record(n, f"text {n}") for n in range(1000)], page=1000)
    assert run.counts.unchanged == 900
    assert "PrepareIndex" not in kinds(run)
    assert run.pipeline.index.text == "kept: about 100 of 1,000 rows change, under a quarter"


def test_a_load_that_turns_out_large_on_the_way_drops_the_index_then(monkeypatch: pytest.MonkeyPatch) -> None:
    with_small_thresholds(monkeypatch, eager=True)
    run = with_vector_index(0, estimate=3000)
    run.pipeline._intake._goal = 16
    for n in range(1000):
        run.index.write(("E", f"r{n}"), f"text {n}" if n % 10 else "old", FINGERPRINT, 1)
    run.go([record(n, f"text {n}") for n in range(3000)], page=100)
    assert kinds(run)[0] == "Flush", "one in ten of the first records has changed"
    assert kinds(run).count("PrepareIndex") == 1
    assert run.pipeline.index.text.startswith("deferred: ")
    assert run.index.contents() == {("E", f"r{n}"): f"text {n}" for n in range(3000)}


def test_the_length_of_a_stream_need_not_be_known_to_drop_an_empty_index() -> None:
    run = with_vector_index(0, estimate=None).go([record(n, f"text {n}") for n in range(1000)], page=100)
    assert kinds(run)[:2] == ["PrepareIndex", "Flush"]


def test_a_store_without_a_vector_index_is_never_asked_to_drop_it() -> None:
    run = with_vector_index(0, estimate=1000)
    run.index.has_vector_index = False
    run.go([record(n, f"text {n}") for n in range(1000)], page=100)
    assert set(kinds(run)) == {"Flush"}
    assert run.pipeline.index.text == ""


def test_an_index_that_could_not_be_dropped_is_told() -> None:
    run = with_vector_index(0, estimate=1000)
    reason = "this role does not own kdb_search, so it cannot drop and rebuild the index"
    run.engine.prepare_outcome = IndexOutcome(IndexAction.KEPT, reason)
    run.go([record(n, f"text {n}") for n in range(1000)], page=100)
    run.pipeline.finish(())
    assert kinds(run).count("PrepareIndex") == 1
    assert run.pipeline.index.text == f"kept: {reason}"
    assert len(run.index.rows) == 1000


def test_a_run_that_is_being_stopped_does_not_drop_the_index() -> None:
    run = with_vector_index(0, estimate=1000)
    run.pipeline._should_stop = lambda: bool(run.engine.delivered)
    run.pipeline._intake._goal = 500
    with pytest.raises(StopRequested):
        run.go([record(n, f"text {n}") for n in range(1000)], page=100)
    assert run.index.rows, "what was embedded is written"
    assert set(kinds(run)) == {"Flush"}


def test_finish_prunes_counts_and_collects_what_the_server_said() -> None:
    run = Run().go([record(1, "text")])
    run.engine.finish_outcome = IndexOutcome(IndexAction.BUILT, "ix_kdb_search_fts")
    run.pipeline.finish(("E", "F"))
    assert run.engine.requests[-1] == Finish(("E", "F"), True)
    assert run.counts.deleted == 2
    assert run.counts.index_seconds == 0.5
    assert run.pipeline.warnings == ["said at the end"]
    assert run.pipeline.index.text == "built ix_kdb_search_fts"
    assert run.phases == {"embed", "index"}


def test_where_a_request_costs_the_same_for_any_rows_shards_wait_until_they_are_full() -> None:
    sizes: dict[bool, list[int]] = {}
    for full_shards in (True, False):
        run = Run(shape=SlabShape(6, 10, DIMENSIONS, 8192))
        run.engine.full_shards = full_shards
        run.pipeline._intake._goal = 1
        given = sizes[full_shards] = []
        embed = run.engine.embed

        def noted(slot: int, lease: int, rows: int, given: list[int] = given, embed: Any = embed) -> None:
            given.append(rows)
            embed(slot, lease, rows)

        run.engine.embed = noted  # type: ignore[method-assign]
        items = [record(number, f"text {number}") for number in range(96)]
        run.go(items, page=8)
        run.assert_all_is_given_back()
        assert run.index.contents() == last_good(items, {})
    assert sizes[True] == [10] * 9 + [6]
    assert len(sizes[False]) > 10


def test_rows_of_one_text_do_not_wait_for_a_full_shard() -> None:
    run = Run(shape=SlabShape(6, 10, DIMENSIONS, 8192))
    run.engine.full_shards = True
    run.pipeline._intake._goal = 1
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, run.pipeline._reuse.waiting)

    run.engine.before_poll = look
    run.go([record(number, "the same") for number in range(300)], page=5)
    run.assert_all_is_given_back()
    assert (run.counts.stored, run.counts.reused) == (1, 299)
    assert most < 30


def test_finish_of_an_unchanged_index_still_looks_after_the_index() -> None:
    run = Run(index_of({("E", "r1"): ("one", FINGERPRINT)})).go([record(1, "one")])
    run.pipeline.finish(())
    assert run.engine.starts == [(0, False)]
    assert run.engine.requests == [Finish((), True)]
    assert run.pipeline.index.text == "kept"


def test_finish_with_nothing_to_do_starts_nothing() -> None:
    run = Run().go([])
    run.pipeline.finish((), build_index=False)
    assert run.engine.starts == []
