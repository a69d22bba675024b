"""What a database's catalogue says of a table, view or the like: its columns, and the keys that tell its rows apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from ..errors import SchemaError
from ..records import storable_key
from .key import KeyColumn
from .names import NEAREST, ends_with, nearest, or_nearest, qualified, split_identifier
from .relation import Column, Relation
from .target import Dialect, Rows, Target, identifier, rows_on

KINDS = {
    "r": "table",
    "p": "partitioned table",
    "v": "view",
    "m": "materialised view",
    "f": "foreign table",
}
"""By PostgreSQL's ``pg_class.relkind``."""

EMPTY_KEY = ("", "key_too_long")
"""A text of no characters is a key like any other where the table has it."""

RELATION = """
SELECT c.oid::text, n.nspname::text, c.relname::text, c.relkind::text, has_schema_privilege(n.oid, 'USAGE'),
  current_user::text, current_setting('search_path'),
  c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits h WHERE h.inhparent = c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = %(name)s::name AND c.relkind = ANY(%(kinds)s::"char"[]) AND n.oid <> pg_my_temp_schema()
AND CASE WHEN %(schema)s::text IS NULL THEN n.nspname = ANY(current_schemas(true)) ELSE n.nspname = %(schema)s::name END
ORDER BY array_position(current_schemas(true), n.nspname) LIMIT 1
"""

OTHERS = """
SELECT n.nspname::text, c.relname::text, n.nspname = ANY(current_schemas(true)) FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = ANY(%(kinds)s::"char"[]) AND NOT c.relispartition
AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY n.nspname = %(schema)s::name DESC NULLS LAST, 3 DESC, 2 LIMIT 10000
"""

# Names of types come with their schema: another session's search path may not find them. What depends on the path waits
# for its value.
PATH = "(SELECT set_config('search_path', 'pg_catalog, pg_temp', true) AS path OFFSET 0) p"

OF_RELATION = """
SELECT attname::text, atttypid, atttypmod, attgenerated <> '' AS generated, attnotnull, attnum::int FROM pg_attribute
WHERE attrelid = %(oid)s::oid AND attnum > 0 AND NOT attisdropped
"""
OF_QUERY = """
SELECT attname, atttypid, atttypmod, false AS generated, false AS attnotnull, attnum::int
FROM unnest(%(names)s::text[], %(types)s::oid[], %(modifiers)s::int[])
  WITH ORDINALITY q(attname, atttypid, atttypmod, attnum)
"""
COLUMNS = f"""
SELECT a.attname, format_type(a.atttypid, CASE WHEN p.path <> '' THEN a.atttypmod END),
  b.category IN ('S', 'E') OR (b.category = 'A' AND e.typcategory IN ('S', 'E')), a.generated,
  a.attnotnull OR b.not_null, b.category = 'A', '', format_type(a.atttypid, CASE WHEN p.path <> '' THEN -1 END)
FROM {PATH} CROSS JOIN (<columns>) a CROSS JOIN LATERAL (
  WITH RECURSIVE t AS (
    SELECT oid, typtype, typbasetype, typcategory, typelem, typnotnull FROM pg_type WHERE oid = a.atttypid
    UNION ALL
    SELECT d.oid, d.typtype, d.typbasetype, d.typcategory, d.typelem, d.typnotnull OR t.typnotnull
    FROM t JOIN pg_type d ON t.typtype = 'd' AND d.oid = t.typbasetype)
  SELECT typcategory::text AS category, typelem AS element, typnotnull AS not_null FROM t WHERE typtype <> 'd') b
LEFT JOIN pg_type e ON e.oid = b.element
ORDER BY a.attnum
"""  # noqa: S608 - constants
"""Of each column: name, type, whether it holds text, is generated, may not be NULL and is an array, and the type of any
length. A domain is what it is made of, at the end."""

KEYS = f"""
SELECT array_agg(a.attname::text ORDER BY u.place),
  array_agg(format_type(a.atttypid, CASE WHEN p.path <> '' THEN -1 END) ORDER BY u.place),
  array_agg(o.equals ORDER BY u.place), array_agg(o.less ORDER BY u.place), array_agg(o.greater ORDER BY u.place),
  array_agg(coalesce(o.collname, '') ORDER BY u.place)
FROM {PATH} CROSS JOIN pg_index i
CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[], i.indcollation::oid[])
  WITH ORDINALITY u(attnum, opclass, collid, place)
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.attnum
JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_opclass c ON c.oid = u.opclass JOIN pg_am m ON m.oid = c.opcmethod AND m.amname = 'btree'
CROSS JOIN LATERAL (
  SELECT max(x.shown) FILTER (WHERE x.amopstrategy = 3) AS equals,
    max(x.shown) FILTER (WHERE x.amopstrategy = 1) AS less,
    max(x.shown) FILTER (WHERE x.amopstrategy = 5) AS greater,
    (SELECT format('%%I.%%I', n.nspname, l.collname) FROM pg_collation l JOIN pg_namespace n ON n.oid = l.collnamespace
     WHERE l.oid = u.collid AND l.oid <> a.attcollation) AS collname
  FROM (SELECT f.amopstrategy, format('OPERATOR(%%I.%%s)', n.nspname, r.oprname) AS shown
        FROM pg_amop f JOIN pg_operator r ON r.oid = f.amopopr JOIN pg_namespace n ON n.oid = r.oprnamespace
        WHERE f.amopfamily = c.opcfamily AND f.amoplefttype = c.opcintype AND f.amoprighttype = c.opcintype) x) o
WHERE i.indrelid = %(oid)s::oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
AND NOT EXISTS (SELECT FROM pg_inherits h JOIN pg_class k ON k.oid = h.inhparent AND k.relkind = 'r'
                WHERE h.inhparent = i.indrelid)
GROUP BY i.indexrelid, i.indisprimary, i.indnkeyatts HAVING count(*) = i.indnkeyatts
ORDER BY i.indisprimary DESC, bool_and(a.attnotnull OR t.typnotnull) DESC, i.indexrelid
"""  # noqa: S608 - constants
"""Of each unique index the columns, how a value of them is written, the operators that the index compares by, and its
collations where they are others than the columns'. One on a table that others inherit from does not hold for their
rows."""

DATABASES = "SELECT name FROM pragma_database_list WHERE name <> 'temp' ORDER BY seq"
MASTER = "SELECT name, type, sql FROM {schema}.sqlite_master WHERE type IN ('table', 'view')"
TABLE_COLUMNS = 'SELECT name, type, "notnull", pk, hidden FROM pragma_table_xinfo(:name, :schema) WHERE hidden <> 1'
INDEXES = 'SELECT name, origin FROM pragma_index_list(:name, :schema) WHERE "unique" AND NOT partial'
INDEX_COLUMNS = "SELECT name, coll FROM pragma_index_xinfo(:name, :schema) WHERE key ORDER BY seqno"

COLLATION = (
    "SELECT CASE WHEN v = 'A' THEN 'NOCASE' WHEN v = 'a ' THEN 'RTRIM' ELSE 'BINARY' END "
    "FROM (SELECT {column} AS v FROM {table} WHERE false UNION ALL SELECT 'a')"
)
"""The collation of a column is that of the first of the united ones: no PRAGMA tells it."""

QUERY = "kdb_fast_query"
"""A view of SQLite, for as long as it takes to see the columns of a query."""

GENERATED = (2, 3)
"""Of ``hidden`` in ``PRAGMA table_xinfo``: virtual and stored generated columns."""


def find_relation(rows: Rows, dialect: Dialect, name: str) -> Relation:
    """What the catalogue says of a table or the like.

    Args:
        rows: Runs a statement on the connection.
        name: As SQL writes it: ``articles``, ``shop.articles``, ``"My Docs"."Big Table"``; without a schema, what the
            session's search path finds. On SQLite the schema is an attached database.

    Raises:
        SchemaError: There is nothing of this name, or this role may not use its schema.
    """
    schema, table = split_identifier(name, dialect)
    find = _on_postgresql if dialect == "postgresql" else _on_sqlite
    shown = storable_key(table) if schema in (None, "main") else Target(schema).shown(table)
    return find(rows, schema, table, shown)


def describe_query(connection: Any, dialect: Dialect, query: str) -> Relation:
    """The columns that a query gives; it is not run.

    Args:
        connection: To the database.
        query: A SELECT.

    Raises:
        SchemaError: Two of its columns have one name.
        psycopg.Error, sqlite3.Error: It is no query.
    """
    rows = rows_on(connection, dialect)
    if dialect == "sqlite":
        connection.execute(f"CREATE TEMP VIEW {QUERY} AS SELECT * FROM ({query}\n)")  # noqa: S608 - the user's own
        try:
            found = _sqlite_relation(rows, "temp", QUERY, "view", "")
        finally:
            connection.execute(f"DROP VIEW temp.{QUERY}")
        return Relation(None, "", "query", found.columns)
    cursor = connection.execute(f"SELECT * FROM ({query}\n) t LIMIT 0".encode())  # noqa: S608
    given = cursor.description or []
    names = [column.name for column in given]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise SchemaError(
            f"The query gives several columns named {storable_key(doubled[0])}.",
            remedy=f"Give each a name of its own: SELECT … AS {storable_key(doubled[0])}_2.",
        )
    types = [column.type_code for column in given]
    modifiers = [cursor.pgresult.fmod(i) for i in range(len(given))]
    (path,) = rows("SELECT current_setting('search_path')", {})[0]
    columns = rows(COLUMNS.replace("<columns>", OF_QUERY), {"names": names, "types": types, "modifiers": modifiers})
    rows("SELECT set_config('search_path', %(path)s, true)", {"path": path})
    return Relation(None, "", "query", tuple(Column(*column) for column in columns))


def no_column(relation: Relation, name: str, remedy: str = "") -> SchemaError:
    """The error for a name that is no column's."""
    others = or_nearest(name, (column.name for column in relation.columns))
    shown = relation.shown if relation.kind != "query" else "The query"
    return SchemaError(f"{shown} has no column {storable_key(name) or repr(name)}{others}", remedy=remedy)


def key_of(relation: Relation, wanted: Sequence[str] = ()) -> tuple[KeyColumn, ...] | None:
    """The columns of the first unique index or, where columns are named, of the one on these; None where there is none.

    In the order of the index, in whatever order they are named.

    Raises:
        SchemaError: There is no column of such a name.
    """
    names = set()
    for name in wanted:
        column = relation.column(name)
        if column is None:
            raise no_column(relation, name)
        names.add(column.name)
    return next((key for key in relation.keys if not wanted or names == {part.name for part in key}), None)


def no_place(relation: Relation) -> SchemaError:
    """The error for a relation whose rows cannot be updated, where a column of it is to hold the vectors."""
    return SchemaError(
        f"{relation.shown} is a {relation.kind}: its rows have no place for a vector.",
        remedy="Name a table for the vectors: --into NAME",
    )


def no_key(relation: Relation, dialect: Dialect, wanted: Sequence[str] = ()) -> SchemaError:
    """The error for a relation in which a row could not be found again, with what to add."""
    if not relation.is_table:
        return SchemaError(
            f"Nothing says which columns tell the rows of {relation.shown} apart.",
            remedy="Name the column, or each of several: --key id",
        )
    if relation.inherited:
        return SchemaError(
            f"Other tables inherit from {relation.shown}, and no key tells the rows of all of them apart.",
            remedy=f"Read its own rows by a query: --query 'SELECT * FROM ONLY {relation.shown}' --key COLUMN "  # noqa: S608
            "--into NAME",
        )
    shown, names = relation.shown, ", ".join(identifier(name, "sqlite") for name in wanted)
    if wanted:
        found = f"{shown} has no unique index on ({', '.join(map(storable_key, wanted))})"
        add = f"Run: ALTER TABLE {shown} ADD UNIQUE ({names});"
        if dialect == "sqlite":
            add = f"Run: CREATE UNIQUE INDEX {identifier(f'{relation.name}_key', 'sqlite')} ON {shown} ({names});"
    else:
        found = f"{shown} has no primary key and no unique index"
        name = "id" if relation.column("id") is None else "row_id"
        add = f"Run: ALTER TABLE {shown} ADD COLUMN {name} bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY;"
        if dialect == "sqlite":
            add = (
                f"Run: CREATE UNIQUE INDEX … ON {shown} (…); on columns that tell its rows apart, or make the table "
                f"anew with {name} INTEGER PRIMARY KEY: VACUUM may number the rows of this one anew."
            )
    return SchemaError(f"{found}; a row could not be found again.", remedy=add)


def _none(shown: str, name: str, others: Sequence[tuple[str, str]]) -> SchemaError:
    """The error for a table that is not there.

    Args:
        others: Name, and name as messages show it, of each that is there.
    """
    near = list(dict.fromkeys(other.lower() for other in nearest(name, (other for other, _ in others))))
    found = [as_shown for wanted in near for other, as_shown in others if other.lower() == wanted]
    theirs = [as_shown for other, as_shown in others if not other.startswith("kdb_")]
    return SchemaError(f"There is no table {shown}{ends_with(found[:NEAREST], theirs)}")


# -- PostgreSQL --------------------------------------------------------------------------------------------


def _on_postgresql(rows: Rows, schema: str | None, name: str, shown: str) -> Relation:
    kinds = list(KINDS)
    found = rows(RELATION, {"schema": schema, "name": name, "kinds": kinds})
    if not found:
        others = [
            (other, Target(place).shown(other) if schema is not None or not near else _shown(other))
            for place, other, near in rows(OTHERS, {"schema": schema, "kinds": kinds})
        ]
        raise _none(shown, name, others)
    oid, schema, name, kind, may_use, role, path, inherited = found[0]
    if not may_use:
        raise SchemaError(
            f"The role {role} may not use the schema {Target(schema).shown()}, in which {storable_key(name)} is.",
            remedy=f"Let its owner run: GRANT USAGE ON SCHEMA {Target(schema).shown()} TO {_shown(role)};",
        )
    columns = rows(COLUMNS.replace("<columns>", OF_RELATION), {"oid": oid})
    keys = rows(KEYS, {"oid": oid})
    rows("SELECT set_config('search_path', %(path)s, true)", {"path": path})
    return Relation(
        schema,
        name,
        KINDS[kind],
        tuple(Column(*column) for column in columns),
        tuple(
            tuple(
                KeyColumn(n, t, n, None, EMPTY_KEY, equals, less, greater, collation)
                for n, t, equals, less, greater, collation in zip(*key, strict=True)
            )
            for key in keys
        ),
        inherited=inherited,
    )


def _shown(name: str) -> str:
    """A name without its schema, such that it can be copied into a statement."""
    return Target(name).shown()


# -- SQLite ------------------------------------------------------------------------------------------------


def _on_sqlite(rows: Rows, schema: str | None, name: str, shown: str) -> Relation:
    databases = [row[0] for row in rows(DATABASES, {})]
    if schema is not None and schema.lower() not in map(str.lower, databases):
        raise SchemaError(
            f"There is no database {storable_key(schema)} attached to this file.",
            remedy="Name the other file as the one that is read: --source sqlite:///….",
        )
    others: list[tuple[str, str]] = []
    for database in databases:
        if schema is not None and database.lower() != schema.lower():
            continue
        of = None if database == "main" else database
        for found, kind, statement in rows(MASTER.format(schema=identifier(database, "sqlite")), {}):
            if found.lower() == name.lower():
                return _sqlite_relation(rows, of, found, kind, str(statement))
            if not found.startswith("sqlite_"):  # SQLite's own
                others.append((found, _shown(found) if of is None else Target(of).shown(found)))
    raise _none(shown, name, others)


def _sqlite_relation(rows: Rows, schema: str | None, name: str, kind: str, statement: str) -> Relation:
    if statement.upper().startswith("CREATE VIRTUAL"):
        kind = "virtual table"
    # Where a table is not STRICT, a column of the type ANY would take '1' for 1.
    strict = "STRICT" in statement.upper().rpartition(")")[2]
    place: dict[str, Any] = {"name": name, "schema": schema or "main"}
    found = rows(TABLE_COLUMNS, place)
    columns: dict[str, Column] = {}
    for column, declared, not_null, _, hidden in found:
        declared = "" if strict and declared.upper() == "ANY" else declared or ""
        is_text = affinity(declared) == "TEXT"
        columns[column] = Column(column, declared, is_text, hidden in GENERATED, bool(not_null), value_type=declared)
    untyped = [column for column, found_as in columns.items() if not found_as.type]
    if untyped:
        # It may hold anything: the first row tells.
        kinds = ", ".join(f"typeof({identifier(column, 'sqlite')})" for column in untyped)
        first = rows(f"SELECT {kinds} FROM {qualified(schema, name, 'sqlite')} LIMIT 1", {})  # noqa: S608 - quoted
        for column, found_as in zip(untyped, first[0] if first else (), strict=bool(first)):
            columns[column] = replace(columns[column], is_text=found_as == "text")
    keys: list[tuple[KeyColumn, ...]] = []
    indexes = rows(INDEXES, place)
    primary = [column for column, _, _, part, _ in found if part]
    if len(primary) == 1 and columns[primary[0]].type.upper() == "INTEGER" and "pk" not in (o for _, o in indexes):
        # It is the rowid itself, which no index is made for, and never NULL.
        keys.append((KeyColumn(primary[0], "INTEGER", primary[0], None, EMPTY_KEY, typed=True),))
    for index, _ in sorted(indexes, key=lambda index: index[1] != "pk"):
        parts = rows(INDEX_COLUMNS, {**place, "name": index})
        if all(part in columns for part, _ in parts):  # none is an expression
            keys.append(
                tuple(
                    KeyColumn(part, columns[part].type, part, None, EMPTY_KEY, collation=collation, typed=True)
                    for part, collation in parts
                )
            )
    if keys and not primary:
        keys.sort(key=lambda key: not all(columns[part.name].not_null for part in key))
    for part in {part.name: part for key in keys for part in key if part.collation}:
        own = COLLATION.format(column=identifier(part, "sqlite"), table=qualified(schema, name, "sqlite"))
        columns[part] = replace(columns[part], collation=rows(own, {})[0][0])
    return Relation(schema, name, kind, tuple(columns.values()), tuple(keys))


def affinity(declared: str) -> Literal["INTEGER", "TEXT", "BLOB", "REAL", "NUMERIC"]:
    """What SQLite makes of values of a column that is declared so."""
    declared = declared.upper()
    if "INT" in declared:
        return "INTEGER"
    if any(word in declared for word in ("CHAR", "CLOB", "TEXT")):
        return "TEXT"
    if "BLOB" in declared or not declared:
        return "BLOB"
    return "REAL" if any(word in declared for word in ("REAL", "FLOA", "DOUB")) else "NUMERIC"
