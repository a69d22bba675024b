"""What goes into one transaction, and when.

How much: bytes, from the memory that is really there. Starts small, so that the first rows are safe within seconds;
doubles while flushes are quick; shrinks at once when memory gets short or the database is slow. A fixed ceiling, set
from the memory at the start, keeps a lucky moment from allowing more than the machine can bear later.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from ..accounting import Counts, Fate
from ..ipc.messages import Flush, Flushed, SlotRows, rows_of_bits
from ..ipc.slab import SlabShape
from ..records import Key, Reject, number_of
from ..resources import available_memory
from .key_ledger import KeyLedger
from .leases import SlotLease

FLOOR_BYTES = 512 * 1024
"""About 300 rows of 384 dimensions: below it the fixed cost of a transaction (3 ms) counts."""

CEILING_BYTES = 16 * 1024 * 1024
"""About 9,000 rows of 384 dimensions. Throughput is flat from 2 MB on, and what a crash can cost grows with it."""

MEMORY_SHARE = 32
"""The ceiling is at most available memory ÷ 32: the rows exist in the slab, as COPY data in the writer and in
libpq's buffers, and the database may be on the same machine."""

SLOW_SECONDS = 3.0
"""A flush that takes longer is halved: it holds locks and delays the answer to Ctrl-C."""

QUICK_SECONDS = 1.0

MAX_WAIT_SECONDS = 5.0
"""What is embedded is written after at most this long, also where a flush is not full."""

NOTICE_ROWS = 20_000
"""Rejects and deletions that are kept before they are written without waiting for vectors: about 5 MB."""

MESSAGE_BYTES = 32 * 1024
"""Rejects, deletions and numbers of left-out rows in one message to the writer, about. A pipe holds twice as much
at least, so that a writer which does not read, because it is stopped, never blocks the parent."""

LEFT_OUT_ROWS = 4_000
"""Rows of a flush that were rejected or outdated since they were embedded, about: their numbers are in the message."""

PASSES = 3
"""How often a record is taken whose row another program writes or holds locked meanwhile; then it is superseded."""

PAUSE_SECONDS = 0.5
"""Before such a record is read again: a transaction that holds its row may end."""

PENDING_KEYS = 100_000
"""Records that are kept to be read again because another program wrote or locked their rows: about 20 MB."""

REJECT_KEY_CHARS = 256
"""Characters or bytes of each part of a reject's key that are passed on."""

REJECT_DETAIL_CHARS = 600
"""Characters of a reason that are passed on; the table of rejects keeps less."""


class FlushSize:
    """The target size of the next flush.

    Args:
        capacity: Bytes that the slab can hold for flushes.
        memory: Gives the bytes that can be allocated now.
    """

    def __init__(self, capacity: int, memory: Callable[[], int] = available_memory) -> None:
        self._memory = memory
        self.available_at_start = memory()
        by_memory = self.available_at_start // MEMORY_SHARE
        self.ceiling = max(FLOOR_BYTES, min(CEILING_BYTES, capacity, by_memory))
        self.limited_by = (
            "memory" if by_memory < min(CEILING_BYTES, capacity) else "slots" if capacity < CEILING_BYTES else "ceiling"
        )
        self.target = FLOOR_BYTES
        self.largest = 0
        self.smallest: int | None = None
        self.shrunk = 0

    def note(self, size: int, seconds: float) -> None:
        """Learn from a flush of ``size`` bytes that took ``seconds``."""
        self.largest = max(self.largest, size)
        self.smallest = size if self.smallest is None else min(self.smallest, size)
        if self._memory() < self.available_at_start // 4 or seconds > SLOW_SECONDS:
            self.shrunk += 1
            self.target = max(FLOOR_BYTES, self.target // 2)
        elif seconds < QUICK_SECONDS and size >= self.target // 2:
            self.target = min(self.ceiling, self.target * 2)

    def describe(self) -> str:
        """What it did, for the summary."""
        if not self.largest:
            return "nothing to flush"
        smallest = self.smallest or 0
        text = f"{smallest / 1e6:.1f} to {self.largest / 1e6:.1f} MB, at most {self.ceiling / 1e6:.1f} MB ("
        text += {
            "memory": f"available memory {self.available_at_start / 1e9:.1f} GB ÷ {MEMORY_SHARE}",
            "slots": "the slots of the slab",
            "ceiling": "the fixed ceiling",
        }[self.limited_by]
        return text + ")" + (f", shrunk {number_of(self.shrunk, 'time')}" if self.shrunk else "")


class FlushPlanner:
    """What waits to be written, what is being written, and what became of it.

    One flush is written at a time. Its slots, rejects and deletions stay with the planner until the answer comes, so
    that nothing is counted or given back before its COMMIT.

    Args:
        counts: Where rejects and the rows of flushes are counted.
        ledger: The records on their way; those of a flush are settled by its answer.
    """

    def __init__(self, counts: Counts, ledger: KeyLedger) -> None:
        self.size: FlushSize | None = None
        self.reads_again = False
        """Whether records of which another program has written the row, or holds it locked, are to be read again."""
        self._pending: list[Key] = []
        self._counts, self._ledger = counts, ledger
        self._filled: deque[SlotLease] = deque()
        self._filled_bytes = 0
        self._rejects: list[Reject] = []
        self._deletes: dict[Key, None] = {}  # in order
        # Of the flush that is being written. Its rejects are still in the list, its deletions are not.
        self._writing: list[SlotLease] = []
        self._sent_rejects = 0
        self._sent_deletes: list[Key] = []
        self._kept: set[Key] = set()
        self._last = time.monotonic()

    def start(self, shape: SlabShape, workers: int) -> None:
        """There is an engine now, with a slab of this shape: some of its slots are for the workers meanwhile."""
        reserve = min(shape.slots - 1, 2 * max(1, workers))
        per_slot = shape.rows * (4 * shape.dimensions + 200)
        self.size = FlushSize((shape.slots - reserve) * per_slot // 2)

    @property
    def slots(self) -> int:
        """Slots that wait for their flush, or are in the one being written."""
        return len(self._filled) + len(self._writing)

    @property
    def notices(self) -> int:
        """Rejects and deletions that are not written yet."""
        return len(self._rejects) + len(self._deletes)

    @property
    def has_deletes(self) -> bool:
        """Whether a deletion is to be written that :meth:`keep` could take back."""
        return bool(self._deletes)

    @property
    def has_many_notices(self) -> bool:
        """Whether they are to be written without waiting for vectors."""
        return self.notices >= NOTICE_ROWS

    @property
    def has_too_many_notices(self) -> bool:
        """Whether reading waits until they are written."""
        return self.notices >= 2 * NOTICE_ROWS

    @property
    def unwritten(self) -> bool:
        """Whether a run that ends early has something to write; a deletion is left to the next run."""
        return bool(self._filled or self._rejects or self._writing)

    def filled(self, lease: SlotLease) -> None:
        """The slot's vectors are there."""
        self._filled.append(lease)
        self._filled_bytes += lease.size

    def reject(self, reject: Reject) -> None:
        """A reject is to be written; what is not fit for a message is cut."""
        self._rejects.append(
            reject._replace(
                key=tuple(part if isinstance(part, int | float) else _cut(part) for part in reject.key),
                detail=reject.detail[:REJECT_DETAIL_CHARS],
            )
        )

    def delete(self, keys: Iterable[Key]) -> None:
        """The rows of these keys are to leave the index."""
        self._deletes.update(dict.fromkeys(keys))

    def keep(self, key: Key) -> None:
        """The row of this key is what its newest record wants: it stays."""
        self._deletes.pop(key, None)

    def passes(self) -> Iterator[list[Key]]:
        """The keys of records that are to be read again, pass by pass and after a pause, until there are none."""
        for number in range(2, PASSES + 1):
            pending, self._pending = self._pending, []
            if not pending:
                return
            self.reads_again = number < PASSES
            time.sleep(PAUSE_SECONDS)
            yield pending

    def is_due(self, *, tight: bool, now: bool) -> bool:
        """Whether the next flush should go.

        Args:
            tight: Few slots are free.
            now: Nothing is on its way that could join it.
        """
        assert self.size is not None
        if not (self._filled or self._rejects or self._deletes):
            return False
        late = time.monotonic() - self._last > MAX_WAIT_SECONDS
        return self._filled_bytes >= self.size.target or tight or late or now or self.has_many_notices

    def take(self) -> Flush:
        """The next flush. The one before it must have been answered."""
        assert self.size is not None
        slots: list[SlotRows] = []
        sent = left_out = 0
        while self._filled and ((sent < self.size.target and left_out < LEFT_OUT_ROWS) or not slots):
            lease = self._filled.popleft()
            sent += lease.size
            # As late as this: a newer record may have got its vector since.
            self._leave_out_outdated(lease)
            left_out += len(lease.skip)
            self._writing.append(lease)
            slots.append(SlotRows(lease.slot, lease.number, tuple(sorted(lease.skip)), lease.crcs))
            if not self._ledger.unique_keys:
                self._ledger.writing(self._ledger.record_keys(lease.keys))
                if self._deletes:
                    self._keep_rewritten(lease)
        self._filled_bytes -= sent
        rejects = self._rejects[: first_of(self._rejects, MESSAGE_BYTES // 2)]
        deletes = list(islice(self._deletes, first_of(self._deletes, MESSAGE_BYTES // 2)))
        self._sent_rejects = len(rejects)
        for key in deletes:
            del self._deletes[key]
        if not self._ledger.unique_keys:
            self._ledger.writing(deletes)
            self._sent_deletes = deletes
        self._counts.flushes += 1
        self._last = time.monotonic()
        return Flush(self._counts.flushes, tuple(slots), tuple(rejects), tuple(deletes))

    def flushed(self, answer: Flushed) -> list[SlotLease]:
        """The flush is committed: its rows are accounted for. Returns its leases, whose slots are free again."""
        assert self.size is not None
        leases, self._writing = self._writing, []
        counts = self._counts
        counts.write_seconds += answer.seconds
        counts.bytes_written += answer.bytes
        counts.deleted += answer.deleted
        superseded, refused = rows_of_bits(answer.superseded), rows_of_bits(answer.rejected)
        # No record of theirs was written, or (in pieces) after they had been removed.
        self._ledger.removed(self._sent_deletes)
        for lease in leases:
            if not (lease.skip or superseded or refused):
                if self._ledger.unique_keys:
                    counts.add(lease.fate, len(lease.rows))
                else:
                    self._ledger.settle(lease.keys, lease.fate)
                continue
            for i, key in enumerate(lease.keys):
                if i in lease.skip:
                    continue
                fate = lease.fate
                if (lease.slot, i) in refused:
                    fate = Fate.REJECTED
                    if key in self._kept:
                        self._deletes[key] = None
                elif (lease.slot, i) in superseded:
                    if self.reads_again and len(self._pending) < PENDING_KEYS:
                        self._pending.append(key)
                        counts.read -= 1  # until it is read again
                        continue
                    fate = Fate.SUPERSEDED
                self._ledger.settle([key], fate)
        self.size.note(sum(lease.size for lease in leases), answer.seconds)
        self._ledger.written()
        self._rejects = self._rejects[self._sent_rejects :]
        self._sent_rejects, self._sent_deletes = 0, []
        self._kept.clear()
        return leases

    def _leave_out_outdated(self, lease: SlotLease) -> None:
        """Settle the rows of which a newer one can be stored: written later than it, they would undo it."""
        if not self._ledger.has_outdated:
            return
        for i, (key, sequence) in enumerate(zip(lease.keys, lease.sequences, strict=True)):
            if i not in lease.skip and self._ledger.is_outdated(key, sequence):
                lease.skip.add(i)
                self._ledger.settle([key], Fate.SUPERSEDED)

    def _keep_rewritten(self, lease: SlotLease) -> None:
        """A record that was emptied and then given a text again stays: a flush writes first, then removes."""
        for i, key in enumerate(lease.keys):
            if i not in lease.skip and key in self._deletes:
                del self._deletes[key]
                self._kept.add(key)


def _cut(part: object) -> str | bytes:
    return part[:REJECT_KEY_CHARS] if isinstance(part, bytes) else str(part)[:REJECT_KEY_CHARS]


def first_of(items: Iterable[str | tuple[Any, ...]], size: int) -> int:
    """How many of the items, in order, a message of about ``size`` bytes can hold; at least 1 where there is one."""
    count = 0
    for item in items:
        size -= 64 + _text_bytes(item)
        if size < 0 and count:
            break
        count += 1
    return count


def _text_bytes(item: object) -> int:
    """Bytes of the texts in an item, at most."""
    if isinstance(item, str):
        return len(item) * (1 if item.isascii() else 4)
    return sum(map(_text_bytes, item)) if isinstance(item, tuple) else 0
