"""What the database holds, in true numbers: entities as KameleonDB defines them, and the state of their index.

Every number is counted by SQL at the time of the call. A table or column that does not exist yet counts as
empty, so the status of a fresh database, or of one that only KameleonDB has written, is right as well.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ..errors import DatabaseError, SchemaError
from .base import REJECTS, RUNS, TABLE, EntityStatus

Rows = Callable[[str, Mapping[str, Any]], list[tuple[Any, ...]]]
"""Run a statement with named parameters and return all its rows as tuples."""

RECORDS = "kdb_records"
KAMELEON_TABLES = ("kdb_entity_definitions", "kdb_field_definitions", RECORDS)
TEXT_TYPES = frozenset({"string", "text"})
"""Field types that KameleonDB puts into the text of a record."""


class Field(NamedTuple):
    """A field: its logical name, the key or column it is stored under, and KameleonDB's type name."""

    name: str
    column: str
    type: str


class Definition(NamedTuple):
    """An entity of KameleonDB.

    Attributes:
        entity: Name of the entity.
        id: Its key in ``kdb_entity_definitions``.
        table: The dedicated table of a materialised entity, or None for shared storage in ``kdb_records``.
        columns: Columns that the dedicated table really has; empty for shared storage.
        fields: Active fields in the order of their definition.
        live: False when the entity was dropped or its table is gone: none of its records exists any more.
    """

    entity: str
    id: str
    table: str | None
    columns: frozenset[str]
    fields: tuple[Field, ...]
    live: bool


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

    The function raises SchemaError for a missing table, column or right, and DatabaseError when the database
    cannot answer; other errors of the driver pass through.
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
        except sqlite3.OperationalError as error:
            if str(error).startswith(("no such table", "no such column")):
                raise SchemaError(f"The search index cannot be read: {error}.", remedy=_NO_INDEX) from None
            raise DatabaseError(f"The SQLite database cannot be read: {error}.") from error


def _sqlite_rows(connection: sqlite3.Connection) -> Rows:
    def rows(statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with sqlite_cursor(connection) as cursor:
            return cursor.execute(statement, params).fetchall()

    return rows


def _postgresql_rows(connection: Any) -> Rows:
    import psycopg
    from psycopg import errors
    from psycopg.rows import tuple_row

    def rows(statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        try:
            with connection.cursor(row_factory=tuple_row) as cursor:
                cursor.execute(statement.encode(), params)
                result: list[tuple[Any, ...]] = cursor.fetchall()
                return result
        except (errors.UndefinedTable, errors.UndefinedColumn, errors.InsufficientPrivilege) as error:
            detail = error.diag.message_primary
            raise SchemaError(f"The search index cannot be read: {detail}.", remedy=_NO_INDEX) from None
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            detail = error.diag.message_primary or "the connection is closed"
            raise DatabaseError(f"The PostgreSQL database cannot be read: {detail}.") from error

    return rows


def quoted(name: str, dialect: str) -> str:
    """An identifier for a statement. Raises SchemaError for a name that no table can have."""
    if "\x00" in name:
        raise SchemaError("The name of a table or column holds a NUL character.")
    if dialect == "sqlite":
        return '"' + name.replace('"', '""') + '"'
    from psycopg import sql

    # A per cent sign would be read as the start of a placeholder.
    return sql.Identifier(name).as_string(None).replace("%", "%%")


def columns_of(rows: Rows, dialect: str, tables: Iterable[str]) -> dict[str, frozenset[str]]:
    """Columns of each of these tables; tables that do not exist are left out."""
    if dialect == "sqlite":
        found = {t: [r[0] for r in rows("SELECT name FROM pragma_table_info(:t)", {"t": t})] for t in tables}
        return {table: frozenset(columns) for table, columns in found.items() if columns}
    pairs = rows(
        "SELECT c.relname, array_agg(a.attname) FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
        "WHERE c.oid IN (SELECT to_regclass(quote_ident(t)) FROM unnest(%(t)s::text[]) t) "
        "AND a.attnum > 0 AND NOT a.attisdropped GROUP BY c.relname",
        {"t": list(tables)},
    )
    return {table: frozenset(columns) for table, columns in pairs}


def load_definitions(rows: Rows, dialect: str) -> list[Definition]:
    """All entities that KameleonDB has defined here, dropped ones too; [] in a database without its tables."""
    if len(columns_of(rows, dialect, KAMELEON_TABLES)) < len(KAMELEON_TABLES):
        return []
    entities: dict[str, tuple[str, bool, str | None]] = {}
    fields: dict[str, list[Field]] = {}
    for entity_id, name, active, mode, table, field, column, kind in rows(
        "SELECT e.id, e.name, e.is_active, e.storage_mode, e.dedicated_table_name, f.name, f.column_name, f.field_type "
        "FROM kdb_entity_definitions e LEFT JOIN kdb_field_definitions f ON f.entity_id = e.id AND f.is_active "
        "ORDER BY e.name, f.created_at, f.id",
        {},
    ):
        # '' stands for a dedicated table whose name is missing: it can never be found.
        entities[entity_id] = (name, bool(active), (table or "") if mode == "dedicated" else None)
        if field is not None:
            fields.setdefault(entity_id, []).append(Field(field, column, kind))
    dedicated = {table for _, active, table in entities.values() if active and table}
    columns = columns_of(rows, dialect, sorted(dedicated)) if dedicated else {}
    return [
        Definition(
            entity=name,
            id=entity_id,
            table=table,
            columns=columns.get(table or "", frozenset()),
            fields=tuple(fields.get(entity_id, ())),
            live=active and (table is None or table in columns),
        )
        for entity_id, (name, active, table) in entities.items()
    ]


def statuses(connection: Any, dialect: str, fingerprint: str | None) -> list[EntityStatus]:
    """The state of every active entity of KameleonDB and of every other entity in the index, by name.

    Args:
        connection: Open psycopg or sqlite3 connection; it is only read.
        dialect: ``postgresql`` or ``sqlite``.
        fingerprint: Fingerprint of the current model; None means that of the newest run.

    Returns:
        For each entity: ``indexed`` rows with a vector; ``stale`` ones among them, made by another model or
        rewritten by another program; ``pending`` live records with text that have no vector or were changed
        since it was made, without the rejected ones (None where KameleonDB does not define the entity);
        ``rejected`` rows of the rejects table; ``last_updated`` as an aware datetime.

    Raises:
        SchemaError: No right to read a table.
        DatabaseError: The database cannot answer.
    """
    rows = rows_of(connection, dialect)
    present = columns_of(rows, dialect, (TABLE, RUNS, REJECTS))
    if fingerprint is None and RUNS in present:
        newest = rows(f"SELECT fingerprint FROM {RUNS} ORDER BY run DESC LIMIT 1", {})  # noqa: S608
        fingerprint = newest[0][0] if newest else None
    index = _index_counts(rows, dialect, present.get(TABLE), fingerprint)
    rejected: dict[str, int] = {}
    if REJECTS in present:
        rejected = dict(rows(f"SELECT entity_name, count(*) FROM {REJECTS} GROUP BY entity_name", {}))  # noqa: S608
    definitions = {d.entity: d for d in load_definitions(rows, dialect) if d.live}
    result = []
    for entity in sorted(definitions.keys() | index.keys()):
        indexed, stale, last_updated = index.get(entity, (0, 0, None))
        definition = definitions.get(entity)
        pending = _pending(rows, dialect, present, definition) if definition else None
        result.append(EntityStatus(entity, indexed, pending, stale, rejected.get(entity, 0), last_updated))
    return result


def _index_counts(
    rows: Rows, dialect: str, columns: frozenset[str] | None, fingerprint: str | None
) -> dict[str, tuple[int, int, datetime | None]]:
    if columns is None:
        return {}
    params = Params(dialect)
    stale = "true"
    if fingerprint is not None and {"kdb_fast_fingerprint", "kdb_fast_at"} <= columns:
        differs = "IS DISTINCT FROM" if dialect == "postgresql" else "IS NOT"
        stale = f"(kdb_fast_fingerprint {differs} {params(fingerprint)} OR kdb_fast_at {differs} updated_at)"
    changed = "coalesce(updated_at, created_at)"
    # SQLite returns the bare column of the row that has the maximum; julianday() reads every form of timestamp.
    last = f"max({changed})" if dialect == "postgresql" else f"{changed}, max(julianday({changed}))"
    counts = {}
    for entity, indexed, stale_rows, moment, *_ in rows(
        f"SELECT entity_name, count(embedding), "  # noqa: S608
        f"sum(CASE WHEN embedding IS NOT NULL AND {stale} THEN 1 ELSE 0 END), {last} "
        f"FROM {TABLE} GROUP BY entity_name",
        params.values,
    ):
        counts[entity] = (int(indexed), int(stale_rows), _aware(moment))
    return counts


def _aware(moment: object) -> datetime | None:
    """A timestamp of either dialect with a time zone; a text without one is UTC. None if it cannot be read."""
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment.strip())
        except ValueError:
            return None
    if not isinstance(moment, datetime):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _pending(rows: Rows, dialect: str, present: Mapping[str, frozenset[str]], definition: Definition) -> int:
    params = Params(dialect)
    has_text = _has_text(definition, dialect, params)
    if not has_text:
        return 0
    conditions = ["NOT r.is_deleted", f"({has_text})"]
    if definition.table is None:
        conditions.append(f"r.entity_id = {params(definition.id)}")
    join = ""
    if TABLE in present:
        join = f"LEFT JOIN {TABLE} s ON s.entity_name = {params(definition.entity)} AND s.record_id = r.id"
        seen = "coalesce(s.updated_at, s.created_at)"
        if {"kdb_fast_at", "kdb_fast_source_at"} <= present[TABLE]:
            # Once another program has rewritten the row, its own time of writing counts.
            ours = "s.kdb_fast_source_at IS NOT NULL AND s.kdb_fast_at = s.updated_at"
            seen = f"CASE WHEN {ours} THEN s.kdb_fast_source_at ELSE {seen} END"
        newer = f"r.updated_at > {seen}" if dialect == "postgresql" else f"julianday(r.updated_at) > julianday({seen})"
        conditions.append(f"(s.embedding IS NULL OR {newer})")
    if REJECTS in present:
        entity = params(definition.entity)
        conditions.append(
            f"NOT EXISTS (SELECT 1 FROM {REJECTS} x WHERE x.entity_name = {entity} AND x.record_id = r.id)"  # noqa: S608
        )
    table = quoted(definition.table or RECORDS, dialect)
    statement = f"SELECT count(*) FROM {table} r {join} WHERE {' AND '.join(conditions)}"  # noqa: S608
    return int(rows(statement, params.values)[0][0])


def _has_text(definition: Definition, dialect: str, params: Params) -> str:
    """The condition that a record ``r`` has any text to embed; '' when it never can."""
    texts = []
    for field in definition.fields:
        if field.type not in TEXT_TYPES:
            continue
        if definition.table is not None:
            if field.column in definition.columns:
                texts.append(f"CAST(r.{quoted(field.column, dialect)} AS text)")
        elif dialect == "postgresql":
            texts.append(f"r.data ->> {params(field.column)}::text")
        else:
            texts.append(json_member(field.column, params)[1])
    return " OR ".join(f"coalesce({text}, '') <> ''" for text in texts)


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
