"""SearchEngine: the library's face, with the names and results of KameleonDB's own class.

Writing, embedding and searching are the same code that ``kdb-fast reindex`` and ``kdb-fast search`` run; this
module only finds the right connection and decides when a transaction begins and ends.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from ..embedding.providers.base import EmbeddingProvider
from ..embedding.providers.custom import adapted, as_provider
from ..embedding.providers.encoder import ProviderEncoder
from ..errors import ProviderError, SearchWarning, UsageError
from ..origins import QueryVector
from ..stores.base import IndexStore, RunSpec
from .batches import BatchWriter, Operation, as_delete, as_list, as_put, as_puts
from .query import meaning
from .readers.base import SearchReader
from .results import IndexStatus, LeftOut, SearchResult, left_out
from .retrieval import search as ranked_search
from .scope import resolve_scope
from .session_batch import SessionBatch, sqlalchemy_session
from .sqlalchemy_engines import connections_for
from .status import statuses
from .transactions import Queue, write_at_once

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
        self._given = as_provider(embedding_provider) if embedding_provider is not None else None
        self._provider = adapted(self._given) if self._given is not None else None
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
        """The provider as it was given, or None."""
        return self._given

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
        self._do(as_list(as_put((entity_name, record_id, content))))

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
        self._do(as_list(as_delete((entity_name, record_id))))

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
        real = sqlalchemy_session(session)
        key = ("kdb_fast", id(self))
        batch = real.info.get(key)
        if not isinstance(batch, SessionBatch):
            batch = real.info[key] = SessionBatch(self._write_on, real)
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
            query: Any text; never an error. Of a longer one the first 2,000 characters count. ``-word`` excludes. One
                without any word, number or sign, or with nothing but exclusions, finds nothing.
            entity: Only this entity.
            entities: Only these entities (and ``entity``). None or an empty list: all.
            limit: At most so many results, 1 or more.
            min_score: Leave out results below this fused score. A record at place n of a ranking gets
                1 ÷ (60 + n) from it, so the highest is 2 ÷ 61 = 0.0328 (without a provider 1 ÷ 61), and a larger
                value finds nothing.
            where: Exact values of fields of the record, all of which must match.

        Returns:
            At most ``limit`` results; fewer only if no more records match. Soft-deleted records are never among
            them.

        Raises:
            UsageError: ``limit`` below 1, ``min_score`` that is no number, or a field in ``where`` that no searched
                entity has.
            DatabaseError: The database cannot answer.
            ProviderError: The embedding provider failed.

        Warns:
            SearchWarning: Rows were left out of the ranking by vector, since another model than the provider's has made
                theirs. By keyword they are found.
        """
        if isinstance(entities, str):
            raise UsageError(f"entities is the string {entities!r}; expected a list of names.")
        names = [*([entity] if entity else []), *(entities or [])]

        @functools.cache
        def query_vector() -> list[QueryVector] | None:
            return self._query_vector(meaning(query))

        def work(reader: SearchReader, beside: SearchReader | None) -> tuple[list[SearchResult], list[LeftOut]]:
            results = ranked_search(
                reader, query, query_vector=query_vector if self._provider else None, mode="hybrid", entities=names,
                limit=limit, min_score=min_score, where=where, beside=beside,
            )  # fmt: skip
            return results, self._left_out(reader, names) if self._provider and query_vector() else []

        results, missed = self._connections.reading.search(work)
        for part in missed:
            warnings.warn(str(part), SearchWarning, stacklevel=2)
        return results

    def get_status(self, entity: str | None = None) -> list[IndexStatus]:
        """State of the index for each entity, or for one, by name.

        ``indexed`` are rows with a vector (without a provider all rows), ``pending`` the live records that have
        none or were changed since; 0 for an entity that KameleonDB does not define.

        Raises:
            DatabaseError: The database cannot answer.
        """
        provider, dialect = self._provider, self._connections.dialect
        fingerprint = provider.fingerprint() if provider is not None else None

        def work(connection: Any, reader: SearchReader) -> list[IndexStatus]:
            return [
                IndexStatus(row.entity, row.indexed, row.pending or 0, row.last_updated, row.stale, row.rejected)
                for row in statuses(connection, dialect, fingerprint, vectors=provider is not None)
                if entity is None or row.entity == entity
            ]

        return self._connections.reading.read(work)

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
        else:
            write_at_once(self._begin, operations)

    @contextlib.contextmanager
    def _begin(self) -> Iterator[BatchWriter]:
        with self._connections.writing() as store:
            yield self._writer(store)

    def _writer(self, store: IndexStore) -> BatchWriter:
        provider = self._provider
        if provider is None:
            return BatchWriter(store, RunSpec(0, "", "", DEFAULT_DIMENSIONS), None)
        run = RunSpec(0, provider.fingerprint(), provider.model_name, int(provider.dimensions))
        return BatchWriter(store, run, lambda: ProviderEncoder(provider), provider.worker_spec())

    def _write_on(self, connection: Any, operations: Sequence[Operation]) -> None:
        """Write within the transaction of the caller's own connection."""
        with self._connections.borrowed(connection) as store:
            self._writer(store).write(operations)

    def _left_out(self, reader: SearchReader, entities: Sequence[str]) -> list[LeftOut]:
        """The rows of these entities that another model than the provider's has made."""
        assert self._provider is not None
        maker = self._provider.maker()
        counts = {key: rows for key, rows in reader.origins().items() if not maker.has_made(key[1])}
        if not counts:
            return []
        scope = resolve_scope(reader.definitions(), entities, None)
        searched = {key: rows for key, rows in counts.items() if scope.admits(key[0])}
        return left_out(searched, lambda origin: f"the provider's is {maker.model}. Index them again with it.")

    def _query_vector(self, text: str) -> list[QueryVector] | None:
        """The embedding of a query; None where there is nothing to rank by: no provider, no text, no direction."""
        provider = self._provider
        if provider is None or not text:
            return None
        with np.errstate(over="ignore"):
            vector = np.asarray(provider.embed(text), dtype=np.float32)
        if vector.shape != (provider.dimensions,) or not np.isfinite(vector).all():
            raise ProviderError(
                f"{provider.named_class.__name__}.embed gave a vector of shape {vector.shape}; expected "
                f"{provider.dimensions} finite numbers."
            )
        return [QueryVector(vector, provider.maker())] if vector.any() else None
