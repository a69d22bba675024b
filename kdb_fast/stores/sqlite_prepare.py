"""SQLite: check the search tables before anything is embedded, create what is missing."""

from __future__ import annotations

import sqlite3

from ..errors import SchemaError
from . import schema
from .sqlite_base import primary_code, quoted, table_exists, transaction

NEEDED_COLUMNS = (
    "id", "entity_name", "record_id", "content", "embedding", "model", "dimensions", "created_at", "updated_at",
)  # fmt: skip
FTS_COLUMNS = ("id", "entity_name", "record_id", "content")

PROBE = (
    "EXPLAIN INSERT INTO kdb_search (rowid, id, entity_name, record_id, content) VALUES (1, '', '', '', '') "
    "ON CONFLICT (entity_name, record_id) DO NOTHING"
)
"""Compiles only if the table has row ids and a unique constraint on the key; runs nothing."""


def columns(connection: sqlite3.Connection, table: str) -> dict[str, tuple[bool, bool]]:
    """Name of each column → (must not be null, has a default)."""
    rows = connection.execute(f"PRAGMA table_info({quoted(table)})")
    return {str(name).lower(): (bool(not_null), default is not None) for _, name, _, not_null, default, _ in rows}


def prepare(connection: sqlite3.Connection) -> None:
    """See :meth:`kdb_fast.stores.base.Store.prepare`. All or nothing: one transaction."""
    try:
        with transaction(connection):
            _encoding(connection)
            _search_table(connection)
            _full_text(connection)
            for statement in schema.SQLITE_OWN:
                connection.execute(statement)
            # Where nothing had to be created: BEGIN IMMEDIATE alone does not fail on a read-only file.
            connection.execute("DELETE FROM kdb_fast_state WHERE false")
    except sqlite3.Error as error:
        if primary_code(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise SchemaError(
                f"The database cannot be written: {error}.",
                remedy="Make the file and its directory writable: SQLite keeps its log beside the file.",
            ) from error
        raise


def _encoding(connection: sqlite3.Connection) -> None:
    (encoding,) = connection.execute("PRAGMA encoding").fetchone()
    if encoding != "UTF-8":
        raise SchemaError(
            f"The database keeps text as {encoding}; expected UTF-8, SQLite's and KameleonDB's default.",
            remedy="Copy it into a new file: sqlite3 old.db .dump | sqlite3 new.db",
        )


def _search_table(connection: sqlite3.Connection) -> None:
    kind = connection.execute("SELECT type FROM sqlite_master WHERE name = ?", ("kdb_search",)).fetchone()
    if kind is None:
        connection.execute(schema.SQLITE_SEARCH)
    elif kind[0] != "table":
        raise SchemaError(
            f"kdb_search is a {kind[0]}; expected KameleonDB's search table.", remedy="Use another file for this index."
        )
    else:
        _check_search_table(connection)
    for statement in schema.SQLITE_PLAIN_INDEXES.values():
        connection.execute(statement)
    have = columns(connection, "kdb_search")
    for name, data_type in schema.SQLITE_COLUMNS.items():
        if name not in have:
            connection.execute(f"ALTER TABLE kdb_search ADD COLUMN {name} {data_type}")


def _check_search_table(connection: sqlite3.Connection) -> None:
    have = columns(connection, "kdb_search")
    missing = [name for name in NEEDED_COLUMNS if name not in have]
    if missing:
        raise SchemaError(
            f"The table kdb_search has no column {', '.join(missing)}; expected KameleonDB's search table.",
            remedy="Is kdb_search another program's table? Use another file for this index.",
        )
    unfilled = [
        name
        for name, (not_null, has_default) in have.items()
        if not_null and not has_default and name not in NEEDED_COLUMNS
    ]
    if unfilled:
        raise SchemaError(
            f"The table kdb_search needs a value in {', '.join(unfilled)}, which is not KameleonDB's.",
            remedy="Give these columns a default, or allow NULL in them.",
        )
    try:
        connection.execute(PROBE)
    except sqlite3.OperationalError as error:
        raise SchemaError(
            f"kdb_search must have row ids and a unique constraint on (entity_name, record_id): {error}.",
            remedy="Run: CREATE UNIQUE INDEX ux_kdb_search_key ON kdb_search (entity_name, record_id);",
        ) from None


def _full_text(connection: sqlite3.Connection) -> None:
    row = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", ("kdb_search_fts",)).fetchone()
    try:
        if row is None:
            connection.execute(schema.SQLITE_FTS)
            # The rows of a table that was made without full-text search are not read again: fill it now.
            connection.execute(
                "INSERT INTO kdb_search_fts (rowid, id, entity_name, record_id, content) "
                "SELECT rowid, id, entity_name, record_id, content FROM kdb_search"
            )
        else:
            connection.execute("SELECT rowid FROM kdb_search_fts LIMIT 1").fetchone()
    except sqlite3.OperationalError as error:
        if "no such module" not in str(error):
            raise
        raise SchemaError(
            f"This Python's SQLite ({sqlite3.sqlite_version}) has no full-text search (FTS5).",
            remedy="Use a Python whose SQLite is built with FTS5; those of python.org and all Linux systems are.",
        ) from None
    have = columns(connection, "kdb_search_fts")
    missing = [name for name in FTS_COLUMNS if name not in have]
    if missing or not table_exists(connection, "kdb_search_fts_content"):
        raise SchemaError(
            "kdb_search_fts is not KameleonDB's full-text table: expected FTS5 with its own content and the columns "
            f"{', '.join(FTS_COLUMNS)}; found {', '.join(have)}.",
            remedy="If it can be built anew from kdb_search: DROP TABLE kdb_search_fts;",
        )
