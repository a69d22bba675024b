"""SearchEngine: the library's face, with the names and results of KameleonDB's own class.

Writing, embedding and searching are the same code that ``kdb-fast reindex`` and ``kdb-fast search`` run; this
module only finds the right connection and decides when a transaction begins and ends.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .batches import BatchWriter, Delete, Operation, Put, SlotEncoder, check
from .connections import Connections, connections_for
from .encoder import EncoderSpec
from .errors import UsageError
from .providers import EmbeddingProvider, FastEmbedProvider, ProviderEncoder, as_provider, provider_fingerprint
from .query import open_reader
from .records import Record
from .retrieval import IndexStatus, SearchResult
from .retrieval import search as ranked_search
from .stores.base import RunSpec, Store
from .stores.status import statuses

__all__ = ["IndexStatus", "SearchEngine", "SearchResult", "SessionBatch"]

QUEUE_BYTES = 32 * 1024 * 1024
"""Text a transaction queues in memory; beyond it the queue is written within the same database transaction."""

DEFAULT_DIMENSIONS = 384
"""Of the vector column when the table is created without a provider: KameleonDB's default model's."""


class SearchEngine:
    """Index records and search them by meaning and by keyword.

    May be used from several threads: writes are one at a time, searches run beside each other.

    Args:
        engine: A database URL as on the command line (``postgresql://…``, ``sqlite:///file.db``) or an
            SQLAlchemy engine. SQLite in memory works through an SQLAlchemy engine only.
        embedding_provider: Gives the vectors; any object with KameleonDB's provider methods. None keeps a
            keyword index only.

    Raises:
        UsageError: ``engine`` or ``embedding_provider`` is something else.
        DatabaseError: The database cannot be reached.
        SchemaError: The search tables are not what they must be, or hold vectors of another dimension.
    """

    def __init__(self, engine: Any, embedding_provider: EmbeddingProvider | Any | None = None) -> None:
        self._connections: Connections = connections_for(engine)
        self._provider = as_provider(embedding_provider) if embedding_provider is not None else None
        self._writing = threading.RLock()
        self._local = threading.local()
        self._prepared = False

    @property
    def embedding_provider(self) -> EmbeddingProvider | None:
        """The provider, or None."""
        return self._provider

    # -- writing ---------------------------------------------------------------------------------------

    def index_record(self, entity_name: str, record_id: str, content: str) -> None:
        """Index one record, or replace what is indexed for its key; an empty text takes it out.

        Within :meth:`transaction` it is queued.

        Raises:
            RecordError: The key or text cannot be stored.
        """
        self.index_records_batch([(entity_name, record_id, content)])

    def index_records_batch(self, records: Iterable[tuple[str, str, str]]) -> None:
        """Index any number of records in one transaction: all of them or none.

        Args:
            records: (entity name, record id, text) of each; any iterable, entities may be mixed. The last one
                of a key counts. From 1,000 records on, worker processes embed them; the result is the same.

        Raises:
            RecordError: A record cannot be stored.
        """
        self._do(check(Put(Record(entity, record_id, content))) for entity, record_id, content in records)

    def delete_record(self, entity_name: str, record_id: str) -> None:
        """Take a record out of the index; nothing happens if it is not there. Queued within :meth:`transaction`."""
        self._do([Delete(entity_name, record_id)])

    @contextlib.contextmanager
    def transaction(self) -> Iterator[SearchEngine]:
        """Queue what the block indexes and deletes, and write it as one batch when the block ends.

        An exception discards the queue and leaves the index untouched. A nested block joins the outer one.
        A queue beyond 32 MB of text is written early, within the same database transaction. The queue belongs
        to this thread; searches see it once it is written.
        """
        if self._queue() is not None:
            yield self
            return
        queue = _Queue(self)
        self._local.queue = queue
        try:
            yield self
            queue.commit()
        except BaseException:
            queue.discard()
            raise
        finally:
            self._local.queue = None

    def for_session(self, session: Any) -> SessionBatch:
        """Tie a batch to an SQLAlchemy ``Session``: written before its commit, in its transaction; discarded on
        its rollback.

        The session must be bound to the database of this engine, through psycopg 3 or sqlite3.
        """
        return SessionBatch(self, session)

    # -- reading ---------------------------------------------------------------------------------------

    def search(
        self,
        query: str,
        entity: str | None = None,
        entities: Sequence[str] | None = None,
        limit: int = 10,
        min_score: float = 0.0,
        where: Mapping[str, Any] | None = None,
    ) -> list[SearchResult]:
        """The best records for a query, best first, by reciprocal rank fusion (k = 60) of keyword and vector rank.

        Args:
            query: Any text; never an error.
            entity: Only this entity.
            entities: Only these entities.
            limit: At most so many results, 1 or more.
            min_score: Leave out results below this fused score (at most 2 ÷ 61).
            where: Exact values of fields of the record, all of which must match.

        Raises:
            UsageError: ``limit`` below 1, or a field in ``where`` that no searched entity has.
        """
        import numpy as np

        self._prepare()
        names = [*([entity] if entity else []), *(entities or [])]
        vector = None
        if self._provider is not None and query.strip():
            vector = np.asarray(self._provider.embed(query), dtype=np.float32)
        with self._connections.reading() as connection:
            reader = self._connections.reader(connection, open_reader)
            return ranked_search(
                reader, query, query_vector=vector, mode="hybrid", entities=names, limit=limit, min_score=min_score,
                where=where,
            )  # fmt: skip

    def get_status(self, entity: str | None = None) -> list[IndexStatus]:
        """State of the index for each entity, or for one."""
        self._prepare()
        fingerprint = provider_fingerprint(self._provider) if self._provider is not None else None
        with self._connections.reading() as connection:
            rows = statuses(connection, self._connections.dialect, fingerprint)
        return [
            IndexStatus(row.entity, row.indexed, row.pending or 0, row.last_updated, row.stale, row.rejected)
            for row in rows
            if entity is None or row.entity == entity
        ]

    def close(self) -> None:
        """Close the connections this engine has opened itself."""
        self._connections.close()

    # -- how it is done --------------------------------------------------------------------------------

    def _queue(self) -> _Queue | None:
        return getattr(self._local, "queue", None)

    def _do(self, operations: Iterable[Operation]) -> None:
        queue = self._queue()
        if queue is not None:
            for operation in operations:
                queue.add(operation)
            return
        stream = iter(operations)
        first = next(stream, None)
        if first is None:
            return
        self._prepare()
        with self._writing, self._connections.store() as store, store.unit():
            self._writer(store).write(_chain(first, stream))

    def _writer(self, store: Store) -> BatchWriter:
        provider = self._provider
        if provider is None:
            return BatchWriter(store, RunSpec(0, "", "", DEFAULT_DIMENSIONS), None)
        run = RunSpec(0, provider_fingerprint(provider), provider.model_name, provider.dimensions)
        return BatchWriter(store, run, lambda: _encoder_of(provider), _spec_of(provider))

    def _prepare(self) -> None:
        if self._prepared:
            return
        with self._writing:
            if not self._prepared:
                dimensions = self._provider.dimensions if self._provider is not None else None
                with self._connections.store() as store:
                    if dimensions is None:
                        dimensions = store.column_dimensions() or DEFAULT_DIMENSIONS
                    store.prepare(dimensions)
                self._prepared = True


def _encoder_of(provider: EmbeddingProvider) -> SlotEncoder:
    return provider.encoder if isinstance(provider, FastEmbedProvider) else ProviderEncoder(provider)


def _spec_of(provider: EmbeddingProvider) -> EncoderSpec | None:
    """How worker processes embed; None for a provider that is called from this process only."""
    return provider.spec if isinstance(provider, FastEmbedProvider) else None


class _Queue:
    """Operations of one ``with search.transaction()`` block."""

    def __init__(self, search: SearchEngine) -> None:
        self._search = search
        self._operations: dict[tuple[str, str], Operation] = {}
        self._bytes = 0
        self._open: contextlib.ExitStack | None = None
        self._store: Store | None = None

    def add(self, operation: Operation) -> None:
        if isinstance(operation, Put):
            key = (operation.record.entity, operation.record.record_id)
            self._bytes += len(operation.record.content)
        else:
            key = (operation.entity, operation.record_id)
        self._operations[key] = operation
        if self._bytes > QUEUE_BYTES:
            self._write()

    def _write(self) -> None:
        """Write what is queued within the database transaction of the block, which begins now if need be."""
        if not self._operations:
            return
        if self._store is None:
            self._search._prepare()
            self._open = contextlib.ExitStack()
            self._open.enter_context(self._search._writing)
            self._store = self._open.enter_context(self._search._connections.store())
            self._open.enter_context(self._store.unit())
        self._search._writer(self._store).write(self._operations.values())
        self._operations, self._bytes = {}, 0

    def commit(self) -> None:
        self._write()
        if self._open is not None:
            opened, self._open = self._open, None
            opened.close()

    def discard(self) -> None:
        self._operations = {}
        if self._open is None:
            return
        opened, self._open = self._open, None
        with contextlib.suppress(_Discarded):
            try:
                raise _Discarded
            except _Discarded as error:
                opened.__exit__(type(error), error, error.__traceback__)
                raise


class _Discarded(Exception):
    """Makes the database transaction of a block roll back."""


class SessionBatch:
    """Records that an SQLAlchemy session's commit will carry; made by :meth:`SearchEngine.for_session`."""

    def __init__(self, search: SearchEngine, session: Any) -> None:
        try:
            from sqlalchemy import event
        except ImportError:
            raise UsageError("for_session needs SQLAlchemy, which is not installed.") from None
        self._search, self._session = search, session
        self._operations: list[Operation] = []
        self._marks: dict[int, int] = {}
        event.listen(session, "before_commit", self._before_commit)
        event.listen(session, "after_soft_rollback", self._after_rollback)
        event.listen(session, "after_transaction_create", self._transaction_begun)

    def index_record(self, entity_name: str, record_id: str, content: str) -> None:
        """Queue a record for the session's commit. Raises RecordError for one that cannot be stored."""
        self._queue(check(Put(Record(entity_name, record_id, content))))

    def index_records_batch(self, records: Iterable[tuple[str, str, str]]) -> None:
        """Queue records for the session's commit."""
        for record in records:
            self.index_record(*record)

    def delete_record(self, entity_name: str, record_id: str) -> None:
        """Queue a deletion for the session's commit."""
        self._queue(Delete(entity_name, record_id))

    def _queue(self, operation: Operation) -> None:
        if not self._session.in_transaction():
            # A rollback of a session that has not begun is no event, and would leave the queue as it is.
            self._session.begin()
        self._operations.append(operation)

    def __len__(self) -> int:
        return len(self._operations)

    def _transaction_begun(self, session: Any, transaction: Any) -> None:
        if transaction.nested:
            self._marks[id(transaction)] = len(self._operations)

    def _before_commit(self, session: Any) -> None:
        # The commit of a savepoint also comes here; only the outermost commit makes anything durable.
        if not self._operations or session.in_nested_transaction():
            return
        search = self._search
        search._prepare()
        operations, self._operations = self._operations, []
        connection = session.connection().connection.driver_connection
        with search._writing, search._connections.borrowed(connection) as store:
            search._writer(store).write(operations)

    def _after_rollback(self, session: Any, previous: Any) -> None:
        if previous.nested:
            del self._operations[self._marks.pop(id(previous), 0) :]
        else:
            self._operations = []


def _chain(first: Operation, rest: Iterator[Operation]) -> Iterator[Operation]:
    yield first
    yield from rest
