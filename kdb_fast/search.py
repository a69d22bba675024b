"""SearchEngine: the library's face, with the names and results of KameleonDB's own class.

Writing, embedding and searching are the same code that ``kdb-fast reindex`` and ``kdb-fast search`` run; this
module only finds the right connection and decides when a transaction begins and ends.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .batches import BatchWriter, Operation, Queue, SlotEncoder, as_delete, as_put, as_puts
from .connections import connections_for
from .encoder import EncoderSpec
from .errors import UsageError
from .providers import (
    EmbeddingProvider,
    FastEmbedProvider,
    ProviderEncoder,
    ProviderError,
    as_provider,
    provider_fingerprint,
)
from .retrieval import IndexStatus, SearchReader, SearchResult, parse_query
from .retrieval import search as ranked_search
from .stores.base import TABLE, RunSpec, Store
from .stores.reading import Params, columns_of, load_definitions, quoted, rows_of
from .stores.status import _has_text, _newer, statuses

__all__ = ["IndexStatus", "SearchEngine", "SearchResult", "SessionBatch"]

DEFAULT_DIMENSIONS = 384
"""Of the vector column when the table is created without a provider: KameleonDB's default model's."""


class SearchEngine:
    """Index records and search them by meaning and by keyword.

    The search tables are created where they are missing. May be used from several threads: writes are one at a
    time, searches run beside each other. Connections are closed by :meth:`close`, at the end of a ``with``
    statement, or with the object.

    Args:
        engine: A database URL as on the command line (``postgresql://…``, ``sqlite:///file.db``) or an
            SQLAlchemy engine. SQLite in memory works through an SQLAlchemy engine only.
        embedding_provider: Gives the vectors; any object with KameleonDB's provider methods. None keeps a
            keyword index only. It stays the caller's to close.

    Raises:
        UsageError: ``engine`` or ``embedding_provider`` is something else.
        DatabaseError: The database cannot be reached.
        SchemaError: The search tables are not what they must be, or hold vectors of another dimension.
        ModelError: The model of the provider is not to be had.
    """

    def __init__(self, engine: Any, embedding_provider: EmbeddingProvider | Any | None = None) -> None:
        self._provider = as_provider(embedding_provider) if embedding_provider is not None else None
        self._connections = connections_for(engine)
        self._local = threading.local()
        # KameleonDB closes its engine without a word to its search engine.
        self._finalizer = weakref.finalize(self, self._connections.close)
        try:
            dimensions = int(self._provider.dimensions) if self._provider is not None else None
            self._connections.prepare(dimensions, DEFAULT_DIMENSIONS)
        except BaseException:
            self.close()
            raise

    @property
    def embedding_provider(self) -> EmbeddingProvider | None:
        """The provider, or None."""
        return self._provider

    # -- writing ---------------------------------------------------------------------------------------

    def index_record(self, entity_name: str, record_id: str, content: str) -> None:
        """Index one record, or replace what is indexed for its key; an empty text takes it out.

        Args:
            entity_name: 1 to 255 characters.
            record_id: Key within the entity, 1 to 36 characters.
            content: Text to embed and to search by keyword; what is beyond 1 MB of UTF-8 is cut off.

        Within :meth:`transaction` it is queued.

        Raises:
            RecordError: The key or text cannot be stored, or the text not be embedded.
            DatabaseError: The database was lost, or its lock not granted within 30 s.
            ProviderError: The embedding provider failed.
        """
        self._do(_present(as_put((entity_name, record_id, content))))

    def index_records_batch(self, records: Iterable[tuple[str, str, str]]) -> None:
        """Index any number of records in one transaction: all of them or none.

        Args:
            records: (entity name, record id, text) of each; any iterable, read as it is written. Entities may be
                mixed. The last one of a key counts. From 1,000 records on, worker processes embed them if the
                provider is FastEmbed; the result is the same.

        Raises:
            RecordError: A record cannot be stored or embedded; the message names its key.
            DatabaseError, ProviderError: As :meth:`index_record`.
        """
        self._do(as_puts(records))

    def delete_record(self, entity_name: str, record_id: str) -> None:
        """Take a record out of the index; nothing happens if it is not there. Queued within :meth:`transaction`.

        Raises:
            RecordError: The key is not text.
            DatabaseError: As :meth:`index_record`.
        """
        self._do(_present(as_delete(entity_name, record_id)))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[SearchEngine]:
        """Queue what the block indexes and deletes, and write it as one batch when the block ends.

        An exception discards the queue and leaves the index untouched. A nested block joins the outer one. A
        queue beyond 32 MB is written early, within the same database transaction. The queue belongs to this
        thread; searches see it once it is written.

        Raises:
            RecordError, DatabaseError, ProviderError: At the end of the block, as :meth:`index_records_batch`.
        """
        if self._queue() is not None:
            yield self
            return
        queue = self._local.queue = Queue(self._begin)
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

        The session must be bound to the database of this engine, through psycopg 3 or sqlite3. It gets the same
        batch each time.

        Raises:
            UsageError: ``session`` is something else, or SQLAlchemy is not installed.
        """
        real = _sqlalchemy_session(session)
        key = ("kdb_fast", id(self))
        batch = real.info.get(key)
        if not isinstance(batch, SessionBatch):
            batch = real.info[key] = SessionBatch(self, real)
        return batch

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
            query: Any text; never an error. Of a longer one the first 2,000 characters count.
            entity: Only this entity.
            entities: Only these entities (and ``entity``). None or an empty list: all.
            limit: At most so many results, 1 or more.
            min_score: Leave out results below this fused score (at most 2 ÷ 61).
            where: Exact values of fields of the record, all of which must match.

        Returns:
            At most ``limit`` results; fewer only if no more records match. Soft-deleted records are never among
            them.

        Raises:
            UsageError: ``limit`` below 1, or a field in ``where`` that no searched entity has.
            DatabaseError: The database cannot answer.
            ProviderError: The embedding provider failed.
        """
        if isinstance(entities, str):
            raise UsageError(f"entities is the string {entities!r}; expected a list of names.")
        names = [*([entity] if entity else []), *(entities or [])]
        vector = self._query_vector(parse_query(query).text)

        def work(connection: Any, reader: SearchReader) -> list[SearchResult]:
            return ranked_search(
                reader, query, query_vector=vector, mode="hybrid", entities=names, limit=limit, min_score=min_score,
                where=where,
            )  # fmt: skip

        return self._connections.read(work)

    def get_status(self, entity: str | None = None) -> list[IndexStatus]:
        """State of the index for each entity, or for one, by name.

        ``indexed`` are rows with a vector (without a provider all rows), ``pending`` the live records that have
        none or were changed since; 0 for an entity that KameleonDB does not define.

        Raises:
            DatabaseError: The database cannot answer.
        """
        provider, dialect = self._provider, self._connections.dialect
        fingerprint = provider_fingerprint(provider) if provider is not None else None

        def work(connection: Any, reader: SearchReader) -> list[IndexStatus]:
            found = statuses(connection, dialect, fingerprint)
            if provider is None:
                counts = keyword_counts(connection, dialect)
                found = [row._replace(indexed=counts[row.entity][0], pending=counts[row.entity][1]) for row in found]
            return [
                IndexStatus(row.entity, row.indexed, row.pending or 0, row.last_updated, row.stale, row.rejected)
                for row in found
                if entity is None or row.entity == entity
            ]

        return self._connections.read(work)

    def close(self) -> None:
        """Close the connections this engine has opened itself."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- how it is done --------------------------------------------------------------------------------

    def _queue(self) -> Queue | None:
        return getattr(self._local, "queue", None)

    def _do(self, operations: Iterable[Operation]) -> None:
        queue = self._queue()
        if queue is not None:
            queue.add(operations)
            return
        stream = iter(operations)
        first = next(stream, None)
        if first is None:
            return
        with self._begin() as writer:
            writer.write(_chain(first, stream))

    @contextlib.contextmanager
    def _begin(self) -> Iterator[BatchWriter]:
        with self._connections.writing() as store:
            yield self._writer(store)

    def _writer(self, store: Store) -> BatchWriter:
        provider = self._provider
        if provider is None:
            return BatchWriter(store, RunSpec(0, "", "", DEFAULT_DIMENSIONS), None)
        run = RunSpec(0, provider_fingerprint(provider), provider.model_name, int(provider.dimensions))
        return BatchWriter(store, run, lambda: _encoder_of(provider), _spec_of(provider))

    def _query_vector(self, text: str) -> npt.NDArray[np.float32] | None:
        """The embedding of a query; None where there is nothing to rank by: no provider, no text, no direction."""
        provider = self._provider
        if provider is None or not text:
            return None
        with np.errstate(over="ignore"):
            vector = np.asarray(provider.embed(text), dtype=np.float32)
        if vector.shape != (provider.dimensions,) or not np.isfinite(vector).all():
            raise ProviderError(
                f"{type(provider).__name__}.embed gave a vector of shape {vector.shape}; expected "
                f"{provider.dimensions} finite numbers."
            )
        return vector if vector.any() else None


class SessionBatch:
    """Records that an SQLAlchemy session's commit will carry; made by :meth:`SearchEngine.for_session`.

    They stay in memory until then. A savepoint that is rolled back takes with it what was queued since it began.
    ``len()`` is the number of operations queued.
    """

    def __init__(self, search: SearchEngine, session: Any) -> None:
        from sqlalchemy import event

        self._search, self._session = search, session
        self._operations: list[Operation] = []
        self._savepoints: dict[Any, int] = {}
        self._committing = False
        event.listen(session, "after_transaction_create", self._begun)
        event.listen(session, "before_commit", self._before_commit)
        event.listen(session, "after_flush_postexec", self._flushed)
        event.listen(session, "after_rollback", self._rolled_back)
        event.listen(session, "after_transaction_end", self._ended)

    def index_record(self, entity_name: str, record_id: str, content: str) -> None:
        """Queue a record for the session's commit; see :meth:`SearchEngine.index_record`.

        Raises:
            RecordError: It cannot be stored.
            UsageError: The session's transaction has failed or is at its end.
        """
        self._queue(_present(as_put((entity_name, record_id, content))))

    def index_records_batch(self, records: Iterable[tuple[str, str, str]]) -> None:
        """Queue records for the session's commit, all or none. Raises as :meth:`index_record`."""
        self._queue(list(as_puts(records)))

    def delete_record(self, entity_name: str, record_id: str) -> None:
        """Queue a deletion for the session's commit. Raises as :meth:`index_record`."""
        self._queue(_present(as_delete(entity_name, record_id)))

    def __len__(self) -> int:
        return len(self._operations)

    def _queue(self, operations: Sequence[Operation]) -> None:
        if not self._session.in_transaction():
            # A rollback of a session that has not begun is no event, and would leave the queue as it is.
            self._session.begin()
        elif not self._session.is_active:
            raise UsageError(
                "The session's transaction has failed or is at its end; nothing can be added to it.",
                remedy="Roll the session back first; index before its commit, not in after_commit.",
            )
        self._operations.extend(operations)

    def _write(self) -> None:
        if not self._operations:
            return
        search = self._search
        connection = self._session.connection().connection.driver_connection
        with search._connections.borrowed(connection) as store:
            search._writer(store).write(self._operations)
        # Only now: after an error the caller may mend the cause and commit again.
        self._operations.clear()

    def _begun(self, session: Any, transaction: Any) -> None:
        if transaction.nested:
            self._savepoints[transaction] = len(self._operations)

    def _before_commit(self, session: Any) -> None:
        # The commit of a savepoint also comes here; only the outermost commit makes anything durable.
        if session.in_nested_transaction():
            return
        session.flush()  # what fails there costs no embedding, and its listeners may queue something
        self._write()
        self._committing = True

    def _flushed(self, session: Any, flush_context: Any) -> None:
        if self._committing:  # another listener of before_commit has changed something after ours
            self._write()

    def _rolled_back(self, session: Any) -> None:
        # By a failed flush as well, which rolls back the savepoint around it and says so only here.
        savepoint = session.get_nested_transaction()
        kept = 0 if savepoint is None else self._savepoints.get(savepoint, 0)
        del self._operations[kept:]

    def _ended(self, session: Any, transaction: Any) -> None:
        self._savepoints.pop(transaction, None)
        if transaction.parent is None:
            # Also the end of a session that was closed without commit or rollback.
            self._operations.clear()
            self._committing = False


def keyword_counts(connection: Any, dialect: str) -> Mapping[str, tuple[int, int]]:
    """For each entity the rows of its keyword index, and the live records with text that have none or a newer text."""
    rows = rows_of(connection, dialect)
    indexed: dict[str, int] = dict(rows(f"SELECT entity_name, count(*) FROM {TABLE} GROUP BY entity_name", {}))  # noqa: S608
    newer = _newer(columns_of(rows, dialect, [TABLE])[TABLE], dialect)
    pending: dict[str, int] = {}
    for definition in load_definitions(rows, dialect):
        for number, place in enumerate(definition.places if definition.live else ()):
            params = Params(dialect)
            if not (text := _has_text(definition, place, dialect, params)):
                continue
            conditions = [f"NOT r.is_deleted AND ({text}) AND (s.id IS NULL OR {newer})"]
            if place.columns is None:
                conditions.append(f"r.entity_id = {params(definition.id)}")
            conditions += [
                f"NOT EXISTS (SELECT 1 FROM {quoted(first.table, dialect)} f WHERE f.id = r.id)"  # noqa: S608
                for first in definition.places[:number]
            ]
            statement = (
                f"SELECT count(*) FROM {quoted(place.table, dialect)} r "  # noqa: S608
                f"LEFT JOIN {TABLE} s ON s.entity_name = {params(definition.entity)} AND s.record_id = r.id "
                f"WHERE {' AND '.join(conditions)}"
            )
            pending[definition.entity] = pending.get(definition.entity, 0) + int(rows(statement, params.values)[0][0])
    return defaultdict(lambda: (0, 0), {n: (indexed.get(n, 0), pending.get(n, 0)) for n in indexed | pending})


def _encoder_of(provider: EmbeddingProvider) -> SlotEncoder:
    return provider.encoder if isinstance(provider, FastEmbedProvider) else ProviderEncoder(provider)


def _spec_of(provider: EmbeddingProvider) -> EncoderSpec | None:
    """How worker processes embed; None for a provider that is called from this process only."""
    return provider.spec if isinstance(provider, FastEmbedProvider) else None


def _sqlalchemy_session(session: Any) -> Any:
    try:
        from sqlalchemy.orm import Session, scoped_session
    except ImportError:
        raise UsageError("for_session needs SQLAlchemy, which is not installed.") from None
    real = session() if isinstance(session, scoped_session) else session
    if not isinstance(real, Session):
        raise UsageError(f"session is {type(session).__name__}; expected an SQLAlchemy Session.")
    return real


def _present(operation: Operation | None) -> list[Operation]:
    return [] if operation is None else [operation]


def _chain(first: Operation, rest: Iterator[Operation]) -> Iterator[Operation]:
    yield first
    yield from rest
