"""``search`` and ``status``: open the index for reading, embed the query, answer with plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .database import DatabaseAddress, connect_postgresql, connect_sqlite
from .errors import SchemaError

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
    from .retrieval import open_reader, search

    connection = open_connection(address)
    try:
        reader = open_reader(connection, address.dialect)
        if vector is not None:
            found = reader.dimensions()
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


def run_status(address: DatabaseAddress) -> dict[str, Any]:
    """Counts of each entity, their sums, and the last run."""
    from .stores.status import last_run, statuses

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
