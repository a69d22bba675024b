"""PostgreSQL: a vector column of the user's own table, as the server's catalogue has it, and the table of its state.

What a run could not write is told before anything is embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...db.pg_errors import kind_of
from ...db.retrying import ErrorKind
from ...errors import SchemaError
from ...records import storable_key
from ...tables.column_target import ColumnTarget, VectorColumn, check_state, unreadable_text
from ...tables.hidden_rows import check_unfiltered
from ...tables.key import KeyColumn
from ...tables.target import Target, identifier, rows_on
from .check import RELATIONS
from .column_effects import check_updates
from .keyword import prepare_keyword

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

VECTOR_TYPES = ("vector", "halfvec")

TABLE = """
SELECT n.nspname::text, c.relname::text, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = to_regclass(%s)
"""

COLUMN = """
SELECT b.typname::text, format_type(a.atttypid, a.atttypmod),
  CASE WHEN t.typtype = 'd' THEN t.typtypmod ELSE a.atttypmod END,
  a.attgenerated <> '', a.attnotnull OR t.typnotnull, format('%%I.%%I', p.nspname, b.typname || '_send'),
  has_column_privilege(a.attrelid, a.attnum, 'UPDATE'), current_user::text
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_type b ON b.oid = coalesce(nullif(t.typbasetype, 0), t.oid) JOIN pg_namespace p ON p.oid = b.typnamespace
WHERE a.attrelid = to_regclass(%s) AND a.attname = %s AND a.attnum > 0 AND NOT a.attisdropped
"""

KEYS = """
SELECT array_agg(a.attname::text ORDER BY u.place), array_agg(format_type(a.atttypid, -1) ORDER BY u.place),
  array_agg(format('OPERATOR(%%I.%%s)', n.nspname, o.oprname) ORDER BY u.place)
FROM pg_index i CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[]) WITH ORDINALITY u(attnum, opclass, place)
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.attnum
JOIN pg_opclass c ON c.oid = u.opclass
JOIN pg_amop p ON p.amopfamily = c.opcfamily AND p.amopstrategy = 3 AND p.amoplefttype = c.opcintype
  AND p.amoprighttype = c.opcintype
JOIN pg_operator o ON o.oid = p.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace
WHERE i.indrelid = to_regclass(%s) AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
GROUP BY i.indexrelid, i.indisprimary, i.indnkeyatts HAVING count(*) = i.indnkeyatts
ORDER BY i.indisprimary DESC, i.indexrelid
"""
"""The columns of each unique index, how a value of them is written, and the operator that the index compares with."""

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
        key: Names of the columns by which a row is found; () for the primary key.
        replace: Vectors of other programs are overwritten.
        vacuum: Free the versions of rows that are left behind, during a run.

    Raises:
        SchemaError: There is no such table or column, or a run could not write it.
    """
    schema, relation, kind = _find(cursor, table)
    shown = Target(schema).shown(relation)
    if kind not in ("r", "p"):
        raise SchemaError(
            f"{shown} is {RELATIONS.get(kind, 'no table')}; expected a table, whose rows can be updated.",
            remedy="Name the table that has the column.",
        )
    # Names of types and operators come with their schema: another session's search path may not find them.
    (path,) = cursor.execute("SELECT current_setting('search_path')").fetchone() or ("",)
    cursor.execute("SET LOCAL search_path = pg_catalog, pg_temp")
    regclass = Target(schema).regclass(relation)
    keys = _keys(cursor, regclass, shown, key)
    column = _vector(cursor, regclass, shown, vector)
    cursor.execute("SELECT set_config('search_path', %s, true)", (path,))
    return ColumnTarget(name, home, schema, relation, keys, text, column, replace, vacuum)


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

    schema, relation, _ = _find(cursor, table)
    target = Target(schema)
    type_name = home.statement("{pgvector}").decode() + f"{kind}({dimensions})"
    statement = f"ALTER TABLE {target.table(relation)} ADD COLUMN {identifier(vector)} {type_name}"
    try:
        cursor.execute(statement.encode(), ())
    except psycopg.Error as error:
        if kind_of(error) is not ErrorKind.REFUSED:
            raise
        raise SchemaError(
            f"The column {storable_key(vector)} cannot be added to {target.shown(relation)}: "
            f"{error.diag.message_primary or error}.",
            remedy=f"Let the table's owner run: {statement.replace('%%', '%')};",
        ) from None


def _find(cursor: Cursor, table: str) -> tuple[str, str, str]:
    """Schema, name and kind of what an identifier belongs to."""
    import psycopg

    try:
        row = cursor.execute(TABLE.encode(), (table,)).fetchone()
    except psycopg.Error:
        raise SchemaError(
            f"{storable_key(table)} is no name of a table.",
            remedy='Write it as SQL does: articles, shop.articles or "My Docs"."Big Table".',
        ) from None
    if row is None:
        raise SchemaError(f"There is no table {storable_key(table)}, or this role may not use its schema.")
    schema, relation, kind = row
    return schema, relation, kind


def _keys(cursor: Cursor, regclass: str, shown: str, wanted: Sequence[str]) -> tuple[KeyColumn, ...]:
    for names, types, operators in cursor.execute(KEYS.encode(), (regclass,)).fetchall():
        columns = {n: KeyColumn(n, t, noun=n, equals=o) for n, t, o in zip(names, types, operators, strict=True)}
        if not wanted or set(wanted) == set(names):
            return tuple(columns[name] for name in wanted or names)
    what = ", ".join(map(storable_key, wanted))
    add = ", ".join(identifier(name) for name in wanted) or "…"
    raise SchemaError(
        f"{shown} has no unique index on ({what}); a row could not be found again."
        if wanted
        else f"{shown} has no primary key and no unique index; a row could not be found again.",
        remedy=f"Run: ALTER TABLE {shown} ADD UNIQUE ({add});",
    )


def _vector(cursor: Cursor, regclass: str, shown: str, name: str) -> VectorColumn:
    row = cursor.execute(COLUMN.encode(), (regclass, name)).fetchone()
    column = storable_key(name)
    if row is None:
        raise SchemaError(f"The table {shown} has no column {column}.")
    kind, declared, modifier, generated, not_null, sender, may_update, user = row
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
    return VectorColumn(name, declared, modifier if modifier > 0 else None, sender)


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
    prepare_keyword(cursor, target.parts["state"], target.keyword)
