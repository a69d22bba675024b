"""The entities and fields that KameleonDB has defined, and where their records are: read alike in both databases."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..db import pg_errors, sqlite_errors
from ..db.address import DatabaseAddress
from ..db.reading import read
from ..db.retrying import ErrorKind
from ..errors import KdbFastError, SchemaError
from ..records import storable_key
from ..tables.hidden_rows import check_unfiltered
from ..tables.target import RECORDS, Dialect, Rows, Target, columns_of, find_target, rows_on

ENTITIES = "kdb_entity_definitions"
FIELDS = "kdb_field_definitions"
TABLES = (ENTITIES, FIELDS, RECORDS)
"""What KameleonDB makes in every database."""

TEXT_TYPES = frozenset({"string", "text"})
"""Field types that are embedded by default."""

MAX_NAMES_SHOWN = 10
"""Entity names in a message; more would hide the message."""


class Field(NamedTuple):
    """One active field: ``name`` is what users see, ``column`` where it is stored (a rename keeps it)."""

    name: str
    column: str
    type: str


class Place(NamedTuple):
    """A table that holds records of an entity.

    Attributes:
        table: Its name.
        entity_id: The entity's id where the table is shared by all entities, else None.
        without: A table whose ids do not count here.
        columns: Columns of a dedicated table; None where the fields are in one JSON column ``data``.
    """

    table: str
    entity_id: str | None = None
    without: str | None = None
    columns: frozenset[str] | None = None

    def stored(self, fields: Sequence[Field]) -> list[Field]:
        """The fields that this place can hold: one added after materialising has no column."""
        return [field for field in fields if self.columns is None or field.column in self.columns]


class Storage(NamedTuple):
    """Where KameleonDB keeps the records of an entity.

    Attributes:
        id: Its key in ``kdb_entity_definitions``.
        active: False when the entity was dropped: none of its records exists any more.
        mode: ``dedicated`` where its records were moved to a table of their own, else ``shared``.
        table: That table.
    """

    id: str
    name: str
    active: bool = True
    mode: str = "shared"
    table: str | None = None

    @property
    def dedicated(self) -> bool:
        return self.mode == "dedicated"

    def places(self, columns: frozenset[str]) -> tuple[Place, ...]:
        """Every table that may hold live records.

        Materialising moves the records to a dedicated table, but KameleonDB 0.2 goes on inserting into
        the shared one, so both are read. A record that is in both counts once, as the dedicated table
        has it (both hold it for a moment while it is moved).

        Args:
            columns: The dedicated table's columns; empty if it does not exist.
        """
        if self.table is None or not columns:
            return (Place(RECORDS, self.id),)
        return (Place(self.table, columns=columns), Place(RECORDS, self.id, without=self.table))

    def missing(self, target: Target) -> SchemaError:
        """The error that says that the dedicated table does not exist."""
        return SchemaError(
            f"Entity {storable_key(self.name)!r} is stored in table {target.shown(self.table)!r}, "
            "which does not exist; expected KameleonDB's dedicated table.",
            remedy="Was it dropped, or moved to another schema than its records? Name other entities to go on.",
        )


@dataclass(frozen=True)
class Entity:
    """One entity, with its active fields in definition order and the columns of its dedicated table (empty without)."""

    storage: Storage
    fields: tuple[Field, ...] = ()
    columns: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        return self.storage.id

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def active(self) -> bool:
        return self.storage.active

    @property
    def text_fields(self) -> tuple[Field, ...]:
        """The fields that are embedded, in definition order."""
        return tuple(field for field in self.fields if field.type in TEXT_TYPES)

    @functools.cached_property
    def places(self) -> tuple[Place, ...]:
        """Every table that may hold live records; a record that is in several is as the first has it."""
        return self.storage.places(self.columns)


def load_entities(rows: Rows, target: Target) -> list[Entity]:
    """All entities that KameleonDB has defined here, dropped ones too, by name; [] in a database without its tables."""
    return [] if missing_tables(rows, target) else _entities(rows, target)


def active_entities(address: DatabaseAddress) -> frozenset[str]:
    """Names of the entities of KameleonDB in a database; none where it has not its tables."""

    def work(connection: Any) -> frozenset[str]:
        rows = rows_on(connection, address.dialect)
        with explained(address.display):
            entities = load_entities(rows, find_target(rows, address.dialect))
        return frozenset(entity.name for entity in entities if entity.active)

    return read(address, work)


def missing_tables(rows: Rows, target: Target) -> list[str]:
    """Those of KameleonDB's tables that do not exist."""
    found = columns_of(rows, target, TABLES)
    return [name for name in TABLES if name not in found]


def _entities(rows: Rows, target: Target) -> list[Entity]:
    storages: dict[str, Storage] = {}
    fields: dict[str, list[Field]] = {}
    for name, column, kind, *stored in rows(
        # KameleonDB orders fields by created_at alone. Those tied in it come as it finds them, through its index on
        # (entity_id, name): on SQLite always, on PostgreSQL as long as the planner has no other idea.
        f"SELECT f.name, f.column_name, f.field_type, {_STORAGE} "  # noqa: S608
        f"FROM {target.table(ENTITIES)} e LEFT JOIN {target.table(FIELDS)} f ON f.entity_id = e.id AND f.is_active "
        "ORDER BY f.created_at, f.name",
        {},
    ):
        storage = _storage(*stored)
        storages[storage.id] = storage
        if name is not None:
            fields.setdefault(storage.id, []).append(Field(name, column, kind))
    tables = {storage.table for storage in storages.values() if storage.active and storage.table}
    columns = columns_of(rows, target, sorted(tables)) if tables else {}
    return [
        Entity(storage, tuple(fields.get(storage.id, ())), columns.get(storage.table or "", frozenset()))
        for storage in sorted(storages.values(), key=lambda storage: str(storage.name))
    ]


def storage_of(rows: Rows, target: Target, *, key: str, value: str) -> Storage | None:
    """Where the entity's records are now; None where there is no such entity.

    Args:
        key: ``id`` or ``name``, of which ``value`` is looked for.
    """
    statement = f"SELECT {_STORAGE} FROM {target.table(ENTITIES)} e WHERE e.{key} = "  # noqa: S608
    statement += "%(value)s" if target.dialect == "postgresql" else ":value"
    found = rows(statement, {"value": value})
    return _storage(*found[0]) if found else None


_STORAGE = "e.id, e.name, e.is_active, e.storage_mode, e.dedicated_table_name"


def _storage(entity_id: str, name: str, active: object, mode: str, table: str | None) -> Storage:
    return Storage(entity_id, name, bool(active), mode, (table or None) if mode == "dedicated" else None)


def required_fields(rows: Rows, target: Target, entity_id: str) -> frozenset[str]:
    """Names of the active fields of an entity that must have a value."""
    statement = f"SELECT name, is_required FROM {target.table(FIELDS)} WHERE is_active AND entity_id = "  # noqa: S608
    statement += "%(id)s" if target.dialect == "postgresql" else ":id"
    return frozenset(name for name, required in rows(statement, {"id": entity_id}) if required)


@dataclass(frozen=True)
class Catalog:
    """All active entities by name, the names of dropped ones, and where their tables are."""

    entities: Mapping[str, Entity]
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
        rows = rows_on(connection, dialect)
        with explained(display):
            if target is None:
                target = find_target(rows, dialect)
            if missing := missing_tables(rows, target):
                schema = "" if target.schema is None else f", schema {storable_key(target.schema)}"
                raise SchemaError(
                    f"There are no KameleonDB tables in {display}{schema}: found no {' and no '.join(missing)}; "
                    f"expected {', '.join(TABLES)}.",
                    remedy="Is --db the right database? For records in a file, name it with --from; for any other "
                    "table: --table.",
                )
            entities = _entities(rows, target)
        active = {entity.name: entity for entity in entities if entity.active}
        return cls(active, frozenset(entity.name for entity in entities if not entity.active), target)

    def check_fields(self, connection: Any, display: str) -> None:
        """Raise SchemaError where this role may not see every field of the entities that it sees.

        A text made of some of its fields would replace the whole one, and a record whose fields are all hidden would
        look as if its text had been emptied.
        """
        rows = rows_on(connection, self.target.dialect)
        with explained(display):
            check_unfiltered(rows, self.target, (FIELDS,), "the text of a record is made of all fields")

    def select(self, names: Sequence[str] = ()) -> tuple[Entity, ...]:
        """The named entities in that order, each once; all by name if none is named.

        Raises:
            SchemaError: An entity is unknown or dropped, or its dedicated table does not exist.
        """
        chosen = []
        for name in dict.fromkeys(names) if names else self.entities:
            entity = self.entities.get(name)
            if entity is None:
                raise self._unknown(name)
            if entity.storage.dedicated and not entity.columns:
                raise entity.storage.missing(self.target)
            chosen.append(entity)
        return tuple(chosen)

    def _unknown(self, name: str) -> SchemaError:
        import difflib

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


@contextlib.contextmanager
def explained(display: str) -> Iterator[None]:
    """The driver's errors while KameleonDB's tables are read become errors of kdb-fast.

    What each means is said in :mod:`kdb_fast.db.pg_errors` and :mod:`kdb_fast.db.sqlite_errors`; of a refusal this says
    more: the tables are not KameleonDB's, or may not be read.

    Args:
        display: The database's address as it may be printed.
    """
    try:
        yield
    except sqlite3.Error as error:
        if sqlite_errors.primary_code(error) == sqlite3.SQLITE_ERROR:
            raise SchemaError(f"{display} is not as KameleonDB makes it: {error}.") from error
        raise sqlite_errors.explain(error, f"reading {display}") from error
    except Exception as error:
        if isinstance(error, KdbFastError) or pg_errors.kind_of(error) is None:
            raise
        state, detail = pg_errors.sqlstate(error), pg_errors.primary_message(error)
        if state == pg_errors.NO_RIGHT:
            raise SchemaError(
                f"Not allowed to read {display}: {detail}.",
                remedy="Grant the user SELECT on KameleonDB's tables (kdb_…).",
            ) from error
        if state and pg_errors.kind_of(error) is ErrorKind.REFUSED:
            raise SchemaError(f"{display} is not as KameleonDB makes it: {detail}.") from error
        raise pg_errors.explain(f"reading {display}", error) from error
