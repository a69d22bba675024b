"""PostgreSQL: a vector column of the user's own table, as the server's catalogue has it, and the table of its state.

What a run could not write is told before anything is embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...db.pg_errors import kind_of
from ...db.retrying import ErrorKind
from ...errors import SchemaError
from ...records import shell_word, storable_key
from ...tables.column_target import ColumnTarget, VectorColumn, check_state, unreadable_text
from ...tables.find_relation import find_relation, key_of, no_column, no_key, no_place
from ...tables.hidden_rows import check_unfiltered
from ...tables.names import qualified
from ...tables.relation import Relation
from ...tables.target import Target, identifier, rows_on
from .column_effects import check_updates
from .keyword import prepare_keyword

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

VECTOR_TYPES = ("vector", "halfvec")

COLUMN = """
SELECT b.typname::text, CASE WHEN t.typtype = 'd' THEN t.typtypmod ELSE a.atttypmod END,
  a.attgenerated <> '', a.attnotnull OR t.typnotnull, format('%%I.%%I', p.nspname, b.typname || '_send'),
  has_column_privilege(a.attrelid, a.attnum, 'UPDATE'), current_user::text
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_type b ON b.oid = coalesce(nullif(t.typbasetype, 0), t.oid) JOIN pg_namespace p ON p.oid = b.typnamespace
WHERE a.attrelid = to_regclass(%s) AND a.attname = %s AND a.attnum > 0 AND NOT a.attisdropped
"""

CREATE_STATE = """
CREATE TABLE {state} AS SELECT {keys}, ''::varchar(64) AS fingerprint, ''::bytea AS text_hash, ''::bytea AS vector_hash,
  NULL::xid AS version, 0::bigint AS run, now() AS at, NULL::timestamptz AS source_at FROM {table} t WITH NO DATA
"""
"""Made from the table, so that the keys have its types and collations."""

CONSTRAIN_STATE = """
ALTER TABLE {state} ADD PRIMARY KEY ({state_keys}), ALTER fingerprint SET NOT NULL, ALTER text_hash SET NOT NULL,
  ALTER vector_hash SET NOT NULL, ALTER run SET NOT NULL, ALTER at SET NOT NULL
"""

READ_TEXT = "SELECT {text} FROM {table} t LIMIT 0"


STATE_TYPES = """
SELECT a.attname::text, format_type(a.atttypid, -1) FROM pg_attribute a
WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
"""


def find_column(
    cursor: Cursor,
    home: Target,
    name: str,
    table: str,
    *,
    text: str,
    vector: str,
    form: str = "",
    key: Sequence[str] = (),
    replace: bool = False,
    vacuum: bool = False,
) -> ColumnTarget:
    """The vector column of a table, within a transaction.

    Args:
        home: Where our own tables are.
        name: Under which its state is kept.
        table: An SQL identifier, such as ``shop.articles``; without a schema, what the session's search path finds.
        text: SQL expression of the text, see :func:`~kdb_fast.tables.column_target.column_text`.
        vector: Name of the column.
        form: Of what type it was at the last run, ``vector`` or ``halfvec``; '' before the first.
        key: Names of the columns by which a row is found; () for the primary key.
        replace: Vectors of other programs are overwritten.
        vacuum: Free the versions of rows that are left behind, during a run.

    Raises:
        SchemaError: There is no such table or column, or a run could not write it.
    """
    relation = find_relation(rows_on(cursor, "postgresql"), "postgresql", table)
    if not relation.is_table:
        raise no_place(relation)
    keys = key_of(relation, key)
    if keys is None:
        raise no_key(relation, "postgresql", key)
    column = _vector(cursor, relation, vector)
    if form not in ("", column.form) and not replace and _has_values(cursor, relation, vector):
        # They were rounded: no hash tells them as ours any more.
        raise SchemaError(
            f"{relation.shown}.{storable_key(vector)} was of type {form} and is of type {column.form}, so its vectors "
            "are not those that were written.",
            remedy="To write all of them again, also those of other programs: kdb-fast reindex "
            f"{shell_word(name)} --replace.",
        )
    return ColumnTarget(name, home, relation.schema, relation.name, keys, text, column, replace, vacuum)


def create_column(cursor: Cursor, home: Target, table: str, vector: str, dimensions: int, kind: str = "vector") -> None:
    """Add a column for vectors to a table that has none of this name, within a transaction.

    Args:
        home: Where our own tables are.
        table: An SQL identifier, as for :func:`find_column`.
        vector: Name of the column.
        dimensions: Of the model.
        kind: ``vector`` or ``halfvec``.

    Raises:
        SchemaError: There is no such table, or the database refuses it.
    """
    import psycopg

    relation = find_relation(rows_on(cursor, "postgresql"), "postgresql", table)
    type_name = home.statement("{pgvector}").decode() + f"{kind}({dimensions})"
    place = qualified(relation.schema, relation.name, "postgresql")
    statement = f"ALTER TABLE {place} ADD COLUMN {identifier(vector)} {type_name}"
    try:
        cursor.execute(statement.encode(), ())
    except psycopg.Error as error:
        if kind_of(error) is not ErrorKind.REFUSED:
            raise
        raise SchemaError(
            f"The column {storable_key(vector)} cannot be added to {relation.shown}: "
            f"{error.diag.message_primary or error}.",
            remedy=f"Let the table's owner run: {statement.replace('%%', '%')};",
        ) from None


def _has_values(cursor: Cursor, relation: Relation, column: str) -> bool:
    place = qualified(relation.schema, relation.name, "postgresql")
    statement = f"SELECT FROM {place} WHERE {identifier(column)} IS NOT NULL LIMIT 1"
    return cursor.execute(statement.encode(), ()).fetchone() is not None


def _vector(cursor: Cursor, relation: Relation, name: str) -> VectorColumn:
    found = relation.column(name)
    if found is None:
        raise no_column(relation, name)
    row = cursor.execute(COLUMN.encode(), (relation.regclass, name)).fetchone()
    assert row is not None
    shown, column, declared = relation.shown, storable_key(name), found.type
    kind, modifier, generated, not_null, sender, may_update, user = row
    if kind not in VECTOR_TYPES:
        raise SchemaError(f"{shown}.{column} is of type {declared}; expected vector or halfvec.")
    if generated:
        raise SchemaError(f"{shown}.{column} is a generated column; it cannot be written.")
    if not_null:
        raise SchemaError(
            f"{shown}.{column} must not be NULL; a row that has no text any more would keep the vector of an earlier "
            "one.",
            remedy=f"Run: ALTER TABLE {shown} ALTER COLUMN {column} DROP NOT NULL;",
        )
    if not may_update:
        raise SchemaError(
            f"The role {user!r} may not write {shown}.{column}.",
            remedy=f"Let the owner run: GRANT SELECT, UPDATE ({column}) ON {shown} TO {user};",
        )
    return VectorColumn(name, declared, modifier if modifier > 0 else None, sender, kind)


def prepare_column(cursor: Cursor, target: ColumnTarget, dimensions: int) -> None:
    """Make the table of its state where that is missing, within a transaction.

    Raises:
        SchemaError: The column holds vectors of another length, the table of the state was made for another key, or
            rows are hidden from this role.
    """
    import psycopg

    shown, column = target.shown, storable_key(target.vector.name)
    if target.vector.dimensions not in (None, dimensions):
        raise SchemaError(
            f"{shown}.{column} holds vectors of {target.vector.dimensions} dimensions; the model gives {dimensions}.",
            remedy=f"Choose a --model with {target.vector.dimensions} dimensions, or add another column.",
        )
    check_unfiltered(rows_on(cursor, "postgresql"), Target(target.schema), (target.table,), "a run must see every row")
    try:
        cursor.execute(target.statement(READ_TEXT), ())
    except psycopg.Error as error:
        if kind_of(error) is not ErrorKind.REFUSED:
            raise
        raise unreadable_text(target, error.diag.message_primary or str(error)) from None
    check_updates(cursor, target)
    state = target.home.regclass(target.state)
    cursor.execute("SELECT set_config('search_path', 'pg_catalog, pg_temp', true)")
    found: dict[str, str] = dict(cursor.execute(STATE_TYPES.encode(), (state,)).fetchall())
    if not found:
        keys = target.each_key("t.{column} AS key_{number}")
        state_keys = target.each_key("key_{number}")
        cursor.execute(target.statement(CREATE_STATE, keys=keys))
        cursor.execute(target.statement(CONSTRAIN_STATE, state_keys=state_keys))
    else:
        check_state(target, found, target.home.shown(target.state))
    prepare_keyword(cursor, target.parts["state"], target.home.regclass(target.state), target.keyword)
