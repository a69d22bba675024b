"""What both databases' inserters share: new rows of one entity go into the table that KameleonDB has for its records.

A page is one transaction. A row that the database refuses is found by halving within savepoints and left out;
the others are stored.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, NamedTuple

from ...catalog.definitions import Catalog, Entity, explained, required_fields, storage_of
from ...catalog.records import SYSTEM_COLUMNS
from ...db.address import DatabaseAddress
from ...errors import SchemaError
from ...records import storable_key
from ...tables.target import Dialect, rows_on
from .field_values import FieldRule


class NewRow(NamedTuple):
    """A record that is to be inserted: its new id, and its fields as :meth:`Inserter.fields` gives them."""

    record_id: str
    fields: tuple[Any, ...]


class Refusal(NamedTuple):
    """Why the database did not take a row; ``detail`` is one sentence without the row's text."""

    reason: str
    detail: str


class Outcome(NamedTuple):
    """What became of a page: ``created_at`` and ``updated_at`` of its rows, and the refused rows by record id."""

    at: datetime
    refused: dict[str, Refusal]


class RowRefusedError(Exception):
    """The data of a row is at fault."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclass(frozen=True)
class Column:
    """A column of a dedicated table, as the database declares it; see :class:`FieldRule` for the limits."""

    not_null: bool
    has_default: bool
    max_chars: int | None = None
    bounds: tuple[int, int] | None = None


class Inserter(ABC):
    """Inserts new records into one entity's table; owns one connection.

    The table is the dedicated one of a materialised entity, else ``kdb_records``.

    Args:
        address: The database, running.
        entity: Name of the entity.

    Attributes:
        definition: The entity as KameleonDB defines it.
        rules: What its fields must be, by name.

    Raises:
        SchemaError: The entity is unknown, or its table cannot be inserted into.
        DatabaseError: The database cannot be reached.
    """

    dialect: ClassVar[Dialect]

    def __init__(self, address: DatabaseAddress, entity: str, created_by: str | None = None) -> None:
        self._address = address
        self._created_by = created_by
        self._connection: Any = None
        self._connect()
        try:
            catalog = Catalog.load(self._connection, self.dialect, address.display)
            self._target = catalog.target
            (self.definition,) = catalog.select([entity])
            catalog.check_fields(self._connection, address.display)
            self._place = self.definition.places[0]
            self._table, self._shared = self._place.table, self._place.columns is None
            with explained(address.display):
                required = required_fields(self._rows, self._target, self.definition.id)
                columns = None if self._shared else self._declared()
                self._check_rights()
            self.rules = _rules(self.definition, required, columns)
            # After a rename, a new field of the old name shares its column; as in KameleonDB, the later value stays.
            self._types = {rule.column: rule.type for rule in self.rules.values() if rule.stored}
            self._check_unfilled(columns or {})
        except BaseException:
            self.close()
            raise

    def fields(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The fields of a row, from checked values by column: one JSON text, or a value for each column.

        Raises:
            RecursionError: A value is nested too deeply to be written.
        """
        if self._shared:
            # The text is the one that KameleonDB's SQLAlchemy writes.
            return (json.dumps(values),)
        result = []
        for column, kind in self._types.items():
            value = values.get(column)
            if value is not None:
                if kind == "datetime":
                    value = self._moment(value)
                elif kind == "json" or isinstance(value, (dict, list)):
                    value = json.dumps(value)
            result.append(value)
        return tuple(result)

    @abstractmethod
    def insert(self, rows: Sequence[NewRow]) -> Outcome:
        """Insert rows in one transaction and commit it.

        Args:
            rows: New rows; their ids occur nowhere else.

        Raises:
            SchemaError: The entity was dropped or moved meanwhile, or a right is lacking.
            DatabaseError: The database was lost and did not come back.
            ResourceError: The disk is full.
        """

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    # -- one transaction -------------------------------------------------------------------------------

    def _insert_all(self, rows: Sequence[NewRow]) -> Outcome:
        """Within a transaction."""
        self._check_definition()
        outcome = Outcome(datetime.now(UTC), {})
        self._store(rows, outcome)
        return outcome

    def _store(self, rows: Sequence[NewRow], outcome: Outcome) -> None:
        """Store all rows or, where the database refuses one, halve until the refused ones stand alone."""
        if not rows:
            return
        try:
            with self._savepoint():
                self._write(rows, outcome.at)
        except RowRefusedError as error:
            if len(rows) == 1:
                outcome.refused[rows[0].record_id] = error.refusal
                return
            middle = len(rows) // 2
            self._store(rows[:middle], outcome)
            self._store(rows[middle:], outcome)

    def _check_definition(self) -> None:
        """Within the transaction: the entity must still be where it was."""
        storage = self.definition.storage
        found = storage_of(self._rows, self._target, key="id", value=storage.id)
        if found is None or found._replace(name=storage.name) != storage:
            raise SchemaError(
                f"The entity {storable_key(storage.name)} was dropped or moved to another table meanwhile.",
                remedy="See how it is defined now, and whether all its records are there.",
            )

    def _check_unfilled(self, columns: Mapping[str, Column]) -> None:
        unfilled = [
            storable_key(name)
            for name, column in columns.items()
            if column.not_null and not column.has_default and name not in self._types and name not in SYSTEM_COLUMNS
        ]
        if unfilled:
            raise SchemaError(
                f"The table {storable_key(self._table)} needs a value in {', '.join(unfilled)}, "
                f"which is no active field of {storable_key(self.definition.name)}.",
                remedy="Allow NULL there, or give the column a default.",
            )

    def _rows(self, statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return rows_on(self._connection, self.dialect)(statement, params)

    # -- what differs between the dialects -------------------------------------------------------------

    @abstractmethod
    def _connect(self) -> None: ...

    @abstractmethod
    def _query(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of a query with %s for its parameters."""

    @abstractmethod
    def _declared(self) -> dict[str, Column]:
        """The columns of the dedicated table by name."""

    @abstractmethod
    def _check_rights(self) -> None:
        """Raises SchemaError where inserting is not allowed."""

    @abstractmethod
    def _moment(self, text: str) -> Any:
        """A time of ISO 8601 form as a value for a dedicated table."""

    @abstractmethod
    def _savepoint(self) -> contextlib.AbstractContextManager[Any]: ...

    @abstractmethod
    def _write(self, rows: Sequence[NewRow], at: datetime) -> None:
        """Write all rows. Raises RowRefusedError if the data of one of them is at fault."""


def _rules(definition: Entity, required: frozenset[str], columns: Mapping[str, Column] | None) -> dict[str, FieldRule]:
    """The rules of all active fields by name; ``columns`` is None where the fields are in one JSON column."""
    rules = {}
    for field in definition.fields:
        must = field.name in required
        if columns is None:
            rules[field.name] = FieldRule(field.name, field.column, field.type, must)
            continue
        column = columns.get(field.column)
        if column is None:
            rules[field.name] = FieldRule(field.name, field.column, field.type, must, stored=False)
            continue
        must = must or (column.not_null and not column.has_default)
        rules[field.name] = FieldRule(field.name, field.column, field.type, must, column.max_chars, column.bounds)
    return rules
