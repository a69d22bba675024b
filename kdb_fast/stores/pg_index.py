"""PostgreSQL: keep the vector index during a small change, drop and rebuild it around a large load.

A live HNSW index costs about 1 ms of a core for each row written; building it afterwards costs 0.28 ms for
each row of the table, on all builders together (30,000 × 384, pgvector 0.8.5). So the break-even is where the
rows to write are about a quarter of the rows that the table will hold.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..faults import fault
from ..pg_connection import name_session
from ..resources import available_memory, usable_cpus
from ..target import TABLE, Target
from . import schema
from .base import IndexOutcome
from .pg_prepare import owns_table, vector_version

if TYPE_CHECKING:
    import psycopg

    from .postgresql import PostgreSQLStore

DEFER_SHARE = 0.25
"""Share of rows to write from which the index is dropped and rebuilt: 0.28 ms ÷ 1 ms, rounded down."""

DEFER_FLOOR = 200
"""Below this many rows to write the index is kept in any case: 0.2 s of work."""

ROW_BYTES_IN_BUILD = 1.3
"""pgvector keeps elements and neighbour lists in memory while building: about 1.3 × the vectors at m = 16."""

DROP_PATIENCE_MS = 2000
"""How long the dropping of the index waits for other sessions' transactions."""

STATE_KEY = "dropped_indexes"


def should_defer(to_write: int, rows_after: int) -> bool:
    """Whether ``to_write`` rows of ``rows_after`` are enough to drop the index and build it again."""
    return to_write >= DEFER_FLOOR and to_write >= DEFER_SHARE * rows_after


def _present(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> dict[str, tuple[str, bool]]:
    """Name → (definition, valid) of the full-text and vector indexes of the search table."""
    return {
        r[0]: (r[1], r[2])
        for r in cursor.execute(
            "SELECT c.relname, pg_get_indexdef(i.indexrelid), i.indisvalid FROM pg_index i "
            "JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam "
            "WHERE i.indrelid = to_regclass(%s) AND m.amname IN ('hnsw', 'ivfflat', 'gin')",
            (target.regclass(TABLE),),
        )
    }


def _remembered(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> dict[str, str]:
    row = cursor.execute(target.statement("SELECT value FROM {kdb_fast_state} WHERE key = %s"), (STATE_KEY,)).fetchone()
    return dict(json.loads(row[0])) if row else {}


def _wanted(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> dict[str, str]:
    """Name → statement of the indexes that should be there and are not valid now."""
    present = _present(cursor, target)
    wanted = _remembered(cursor, target)
    usable = {_is_vector(d) for d, valid in present.values() if valid}
    for name, (definition, valid) in present.items():
        if valid:
            wanted.pop(name, None)
        elif _is_vector(definition) not in usable:
            # Beside a valid index an invalid one is what an interrupted REINDEX CONCURRENTLY left behind.
            wanted.setdefault(name, definition)
    usable |= {_is_vector(d) for d in wanted.values()}
    row = cursor.execute(
        "SELECT (SELECT atttypmod FROM pg_attribute WHERE attrelid = to_regclass(%(t)s) AND attname = 'embedding'), "
        "EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass(%(t)s) AND attname = 'tsv' "
        "AND NOT attisdropped)",
        {"t": target.regclass(TABLE)},
    ).fetchone()
    assert row is not None
    if True not in usable and 0 < (row[0] or 0) <= 2000:
        wanted[schema.VECTOR_INDEX] = _standard(target, schema.VECTOR_INDEX)
    if False not in usable and row[1]:
        wanted[schema.FTS_INDEX] = _standard(target, schema.FTS_INDEX)
    # Full text first: it takes a second, and keyword search works while the vector index is built.
    return dict(sorted(wanted.items(), key=lambda item: _is_vector(item[1])))


def _standard(target: Target, name: str) -> str:
    """The statement with which KameleonDB makes this index."""
    return target.statement(schema.POSTGRESQL_SEARCH_INDEXES[name]).decode()


def _is_vector(definition: str) -> bool:
    """Whether a statement makes a vector index; the others are full-text indexes."""
    return " USING hnsw" in definition or " USING ivfflat" in definition


def missing(store: PostgreSQLStore) -> bool:
    """Whether :func:`finish` would build a vector index."""
    with store.transaction() as cursor:
        return any(_is_vector(statement) for statement in _wanted(cursor, store.target).values())


def defer(store: PostgreSQLStore) -> str:
    """Drop the vector and full-text indexes; their definitions are remembered in the same transaction."""
    import psycopg

    try:
        return _drop(store)
    except psycopg.errors.LockNotAvailable:
        return f"kept: another session is using {store.target.shown(TABLE)}, so the index could not be dropped"


def _drop(store: PostgreSQLStore) -> str:
    target = store.target
    with store.transaction() as cursor:
        if not owns_table(cursor, target):
            return f"kept: this role does not own {target.shown(TABLE)}, so it cannot drop and rebuild the index"
        # While this waits for the table, everybody else waits behind it.
        cursor.execute(f"SET LOCAL lock_timeout = {DROP_PATIENCE_MS}")
        present = {n: d for n, (d, _) in _present(cursor, target).items()}
        remembered = {**_remembered(cursor, target), **present}
        cursor.execute(
            target.statement(
                "INSERT INTO {kdb_fast_state} VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value"
            ),
            (STATE_KEY, json.dumps(remembered)),
        )
        for name in present:
            cursor.execute(_drop_statement(target, name))
        fault("store.index_dropped")
    return "dropped for the load"


def _drop_statement(target: Target, name: str) -> bytes:
    return target.statement("DROP INDEX IF EXISTS {index}", index=target.table(name))


def finish(store: PostgreSQLStore, beat: Callable[[str], None]) -> IndexOutcome:
    """Build what is missing, exactly as it was (or as KameleonDB creates it), and refresh statistics."""
    import psycopg

    target = store.target
    forget = target.statement("DELETE FROM {kdb_fast_state} WHERE key = %s")
    with store.transaction() as cursor:
        wanted = _wanted(cursor, target)
        present = _present(cursor, target)
        owner = owns_table(cursor, target)
        if not wanted:
            cursor.execute(forget, (STATE_KEY,))
            return IndexOutcome("kept")
    if not owner:
        return IndexOutcome(
            f"not built: this role does not own {target.shown(TABLE)}",
            (f"Let the owner run: {'; '.join(wanted.values())};",),
        )
    warnings: list[str] = []
    for name, statement in wanted.items():
        for attempt in ("parallel", "serial"):
            fault("store.index_build")
            beat(f"building {name}")
            try:
                with store.transaction() as cursor, _notices(store, warnings):
                    _name_session(cursor)
                    settings(cursor, target, serial=attempt == "serial")
                    if name in present:
                        cursor.execute(_drop_statement(target, name))
                    cursor.execute(statement.encode())
                break
            except psycopg.errors.DuplicateTable:
                break  # another program has built it meanwhile
            except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory) as error:
                if attempt == "serial":
                    raise
                warnings.append(
                    f"The parallel build of {name} ran out of shared memory ({error.diag.message_primary}); "
                    "built with one process. Give the server's container a larger --shm-size."
                )
    with store.transaction() as cursor:
        cursor.execute(forget, (STATE_KEY,))
    with store.transaction() as cursor:
        cursor.execute("SET LOCAL statement_timeout = 0")
        cursor.execute(target.statement("ANALYZE {kdb_search}"))
    return IndexOutcome(f"built {', '.join(wanted)}", tuple(warnings))


def _name_session(cursor: psycopg.Cursor[tuple[Any, ...]]) -> None:
    """A build may be silent for an hour; behind a pooler only the server can tell which of its processes does it."""
    row = cursor.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    name_session(cursor.connection, row[0])


def settings(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, *, serial: bool = False) -> None:
    """Memory and parallel workers of an index build, for this transaction.

    A build that fits ``maintenance_work_mem`` is several times as fast as one that does not; a parallel
    one allocates all of it at once, so no more is asked for than the vectors need. Parallel builds of
    pgvector before 0.8.2 can read other tables' memory (CVE-2026-3172).
    """
    row = cursor.execute(
        "SELECT greatest(a.atttypmod, 1), pg_size_bytes(current_setting('maintenance_work_mem')) "
        "FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'embedding' "
        "WHERE c.oid = to_regclass(%s)",
        (target.regclass(TABLE),),
    ).fetchone()
    assert row is not None
    counted = cursor.execute(target.statement("SELECT count(*) FROM {kdb_search}")).fetchone()
    rows = int(counted[0]) if counted else 0
    # Vector, element and neighbour lists: 4 bytes a dimension and about 700 bytes of graph at m = 16.
    needed = int(rows * (4 * row[0] * ROW_BYTES_IN_BUILD + 700)) + (16 << 20)
    local = cursor.connection.info.host.startswith("/") or cursor.connection.info.host in ("localhost", "127.0.0.1")
    allowed = available_memory() // 4 if local else row[1]
    memory = max(row[1], min(needed, allowed))
    cursor.execute("SELECT set_config('maintenance_work_mem', %s, true)", (f"{memory // 1024}kB",))
    workers = 0 if serial or vector_version(cursor) < (0, 8, 2) else max(1, usable_cpus() - 1) if local else 2
    cursor.execute("SELECT set_config('max_parallel_maintenance_workers', %s, true)", (str(workers),))
    cursor.execute("SET LOCAL statement_timeout = 0")


@contextlib.contextmanager
def _notices(store: PostgreSQLStore, into: list[str]) -> Iterator[None]:
    """Collect what the server says meanwhile, such as that the graph no longer fits into memory."""
    lock = threading.Lock()

    def take(diagnostic: psycopg.errors.Diagnostic) -> None:
        with lock:
            if diagnostic.message_primary and "hnsw" in diagnostic.message_primary:
                into.append(" ".join(p for p in (diagnostic.message_primary, diagnostic.message_hint) if p))

    connection = store.connection()
    connection.add_notice_handler(take)
    try:
        yield
    finally:
        connection.remove_notice_handler(take)
