"""KameleonDB's own description of its entities, and where their records are.

Shared by everything that reads records: the source, search and insert. Nothing here writes.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..errors import DatabaseError, KdbFastError, SchemaError
from ..records import storable_key
from ..target import ENTITIES, FIELDS, KAMELEON_TABLES, RECORDS, Dialect, Rows, Target, find_target
from .record_queries import FieldDefinition, Place, encoded, rows_query, stored_fields

TEXT_TYPES = frozenset({"string", "text"})
"""Field types that are embedded by default."""

MAX_NAMES_SHOWN = 10
"""Entity names in a message; more would hide the message."""


@dataclass(frozen=True)
class EntityDefinition:
    """One active entity.

    Attributes:
        table: The dedicated table, or None for shared storage.
        columns: The dedicated table's columns; empty if it does not exist.
        fields: Active fields in definition order.
    """

    id: str
    name: str
    storage_mode: str
    table: str | None
    columns: frozenset[str]
    fields: tuple[FieldDefinition, ...]

    @property
    def text_fields(self) -> tuple[FieldDefinition, ...]:
        """The fields that are embedded, in definition order."""
        return tuple(field for field in self.fields if field.type in TEXT_TYPES)

    @property
    def places(self) -> tuple[Place, ...]:
        """Every table that may hold live records.

        Materialising moves the records to a dedicated table, but KameleonDB 0.2 goes on inserting into
        the shared one, so both are read. A record that is in both counts once, as the dedicated table
        has it (both hold it for a moment while it is moved).
        """
        if self.storage_mode != "dedicated":
            return (Place(RECORDS, self.id),)
        if self.table is None or not self.columns:
            return (Place(RECORDS, self.id),)
        return (Place(self.table, columns=self.columns), Place(RECORDS, self.id, without=self.table))


@dataclass(frozen=True)
class Catalog:
    """All active entities by name, the names of dropped ones, and where their tables are."""

    entities: Mapping[str, EntityDefinition]
    dropped: frozenset[str] = frozenset()
    target: Target = field(default_factory=Target)

    @classmethod
    def load(
        cls, connection: Any, dialect: Dialect, display: str = "the database", target: Target | None = None
    ) -> Catalog:
        """Read the definitions: a handful of short queries.

        Args:
            connection: A psycopg or sqlite3 connection in autocommit mode.
            display: The database's address as it may be printed.
            target: Where the tables are, if that is known already.

        Raises:
            SchemaError: KameleonDB's tables are missing, of another shape, or may not be read.
            DatabaseError: The database was lost.
        """
        with translated(display):
            if target is None:
                target = find_target(_rows_of(connection), dialect)
            _check_tables(connection, target, display)
            # An id is no order, but a tie in created_at must not be decided differently each time.
            tie = "id" if dialect == "postgresql" else "rowid"
            entities = connection.execute(
                encoded(
                    f"SELECT id, name, storage_mode, dedicated_table_name, is_active FROM {target.table(ENTITIES)}",  # noqa: S608
                    dialect,
                )
            ).fetchall()
            rows = connection.execute(
                encoded(
                    f"SELECT entity_id, name, column_name, field_type FROM {target.table(FIELDS)}"  # noqa: S608
                    f" WHERE is_active ORDER BY created_at, {tie}",
                    dialect,
                )
            ).fetchall()
            columns = _columns(connection, target, [row[3] for row in entities if row[2] == "dedicated" and row[3]])
        fields: dict[str, list[FieldDefinition]] = {}
        for entity_id, name, column_name, field_type in rows:
            fields.setdefault(entity_id, []).append(FieldDefinition(name, column_name, field_type))
        found = {}
        for entity_id, name, mode, table, active in sorted(entities, key=lambda row: str(row[1])):
            if active:
                dedicated = table if mode == "dedicated" else None
                found[name] = EntityDefinition(
                    entity_id,
                    name,
                    mode,
                    dedicated,
                    columns.get(dedicated or "", frozenset()),
                    tuple(fields.get(entity_id, ())),
                )
        return cls(found, frozenset(row[1] for row in entities if not row[4]), target)

    def check_fields(self, connection: Any, display: str) -> None:
        """Raise SchemaError where this role may not see every field of the entities that it sees.

        A text made of some of its fields would replace the whole one, and a record whose fields are all hidden would
        look as if its text had been emptied.
        """
        if self.target.dialect == "sqlite":
            return
        with translated(display):
            active, role = connection.execute(
                "SELECT row_security_active(to_regclass(%s)), current_user::text", (self.target.regclass(FIELDS),)
            ).fetchone()
        if active:
            raise SchemaError(
                f"Row level security on {self.target.shown(FIELDS)} lets the role {role} see only a part of it; the "
                "text of a record is made of all fields.",
                remedy=f"Run as a role that sees all of it: the owner (without FORCE ROW LEVEL SECURITY), or one with "
                f"BYPASSRLS (ALTER ROLE {role} BYPASSRLS;).",
            )

    def select(self, names: Sequence[str] = ()) -> tuple[EntityDefinition, ...]:
        """The named entities in that order, each once; all by name if none is named.

        Raises:
            SchemaError: An entity is unknown or dropped, or its dedicated table does not exist.
        """
        chosen = []
        for name in dict.fromkeys(names) if names else self.entities:
            entity = self.entities.get(name)
            if entity is None:
                raise self._unknown(name)
            if entity.storage_mode == "dedicated" and not entity.columns:
                raise SchemaError(
                    f"Entity {storable_key(name)!r} is stored in table {self.target.shown(entity.table)!r}, "
                    "which does not exist; expected KameleonDB's dedicated table.",
                    remedy="Was it dropped, or moved to another schema than its records? Name other entities to go on.",
                )
            chosen.append(entity)
        return tuple(chosen)

    def _unknown(self, name: str) -> SchemaError:
        known = sorted(self.entities)
        close = difflib.get_close_matches(name, known, n=3)
        # Same letters in another case are the likeliest slip; difflib compares case.
        same = [other for other in known if other.casefold() == name.casefold()]
        first = list(dict.fromkeys(same + close))
        shown = (first + [other for other in known if other not in first])[:MAX_NAMES_SHOWN]
        more = len(known) - len(shown)
        found = ", ".join(storable_key(other) for other in shown) or "none"
        return SchemaError(
            f"There is no entity {storable_key(name)!r}"
            + (" any more: it was dropped" if name in self.dropped else "")
            + f"; found: {found}{f' and {more} more' if more > 0 else ''}.",
            remedy=f"Did you mean {storable_key(first[0])}?" if first else "",
        )


class RecordReader:
    """Reads the fields of live records by key, for showing and filtering search results.

    Args:
        connection: A psycopg or sqlite3 connection in autocommit mode; stays the caller's.
    """

    def __init__(self, connection: Any, dialect: Dialect, catalog: Catalog) -> None:
        self._connection = connection
        self._dialect = dialect
        self._catalog = catalog

    def get_data(self, entity: str, record_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """All active fields by their logical name, of those of the records that are live.

        A field without a value is None. Values are as in JSON: a datetime is ISO text. An entity that
        KameleonDB does not know gives {}.

        Raises:
            SchemaError, DatabaseError: As for :meth:`Catalog.load`.
        """
        definition = self._catalog.entities.get(entity)
        found: dict[str, dict[str, Any]] = {}
        if definition is None:
            return found
        for place in definition.places:
            missing = [record_id for record_id in record_ids if record_id not in found]
            if not missing:
                break
            fields = stored_fields(place, definition.fields)
            query, parameters = rows_query(place, self._catalog.target, fields, missing)
            with translated():
                rows = self._connection.execute(query, parameters).fetchall()
            for record_id, _, *values in rows:
                data = dict.fromkeys((field.name for field in definition.fields), None)
                if place.columns is None:
                    stored = json.loads(values[0])
                    if isinstance(stored, dict):
                        data.update((field.name, stored.get(field.column_name)) for field in definition.fields)
                else:
                    data.update(
                        (field.name, _plain(value, field.type, self._dialect))
                        for field, value in zip(fields, values, strict=True)
                    )
                found[record_id] = data
        return found


@contextlib.contextmanager
def translated(display: str = "the database") -> Iterator[None]:
    """Turn a driver's error into SchemaError (missing table, column or right) or DatabaseError."""
    import sqlite3

    try:
        yield
    except KdbFastError:
        raise
    except sqlite3.Error as error:
        if isinstance(error, sqlite3.OperationalError) and "no such" in str(error):
            raise SchemaError(f"{display} is not as KameleonDB makes it: {error}.") from error
        raise DatabaseError(f"Reading {display} failed: {error}.") from error
    except Exception as error:
        import psycopg

        if not isinstance(error, psycopg.Error):
            raise
        detail = error.diag.message_primary or next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            raise SchemaError(
                f"Not allowed to read {display}: {detail}.",
                remedy="Grant the user SELECT on KameleonDB's tables (kdb_…).",
            ) from error
        if (error.sqlstate or "").startswith("42"):
            raise SchemaError(f"{display} is not as KameleonDB makes it: {detail}.") from error
        raise DatabaseError(f"Reading {display} failed: {detail}.") from error


def _rows_of(connection: Any) -> Rows:
    return lambda statement, parameters: list(connection.execute(statement.encode(), parameters).fetchall())


def _check_tables(connection: Any, target: Target, display: str) -> None:
    tables = KAMELEON_TABLES
    if target.schema is not None:
        names = [target.regclass(name) for name in tables]
        row = connection.execute("SELECT to_regclass(%s), to_regclass(%s), to_regclass(%s)", names).fetchone()
        missing = [name for name, found in zip(tables, row, strict=True) if found is None]
    else:
        rows = connection.execute(
            "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name IN (?, ?, ?)", tables
        ).fetchall()
        missing = [name for name in tables if (name,) not in rows]
    if missing:
        schema = "" if target.schema is None else f", schema {storable_key(target.schema)}"
        raise SchemaError(
            f"There are no KameleonDB tables in {display}{schema}: found no {' and no '.join(missing)}; "
            f"expected {', '.join(tables)}.",
            remedy="Is --db the right database? For records in a file, name it with --from.",
        )


def _columns(connection: Any, target: Target, tables: Sequence[str]) -> dict[str, frozenset[str]]:
    """Column names of those of the tables that exist."""
    if not tables:
        return {}
    columns: dict[str, set[str]] = {}
    if target.dialect == "postgresql":
        rows = connection.execute(
            "SELECT t.name, a.attname FROM unnest(%s::text[], %s::text[]) AS t(name, qualified)"
            " JOIN pg_attribute a ON a.attrelid = to_regclass(t.qualified)"
            " WHERE a.attnum > 0 AND NOT a.attisdropped",
            (list(tables), [target.regclass(table) for table in tables]),
        ).fetchall()
        for table, column in rows:
            columns.setdefault(table, set()).add(column)
    else:
        for table in tables:
            columns[table] = {row[0] for row in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))}
    return {table: frozenset(names) for table, names in columns.items()}


def _plain(value: Any, field_type: str, dialect: Dialect) -> Any:
    """A dedicated table's value as JSON in the shared table would give it."""
    if isinstance(value, datetime):
        return value.isoformat()
    if dialect == "sqlite" and value is not None:
        if field_type == "bool":
            return bool(value)
        if field_type == "json" and isinstance(value, str):
            with contextlib.suppress(ValueError):
                return json.loads(value)
    return value
