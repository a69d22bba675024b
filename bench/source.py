"""Sources for kdb-fast whose records cost next to nothing to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from kdb_fast.records import Record, Reject
from kdb_fast.sources.base import PAGE_ROWS, Source

from . import data

ENTITY = "Bench"


class ListSource(Source):
    """Texts that are in memory already, like those of the contender it is compared with."""

    unique_keys = True

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    @property
    def entities(self) -> tuple[str, ...]:
        return (ENTITY,)

    def estimate(self) -> int:
        return len(self._texts)

    def sample(self, rows: int) -> list[str]:
        return list(islice(self._texts, rows))

    def pages(self) -> Iterator[list[Record | Reject]]:
        return _pages(self._texts)

    def close(self) -> None:
        pass


class FileSource(ListSource):
    """The first texts of a data set's file, read as they are needed: memory holds one page."""

    def __init__(self, path: Path | str, records: int) -> None:
        super().__init__(())
        self._path, self._records = path, records

    def estimate(self) -> int:
        return self._records

    def sample(self, rows: int) -> list[str]:
        return list(data.read(self._path, min(rows, self._records)))

    def pages(self) -> Iterator[list[Record | Reject]]:
        return _pages(data.read(self._path, self._records))


def _pages(texts: Iterable[str]) -> Iterator[list[Record | Reject]]:
    numbered = enumerate(texts)
    while page := list(islice(numbered, PAGE_ROWS)):
        yield [Record((ENTITY, str(number)), text) for number, text in page]
