"""PARENT: records in, flushes out. Owns every slot and accounts for every record.

::

    page ─► unfit? ─► hash ─► unchanged? ─► known text? ──no──► window ─► shard ─► slot ─► worker ┐
              │                   │              │ yes                                           │
           rejects             counted     cached vector ─────────────► slot ─────────────────┐  │
                                                                                              ▼  ▼
                                        counted ◄── COMMIT ◄── writer ◄── flush ◄───────── filled slots

Every record ends as exactly one of stored, unchanged, reused, superseded or rejected.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from .engine import Engine, Event, Note, SlotFilled
from .errors import KdbFastError, RejectLimitError
from .faults import fault
from .flushing import MAX_WAIT_SECONDS, FlushSize
from .messages import Finish, Finished, Flush, Flushed, IndexPrepared, PrepareIndex, SlotRows, rows_of_bits
from .receipt import Counts
from .records import (
    MAX_ENTITY_CHARS,
    MAX_RECORD_ID_CHARS,
    Record,
    Reject,
    content_hash,
    cut_content,
    unfit,
    unheld,
    was_cut,
)
from .settings import RejectLimit
from .sharding import SHARD_ROWS, WINDOW_ROWS, shard_numbers, text_bytes
from .slab import NO_STAMP, ROW_REASONS, Row
from .stores.base import Store, Stored
from .stores.index_policy import IndexAction, IndexRecord, decide
from .vectors import VectorCache

EMBEDDED, REUSED = 0, 1
Key = tuple[str, str]
_Fit = tuple[Record, bytes, int]

TAKEN_ROWS = 64
"""Records that are taken in (1 ms) before the writer and the workers are looked at again: they wait that long."""

SEEN_KEYS = 2_000_000
"""Keys of a file that are remembered to count superseded records exactly: at most about 200 MB. Beyond it
the last record of a key still wins; only the split between stored and superseded is no longer exact."""

NOTICE_ROWS = 20_000
"""Rejects and deletions that are kept before they are written without waiting for vectors: about 5 MB."""

MESSAGE_BYTES = 32 * 1024
"""Rejects, deletions and numbers of left-out rows in one message to the writer, about. A pipe holds twice as much
at least, so that a writer which does not read, because it is stopped, never blocks the parent."""

LEFT_OUT_ROWS = 4_000
"""Rows of a flush that were rejected or outdated since they were embedded, about: their numbers are in the message."""

REJECT_DETAIL_CHARS = 600
"""Characters of a reason that are passed on; the table of rejects keeps less."""

DRAIN_SECONDS = 6.0
"""A run that is being stopped waits so long for its last flushes: a container is killed ten seconds after SIGTERM.
What is not written by then is embedded again by the next run."""

IN_FLIGHT_STAMP = 1
"""Version of a row that an earlier record of this run is about to write: no other program's row has it."""


@dataclass
class _Load:
    """What the parent knows of a slot in use."""

    rows: list[Row]
    sequences: list[int]
    kind: int
    hashes: list[bytes]
    generation: int
    size: int
    crcs: tuple[tuple[int, int, int], ...] = ()
    skip: set[int] = field(default_factory=set)


class Stop(Exception):
    """Raised inside the pipeline when a signal asked for the end."""


class Pipeline:
    """One pass over a source.

    Args:
        store: The parent's own connection, for look-ups and heartbeats.
        start_engine: Called once, with the number of rows that wait and whether more may come, when there is
            something to embed. Not called when everything is unchanged.
        fingerprint: Of the model, to tell which rows are unchanged.
        dimensions: Of the vectors.
        read_chars: Characters of a text beyond which the model reads nothing.
        encoding: That of the index.
        missing_characters: Which characters in texts the index cannot hold; None where it holds all.
        on_progress: Called with the counts after every step.
        should_stop: Asked often; true ends the run after what is embedded has been written.
        heartbeat: Called with the phase every few seconds.
    """

    def __init__(
        self,
        *,
        store: Store,
        start_engine: Callable[[int, bool], Engine],
        fingerprint: str,
        dimensions: int,
        read_chars: int,
        max_rejects: RejectLimit,
        force: bool = False,
        unique_keys: bool = False,
        encoding: str = "UTF8",
        missing_characters: Callable[[Iterable[str]], frozenset[str]] | None = None,
        estimate: int | None = None,
        on_progress: Callable[[Counts], None] = lambda counts: None,
        on_note: Callable[[str], None] = lambda text: None,
        should_stop: Callable[[], bool] = lambda: False,
        heartbeat: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.counts = Counts()
        self.index = IndexRecord()
        self.warnings: list[str] = []
        self.engine: Engine | None = None
        self.flush_size: FlushSize | None = None
        self._store = store
        self._start_engine = start_engine
        self._fingerprint = fingerprint
        self._read_chars = read_chars
        self._max_rejects = max_rejects
        self._force = force
        self._unique_keys = unique_keys
        self._encoding, self._missing = encoding, missing_characters
        self._estimate = estimate
        self._on_progress, self._on_note = on_progress, on_note
        self._should_stop, self._heartbeat = should_stop, heartbeat
        self._cache = VectorCache(dimensions)
        self._window: list[tuple[Row, int, bytes]] = []
        self._window_goal = 1000
        self._shards: deque[list[tuple[Row, int, bytes]]] = deque()
        self._reuse: list[tuple[Row, int, bytes]] = []
        self._waiters: dict[bytes, list[tuple[Row, int]] | None] = {}
        self._waiting_rows = 0
        self._free: deque[int] = deque()
        self._loads: dict[int, _Load] = {}
        self._filled: deque[int] = deque()
        self._writing: dict[int, _Load] = {}
        self._rejects: list[Reject] = []
        self._deletes: dict[Key, None] = {}  # in order
        self._sent_deletes: list[Key] = []
        self._kept: set[Key] = set()
        self._sent_rejects = 0
        self._sequence = 0
        # For keys that are in flight: how many records of each, and the newest that has a vector. A record is
        # outdated only by one that can be stored: what the model cannot embed does not erase an earlier text.
        self._in_flight: dict[Key, int] = {}
        self._latest: dict[Key, int] = {}
        # Keys in the flush that is being written, where the index may already differ from what was looked up.
        self._sent: set[Key] = set()
        self._seen: dict[int, str] = {}
        self._generation = 0
        self._last_flush = time.monotonic()
        self._finished: Finished | None = None
        self.not_pruned: set[str] = set()
        self._rows_at_start: int | None = None
        self._all_read = False
        self._stopping = False

    # -- the pass --------------------------------------------------------------------------------------

    def run(self, pages: Iterable[list[Record | Reject]], emptied: Callable[[], list[Key]] = lambda: []) -> None:
        """Read all pages and write everything that must be written.

        Args:
            pages: The records.
            emptied: Asked after each page for the keys of records read with it that have no text.

        Raises:
            Stop: A signal asked for the end; what was embedded is committed.
            RejectLimitError: Too many records were rejected; what was embedded is committed.
            KdbFastError: The engine or the database failed for good.
        """
        try:
            for page in pages:
                fault("source.page")
                self._take_in(page)
                self._take_out(emptied())
                # Rows that wait for an equal text count too: a file of one text repeated must not pile up.
                if len(self._window) + self._waiting_rows >= self._window_goal:
                    self._cut()
                    self._window_goal = min(WINDOW_ROWS, 2 * self._window_goal)
                self._check_limits()
                if len(self._rejects) + len(self._deletes) >= NOTICE_ROWS:
                    self._ensure_engine(0, True)
                while self._backlog():
                    self._pump(1.0)
            self._cut(last=True)
            self._all_read = True
            self._check_limits()
            while self._unfinished():
                self._pump(1.0, last=True)
        except Stop:
            self.drain(DRAIN_SECONDS)
            raise
        except RejectLimitError:
            # Its remedy names the list of rejects, so they must be there.
            self._ensure_engine(0, False)
            self.drain()
            raise

    def drain(self, seconds: float = math.inf) -> None:
        """Write what is embedded, within ``seconds``; forget what is not."""
        end = time.monotonic() + seconds
        self._stopping = True
        self._window, self._shards, self._waiters, self._waiting_rows = [], deque(), {}, 0
        if self.engine is None:
            return
        for slot in self.engine.cancel_embedding():
            self._release(slot)
        # The shard each worker is in the middle of takes a second or two; a container has ten to end in.
        deadline = time.monotonic() + 3.0
        while self._embedding() and time.monotonic() < deadline:
            self._pump(0.2, last=True)
        while (self._filled or self._reuse or self._rejects or self._writing) and time.monotonic() < end:
            self._pump(1.0, last=True)

    def finish(self, prune: tuple[str, ...], build_index: bool = True) -> None:
        """Remove rows without a record, and build whatever index is missing."""
        fault("pipeline.finish")
        if self.engine is None:
            if prune == () and not build_index:
                return
            self._ensure_engine(0, False)
        while (part := _first_of(prune, MESSAGE_BYTES)) < len(prune):
            self._ask(Finish(prune[:part], False))
            prune = prune[part:]
        self.index.finished = self._ask(Finish(prune, build_index)).outcome

    def _ask(self, message: Finish) -> Finished:
        """Have the writer do something after the last flush."""
        assert self.engine is not None
        self._finished = None
        self.engine.request(message)
        while self._finished is None:
            self._pump(1.0, last=True, phase="index")
        done: Finished = self._finished
        self.counts.deleted += done.deleted
        self.counts.index_seconds += done.seconds
        self.warnings += done.warnings + done.outcome.warnings
        self.not_pruned |= set(done.not_pruned)
        return done

    # -- intake ----------------------------------------------------------------------------------------

    def _take_in(self, page: list[Record | Reject]) -> None:
        # What a record is compared with must not have been looked up before an earlier record of its key was written.
        # Where no key comes twice a whole page is looked up at once: 30,000 unchanged rows take 0.34 s, not 0.45.
        together = len(page) if self._unique_keys else TAKEN_ROWS
        for start in range(0, max(1, len(page)), max(1, together)):  # an empty page may bring deletes
            fit = self._screen(page[start : start + together])
            stored = self._look_up(fit)
            for first in range(0, max(1, len(fit)), TAKEN_ROWS):
                self._take(fit[first : first + TAKEN_ROWS], stored)
                self._pump(0)

    def _screen(self, page: list[Record | Reject]) -> list[_Fit]:
        """The records that can be stored, each with its hash and its number; the others are rejected."""
        fault("pipeline.classify")
        fit: list[_Fit] = []
        missing = self._missing_characters(page)
        self.counts.read += len(page)
        for item in page:
            self._sequence += 1
            if isinstance(item, Reject):
                self._reject(item)
                continue
            problem = unfit(item)
            if problem is None and missing:
                problem = unheld(item, missing, self._encoding)
            if problem is not None:
                digest = content_hash(item.content) if isinstance(item.content, str) else b""
                self._reject(Reject(item.entity, item.record_id, *problem, digest, item.position))
                continue
            content = cut_content(item.content)
            if content is not item.content:
                item = item._replace(content=content)
            fit.append((item, content_hash(content), self._sequence))
        return fit

    def _missing_characters(self, page: list[Record | Reject]) -> frozenset[str]:
        """Those of the page's texts and keys that the index cannot hold: told here, they cost no embedding."""
        if self._missing is None:
            return frozenset()
        records = (item for item in page if isinstance(item, Record))
        return self._missing(v for record in records for v in record[:3] if isinstance(v, str))

    def _take(self, fit: list[_Fit], stored: dict[Key, Stored]) -> None:
        counts = self.counts
        for record, digest, sequence in fit:
            key = (record.entity, record.record_id)
            found = stored.get(key)
            in_flight = key in self._in_flight
            if (
                found is not None
                and key not in self._sent
                and not self._force
                and found.fingerprint == self._fingerprint
                and found.content_hash == digest
            ):
                if in_flight:
                    # Older records of the key have not been written yet: what is stored outdates them.
                    self._latest[key] = sequence
                self._deletes.pop(key, None)
                counts.unchanged += 1
                self._final(key, "unchanged")
                continue
            # Here and not where it is embedded, so that it counts once, also where the model reads all that is left.
            counts.truncated += was_cut(record.content)
            if not self._unique_keys:
                self._in_flight[key] = self._in_flight.get(key, 0) + 1
            if found is not None:
                row = Row(record, True, found.stamp)
            else:
                # A row of this run will be there: merging at once is cheaper than a conflict.
                row = Row(record, in_flight, IN_FLIGHT_STAMP if in_flight else NO_STAMP)
            self._place(row, sequence, digest)
        self._on_progress(counts)

    def _take_out(self, keys: list[Key]) -> None:
        """Records that have no text any more leave the index; what was read of them before is outdated."""
        for key in () if self._unique_keys else keys:
            self._sequence += 1
            if key in self._in_flight:
                self._latest[key] = self._sequence
        self._deletes.update(dict.fromkeys(keys))

    def _place(self, row: Row, sequence: int, digest: bytes) -> None:
        """To the window, or beside an equal text whose vector is there or on its way."""
        if digest in self._cache:
            self._take_from_cache(row, sequence, digest)
        elif digest in self._waiters:
            waiting = self._waiters[digest]
            if waiting is None:
                waiting = self._waiters[digest] = []
            waiting.append((row, sequence))
            self._waiting_rows += 1
        else:
            self._waiters[digest] = None  # a list for every text would cost more than the few that are needed
            self._window.append((row, sequence, digest))

    def _take_from_cache(self, row: Row, sequence: int, digest: bytes) -> None:
        self._reuse.append((row, sequence, digest))
        self._cache.pin(digest)
        self._has_vector(row, sequence)

    def _look_up(self, fit: list[_Fit]) -> dict[Key, Stored]:
        if self._rows_at_start is None:
            self._rows_at_start = self._store.count()
        result: dict[Key, Stored] = {}
        by_entity: dict[str, list[str]] = {}
        for record, _, _ in fit:
            by_entity.setdefault(record.entity, []).append(record.record_id)
        for entity, ids in by_entity.items():
            # Where the index was empty nothing needs looking up; a row that appears meanwhile meets the
            # unique constraint at the flush, which then decides row by row.
            if self._rows_at_start or not self._unique_keys:
                for record_id, found in self._store.lookup(entity, ids).items():
                    result[entity, record_id] = found
        return result

    def _reject(self, reject: Reject) -> None:
        self.counts.rejected += 1
        self._rejects.append(
            reject._replace(
                entity=str(reject.entity)[: MAX_ENTITY_CHARS + 1],
                record_id=str(reject.record_id)[: 4 * MAX_RECORD_ID_CHARS],
                detail=reject.detail[:REJECT_DETAIL_CHARS],
            )
        )

    def _final(self, key: Key, kind: str) -> None:
        """Count an earlier record of the same key, in this run, as superseded."""
        if self._unique_keys:
            return
        fingerprint = hash(key)
        earlier = self._seen.get(fingerprint)
        if earlier is not None:
            setattr(self.counts, earlier, getattr(self.counts, earlier) - 1)
            self.counts.superseded += 1
        if earlier is not None or len(self._seen) < SEEN_KEYS:
            self._seen[fingerprint] = kind

    def _check_limits(self) -> None:
        if self._stopping:
            return
        if self._max_rejects.exceeded(rejected=self.counts.rejected, read=self.counts.read, finished=self._all_read):
            raise RejectLimitError(
                f"{self.counts.rejected} of {self.counts.read} records were rejected; "
                f"--max-rejects allows {self._max_rejects}.",
                remedy="See why with `kdb-fast rejects list`; raise the limit with --max-rejects.",
            )

    # -- work for the engine ---------------------------------------------------------------------------

    def _cut(self, *, last: bool = False) -> None:
        """The window becomes shards of similar length."""
        if not self._window:
            return
        self._ensure_engine(len(self._window) + self._waiting_rows, not last)
        assert self.engine is not None
        window, self._window = self._window, []
        shape = self.engine.slab.shape
        for numbers in shard_numbers(
            [row for row, _, _ in window],
            shard_rows=shape.rows,
            shard_chars=self.engine.shard_chars,
            blob_bytes=shape.blob_bytes,
            read_chars=self._read_chars,
        ):
            self._shards.append([window[number] for number in numbers])
        # Rows that wait for an equal text must not pile up behind one that is not embedded.
        if self.engine.full_shards and not last and self._waiting_rows < len(self._shards[-1]) < shape.rows:
            self._window = self._shards.pop()

    def _ensure_engine(self, rows: int, more: bool) -> None:
        if self.engine is None:
            self.engine = self._start_engine(rows, more)
            shape = self.engine.slab.shape
            self._free = deque(range(shape.slots))
            reserve = min(shape.slots - 1, 2 * max(1, self.engine.workers))
            per_slot = shape.rows * (4 * shape.dimensions + 200)
            self.flush_size = FlushSize((shape.slots - reserve) * per_slot // 2)

    def _backlog(self) -> bool:
        """Whether to wait before reading more: enough shards are cut to keep every worker busy meanwhile."""
        if self.engine is None:
            return False
        return (
            len(self._shards) > 2 * max(1, self.engine.workers)
            or len(self._reuse) >= 4 * SHARD_ROWS
            or (self._waiting_rows >= WINDOW_ROWS and bool(self._embedding() or self._shards))
            or len(self._rejects) + len(self._deletes) >= 2 * NOTICE_ROWS
        )

    def _embedding(self) -> bool:
        return len(self._loads) > len(self._filled) + len(self._writing)

    def _unfinished(self) -> bool:
        if self.engine is None:
            if self._rejects or self._deletes or self._reuse:
                self._ensure_engine(0, False)
                return True
            return False
        waiting = (self._shards, self._reuse, self._loads, self._filled, self._writing, self._rejects, self._deletes)
        return any(waiting) or not self.engine.writer_idle

    def _pump(self, timeout: float, *, last: bool = False, phase: str = "embed") -> None:
        """One turn: give work, send a flush, take what has happened."""
        if self._should_stop() and not self._stopping:
            raise Stop
        self._heartbeat(phase)
        if self.engine is None:
            return
        self._give_work(last)
        self._send_flush(last)
        # Waiting makes sense only for an answer that is due.
        busy = self._embedding() or not self.engine.writer_idle
        for event in self.engine.poll(timeout if busy else 0.0):
            self._happened(event)
        # At once and not after the next page, for which the database would have to wait.
        self._send_flush(last)
        self._on_progress(self.counts)
        # Only now: an answer that came beside the one that went over the limit must not be lost.
        self._check_limits()

    def _give_work(self, last: bool) -> None:
        assert self.engine is not None
        shape = self.engine.slab.shape
        while self._reuse and self._free and (last or len(self._reuse) >= SHARD_ROWS):
            self._fill_from_cache(shape.rows, shape.blob_bytes)
        while self._shards and self._free and self.engine.wants_work():
            fault("pipeline.dispatch")
            rows = self._shards.popleft()
            slot, load = self._lease(rows, EMBEDDED)
            self.engine.embed(slot, load.generation, len(rows))

    def _lease(self, rows: list[tuple[Row, int, bytes]], kind: int) -> tuple[int, _Load]:
        assert self.engine is not None
        number = self._free.popleft()
        slot = self.engine.slab.slots[number]
        self._generation += 1
        only_rows = [row for row, _, _ in rows]
        slot.put(self._generation, only_rows, [_microseconds(row.record.source_at) for row in only_rows])
        size = slot.text_bytes + len(rows) * (4 * self.engine.slab.shape.dimensions + 100)
        load = _Load(only_rows, [s for _, s, _ in rows], kind, [d for _, _, d in rows], self._generation, size)
        self._loads[number] = load
        return number, load

    def _fill_from_cache(self, capacity: int, blob_bytes: int) -> None:
        """A slot of rows whose text has been embedded already in this run."""
        assert self.engine is not None
        take, size = 0, 0
        for row, _, _ in self._reuse[:capacity]:
            size += text_bytes(row)
            if size > blob_bytes and take:
                break
            take += 1
        rows, self._reuse = self._reuse[:take], self._reuse[take:]
        number, load = self._lease(rows, REUSED)
        slot = self.engine.slab.slots[number]
        for i, digest in enumerate(load.hashes):
            slot.vectors[i] = self._cache.take(digest)
        self._filled.append(number)

    def _send_flush(self, last: bool) -> None:
        engine, size = self.engine, self.flush_size
        assert engine is not None
        assert size is not None
        if not engine.writer_idle or not (self._filled or self._rejects or self._deletes):
            return
        waiting = sum(self._loads[number].size for number in self._filled)
        idle = not self._embedding() and not self._shards
        tight = len(self._free) < 2 * max(1, engine.workers)
        late = time.monotonic() - self._last_flush > MAX_WAIT_SECONDS
        many = len(self._rejects) + len(self._deletes) >= NOTICE_ROWS
        if not (waiting >= size.target or tight or late or many or (last and (idle or self._stopping))):
            return
        if self._index_decision(engine):
            return
        fault("pipeline.flush")
        slots: list[SlotRows] = []
        sent = left_out = 0
        while self._filled and ((sent < size.target and left_out < LEFT_OUT_ROWS) or not slots):
            number = self._filled.popleft()
            load = self._loads[number]
            sent += load.size
            self._skip_unfit_and_outdated(number, load)
            self._writing[number] = load
            left_out += len(load.skip)
            slots.append(SlotRows(number, load.generation, tuple(sorted(load.skip)), load.crcs))
            if not self._unique_keys:
                self._sent.update((row.record.entity, row.record.record_id) for row in load.rows)
                if self._deletes:
                    self._keep_rewritten(load)
        self.counts.flushes += 1
        self._last_flush = time.monotonic()
        rejects = self._rejects[: _first_of(self._rejects, MESSAGE_BYTES // 2)]
        deletes = list(islice(self._deletes, _first_of(self._deletes, MESSAGE_BYTES // 2)))
        self._sent_rejects = len(rejects)
        for key in deletes:
            del self._deletes[key]
        if not self._unique_keys:
            self._sent.update(deletes)
            self._sent_deletes = deletes
        engine.request(Flush(self.counts.flushes, tuple(slots), tuple(rejects), tuple(deletes)))

    def _keep_rewritten(self, load: _Load) -> None:
        """A record that was emptied and then given a text again stays: a flush writes first, then removes."""
        for i, row in enumerate(load.rows):
            key = (row.record.entity, row.record.record_id)
            if i not in load.skip and key in self._deletes:
                del self._deletes[key]
                self._kept.add(key)

    def _skip_unfit_and_outdated(self, number: int, load: _Load) -> None:
        """Leave out rows the worker gave a code, and rows of which a newer one was read."""
        assert self.engine is not None
        found = self.engine.slab.slots[number].code[: len(load.rows)]
        if not self._latest and not found.any():
            return
        codes = found.tolist()
        for i, row in enumerate(load.rows):
            key = (row.record.entity, row.record.record_id)
            if codes[i]:
                load.skip.add(i)
                reason, detail = ROW_REASONS[codes[i]]
                self._reject(Reject(*key, reason, detail, load.hashes[i], row.record.position))
                self._forget(key)
            elif self._latest.get(key, 0) > load.sequences[i]:
                load.skip.add(i)
                self.counts.superseded += 1
                self._forget(key)

    def _index_decision(self, engine: Engine) -> bool:
        """Ask the writer to drop the search indexes if most of the table will be written. True if it was asked."""
        # A run that is being stopped will not be there to build them again.
        if self.index.deferred or self._stopping or not self._store.has_vector_index:
            return False
        counts = self.counts
        decision = decide(
            rows_in_index=self._rows_at_start or 0,
            estimate=self._estimate,
            read=counts.read,
            to_write=counts.read - counts.unchanged - counts.rejected - counts.superseded,
            written=counts.stored + counts.reused,
        )
        self.index.decided(decision)
        if decision.action is IndexAction.KEPT:
            return False
        engine.request(PrepareIndex())
        return True

    # -- what has happened -----------------------------------------------------------------------------

    def _happened(self, event: Event) -> None:
        if isinstance(event, SlotFilled):
            self._slot_filled(event)
        elif isinstance(event, Flushed):
            self._flushed(event)
        elif isinstance(event, IndexPrepared):
            self.index.dropped = event.outcome
        elif isinstance(event, Finished):
            self._finished = event
        else:
            assert isinstance(event, Note)
            self.warnings.append(event.text)
            self._on_note(event.text)

    def _slot_filled(self, event: SlotFilled) -> None:
        fault("pipeline.embedded")
        assert self.engine is not None
        load = self._loads[event.slot]
        if load.generation != event.generation:
            raise KdbFastError(f"Slot {event.slot} was filled for another use; this is a defect of kdb-fast.")
        counts = self.counts
        counts.tokens += event.tokens
        counts.padded_tokens += event.padded_tokens
        counts.truncated += event.truncated
        counts.embed_seconds += event.seconds
        load.crcs = event.crcs
        self._filled.append(event.slot)
        slot = self.engine.slab.slots[event.slot]
        codes = slot.code[: len(load.rows)]
        self._cache.put(load.hashes, slot.vectors[: len(load.rows)])
        for i, digest in enumerate(load.hashes):
            if self._in_flight and not codes[i]:
                self._has_vector(load.rows[i], load.sequences[i])
            waiting = self._waiters.pop(digest, None)
            if not waiting:
                continue
            self._waiting_rows -= len(waiting)
            for row, sequence in waiting:
                if codes[i]:
                    # What the model cannot embed for one it cannot embed for its equals.
                    reason, detail = ROW_REASONS[int(codes[i])]
                    self._reject(
                        Reject(row.record.entity, row.record.record_id, reason, detail, digest, row.record.position)
                    )
                    self._forget((row.record.entity, row.record.record_id))
                else:
                    self._take_from_cache(row, sequence, digest)
        if codes.any():
            for i in codes.nonzero()[0].tolist():
                self._cache.drop(load.hashes[i])

    def _flushed(self, event: Flushed) -> None:
        fault("pipeline.flushed")
        assert self.flush_size is not None
        counts = self.counts
        counts.write_seconds += event.seconds
        counts.bytes_written += event.bytes
        counts.deleted += event.deleted
        self._rejects = self._rejects[self._sent_rejects :]
        self._sent_rejects = 0
        lost, refused = rows_of_bits(event.lost), rows_of_bits(event.rejected)
        for number, load in self._writing.items():
            kind = "stored" if load.kind == EMBEDDED else "reused"
            plain = self._unique_keys and not (load.skip or lost or refused)
            written = len(load.rows) if plain else 0
            for i, row in enumerate(() if plain else load.rows):
                if i in load.skip:
                    continue
                key = (row.record.entity, row.record.record_id)
                if (number, i) in refused:
                    counts.rejected += 1
                    if key in self._kept:
                        self._deletes[key] = None
                elif (number, i) in lost:
                    counts.superseded += 1
                else:
                    written += 1
                    self._final(key, kind)
                self._forget(key)
            setattr(counts, kind, getattr(counts, kind) + written)
        self.flush_size.note(sum(load.size for load in self._writing.values()), event.seconds)
        for key in self._sent_deletes:
            earlier = self._seen.pop(hash(key), None)
            if earlier is not None:
                setattr(counts, earlier, getattr(counts, earlier) - 1)
                counts.superseded += 1
        self._sent_deletes = []
        self._kept.clear()
        for number in list(self._writing):
            self._release(number)
        self._writing = {}
        self._sent = set()

    def _has_vector(self, row: Row, sequence: int) -> None:
        """From now on older records of the same key are outdated."""
        key = (row.record.entity, row.record.record_id)
        if self._in_flight.get(key, 0) > 1:
            self._latest[key] = max(sequence, self._latest.get(key, 0))

    def _forget(self, key: Key) -> None:
        """A record's fate is settled. What is known of its key is kept while an older one is on its way."""
        if self._unique_keys:
            return
        self._in_flight[key] -= 1
        if not self._in_flight[key]:
            del self._in_flight[key]
            self._latest.pop(key, None)

    def _release(self, number: int) -> None:
        self._loads.pop(number, None)
        self._free.append(number)


def _first_of(items: Iterable[str | tuple[Any, ...]], size: int) -> int:
    """How many of the items, in order, a message of about ``size`` bytes can hold; at least 1 where there is one."""
    count = 0
    for item in items:
        values = (item,) if isinstance(item, str) else item
        size -= 64 + sum(len(v) * (1 if v.isascii() else 4) for v in values if isinstance(v, str))
        if size < 0 and count:
            break
        count += 1
    return count


def _microseconds(moment: datetime | None) -> int:
    """Microseconds since 1970 UTC, exactly; NO_STAMP for None."""
    if moment is None:
        return NO_STAMP
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    delta = moment - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
