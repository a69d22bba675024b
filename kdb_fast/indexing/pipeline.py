"""PARENT: records in, flushes out. Owns every slot and accounts for every record.

::

    page ─► unfit? ─► hash ─► unchanged? ─► known text? ──no──► window ─► shard ─► slot ─► worker ┐
              │                   │              │ yes                                           │
           rejects             counted     cached vector ─────────────► slot ─────────────────┐  │
                                                                                              ▼  ▼
                                        counted ◄── COMMIT ◄── writer ◄── flush ◄───────── filled slots

Every record ends as exactly one of stored, unchanged, reused, superseded or rejected (:mod:`..accounting`). This module
is the loop. What it decides with stands beside it: :mod:`.intake` (unchanged?) with :mod:`.screening` (unfit?),
:mod:`.text_reuse` (known text?), :mod:`.key_ledger` (outdated?), :mod:`.leases` (slots), :mod:`.flushing` (what is
written when), :mod:`.filling` (embedded rows on their way there) and :mod:`..tables.index_policy` (is the index dropped
for it?).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from ..accounting import Counts, Fate
from ..engine.base import Engine, Event, SlotFilled
from ..engine.sharding import SHARD_ROWS, WINDOW_ROWS
from ..errors import RejectLimitError
from ..faults import fault
from ..ipc.messages import Answer, Busy, Finish, Finished, Flushed, IndexPrepared, PrepareIndex
from ..records import Key, Record, Reject
from ..settings import RejectLimit
from ..stores.base import Store
from ..tables.index_policy import IndexPolicy, IndexRecord, decide
from ..tables.target import LiveRows
from .filling import Filling
from .flushing import MESSAGE_BYTES, FlushPlanner, first_of
from .intake import Intake, Page, ReadAgain, Split
from .key_ledger import KeyLedger
from .leases import Numbered, SlotPool
from .piece_ledger import PieceLedger
from .progress import Progress, Silent
from .screening import Screen
from .text_reuse import TextReuse

DRAIN_SECONDS = 6.0
"""A run that is being stopped waits so long for its last flushes: a container is killed ten seconds after SIGTERM.
What is not written by then is embedded again by the next run."""


BACKLOG_SHARDS = 256
"""Most shards that are cut before they are needed: a second's work of the parent. More are only memory."""


class StopRequested(Exception):
    """Raised inside the pipeline when a signal asked for the end."""


class Pipeline:
    """One pass over a source.

    Args:
        store: The parent's own connection, for look-ups.
        start_engine: Called once, with the number of rows that wait and whether more may come, when there is
            something to embed. Not called when everything is unchanged.
        screen: Tells which records can be stored.
        fingerprint: Of the model, to tell which rows are unchanged.
        dimensions: Of the vectors.
        read_chars: Characters of a text beyond which the model reads nothing.
        max_rejects: Beyond it the run ends.
        force: Embed unchanged records, too.
        split: Cuts a text into the pieces that are embedded in its place.
        unique_keys: No key comes twice.
        estimate: How many records there will be, where that is known.
        index_policy: What may be done with the search indexes.
        progress: Is told how far it is, after every step, and what a person should know.
        should_stop: Asked often; true ends the run after what is embedded has been written.
        on_phase: Called with the phase of the run at every turn.
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
        screen: Screen | None = None,
        force: bool = False,
        split: Split | None = None,
        unique_keys: bool = False,
        estimate: int | None = None,
        index_policy: IndexPolicy = IndexPolicy.DEFER,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.counts = Counts()
        self.index = IndexRecord()
        self.warnings: list[str] = []
        self.not_pruned: set[str] = set()
        self.engine: Engine | None = None
        self._store, self._start_engine, self._dimensions = store, start_engine, dimensions
        self._max_rejects, self._estimate, self._index_policy = max_rejects, estimate, index_policy
        self._progress, self._should_stop, self._on_phase = progress or Silent(), should_stop, on_phase
        self._ledger = PieceLedger(self.counts) if split else KeyLedger(self.counts, unique_keys=unique_keys)
        self._reuse = TextReuse(dimensions)
        self.flushes = FlushPlanner(self.counts, self._ledger)
        self._filling = Filling(self.counts, self._ledger, self._reuse, self.flushes)
        self._intake = Intake(
            store,
            screen or Screen(),
            self.counts,
            self._ledger,
            self._reuse,
            self.flushes,
            fingerprint=fingerprint,
            read_chars=read_chars,
            force=force,
            split=split,
        )
        self._slots: SlotPool | None = None
        self._shards: deque[list[Numbered]] = deque()
        self._finished: Finished | None = None
        self._all_read = self._stopping = False

    # -- the pass --------------------------------------------------------------------------------------

    def run(
        self,
        pages: Iterable[list[Record | Reject]],
        emptied: Callable[[], list[Key]] = lambda: [],
        unchanged: Callable[[], int] = lambda: 0,
        again: ReadAgain | None = None,
    ) -> None:
        """Read all pages and write everything that must be written.

        Args:
            pages: The records.
            emptied: Asked after each page for the keys of records read with it that have no text.
            unchanged: Asked after each page how many records were passed over with it.
            again: Gives the records of these keys as they are now; None where they cannot be read again.

        Raises:
            StopRequested: A signal asked for the end; what was embedded is committed.
            RejectLimitError: Too many records were rejected; what was embedded is committed.
            KdbFastError: The engine or the database failed for good.
        """
        self.flushes.reads_again = again is not None
        try:
            with contextlib.closing(self._intake.look_ahead(_read(pages, emptied, unchanged))) as looked_up:
                for page in looked_up:
                    self._take(page)
            self._all_read = True
            self._write_all()
            if again is not None:
                self._take_again(again, emptied)
        except StopRequested:
            self._progress.step("writing what is embedded; again ends at once")
            self.drain(DRAIN_SECONDS)
            raise
        except RejectLimitError:
            # Its remedy names the list of rejects, so they must be there.
            self._ensure_engine(0, False)
            self.drain()
            raise

    def _take(self, page: Page) -> None:
        """Take in a page."""
        for _ in self._intake.take_in(page):
            self._progress.update(self.counts)
            self._pump(0)
        if self._intake.is_full:
            self._cut()
            self._intake.widen()
        self._check_limits()
        if self.flushes.has_many_notices:
            self._ensure_engine(0, True)
        while self._backlog():
            self._pump(1.0)

    def _write_all(self) -> None:
        """Write all that was taken in."""
        self._cut(last=True)
        self._check_limits()
        while self._unfinished():
            self._pump(1.0, last=True)

    def _take_again(self, again: ReadAgain, emptied: Callable[[], list[Key]]) -> None:
        """Take the records again of which another program has written the row, or held it locked."""
        for pending in self.flushes.passes():
            for page in self._intake.read_again(pending, again, emptied):
                self._take(page)
            self._write_all()

    def drain(self, seconds: float = math.inf) -> None:
        """Write what is embedded, within ``seconds``; forget what is not."""
        end = time.monotonic() + seconds
        self._stopping = True
        self._intake.window, self._shards = [], deque()
        self._reuse.forget_waiting()
        if self.engine is None or self._slots is None:
            return
        for slot in self.engine.pool.cancel():
            self._slots.release(slot)
        # The shard each worker is in the middle of takes a second or two; a container has ten to end in.
        deadline = time.monotonic() + 3.0
        while self._embedding() and time.monotonic() < deadline:
            self._pump(0.2, last=True)
        while (self.flushes.unwritten or self._reuse.ready) and time.monotonic() < end:
            self._pump(1.0, last=True)

    def finish(self, prune: tuple[str, ...], build_index: bool = True, live_rows: LiveRows | None = None) -> None:
        """Remove rows of the entities in ``prune`` without a live record, and build whatever index is missing."""
        fault("pipeline.finish")
        if self.engine is None and prune == () and not build_index:
            return
        self._ensure_engine(0, False)
        while (part := first_of(prune, MESSAGE_BYTES)) < len(prune):
            self._ask(Finish(prune[:part], False, live_rows))
            prune = prune[part:]
        self.index.finished = self._ask(Finish(prune, build_index, live_rows)).outcome

    def _ask(self, message: Finish) -> Finished:
        """Have the writer do something after the last flush."""
        assert self.engine is not None
        self._finished = None
        self.engine.writer.request(message)
        while self._finished is None:
            self._pump(1.0, last=True, phase="index")
        done: Finished = self._finished
        self.counts.deleted += done.deleted
        self.counts.index_seconds += done.seconds
        self.warnings += done.warnings + done.outcome.warnings
        self.not_pruned |= set(done.not_pruned)
        return done

    # -- work for the engine ---------------------------------------------------------------------------

    def _check_limits(self) -> None:
        if not self._stopping:
            counts = self.counts
            self._max_rejects.check(rejected=counts.rejected, read=counts.read, finished=self._all_read)

    def _cut(self, *, last: bool = False) -> None:
        """The window becomes shards of similar length."""
        if self._intake.window:
            engine = self._ensure_engine(self._intake.waiting, not last)
            keep_part = engine.pool.full_shards and not last
            self._shards += self._intake.cut(engine.slab.shape, engine.pool.shard_chars, keep_part=keep_part)

    def _ensure_engine(self, rows: int, more: bool) -> Engine:
        if self.engine is None:
            self.engine = self._start_engine(rows, more)
            self._slots = SlotPool(self.engine.slab)
            self.flushes.start(self.engine.slab.shape, self.engine.pool.workers)
        return self.engine

    def _backlog(self) -> bool:
        """Whether to wait before reading more: enough shards are cut to keep every worker busy meanwhile."""
        return self.engine is not None and (
            len(self._shards) > min(2 * max(1, self.engine.pool.workers), BACKLOG_SHARDS)
            or len(self._reuse.ready) >= 4 * SHARD_ROWS
            or (self._reuse.waiting >= WINDOW_ROWS and bool(self._embedding() or self._shards))
            or self.flushes.has_too_many_notices
        )

    def _embedding(self) -> bool:
        """Whether a slot is with a worker."""
        return self._slots is not None and self._slots.leased > self.flushes.slots

    def _unfinished(self) -> bool:
        if self.engine is None or self._slots is None:
            if self.flushes.notices:
                self._ensure_engine(0, False)
            return self.engine is not None
        waiting = (self._shards, self._reuse.ready, self._slots.leased, self.flushes.notices)
        return any(waiting) or not self.engine.writer.idle

    def _pump(self, timeout: float, *, last: bool = False, phase: str = "embed") -> None:
        """One turn: give work, send a flush, take what has happened."""
        if self._should_stop() and not self._stopping:
            raise StopRequested
        self._on_phase(phase)
        engine, slots = self.engine, self._slots
        if engine is None or slots is None:
            return
        self._give_work(engine, slots, last)
        self._send_flush(engine, slots, last)
        # Waiting makes sense only for an answer that is due.
        for event in engine.poll(timeout if self._embedding() or not engine.writer.idle else 0.0):
            self._happened(event, slots)
        # At once and not after the next page, for which the database would have to wait.
        self._send_flush(engine, slots, last)
        self._progress.update(self.counts)
        # Only now: an answer that came beside the one that went over the limit must not be lost.
        self._check_limits()

    def _give_work(self, engine: Engine, slots: SlotPool, last: bool) -> None:
        while self._reuse.ready and slots.free and (last or len(self._reuse.ready) >= SHARD_ROWS):
            self._filling.reuse(slots)
        while self._shards and slots.free and engine.pool.wants_work():
            fault("pipeline.dispatch")
            lease = slots.lease(self._shards.popleft(), Fate.STORED)
            engine.pool.embed(lease.slot, lease.number, len(lease.rows))

    def _send_flush(self, engine: Engine, slots: SlotPool, last: bool) -> None:
        if not engine.writer.idle:
            return
        tight = slots.free < 2 * max(1, engine.pool.workers)
        nothing_comes = last and (self._stopping or not (self._shards or self._embedding()))
        if self.flushes.is_due(tight=tight, now=nothing_comes) and not self._drop_index(engine):
            fault("pipeline.flush")
            engine.writer.request(self.flushes.take())

    def _drop_index(self, engine: Engine) -> bool:
        """Ask the writer to drop the search indexes if most of the table will be written. True if it was asked."""
        # A run that is being stopped will not be there to build them again.
        if self.index.deferred or self._stopping or not self._store.has_vector_index:
            return False
        written = (self.counts.read, self.counts.to_write, self.counts.written)
        rows = self._intake.rows_at_start, self._estimate
        self.index.decided(decide(*rows, *written, policy=self._index_policy))
        if self.index.deferred and self.index.decision is not None:
            for outlook in self._store.build_outlook(self.index.decision.rows_after, self._dimensions):
                self._note(outlook)
            engine.writer.request(PrepareIndex())
        return self.index.deferred

    def _happened(self, event: Event, slots: SlotPool) -> None:
        if isinstance(event, Answer):
            self._progress.doing("")  # what took the writer long is over
        if isinstance(event, SlotFilled):
            self._filling.embedded(event, slots)
        elif isinstance(event, Busy):
            self._progress.doing(event.doing)
        elif isinstance(event, Flushed):
            fault("pipeline.flushed")
            for lease in self.flushes.flushed(event):
                slots.release(lease.slot)
        elif isinstance(event, IndexPrepared):
            self.index.dropped = event.outcome
            self.warnings += event.outcome.warnings
        elif isinstance(event, Finished):
            self._finished = event
        else:
            self._note(event.text)

    def _note(self, text: str) -> None:
        self.warnings.append(text)
        self._progress.note(text)


def _read(
    pages: Iterable[list[Record | Reject]], emptied: Callable[[], list[Key]], unchanged: Callable[[], int]
) -> Iterator[Page]:
    """The pages of a source, each with what else was read with it."""
    for page in pages:
        fault("source.page")
        yield Page(page, emptied(), unchanged())
