"""Ways to write 384-dimensional rows, and to build the indexes; all over the same rows, ready in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdb_fast.engine.sharding import SHARD_ROWS
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record
from kdb_fast.resources import usable_cpus
from kdb_fast.settings import DEFAULT_MODEL
from kdb_fast.stores import open_store
from kdb_fast.stores.base import FlushSlot, RunSpec, Store
from kdb_fast.stores.postgresql import pgcopy

from .. import data, database
from ..source import ENTITY
from .peers import STATEMENT_ROWS
from .pipeline import _copy as copy_rows
from .pipeline import _rows as make_rows

Rows = list[tuple[Any, ...]]

STAGING = "CREATE UNLOGGED TABLE kdb_staging (LIKE kdb_search INCLUDING DEFAULTS)"
STAGING_COLUMNS = "id, entity_name, record_id, content, embedding, model, dimensions"
MERGE = (
    f"INSERT INTO kdb_search ({STAGING_COLUMNS}) SELECT {STAGING_COLUMNS} FROM kdb_staging "
    "ON CONFLICT (entity_name, record_id) DO UPDATE SET content = EXCLUDED.content, embedding = EXCLUDED.embedding, "
    "model = EXCLUDED.model, dimensions = EXCLUDED.dimensions, updated_at = now()"
)

FLUSH_SLOTS = 32
"""Slots of a flush: 4,096 rows, about what the pipeline sends once it has grown."""

BLOB_BYTES = 128 * 1024


def way(params: dict[str, Any]) -> dict[str, Any]:
    """The way ``params["way"]``, a key of WAYS."""
    rows = make_rows(list(data.read(params["data"], params["records"])))
    seconds = WAYS[params["way"]](params["conninfo"], rows)
    return {"seconds": seconds, "records": len(rows)}


def upsert(conninfo: str, rows: Rows, *, indexed: bool) -> float:
    """``executemany`` upserts, with all indexes live or with the plain ones only."""
    with database.connect(conninfo) as connection:
        database.create_table(connection, search_indexes=indexed)
        started = time.perf_counter()
        with connection.cursor() as cursor:
            for start in range(0, len(rows), STATEMENT_ROWS):
                with connection.transaction():
                    cursor.executemany(database.UPSERT, rows[start : start + STATEMENT_ROWS])
        seconds = time.perf_counter() - started
    database.verify(conninfo, len(rows), indexed=indexed)
    return seconds


def copy(conninfo: str, rows: Rows, *, indexed: bool) -> float:
    """Binary COPY with ``write_row``; ``indexed`` adds one parallel build of the search indexes by hand."""
    with database.connect(conninfo) as connection:
        database.create_table(connection, search_indexes=False)
        started = time.perf_counter()
        copy_rows(connection, rows)
        if indexed:
            database.create_search_indexes(connection)
        seconds = time.perf_counter() - started
    database.verify(conninfo, len(rows), indexed=indexed)
    return seconds


def stage(conninfo: str, rows: Rows) -> float:
    """Binary COPY to an unlogged staging table; the buffer is packed with NumPy."""
    with database.connect(conninfo) as connection:
        database.create_table(connection, search_indexes=False)
        connection.execute(STAGING)
        started = time.perf_counter()
        _stage(connection, rows)
        return time.perf_counter() - started


def merge(conninfo: str, rows: Rows, *, conflicting: bool, indexed: bool) -> float:
    """Staging table → table: into an empty one, one that holds all rows, or an empty one with its indexes live."""
    with database.connect(conninfo) as connection:
        database.create_table(connection, search_indexes=indexed)
        connection.execute(STAGING)
        _stage(connection, rows)
        if conflicting:
            connection.execute(MERGE)
        started = time.perf_counter()
        connection.execute(MERGE)
        seconds = time.perf_counter() - started
    database.verify(conninfo, len(rows), indexed=indexed)
    return seconds


def build(conninfo: str, rows: Rows, *, index: str, workers: int) -> float:
    """Build one search index over a full table, with so many parallel workers beside the leader."""
    with database.connect(conninfo) as connection:
        database.create_table(connection, search_indexes=False)
        copy_rows(connection, rows)
        connection.execute("SET maintenance_work_mem = '512MB'")
        connection.execute(f"SET max_parallel_maintenance_workers = {int(workers)}".encode())
        started = time.perf_counter()
        database.create_index(connection, index)
        return time.perf_counter() - started


def ours(conninfo: str, rows: Rows, *, indexed: bool) -> float:
    """kdb-fast's store (PostgreSQL or SQLite), from filled slots to COMMIT, and with ``indexed`` to a ready index."""
    from kdb_fast.db.sqlite_connection import connect_sqlite

    address = database.address_of(conninfo)
    if address.dialect == "sqlite":
        connect_sqlite(address, must_exist=False).close()
    store = open_store(address, "bench")
    store.prepare(database.DIMENSIONS)
    run = store.begin_run(fingerprint="bench", model=DEFAULT_MODEL, dimensions=database.DIMENSIONS, wait=0.0)
    groups = list(_filled_slots(rows))
    started = time.perf_counter()
    if store.has_vector_index:
        store.drop_index()
    _flush(store, run, groups)
    if indexed:
        store.finish_index(lambda what: None)
    seconds = time.perf_counter() - started
    count = store.count()
    assert count == len(rows), f"{count} rows were written, expected {len(rows)}"
    store.end_run(run.number, "done", {})
    store.close()
    if indexed and address.dialect == "postgresql":
        database.verify(conninfo, len(rows))
    return seconds


def _flush(store: Store, run: RunSpec, groups: list[list[FlushSlot]]) -> None:
    for number, group in enumerate(groups, 1):
        store.flush(run, number, group, (), ())


def _filled_slots(rows: Rows) -> Iterator[list[FlushSlot]]:
    """The rows in slots, as workers leave them, in groups for a flush."""
    for start in range(0, len(rows), FLUSH_SLOTS * SHARD_ROWS):
        part = rows[start : start + FLUSH_SLOTS * SHARD_ROWS]
        slab = Slab.local(SlabShape(-(-len(part) // SHARD_ROWS), SHARD_ROWS, database.DIMENSIONS, BLOB_BYTES))
        for slot, first in zip(slab.slots, range(0, len(part), SHARD_ROWS), strict=True):
            shard = part[first : first + SHARD_ROWS]
            slot.put(1, [Row(Record((r[1], r[2]), r[3])) for r in shard], [NO_VALUE] * len(shard))
            slot.vectors[: len(shard)] = [r[4] for r in shard]
        yield [FlushSlot(slot, frozenset()) for slot in slab.slots]


def _stage(connection: Any, rows: Rows) -> None:
    """COPY packed rows, STATEMENT_ROWS at a time."""
    constant = pgcopy.text_field(DEFAULT_MODEL) + pgcopy.int_field(database.DIMENSIONS, 4)
    entity = pgcopy.text_field(ENTITY)
    with connection.cursor().copy(f"COPY kdb_staging ({STAGING_COLUMNS}) FROM STDIN (FORMAT BINARY)") as target:
        target.write(pgcopy.SIGNATURE)
        for start in range(0, len(rows), STATEMENT_ROWS):
            part = rows[start : start + STATEMENT_ROWS]
            target.write(pgcopy.pack_rows(7, _fields(part, entity, constant), len(part)))
        target.write(pgcopy.TRAILER)


def _fields(part: Rows, entity: bytes, constant: bytes) -> Sequence[pgcopy.Fields]:
    return [
        [pgcopy.text_field(r[0]) for r in part],
        entity,
        [pgcopy.text_field(r[2]) + pgcopy.text_field(r[3]) for r in part],
        pgcopy.vector_fields(np.array([r[4] for r in part], dtype=np.float32)),
        constant,
    ]


WAYS: dict[str, Callable[[str, Rows], float]] = {
    "upsert live": lambda c, r: upsert(c, r, indexed=True),
    "upsert": lambda c, r: upsert(c, r, indexed=False),
    "copy": lambda c, r: copy(c, r, indexed=False),
    "copy ready": lambda c, r: copy(c, r, indexed=True),
    "stage": stage,
    "merge empty": lambda c, r: merge(c, r, conflicting=False, indexed=False),
    "merge conflicting": lambda c, r: merge(c, r, conflicting=True, indexed=False),
    "merge live": lambda c, r: merge(c, r, conflicting=False, indexed=True),
    "hnsw 0": lambda c, r: build(c, r, index=database.TARGET.index.vector_index, workers=0),
    "hnsw 1": lambda c, r: build(c, r, index=database.TARGET.index.vector_index, workers=1),
    "hnsw 2": lambda c, r: build(c, r, index=database.TARGET.index.vector_index, workers=2),
    "gin": lambda c, r: build(c, r, index=database.TARGET.index.text_index, workers=max(0, usable_cpus() - 1)),
    "ours": lambda c, r: ours(c, r, indexed=False),
    "ours ready": lambda c, r: ours(c, r, indexed=True),
    "sqlite": lambda c, r: ours(c, r, indexed=True),
}
