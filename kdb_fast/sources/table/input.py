"""What a run reads of a table, view or query: from the description of its target to an open source."""

from __future__ import annotations

from dataclasses import dataclass

from ...db.address import DatabaseAddress
from ...tables.definition import Definition
from ..base import PAGE_ROWS
from ..reader import Reader
from .select import check_rows, select
from .source import TableSource


@dataclass(frozen=True)
class TableInput:
    """The rows that a target is made from.

    Attributes:
        definition: Says what is read.
        limit: Read at most so many records.
        address: Where it is read, if not where the vectors are written; running.
        page_rows: Most rows of a page.
        anew: It has not been read so before: an expression is tried on every row, before anything is written.
    """

    definition: Definition
    limit: int | None = None
    address: DatabaseAddress | None = None
    page_rows: int = PAGE_ROWS
    anew: bool = False

    def open(self, address: DatabaseAddress) -> TableSource:
        """The source, found fit to be read.

        Args:
            address: The database of the vectors, running.

        Raises:
            SchemaError: No such table or column, no key, no right, or an expression that cannot be read.
            UsageError: The description makes no sense.
            DatabaseError: The database cannot be reached.
        """
        elsewhere = self.address is not None
        reader = Reader(self.address or address, only_read=elsewhere)
        try:
            selection = select(reader, self.definition)
            if self.anew:
                check_rows(reader, selection, self.definition.text, self.limit)
            return TableSource(reader, selection, self.limit, elsewhere=elsewhere, page_rows=self.page_rows)
        except BaseException:
            reader.close()
            raise
