"""``search`` and ``status``: open the index for reading, embed the query, answer with plain values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .database import DatabaseAddress, connect_postgresql, connect_sqlite
from .errors import SchemaError
from .records import storable_key
from .stores.base import REJECTS

if TYPE_CHECKING:
    from .retrieval import SearchReader

Vector = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float32]


def open_connection(address: DatabaseAddress) -> Any:
    """A connection for reading, of either dialect, in autocommit mode."""
    if address.dialect == "sqlite":
        return connect_sqlite(address)
    return connect_postgresql(address, role="search")


def embed_queries(texts: Sequence[str], model_name: str, model_path: Path | None) -> Vectors:
    """The queries' vectors (float32, texts × dimensions), always in fp32."""
    from .encoder import Encoder, EncoderSpec
    from .models import resolve

    model = resolve(model_name, model_path)
    return Encoder(EncoderSpec(model, batch_size=1)).embed(texts)


def run_search(
    address: DatabaseAddress,
    query: str,
    *,
    mode: str,
    entities: Sequence[str],
    limit: int,
    where: Mapping[str, Any] | None,
    min_score: float,
    model_name: str,
    model_path: Path | None,
) -> list[dict[str, Any]]:
    """Results as plain dictionaries with the fields of SearchResult."""
    vector = None if mode == "keyword" or not query.strip() else embed_queries([query], model_name, model_path)[0]
    return search_open(
        address, query, vector, mode=mode, entities=entities, limit=limit, where=where, min_score=min_score,
        model_name=model_name,
    )  # fmt: skip


def search_open(
    address: DatabaseAddress,
    query: str,
    vector: Vector | None,
    *,
    mode: str = "hybrid",
    entities: Sequence[str] = (),
    limit: int = 10,
    where: Mapping[str, Any] | None = None,
    min_score: float = 0.0,
    model_name: str = "",
) -> list[dict[str, Any]]:
    """:func:`run_search` with the query's vector at hand (float32, dimensions; None for keywords only)."""
    from .retrieval import search

    connection = open_connection(address)
    try:
        reader = open_reader(connection, address.dialect)
        if vector is not None:
            found = stored_dimensions(connection, address.dialect)
            if found is not None and found != len(vector):
                raise SchemaError(
                    f"The index holds vectors of {found} dimensions; {model_name} gives {len(vector)}.",
                    remedy="Name the model that the index was built with: --model NAME (see kdb-fast status --json).",
                )
        results = search(
            reader,
            query,
            query_vector=vector,
            mode=mode,  # type: ignore[arg-type]
            entities=entities,
            limit=limit,
            min_score=min_score,
            where=where,
        )
    finally:
        connection.close()
    return [dataclasses.asdict(result) for result in results]


def open_reader(connection: Any, dialect: str) -> SearchReader:
    """The reader of rankings for this dialect, on an open connection."""
    if dialect == "sqlite":
        from .stores.search_sqlite import SqliteReader

        return SqliteReader(connection)
    from .stores.search_postgresql import PostgresqlReader

    return PostgresqlReader(connection)


def stored_dimensions(connection: Any, dialect: str) -> int | None:
    """Length of the vectors in the index; None if there are none.

    Raises:
        SchemaError: There is no index.
    """
    exists = "SELECT name FROM sqlite_master WHERE name = 'kdb_search'"
    if dialect == "postgresql":
        exists = "SELECT to_regclass('kdb_search')::text"
    row = connection.execute(exists).fetchone()
    if row is None or row[0] is None:
        raise SchemaError("There is no search index in this database.", remedy="Build it: kdb-fast reindex --db …")
    row = connection.execute("SELECT dimensions FROM kdb_search WHERE embedding IS NOT NULL LIMIT 1").fetchone()
    return int(row[0]) if row and row[0] is not None else None


def last_run(connection: Any, dialect: str) -> dict[str, Any] | None:
    """The newest run: number, state, phase, model, fingerprint, times; None if there was none."""
    present = "SELECT name FROM sqlite_master WHERE name = 'kdb_fast_runs'"
    if dialect == "postgresql":
        present = "SELECT to_regclass('kdb_fast_runs')::text"
    row = connection.execute(present).fetchone()
    if row is None or row[0] is None:
        return None
    names = ("run", "state", "phase", "model", "fingerprint", "started_at", "heartbeat_at", "ended_at")
    row = connection.execute(
        "SELECT run, state, phase, model, fingerprint, started_at, heartbeat_at, ended_at "
        "FROM kdb_fast_runs ORDER BY run DESC LIMIT 1"
    ).fetchone()
    return dict(zip(names, row, strict=True)) if row else None


def run_status(address: DatabaseAddress) -> dict[str, Any]:
    """Counts of each entity, their sums, and the last run."""
    from .stores.status import statuses

    connection = open_connection(address)
    try:
        rows = statuses(connection, address.dialect, None)
        run = last_run(connection, address.dialect)
    finally:
        connection.close()
    return {
        "database": address.display,
        "indexed": sum(row.indexed for row in rows),
        "pending": sum(row.pending or 0 for row in rows),
        "stale": sum(row.stale for row in rows),
        "rejected": sum(row.rejected for row in rows),
        "entities": [row._asdict() for row in rows],
        "run": run,
    }


def forget_older(address: DatabaseAddress, entities: list[str], run: int) -> int:
    """Forget rejected records of entities that a run has read completely without rejecting them.

    They were stored or unchanged, are gone, or have no text any more: what the run rejected has its number.

    Args:
        run: Number of the run, which must have read every live record of these entities.

    Returns:
        How many were forgotten. Lines of files that became no record are never among them.
    """
    mark = "?" if address.dialect == "sqlite" else "%s"
    statement = f"DELETE FROM {REJECTS} WHERE entity_name = {mark} AND run < {mark} AND record_id <> ''"  # noqa: S608
    total = 0
    with contextlib.closing(open_connection(address)) as connection:
        for entity in entities:
            query = statement if address.dialect == "sqlite" else statement.encode()
            total += connection.execute(query, (storable_key(entity), run)).rowcount
    return total
