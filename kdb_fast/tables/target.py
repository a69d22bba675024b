"""Where the tables are: names as statements and messages write them.

In PostgreSQL every statement names its tables with their schema. What a bare name means depends on the session's
``search_path`` and on temporary tables; it may be another tenant's table. The path itself is left as it is, for the
triggers and defaults that users have written for it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import SchemaError
from ..records import storable_key
from .index_table import IndexTable
from .kdb_search import KDB_SEARCH

Rows = Callable[[str, Mapping[str, Any]], list[tuple[Any, ...]]]
"""Run a statement with named parameters and return all its rows as tuples."""

Dialect = Literal["postgresql", "sqlite"]


class Params:
    """Named parameters of one statement. Calling it with a value returns the placeholder to write."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.values: dict[str, Any] = {}

    def __call__(self, value: Any) -> str:
        name = f"p{len(self.values)}"
        self.values[name] = value
        return f"%({name})s" if self.dialect == "postgresql" else f":{name}"

    def list(self, values: Iterable[Any]) -> str:
        """Placeholders of several values, for ``IN (…)``."""
        return ", ".join(self(value) for value in values)


RUNS = "kdb_fast_runs"
REJECTS = "kdb_fast_rejects"
STATE = "kdb_fast_state"
VECTORS = "kdb_fast_vectors"
"""On SQLite only: vectors as numbers, beside KameleonDB's JSON text."""
MIGRATIONS = "kdb_fast_migrations"
TARGETS = "kdb_fast_targets"
OWN = (RUNS, REJECTS, STATE, MIGRATIONS, TARGETS)
"""Our own tables on both databases."""
RECORDS = "kdb_records"
"""KameleonDB's table of all entities in shared storage: the index belongs beside it."""

STAGING = "pg_temp.kdb_fast_staging"

_FIND = f"""
SELECT home.nspname::text, (
  SELECT n.nspname::text FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
  WHERE e.extname = 'vector')
FROM unnest(CASE WHEN %(schema)s::text IS NULL THEN current_schemas(false)::text[] ELSE ARRAY[%(schema)s::text] END)
  WITH ORDINALITY AS path(name, place)
JOIN pg_catalog.pg_namespace home ON home.nspname = path.name AND home.oid <> pg_my_temp_schema()
LEFT JOIN pg_catalog.pg_class r ON r.relnamespace = home.oid AND r.relname = '{RECORDS}'
LEFT JOIN pg_catalog.pg_class s ON s.relnamespace = home.oid AND s.relname = %(index)s
LEFT JOIN pg_catalog.pg_class m ON m.relnamespace = home.oid AND m.relname = '{MIGRATIONS}' AND %(plain)s
ORDER BY r.oid IS NULL, CASE WHEN r.oid IS NULL THEN s.oid IS NULL END,
  CASE WHEN r.oid IS NULL AND s.oid IS NULL THEN m.oid IS NULL END, path.place LIMIT 1
"""  # noqa: S608 - constants


@dataclass(frozen=True)
class Target:
    """What a run brings up to date, and where its tables are, as one connection sees them.

    Attributes:
        schema: Of KameleonDB's tables and of our own in PostgreSQL; None in SQLite.
        pgvector: Name of the schema in which the extension pgvector is; None where it is not installed, or SQLite.
        index: The table of the index.
        kept_as: The name under which its runs, rejects and state are kept, beside those of others; '' for the table's.
    """

    schema: str | None = None
    pgvector: str | None = None
    index: IndexTable = KDB_SEARCH
    kept_as: str = ""

    @property
    def name(self) -> str:
        """Under which its runs, rejects and state are kept."""
        return self.kept_as or self.index.name

    @property
    def grouped(self) -> bool:
        """Whether a key is a group of records and one of it: KameleonDB's entity and id."""
        return len(self.index.key) == 2

    @property
    def dialect(self) -> Dialect:
        return "sqlite" if self.schema is None else "postgresql"

    def table(self, name: str) -> str:
        """A table, type or operator class of the schema, for a statement.

        Raises:
            SchemaError: No table can have this name.
        """
        schema = self._schema_of(name)
        return identifier(name, "sqlite") if schema is None else f"{identifier(schema)}.{identifier(name)}"

    def regclass(self, name: str) -> str:
        """The table as the value of a parameter that ``to_regclass()`` reads."""
        schema = self._schema_of(name)
        return name if schema is None else f"{_quoted(schema)}.{_quoted(name)}"

    def shown(self, name: str | None = None) -> str:
        """The table, or without a name the schema, for a message; such that it can be copied into a statement."""
        names = [part for part in (self._schema_of(name), name) if part is not None]
        if self.schema is not None:
            names = [part if _PLAIN.fullmatch(part) else _quoted(part) for part in names]
        return storable_key(".".join(names), 300)

    def statement(self, template: str, **parts: str) -> bytes:
        """A statement with its names filled in.

        Args:
            template: ``{index}`` stands for the search table, ``{kdb_fast_runs}`` and the like for our own;
                ``{content}`` and the like for columns of the index, ``{key}`` for those of its key, ``{group}`` and
                ``{member}`` for the first and the last of them, ``{same_key}`` for the condition that a row ``t`` of
                it and a row ``s`` have the same key; ``{vector}`` for pgvector's type, ``{pgvector}`` for what to
                write before its functions, operators and operator classes.
            parts: Other parts of the template by name.
        """
        return template.format(**{**self._names, **parts}).encode()

    def text(self, template: str, **parts: str) -> str:
        """:meth:`statement` as text, for SQLite."""
        return self.statement(template, **parts).decode()

    @property
    def index_shown(self) -> str:
        """The search table, for a message."""
        return self.shown(self.index.name)

    @property
    def index_regclass(self) -> str:
        """The search table as the value of a parameter that ``to_regclass()`` reads."""
        return self.regclass(self.index.name)

    @property
    def index_schema(self) -> str:
        """In PostgreSQL the schema of the index."""
        return str(self.index.schema or self.schema)

    def _schema_of(self, name: str | None) -> str | None:
        index = self.index
        if self.schema is not None and name in (index.name, index.vector_index, index.text_index):
            return self.index_schema
        return self.schema

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        index, tables = self.index, (*OWN, VECTORS)
        key = [identifier(column.name, self.dialect) for column in index.key]
        # A key travels as text, and its column's own type compares it.
        staged = [column.type if column.is_text else "text" for column in index.key]
        cast = [
            f"s.{name}" if self.schema is None or column.is_text else f"s.{name}::{column.type}"
            for name, column in zip(key, index.key, strict=True)
        ]
        pgvector = "" if self.pgvector is None else f"{identifier(self.pgvector)}."
        return {
            **{name: self.table(name) for name in tables},
            "index": self.table(index.name),
            "full_text": self.table(index.full_text),
            "id": identifier(index.id, self.dialect),
            "content": identifier(index.text, self.dialect),
            "embedding": identifier(index.vector, self.dialect),
            "model": identifier(index.model, self.dialect),
            "dimensions": identifier(index.dimensions, self.dialect),
            "created_at": identifier(index.created_at, self.dialect),
            "updated_at": identifier(index.updated_at, self.dialect),
            "group": key[0],
            "member": key[-1],
            "key": ", ".join(key),
            "staged_key": ", ".join(f"{name} {kind}" for name, kind in zip(key, staged, strict=True)),
            "cast_key": ", ".join(cast),
            "same_key": " AND ".join(f"t.{name} = {value}" for name, value in zip(key, cast, strict=True)),
            "key_arrays": ", ".join(["%s::text[]"] * len(key)),
            "staging": STAGING,
            "pgvector": pgvector,
            "vector": f"{pgvector}vector",
        }


ALL = ""
"""The one entity of a source that knows none: its records are all those of the target."""

LiveRows = Callable[[Rows, Target, str, Params], str | None]
"""``live_rows(rows, target, entity, params)``: the condition that the record of a row ``s`` of the index lives, as the
database has it now; None where it has no such entity. Raises
:class:`~kdb_fast.tables.hidden_rows.HiddenRowsError` where a record that is not seen may be there all the same."""


def find_target(
    rows: Rows, dialect: str, schema: str | None = None, index: IndexTable = KDB_SEARCH, *, plain: bool = False
) -> Target:
    """The schema in which ``kdb_records`` is found by the session's search path; without it that in which
    the index is found; else the one in which a new table would be made. Temporary tables do not count.

    Args:
        rows: Runs a statement on the connection.
        schema: The schema, where it is known already.
        index: The table of the index.
        plain: For a table of any kind: without KameleonDB's tables that in which our own are found.

    Raises:
        SchemaError: No schema of the search path exists and may be used.
    """
    if dialect == "sqlite":
        return Target(index=index)
    found = rows(_FIND, {"schema": schema, "index": index.name, "plain": plain})
    if not found and schema is not None:
        shown = Target(schema).shown()
        raise SchemaError(
            f"There is no schema {shown} for kdb-fast's own tables.",
            remedy=f"Let the owner of the database run: CREATE SCHEMA {shown};",
        )
    if not found:
        raise SchemaError(
            "No schema of the session's search_path exists and may be used by this role.",
            remedy="Create the schema, let its owner GRANT USAGE on it, or set another search_path.",
        )
    return Target(found[0][0], found[0][1], index)


def other_indexes(rows: Rows, target: Target) -> list[str]:
    """Search tables in other schemas of the session's search path, as messages name them."""
    if target.schema is None:
        return []
    found = rows(
        "SELECT n.nspname::text FROM unnest(current_schemas(false)) WITH ORDINALITY path(name, place) "
        "JOIN pg_catalog.pg_namespace n ON n.nspname = path.name AND n.oid <> pg_my_temp_schema() "
        "JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = %(table)s "
        "WHERE n.nspname <> %(schema)s ORDER BY place",
        {"table": target.index.name, "schema": target.schema},
    )
    return [replace(target, schema=schema).shown(target.index.name) for (schema,) in found]


def rows_on(connection: Any, dialect: str) -> Rows:
    """A function that runs statements on a connection or cursor; the driver's errors are passed on as they are."""

    def rows(statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        # psycopg takes a statement that is not a literal as bytes only.
        query = statement.encode() if dialect == "postgresql" else statement
        return list(connection.execute(query, params).fetchall())

    return rows


def columns_of(rows: Rows, target: Target, tables: Iterable[str]) -> dict[str, frozenset[str]]:
    """Columns of each of these tables; tables that do not exist are left out."""
    if target.dialect == "sqlite":
        found = {t: [r[0] for r in rows("SELECT name FROM pragma_table_info(:t)", {"t": t})] for t in tables}
        return {table: frozenset(columns) for table, columns in found.items() if columns}
    names = list(tables)
    pairs = rows(
        # By the name that was asked for: the server's own is cut at 63 bytes.
        "SELECT t, array_agg(a.attname) FROM unnest(%(t)s::text[], %(q)s::text[]) x(t, q) "
        "JOIN pg_attribute a ON a.attrelid = to_regclass(q) "
        "WHERE a.attnum > 0 AND NOT a.attisdropped GROUP BY t",
        {"t": names, "q": [target.regclass(name) for name in names]},
    )
    return {table: frozenset(columns) for table, columns in pairs}


def identifier(name: str, dialect: Dialect = "postgresql") -> str:
    """A name for a statement, with or without parameters. Raises SchemaError for a name that no table can have."""
    if "\x00" in name:
        raise SchemaError("The name of a table or column holds a NUL character.")
    if dialect == "postgresql" and "%" in name:
        # psycopg reads a per cent sign as the start of a placeholder where a statement has parameters, and only there.
        return "U&" + _quoted(name.replace("\\", "\\\\").replace("%", "\\0025"))
    return _quoted(name)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_PLAIN = re.compile(r"[a-z_][a-z0-9_]*")
