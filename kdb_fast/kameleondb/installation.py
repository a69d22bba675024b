"""KameleonDB on the batch engine: :func:`install` gives its classes kdb-fast's indexing and search.

What is needed is looked for by its name, not by a version: KameleonDB's release 0.2.0 has no search layer, its
development branch of the same number has one.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..errors import KdbFastError, UsageError
from ..records import content_of, number_of, storable_key
from ..settings import DEFAULT_BATCH_SIZE
from .patching import Replaced, needed, plain_method
from .providers import address_of, embedding_of, provider_for

if TYPE_CHECKING:
    from ..embedding.providers.base import EmbeddingProvider
    from ..indexing.progress import Progress
    from ..search.engine import SearchEngine

OFF = ("", "0", "false", "no", "off")
"""Values of KAMELEONDB_EMBEDDINGS with which nothing is indexed."""

_lock = threading.RLock()
_installed: _Installation | None = None


def install(embedding_provider: str | EmbeddingProvider | Any | None = None) -> None:
    """Give KameleonDB kdb-fast's index and search; instances that exist already have them too.

    ``Entity.insert_many`` (and ``insert`` and ``update``) index what they store. ``KameleonDB`` has
    ``reindex_embeddings(entity_name=None, batch_size=100)``, ``search`` and ``embedding_status``. A second call changes
    nothing. May be called from any thread.

    Args:
        embedding_provider: ``"fastembed"``, ``"openai"`` or a provider object, for every ``KameleonDB`` that was not
            given one itself. None: the model that made the index; for a new one all-MiniLM-L6-v2.

    Raises:
        MissingPackageError: KameleonDB is not installed.
        SchemaError: It lacks a name that is needed.
    """
    global _installed
    with _lock:
        if _installed is None:
            installation = _Installation(embedding_provider)
            try:
                installation.install()
            except BaseException:
                installation.replaced.undo()
                raise
            _installed = installation


def uninstall() -> None:
    """Put back all that :func:`install` has replaced; nothing happens if it was not called."""
    global _installed
    with _lock:
        if _installed is not None:
            _installed.replaced.undo()
            _installed = None


def installed() -> bool:
    """Whether :func:`install` was called, and :func:`uninstall` was not since."""
    return _installed is not None


class EmbeddingsOffError(UsageError, RuntimeError):
    """The embeddings of a ``KameleonDB`` are off; a RuntimeError too, as in KameleonDB."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} needs embeddings, which are off.",
            remedy="Turn them on: KameleonDB(…, embeddings=True), or KAMELEONDB_EMBEDDINGS=1.",
        )


def embeddings_on() -> bool:
    """Whether the environment leaves embeddings on: KAMELEONDB_EMBEDDINGS is not set, or not to 0."""
    return os.environ.get("KAMELEONDB_EMBEDDINGS", "1").strip().lower() not in OFF


class _Installation:
    """The replaced methods, and the search engine of each ``KameleonDB``, made when it is first needed."""

    def __init__(self, provider: Any) -> None:
        self.replaced = Replaced()
        self._given = provider
        self._making = threading.RLock()
        self._providers: weakref.WeakKeyDictionary[Any, EmbeddingProvider] = weakref.WeakKeyDictionary()
        self._engines: weakref.WeakKeyDictionary[Any, SearchEngine] = weakref.WeakKeyDictionary()

    def install(self) -> None:
        """Replace everything. Raises as :func:`install`."""
        database, entity, *_ = needed(
            "kameleondb.core.engine", "KameleonDB", "Entity", "KameleonDB.close", "KameleonDB.list_entities",
            "Entity.insert", "Entity.insert_many", "Entity.update",
        )  # fmt: skip
        needed("kameleondb.core.connection", "DatabaseConnection.engine")
        needed("kameleondb.schema.engine", "SchemaEngine.get_fields")
        place = self.replaced.set
        place(entity, "insert_many", self._insert_many(entity.insert_many))
        if hasattr(database, "_index_record_for_search"):  # called by its own insert and update
            place(database, "_index_record_for_search", plain_method(self._index_record_for_search))
        else:
            place(entity, "insert", self._insert(entity.insert))
            place(entity, "update", self._update(entity.update))
        if hasattr(database, "_init_search_engine"):
            place(database, "_init_search_engine", plain_method(self._init_search_engine))
        place(database, "_search_engine", property(self.engine_of, _keep))
        place(database, "close", self._close(database.close))
        for method in (self.reindex_embeddings, self.search, self.embedding_status):
            place(database, method.__name__, plain_method(method))
        for name in ("kameleondb.search", "kameleondb.search.engine"):
            self._replace_classes(name)

    def _replace_classes(self, name: str) -> None:
        from ..search import engine as search

        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            return
        for thing in ("SearchEngine", "SearchResult", "IndexStatus"):
            if hasattr(module, thing):
                self.replaced.set(module, thing, getattr(search, thing))

    # -- what belongs to one KameleonDB ----------------------------------------------------------------

    def engine_of(self, db: Any) -> Any:
        """The search engine of a ``KameleonDB``; None where its embeddings are off."""
        if not vars(db).get("_embeddings_enabled", embeddings_on()):
            return vars(db).get("_search_engine")
        from ..search.engine import SearchEngine

        with self._making:
            if db not in self._engines:
                self._engines[db] = SearchEngine(db._connection.engine, self.provider_of(db))
            return self._engines[db]

    def provider_of(self, db: Any) -> EmbeddingProvider:
        """What embeds for a ``KameleonDB``: its own provider, that of :func:`install`, or the index's model."""
        with self._making:
            if db not in self._providers:
                before = getattr(vars(db).get("_search_engine"), "_provider", None)  # of its own class
                self._providers[db] = provider_for(before if before is not None else self._given, db)
            return self._providers[db]

    def _init_search_engine(self, db: Any, provider: Any, model: str | None, dimensions: int | None) -> None:
        if provider == "fastembed" and not model and self._given is not None:
            provider = self._given
        with self._making:
            self._providers[db] = provider_for(provider, db, model, dimensions)
            vars(db)["_search_engine"] = self.engine_of(db)

    def _close(self, original: Any) -> Any:
        @functools.wraps(original)
        def close(db: Any) -> None:
            with self._making:
                engine = self._engines.pop(db, None)
            if engine is not None:
                engine.close()
            original(db)

        return close

    # -- writing ---------------------------------------------------------------------------------------

    def _insert_many(self, original: Any) -> Any:
        @functools.wraps(original)
        def insert_many(entity: Any, records: Any, created_by: str | None = None) -> list[str]:
            records = list(records)
            engine = self.engine_of(entity._db)  # a model that is not to be had is known before anything is stored
            ids: list[str] = original(entity, records, created_by=created_by)
            _index(engine, entity._db, entity.name, dict(zip(ids, records, strict=True)))
            return ids

        return insert_many

    def _insert(self, original: Any) -> Any:
        @functools.wraps(original)
        def insert(entity: Any, data: Any, created_by: str | None = None) -> str:
            engine = self.engine_of(entity._db)
            record_id: str = original(entity, data, created_by=created_by)
            _index(engine, entity._db, entity.name, {record_id: data})
            return record_id

        return insert

    def _update(self, original: Any) -> Any:
        @functools.wraps(original)
        def update(entity: Any, record_id: str, data: Any) -> Any:
            engine = self.engine_of(entity._db)
            record = original(entity, record_id, data)
            _index(engine, entity._db, entity.name, {record.get("id", record_id): record})
            return record

        return update

    def _index_record_for_search(self, db: Any, entity_name: str, record_id: str, data: Any) -> None:
        _index(self.engine_of(db), db, entity_name, {record_id: data})

    def reindex_embeddings(
        self,
        db: Any,
        entity_name: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        *,
        force: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Embed all records of an entity, or of all, that are new or have changed, in worker processes.

        Args:
            entity_name: None for all entities.
            batch_size: Most rows of one model run.
            force: Embed the unchanged ones too.
            progress: Shows a person what happens meanwhile.

        Returns:
            ``status`` ("complete"), ``entities_processed``, ``records_indexed`` and, the same, ``indexed``; ``skipped``
            (unchanged) and ``rejected`` records.

        Raises:
            EmbeddingsOffError: The embeddings of this ``KameleonDB`` are off.
            KdbFastError: As ``kdb-fast reindex``, with its receipt.
        """
        if not vars(db).get("_embeddings_enabled", embeddings_on()):
            raise EmbeddingsOffError("A reindex")
        address = address_of(db)
        if address is None:
            raise UsageError(
                "A reindex needs a database that its worker processes can open; this one is in memory.",
                remedy="Use sqlite:///file.db. insert_many and update index in memory too.",
            )
        from ..indexing.reindex import reindex
        from ..sources import SourceSpec

        entities = (entity_name,) if entity_name else ()
        embedding, options = embedding_of(self.provider_of(db), batch_size)
        options = replace(options, entities=entities, force=force)
        receipt = reindex(address, SourceSpec(entities), options, progress, embedding)
        indexed = receipt.written + receipt.superseded
        return {
            "status": "complete",
            "entities_processed": len(entities or db.list_entities()),
            "records_indexed": indexed,
            "indexed": indexed,
            "skipped": receipt.unchanged,
            "rejected": receipt.rejected,
        }

    # -- reading ---------------------------------------------------------------------------------------

    def search(
        self,
        db: Any,
        query: str,
        entity: str | None = None,
        entities: Sequence[str] | None = None,
        limit: int = 10,
        min_score: float = 0.0,
        where: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """The best records as dictionaries; arguments and errors as those of ``SearchEngine.search``.

        Raises:
            EmbeddingsOffError: The embeddings of this ``KameleonDB`` are off.
        """
        engine = self.engine_of(db)
        if engine is None:
            raise EmbeddingsOffError("A search")
        return [asdict(result) for result in engine.search(query, entity, entities, limit, min_score, where)]

    def embedding_status(self, db: Any, entity_name: str | None = None) -> list[dict[str, Any]]:
        """State of the index for each entity, or for one: ``entity``, ``indexed``, ``pending``, ``last_updated``.

        Raises:
            DatabaseError: The database cannot answer.
        """
        engine = self.engine_of(db)
        return [
            {
                "entity": row.entity,
                "indexed": row.indexed,
                "pending": row.pending + row.stale,
                "last_updated": row.last_updated.isoformat() if row.last_updated else None,
            }
            for row in (engine.get_status(entity_name) if engine is not None else ())
        ]


def _keep(db: Any, value: Any) -> None:
    vars(db)["_search_engine"] = value


def _index(engine: Any, db: Any, entity_name: str, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Index records that are stored, in one batch; nothing where the embeddings are off."""
    if engine is None or not records:
        return
    from ..catalog.definitions import TEXT_TYPES

    names = [field.name for field in db._schema_engine.get_fields(entity_name) if field.field_type in TEXT_TYPES]
    try:
        engine.index_records_batch((entity_name, key, content_of(data, names)) for key, data in records.items())
    except BaseException as error:
        name = storable_key(entity_name)
        left = (
            f"{number_of(len(records), 'record')} of {name} stored and not indexed: reindex_embeddings({name!r}) "
            "completes it. Stored again, they would be there twice."
        )
        error.record_ids = list(records)  # type: ignore[attr-defined]
        if isinstance(error, KdbFastError):
            error.remedy = f"{error.remedy} {left}".lstrip()
        else:
            error.add_note(left)
        raise
