"""A search index as a target: a table whose rows are ours to insert, update and delete.

Its state lies in columns of the row (:mod:`kdb_fast.stores.base` says which), that other programs leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from .key import KeyColumn


@dataclass(frozen=True)
class IndexTable:
    """Name and shape of a search index.

    Attributes:
        name: Of the table.
        key: Its key columns: of a unique constraint.
        schema: In PostgreSQL the schema of the table; None for that of KameleonDB's records, where our own tables are.
        id: Column of a row's own id, of 36 characters.
        text: Column of the text.
        vector: Column of the vector.
        model: Column of the name of the model that made the vector.
        dimensions: Column of its length.
        created_at: Column of when the row was made.
        updated_at: Column of when it was last written, by whatever program: the version of the row.
        tsvector: In PostgreSQL the column for keyword search.
    """

    name: str
    key: tuple[KeyColumn, ...]
    schema: str | None = None
    id: str = "id"
    text: str = "content"
    vector: str = "embedding"
    model: str = "model"
    dimensions: str = "dimensions"
    created_at: str = "created_at"
    updated_at: str = "updated_at"
    tsvector: str = "tsv"

    @property
    def names(self) -> None:
        """It is KameleonDB's index, which needs no name."""
        return

    @property
    def full_text(self) -> str:
        """In SQLite the table for keyword search."""
        return f"{self.name}_fts"

    @property
    def vector_index(self) -> str:
        """Name of the index of the vectors, in PostgreSQL."""
        return f"ix_{self.name}_vector"

    @property
    def text_index(self) -> str:
        """Name of the index for keyword search, in PostgreSQL."""
        return f"ix_{self.name}_fts"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that such a table must have."""
        key = (column.name for column in self.key)
        return (self.id, *key, self.text, self.vector, self.model, self.dimensions, self.created_at, self.updated_at)
