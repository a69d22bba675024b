"""Equal texts are embedded once."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

from ..embedding.vector_cache import VectorCache
from ..engine.sharding import text_bytes
from .leases import Numbered


class Placement(Enum):
    """Where a row's vector comes from."""

    NEW = 1
    """Its text must be embedded."""
    WAITING = 2
    """An equal text is on its way to a worker."""
    CACHED = 3
    """An equal text was embedded not long ago."""


NEW, WAITING, CACHED = Placement  # for every row: to look up a member of the class takes 70 ns


class TextReuse:
    """Rows whose text equals another's: those that wait for its vector, and those whose vector is there.

    A text is in one of three states: unknown, on its way (from the row that :meth:`place` called NEW until
    :meth:`filled`), or in the cache. A row whose vector is there pins it, so that the cache may go on.

    Args:
        dimensions: Of the vectors.
    """

    def __init__(self, dimensions: int) -> None:
        self.waiting = 0
        """Rows that wait for an equal text."""
        self.ready: list[Numbered] = []
        """Rows whose vector is there, in the order in which they got it. Each has a pin in the cache."""
        self._cache = VectorCache(dimensions)
        # None for a text for which no other row waits: a list for every text would cost more than the few needed.
        self._on_the_way: dict[bytes, list[Numbered] | None] = {}

    def place(self, numbered: Numbered) -> Placement:
        """Take in a row; one that is NEW is the caller's to have embedded."""
        digest = numbered[2]
        if digest in self._cache:
            self._make_ready(numbered)
            return CACHED
        if digest not in self._on_the_way:
            self._on_the_way[digest] = None
            return NEW
        rows = self._on_the_way[digest]
        if rows is None:
            rows = self._on_the_way[digest] = []
        rows.append(numbered)
        self.waiting += 1
        return WAITING

    def place_new(self, rows: Sequence[Numbered]) -> bool:
        """Take in rows whose texts are unknown, and differ: all are NEW. Where that is not so, nothing is done."""
        texts = dict.fromkeys([digest for _, _, digest in rows])
        if len(texts) < len(rows) or not self._on_the_way.keys().isdisjoint(texts) or not self._cache.has_none(texts):
            return False
        self._on_the_way.update(texts)
        return True

    def filled(
        self, hashes: Sequence[bytes], vectors: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8]
    ) -> list[tuple[list[Numbered], int]]:
        """Texts have been embedded, or were found unfit.

        Args:
            hashes: Of the texts.
            vectors: float32, as many × dimensions.
            codes: 0, or why a text is unfit.

        Returns:
            The rows that waited for a text, and its code, for each for which some did. Those of code 0 are ready.
        """
        self._cache.put(hashes, vectors)
        waited: list[tuple[list[Numbered], int]] = []
        for i, digest in enumerate(hashes):
            rows = self._on_the_way.pop(digest, None)
            if rows:
                self.waiting -= len(rows)
                waited.append((rows, int(codes[i])))
                if not codes[i]:
                    for numbered in rows:
                        self._make_ready(numbered)
        for i in codes.nonzero()[0].tolist():
            self._cache.drop(hashes[i])
        return waited

    def take(self, rows: int, blob_bytes: int) -> list[Numbered]:
        """The first ready rows, as many as fit a slot of so many rows and bytes of text; at least one if there is."""
        count = size = 0
        for row, _, _ in self.ready[:rows]:
            size += text_bytes(row)
            if size > blob_bytes and count:
                break
            count += 1
        taken, self.ready = self.ready[:count], self.ready[count:]
        return taken

    def vector(self, digest: bytes) -> npt.NDArray[np.float32]:
        """The vector (float32, dimensions) of a row that was taken; to be asked for once for each."""
        return self._cache.take(digest)

    def forget_waiting(self) -> None:
        """What is on its way and was not given to a worker is not embedded any more."""
        self._on_the_way, self.waiting = {}, 0

    def _make_ready(self, numbered: Numbered) -> None:
        self.ready.append(numbered)
        self._cache.pin(numbered[2])
