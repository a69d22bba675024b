"""Reading statements for both dialects, and the entities as KameleonDB defines them.

Search and status need little of KameleonDB's tables: which records live, and what their fields are. A statement
is written once, with named parameters; values are never part of its text.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .. import pg_errors, sqlite_errors
from ..errors import DatabaseError, SchemaError
from ..retrying import ErrorKind
from ..target import ENTITIES, FIELDS, KAMELEON_TABLES, RECORDS, Rows, Target, other_indexes


class Field(NamedTuple):
    """A field: its logical name, the key or column it is stored under, and KameleonDB's type name."""

    name: str
    column: str
    type: str


class Place(NamedTuple):
    """A table that holds records: a dedicated one with the columns it has, or (columns None) ``kdb_records``."""

    table: str
    columns: frozenset[str] | None


SHARED = Place(RECORDS, None)


class Definition(NamedTuple):
    """An entity of KameleonDB.

    Attributes:
        entity: Name of the entity.
        id: Its key in ``kdb_entity_definitions``.
        live: False when the entity was dropped: none of its records exists any more.
        fields: Active fields in the order of their definition.
        places: Where its records are. Materialising moves them to a dedicated table, but KameleonDB 0.2 goes on
            inserting into the shared one; a record that is in both is as the first place has it.
    """

    entity: str
    id: str
    live: bool
    fields: tuple[Field, ...]
    places: tuple[Place, ...]


class Params:
    """Named parameters of one statement. Calling it with a value returns the placeholder to write."""

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect
        self.values: dict[str, Any] = {}

    def __call__(self, value: Any) -> str:
        name = f"p{len(self.values)}"
        self.values[name] = value
        return f"%({name})s" if self.dialect == "postgresql" else f":{name}"

    def list(self, values: Iterable[Any]) -> str:
        """Placeholders of several values, for ``IN (…)``."""
        return ", ".join(self(value) for value in values)


def rows_of(connection: Any, dialect: str) -> Rows:
    """A function that runs statements on this connection, whatever row factory it has.

    The function raises SchemaError for a missing table, column or right, ResourceError when the database runs out of
    disk or memory, and DatabaseError when it cannot answer; other errors of the driver pass through.
    """
    return _sqlite_rows(connection) if dialect == "sqlite" else _postgresql_rows(connection)


_NO_INDEX = "Run: kdb-fast reindex"


@contextlib.contextmanager
def sqlite_cursor(connection: sqlite3.Connection) -> Iterator[sqlite3.Cursor]:
    """A cursor that gives tuples; errors are those of :func:`rows_of`."""
    with contextlib.closing(connection.cursor()) as cursor:
        cursor.row_factory = None
        try:
            yield cursor
        except sqlite3.Error as error:
            kind = sqlite_errors.kind_of(error)
            if kind is ErrorKind.DATA or sqlite_errors.primary_code(error) is None:
                raise
            if kind is ErrorKind.RESOURCE:
                raise sqlite_errors.explain(error, "reading the index") from error
            if str(error).startswith(("no such table", "no such column")):
                raise SchemaError(f"The search index cannot be read: {error}.", remedy=_NO_INDEX) from None
            raise DatabaseError(f"The SQLite database cannot be read: {error}.") from error


def _sqlite_rows(connection: sqlite3.Connection) -> Rows:
    def rows(statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with sqlite_cursor(connection) as cursor:
            return cursor.execute(statement, params).fetchall()

    return rows


@contextlib.contextmanager
def postgresql_errors() -> Iterator[None]:
    """Errors of psycopg are those of :func:`rows_of`."""
    import psycopg
    from psycopg import errors

    try:
        yield
    except (errors.UndefinedTable, errors.UndefinedColumn, errors.WrongObjectType) as error:
        detail = error.diag.message_primary
        raise SchemaError(f"The search index cannot be read: {detail}.", remedy=_NO_INDEX) from None
    except errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"The search index cannot be read: {error.diag.message_primary}.",
            remedy="Let its owner grant this role SELECT on it, and USAGE on its schema.",
        ) from None
    except psycopg.Error as error:
        kind = pg_errors.kind_of(error)
        if kind is ErrorKind.RESOURCE:
            raise pg_errors.explain("reading the index", error) from error
        ours = kind in (ErrorKind.DATA, ErrorKind.REFUSED)  # a statement of ours, or a value in it
        if ours and not isinstance(error, psycopg.OperationalError):
            raise
        detail = error.diag.message_primary or "the connection is closed"
        raise DatabaseError(f"The PostgreSQL database cannot be read: {detail}.") from error


def _postgresql_rows(connection: Any) -> Rows:
    from psycopg.rows import tuple_row

    def rows(statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with postgresql_errors(), connection.cursor(row_factory=tuple_row) as cursor:
            cursor.execute(statement.encode(), params)
            result: list[tuple[Any, ...]] = cursor.fetchall()
            return result

    return rows


def no_index(rows: Rows, target: Target) -> SchemaError:
    """The error that says that there is no search index here, and in which schema there is one."""
    where = "this database" if target.schema is None else f"the schema {target.shown()} of this database"
    others = ", ".join(other_indexes(rows, target))
    if others:
        where += f", the one of its records; {others} is another schema's"
    return SchemaError(f"There is no search index in {where}.", remedy="Build it: kdb-fast reindex --db …")


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


def load_definitions(rows: Rows, target: Target) -> list[Definition]:
    """All entities that KameleonDB has defined here, dropped ones too; [] in a database without its tables."""
    if len(columns_of(rows, target, KAMELEON_TABLES)) < len(KAMELEON_TABLES):
        return []
    entities: dict[str, tuple[str, bool, str | None]] = {}
    fields: dict[str, list[Field]] = {}
    for entity_id, name, active, mode, table, field, column, kind in rows(
        "SELECT e.id, e.name, e.is_active, e.storage_mode, e.dedicated_table_name, f.name, f.column_name, f.field_type "  # noqa: S608
        f"FROM {target.table(ENTITIES)} e LEFT JOIN {target.table(FIELDS)} f ON f.entity_id = e.id AND f.is_active "
        "ORDER BY e.name, f.created_at, f.id",
        {},
    ):
        entities[entity_id] = (name, bool(active), table if mode == "dedicated" else None)
        if field is not None:
            fields.setdefault(entity_id, []).append(Field(field, column, kind))
    tables = {table for _, active, table in entities.values() if active and table}
    columns = columns_of(rows, target, sorted(tables)) if tables else {}
    return [
        Definition(
            name,
            entity_id,
            active,
            tuple(fields.get(entity_id, ())),
            (Place(table, columns[table]), SHARED) if table in columns else (SHARED,),
        )
        for entity_id, (name, active, table) in entities.items()
    ]


def json_member(column: str, params: Params) -> tuple[str, str]:
    """SQLite's expressions for the JSON type and the value of a top-level key of ``r.data``.

    A path can hold no quote, and before SQLite 3.45 it never finds a key that ``json.dumps`` wrote with an
    escape (any letter beyond ASCII); such keys are looked up among all keys.
    """
    if column and column.isascii() and column.isprintable() and not set(column) & set('"\\'):
        path = params(f'$."{column}"')
        return f"json_type(r.data, {path})", f"json_extract(r.data, {path})"
    key = params(column)
    member = "(SELECT j.{} FROM json_each(r.data) j WHERE j.key = {})"
    return member.format("type", key), member.format("value", key)
