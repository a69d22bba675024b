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
from ...tables import kdb_search, seal
from ...tables.target import Target
from ..runs import Holder, wait_for_lock
from . import migrate
from . import runs as sqlite_runs
from .check import check_kind, columns

PROBE = (
    "EXPLAIN INSERT INTO {index} (rowid, {id}, {created_at}, {content}, {embedding}, {updated_at}, {model}, "
    "{dimensions}, {key}) VALUES (1, '', '', '', '', '', '', 1, {empty_key}) ON CONFLICT ({key}) DO NOTHING"
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


def search_table(connection: sqlite3.Connection, target: Target) -> None:
    """Check the search tables or make them, and add our columns, within a transaction."""
    _search_table(connection, target)
    _full_text(connection, target)


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


def _search_table(connection: sqlite3.Connection, target: Target) -> None:
    if check_kind(connection, target.index.name):
        _check_search_table(connection, target)
    else:
        connection.execute(target.text(kdb_search.SQLITE_SEARCH))
    _plain_indexes(connection, target)
    have = columns(connection, target.index.name)
    wanted = dict(kdb_search.SQLITE_COLUMNS)
    if _triggers(connection, target):
        wanted[seal.COLUMN] = "BLOB"
    for name, data_type in wanted.items():
        if name not in have:
            connection.execute(target.text(f"ALTER TABLE {{index}} ADD COLUMN {name} {data_type}"))


def _triggers(connection: sqlite3.Connection, target: Target) -> list[str]:
    statement = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE"
    return [storable_key(row[0]) for row in connection.execute(statement, (target.index.name,))]


def altered(connection: sqlite3.Connection, target: Target, run: int) -> list[str]:
    """See :meth:`kdb_fast.stores.base.Store.altered`; the table has a column for seals."""
    causes = [f"trigger {name}" for name in _triggers(connection, target)]
    if not causes:
        return []
    times, others = connection.execute(
        target.text(
            "SELECT coalesce(sum(held AND kdb_fast_at IS NOT {updated_at}), 0), coalesce(sum(NOT held), 0) FROM "
            "(SELECT kdb_fast_at, {updated_at}, <held> AS held FROM {index} WHERE kdb_fast_run = ?)".replace(
                "<held>", f"{seal.COLUMN} IS {seal.of_row('sqlite')}"
            )
        ),
        (run,),
    ).fetchone()
    remedy = "To spare that, let the trigger leave a time alone that the writer sets: WHEN NEW.updated_at IS "
    remedy += "OLD.updated_at, on INSERT WHEN NEW.updated_at IS NULL."
    return seal.warnings(target.index_shown, causes, times, others, sealed=True, remedy=remedy)


def _plain_indexes(connection: sqlite3.Connection, target: Target) -> None:
    """Make those that are missing. An earlier table that was renamed keeps its indexes, and so their names."""
    tables = dict(connection.execute("SELECT lower(name), lower(tbl_name) FROM sqlite_master"))
    table = target.index.name.lower()
    for pattern, column in kdb_search.PLAIN_INDEXES.items():
        name = pattern.format(target.index.name)
        candidates = itertools.chain([name], (f"{name}{number}" for number in itertools.count(1)))
        free = next(c for c in candidates if tables.get(c.lower(), table) == table)
        connection.execute(
            target.text(
                "CREATE INDEX IF NOT EXISTS {name} ON {index} ({column})", name=target.table(free), column=column
            )
        )


def _check_search_table(connection: sqlite3.Connection, target: Target) -> None:
    shown, key = target.index_shown, ", ".join(column.name for column in target.index.key)
    have = columns(connection, target.index.name)
    missing = [name for name in target.index.columns if name not in have]
    if missing:
        raise SchemaError(
            f"The table {shown} has no column {', '.join(missing)}; expected KameleonDB's search table.",
            remedy=f"Is {shown} another program's table? Use another file for this index.",
        )
    unfilled = [
        name
        for name, (not_null, has_default) in have.items()
        if not_null and not has_default and name not in target.index.columns
    ]
    if unfilled:
        raise SchemaError(
            f"The table {shown} needs a value in {', '.join(unfilled)}, which kdb-fast does not write: no row could "
            "be stored.",
            remedy="Give these columns a default, or allow NULL in them.",
        )
    try:
        connection.execute(target.text(PROBE, empty_key=", ".join(["''"] * len(target.index.key))))
    except sqlite3.OperationalError as error:
        if "generated column" in str(error):
            raise SchemaError(
                f"A column of {shown} that kdb-fast writes is generated: {error}.",
                remedy="Make the table anew with an ordinary column, or use another file for this index.",
            ) from None
        raise SchemaError(
            f"{shown} must have row ids and a unique constraint on ({key}): {error}.",
            remedy=f"Run: CREATE UNIQUE INDEX ux_{shown}_key ON {shown} ({key});",
        ) from None


def _full_text(connection: sqlite3.Connection, target: Target) -> None:
    row = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (target.index.full_text,)).fetchone()
    try:
        if row is None:
            connection.execute(target.text(kdb_search.SQLITE_FTS))
            # The rows of a table that was made without full-text search are not read again: fill it now.
            connection.execute(
                target.text(
                    "INSERT INTO {full_text} (rowid, {id}, {key}, {content}) "
                    "SELECT rowid, {id}, {key}, {content} FROM {index}"
                )
            )
        else:
            connection.execute(target.text("SELECT rowid FROM {full_text} LIMIT 1")).fetchone()
    except sqlite3.OperationalError as error:
        if "no such module" not in str(error):
            raise
        raise SchemaError(
            f"This Python's SQLite ({sqlite3.sqlite_version}) has no full-text search (FTS5).",
            remedy="Use a Python whose SQLite is built with FTS5; those of python.org and all Linux systems are.",
        ) from None
    index = target.index
    expected = (index.id, *(column.name for column in index.key), index.text)
    have = columns(connection, index.full_text)
    missing = [name for name in expected if name not in have]
    if missing or not table_exists(connection, f"{index.full_text}_content"):
        raise SchemaError(
            f"{index.full_text} is not KameleonDB's full-text table: expected FTS5 with its own content and the "
            "columns "
            f"{', '.join(expected)}; found {', '.join(have)}.",
            remedy=f"If it can be built anew from {index.name}: DROP TABLE {index.full_text};",
        )
