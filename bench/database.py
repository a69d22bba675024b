"""A fresh PostgreSQL for a benchmark, fresh tables for a run, and the proof that a run did its work."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from kdb_fast.db.address import DatabaseAddress, opened, parse_address
from kdb_fast.tables import kdb_search
from kdb_fast.tables.target import Target

if TYPE_CHECKING:
    import psycopg

DIMENSIONS = 384

TARGET = Target("public", "public")

SEARCH_INDEXES = (TARGET.index.text_index, TARGET.index.vector_index)

UPSERT = (
    "INSERT INTO kdb_search (id, entity_name, record_id, content, embedding, model, dimensions, updated_at) "
    "VALUES (%s, %s, %s, %s, %s, %s, %s, now()) ON CONFLICT (entity_name, record_id) DO UPDATE SET "
    "content = EXCLUDED.content, embedding = EXCLUDED.embedding, model = EXCLUDED.model, "
    "dimensions = EXCLUDED.dimensions, updated_at = now()"
)
"""KameleonDB's own statement in a form that PostgreSQL accepts."""

COPY_ROWS = (
    "COPY kdb_search (id, entity_name, record_id, content, embedding, model, dimensions) "
    "FROM STDIN WITH (FORMAT BINARY)"
)
COPY_TYPES = ("varchar", "varchar", "varchar", "text", "vector", "varchar", "int4")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Connection string of a new embedded server with default settings; it goes away with the block."""
    with (
        tempfile.TemporaryDirectory(prefix="kdb-fast-bench-", ignore_cleanup_errors=True) as directory,
        opened(parse_address(f"embedded:{Path(directory) / 'pg'}")) as address,
    ):
        yield address.conninfo


def address_of(conninfo: str) -> DatabaseAddress:
    """The address for kdb-fast of a server that :func:`server` started, or of a SQLite file."""
    if conninfo.startswith("sqlite:"):
        return parse_address(conninfo)
    return DatabaseAddress("postgresql", conninfo, "embedded")


def connect(conninfo: str) -> psycopg.Connection[Any]:
    """An ordinary connection in autocommit mode, as the peers use one, that knows the vector type."""
    import psycopg
    from pgvector.psycopg import register_vector

    connection: psycopg.Connection[Any] = psycopg.connect(conninfo, autocommit=True)
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    return connection


def named(conninfo: str, name: str) -> str:
    """Connection string of another database of the same server."""
    from psycopg.conninfo import make_conninfo

    return make_conninfo(conninfo, dbname=name)


def create(conninfo: str, name: str) -> None:
    """Make a database of this name on the server, in place of the one there is."""
    import psycopg
    from psycopg import sql

    with psycopg.connect(conninfo, autocommit=True) as connection:
        for statement in ("DROP DATABASE IF EXISTS {} WITH (FORCE)", "CREATE DATABASE {}", "CHECKPOINT"):
            connection.execute(sql.SQL(statement).format(sql.Identifier(name)))


def server_pid(conninfo: str) -> int:
    """Process id of a server on this machine, the parent of all its others."""
    with connect(conninfo) as connection:
        return psutil.Process(connection.info.backend_pid).ppid()


def reset(conninfo: str) -> None:
    """Drop every table of KameleonDB and kdb-fast, and let the server settle: each run begins alike."""
    import psycopg
    from psycopg import sql

    with psycopg.connect(conninfo, autocommit=True) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE tablename LIKE 'kdb\\_%'").fetchall()
        for (name,) in tables:
            connection.execute(sql.SQL("DROP TABLE {} CASCADE").format(sql.Identifier(name)))
        connection.execute("CHECKPOINT")


def create_table(connection: psycopg.Connection[Any], *, search_indexes: bool) -> None:
    """KameleonDB's search table with its plain indexes, and with the HNSW and GIN index if asked for."""
    connection.execute(TARGET.statement(kdb_search.POSTGRESQL_SEARCH, dimensions=str(DIMENSIONS)))
    for name in kdb_search.postgresql_indexes(TARGET.index).keys() - SEARCH_INDEXES:
        create_index(connection, name)
    if search_indexes:
        create_search_indexes(connection)


def create_index(connection: psycopg.Connection[Any], name: str) -> None:
    """Build one of the table's indexes."""
    using = kdb_search.postgresql_indexes(TARGET.index)[name]
    connection.execute(TARGET.statement(f"CREATE INDEX {name} ON {{index}} {using}"))


def create_search_indexes(connection: psycopg.Connection[Any]) -> None:
    """Build the GIN and the HNSW index by hand, as pgvector's documentation advises: with memory, in parallel."""
    # The server's default of 64 MB makes the build of 30,000 vectors several times slower: that would be no contest.
    connection.execute("SET maintenance_work_mem = '512MB'")
    for name in SEARCH_INDEXES:
        create_index(connection, name)
    connection.execute("RESET maintenance_work_mem")


def verify(conninfo: str, rows: int, *, indexed: bool = True) -> None:
    """That ``rows`` rows with vectors are there, and (``indexed``) both search indexes are valid.

    Raises:
        AssertionError: A contender has not done what it is measured for.
    """
    with connect(conninfo) as connection:
        found = connection.execute("SELECT count(embedding) FROM kdb_search").fetchone()
        assert found is not None
        assert found[0] == rows, f"{found[0]} rows were written, expected {rows}"
        if indexed:
            valid = connection.execute(
                "SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
                "JOIN pg_am m ON m.oid = c.relam "
                "WHERE i.indrelid = to_regclass('kdb_search') AND m.amname IN ('hnsw', 'gin') AND i.indisvalid"
            ).fetchone()
            assert valid is not None
            assert valid[0] == 2, f"{valid[0]} of 2 search indexes are there"


def versions(conninfo: str) -> dict[str, str]:
    """Versions of the server and of pgvector."""
    with connect(conninfo) as connection:
        row = connection.execute(
            "SELECT current_setting('server_version'), (SELECT extversion FROM pg_extension WHERE extname = 'vector')"
        ).fetchone()
    assert row is not None
    return {"PostgreSQL": row[0].split()[0], "pgvector (server)": row[1]}
