"""A table, view or the like as the database's catalogue has it: what can be read, and what tells its rows apart."""

from __future__ import annotations

from dataclasses import dataclass

from .key import KeyColumn
from .target import Target


@dataclass(frozen=True)
class Column:
    """A column of a relation.

    Attributes:
        name: As the catalogue has it.
        type: As a cast writes it, whatever the session's search path; on SQLite as declared, '' for none.
        is_text: It holds text, and is read where nothing else is named.
        generated: The database computes it.
        not_null: It must hold a value.
        is_array: It holds several texts.
        collation: On SQLite of a column of a key, by which its texts are compared.
        value_type: The type as a cast writes it that leaves a value as long as it is.
    """

    name: str
    type: str
    is_text: bool = False
    generated: bool = False
    not_null: bool = False
    is_array: bool = False
    collation: str = ""
    value_type: str = ""


@dataclass(frozen=True)
class Relation:
    """What can be read.

    Attributes:
        schema: In PostgreSQL; on SQLite None, or the name of an attached database.
        name: As the catalogue has it.
        kind: ``table``, ``partitioned table``, ``view``, ``materialised view``, ``foreign table``, ``virtual table`` or
            ``query``.
        columns: In their order.
        keys: The columns of each unique constraint or index that holds for all rows; the primary key comes first.
        inherited: Other tables inherit from it, and have rows that its keys do not hold for.
    """

    schema: str | None
    name: str
    kind: str
    columns: tuple[Column, ...] = ()
    keys: tuple[tuple[KeyColumn, ...], ...] = ()
    inherited: bool = False

    @property
    def shown(self) -> str:
        """For a message; such that it can be copied into a statement."""
        return "the query" if self.kind == "query" else Target(self.schema).shown(self.name)

    @property
    def is_table(self) -> bool:
        """Its rows can be updated, and its unique indexes say what tells them apart."""
        return self.kind in ("table", "partitioned table")

    def column(self, name: str) -> Column | None:
        """The column of this name; SQLite compares names without case."""
        return next((column for column in self.columns if column.name == name), None) or next(
            (column for column in self.columns if self.schema is None and column.name.lower() == name.lower()), None
        )

    @property
    def regclass(self) -> str:
        """As the value of a parameter that PostgreSQL's ``to_regclass()`` reads."""
        return Target(self.schema).regclass(self.name)
