"""Vectors of texts embedded in this run, so that an equal text is embedded once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

CACHE_BYTES = 32 * 1024 * 1024
"""About 21,000 vectors of 384 dimensions: more than any window, and memory does not grow with the table."""


class VectorCache:
    """The last vectors, by content hash, in a ring of fixed size.

    A pinned vector is kept aside until it was taken as often as it was pinned, so the ring may go on.
    """

    def __init__(self, dimensions: int, cache_bytes: int = CACHE_BYTES) -> None:
        self.capacity = max(256, cache_bytes // (4 * dimensions))
        self._ring: npt.NDArray[np.float32] = np.empty((self.capacity, dimensions), dtype=np.float32)
        self._owner: list[bytes | None] = [None] * self.capacity
        self._at: dict[bytes, int] = {}
        self._next = 0
        self._pinned: dict[bytes, tuple[npt.NDArray[np.float32], int]] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._at or digest in self._pinned

    def has_none(self, digests: Iterable[bytes]) -> bool:
        """Whether none of them is in the cache."""
        return self._at.keys().isdisjoint(digests) and self._pinned.keys().isdisjoint(digests)

    def put(self, digests: Sequence[bytes], vectors: npt.NDArray[np.float32]) -> None:
        """Remember the rows of ``vectors`` (float32, n × dimensions) under their content hashes."""
        start = 0
        while start < len(digests):
            count = min(len(digests) - start, self.capacity - self._next)
            at = self._next
            self._ring[at : at + count] = vectors[start : start + count]
            part = digests[start : start + count]
            self._forget(at, at + count)
            self._owner[at : at + count] = part
            self._at.update(zip(part, range(at, at + count), strict=True))
            start += count
            self._next = (at + count) % self.capacity

    def _forget(self, start: int, stop: int) -> None:
        """These places are needed for others."""
        owners = self._owner[start:stop]
        if len(self._at) == self.capacity:  # each place is of another text
            deque(map(self._at.pop, owners), 0)  # type: ignore[arg-type]
            return
        for i, old in enumerate(owners, start):
            if old is not None and self._at.get(old) == i:
                del self._at[old]

    def pin(self, digest: bytes) -> None:
        """Keep this vector until :meth:`take`; it must be in the cache."""
        vector, uses = self._pinned.get(digest, (None, 0))
        if vector is None:
            vector = self._ring[self._at[digest]].copy()
        self._pinned[digest] = (vector, uses + 1)

    def take(self, digest: bytes) -> npt.NDArray[np.float32]:
        """The vector of a pinned digest (float32, dimensions); ends one pin."""
        vector, uses = self._pinned[digest]
        if uses == 1:
            del self._pinned[digest]
        else:
            self._pinned[digest] = (vector, uses - 1)
        return vector

    def drop(self, digest: bytes) -> None:
        """Forget a vector that turned out to be unusable."""
        self._at.pop(digest, None)
