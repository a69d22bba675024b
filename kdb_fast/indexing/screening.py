"""Which records can be stored at all. Pure: told here, the others cost no embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..faults import fault
from ..records import Record, Reject, content_hash, cut_content
from ..tables.kdb_search import KEY
from ..tables.key import KeyColumn, unfit_for, unheld

Fit = tuple[Record, bytes, int]
"""A record that can be stored, the SHA-256 of its text, and its number in the order of reading."""


class Screen:
    """Keeps back what the index can never hold.

    Args:
        encoding: That of the index.
        missing_characters: Which characters in texts the index cannot hold; None where it holds all.
        columns: Of the key.
    """

    def __init__(
        self,
        encoding: str = "UTF8",
        missing_characters: Callable[[Iterable[str]], frozenset[str]] | None = None,
        columns: Sequence[KeyColumn] = KEY,
    ) -> None:
        self._encoding, self._missing_characters, self._columns = encoding, missing_characters, columns
        self._unfit = unfit_for(columns)

    def sort(self, items: Sequence[Record | Reject], sequence: int) -> tuple[list[Fit], list[Reject]]:
        """The fit records, with texts cut to what is stored; and the others.

        Args:
            items: Records, and what the source has rejected.
            sequence: Number of the one that was read before the first.
        """
        fault("pipeline.classify")
        fit: list[Fit] = []
        rejects: list[Reject] = []
        missing = self._missing(items)
        for item in items:
            sequence += 1
            if isinstance(item, Reject):
                rejects.append(item)
                continue
            problem = self._unfit(item)
            if problem is None and missing:
                problem = unheld(item, self._columns, missing, self._encoding)
            if problem is not None:
                digest = content_hash(item.content) if isinstance(item.content, str) else b""
                rejects.append(Reject(item.key, *problem, digest, item.position))
                continue
            content = cut_content(item.content)
            if content is not item.content:
                item = item._replace(content=content)
            fit.append((item, content_hash(content), sequence))
        return fit, rejects

    def _missing(self, items: Sequence[Record | Reject]) -> frozenset[str]:
        """Those of the texts' and keys' characters that the index cannot hold."""
        if self._missing_characters is None:
            return frozenset()
        records = (item for item in items if isinstance(item, Record))
        return self._missing_characters(v for r in records for v in (*r.key, r.content) if isinstance(v, str))
