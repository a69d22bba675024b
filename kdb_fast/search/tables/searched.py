"""A target as a search reads it: where its vectors are, what is known of each, and where texts and columns come from.

Both kinds of targets are one here. What is known of a row's vector (the model that made it, and the vector's hash) lies
in a table by the key, which for a table of vectors is that table itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ...tables.column_target import VectorColumn
from ...tables.definition import Definition
from ...tables.key import KeyColumn
from ...tables.target import Dialect, Target, identifier


@dataclass(frozen=True)
class SearchedTable:
    """A target as a search reads it. Names that are SQL already are quoted; those that the catalogue is asked for are
    as ``to_regclass()`` reads them, on SQLite as they are.

    Attributes:
        definition: What its owner asked for.
        home: Where our own tables are.
        identity: Under which its runs are kept.
        shown: The table of the vectors, for a message.
        vectors: The table of the vectors, as SQL.
        vectors_regclass: The same, to ask the catalogue.
        key: Its key.
        vector: The column of the vectors.
        state: The table of what is known of each vector, as SQL.
        state_regclass: The same, to ask the catalogue.
        state_key: Template of a column of the key there: ``key_{number}`` or ``{column}``.
        fingerprint: The column of the model there, as SQL.
        seal: The column of the vector's SHA-256 there, as SQL.
        source: What is read, as an item of FROM; the table of the vectors where that is it, or where there is nothing
            else in this database.
        source_regclass: The same, to ask the catalogue; '' for a query.
        text: SQL expression of a record's text over the columns of ``source``; '' where the text is stored with its
            vector, in ``content``.
        vec0: SQLite: the table of the vectors is one of sqlite-vec, whose rowid is the key.
        full_text: SQLite: the table for keyword search, as SQL.
        chunked: A record has a row for each piece of its text.
    """

    definition: Definition
    home: Target
    identity: str
    shown: str
    vectors: str
    vectors_regclass: str
    key: tuple[KeyColumn, ...]
    vector: VectorColumn
    state: str
    state_regclass: str
    state_key: str
    fingerprint: str
    seal: str
    source: str
    source_regclass: str
    text: str
    vec0: bool = False
    full_text: str = ""
    chunked: bool = False

    @property
    def name(self) -> str:
        """Under which it is kept."""
        return self.definition.name

    @property
    def dialect(self) -> Dialect:
        return self.home.dialect

    @property
    def beside(self) -> bool:
        """Whether the vectors are in a table of their own, beside what is read."""
        return self.source != self.vectors

    @functools.cached_property
    def embedding(self) -> str:
        """The column of the vectors, as SQL."""
        return self.column(self.vector.name)

    def column(self, name: str) -> str:
        """A column for a statement."""
        return identifier(name, self.dialect)

    def same_key(self, left: str, right: str) -> str:
        """The condition that two rows have the same key, by the table's own operators.

        Args:
            left: Template of a column of the key, such as ``t.{column}`` or ``x.kdb_fast_{number}``.
            right: Template of what it is compared with, such as ``k.kdb_fast_{number}::{type}``.
        """
        return " AND ".join(
            f"{self._filled(left, number, key)} {key.equals} {self._filled(right, number, key)}"
            for number, key in enumerate(self.key, 1)
        )

    def each_key(self, template: str) -> str:
        """The template for each column of the key (``{number}``, ``{column}``, ``{type}``), with commas between."""
        return ", ".join(self._filled(template, number, key) for number, key in enumerate(self.key, 1))

    def _filled(self, template: str, number: int, key: KeyColumn) -> str:
        return template.format(number=number, column=self.column(key.name), type=key.type)
