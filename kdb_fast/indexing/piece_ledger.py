"""Records in pieces: each ends once, as whatever the worst of its pieces does.

A record's pieces come to their flushes in any order, and into any number of them. It is stored when the last of them
is, in whose flush the store makes all of them visible at once; so counts are of records, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..accounting import Counts, Fate
from ..records import Key
from ..tables.pieces import piece_of, record_key
from .key_ledger import KeyLedger

BEST_FIRST = (Fate.REUSED, Fate.STORED, Fate.SUPERSEDED, Fate.REJECTED)
"""A record of which one piece was embedded is not reused, and one of which a piece is missing is not stored."""


@dataclass
class _Open:
    """A record whose pieces are on their way: how many, how many have no vector yet, how many have not ended, and the
    worst end so far."""

    count: int
    without_vector: int
    left: int
    fate: Fate = Fate.REUSED


class PieceLedger(KeyLedger):
    """The records on their way; a row is a piece of one, and has a piece's key.

    Args:
        counts: Where fates are counted, and the pieces of what is stored.
    """

    def __init__(self, counts: Counts) -> None:
        super().__init__(counts)
        self._open: dict[int, _Open] = {}
        self._rejected: set[int] = set()

    @property
    def has_repeated(self) -> bool:
        """Every vector counts: a record can be stored when the last of its pieces has one."""
        return True

    @property
    def has_outdated(self) -> bool:
        return bool(self._rejected) or super().has_outdated

    def begin_pieces(self, key: Key, revision: int, count: int) -> None:
        """The pieces of a record are on their way."""
        self.begin(key)
        self._open[revision] = _Open(count, count, count)

    def has_vector(self, key: Key, sequence: int) -> None:
        record = self._open[sequence]
        record.without_vector -= 1
        if not record.without_vector:
            super().has_vector(record_key(key), sequence)

    def is_outdated(self, key: Key, sequence: int) -> bool:
        """Whether a newer record can be stored, or this one cannot since another of its pieces cannot."""
        return sequence in self._rejected or super().is_outdated(record_key(key), sequence)

    def settle(self, keys: Sequence[Key], fate: Fate) -> None:
        for key in keys:
            revision = piece_of(key).revision
            record = self._open[revision]
            record.left -= 1
            record.fate = max(record.fate, fate, key=BEST_FIRST.index)
            if record.fate is Fate.REJECTED:
                self._rejected.add(revision)
            if not record.left:
                del self._open[revision]
                self._rejected.discard(revision)
                if record.fate in (Fate.STORED, Fate.REUSED):
                    self._counts.chunks += record.count
                super().settle([record_key(key)], record.fate)

    def record_keys(self, keys: Sequence[Key]) -> list[Key]:
        return [record_key(key) for key in keys]

    def reject_as(self, key: Key, content_hash: bytes) -> tuple[Key, bytes]:
        return record_key(key), piece_of(key).content_hash
