"""From the definition of a target to what a search reads, as the database has it now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...db.address import DatabaseAddress
from ...db.sqlite_vec import TO_HAVE_IT, why_no_sqlite_vec
from ...errors import SchemaError
from ...records import shell_word, storable_key
from ...tables.column_target import ColumnTarget, VectorColumn, state_table
from ...tables.definition import Definition
from ...tables.find_relation import find_relation
from ...tables.key import KeyColumn
from ...tables.keyword import full_text_of
from ...tables.names import as_typed, qualified
from ...tables.reading import rows_of
from ...tables.relation import Relation
from ...tables.table_target import CHUNK_COLUMNS, SEAL, TableTarget
from ...tables.target import Target, find_target
from ...tables.text import text_expression
from .searched import SearchedTable

VECTOR = """
SELECT b.typname::text, CASE WHEN t.typtype = 'd' THEN t.typtypmod ELSE a.atttypmod END,
  format('%%I.%%I', n.nspname, b.typname || '_send')
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_type b ON b.oid = coalesce(nullif(t.typbasetype, 0), t.oid) JOIN pg_namespace n ON n.oid = b.typnamespace
WHERE a.attrelid = to_regclass(%s) AND a.attname = %s
"""


def find_searched(connection: Any, address: DatabaseAddress, definition: Definition) -> SearchedTable:
    """What a search of this target reads, within a transaction.

    Args:
        address: With the schema of our own tables, where that is known.

    Raises:
        SchemaError: Something is not there, or not any more.
    """
    rows = rows_of(connection, address.dialect)
    home = find_target(rows, address.dialect, address.schema, plain=True)
    if definition.form == "vec0" and (why := why_no_sqlite_vec(connection)):
        raise SchemaError(
            f"{storable_key(definition.into)} is a table of sqlite-vec, which cannot be read: {why}.",
            remedy=f"{TO_HAVE_IT}.",
        )
    read = None
    # What is read may be another database's; a column is always a table's of this one.
    if definition.table and not (definition.into and definition.source):
        read = find_relation(rows, home.dialect, as_typed(definition.schema, definition.table))
    if not definition.into:
        assert read is not None
        return _column(connection, home, definition, read)
    into = find_relation(rows, home.dialect, as_typed(definition.into_schema, definition.into))
    return _table(connection, home, definition, read, into)


def _column(connection: Any, home: Target, definition: Definition, read: Relation) -> SearchedTable:
    key = _key(definition.key, read, read)
    vector = _vector(connection, home, definition, read)
    text = text_expression(read, definition.text, definition.template, home.dialect)
    target = ColumnTarget(definition.name, home, read.schema, read.name, key, text, vector)
    table = qualified(read.schema, read.name, home.dialect)
    return SearchedTable(
        definition=definition,
        home=home,
        identity=target.identity,
        shown=read.shown,
        vectors=table,
        vectors_regclass=target.regclass,
        key=key,
        vector=vector,
        state=home.table(target.state),
        state_regclass=home.regclass(target.state),
        state_key="key_{number}",
        fingerprint="fingerprint",
        seal="vector_hash",
        source=table,
        source_regclass=target.regclass,
        text=text,
        full_text=_full_text(home, definition, target.state),
    )


def _table(
    connection: Any, home: Target, definition: Definition, read: Relation | None, into: Relation
) -> SearchedTable:
    vec0 = definition.form == "vec0"
    known = into
    if vec0:
        known = find_relation(
            rows_of(connection, home.dialect), home.dialect, as_typed(home.schema, state_table(definition.name))
        )
    key = _key(definition.key, known, read)
    vector = _vector(connection, home, definition, into)
    target = TableTarget(definition.name, home, into.schema, into.name, key, vector, vec0=vec0)
    source, regclass, text = target.parts["table"], target.regclass, ""
    chunked = bool(definition.chunk)
    if definition.query and not definition.source:
        source, regclass = f"({definition.query}\n)", ""
    elif read is not None:
        source, regclass = qualified(read.schema, read.name, home.dialect), read.regclass
        if not chunked:
            text = text_expression(read, definition.text, definition.template, home.dialect)
    return SearchedTable(
        definition=definition,
        home=home,
        identity=target.identity,
        shown=into.shown,
        vectors=target.parts["table"],
        vectors_regclass=target.regclass,
        key=key,
        vector=vector,
        state=target.parts["known"],
        state_regclass=known.regclass,
        state_key="{column}",
        fingerprint="kdb_fast_fingerprint",
        seal=SEAL,
        source=source,
        source_regclass=regclass,
        text=text,
        chunked=chunked,
        vec0=vec0,
        full_text=_full_text(home, definition, known.name),
    )


def _full_text(home: Target, definition: Definition, known: str) -> str:
    """SQLite: the table for keyword search, as SQL; '' without."""
    return home.table(full_text_of(known)) if definition.keyword and home.dialect == "sqlite" else ""


def _key(names: Sequence[str], table: Relation, read: Relation | None) -> tuple[KeyColumn, ...]:
    """The columns of the key, as the table that holds the vectors has them."""
    names = names or [column.name for column in (read.keys[0] if read and read.keys else ())]
    wanted = {name.lower() for name in names}
    for columns in table.keys:
        found = {column.name.lower(): column for column in columns if column.name.lower() not in CHUNK_COLUMNS[:1]}
        if wanted and found.keys() == wanted:
            return tuple(found[name.lower()] for name in names)
    raise SchemaError(
        f"{table.shown} has no unique index on ({', '.join(map(storable_key, names)) or 'its key'}) any more.",
        remedy="Make it again, or describe the target anew: kdb-fast reindex --table … --key ….",
    )


def _vector(connection: Any, home: Target, definition: Definition, table: Relation) -> VectorColumn:
    """The column of the vectors."""
    name = definition.vector
    column = table.column(name)
    if column is None:
        raise SchemaError(
            f"The table {table.shown} has no column {storable_key(name)} any more, which held the vectors of "
            f"{storable_key(definition.name)}.",
            remedy=f"Name the one that does: kdb-fast reindex {shell_word(definition.name)} --vector ….",
        )
    if home.dialect == "sqlite":
        form = "json" if definition.form == "json" else "blob"
        return VectorColumn(column.name, form, definition.dimensions or None)
    kind, modifier, sender = connection.execute(VECTOR.encode(), (table.regclass, column.name)).fetchone()
    if kind not in ("vector", "halfvec"):
        raise SchemaError(
            f"{table.shown}.{storable_key(name)} is of type {column.type}; expected vector or halfvec.",
            remedy="Was the column made anew? Describe the target again: kdb-fast reindex --table … --vector ….",
        )
    return VectorColumn(column.name, column.type, modifier if modifier > 0 else None, sender)
