"""When the library's operations are written: each batch in a transaction, or all of a block in one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, islice

from ..db.pg_errors import CONFLICTS, sqlstate
from ..db.retrying import Backoff, ErrorKind, retry
from ..embedding.vector_cache import VectorCache
from ..errors import DatabaseError, UsageError
from ..records import Key
from .batches import BatchWriter, Operation, Put, key_of

QUEUE_BYTES = 32 * 1024 * 1024
"""Memory for what a transaction queues, about; beyond it the queue is written within the same database transaction."""

OPERATION_BYTES = 300
"""Memory of a queued operation beside its text: two tuples, the key's strings and a place in a dictionary."""

WAITS = (0.05, 0.2, 0.8, 3.0)
"""Longest wait, in seconds, before each further attempt after a conflict with another transaction."""

Begin = Callable[[], AbstractContextManager[BatchWriter]]
"""Begins a database transaction and gives what writes in it; leaving it commits, an exception rolls back."""


def write_at_once(begin: Begin, operations: Iterable[Operation]) -> None:
    """Write all operations in one transaction; nothing is begun if there are none.

    After a deadlock with another transaction they are written again, without embedding the same texts again.

    Raises:
        RecordError, DatabaseError, ProviderError: Nothing was stored. A deadlock is an error only if it comes again
            and again, or if the operations were more than QUEUE_BYTES and are not remembered.
    """
    stream = _Repeatable(operations)
    if stream.empty:
        return
    vectors: VectorCache | None = None

    def attempt() -> None:
        nonlocal vectors
        with begin() as writer:
            vectors = writer.vectors = vectors or writer.vectors
            writer.write(stream)

    def kind(error: Exception) -> ErrorKind | None:
        conflict = isinstance(error, DatabaseError) and sqlstate(error) in CONFLICTS
        return ErrorKind.PASSING if conflict and stream.whole else None

    retry(attempt, Backoff(math.inf, WAITS), kind, explain=lambda error: error)


class _Repeatable:
    """Operations that can be read again from the first one on, as long as there is room to remember them.

    Attributes:
        empty: Whether there are none.
        whole: Whether they can be read again.
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        stream = iter(operations)
        first = list(islice(stream, 1))
        self.empty = not first
        self._rest = chain(first, stream)
        self._read: list[Operation] = []
        self._bytes = 0
        self.whole = True

    def __iter__(self) -> Iterator[Operation]:
        yield from list(self._read)
        for operation in self._rest:
            if self.whole:
                self._read.append(operation)
                self._bytes += bytes_of(operation)
                if self._bytes > QUEUE_BYTES:
                    self._read, self.whole = [], False
            yield operation


def bytes_of(operation: Operation) -> int:
    """About how much memory an operation takes."""
    return OPERATION_BYTES + (len(operation.record.content) if isinstance(operation, Put) else 0)


class Queue:
    """Operations of one ``with search.transaction()`` block, the last one of each key.

    Args:
        begin: Called when there is something to write.
    """

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._operations: dict[Key, Operation] = {}
        self._bytes = 0
        self._open = contextlib.ExitStack()
        self._writer: BatchWriter | None = None
        self._incomplete = False

    def add(self, operations: Iterable[Operation]) -> None:
        """Queue all operations, or none if one cannot be made.

        Raises:
            RecordError: A record cannot be stored.
        """
        added: dict[Key, Operation] = {}
        size, early = 0, False
        try:
            for operation in operations:
                added[key_of(operation)] = operation
                size += bytes_of(operation)
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
        if self._writer is None:
            write_at_once(self._begin, self._operations.values())
            return
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
