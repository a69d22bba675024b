"""SQLite: a vector column of the user's own table, as the file describes it, and the table of its state.

What a run could not write is told before anything is embedded.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from ...db.retrying import ErrorKind
from ...db.sqlite import quoted
from ...db.sqlite_errors import kind_of
from ...errors import SchemaError
from ...records import storable_key
from ...tables.column_target import ColumnTarget, VectorColumn, check_state, unreadable_text
from ...tables.find_relation import find_relation, key_of, no_column, no_key, no_place
from ...tables.names import as_typed
from ...tables.relation import Column
from ...tables.target import Target, rows_on
from .keyword import prepare_keyword

CREATE_STATE = (
    "CREATE TABLE {state} ({keys}, fingerprint TEXT NOT NULL, text_hash BLOB NOT NULL, vector_hash BLOB NOT NULL, "
    "run INTEGER NOT NULL, at TEXT NOT NULL, source_at TEXT, PRIMARY KEY ({state_keys})) WITHOUT ROWID"
)
"""The keys are declared as those of the table, so that two of them are equal here exactly where they are there."""


def find_column(
    connection: sqlite3.Connection,
    name: str,
    table: str,
    *,
    text: str,
    vector: str,
    form: str = "",
    key: Sequence[str] = (),
    replace: bool = False,
) -> ColumnTarget:
    """The vector column of a table.

    Args:
        name: Under which its state is kept.
        table: Its name as it is, in the main database.
        text: SQL expression of the text, see :func:`~kdb_fast.tables.column_target.column_text`.
        vector: Name of the column.
        form: How a vector is written: ``blob`` or ``json``; '' for what is there, else what the column's type says.
        key: Names of the columns by which a row is found; () for the primary key.
        replace: Vectors of other programs are overwritten.

    Raises:
        SchemaError: There is no such table or column, or a run could not write it.
    """
    relation = find_relation(rows_on(connection, "sqlite"), "sqlite", as_typed("main", table))
    shown = relation.shown
    if not relation.is_table:
        raise no_place(relation)
    found = relation.column(vector)
    if found is None:
        raise no_column(relation, vector)
    if found.generated:
        raise SchemaError(f"{shown}.{storable_key(vector)} is a generated column; it cannot be written.")
    if found.not_null:
        raise SchemaError(
            f"{shown}.{storable_key(vector)} must not be NULL; a row that has no text any more would keep the vector "
            "of an earlier one.",
            remedy="Make the table anew with a column that may be NULL.",
        )
    keys = key_of(relation, key)
    if keys is None:
        raise no_key(relation, "sqlite", key)
    form = form or _form(connection, relation.name, found)
    column = VectorColumn(found.name, form, form=form)
    return ColumnTarget(name, Target(), None, relation.name, keys, text, column, replace)


def _form(connection: sqlite3.Connection, table: str, column: Column) -> str:
    """How the vectors of a column are written: as the first of them is."""
    name = quoted(column.name)
    first = connection.execute(
        f"SELECT typeof({name}) FROM {quoted(table)} WHERE {name} IS NOT NULL LIMIT 1"  # noqa: S608 - quoted
    ).fetchone()
    kind = first[0] if first else column.type.lower()
    return "json" if any(word in kind for word in ("text", "json", "char", "clob")) else "blob"


def create_column(connection: sqlite3.Connection, table: str, vector: str, form: str = "blob") -> None:
    """Add a column for vectors to a table that has none of this name, within a transaction.

    Args:
        table: Its name as it is.
        vector: Name of the column.
        form: ``blob`` or ``json``.

    Raises:
        SchemaError: The database refuses it.
    """
    kind = "TEXT" if form == "json" else "BLOB"
    try:
        connection.execute(f"ALTER TABLE {quoted(table)} ADD COLUMN {quoted(vector)} {kind}")
    except sqlite3.OperationalError as error:
        if kind_of(error) is not ErrorKind.REFUSED:
            raise
        raise SchemaError(
            f"The column {storable_key(vector)} cannot be added to {storable_key(table)}: {error}."
        ) from None


def prepare_column(connection: sqlite3.Connection, target: ColumnTarget) -> None:
    """Make the table of its state where that is missing, within a transaction.

    Raises:
        SchemaError: It was made for a table with another key.
    """
    try:
        connection.execute(target.statement("SELECT {text} FROM {table} t LIMIT 0").decode())
    except sqlite3.OperationalError as error:
        if kind_of(error) is not ErrorKind.REFUSED:
            raise
        raise unreadable_text(target, str(error)) from None
    found = dict(connection.execute("SELECT name, type FROM pragma_table_info(?)", (target.state,)))
    if not found:
        state_keys = target.each_key("key_{number}")
        keys = ", ".join(
            f"key_{number} {key.type}" + (f" COLLATE {quoted(key.collation)}" if key.collation else "") + " NOT NULL"
            for number, key in enumerate(target.key, 1)
        )
        connection.execute(target.statement(CREATE_STATE, keys=keys, state_keys=state_keys).decode())
    else:
        check_state(target, found, quoted(target.state))
    state_key = [f"key_{number}" for number in range(1, len(target.key) + 1)]
    prepare_keyword(connection, target.state, state_key, target.keyword)
