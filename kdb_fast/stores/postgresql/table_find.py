"""PostgreSQL: a table of vectors beside what is read: where it is, what it is made as, and whether one that is there
will do.

What a run could not write is told before anything is embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import SchemaError
from ...records import storable_key
from ...tables.column_target import VectorColumn
from ...tables.hidden_rows import check_unfiltered
from ...tables.key import KeyColumn
from ...tables.relation import Relation
from ...tables.table_target import (
    CHUNK_COLUMNS,
    CONTENT,
    STATE_COLUMNS,
    TSVECTOR,
    VERSION,
    TableTarget,
    check_columns,
    check_names,
)
from ...tables.target import Target, columns_of, identifier, rows_on
from .check import RELATIONS
from .foreign_key import why_no_foreign_key
from .keyword import prepare_keyword

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

PLACE = """
SELECT i.parts, coalesce(n.nspname, i.parts[1], current_schema())::text FROM (
  SELECT CASE WHEN cardinality(p) = 1 THEN ARRAY[NULL, p[1]] ELSE p END AS parts
  FROM (SELECT parse_ident(%(name)s)::name[] AS p) x
) i LEFT JOIN pg_class c ON cardinality(i.parts) = 2 AND c.oid = to_regclass(%(name)s)
LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
"""
"""The parts of a name, and the schema in which the table is or would be made."""

KIND = "SELECT relkind::text FROM pg_class WHERE oid = to_regclass(%s)"

COLUMNS = """
SELECT a.attname::text, format_type(a.atttypid, -1), format_type(a.atttypid, a.atttypmod), a.attgenerated <> '',
  a.attnotnull AND NOT a.atthasdef AND a.attidentity = ''
FROM pg_attribute a WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
"""

IS_UNIQUE = """
SELECT EXISTS (
  SELECT FROM pg_index i WHERE i.indrelid = to_regclass(%s) AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
  AND i.indexprs IS NULL AND ARRAY(SELECT a.attname::text FROM pg_attribute a
    WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) ORDER BY 1) = %s)
"""

REFERS = """
SELECT c.conname::text, n.nspname::text, s.relname::text
FROM pg_constraint c JOIN pg_class s ON s.oid = c.confrelid JOIN pg_namespace n ON n.oid = s.relnamespace
WHERE c.conrelid = to_regclass(%(table)s) AND c.contype = 'f' AND c.confdeltype = 'c' AND c.conparentid = 0
AND c.confrelid IS DISTINCT FROM to_regclass(%(source)s)
AND ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)
  ORDER BY 1) = %(key)s
"""
"""A foreign key of ours to a table that is not the one that is read."""

RIGHTS = """
SELECT r, current_user::text FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) r
WHERE NOT has_table_privilege(to_regclass(%s), r)
"""

MAY_CREATE = "SELECT has_schema_privilege(oid, 'CREATE'), current_user::text FROM pg_namespace WHERE nspname = %s"

CREATE = "CREATE TABLE {table} AS SELECT {keys}, {others}{from_source} WITH NO DATA"
"""Made from the table that is read, so that the keys have its types and collations."""

CONSTRAIN = (
    "ALTER TABLE {table} ADD PRIMARY KEY ({unique}), {not_null}, "
    f"ALTER {VERSION} SET DEFAULT pg_current_xact_id()::xid"
)

OTHERS = {
    **dict.fromkeys(CHUNK_COLUMNS, "integer"),
    CONTENT: "text",
    "kdb_fast_hash": "bytea",
    "kdb_fast_seal": "bytea",
    "kdb_fast_fingerprint": "character varying",
    "kdb_fast_run": "bigint",
    "kdb_fast_at": "timestamp with time zone",
    TSVECTOR: "tsvector",
    VERSION: "xid",
}
"""Columns that a run writes, with their types, beside key and vectors."""


def find_table(
    cursor: Cursor,
    home: Target,
    name: str,
    into: str,
    *,
    key: Sequence[KeyColumn],
    source: Relation | None = None,
    vector: str = "embedding",
    content: bool = False,
    chunked: bool = False,
    keyword: str = "",
    text: str = "",
) -> TableTarget:
    """The table of vectors, whether it is there yet or not, within a transaction.

    Args:
        home: Where our own tables are.
        name: Under which it is kept.
        into: An SQL identifier, such as ``shop.article_vectors``; without a schema, what the session's search path
            finds, else in the first schema of it.
        key: Of what is read.
        source: What is read, where its key can be referred to.

    Others: see :class:`~kdb_fast.tables.table_target.TableTarget`.

    Raises:
        SchemaError: It is no name, or no name that the table can have beside its columns.
    """
    import psycopg

    try:
        row = cursor.execute(PLACE.encode(), {"name": into}).fetchone()
    except psycopg.Error:
        row = None
    if row is None or len(row[0]) != 2:
        raise SchemaError(
            f"{storable_key(into)} is no name of a table.",
            remedy='Write it as SQL does: article_vectors, shop.article_vectors or "My Docs"."Big Table".',
        )
    (_, table), schema = row
    if schema is None:
        raise SchemaError(
            "No schema of the session's search_path exists and may be used by this role.",
            remedy=f"Name the schema of the table: --into SCHEMA.{storable_key(into)}",
        )
    # What was made with a column for the text keeps it.
    there = columns_of(rows_on(cursor, "postgresql"), Target(schema), [table]).get(table, frozenset())
    refers = source if source is not None and source.kind in ("table", "partitioned table") else None
    target = TableTarget(
        name,
        home,
        schema,
        table,
        tuple(key),
        VectorColumn(vector, "vector", form="vector"),
        refers,
        content=content or chunked or {CONTENT, *STATE_COLUMNS} <= there,
        chunked=chunked,
        keyword=keyword,
        text=text if refers else "",
    )
    check_names(target)
    return target


def prepare_table(cursor: Cursor, target: TableTarget, dimensions: int) -> tuple[str, ...]:
    """Make the table where it is missing, and check it where it is there, within a transaction.

    Returns:
        What the user should know.

    Raises:
        SchemaError: It holds vectors of another length, was made for another key or is another program's, rows are
            hidden from this role, or it may not write.
    """
    kind = cursor.execute(KIND, (target.regclass,)).fetchone()
    if kind is None:
        _create(cursor, target, dimensions)
    elif kind[0] in RELATIONS:
        raise SchemaError(
            f"{target.shown} is {RELATIONS[kind[0]]}; expected a table, or a name that is free.",
            remedy="Write into another: --into NAME.",
        )
    else:
        _check(cursor, target, dimensions)
    prepare_keyword(cursor, target.quoted, target.regclass, target.keyword)
    why = why_no_foreign_key(cursor, target) if target.source is not None else None
    return () if why is None else (f"{target.shown} has no foreign key: {why}.",)


def _create(cursor: Cursor, target: TableTarget, dimensions: int) -> None:
    row = cursor.execute(MAY_CREATE, (target.schema,)).fetchone()
    schema = Target(target.schema).shown()
    if row is None:
        raise SchemaError(f"There is no schema {schema}.", remedy=f"Run: CREATE SCHEMA {schema};")
    may_create, user = row
    if not may_create:
        raise SchemaError(
            f"The role {user!r} may not make the table {target.shown}.",
            remedy=f"Let the owner run: GRANT CREATE ON SCHEMA {schema} TO {user}; or write into another schema.",
        )
    vector = target.home.statement("{vector}").decode()
    types = {**OTHERS, "kdb_fast_fingerprint": "varchar(64)", target.vector.name: f"{vector}({int(dimensions)})"}
    if dimensions > MAX_DIMENSIONS:
        raise SchemaError(
            f"The model gives {dimensions} dimensions; pgvector's vector holds at most {MAX_DIMENSIONS}.",
            remedy="Choose another --model, or ask an API for fewer: --dimensions N.",
        )
    made = [*(name for name in target.written if name != TSVECTOR), VERSION]
    others = ", ".join(f"NULL::{types[name]} AS {target.column(name)}" for name in made)
    read = target.source is not None
    keys = target.each_key("t.{column}" if read else "NULL::{type} AS {column}")
    from_source = f" FROM {target.parts['source']} t" if read else ""
    cursor.execute(target.statement(CREATE, keys=keys, others=others, from_source=from_source))
    not_null = ", ".join(f"ALTER {target.column(name)} SET NOT NULL" for name in made)
    unique = ", ".join(map(target.column, target.unique))
    cursor.execute(target.statement(CONSTRAIN, unique=unique, not_null=not_null))


MAX_DIMENSIONS = 16_000
"""Of pgvector's type ``vector``."""


def _check(cursor: Cursor, target: TableTarget, dimensions: int) -> None:
    shown = target.shown
    lacking = cursor.execute(RIGHTS, (target.regclass,)).fetchall()
    if lacking:
        rights, user = ", ".join(right for right, _ in lacking), lacking[0][1]
        raise SchemaError(
            f"The role {user!r} lacks rights on {shown}: {rights}.",
            remedy=f"Let the owner run: GRANT {rights} ON {shown} TO {user};",
        )
    check_unfiltered(rows_on(cursor, "postgresql"), Target(target.schema), (target.table,), "a run must see every row")
    # Types of other schemas are then written with them, as those of the key are.
    (path,) = cursor.execute("SELECT current_setting('search_path')").fetchone() or ("",)
    cursor.execute("SET LOCAL search_path = pg_catalog, pg_temp")
    columns = {row[0]: row[1:] for row in cursor.execute(COLUMNS.encode(), (target.regclass,))}
    vector = cursor.execute(target.home.statement("SELECT format_type('{vector}'::regtype, -1)")).fetchone()
    cursor.execute("SELECT set_config('search_path', %s, true)", (path,))
    wanted = {key.name: key.type for key in target.key}
    wanted |= {name: OTHERS.get(name, "") for name in (*target.written, VERSION)}
    wanted[target.vector.name] = vector[0] if vector else ""
    if TSVECTOR not in columns:
        wanted.pop(TSVECTOR, None)  # it is added
    check_columns(target, {name: column[0] for name, column in columns.items()}, wanted)
    declared = columns[target.vector.name][1]
    if declared != f"{wanted[target.vector.name]}({dimensions})":
        raise SchemaError(
            f"{shown}.{storable_key(target.vector.name)} is of type {declared}; the model gives {dimensions} "
            "dimensions.",
            remedy=f"Choose another --model, write into another table (--into NAME), or run: DROP TABLE {shown}; then "
            "all is embedded again.",
        )
    generated = [name for name in wanted if columns[name][2]]
    unfilled = [name for name, (*_, needs_value) in columns.items() if needs_value and name not in wanted]
    if generated or unfilled:
        names = storable_key(", ".join(generated or unfilled), 300)
        raise SchemaError(
            f"Columns of {shown} are generated, and kdb-fast writes them: {names}."
            if generated
            else f"The table {shown} needs a value in {names}, which kdb-fast does not write: no row could be stored.",
            remedy=f"Run: ALTER TABLE {shown} "
            + ", ".join(
                f"ALTER COLUMN {identifier(name)} {'DROP EXPRESSION' if generated else 'DROP NOT NULL'}"
                for name in generated or unfilled
            )
            + ";",
        )
    source = target.source.regclass if target.source else None
    refers = {"table": target.regclass, "source": source, "key": sorted(key.name for key in target.key)}
    for constraint, schema, other in cursor.execute(REFERS.encode(), refers):
        raise SchemaError(
            f"{shown} refers to {Target(schema).shown(other)}, which is not what is read: rows would be refused.",
            remedy=f"Run: ALTER TABLE {shown} DROP CONSTRAINT {identifier(constraint)}; or write into another table: "
            "--into NAME.",
        )
    unique = cursor.execute(IS_UNIQUE.encode(), (target.regclass, sorted(target.unique))).fetchone()
    if not (unique and unique[0]):
        names = ", ".join(map(identifier, target.unique))
        raise SchemaError(
            f"{shown} has no unique constraint on ({names}); without it records could be doubled.",
            remedy=f"Run: ALTER TABLE {shown} ADD UNIQUE ({names});",
        )
