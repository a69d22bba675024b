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
    """

    name: str
    type: str
    is_text: bool = False
    generated: bool = False
    not_null: bool = False


@dataclass(frozen=True)
class Relation:
    """What can be read.

    Attributes:
        schema: In PostgreSQL; on SQLite None, or the name of an attached database.
        name: As the catalogue has it.
        kind: ``table``, ``partitioned table``, ``view``, ``materialised view``, ``foreign table`` or ``virtual table``.
        columns: In their order.
        keys: The columns of each unique constraint or index that holds for all rows; the primary key comes first.
    """

    schema: str | None
    name: str
    kind: str
    columns: tuple[Column, ...] = ()
    keys: tuple[tuple[KeyColumn, ...], ...] = ()

    @property
    def shown(self) -> str:
        """For a message; such that it can be copied into a statement."""
        return Target(self.schema).shown(self.name)

    @property
    def regclass(self) -> str:
        """As the value of a parameter that PostgreSQL's ``to_regclass()`` reads."""
        return Target(self.schema).regclass(self.name)
