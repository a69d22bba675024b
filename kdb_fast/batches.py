"""The library's way to write: any number of records in one transaction of the caller's connection.

Same encoder, same slots, same packing as a run; without a lock, because an application that indexes its
records as they change is not a run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .encoder import CHARS_PER_TOKEN, EncoderSpec, Tally
from .engine import Engine, SlotFilled
from .errors import RecordError, UsageError
from .plan import make_plan
from .provider_errors import ProviderInputError
from .records import Record, content_hash, cut_content, storable_key, unfit
from .sharding import SHARD_ROWS, cut_shards
from .slab import NO_STAMP, ROW_NOT_FINITE, ROW_REASONS, ROW_ZERO, Row, Slab, SlabShape, Slot
from .stores.base import FlushSlot, RunSpec, Store
from .vectors import VectorCache

CHUNK_ROWS = 4096
"""Records that are sorted and embedded together; memory for more is never held."""

WORKERS_FROM = 1000
"""From so many records worker processes pay: starting two takes about 3 s, the time for 500 records of 30 tokens."""


QUEUE_BYTES = 32 * 1024 * 1024
"""Memory for what a transaction queues, about; beyond it the queue is written within the same database transaction."""

OPERATION_BYTES = 300
"""Memory of a queued operation beside its text: two tuples, the key's strings and a place in a dictionary."""


class Put(NamedTuple):
    """Index this record, whatever the index holds for its key. An empty text takes it out of the index."""

    record: Record


class Delete(NamedTuple):
    """Take this key out of the index."""

    entity: str
    record_id: str


Operation = Put | Delete


class SlotEncoder(Protocol):
    """What embeds texts in this process: :class:`~kdb_fast.encoder.Encoder` or a provider's adapter."""

    def encode(self, texts: list[str], out: npt.NDArray[np.float32]) -> Tally:
        """Fill ``out`` (float32, texts × dimensions), row for row."""


_NOTHING_STORED = "Nothing of the batch was stored; leave it out or correct it."


def as_put(record: Any, number: int = 0) -> Operation | None:
    """The operation that indexes a record, or, where its text is empty, the one that takes it out of the index.

    Args:
        record: (entity name, record id, text).
        number: Its position in a batch, for messages.

    Raises:
        RecordError: It cannot be stored; names the key and the reason.
    """
    try:
        entity, record_id, content = record
    except (TypeError, ValueError):
        raise RecordError(
            f"Record {number} of the batch is {type(record).__name__}; expected (entity name, record id, text).",
            remedy=_NOTHING_STORED,
        ) from None
    made = Record(entity, record_id, content)
    problem = unfit(made)
    if problem is None:
        cut = cut_content(content)
        return Put(made if cut is content else made._replace(content=cut))
    if problem[0] == "empty_text":
        return as_delete(entity, record_id)
    raise RecordError(f"The record {_shown(made)} cannot be indexed: {problem[1]}.", remedy=_NOTHING_STORED)


def as_puts(records: Iterable[object]) -> Iterator[Operation]:
    """:func:`as_put` for each record."""
    for number, record in enumerate(records):
        operation = as_put(record, number)
        if operation is not None:
            yield operation


def as_delete(entity: str, record_id: str) -> Operation | None:
    """The operation that takes a key out of the index; None for a key that can be in none.

    Raises:
        RecordError: The key is not text.
    """
    record = Record(entity, record_id, "text")
    problem = unfit(record)
    if problem is None:
        return Delete(entity, record_id)
    if problem[0] == "wrong_type":
        raise RecordError(f"The record {_shown(record)} cannot be deleted: {problem[1]}.")
    return None


class BatchWriter:
    """Embeds and writes operations within a transaction of ``store``.

    Args:
        store: Whose connection the caller's transaction is on.
        run: Number 0; fingerprint, model and dimensions of the provider.
        encoder: Gives the encoder for this process; None writes rows without vectors.
        spec: How worker processes embed; None keeps large batches in this process, too.
        workers_from: Batches of at least so many records use worker processes; None means WORKERS_FROM.
    """

    def __init__(
        self,
        store: Store,
        run: RunSpec,
        encoder: Callable[[], SlotEncoder] | None,
        spec: EncoderSpec | None = None,
        *,
        workers_from: int | None = None,
    ) -> None:
        self._store, self._run, self._encoder, self._spec = store, run, encoder, spec
        self._workers_from = WORKERS_FROM if workers_from is None else workers_from
        if multiprocessing.current_process().daemon:
            self._spec = None  # Python lets no child of a daemonic process, as of multiprocessing.Pool, have children
        dimensions = run.dimensions if encoder is not None else 1
        self._shape = SlabShape(1, SHARD_ROWS, dimensions)
        self._dimensions = dimensions

    def write(self, operations: Iterable[Operation]) -> int:
        """Write all operations, within the transaction that the caller has begun; returns the records written.

        For a key that comes twice the last operation counts.

        Raises:
            RecordError: A record cannot be stored; the caller must roll back.
        """
        stream = iter(operations)
        total = 0
        engine: Engine | None = None
        try:
            while chunk := list(islice(stream, CHUNK_ROWS)):
                last = {_key(op): op for op in chunk}
                puts = [op.record for op in last.values() if isinstance(op, Put)]
                deletes = [_key(op) for op in last.values() if isinstance(op, Delete)]
                if self._encoder is None:
                    self._write_plain(puts)
                else:
                    if engine is None and self._spec is not None and len(puts) >= self._workers_from:
                        engine = _start_workers(self._spec, self._dimensions)
                    self._write_embedded(puts, engine)
                if deletes:
                    self._store.put(self._run, [], deletes)
                total += len(puts)
        finally:
            if engine is not None:
                engine.close()
        return total

    def _write_plain(self, records: list[Record]) -> None:
        slot = Slab.local(self._shape).slots[0]
        for shard in self._shards([Row(record) for record in records]):
            slot.put(1, shard, [NO_STAMP] * len(shard))
            self._store.put(self._run, [FlushSlot(slot, frozenset())], [], vectors=False)

    def _shards(self, rows: list[Row]) -> Iterator[list[Row]]:
        read = self._spec.model.max_tokens * CHARS_PER_TOKEN if self._spec is not None else 8192
        return cut_shards(rows, blob_bytes=self._shape.blob_bytes, read_chars=read)

    def _write_embedded(self, records: list[Record], engine: Engine | None) -> None:
        """Embed each distinct text once, then write all records, those with equal texts from the same vector."""
        first: dict[bytes, Record] = {}
        others: list[tuple[Record, bytes]] = []
        for record in records:
            digest = content_hash(record.content)
            if digest in first:
                others.append((record, digest))
            else:
                first[digest] = record
        # Room for every vector that a later equal text needs: one chunk.
        cache = VectorCache(self._dimensions, 4 * self._dimensions * CHUNK_ROWS)
        rows = [Row(record) for record in first.values()]
        for slot, shard in self._embedded(rows, engine):
            codes = slot.code[: len(shard)]
            if codes.any():
                bad = int(codes.nonzero()[0][0])
                record = shard[bad].record
                reason, detail = ROW_REASONS[int(codes[bad])]
                raise _not_embedded(record, f"{detail} ({reason})")
            self._store.put(self._run, [FlushSlot(slot, frozenset())], [])
            if others:
                cache.put([content_hash(row.record.content) for row in shard], slot.vectors[: len(shard)])
        if not others:
            return
        digest_of = {(record.entity, record.record_id): digest for record, digest in others}
        slot = Slab.local(self._shape).slots[0]
        for shard in self._shards([Row(record) for record, _ in others]):
            slot.put(1, shard, [NO_STAMP] * len(shard))
            for i, row in enumerate(shard):
                digest = digest_of[row.record.entity, row.record.record_id]
                cache.pin(digest)
                slot.vectors[i] = cache.take(digest)
            self._store.put(self._run, [FlushSlot(slot, frozenset())], [])

    def _embedded(self, rows: list[Row], engine: Engine | None) -> Iterator[tuple[Slot, list[Row]]]:
        """Shards with their vectors in a slot, which is free again when the next one is asked for."""
        if engine is None:
            yield from self._embedded_here(rows)
            return
        free = deque(range(engine.slab.shape.slots))
        waiting = deque(self._shards(rows))
        given: dict[int, list[Row]] = {}
        generation = 0
        while waiting or given:
            while waiting and free and engine.wants_work():
                number, shard = free.popleft(), waiting.popleft()
                generation += 1
                engine.slab.slots[number].put(generation, shard, [NO_STAMP] * len(shard))
                engine.embed(number, generation, len(shard))
                given[number] = shard
            for event in engine.poll(1.0):
                if isinstance(event, SlotFilled):
                    yield engine.slab.slots[event.slot], given.pop(event.slot)
                    free.append(event.slot)

    def _embedded_here(self, rows: list[Row]) -> Iterator[tuple[Slot, list[Row]]]:
        assert self._encoder is not None
        encoder = self._encoder()
        slot = Slab.local(self._shape).slots[0]
        for shard in self._shards(rows):
            slot.put(1, shard, [NO_STAMP] * len(shard))
            vectors = slot.vectors[: len(shard)]
            try:
                encoder.encode(slot.contents(0, len(shard)), vectors)
            except ProviderInputError as error:
                raise _not_embedded(shard[error.index].record, error.reason) from error
            codes = slot.code[: len(shard)]
            codes[~vectors.any(axis=1)] = ROW_ZERO
            codes[~np.isfinite(vectors).all(axis=1)] = ROW_NOT_FINITE
            yield slot, shard


def _not_embedded(record: Record, why: str) -> RecordError:
    return RecordError(f"The record {_shown(record)} cannot be embedded: {why}.", remedy=_NOTHING_STORED)


def _shown(record: Record) -> str:
    """The key of a record for a message, whatever it is."""
    return f"{storable_key(record.entity, 60)!r}/{storable_key(record.record_id, 60)!r}"


def _key(operation: Operation) -> tuple[str, str]:
    if isinstance(operation, Put):
        return operation.record.entity, operation.record.record_id
    return operation.entity, operation.record_id


class Queue:
    """Operations of one ``with search.transaction()`` block, the last one of each key.

    Args:
        begin: Begins the database transaction and gives what writes in it; leaving it commits, an exception rolls
            back. Called when there is something to write.
    """

    def __init__(self, begin: Callable[[], AbstractContextManager[BatchWriter]]) -> None:
        self._begin = begin
        self._operations: dict[tuple[str, str], Operation] = {}
        self._bytes = 0
        self._open = contextlib.ExitStack()
        self._writer: BatchWriter | None = None
        self._incomplete = False

    def add(self, operations: Iterable[Operation]) -> None:
        """Queue all operations, or none if one cannot be made.

        Raises:
            RecordError: A record cannot be stored.
        """
        added: dict[tuple[str, str], Operation] = {}
        size, early = 0, False
        try:
            for operation in operations:
                added[_key(operation)] = operation
                size += OPERATION_BYTES + (len(operation.record.content) if isinstance(operation, Put) else 0)
                if self._bytes + size > QUEUE_BYTES:
                    early = True
                    self._operations.update(added)
                    added, size = {}, 0
                    self._write()
        except BaseException:
            # What was written early can only be taken back with the whole block.
            self._incomplete = self._incomplete or early
            raise
        self._operations.update(added)
        self._bytes += size

    def _write(self) -> None:
        if self._writer is None:
            self._writer = self._open.enter_context(self._begin())
        self._writer.write(self._operations.values())
        self._operations, self._bytes = {}, 0

    def commit(self) -> None:
        """Write what is queued and commit.

        Raises:
            UsageError: A batch had failed after a part of it was written.
        """
        if self._incomplete:
            raise UsageError(
                "A batch of this transaction failed after a part of it had been written.",
                remedy="Nothing of the transaction was stored; let the error of the batch leave the block.",
            )
        if self._operations:
            self._write()
        self._open.close()

    def discard(self) -> None:
        """Forget what is queued, and roll back what was written."""
        self._operations = {}
        with contextlib.suppress(Exception):  # the caller's own exception is under way
            self._open.__exit__(_Discarded, _Discarded(), None)


class _Discarded(Exception):
    """Makes the database transaction of a block roll back."""


def _start_workers(spec: EncoderSpec, dimensions: int) -> Engine:
    from .supervisor import ProcessEngine

    plan = make_plan(workers=None, dimensions=dimensions, model_bytes=spec.model.size_bytes)
    return ProcessEngine(plan.shape, spec, None, RunSpec(0, "", "", dimensions), workers=plan.workers, cpus=plan.cpus)
