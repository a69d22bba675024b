"""What all sources have in common that read a file: pages in its order, and what is said of it at the end."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ...errors import ResourceError
from ...records import Key, Record, Reject
from ..base import PAGE_ROWS, Source
from .opened_file import OpenedFile

PAGE_CHARS = 8 << 20
"""Characters of one page, about: long texts make smaller pages."""

HELD_PAGES = 16
"""Most pages that a sample keeps in memory: each holds at most PAGE_CHARS characters."""


SAMPLE_BYTES = 1 << 16
"""Start of a file that is read to estimate its number of records."""


def estimated(file: OpenedFile, count: Callable[[bytes], int]) -> int | None:
    """About how many records there are: exact for a file of at most SAMPLE_BYTES, else from its size and its beginning;
    None for a pipe.

    Args:
        count: The number of records in the beginning of a file.
    """
    if file.size is None:
        return None
    head = file.head(SAMPLE_BYTES)
    found = count(head)
    return found if len(head) >= file.size else max(1, round(found * file.size / len(head)))


class Emptied(NamedTuple):
    """Key of a record that has no text."""

    key: Key


class _Page(NamedTuple):
    """Records in the order of the input, and how often each key came without text: that counts after all of them."""

    items: list[Record | Reject]
    emptied: dict[Key, int]


class RecordFile(Source):
    """Records of a file, in its order.

    Args:
        file: What is read; closed with the source.
        limit: Stop after this many records, rejected ones included.
    """

    def __init__(self, file: OpenedFile, limit: int | None) -> None:
        self._file, self._limit = file, limit
        self.input = file.name
        self._held: deque[_Page] = deque()
        self._rest: Iterator[_Page] | None = None
        self._emptied: list[Key] = []

    @abstractmethod
    def _items(self) -> Iterator[Record | Reject | Emptied]:
        """The records one by one; called once."""

    def sample(self, rows: int) -> list[str]:
        """The first of the input, which may be a pipe: what was read is kept for :meth:`pages`."""
        if self._rest is None:
            self._rest = self._read()
        texts: list[str] = []
        while len(texts) < rows and len(self._held) < HELD_PAGES and (page := next(self._rest, None)):
            self._held.append(page)
            texts += [record.content for record in page.items if isinstance(record, Record)]
        return texts[:rows]

    def pages(self) -> Iterator[list[Record | Reject]]:
        """The records in the order of the input, bad ones as Rejects in their place.

        A page may be empty, when none of its records has text: call :meth:`take_empty` after each.

        Raises:
            UsageError: Standard input is not what was expected.
            ResourceError: Reading failed.
        """
        rest = self._rest or self._read()
        while page := self._held.popleft() if self._held else next(rest, None):
            self._emptied += page.emptied
            self.empty += sum(page.emptied.values())
            yield page.items

    def take_empty(self) -> list[Key]:
        taken, self._emptied = self._emptied, []
        return taken

    def _read(self) -> Iterator[_Page]:
        page = _Page([], {})
        read = size = 0
        try:
            for item in self._items():
                if isinstance(item, Emptied):
                    page.emptied[item.key] = page.emptied.get(item.key, 0) + 1
                elif page.emptied and item.key in page.emptied:
                    # It has text again: what is emptied leaves the index after its page.
                    yield page
                    page, size = _Page([item], {}), len(item[1])
                else:
                    page.items.append(item)
                    size += len(item[1])  # the content, or a reject's short reason
                read += 1
                if len(page.items) + len(page.emptied) >= PAGE_ROWS or size >= PAGE_CHARS or read == self._limit:
                    yield page
                    page, size = _Page([], {}), 0
                    if read == self._limit:
                        return
        except OSError as error:
            raise ResourceError(
                f"Reading {self._file.display} failed at about record {read + 1}: {error.strerror or error}.",
                remedy="What was committed is safe; the same command carries on.",
            ) from error
        if page.items or page.emptied:
            yield page

    def warnings(self) -> list[str]:
        """Says if the file was changed or replaced since it was opened."""
        if change := self._file.change:
            return [
                f"{self._file.display} {change} while it was read; run the command again to be sure of every record."
            ]
        return []

    def changed(self) -> bool:
        return bool(self._file.change)

    def close(self) -> None:
        self._file.close()
