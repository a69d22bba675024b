"""What kdb-fast's rows take on the disk and in the write-ahead log, and the graph of their index in memory."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from functools import partial
from typing import Any

from kdb_fast.indexing.reindex import reindex
from kdb_fast.settings import ReindexOptions
from kdb_fast.sources.table.input import TableInput

from .. import data, database, free_encoder
from ..source import FileSource
from ..watched import watched
from . import tables

SMALL_MEMORY_MB = 64
"""PostgreSQL's default of ``maintenance_work_mem``: the graph of 100,000 vectors does not fit."""

ON_DISK_SECONDS = 12.0
"""That a build is watched once its graph no longer fits."""

NO_LONGER_FITS = re.compile(r"no longer fits into maintenance_work_mem after (\d+) tuples")

RELATIONS = """
    SELECT c.relname, m.amname, pg_relation_size(c.oid),
           CASE WHEN c.reltoastrelid = 0 THEN 0 ELSE pg_total_relation_size(c.reltoastrelid) END
    FROM pg_class c LEFT JOIN pg_am m ON m.oid = c.relam
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'i')
"""


def sizes(params: dict[str, Any]) -> dict[str, Any]:
    """A first load by kdb-fast of ``place``: KameleonDB's index, a column of a table, or a table of vectors beside it.

    The encoder costs nothing, and every vector is another one. Without ``index`` no index of vectors is built.

    Returns:
        Bytes of all rows by kind, and of the log that the load and the index wrote.
    """
    place, conninfo = params["place"], params["conninfo"]
    vector = params.get("type", "vector")
    if place != "kameleondb":
        tables.filled(params, whole=True, vector=vector)
    before = _bytes(conninfo)
    start = _log_position(conninfo)
    distinct = partial(free_encoder.run, encoder_class=free_encoder.DistinctEncoder)
    with watched(worker_target=distinct, build_index=False, memory=False):
        started = time.perf_counter()
        _reindex(params)
        seconds = time.perf_counter() - started
    log_load = _log_position(conninfo) - start
    if place == "kameleondb":
        with database.connect(conninfo) as connection:
            database.create_index(connection, database.TARGET.index.text_index)
    report = {
        "seconds": seconds,
        "records": params["records"],
        "text_bytes": sum(len(text.encode()) for text in data.read(params["data"], params["records"])),
        "small_memory_bytes": SMALL_MEMORY_MB << 20,
        "log_load": log_load,
        "before": before,
        "load": _bytes(conninfo),
    }
    if params.get("index"):
        table = {"kameleondb": "kdb_search", "column": "kdb_articles", "table": tables.BESIDE}[place]
        create = f"CREATE INDEX kdb_graph ON {table} USING hnsw (embedding {vector}_cosine_ops)"
        report["small_memory"] = _without_memory(conninfo, create)
        start = _log_position(conninfo)
        with database.connect(conninfo) as connection:
            connection.execute("SET maintenance_work_mem = '512MB'")
            started = time.perf_counter()
            connection.execute(create.encode())
            report["index_seconds"] = time.perf_counter() - started
        report["log_index"] = _log_position(conninfo) - start
        report["index"] = _bytes(conninfo)
    return report


def _reindex(params: dict[str, Any]) -> None:
    address = database.address_of(params["conninfo"])
    if params["place"] == "kameleondb":
        reindex(address, FileSource(params["data"], params["records"]), ReindexOptions())
        return
    into = tables.BESIDE if params["place"] == "table" else ""
    target = tables.beside_target(address) if into else tables.column_target(address)
    reindex(address, TableInput(tables.definition(address, into)), ReindexOptions(index="none"), target=target)


def _bytes(conninfo: str) -> dict[str, int]:
    """By kind: ``rows``, ``toast``, ``keys`` (B-trees), ``gin``, ``hnsw``; ``noted``: kdb-fast's own tables."""
    found = dict.fromkeys(("rows", "toast", "keys", "noted", "gin", "hnsw"), 0)
    with database.connect(conninfo) as connection:
        connection.execute("VACUUM ANALYZE")
        for name, method, size, toast in connection.execute(RELATIONS).fetchall():
            own = name.startswith("kdb_fast_")
            kind = "noted" if own else {"btree": "keys", "gin": "gin", "hnsw": "hnsw"}.get(method, "rows")
            found[kind] += size
            found["noted" if own else "toast"] += toast
    return found


def _log_position(conninfo: str) -> int:
    """Bytes of log written so far, after a checkpoint: the next change of each page writes it whole."""
    with database.connect(conninfo) as connection:
        connection.execute("CHECKPOINT")
        row = connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')").fetchone()
    assert row is not None
    return int(row[0])


def _without_memory(conninfo: str, create: str) -> dict[str, float]:
    """A build by one process with SMALL_MEMORY_MB, given up soon after its graph no longer fits.

    Returns:
        ``rows`` that fit, and rows a second before and after: ``in_memory`` and ``on_disk``.
    """
    import psycopg

    full = threading.Event()
    rows = 0
    at = 0.0

    def noticed(diagnostic: psycopg.errors.Diagnostic) -> None:
        nonlocal rows, at
        if found := NO_LONGER_FITS.search(diagnostic.message_primary or ""):
            rows, at = int(found[1]), time.perf_counter()
            full.set()

    with database.connect(conninfo) as building, database.connect(conninfo) as watching:
        building.add_notice_handler(noticed)
        building.execute(f"SET maintenance_work_mem = '{SMALL_MEMORY_MB}MB'".encode())
        building.execute("SET max_parallel_maintenance_workers = 0")

        def build() -> None:
            with contextlib.suppress(psycopg.errors.QueryCanceled):
                building.execute(create.encode())
            full.set()

        thread = threading.Thread(target=build)
        started = time.perf_counter()
        thread.start()
        full.wait()
        in_memory = rows / (at - started) if at else 0.0
        done = [_built(watching)]
        measured = time.perf_counter()
        thread.join(ON_DISK_SECONDS)
        done.append(_built(watching))
        on_disk = (done[1] - done[0]) / (time.perf_counter() - measured)
        building.cancel()
        thread.join()
        building.execute("DROP INDEX IF EXISTS kdb_graph")  # of a table so small that it was built
    return {"rows": rows, "in_memory": in_memory, "on_disk": on_disk}


def _built(connection: Any) -> int:
    row = connection.execute("SELECT max(tuples_done) FROM pg_stat_progress_create_index").fetchone()
    return int(row[0] or 0)
