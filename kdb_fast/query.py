"""``search`` and ``status``: open the index for reading, embed the query, answer with plain values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from . import sqlite_reading
from .database import DatabaseAddress, connect_postgresql
from .errors import SchemaError
from .stores import open_store
from .stores.reading import columns_of, load_definitions, rows_of
from .target import RUNS, find_target

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .origins import Origin, QueryVector
    from .query_model import IndexModel
    from .retrieval import LeftOut, SearchReader, SearchResult

    Vector = npt.NDArray[np.float32]
    Vectors = npt.NDArray[np.float32]

T = TypeVar("T")

RECENT_RUNS = 50
"""Runs of which :func:`recent_fingerprints` reads the fingerprint."""


def open_connection(address: DatabaseAddress) -> Any:
    """A connection for reading, of either dialect, in autocommit mode. For one question: :func:`read`."""
    if address.dialect == "sqlite":
        return sqlite_reading.connect_reading(address)
    return connect_postgresql(address, role="search")


def read(address: DatabaseAddress, work: Callable[[Any], T]) -> T:
    """``work(connection)`` on a connection for reading; called again where an SQLite file was written meanwhile without
    its locks between us.

    Raises:
        DatabaseError: The database cannot be reached.
    """
    if address.dialect == "sqlite":
        return sqlite_reading.read(address, work)
    with contextlib.closing(open_connection(address)) as connection:
        return work(connection)


def embed_queries(texts: Sequence[str], model_name: str, model_path: Path | None) -> Vectors:
    """The queries' vectors (float32, texts × dimensions), always in fp32."""
    from .encoder import Encoder, EncoderSpec
    from .models import resolve

    model = resolve(model_name, model_path)
    return Encoder(EncoderSpec(model, batch_size=1)).embed(texts)


def import_ahead() -> None:
    """Import what embeds a query and ranks, without what FastEmbed needs for downloads.

    For processes of our own only, as :func:`kdb_fast.offline.import_fastembed`.
    """
    from .offline import import_fastembed

    import_fastembed()
    from . import encoder, retrieval  # noqa: F401


def run_search(
    address: DatabaseAddress,
    query: str,
    *,
    mode: str,
    entities: Sequence[str],
    limit: int,
    where: Mapping[str, Any] | None,
    min_score: float,
    model_name: str | None = None,
    model_path: Path | None = None,
    provider: str | None = None,
    base_url: str | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """Results as plain dictionaries with the fields of SearchResult, and what could not be ranked by vector.

    Without a model and a provider the query is embedded by every model that made vectors of what is searched;
    ``meanwhile`` is called while its files are verified, if it is the only one.

    Raises:
        SchemaError: There is no index; its vectors are another model's; a search by vector can compare none.
        KdbFastError: As :func:`kdb_fast.query_model.query_vectors`.
    """
    from .query_model import query_vectors
    from .retrieval import left_out, meaning, resolve_scope
    from .stores.search_base import count_origins

    vectors: list[QueryVector] | None = None
    missed: list[LeftOut] = []
    text = meaning(query)
    if mode != "keyword" and text:

        def count(connection: Any) -> dict[tuple[str, Origin], int]:
            rows = rows_of(connection, address.dialect)
            target = find_target(rows, address.dialect)
            scope = resolve_scope(load_definitions(rows, target), entities, where)
            return {key: number for key, number in count_origins(rows, target).rows.items() if scope.admits(key[0])}

        counts = read(address, count)
        origins: Counter[Origin] = Counter()
        for (_, origin), number in counts.items():
            origins[origin] += number
        vectors, why = query_vectors(
            text,
            origins,
            provider=provider,
            model=model_name,
            model_path=model_path,
            base_url=base_url,
            meanwhile=meanwhile,
        )
        missed = left_out(counts, why)
        if mode == "vector" and missed and all(map(why, origins)):
            raise SchemaError(str(missed[0])[:1].upper() + str(missed[0])[1:])
    results = search_open(
        address, query, vectors, mode=mode, entities=entities, limit=limit, where=where, min_score=min_score
    )
    return results, missed


def search_open(
    address: DatabaseAddress,
    query: str,
    vector: Vector | list[QueryVector] | None,
    *,
    mode: str = "hybrid",
    entities: Sequence[str] = (),
    limit: int = 10,
    where: Mapping[str, Any] | None = None,
    min_score: float = 0.0,
) -> list[dict[str, Any]]:
    """Results as plain dictionaries with the fields of SearchResult.

    Args:
        vector: As of :func:`kdb_fast.retrieval.search`; None for keywords only.
    """
    from .retrieval import search

    def work(connection: Any) -> list[SearchResult]:
        return search(
            open_reader(connection, address.dialect),
            query,
            query_vector=vector,
            mode=mode,  # type: ignore[arg-type]
            entities=entities,
            limit=limit,
            min_score=min_score,
            where=where,
        )

    return [dataclasses.asdict(result) for result in read(address, work)]


def open_reader(connection: Any, dialect: str) -> SearchReader:
    """The reader of rankings for this dialect, on an open connection."""
    if dialect == "sqlite":
        from .stores.search_sqlite import SqliteReader

        return SqliteReader(connection)
    from .stores.search_postgresql import PostgresqlReader

    return PostgresqlReader(connection)


class LastRun(NamedTuple):
    """The newest run, as its row says it; the times are datetimes of PostgreSQL or text of SQLite."""

    run: int
    state: str
    phase: str
    model: str
    fingerprint: str
    started_at: datetime | str
    heartbeat_at: datetime | str
    ended_at: datetime | str | None


def last_run(connection: Any, dialect: str) -> LastRun | None:
    """The newest run; None if there was none."""
    rows = rows_of(connection, dialect)
    target = find_target(rows, dialect)
    if not columns_of(rows, target, [RUNS]):
        return None
    names = ", ".join(LastRun._fields)
    newest = rows(f"SELECT {names} FROM {target.table(RUNS)} ORDER BY run DESC LIMIT 1", {})  # noqa: S608
    return LastRun(*newest[0]) if newest else None


def recent_fingerprints(address: DatabaseAddress) -> list[str]:
    """Fingerprints of the last RECENT_RUNS runs on an index, the newest first, each once; [] without an index."""

    def work(connection: Any) -> list[str]:
        rows = rows_of(connection, address.dialect)
        target = find_target(rows, address.dialect, address.schema)
        if not columns_of(rows, target, [RUNS]):
            return []
        query = f"SELECT fingerprint FROM {target.table(RUNS)} ORDER BY run DESC LIMIT {RECENT_RUNS}"  # noqa: S608
        return list(dict.fromkeys(row[0] for row in rows(query, {})))

    return read(address, work)


def index_model_of(address: DatabaseAddress) -> tuple[bool, IndexModel | None]:
    """Whether nothing says yet how long the vectors of an index must be, and what made those that are there.

    A column of PostgreSQL says it before there is a vector.

    Raises:
        DatabaseError: The database cannot answer.
    """
    from .query_model import index_model

    try:
        made = read(address, lambda connection: index_model(connection, address.dialect))
    except SchemaError:
        return True, None
    return made is None and address.dialect == "sqlite", made


def run_status(address: DatabaseAddress) -> dict[str, Any]:
    """Counts of each entity, their sums, and the last run."""
    from .stores.status import statuses

    def work(connection: Any) -> tuple[Any, ...]:
        schema = find_target(rows_of(connection, address.dialect), address.dialect).schema
        return statuses(connection, address.dialect, None), last_run(connection, address.dialect), schema

    rows, run, schema = read(address, work)
    return {
        "database": address.display,
        "schema": schema,
        "indexed": sum(row.indexed for row in rows),
        "pending": sum(row.pending or 0 for row in rows),
        "stale": sum(row.stale for row in rows),
        "rejected": sum(row.rejected for row in rows),
        "entities": [row._asdict() for row in rows],
        "run": run._asdict() if run else None,
    }


def forget_older(address: DatabaseAddress, entities: list[str], run: int) -> int:
    """Forget rejected records of entities that a run has read completely without rejecting them.

    They were stored or unchanged, are gone, or have no text any more: what the run rejected has its number.

    Args:
        run: Number of the run, which must have read every live record of these entities.

    Returns:
        How many were forgotten. Lines of files that became no record are never among them.
    """
    with contextlib.closing(open_store(address, "rejects", patient=True)) as store:
        return store.forget_older_rejects(entities, run)


def forget_older_of_input(address: DatabaseAddress, entity: str, name: str, run: int) -> int:
    """Forget what earlier runs rejected of an input of this name, now that ``run`` has read it to its end.

    Lines that became no record have no key by which they could be found again.

    Returns:
        How many were forgotten.
    """
    with contextlib.closing(open_store(address, "rejects", patient=True)) as store:
        return store.forget_rejects_of_input(entity, name, run)
