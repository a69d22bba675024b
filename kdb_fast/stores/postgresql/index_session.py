"""PostgreSQL: the session in which an index is built: its memory, its parallel workers, and what the server says."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ...db.pg_connection import connect_postgresql, name_session
from ...db.pg_settings import pinned
from ...errors import DatabaseError
from ...resources import available_memory, usable_cpus
from .check import vector_version
from .index_catalog import Name, qualified
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[tuple[Any, ...]]
    Cursor = psycopg.Cursor[tuple[Any, ...]]

GRAPH_ROW_BYTES = 720
"""Of a row beside its vector while a graph is built in memory: element and lists of neighbours at m = 16. Measured by
the rows that fitted (``bench bytes``): 2,252 bytes of vector(384), 1,483 of halfvec(384); 716 and 715 beside it."""

BUILD_MARGIN = 1.05
"""Of what was measured: levels are drawn at random, and parallel workers claim memory in pieces."""

SLOWER = "at a third of the speed or less"
"""A row of a graph that no longer fits, against one in memory: 3.6 times with all pages cached (``bench bytes``)."""

CONCURRENT_PATIENCE = "60s"
"""How long a build beside other sessions waits for one of their transactions, each time: it needs the end of all that
have begun before it."""


class BuildMemory(NamedTuple):
    """What the build of an index of vectors needs so that its graph stays in memory, and what it gets; bytes."""

    needed: int
    granted: int
    local: bool
    """The server is on this machine, whose memory is known."""

    def shortage(self, rows: int) -> tuple[str, ...]:
        """What is to be said where ``rows`` vectors do not fit; else nothing."""
        if self.granted >= self.needed:
            return ()
        here = "a quarter of this machine's free memory is" if self.local else "maintenance_work_mem of this role is"
        fit = rows * self.granted // self.needed
        return (
            f"An index of {rows:,} vectors needs about {self.needed / 1e6:,.0f} MB to be built in memory; {here} "
            f"{self.granted / 1e6:,.0f} MB, which holds about {fit:,}. The others are added on disk, {SLOWER}. "
            f"With more: ALTER ROLE CURRENT_USER SET maintenance_work_mem = '{-(-self.needed >> 20)}MB';",
        )


def build_memory(cursor: Cursor, table: Name, vector: str, dimensions: int, rows: int) -> BuildMemory:
    """For an index of ``rows`` vectors of this column.

    Args:
        dimensions: Of the vectors, where the column does not say.
    """
    row = cursor.execute(
        "SELECT greatest(a.atttypmod, %s), pg_size_bytes(current_setting('maintenance_work_mem')), "
        "CASE (SELECT typname FROM pg_type WHERE oid = a.atttypid) WHEN 'halfvec' THEN 2 ELSE 4 END "
        "FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = %s "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        (dimensions, vector, *table),
    ).fetchone()
    assert row is not None
    needed = int(rows * (row[2] * row[0] + GRAPH_ROW_BYTES) * BUILD_MARGIN) + (16 << 20)
    local = cursor.connection.info.host.startswith("/") or cursor.connection.info.host in ("localhost", "127.0.0.1")
    allowed = available_memory() // 4 if local else row[1]
    return BuildMemory(needed, max(row[1], min(needed, allowed)), local)


def name_build(cursor: Cursor) -> None:
    """A build may be silent for an hour; behind a pooler only the server can tell which of its processes does it."""
    row = cursor.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    name_session(cursor.connection, row[0])


def build_settings(
    cursor: Cursor, table: Name, vector: str, dimensions: int, *, serial: bool = False
) -> dict[str, str]:
    """Memory and parallel workers of an index build.

    A build that fits ``maintenance_work_mem`` is more than three times as fast as one that does not; a parallel
    one allocates all of it at once, so no more is asked for than the vectors need. Parallel builds of
    pgvector before 0.8.2 can read other tables' memory (CVE-2026-3172).

    Args:
        dimensions: Of the vectors, where the column does not say.
    """
    counted = cursor.execute(f"SELECT count(*) FROM {qualified(table)}".encode()).fetchone()  # noqa: S608 - quoted
    memory = build_memory(cursor, table, vector, dimensions, int(counted[0]) if counted else 0)
    workers = 0 if serial or vector_version(cursor) < (0, 8, 2) else max(1, usable_cpus() - 1) if memory.local else 2
    return {
        "maintenance_work_mem": f"{memory.granted // 1024}kB",
        "max_parallel_maintenance_workers": str(workers),
        "statement_timeout": "0",
    }


def apply(cursor: Cursor, settings: Mapping[str, str]) -> None:
    """Let these settings hold for the rest of the transaction."""
    cursor.execute(
        "SELECT set_config(n, v, true) FROM unnest(%s::text[], %s::text[]) AS s(n, v)",
        (list(settings), list(settings.values())),
    )


@contextlib.contextmanager
def beside_others(session: PgSession, settings: Mapping[str, str]) -> Iterator[Cursor]:
    """A connection whose statements run outside transactions, as CONCURRENTLY wants it.

    Its settings come with its beginning, so that a pooler passes none on to others; one that takes no settings there
    gives the role's own.
    """
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    address = session.address
    info = session.connection().info
    wanted = {**pinned(info.server_version), "lock_timeout": CONCURRENT_PATIENCE, **settings}
    if session.is_ended_with_client:
        wanted["client_connection_check_interval"] = "2s"
    escaped = {name: value.replace("\\", "\\\\").replace(" ", "\\ ") for name, value in wanted.items()}
    options = " ".join(f"-c {name}={value}" for name, value in escaped.items())
    given = conninfo_to_dict(address.conninfo).get("options")
    conninfo = make_conninfo(address.conninfo, options=f"{given} {options}" if given else options)
    try:
        connection = connect_postgresql(replace(address, conninfo=conninfo), role="index")
    except DatabaseError as error:
        if "startup parameter" not in error.message:
            raise
        connection = connect_postgresql(address, role="index")
    with contextlib.closing(connection):
        # Not the connection's own cursors: those put each statement into a transaction.
        yield psycopg.Cursor(connection)


@contextlib.contextmanager
def notices(connection: Connection, into: list[str]) -> Iterator[None]:
    """Collect what the server says meanwhile, such as that the graph no longer fits into memory."""
    lock = threading.Lock()

    def take(diagnostic: psycopg.errors.Diagnostic) -> None:
        with lock:
            if diagnostic.message_primary and "hnsw" in diagnostic.message_primary:
                into.append(" ".join(p for p in (diagnostic.message_primary, diagnostic.message_hint) if p))

    connection.add_notice_handler(take)
    try:
        yield
    finally:
        connection.remove_notice_handler(take)
