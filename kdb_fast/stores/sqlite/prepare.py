"""SQLite: check the search tables before anything is embedded, create what is missing."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable

from ...db.sqlite import table_exists
from ...db.sqlite_errors import primary_code
from ...db.sqlite_session import transaction
from ...errors import SchemaError
from ...faults import fault
from ...records import storable_key
from ...tables import schema, seal
from ..runs import Holder, wait_for_lock
from . import migrate
from . import runs as sqlite_runs
from .check import check_kind, columns

NEEDED_COLUMNS = (
    "id", "entity_name", "record_id", "content", "embedding", "model", "dimensions", "created_at", "updated_at",
)  # fmt: skip
FTS_COLUMNS = ("id", "entity_name", "record_id", "content")

PROBE = (
    "EXPLAIN INSERT INTO kdb_search (rowid, id, entity_name, record_id, created_at, content, embedding, updated_at, "
    "model, dimensions) VALUES (1, '', '', '', '', '', '', '', '', 1) ON CONFLICT (entity_name, record_id) DO NOTHING"
)
"""Compiles only if the table has row ids, a unique constraint on the key, and no generated column where we write; runs
nothing."""


def prepare(
    connection: sqlite3.Connection,
    make: Callable[[], None],
    wait: float = 0.0,
    on_wait: Callable[[str], None] = lambda what: None,
) -> None:
    """See :meth:`kdb_fast.stores.base.Store.prepare`.

    Args:
        make: Checks the table of the vectors and makes what is missing for it, within a transaction.
    """
    wait_for_lock(lambda: _prepare(connection, make), wait, on_wait)


def search_table(connection: sqlite3.Connection) -> None:
    """Check the search tables or make them, and add our columns, within a transaction."""
    _search_table(connection)
    _full_text(connection)


def _prepare(connection: sqlite3.Connection, make: Callable[[], None]) -> Holder | None:
    """The run that keeps our own tables from being changed; None once they are prepared."""
    try:
        prepared = False
        while True:
            with transaction(connection):
                migration = migrate.find_next(connection)
                holder = sqlite_runs.living(connection) if migration is not None else None
                if holder is not None:
                    return holder
                if not prepared:
                    _encoding(connection)
                    make()
                    prepared = True
                if migration is None:
                    migrate.check_there(connection)
                    # Where nothing had to be created: BEGIN IMMEDIATE alone does not fail on a read-only file.
                    connection.execute("DELETE FROM kdb_fast_state WHERE false")
                    return None
                migrate.apply(connection, migration)
            fault("store.migrated")
    except sqlite3.Error as error:
        if primary_code(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise SchemaError(
                f"The database cannot be written: {error}.",
                remedy="Make its directory writable, and the file: SQLite keeps its journal beside it.",
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
    if check_kind(connection, "kdb_search"):
        _check_search_table(connection)
    else:
        connection.execute(schema.SQLITE_SEARCH)
    _plain_indexes(connection)
    have = columns(connection, "kdb_search")
    wanted = dict(schema.SQLITE_COLUMNS)
    if _triggers(connection):
        wanted[seal.COLUMN] = "BLOB"
    for name, data_type in wanted.items():
        if name not in have:
            connection.execute(f"ALTER TABLE kdb_search ADD COLUMN {name} {data_type}")


def _triggers(connection: sqlite3.Connection) -> list[str]:
    statement = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'kdb_search' COLLATE NOCASE"
    return [storable_key(row[0]) for row in connection.execute(statement)]


def altered(connection: sqlite3.Connection, run: int) -> list[str]:
    """See :meth:`kdb_fast.stores.base.Store.altered`; the table has a column for seals."""
    causes = [f"trigger {name}" for name in _triggers(connection)]
    if not causes:
        return []
    times, others = connection.execute(
        "SELECT coalesce(sum(held AND kdb_fast_at IS NOT updated_at), 0), coalesce(sum(NOT held), 0) FROM "
        "(SELECT kdb_fast_at, updated_at, <held> AS held FROM kdb_search WHERE kdb_fast_run = ?)".replace(
            "<held>", f"{seal.COLUMN} IS {seal.of_row('sqlite')}"
        ),
        (run,),
    ).fetchone()
    remedy = "To spare that, let the trigger leave a time alone that the writer sets: WHEN NEW.updated_at IS "
    remedy += "OLD.updated_at, on INSERT WHEN NEW.updated_at IS NULL."
    return seal.warnings("kdb_search", causes, times, others, sealed=True, remedy=remedy)


def _plain_indexes(connection: sqlite3.Connection) -> None:
    """Make those that are missing. An earlier table that was renamed keeps its indexes, and so their names."""
    tables = dict(connection.execute("SELECT lower(name), lower(tbl_name) FROM sqlite_master"))
    for name, column in schema.SQLITE_PLAIN_INDEXES.items():
        candidates = itertools.chain([name], (f"{name}{number}" for number in itertools.count(1)))
        free = next(c for c in candidates if tables.get(c, "kdb_search") == "kdb_search")
        connection.execute(f"CREATE INDEX IF NOT EXISTS {free} ON kdb_search ({column})")


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
            f"The table kdb_search needs a value in {', '.join(unfilled)}, which kdb-fast does not write: no row could "
            "be stored.",
            remedy="Give these columns a default, or allow NULL in them.",
        )
    try:
        connection.execute(PROBE)
    except sqlite3.OperationalError as error:
        if "generated column" in str(error):
            raise SchemaError(
                f"A column of kdb_search that kdb-fast writes is generated: {error}.",
                remedy="Make the table anew with an ordinary column, or use another file for this index.",
            ) from None
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
