"""SQLite: a vector column of the user's own table, as the file describes it, and the table of its state.

What a run could not write is told before anything is embedded.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from ...db.retrying import ErrorKind
from ...db.sqlite import quoted
from ...db.sqlite_errors import kind_of
from ...errors import SchemaError
from ...records import storable_key
from ...tables.column_target import ColumnTarget, VectorColumn, check_state, unreadable_text
from ...tables.key import KeyColumn
from ...tables.target import Target
from .check import GENERATED
from .keyword import prepare_keyword

CREATE_STATE = (
    "CREATE TABLE {state} ({keys}, fingerprint TEXT NOT NULL, text_hash BLOB NOT NULL, vector_hash BLOB NOT NULL, "
    "run INTEGER NOT NULL, at TEXT NOT NULL, source_at TEXT, PRIMARY KEY ({state_keys})) WITHOUT ROWID"
)
"""The keys are declared as those of the table, so that two of them are equal here exactly where they are there."""


class _Column(NamedTuple):
    name: str
    type: str
    not_null: bool
    primary: int
    """Place in the primary key, from 1; 0 where it is no part of it."""
    generated: bool


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
    shown = storable_key(table)
    row = connection.execute(
        "SELECT type, name, sql FROM sqlite_master WHERE name = ? COLLATE NOCASE AND type IN ('table', 'view')",
        (table,),
    ).fetchone()
    if row is None:
        raise SchemaError(f"There is no table {shown}.")
    kind, table, statement = row
    if kind == "view" or str(statement).upper().startswith("CREATE VIRTUAL"):
        raise SchemaError(
            f"{shown} is a {'view' if kind == 'view' else 'virtual table'}; expected a table, whose rows can be "
            "updated.",
            remedy="Name the table that has the column.",
        )
    columns = {str(column.name).lower(): column for column in _columns(connection, table)}
    found = columns.get(vector.lower())
    if found is None:
        raise SchemaError(f"The table {shown} has no column {storable_key(vector)}.")
    if found.generated:
        raise SchemaError(f"{shown}.{storable_key(vector)} is a generated column; it cannot be written.")
    if found.not_null:
        raise SchemaError(
            f"{shown}.{storable_key(vector)} must not be NULL; a row that has no text any more would keep the vector "
            "of an earlier one.",
            remedy="Make the table anew with a column that may be NULL.",
        )
    keys = _keys(connection, table, columns, key)
    form = form or _form(connection, table, found)
    return ColumnTarget(name, Target(), None, table, keys, text, VectorColumn(found.name, form), replace)


def _form(connection: sqlite3.Connection, table: str, column: _Column) -> str:
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


def _columns(connection: sqlite3.Connection, table: str) -> list[_Column]:
    rows = connection.execute(f"PRAGMA table_xinfo({quoted(table)})")
    definition = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    # Where a table is not STRICT, a column of the type ANY would take '1' for 1.
    strict = definition is not None and "STRICT" in str(definition[0]).upper().rpartition(")")[2]
    return [
        _Column(
            name,
            "" if strict and declared.upper() == "ANY" else declared or "",
            bool(not_null),
            primary,
            hidden in GENERATED,
        )
        for _, name, declared, not_null, _, primary, hidden in rows
    ]


def _keys(
    connection: sqlite3.Connection, table: str, columns: dict[str, _Column], wanted: Sequence[str]
) -> tuple[KeyColumn, ...]:
    """The columns of the key with the collations of their unique index."""
    chosen = [columns[name.lower()].name for name in wanted if name.lower() in columns]
    if not wanted:
        primary = sorted((column for column in columns.values() if column.primary), key=lambda column: column.primary)
        chosen = [column.name for column in primary]
    shown = storable_key(table)
    if not chosen or len(chosen) < len(wanted):
        missing = ", ".join(storable_key(name) for name in wanted if name.lower() not in columns)
        raise SchemaError(
            f"{shown} has no column {missing}."
            if wanted
            else f"{shown} has no primary key; a row could not be found again.",
            remedy="" if wanted else f"Name columns with a unique index: CREATE UNIQUE INDEX … ON {quoted(table)} (…);",
        )
    only = columns[chosen[0].lower()]
    if len(chosen) == 1 and only.primary and only.type.upper() == "INTEGER" and _has_rowid(connection, table):
        return (KeyColumn(only.name, "INTEGER", noun=only.name, typed=True),)
    for index, unique, partial in connection.execute(
        'SELECT name, "unique", partial FROM pragma_index_list(?)', (table,)
    ).fetchall():
        parts = connection.execute(
            "SELECT name, coll FROM pragma_index_xinfo(?) WHERE key ORDER BY seqno", (index,)
        ).fetchall()
        collations = dict(parts)
        if unique and not partial and len(parts) == len(chosen) and set(collations) == set(chosen):
            return tuple(
                KeyColumn(name, columns[name.lower()].type, noun=name, collation=collations[name], typed=True)
                for name in chosen
            )
    raise SchemaError(
        f"{shown} has no unique index on ({', '.join(map(storable_key, chosen))}); a row could not be found again.",
        remedy=f"Run: CREATE UNIQUE INDEX … ON {quoted(table)} ({', '.join(map(quoted, chosen))});",
    )


def _has_rowid(connection: sqlite3.Connection, table: str) -> bool:
    """Whether an INTEGER PRIMARY KEY is the rowid itself, which no index is made for."""
    return not connection.execute("SELECT 1 FROM pragma_index_list(?) WHERE origin = 'pk'", (table,)).fetchall()


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
    found = {column.name: column.type for column in _columns(connection, target.state)}
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
