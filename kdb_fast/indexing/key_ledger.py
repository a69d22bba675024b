"""Of the records of one key the newest wins: which are on their way, and which of them are outdated.

Shards are filled in any order, so an older record may come to its flush after a newer one. What holds then:

* A record is outdated only by one **that can be stored**: what the model cannot embed does not erase an earlier
  text. So what counts is the newest record of the key that has a vector, not the newest that was read.
* What is known of a key is kept **while a record of it is on its way**, and no longer: memory does not grow with the
  table. Once none is on its way, the index holds the newest one, and a flush compares with it.
* Flushes are written one after another, so of two records of a key in different flushes the later one stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..accounting import Counts, Fate
from ..records import Key

SEEN_KEYS = 2_000_000
"""Keys of a file that are remembered to count superseded records exactly: at most about 200 MB. Beyond it
the last record of a key still wins; only the split between stored and superseded is no longer exact."""


class KeyLedger:
    """The records on their way, by key.

    Args:
        counts: Where fates are counted.
        unique_keys: No key comes twice. Nothing is remembered then.
    """

    def __init__(self, counts: Counts, *, unique_keys: bool = False) -> None:
        self.unique_keys = unique_keys
        self._counts = counts
        # Records on their way. A key is in _latest only while it is in here.
        self._in_flight: dict[Key, int] = {}
        self._repeated = 0  # keys with several
        # The sequence number of the newest record that can be stored. It is noted only where it outdates another.
        self._latest: dict[Key, int] = {}
        self.being_written: set[Key] = set()
        """Keys in the flush that is being written: the index may already differ from what was looked up."""
        # How the last record of a key ended, by the key's hash: a newer one makes it superseded.
        self._seen: dict[int, Fate] = {}

    @property
    def has_repeated(self) -> bool:
        """Whether several records of one key are on their way: else a new vector outdates nothing."""
        return self._repeated > 0

    def __contains__(self, key: Key) -> bool:
        """Whether a record of the key is on its way."""
        return key in self._in_flight

    def begin(self, key: Key) -> bool:
        """A record of the key is on its way, until it is settled. Returns whether an earlier one is, too."""
        if self.unique_keys:
            return False
        earlier = self._in_flight.get(key, 0)
        self._in_flight[key] = earlier + 1
        if earlier == 1:
            self._repeated += 1
        return earlier > 0

    def has_vector(self, key: Key, sequence: int) -> None:
        """The record read as number ``sequence`` can be stored: older ones of its key are outdated."""
        # The only one of its key needs no note: one that is read later has a greater number.
        if self._in_flight.get(key, 0) > 1:
            self._latest[key] = max(sequence, self._latest.get(key, 0))

    def outdate(self, key: Key, sequence: int) -> None:
        """All records of the key that were read before number ``sequence`` are outdated, as it has been emptied, or
        the index holds the newest one already."""
        if key in self._in_flight:
            self._latest[key] = sequence

    @property
    def has_outdated(self) -> bool:
        """Whether :meth:`is_outdated` can be true for any record."""
        return bool(self._latest)

    def is_outdated(self, key: Key, sequence: int) -> bool:
        """Whether a newer record of the key can be stored."""
        return self._latest.get(key, 0) > sequence

    def settle(self, keys: Sequence[Key], fate: Fate) -> None:
        """Count how records ended that were on their way: one of each key, or several."""
        self._counts.add(fate, len(keys))
        if self.unique_keys:
            return
        in_flight = self._in_flight
        written = fate is Fate.STORED or fate is Fate.REUSED
        for key in keys:
            if written:
                self._replace(key, fate)
            left = in_flight[key] - 1
            if left:
                in_flight[key] = left
                if left == 1:
                    self._repeated -= 1
            else:
                del in_flight[key]
                self._latest.pop(key, None)

    def unchanged(self, key: Key, sequence: int) -> None:
        """Count a record that is stored already. It was never on its way, but older ones of its key may be."""
        self._counts.unchanged += 1
        if not self.unique_keys:
            if key in self._in_flight:
                self._latest[key] = sequence
            self._replace(key, Fate.UNCHANGED)

    def record_keys(self, keys: Sequence[Key]) -> Sequence[Key]:
        """The keys of the records that rows with these keys are of."""
        return keys

    def reject_as(self, key: Key, content_hash: bytes) -> tuple[Key, bytes]:
        """Key and hash of the text under which a row is kept that is rejected."""
        return key, content_hash

    def removed(self, keys: Iterable[Key]) -> None:
        """The rows of these keys have left the index: what was counted of them is superseded."""
        for key in keys:
            earlier = self._seen.pop(hash(key), None)
            if earlier is not None:
                self._counts.supersede(earlier)

    def writing(self, keys: Iterable[Key]) -> None:
        """These keys are in the flush that is being written."""
        self.being_written.update(keys)

    def written(self) -> None:
        """The flush has been committed."""
        self.being_written = set()

    def _replace(self, key: Key, fate: Fate) -> None:
        """The row of the key is this record's now, and no longer that of an earlier record of this run."""
        fingerprint = hash(key)
        earlier = self._seen.get(fingerprint)
        if earlier is not None:
            self._counts.supersede(earlier)
        if earlier is not None or len(self._seen) < SEEN_KEYS:
            self._seen[fingerprint] = fate
