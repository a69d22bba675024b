"""SQLite: a table of vectors beside what is read: what it is made as, and whether one that is there will do.

What a run could not write is told before anything is embedded.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

from ...db.sqlite import quoted
from ...db.sqlite_vec import TO_HAVE_IT, why_no_sqlite_vec
from ...errors import SchemaError
from ...records import storable_key
from ...tables.column_target import VectorColumn, state_table
from ...tables.key import KeyColumn
from ...tables.relation import Relation
from ...tables.table_target import CHUNK_COLUMNS, CONTENT, STATE_COLUMNS, TableTarget, check_columns, check_names
from ...tables.target import Target, columns_of, rows_on
from .check import GENERATED, check_kind
from .keyword import prepare_keyword

OTHERS = {
    **dict.fromkeys(CHUNK_COLUMNS, "INTEGER"),
    CONTENT: "TEXT",
    "kdb_fast_hash": "BLOB",
    "kdb_fast_seal": "BLOB",
    "kdb_fast_fingerprint": "TEXT",
    "kdb_fast_run": "INTEGER",
    "kdb_fast_at": "TEXT",
}
"""Columns that a run writes, with their types, beside key and vectors."""

CREATE = "CREATE TABLE {table} ({definitions}, {unique} ({unique_columns}){refers})"
CREATE_VEC0 = "CREATE VIRTUAL TABLE {table} USING vec0({vector} float[{dimensions}] distance_metric=cosine)"
CREATE_KNOWN = "CREATE TABLE IF NOT EXISTS {known} ({key} INTEGER PRIMARY KEY, {others})"
"""What is known of the rows of a table of sqlite-vec."""

PROBE = "EXPLAIN INSERT INTO {table} ({unique}) VALUES ({values}) ON CONFLICT ({unique}) DO NOTHING"
"""Compiles only if there is such a constraint; runs nothing."""

REFERS = ", FOREIGN KEY ({columns}) REFERENCES {source} ({columns}) ON DELETE CASCADE"
"""Holds for connections with ``PRAGMA foreign_keys = ON``; for the others each run prunes."""


def find_table(
    connection: sqlite3.Connection,
    name: str,
    into: str,
    *,
    key: Sequence[KeyColumn],
    source: Relation | None = None,
    vector: str = "embedding",
    content: bool = False,
    chunked: bool = False,
    keyword: str = "",
    vec0: bool = False,
    text: str = "",
) -> TableTarget:
    """The table of vectors, whether it is there yet or not.

    Args:
        name: Under which it is kept.
        into: Its name as it is, in the main database.
        key: Of what is read.
        source: What is read, where its key can be referred to.

    Others: see :class:`~kdb_fast.tables.table_target.TableTarget`.

    Raises:
        SchemaError: The table cannot have this name, or not beside its columns; or it cannot be one of sqlite-vec.
    """
    row = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name = ? COLLATE NOCASE", (into,)
    ).fetchone()
    if into.lower().startswith("sqlite_"):
        raise SchemaError(f"{storable_key(into)} is a name that SQLite keeps for itself.", remedy="Choose another.")
    if vec0 and row:
        load_vec0(connection)
    # What was made with a column for the text keeps it.
    there = columns_of(rows_on(connection, "sqlite"), Target(), [into]).get(into, frozenset())
    refers = source if source is not None and source.kind == "table" and source.schema is None else None
    target = TableTarget(
        name,
        Target(),
        None,
        row[0] if row else into,
        tuple(key),
        VectorColumn(vector, "blob", form="vec0" if vec0 else "blob"),
        refers,
        content or chunked or bool(keyword) or {CONTENT, *STATE_COLUMNS} <= there,
        chunked,
        keyword,
        vec0,
        text if refers else "",
    )
    check_names(target)
    if vec0:
        _check_vec0(connection, target)
    return target


def load_vec0(connection: sqlite3.Connection) -> None:
    """Make sqlite-vec known to a connection. Raises SchemaError where that cannot be done."""
    if why := why_no_sqlite_vec(connection):
        raise SchemaError(
            f"The vectors cannot go into a table of sqlite-vec: {why}.",
            remedy=f"{TO_HAVE_IT}; or leave out --vec0 for a plain table.",
        )


def _check_vec0(connection: sqlite3.Connection, target: TableTarget) -> None:
    """Raise SchemaError for what a table of sqlite-vec cannot be."""
    if not has_rowid_key(target) or target.chunked:
        raise SchemaError(
            "A table of sqlite-vec has one row for each INTEGER PRIMARY KEY; "
            + ("texts in pieces have several." if target.chunked else f"the key is {_key_shown(target)}."),
            remedy="Leave out --vec0 for a plain table.",
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", target.vector.name):
        raise SchemaError(
            f"A table of sqlite-vec cannot have vectors in a column {storable_key(target.vector.name)}: its names have "
            "letters, digits and _ only.",
            remedy="Give the vectors another column: --vector NAME.",
        )
    load_vec0(connection)


def _key_shown(target: TableTarget) -> str:
    return storable_key(", ".join(f"{key.name} {key.type}".rstrip() for key in target.key))


def has_rowid_key(target: TableTarget) -> bool:
    """Whether the key is an INTEGER PRIMARY KEY: the rowid itself, which no index is made for, with a collation."""
    return len(target.key) == 1 and target.key[0].type.upper() == "INTEGER" and not target.key[0].collation


def prepare_table(connection: sqlite3.Connection, target: TableTarget, dimensions: int) -> tuple[str, ...]:
    """Make the table where it is missing, and check it where it is there, within a transaction.

    Returns:
        What the user should know.

    Raises:
        SchemaError: It holds vectors of another length, was made for another key, or is another program's.
    """
    notes = _prepare(connection, target, dimensions)
    known = state_table(target.name) if target.vec0 else target.table
    prepare_keyword(connection, known, target.unique, target.keyword)
    return notes


def _prepare(connection: sqlite3.Connection, target: TableTarget, dimensions: int) -> tuple[str, ...]:
    if target.vec0:
        _prepare_vec0(connection, target, dimensions)
        return ()
    if check_kind(connection, target.table):
        _check(connection, target, dimensions)
        return ()
    if target.source is None:
        connection.execute(_creation(target))
        return ()
    connection.execute("SAVEPOINT kdb_fast_table")
    connection.execute(_creation(target, refers=True))
    try:
        # A key that does not fit would keep other programs from deleting rows of the table that it refers to.
        connection.execute(f"PRAGMA foreign_key_check({quoted(target.table)})").fetchall()
        note: tuple[str, ...] = ()
    except sqlite3.OperationalError as error:
        connection.execute("ROLLBACK TO kdb_fast_table")
        connection.execute(_creation(target))
        note = (f"{target.shown} has no foreign key: {error}.",)
    connection.execute("RELEASE kdb_fast_table")
    return note


def _creation(target: TableTarget, *, refers: bool = False) -> str:
    """The statement that makes the table."""
    definitions = [
        f"{quoted(key.name)} {key.type}" + (f" COLLATE {quoted(key.collation)}" if key.collation else "") + " NOT NULL"
        for key in target.key
    ]
    types = {**OTHERS, target.vector.name: "BLOB"}
    definitions += [f"{quoted(name)} {types[name]} NOT NULL" for name in target.written if name in types]
    # An INTEGER PRIMARY KEY takes whole numbers only: where that of the table that is read takes any, so does this.
    loose = len(target.unique) == 1 and target.key[0].type.upper() == "INTEGER" and not has_rowid_key(target)
    return target.statement(
        CREATE,
        definitions=", ".join(definitions),
        unique="UNIQUE" if loose else "PRIMARY KEY",
        unique_columns=", ".join(map(quoted, target.unique)),
        refers=target.statement(REFERS).decode() if refers else "",
    ).decode()


def _prepare_vec0(connection: sqlite3.Connection, target: TableTarget, dimensions: int) -> None:
    """Make the table of sqlite-vec and that of what is known of its rows, or check them."""
    row = connection.execute("SELECT sql FROM sqlite_master WHERE name = ? COLLATE NOCASE", (target.table,)).fetchone()
    if row is None:
        connection.execute(
            target.statement(CREATE_VEC0, vector=target.vector.name, dimensions=str(int(dimensions))).decode()
        )
    else:
        declared = re.search(r"using\s+vec0\b.*\[(\d+)\]", str(row[0]), re.IGNORECASE | re.DOTALL)
        if declared is None or int(declared[1]) != dimensions:
            raise SchemaError(
                f"{target.shown} is no table of sqlite-vec with vectors of {dimensions} dimensions.",
                remedy="Choose another --model, or write into another table: --into NAME.",
            )
    others = ", ".join(f"{name} {OTHERS[name]} NOT NULL" for name in target.written if name != target.vector.name)
    key = quoted(target.key[0].name)
    connection.execute(target.statement(CREATE_KNOWN, key=key, others=others).decode())


def _check(connection: sqlite3.Connection, target: TableTarget, dimensions: int) -> None:
    shown, table = target.shown, quoted(target.table)
    rows = connection.execute(f"PRAGMA table_xinfo({table})").fetchall()
    found = {name: declared or "" for _, name, declared, *_ in rows}
    wanted = {key.name: key.type for key in target.key} | {name: OTHERS.get(name, "") for name in target.written}
    wanted[target.vector.name] = "BLOB"
    if target.keyword and CONTENT not in found:
        del wanted[CONTENT]  # it is added
    check_columns(target, found, wanted)
    row = connection.execute(target.statement("SELECT length({embedding}) FROM {table} LIMIT 1").decode()).fetchone()
    if row is not None and row[0] != 4 * dimensions:
        raise SchemaError(
            f"{shown} holds vectors of {row[0] / 4:g} dimensions; the model gives {dimensions}.",
            remedy=f"Choose another --model, write into another table (--into NAME), or run: DROP TABLE {table}; then "
            "all is embedded again.",
        )
    generated = [name for _, name, _, _, _, _, hidden in rows if hidden in GENERATED and name in wanted]
    unfilled = [
        name
        for _, name, _, not_null, default, _, hidden in rows
        if not_null and default is None and hidden not in GENERATED and name not in wanted
    ]
    if generated or unfilled:
        names = storable_key(", ".join(generated or unfilled), 300)
        raise SchemaError(
            f"Columns of {shown} are generated, and kdb-fast writes them: {names}."
            if generated
            else f"The table {shown} needs a value in {names}, which kdb-fast does not write: no row could be stored.",
            remedy="Write into another table: --into NAME.",
        )
    unique = ", ".join(map(quoted, target.unique))
    values = ", ".join(["NULL"] * len(target.unique))
    try:
        connection.execute(PROBE.format(table=table, unique=unique, values=values))
    except sqlite3.OperationalError as error:
        raise SchemaError(
            f"{shown} has no unique constraint on ({unique}): {error}.",
            remedy=f"Run: CREATE UNIQUE INDEX … ON {table} ({unique});",
        ) from None
