"""What the formats have in common: rows, each with values by the names of its columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from ...records import Reject
from ..json_records import iter_json_items

Row = tuple[int, dict[str, Any] | Reject, bytes]
"""Number of the line, or row, where it begins; its values or why it has none; and the bytes that stand for it."""


class Rows(ABC):
    """The rows of a file, once.

    Attributes:
        columns: Names of the columns; None where each row has its own.
        total: How many rows there are; None where that is not known before they are read.
        only_text: Every value is text.
    """

    columns: tuple[str, ...] | None = None
    total: int | None = None
    only_text = False

    @abstractmethod
    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The rows in their order.

        Args:
            columns: Those that are needed; where there are :attr:`columns`, of these.

        Raises:
            OSError: Reading failed.
        """

    def close(self) -> None:
        """Close what was opened for it."""
        return None

    def texts(self) -> tuple[str, ...]:
        """Names of the columns that hold text."""
        return self.columns or ()

    def type_of(self, column: str) -> str:
        """What a column holds: ``text``, ``integer``, or the format's own name of another type."""
        return "text"


class JsonRows(Rows):
    """Objects of JSON Lines or of one JSON array."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        return iter_json_items(self._stream)
