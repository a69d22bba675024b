"""What a store must do. PostgreSQL and SQLite implement it; each process opens its own.

The state of a record lives in its row of the search table, in four columns that KameleonDB ignores:

``kdb_fast_fingerprint``  fingerprint of the model that made the vector
``kdb_fast_run``          number of the run that wrote the row
``kdb_fast_at``           equals ``updated_at`` as long as nobody else has written the row (see :mod:`..tables.seal` for
                          tables whose triggers set ``updated_at``)
``kdb_fast_source_at``    when the record was last changed at its source, as read by that run

A record is unchanged when the stored content is the same, the fingerprint is the same, the embedding is
there and ``kdb_fast_at = updated_at``. The content itself is compared (by SHA-256), not a copy of its
hash, so an edit by another program can never look unchanged.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..ipc.row_block import NO_VALUE
from ..records import KeptReject, Key, Record, Reject
from ..tables.column_target import ColumnTarget
from ..tables.index_policy import IndexOutcome, IndexPolicy
from ..tables.index_table import IndexTable
from ..tables.kdb_search import KDB_SEARCH
from ..tables.key import KeyColumn
from ..tables.known_rows import KnownRows
from ..tables.table_target import TableTarget
from ..tables.target import LiveRows, Target

if TYPE_CHECKING:
    from ..ipc.row_block import RowBlock


class Stored(NamedTuple):
    """The index's row for a key, as the parent saw it.

    ``row_version`` is its version (an opaque int64); ``content_hash`` is SHA-256 of the stored content;
    ``fingerprint`` is None unless kdb-fast wrote the row and nobody has changed it since. ``foreign``: it holds a
    vector of another program, which is left alone.
    """

    content_hash: bytes
    fingerprint: str | None
    row_version: int
    foreign: bool = False


class Found(NamedTuple):
    """The index's rows for some keys: those that differ from what is wanted, by key; of those that do not, maybe only
    the places of their keys, from 0."""

    rows: Mapping[Key, Stored] = MappingProxyType({})
    unchanged: Collection[int] = ()


Answer = Callable[[], Found]
"""Waits for what a look-up finds that has begun. To be called once, before anything else is asked of the store."""


def version_of_text(content_hash: bytes | None) -> int:
    """Version of a row that has no other than its text; NO_VALUE where there is none."""
    if content_hash is None:
        return NO_VALUE
    number = int.from_bytes(content_hash[:8], "little", signed=True)
    return number if number != NO_VALUE else 0


TargetTable = IndexTable | ColumnTarget | TableTarget
"""Where the vectors of a run go: rows of an index, a column of the user's table, or a table of vectors beside it."""


class RunSpec(NamedTuple):
    """What identifies a run in every row it writes, what it writes to, and what it may do with the indexes there."""

    number: int
    fingerprint: str
    model: str
    dimensions: int
    target: TargetTable = KDB_SEARCH
    indexes: IndexPolicy = IndexPolicy.DEFER


class FlushSlot(NamedTuple):
    """Rows of one block to write: all but ``skip``. ``crcs`` are (start, stop, CRC-32 of the vectors) as the worker
    saw them."""

    slot: RowBlock
    skip: frozenset[int]
    crcs: tuple[tuple[int, int, int], ...] = ()

    def verify(self) -> None:
        """Called by a store just before it packs the vectors.

        Raises:
            RuntimeError: They are not what the worker wrote.
        """
        for start, stop, crc in self.crcs:
            if self.slot.checksum(start, stop) != crc:
                raise RuntimeError(f"vectors {start}:{stop} of slot {self.slot.number} are not what the worker wrote")


class FlushResult(NamedTuple):
    """What became of a flush.

    ``bytes`` are those of texts and vectors as written; ``superseded`` are (slot, row) that another program has changed
    meanwhile, ``rejected`` (slot, row, reason, detail) that the database refused.
    """

    rows: int = 0
    bytes: int = 0
    deleted: int = 0
    superseded: tuple[tuple[int, int], ...] = ()
    rejected: tuple[tuple[int, int, str, str], ...] = ()

    def plus(self, other: FlushResult) -> FlushResult:
        """What became of both parts of a flush."""
        return FlushResult(
            self.rows + other.rows,
            self.bytes + other.bytes,
            self.deleted + other.deleted,
            self.superseded + other.superseded,
            self.rejected + other.rejected,
        )

    def as_json(self) -> str:
        """How the row of the run keeps it, for a flush whose outcome was not heard of."""
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> FlushResult:
        rows, size, deleted, superseded, rejected = json.loads(text)
        return cls(rows, size, deleted, tuple(map(tuple, superseded)), tuple(map(tuple, rejected)))


class EntityStatus(NamedTuple):
    """Counts of one entity. ``pending`` is None where the source is not in this database."""

    entity: str
    indexed: int
    pending: int | None
    stale: int
    rejected: int
    last_updated: datetime | None


class Store(ABC):
    """One connection to the search index. Not shared between processes or threads.

    Every method raises :class:`~kdb_fast.errors.DatabaseError` when the database is lost for good.
    """

    dialect: str
    default_index = IndexPolicy.DEFER
    """What is done with the indexes of the vectors where nothing else is asked for."""
    on_wait: Callable[[str], None]
    """Called with what is being waited for, before each pause."""
    in_pieces = False
    """A row is a piece of a record (:mod:`..tables.pieces`). A flush then deletes before it writes, since a record may
    be written by a later one than that of its first piece."""
    encoding: str = "UTF8"
    """What the database keeps texts in, as PostgreSQL names it; any but UTF8 holds some characters only."""

    @property
    def key(self) -> tuple[KeyColumn, ...]:
        """The columns of a record's key."""
        return self.target.index.key

    @property
    def target(self) -> Target:
        """Where the tables are."""
        return Target()

    def missing_characters(self, texts: Iterable[str]) -> frozenset[str]:
        """The characters in ``texts`` that this database cannot hold; a record with one would be refused."""
        return frozenset()

    @abstractmethod
    def prepare(self, dimensions: int, wait: float = 0.0) -> tuple[str, ...]:
        """Check the search tables and create what is missing; alter nothing that KameleonDB owns.

        Args:
            dimensions: Length of the vectors to come.
            wait: Seconds to wait for a run that is going on, where our own tables are to be changed.

        Returns:
            What the user should know of it.

        Raises:
            LockedError: That run is still going on.
            SchemaError: Extension missing, table of another shape, another dimension, or no right to write.
        """

    def column_dimensions(self) -> int | None:
        """Length that the vector column is declared with; None where there is no table or no such rule."""
        return None

    @abstractmethod
    def begin_run(self, *, fingerprint: str, model: str, dimensions: int, wait: float) -> RunSpec:
        """Take the lock and record the run. Raises LockedError if another run holds it after ``wait`` seconds."""

    @abstractmethod
    def after_a_crash(self, run: int) -> bool:
        """Whether a run before this one died, and none has been done since: a text may have killed it."""

    @abstractmethod
    def heartbeat(self, run: int, phase: str) -> None:
        """Say that the run is alive; never blocks for long and never raises for a busy database."""

    @abstractmethod
    def end_run(self, run: int, state: str, receipt: dict[str, Any]) -> None:
        """Release the lock and store the receipt; ``state`` is done, stopped or failed."""

    def known_rows(self, fingerprint: str) -> KnownRows | None:
        """How a query over the table that is written tells which of its rows a run with this fingerprint leaves as
        they are; None where no query can."""
        return None

    def forecast(self, run: RunSpec, rows: int | None = None) -> tuple[str, ...]:
        """What a run will do to the table that its owner should know before anything is embedded.

        Args:
            rows: Records that will be read, where that is known.
        """
        return ()

    def build_outlook(self, rows: int, dimensions: int) -> tuple[str, ...]:
        """What the owner should know before an index of so many vectors is built."""
        return ()

    def altered(self, run: int) -> list[str]:
        """Warnings about rows of a run that are not stored as they were written: a trigger changes them."""
        return []

    @abstractmethod
    def count(self) -> int:
        """Rows with a vector that is written or, in an index, all rows."""

    def is_empty(self) -> bool:
        """Whether :meth:`count` is 0."""
        return not self.count()

    @abstractmethod
    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        """The index's rows for these keys, by key as it was given; keys without a row are left out."""

    def compare(self, records: Sequence[Record], hashes: Sequence[bytes], fingerprint: str) -> Found | Answer:
        """Look up the index's rows for the keys of these records, of which none comes twice, or begin to.

        Args:
            records: Fit ones. With its text and the fingerprint a row need not be sent.
            hashes: SHA-256 of the text of each.
            fingerprint: Of the model.
        """
        return Found(self.lookup([record.key for record in records]))

    @abstractmethod
    def flush(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
    ) -> FlushResult:
        """Write rows, rejects and deletions in one transaction.

        Flush ``number`` of a run is written at most once: repeated after an unknown outcome, the result
        of the first time is returned. A row that the database refuses is found by halving and returned
        in ``rejected`` (and stored in the rejects table); the others are written.

        Raises:
            LockedError: The run no longer holds the lock: another one has taken it over.
        """

    @property
    def has_vector_index(self) -> bool:
        """Whether there is an index of the vectors, so that each row which is written costs more."""
        return False

    def check_index(self, policy: IndexPolicy) -> tuple[str, ...]:
        """Find out before a run whether what was asked for could be done with the indexes.

        Returns:
            What the user should know of it.

        Raises:
            SchemaError: This role may not build them again.
        """
        return ()

    @abstractmethod
    def drop_index(self) -> IndexOutcome:
        """Drop the vector index (and full-text index) before a large load; remembers how to build it again."""

    @abstractmethod
    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        """Build whatever the table should have and has not, and refresh planner statistics.

        Args:
            beat: Called with what is being done.
            run: The run whose vectors are indexed; None where nothing has been written.
        """

    @abstractmethod
    def prune(self, entity: str, live_rows: LiveRows) -> int:
        """Remove rows of an entity that have no live record; returns how many.

        Args:
            live_rows: Says which rows do; asked again in every transaction that removes some.

        Raises:
            HiddenRowsError: A record that is not seen may be there all the same; nothing was removed.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection; what was not committed is rolled back by the database."""

    @abstractmethod
    def rejects(self, entity: str | None = None) -> Iterable[KeptReject]:
        """Rows of the rejects table, newest run first."""

    @abstractmethod
    def forget_older_rejects(self, entities: Sequence[str], run: int) -> int:
        """Delete rejects of records of these entities by runs before ``run``; how many."""

    @abstractmethod
    def forget_rejects_of_input(self, entity: str | None, name: str, run: int) -> int:
        """Delete rejects by runs before ``run`` whose receipt names this input, of an entity or all; how many."""

    @abstractmethod
    def clear_rejects(self, keys: Iterable[Key] | None = None, entity: str | None = None) -> int:
        """Delete rejects, all or those of the given keys or of an entity; returns how many."""


class IndexStore(Store):
    """A store of a search index, whose rows the library writes, too: it has the newest text, and holds no run."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[None]:
        """One transaction around several :meth:`upsert` calls; an exception rolls all of it back."""

    @abstractmethod
    def upsert(self, run: RunSpec, slots: Sequence[FlushSlot], deletes: Sequence[Key], *, vectors: bool = True) -> None:
        """Write rows whatever the index holds for their keys, then delete; within :meth:`transaction`.

        What is written is no longer rejected.

        Args:
            run: Number 0; fingerprint, model and dimensions go into the rows.
            vectors: False writes rows without embedding, model and dimensions (keyword search only).

        Raises:
            RecordError: The database refuses a row, which is named; nothing of the transaction is kept.
        """
