"""From a page of records to the window: what is unfit, unchanged, or equal to another text goes its own way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..accounting import Counts
from ..engine.sharding import WINDOW_ROWS, shard_numbers
from ..errors import KdbFastError
from ..ipc.row_block import ROW_NOT_ENCODABLE, ROW_REASONS
from ..ipc.slab import Row, SlabShape
from ..records import Key, Record, Reject, content_hash, was_cut
from ..sources.base import PAGE_ROWS
from ..stores.base import Answer, Found, Store, Stored
from ..tables.pieces import PieceOf, piece_key
from .flushing import FlushPlanner
from .key_ledger import KeyLedger
from .leases import Numbered
from .piece_ledger import PieceLedger
from .screening import Fit, Screen
from .text_reuse import CACHED, NEW, TextReuse

TAKEN_ROWS = 128
"""Records that are taken in (1 ms) before the writer and the workers are looked at again: they wait that long."""

TAKEN_CHARS = 1_000_000
"""Characters of a portion of a page whose texts are cut into pieces, about: 1,500 pieces of 200 tokens."""

Split = Callable[[str], Sequence[tuple[int, int]]]
"""Cuts a text: first and last character (exclusive) of each piece, of which there is one at least."""

ReadAgain = Callable[[list[Key]], list[Record | Reject]]
"""Gives the records of these keys as they are now."""

FIRST_WINDOW_ROWS = 1000
"""Of the first window, so that the workers begin soon; each one is twice as large as the one before it."""

IN_FLIGHT_VERSION = 1
"""Version of a row that an earlier record of this run is about to write: no other program's row has it."""


class Screened(NamedTuple):
    """Records that were read together: how many, those that can be stored, and the others."""

    read: int
    fit: list[Fit]
    rejects: list[Reject]


class Page(NamedTuple):
    """What a source gives at a time.

    Attributes:
        items: Records, and what the source has rejected.
        emptied: Keys of records that have no text any more.
        passed_over: How many records the source knows to be unchanged.
        looked_up: The records and what the index holds for them, where that was looked up ahead.
    """

    items: Sequence[Record | Reject]
    emptied: Sequence[Key] = ()
    passed_over: int = 0
    looked_up: tuple[Screened, Found] | None = None


class Intake:
    """Takes in records, and gives each its number in the order of reading.

    Args:
        store: For look-ups.
        screen: Tells which records can be stored.
        counts: Where what ends here is counted.
        ledger: Told of every record that is on its way.
        reuse: Asked whether a text is known.
        flushes: Given what is rejected, and the keys that leave the index.
        fingerprint: Of the model, to tell which rows are unchanged.
        read_chars: Characters of a text beyond which the model reads nothing.
        force: No row is unchanged.
        split: Cuts a text into the pieces that become rows in its place; ``ledger`` is one of pieces then.
    """

    def __init__(
        self,
        store: Store,
        screen: Screen,
        counts: Counts,
        ledger: KeyLedger,
        reuse: TextReuse,
        flushes: FlushPlanner,
        *,
        fingerprint: str,
        read_chars: int,
        force: bool = False,
        split: Split | None = None,
    ) -> None:
        self.window: list[Numbered] = []
        """Rows to be embedded, in the order of reading."""
        self._store, self._screen, self._counts = store, screen, counts
        self._ledger, self._reuse, self._flushes = ledger, reuse, flushes
        self._fingerprint, self._read_chars, self._force = fingerprint, read_chars, force
        self._split, self._sequence = split, 0
        self._goal = FIRST_WINDOW_ROWS
        self._again = False
        self._was_empty: bool | None = None  # before the first record was looked up

    @functools.cached_property
    def rows_at_start(self) -> int:
        """Rows of the index, to be asked for before anything is written: to count a million takes half a second."""
        return self._store.count()

    @property
    def waiting(self) -> int:
        """Rows in the window, and those that wait for an equal text: a file of one text repeated must not pile up."""
        return len(self.window) + self._reuse.waiting

    @property
    def is_full(self) -> bool:
        """Whether the window is large enough to be cut."""
        return self.waiting >= self._goal

    def widen(self) -> None:
        """The next window may be larger."""
        self._goal = min(WINDOW_ROWS, 2 * self._goal)

    def cut(self, shape: SlabShape, shard_chars: int, *, keep_part: bool) -> list[list[Numbered]]:
        """The window becomes shards of similar length.

        Args:
            shape: Of the slab that they must fit.
            shard_chars: Most characters of a shard that are read.
            keep_part: A last shard that is not full stays in the window.
        """
        window, self.window = self.window, []
        shards = [
            [window[number] for number in numbers]
            for numbers in shard_numbers(
                [row for row, _, _ in window],
                shard_rows=shape.rows,
                shard_chars=shard_chars,
                blob_bytes=shape.blob_bytes,
                read_chars=self._read_chars,
            )
        ]
        # Rows that wait for an equal text must not pile up behind one that is not embedded.
        if keep_part and self._reuse.waiting < len(shards[-1]) < shape.rows:
            self.window = shards.pop()
        return shards

    def look_ahead(self, pages: Iterable[Page]) -> Generator[Page]:
        """The pages, to be taken in. While the database looks for the records of one, the next is read and hashed.

        What a record is compared with must not have been looked up before an earlier record of its key was written. So
        where a key may come twice, each part of a page is looked up when it is taken in.
        """
        if not self._ledger.unique_keys:
            for page in pages:
                yield from self._portions(page)
            return
        asked: list[tuple[Page, Screened, Answer]] = []  # one at most
        try:
            for page in pages:
                screened = self._screened(page.items)
                # Nothing is on its way while a page is taken in: the store may be asked for other things then.
                while asked:
                    yield _looked_up(*asked.pop())
                found = self._look_up(screened.fit)
                if isinstance(found, Found):
                    yield _looked_up(page, screened, found)
                else:
                    asked.append((page, screened, found))
            while asked:
                yield _looked_up(*asked.pop())
        finally:
            for _, _, answer in asked:  # the run ends with an error, and the store must be free to note it
                with contextlib.suppress(Exception):
                    answer()

    def take_in(self, page: Page) -> Iterator[None]:
        """Take in a page in parts; gives control back after each, and at least once."""
        self._sequence += page.passed_over
        self._counts.read += page.passed_over
        self._counts.unchanged += page.passed_over
        for (read, fit, rejects), found in [page.looked_up] if page.looked_up else self._looked_up(page.items):
            self._counts.read += read
            self._counts.rejected += len(rejects)
            for reject in rejects:
                self._flushes.reject(reject)
            if found.unchanged:
                fit = self._without_unchanged(fit, found.unchanged)
            for first in range(0, max(1, len(fit)), TAKEN_ROWS):
                self._take(fit[first : first + TAKEN_ROWS], found.rows)
                yield
        self._take_out(page.emptied)

    def read_again(self, keys: list[Key], again: ReadAgain, emptied: Callable[[], list[Key]]) -> Iterator[Page]:
        """Pages of records whose rows other programs write.

        From here on each record is looked up. One that is gone is superseded.

        Args:
            again: Gives the records of these keys as they are now.
            emptied: Asked after each page for the keys of records read with it that have no text.
        """
        self._again = True
        for part in (keys[i : i + PAGE_ROWS] for i in range(0, len(keys), PAGE_ROWS)):
            page, empty = again(part), emptied()
            self._counts.gone(len(part) - len(page) - len(empty))
            yield Page(page, empty)

    def _portions(self, page: Page) -> Iterator[Page]:
        """The page; where texts are cut into pieces, in portions of about TAKEN_CHARS, so that these do not pile up."""
        portion: list[Record | Reject] = []
        chars = 0
        for item in page.items if self._split else ():
            if chars >= TAKEN_CHARS:
                yield Page(portion)
                portion, chars = [], 0
            portion.append(item)
            chars += len(item.content) if isinstance(item, Record) else 0
        yield page._replace(items=portion if self._split else page.items)

    def _take_out(self, keys: Sequence[Key]) -> None:
        """Records that have no text any more leave the index; what was read of them before is outdated."""
        for key in keys:
            self._sequence += 1
            self._ledger.outdate(key, self._sequence)
        self._flushes.delete(keys)

    def _looked_up(self, items: Sequence[Record | Reject]) -> Iterator[tuple[Screened, Found]]:
        """Parts of a page that are taken in at once, and what the index holds for each."""
        together = max(1, len(items) if self._ledger.unique_keys else TAKEN_ROWS)
        for start in range(0, max(1, len(items)), together):  # an empty page may bring deletes
            screened = self._screened(items[start : start + together])
            yield screened, _wait(self._look_up(screened.fit))

    def _screened(self, items: Sequence[Record | Reject]) -> Screened:
        fit, rejects = self._screen.sort(items, self._sequence)
        self._sequence += len(items)
        return Screened(len(items), fit, rejects)

    def _look_up(self, fit: list[Fit]) -> Found | Answer:
        """Look for what the index holds for the records' keys, or begin to."""
        if not fit:
            return Found()
        if self._was_empty is None:
            self._was_empty = self._store.is_empty()
        # Where the index was empty nothing needs looking up; a row that appears meanwhile meets the
        # unique constraint at the flush, which then decides row by row.
        if self._was_empty and self._ledger.unique_keys and not self._again:
            return Found()
        records = [record for record, _, _ in fit]
        # Of a key that comes twice the version of its row is wanted, too: a later record of it may differ.
        if self._force or self._split is not None or not self._ledger.unique_keys or self._again:
            return Found(self._store.lookup([record.key for record in records]))
        return self._store.compare(records, [digest for _, digest, _ in fit], self._fingerprint)

    def _without_unchanged(self, fit: list[Fit], places: Collection[int]) -> list[Fit]:
        """Count the records at these places, which are stored already; the others."""
        self._counts.unchanged += len(places)
        if self._flushes.has_deletes:
            for place in places:
                self._flushes.keep(fit[place][0].key)
        return [one for place, one in enumerate(fit) if place not in places] if len(places) < len(fit) else []

    def _take(self, fit: list[Fit], stored: Mapping[Key, Stored]) -> None:
        """Count what is unchanged; the rest goes to the window, or beside an equal text."""
        if not stored and self._ledger.unique_keys and self._split is None:
            self._take_new(fit)
            return
        ledger, being_written, may_leave = self._ledger, self._ledger.being_written, self._flushes.has_deletes
        for record, digest, sequence in fit:
            key = record.key
            found = stored.get(key)
            if (
                found is not None
                and (
                    (found.content_hash == digest and found.fingerprint == self._fingerprint and not self._force)
                    or found.foreign
                )
                and key not in being_written
            ):
                self._counts.foreign += found.foreign
                if may_leave:
                    self._flushes.keep(key)
                ledger.unchanged(key, sequence)
                continue
            # Here and not where it is embedded, so that it counts once, also where the model reads all that is left.
            self._counts.truncated += was_cut(record.content)
            if self._split is not None:
                self._take_pieces(record, digest, sequence, self._split)
                continue
            on_its_way = ledger.begin(key)
            if found is not None:
                row = Row(record, True, found.row_version)
            elif on_its_way:
                # A row of this run will be there: merging at once is cheaper than a conflict.
                row = Row(record, True, IN_FLIGHT_VERSION)
            else:
                row = Row(record)
            self._place((row, sequence, digest))

    def _take_new(self, fit: list[Fit]) -> None:
        """:meth:`_take` of records of which the index has none, and of which no other is on its way: most are looked at
        together, in half of the time."""
        self._counts.truncated += sum([was_cut(record.content) for record, _, _ in fit])
        rows = [(Row(record), sequence, digest) for record, digest, sequence in fit]
        if self._reuse.place_new(rows):
            self.window += rows
        else:
            for numbered in rows:
                self._place(numbered)

    def _place(self, numbered: Numbered) -> None:
        """To the window, or beside an equal text."""
        placement = self._reuse.place(numbered)
        if placement is NEW:
            self.window.append(numbered)
        elif placement is CACHED:
            row, sequence, _ = numbered
            self._ledger.has_vector(row.record.key, sequence)

    def _take_pieces(self, record: Record, digest: bytes, sequence: int, split: Split) -> None:
        """Each piece of the record goes its own way; a piece may equal another's, too."""
        assert isinstance(self._ledger, PieceLedger)
        try:
            pieces = split(record.content)
        except KdbFastError:
            raise
        except Exception:  # whatever a tokenizer raises for a text
            self._counts.rejected += 1
            reason = ROW_REASONS[ROW_NOT_ENCODABLE]
            self._flushes.reject(Reject(record.key, *reason, digest, record.position))
            return
        self._ledger.begin_pieces(record.key, sequence, len(pieces))
        for number, (start, end) in enumerate(pieces):
            piece = PieceOf(sequence, number, len(pieces), start, end, digest)
            content = record.content[start:end]
            row = Row(record._replace(key=piece_key(record.key, piece), content=content))
            self._place((row, sequence, content_hash(content)))


def _wait(found: Found | Answer) -> Found:
    return found if isinstance(found, Found) else found()


def _looked_up(page: Page, screened: Screened, found: Found | Answer) -> Page:
    return page._replace(looked_up=(screened, _wait(found)))
