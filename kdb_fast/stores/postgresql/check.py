"""PostgreSQL: whether the tables are what a run can write. That is known before anything is embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import SchemaError
from ...records import storable_key
from ...tables import migrations, seal
from ...tables.hidden_rows import check_unfiltered
from ...tables.index_table import IndexTable
from ...tables.target import MIGRATIONS, OWN, REJECTS, RUNS, STATE, Target, identifier, rows_on
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

TEXT = ("S", "text")
"""Any type of strings (``pg_type.typcategory``), and what KameleonDB has, for messages."""

TIME = ("timestamp", "timestamptz")


def written_columns(index: IndexTable) -> dict[str, tuple[str, ...]]:
    """Columns that a run writes, with the types (or their category) that its binary COPY fits; the last one is
    KameleonDB's or our own."""
    key = {column.name: TEXT for column in index.key}
    return {
        index.id: TEXT, **key, index.text: TEXT, index.vector: (), index.model: TEXT, index.dimensions: ("int4",),
        index.updated_at: TIME, "kdb_fast_fingerprint": TEXT, "kdb_fast_run": ("int8",), "kdb_fast_at": TIME[1:],
        "kdb_fast_source_at": TIME[1:], seal.COLUMN: ("bytea",),
    }  # fmt: skip


RELATIONS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence",
             "c": "a composite type", "i": "an index", "I": "a partitioned index"}  # fmt: skip
"""What a name may belong to instead of a table, by ``pg_class.relkind``."""


class Column(NamedTuple):
    """A column of the search table: its type as declared; the same or, of a domain, the one below it; its category; its
    modifier; whether the column is generated, and whether a row must give it a value."""

    declared: str
    type: str
    category: str
    modifier: int
    generated: bool
    needs_value: bool


def check(session: PgSession, dimensions: int) -> None:
    """Raise SchemaError if the search table is not, or no longer, what rows of this length can be written to."""
    with session.transaction() as cursor:
        check_table(cursor, session.target, dimensions)


def exists(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, table: str) -> bool:
    """Whether something of this name is in the target's schema."""
    row = cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (target.regclass(table),)).fetchone()
    return bool(row and row[0])


def check_kind(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, table: str) -> None:
    """Raise SchemaError if the name belongs to something else than a table."""
    statement = "SELECT relkind::text FROM pg_class WHERE oid = to_regclass(%s)"
    row = cursor.execute(statement, (target.regclass(table),)).fetchone()
    if row and row[0] in RELATIONS:
        raise SchemaError(
            f"{target.shown(table)} is {RELATIONS[row[0]]}; expected a table.",
            remedy="Rename it, or use another schema or database for this index.",
        )


def column_names(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, table: str) -> set[str]:
    """The columns that a table has; none where it does not exist."""
    rows = cursor.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
        (target.regclass(table),),
    )
    return {row[0] for row in rows}


def check_table(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, dimensions: int) -> None:
    """As :func:`check`, within a transaction."""
    index = target.index
    shown, oid, key = target.shown(index.name), target.regclass(index.name), [column.name for column in index.key]
    columns = {
        row[0]: Column(*row[1:])
        for row in cursor.execute(
            # Of a domain, what it is a domain of: a domain of domains is another program's business.
            "SELECT a.attname, t.typname, coalesce(b.typname, t.typname), t.typcategory::text, a.atttypmod, "
            "a.attgenerated <> '', (a.attnotnull OR t.typnotnull) AND NOT a.atthasdef "
            "AND t.typdefault IS NULL AND a.attidentity = '' FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "LEFT JOIN pg_type b ON b.oid = t.typbasetype "
            "WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped",
            (oid,),
        )
    }
    missing = [name for name in index.columns if name not in columns]
    if missing:
        raise SchemaError(
            f"The table {shown} has no column {', '.join(missing)}; expected KameleonDB's search table.",
            remedy="Is it another program's table? Use another schema or database for this index.",
        )
    kind, found = columns[index.vector].declared, columns[index.vector].modifier
    if kind != "vector":
        raise SchemaError(
            f"{shown}.{index.vector} is of type {kind}; expected vector({dimensions}).",
            remedy=f"Move the table away (ALTER TABLE {shown} RENAME TO {index.name}_old;); it is created anew.",
        )
    _check_columns(cursor, target, columns)
    if found == -1:
        row = cursor.execute(
            target.statement(
                "SELECT {pgvector}vector_dims({embedding}) FROM (SELECT {embedding} FROM {index} "
                "WHERE {embedding} IS NOT NULL LIMIT 1000) s WHERE {pgvector}vector_dims({embedding}) <> %s LIMIT 1"
            ),
            (dimensions,),
        ).fetchone()
        found = int(row[0]) if row else dimensions
    if found != dimensions:
        raise SchemaError(
            f"{shown}.{index.vector} holds vectors of {found} dimensions; the model gives {dimensions}.",
            remedy=f"Choose a --model with {found} dimensions, or change the column and lose the old vectors: "
            f"DROP INDEX IF EXISTS {target.shown(index.vector_index)}; ALTER TABLE {shown} ALTER COLUMN {index.vector} "
            f"TYPE vector({dimensions}) USING NULL;",
        )
    row = cursor.execute(
        "SELECT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = to_regclass(%s) AND i.indisunique "
        "AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = %s AND ARRAY(SELECT a.attname::text "
        "FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::int2[]) ORDER BY 1) = %s)",
        (oid, len(key), sorted(key)),
    ).fetchone()
    if not (row and row[0]):
        names = ", ".join(key)
        foreign = cursor.execute(
            "SELECT string_agg(relid::text, ', ') FROM pg_partition_tree(%s) t JOIN pg_class c ON c.oid = t.relid "
            "WHERE c.relkind = 'f'",
            (oid,),
        ).fetchone()
        raise SchemaError(
            f"{shown} has no unique constraint on ({names}); without it records could be doubled.",
            remedy=f"Run: ALTER TABLE {shown} ADD UNIQUE ({names});"
            if not (foreign and foreign[0])
            else f"A partition that is a foreign table ({foreign[0]}) can have none: detach it, then run: "
            f"ALTER TABLE {shown} ADD UNIQUE ({names});",
        )


def _check_columns(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, columns: dict[str, Column]) -> None:
    """Raise SchemaError where no row could be written: that is known before anything is embedded."""
    shown, written = target.index_shown, written_columns(target.index)
    for name, column in columns.items():
        if name in written and column.generated:
            raise SchemaError(
                f"{shown}.{name} is a generated column, and kdb-fast writes it.",
                remedy=f"Run: ALTER TABLE {shown} ALTER COLUMN {name} DROP EXPRESSION;",
            )
        wanted = written.get(name, ())
        if wanted and column.type not in wanted and column.category not in wanted:
            raise SchemaError(
                f"{shown}.{name} is of type {column.type}; expected {wanted[-1]}.",
                remedy=f"Run: ALTER TABLE {shown} ALTER COLUMN {name} TYPE …; or use another schema for this index.",
            )
    unfilled = [name for name, column in columns.items() if name not in written and column.needs_value]
    if unfilled:
        names = storable_key(", ".join(unfilled), 300)
        changes = storable_key(", ".join(f"ALTER COLUMN {identifier(name)} SET DEFAULT …" for name in unfilled), 500)
        raise SchemaError(
            f"The table {shown} needs a value in {names}, which kdb-fast does not write: no row could be stored.",
            remedy=f"Give a default (ALTER TABLE {shown} {changes};), or allow NULL (DROP NOT NULL).",
        )
    if constraint := _unmet_check(cursor, target):
        raise SchemaError(
            f"The constraint {storable_key(constraint)} of {shown} refuses every row: it is about columns that are "
            "left to their defaults, since they are not KameleonDB's.",
            remedy=f"Give these columns defaults that it allows, or run: ALTER TABLE {shown} DROP CONSTRAINT "
            f"{storable_key(identifier(constraint))};",
        )


def _unmet_check(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> str | None:
    """Name of a CHECK constraint that only looks at columns which are not written, and refuses their defaults."""
    import psycopg

    constraints = cursor.execute(
        "SELECT c.conname, pg_get_expr(c.conbin, c.conrelid), array_agg(quote_ident(a.attname)), "
        "array_agg(format('CAST(%%s AS %%s)', coalesce(pg_get_expr(d.adbin, d.adrelid), 'NULL'), "
        "format_type(a.atttypid, a.atttypmod))) FROM pg_constraint c "
        "JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey) "
        "LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum "
        "WHERE c.conrelid = to_regclass(%s) AND c.contype = 'c' GROUP BY c.oid, c.conname, c.conbin, c.conrelid "
        "HAVING NOT bool_or(a.attname = ANY (%s) OR a.attgenerated <> '' OR a.attidentity <> '')",
        (target.index_regclass, list(written_columns(target.index))),
    ).fetchall()
    for name, expression, columns, defaults in constraints:
        given = ", ".join(f"{value} AS {column}" for column, value in zip(columns, defaults, strict=True))
        try:
            with cursor.connection.transaction():
                # What the server itself gives as the text of the constraint and of the defaults.
                statement = f"SELECT {expression} FROM (SELECT {given}) {identifier(target.index.name)}"  # noqa: S608
                if cursor.execute(statement.encode()).fetchone() == (False,):
                    return str(name)
        except psycopg.Error:
            continue  # it is not for us to say: each row is asked for itself
    return None


def check_rights(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, tables: Sequence[str]) -> None:
    """Raise SchemaError if a table is missing, or this role lacks a right that a run needs; names it.

    Args:
        tables: Those that a run writes, beside the ones of all targets.
    """
    missing = [
        row[0]
        for row in cursor.execute(
            "SELECT t FROM unnest(%s::text[], %s::text[]) x(t, q) WHERE to_regclass(q) IS NULL",
            (list(OWN), [target.regclass(table) for table in OWN]),
        )
    ]
    if missing:
        raise migrations.lost(
            [target.shown(table) for table in missing], [target.shown(table) for table in OWN if table not in missing]
        )
    needed = {table: ["SELECT", "INSERT", "UPDATE", "DELETE"] for table in (*tables, RUNS, REJECTS, STATE)}
    lacking = [
        f"{right} ON {target.shown(table)}"
        for table, rights in {**needed, MIGRATIONS: ["SELECT"]}.items()
        for right, has in cursor.execute(
            "SELECT r, coalesce(has_table_privilege(to_regclass(%s), r), true) FROM unnest(%s::text[]) r",
            (target.regclass(table), rights),
        ).fetchall()
        if not has
    ]
    row = cursor.execute("SELECT has_database_privilege(current_database(), 'TEMP'), current_user").fetchone()
    assert row is not None
    if not row[0]:
        lacking.append("TEMP ON DATABASE (this one)")
    if lacking:
        raise SchemaError(
            f"The role {row[1]!r} lacks rights: {', '.join(lacking)}.",
            remedy="Let the owner run: "
            + " ".join(f"GRANT {right} TO {row[1]};" for right in lacking).replace(" (this one)", " …"),
        )


def check_open(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> None:
    """Raise SchemaError where a run would not see, or could not write, every row of the index's tables.

    A run looks up what is stored, and who holds the index. A row that it does not see it would embed again and then
    collide with; a run that it does not see it would run beside.
    """
    tables = (target.index.name, RUNS, REJECTS, STATE)
    check_unfiltered(rows_on(cursor, target.dialect), target, tables, "a run must see every row")
    rules = [
        row[0]
        for row in cursor.execute(
            "SELECT rulename::text FROM pg_rewrite WHERE ev_class = to_regclass(%s) AND ev_type IN ('2', '3') "
            "AND ev_enabled <> 'D' ORDER BY 1",
            (target.index_regclass,),
        )
    ]
    if rules:
        raise SchemaError(
            f"{target.index_shown} has rules for INSERT or UPDATE ({', '.join(map(storable_key, rules))}); PostgreSQL "
            "allows no INSERT … ON CONFLICT there, and COPY does not heed them.",
            remedy=f"Make them triggers, or drop them: DROP RULE … ON {target.index_shown};",
        )


def vector_version(cursor: psycopg.Cursor[tuple[Any, ...]]) -> tuple[int, ...]:
    """Version of pgvector in this database, for example (0, 8, 5)."""
    row = cursor.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    return tuple(int(part) for part in str(row[0] if row else "0").split(".") if part.isdigit())
