"""The library's way to write: any number of records in one transaction of the caller's connection.

Same encoder, same slots, same packing as a run; without a lock, because an application that indexes its
records as they change is not a run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..embedding.encoder import EncoderSpec, Tally
from ..embedding.vector_cache import VectorCache
from ..engine.base import Pool, SlotFilled, wait_for
from ..engine.plan import make_plan
from ..engine.sharding import cut_shards
from ..errors import ProviderInputError, RecordError
from ..ipc.row_block import NO_VALUE, ROW_REASONS
from ..ipc.slab import BLOB_BYTES, Row, Slab, SlabShape, Slot
from ..records import Key, Record, content_hash, cut_content, shown_key
from ..stores.base import FlushSlot, IndexStore, RunSpec
from ..tables.kdb_search import unfit

CHUNK_ROWS = 4096
"""Records that are sorted and embedded together; memory for more is never held."""

WORKERS_FROM = 1000
"""From so many records worker processes pay: starting two takes about 3 s, the time for 500 records of 30 tokens."""

SLOT_BYTES = 4 * BLOB_BYTES
"""Room for keys and texts that are embedded in this process and written with one statement."""


class Put(NamedTuple):
    """Index this record, whatever the index holds for its key. An empty text takes it out of the index."""

    record: Record


class Delete(NamedTuple):
    """Take this key out of the index."""

    key: Key


Operation = Put | Delete


class SlotEncoder(Protocol):
    """What embeds texts in this process: :class:`~kdb_fast.embedding.encoder.Encoder` or a provider's adapter."""

    def encode(self, texts: list[str], out: npt.NDArray[np.float32]) -> Tally:
        """Fill ``out`` (float32, texts × dimensions), row for row."""


Workers = tuple[Slab, Pool]
"""Slots, and processes that embed what is in them; what they embed is written here."""

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
    made = Record((entity, record_id), content)
    problem = unfit(made)
    if problem is None:
        cut = cut_content(content)
        return Put(made if cut is content else made._replace(content=cut))
    if problem[0] == "empty_text":
        return as_delete(made.key)
    raise RecordError(f"The record {shown_key(made.key)} cannot be indexed: {problem[1]}.", remedy=_NOTHING_STORED)


def as_puts(records: Iterable[object]) -> Iterator[Operation]:
    """:func:`as_put` for each record."""
    for number, record in enumerate(records):
        operation = as_put(record, number)
        if operation is not None:
            yield operation


def as_delete(key: Key) -> Operation | None:
    """The operation that takes a key out of the index; None for a key that can be in none.

    Raises:
        RecordError: The key is not text.
    """
    problem = unfit(Record(key, "text"))
    if problem is None:
        return Delete(key)
    if problem[0] == "wrong_type":
        raise RecordError(f"The record {shown_key(key)} cannot be deleted: {problem[1]}.")
    return None


def as_list(operation: Operation | None) -> list[Operation]:
    """The operation alone, or nothing."""
    return [] if operation is None else [operation]


class BatchWriter:
    """Embeds and writes operations within a transaction of ``store``.

    Args:
        store: Whose connection the caller's transaction is on.
        run: Number 0; fingerprint, model and dimensions of the provider.
        encoder: Gives the encoder for this process; None writes rows without vectors.
        spec: How worker processes embed; None keeps large batches in this process, too.

    Attributes:
        vectors: Those last embedded, by hash of their text. A writer that is given those of another one embeds none
            of them again.
    """

    def __init__(
        self,
        store: IndexStore,
        run: RunSpec,
        encoder: Callable[[], SlotEncoder] | None,
        spec: EncoderSpec | None = None,
    ) -> None:
        self._store, self._run, self._encoder, self._spec = store, run, encoder, spec
        if multiprocessing.current_process().daemon:
            self._spec = None  # Python lets no child of a daemonic process, as of multiprocessing.Pool, have children
        self._dimensions = run.dimensions if encoder is not None else 1
        # Room for every vector that a later equal text of a chunk needs.
        self.vectors = VectorCache(self._dimensions, 4 * self._dimensions * CHUNK_ROWS)

    def write(self, operations: Iterable[Operation]) -> int:
        """Write all operations, within the transaction that the caller has begun; returns the records written.

        For a key that comes twice the last operation counts.

        Raises:
            RecordError: A record cannot be stored; the caller must roll back.
        """
        stream = iter(operations)
        total = 0
        workers: Workers | None = None
        with contextlib.ExitStack() as stack:
            while chunk := list(islice(stream, CHUNK_ROWS)):
                last = {key_of(op): op for op in chunk}
                puts = [op.record for op in last.values() if isinstance(op, Put)]
                deletes = sorted(key_of(op) for op in last.values() if isinstance(op, Delete))
                if self._encoder is None:
                    self._write_plain(puts)
                else:
                    if workers is None and self._spec is not None and len(puts) >= WORKERS_FROM:
                        workers = stack.enter_context(_start_workers(self._spec, self._dimensions))
                    self._write_embedded(puts, workers)
                if deletes:
                    self._store.upsert(self._run, [], deletes)
                total += len(puts)
        return total

    def _write_plain(self, records: list[Record]) -> None:
        for slot, shard in self._slots([Row(record) for record in records]):
            slot.put(1, shard, [NO_VALUE] * len(shard))
            self._store.upsert(self._run, [FlushSlot(slot, frozenset())], [], vectors=False)

    def _slots(self, rows: list[Row]) -> Iterator[tuple[Slot, list[Row]]]:
        """Rows as they are written with one statement, and a slot of this process that has room for them."""
        if not rows:
            return
        shape = SlabShape(1, min(CHUNK_ROWS, len(rows)), self._dimensions, SLOT_BYTES)
        slot = Slab.local(shape).slots[0]
        for shard in cut_shards(
            rows, shard_rows=shape.rows, shard_chars=SLOT_BYTES, blob_bytes=SLOT_BYTES, read_chars=SLOT_BYTES
        ):
            yield slot, _in_order(shard)

    def _write_embedded(self, records: list[Record], workers: Workers | None) -> None:
        """Embed each distinct text once, then write all records, those with equal texts from the same vector."""
        cache = self.vectors
        first: dict[bytes, Record] = {}
        others: dict[Key, bytes] = {}
        rows: list[Row] = []
        for record in records:
            digest = content_hash(record.content)
            if digest in cache:
                cache.pin(digest)  # it must outlast the vectors of this chunk
            elif digest not in first:
                first[digest] = record
                continue
            others[record.key] = digest
            rows.append(Row(record))
        for slot, shard in self._embedded([Row(record) for record in first.values()], workers):
            codes = slot.code[: len(shard)]
            if codes.any():
                bad = int(codes.nonzero()[0][0])
                record = shard[bad].record
                reason, detail = ROW_REASONS[int(codes[bad])]
                raise _not_embedded(record, f"{detail} ({reason})")
            cache.put([content_hash(row.record.content) for row in shard], slot.vectors[: len(shard)])
            self._store.upsert(self._run, [FlushSlot(slot, frozenset())], [])
        for slot, shard in self._slots(rows):
            slot.put(1, shard, [NO_VALUE] * len(shard))
            for i, row in enumerate(shard):
                digest = others[row.record.key]
                if digest in first:
                    cache.pin(digest)
                slot.vectors[i] = cache.take(digest)
            self._store.upsert(self._run, [FlushSlot(slot, frozenset())], [])

    def _embedded(self, rows: list[Row], workers: Workers | None) -> Iterator[tuple[Slot, list[Row]]]:
        """Shards with their vectors in a slot, which is free again when the next one is asked for."""
        if workers is None:
            yield from self._embedded_here(rows)
            return
        assert self._spec is not None
        slab, pool = workers
        shape = slab.shape
        shards = cut_shards(rows, shard_rows=shape.rows, blob_bytes=shape.blob_bytes, read_chars=self._spec.read_chars)
        waiting = deque(map(_in_order, shards))
        free = deque(range(shape.slots))
        given: dict[int, list[Row]] = {}
        lease = 0
        while waiting or given:
            while waiting and free and pool.wants_work():
                number, shard = free.popleft(), waiting.popleft()
                lease += 1
                slab.slots[number].put(lease, shard, [NO_VALUE] * len(shard))
                pool.embed(number, lease, len(shard))
                given[number] = shard
            for event in wait_for((pool,), 1.0):
                if isinstance(event, SlotFilled):
                    yield slab.slots[event.slot], given.pop(event.slot)
                    free.append(event.slot)

    def _embedded_here(self, rows: list[Row]) -> Iterator[tuple[Slot, list[Row]]]:
        for slot, shard in self._slots(rows):
            assert self._encoder is not None
            slot.put(1, shard, [NO_VALUE] * len(shard))
            try:
                self._encoder().encode(slot.contents(0, len(shard)), slot.vectors[: len(shard)])
            except ProviderInputError as error:
                raise _not_embedded(shard[error.index].record, error.reason) from error
            slot.mark_unfit(0, len(shard))
            yield slot, shard


def _in_order(shard: list[Row]) -> list[Row]:
    """Rows by key, so that two batches with the same keys do not lock each other's rows crosswise."""
    return sorted(shard, key=lambda row: row.record.key)


def _not_embedded(record: Record, why: str) -> RecordError:
    return RecordError(f"The record {shown_key(record.key)} cannot be embedded: {why}.", remedy=_NOTHING_STORED)


def key_of(operation: Operation) -> Key:
    """Of the record that an operation is about."""
    return operation.record.key if isinstance(operation, Put) else operation.key


def _start_workers(spec: EncoderSpec, dimensions: int) -> contextlib.AbstractContextManager[Workers]:
    from ..engine.start import workers_alone

    plan = make_plan(workers=None, dimensions=dimensions, model_bytes=spec.model.memory_bytes)
    return workers_alone(plan.shape, spec, workers=plan.workers, cpus=plan.cpus)
