"""PostgreSQL: a table whose vectors are searched through indexes."""

from __future__ import annotations

from dataclasses import dataclass

from ...tables.names import qualified
from ...tables.target import Target


@dataclass(frozen=True)
class Indexed:
    """A table whose vectors are indexed.

    Attributes:
        home: Where our own tables are; under its name it is remembered what was dropped.
        schema: Of the table.
        table: Its name.
        vector: Name of the column of the vectors. Only indexes of this column are touched,
        texts: and GIN indexes of these, for keyword search.
        standard: It is to have KameleonDB's two indexes, whatever its size, and no invalid one.
        concurrently: Indexes are built without holding its writers up; that takes longer, and waits for whatever
            transaction there is.
    """

    home: Target
    schema: str
    table: str
    vector: str
    texts: tuple[str, ...] = ()
    standard: bool = False
    concurrently: bool = False

    @classmethod
    def of_search_table(cls, target: Target) -> Indexed:
        """KameleonDB's, or one of its shape."""
        index = target.index
        texts = (index.text, index.tsvector)
        return cls(target, target.index_schema, index.name, index.vector, texts, standard=True)

    @property
    def shown(self) -> str:
        """The table, for a message."""
        return Target(self.schema).shown(self.table)

    @property
    def regclass(self) -> str:
        """The table as the value of a parameter that ``to_regclass()`` reads."""
        return Target(self.schema).regclass(self.table)

    @property
    def qualified(self) -> str:
        """The table for a statement."""
        return qualified(self.schema, self.table, "postgresql")
