"""A table with a key of its own: what a target that is such a table has in common with one that is a column of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .key import KeyColumn
from .names import qualified
from .target import Target, identifier


@dataclass(frozen=True)
class KeyedTable:
    """A table with its key.

    Attributes:
        name: Under which what is known of it is kept.
        home: Where our own tables are.
        schema: Of the table; None on SQLite.
        table: The table.
        key: The columns of a unique index, by which a row is found again.
    """

    name: str
    home: Target
    schema: str | None
    table: str
    key: tuple[KeyColumn, ...]

    @property
    def shown(self) -> str:
        """The table, for a message."""
        return Target(self.schema).shown(self.table)

    @property
    def regclass(self) -> str:
        """The table as the value of a parameter that ``to_regclass()`` reads."""
        return Target(self.schema).regclass(self.table)

    @property
    def quoted(self) -> str:
        """The table for a statement."""
        return qualified(self.schema, self.table, self.home.dialect)

    def column(self, name: str) -> str:
        """A column for a statement."""
        return identifier(name, self.home.dialect)

    def same_key(self, left: str, right: str) -> str:
        """The condition that two rows have the same key, by the table's own operators.

        Args:
            left: Template of a column of the key with its type, such as ``t.{column}`` or ``st.key_{number}``.
            right: Template of what it is compared with, such as ``k.key_{number}::{type}``.
        """
        return " AND ".join(
            " ".join((self._filled(left, number, key), key.equals, self._filled(right, number, key)))
            for number, key in enumerate(self.key, 1)
        )

    def each_key(self, template: str) -> str:
        """The template for each column of the key (``{number}``, ``{column}``, ``{type}``), with commas between."""
        return ", ".join(self._filled(template, number, key) for number, key in enumerate(self.key, 1))

    def _filled(self, template: str, number: int, key: KeyColumn) -> str:
        return template.format(number=number, column=self.column(key.name), type=key.type)

    @functools.cached_property
    def parts(self) -> dict[str, str]:
        """What stands in the templates of :meth:`statement` for this table."""
        return {"table": self.quoted}

    def statement(self, template: str, **parts: str) -> bytes:
        """A statement with its names filled in: those of :attr:`parts`, those given, and those of
        :meth:`.target.Target.statement`."""
        return self.home.statement(template, **{**self.parts, **parts})
