"""Records and vectors into the table, without the encoder and without the search indexes."""

from __future__ import annotations

import time
import uuid
from typing import Any

import numpy as np

from kdb_fast.indexing.reindex import reindex
from kdb_fast.settings import DEFAULT_MODEL, ReindexOptions

from .. import data, database, free_encoder, vectors
from ..source import ENTITY, ListSource
from ..watched import Watch, watched
from .peers import STATEMENT_ROWS


def _texts(params: dict[str, Any]) -> list[str]:
    """The records' texts, made distinct: equal ones would be embedded only once."""
    return [f"{text} | number: {i}" for i, text in enumerate(data.read(params["data"], params["records"]))]


def pipeline(params: dict[str, Any]) -> dict[str, Any]:
    """kdb-fast with a free encoder into an empty table; process start included.

    ``delay`` makes the engine slow on purpose, see :func:`bench.watched.watched`.
    """
    texts = _texts(params)
    seconds, watch = _reindex(params, texts, force=False)
    return {
        "seconds": seconds,
        "records": len(texts),
        "seconds_after_start": watch.seconds_after_start,
        "pss_by_process": watch.pss,
    }


def replace(params: dict[str, Any]) -> dict[str, Any]:
    """kdb-fast with a free encoder over a table that holds every row already; the first load is not timed."""
    texts = _texts(params)
    _reindex(params, texts, force=False)
    seconds, watch = _reindex(params, texts, force=True)
    return {"seconds": seconds, "records": len(texts), "seconds_after_start": watch.seconds_after_start}


def _reindex(params: dict[str, Any], texts: list[str], *, force: bool) -> tuple[float, Watch]:
    address = database.address_of(params["conninfo"])
    with watched(worker_target=free_encoder.run, build_index=False, delay=params.get("delay", 0.0)) as watch:
        started = time.perf_counter()
        reindex(address, ListSource(texts), ReindexOptions(force=force))
        seconds = time.perf_counter() - started
    database.verify(params["conninfo"], len(texts), indexed=False)
    return seconds, watch


def loading_example(params: dict[str, Any]) -> dict[str, Any]:
    """pgvector-python's published example of bulk loading, into the same table. Rows and ids are ready beforehand."""
    rows = _rows(_texts(params))
    with database.connect(params["conninfo"]) as connection:
        database.create_table(connection, search_indexes=False)
        started = time.perf_counter()
        _copy(connection, rows)
        seconds = time.perf_counter() - started
    database.verify(params["conninfo"], len(rows), indexed=False)
    return {"seconds": seconds, "records": len(rows)}


def upsert_executemany(params: dict[str, Any]) -> dict[str, Any]:
    """``executemany`` upserts over a table that holds every row already; the first load is not timed."""
    rows = _rows(_texts(params))
    with database.connect(params["conninfo"]) as connection:
        database.create_table(connection, search_indexes=False)
        _copy(connection, rows)
        started = time.perf_counter()
        with connection.cursor() as cursor:
            for start in range(0, len(rows), STATEMENT_ROWS):
                with connection.transaction():
                    cursor.executemany(database.UPSERT, rows[start : start + STATEMENT_ROWS])
        seconds = time.perf_counter() - started
    database.verify(params["conninfo"], len(rows), indexed=False)
    return {"seconds": seconds, "records": len(rows)}


def _rows(texts: list[str]) -> list[tuple[Any, ...]]:
    matrix = np.concatenate([vectors.of_texts(texts[i : i + 4096]) for i in range(0, len(texts), 4096)])
    return [
        (str(uuid.uuid4()), ENTITY, str(i), text, vector, DEFAULT_MODEL, database.DIMENSIONS)
        for i, (text, vector) in enumerate(zip(texts, matrix, strict=True))
    ]


def _copy(connection: Any, rows: list[tuple[Any, ...]]) -> None:
    with connection.cursor().copy(database.COPY_ROWS) as copy:
        copy.set_types(database.COPY_TYPES)
        for row in rows:
            copy.write_row(row)
            # As in the example: keeps libpq's buffer small.
            while connection.pgconn.flush() == 1:
                pass
