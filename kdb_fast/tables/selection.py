"""Which rows are read, and what of each: the statements over a table, a view or a query of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records import MAX_CONTENT_BYTES
from .key import KeyColumn
from .names import qualified
from .relation import Relation
from .target import Dialect, Params, Rows, Target, identifier


@dataclass(frozen=True)
class Selection:
    """Rows with their keys and texts. It travels to the process that removes what is not among them.

    Attributes:
        dialect: Of the database.
        relation: What is read; of the kind ``query`` for a query.
        key: The columns by which rows are told apart.
        text: SQL expression of a row's text, see :func:`~kdb_fast.tables.text.text_expression`.
        filter: SQL condition; '' for all rows.
        query: The query.
        paged: The rows can be read in the order of the key by an index. Else they are read once, from their start to
            their end.
    """

    dialect: Dialect
    relation: Relation
    key: tuple[KeyColumn, ...]
    text: str
    filter: str = ""
    query: str = ""
    paged: bool = True

    @property
    def rows(self) -> str:
        """What stands after FROM, without a name."""
        if self.query:
            return f"({self.escaped(self.query)}\n)"
        return qualified(self.relation.schema, self.relation.name, self.dialect)

    def is_all_of(self, table: Relation) -> bool:
        """Whether these are all rows of a table."""
        own = self.relation
        return not (self.filter or self.query) and (own.schema, own.name) == (table.schema, table.name)

    def source(self, join: str = "", *conditions: str) -> str:
        """What stands after FROM: the rows as ``t``, and the conditions.

        Args:
            join: To be written after the rows.
            conditions: More than the filter.
        """
        found = [f"({self.escaped(self.filter)}\n)"] if self.filter else []
        where = " AND ".join((*found, *conditions))
        return f"{self.rows} t {join}" + (f" WHERE {where}" if where else "")

    @property
    def selected(self) -> str:
        """The columns of the key as they travel, and the text."""
        return f"{self.selected_key}, {self.text_as_text}"

    @property
    def selected_key(self) -> str:
        """The columns of the key as they travel."""
        return ", ".join(self.keys_as("{}::text" if self.dialect == "postgresql" else "{}"))

    @property
    def text_as_text(self) -> str:
        """The text of a row, as a value that is text; what is kept of none (:func:`~kdb_fast.records.cut_content`) need
        not be sent. (``left()`` looks at each character: 1.1 µs for 200 of them, the cast only where there are too
        many.)"""
        text = self.escaped(self.text)
        # SQLite's functions end a text at a NUL, which makes it a bad one.
        return (
            f"({text})::text::varchar({MAX_CONTENT_BYTES})"
            if self.dialect == "postgresql"
            else f"CAST(({text}) AS text)"
        )

    @property
    def order(self) -> str:
        """What stands after ORDER BY: the order of the keys' own index."""
        if self.dialect == "sqlite":
            return ", ".join(self._compared)
        return ", ".join(f"{c} USING {k.less}" for c, k in zip(self._compared, self.key, strict=True))

    def after(self, params: Sequence[str]) -> str:
        """The condition that a row comes after a key.

        Args:
            params: Placeholders of the key's parts.
        """
        columns, greater = self._compared, [key.greater for key in self.key]
        values = [
            f"{p}::{k.type}" if self.dialect == "postgresql" else p for p, k in zip(params, self.key, strict=True)
        ]
        if len(set(greater)) == 1:
            if len(columns) == 1:
                return f"{columns[0]} {greater[0]} {values[0]}"
            # One comparison of rows is looked up in the index as a whole.
            return f"({', '.join(columns)}) {greater[0]} ({', '.join(values)})"
        condition = ""
        for column, key, value in reversed(list(zip(columns, self.key, values, strict=True))):
            later = f"{column} {key.greater} {value}"
            condition = f"({later} OR ({column} {key.equals} {value} AND {condition}))" if condition else later
        return condition

    def same(self, template: str) -> str:
        """The condition that a row has a key.

        Args:
            template: Of the parts of the key: ``{number}``, ``{column}`` and ``{type}`` are filled in.
        """
        return " AND ".join(
            f"{column} {key.equals} "
            + template.format(number=number, column=identifier(key.name, self.dialect), type=key.type)
            for number, (column, key) in enumerate(zip(self._compared, self.key, strict=True), 1)
        )

    def keys_as(self, template: str) -> list[str]:
        """Each column of the key in a template with ``{}``."""
        return [template.format(f"t.{identifier(key.name, self.dialect)}") for key in self.key]

    @property
    def _compared(self) -> list[str]:
        return [f"t.{identifier(key.name, self.dialect)}{self._collated(key)}" for key in self.key]

    def _collated(self, key: KeyColumn) -> str:
        """Where the index has another collation than the column: SQLite looks up no rows by one that is named."""
        if self.dialect == "postgresql":
            return f" COLLATE {self.escaped(key.collation)}" if key.collation else ""
        column = self.relation.column(key.name)
        own = column.collation if column else ""
        return "" if key.collation.upper() == own.upper() else f" COLLATE {identifier(key.collation, 'sqlite')}"

    @property
    def can_be_null(self) -> bool:
        """Whether a row may have no key: the columns of a unique index may be NULL, in SQLite even those of a primary
        key that is not the number of the row."""
        rowid = self.dialect == "sqlite" and len(self.key) == 1 and not self.key[0].collation
        columns = [self.relation.column(key.name) for key in self.key]
        return not rowid and not all(column is not None and column.not_null for column in columns)

    def escaped(self, sql: str) -> str:
        """SQL of the user's for a statement that has parameters."""
        return sql.replace("%", "%%") if self.dialect == "postgresql" else sql

    def __call__(self, rows: Rows, target: Target, entity: str, params: Params) -> str:
        """The condition that the row ``s`` of a table of vectors still has a row here: see
        :data:`~kdb_fast.tables.target.LiveRows`. Its key has the columns of this one."""
        if self.dialect == "sqlite" and not self.paged:
            # Asked once, and not for every row.
            own = ", ".join(f"s.{identifier(key.name, self.dialect)}" for key in self.key)
            return f"({own}) IN (SELECT {self.selected_key} FROM {self.source()})"  # noqa: S608
        return f"EXISTS (SELECT 1 FROM {self.source('', self.same('s.{column}'))})"  # noqa: S608
