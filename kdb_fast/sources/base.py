"""What a source of records must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol, Self

from ..db.address import DatabaseAddress
from ..records import Key, Record, Reject
from ..tables.known_rows import KnownRows
from ..tables.target import LiveRows

PAGE_ROWS = 1000
"""Records of one page: one query by key, some hundred kilobytes."""


class Input(Protocol):
    """What a run is to read."""

    def open(self, address: DatabaseAddress) -> Source:
        """The source, to be closed by the caller.

        Args:
            address: The database of the index, running.

        Raises:
            KdbFastError: One of its subclasses: it cannot be read.
        """


class Source(ABC):
    """A stream of records in pages. Memory does not grow with the number of records.

    Attributes:
        live_rows: Which rows of the index have a live record, if the source lists every live record of its entities:
            the other rows may then be removed (:meth:`kdb_fast.stores.base.Store.prune`).
        unique_keys: No key occurs twice.
        reads_again: :meth:`read_again` works.
        input: Name of what is read, if reading it again gives the same records or corrected ones; '' if it does not.
        empty: Records read so far that have no text at all; KameleonDB does not index these.
    """

    live_rows: LiveRows | None = None
    unique_keys = False
    reads_again = False
    empty = 0
    input = ""

    def open(self, address: DatabaseAddress) -> Self:
        """Itself: a source is an :class:`Input` that is open already."""
        return self

    @property
    def complete(self) -> bool:
        """Whether the source lists every live record of its entities."""
        return self.live_rows is not None

    @property
    @abstractmethod
    def entities(self) -> tuple[str, ...]:
        """Names of the entities that this source reads."""

    @abstractmethod
    def estimate(self) -> int | None:
        """About how many records there are, or None if that cannot be known cheaply."""

    @abstractmethod
    def pages(self) -> Iterator[list[Record | Reject]]:
        """The records, about PAGE_ROWS at a time, each page read by a query of its own.

        What cannot be a record (a broken line, an unusable key) is in its place as a Reject.
        """

    def sample(self, rows: int) -> list[str]:
        """Contents of up to ``rows`` records, of every entity. Called before :meth:`pages`, which gives these too."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Close files and connections."""

    def take_empty(self) -> list[Key]:
        """Keys of the records without text that were read since the last call.

        They are not in any page; an index row they may still have is to be removed. Call it after each page.
        """
        return []

    def skip_unchanged(self, known: KnownRows) -> None:  # noqa: B027 - not every source can
        """From here on, only count the rows that need nothing (:meth:`take_unchanged`) instead of giving them as
        records. Called before :meth:`pages`, where what is written lies in the database that is read. A source that
        cannot tell gives them all."""

    def take_unchanged(self) -> int:
        """How many rows that need nothing were read since the last call; they are in no page. Call it after each page,
        which may be empty."""
        return 0

    def read_again(self, keys: Sequence[Key]) -> list[Record | Reject]:
        """The records of these keys as they are now, for those that have changed since they were read.

        One that has no text any more comes by :meth:`take_empty` instead; one that is gone does not come.
        """
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """What the user should know after all was read, such as a file that changed meanwhile."""
        return []

    def changed(self) -> bool:
        """After all was read: whether the input was changed meanwhile, so that records may have been missed."""
        return False
