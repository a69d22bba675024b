"""SQLite: runs and their lock, a flush in one transaction, rejects; alike for all that is written.

What is written says how its rows are: :mod:`.index_store`, :mod:`.column_store`, :mod:`.table_store`.
"""

from __future__ import annotations

import contextlib
import sqlite3
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ...db.sqlite_errors import translated
from ...db.sqlite_session import transaction
from ...faults import fault
from ...records import KeptReject, Key, Reject
from ...tables.index_policy import IndexAction, IndexOutcome, IndexPolicy
from ...tables.target import Target
from ..base import FlushResult, FlushSlot, RunSpec, Store
from ..rejects import refused
from . import rejects as sqlite_rejects
from . import runs as sqlite_runs
from .flush import RowWriter

CACHE_KIB = 4 * 1024
"""Page cache of our own connection, in KiB: the inner pages of the indexes of a million rows. Looking up 100,000 keys
in order reads as many pages with 2 MiB as with 16."""

FLUSH_CACHE_KIB = 96 * 1024
"""… and during a flush, whose changed pages stay in it until the COMMIT. Above its limit SQLite drops every unchanged
page as soon as it has been looked at, and reads it again for the next row: more of them, the larger the parts of the
full-text index that are merged. The largest flush, 16 MB of vectors and texts, changes 80 MB of pages. The limit alone
takes no memory: what is read beside them comes to a few MB, or up to the limit where the whole full-text table is."""

CHECKPOINT_PAGES = 16_384
"""Write-ahead log of 64 MB before it is copied into the file: index pages that many flushes touch are copied
once. Loads 100,000 rows a third faster than SQLite's 1,000 pages.

Only where the owner of the file has chosen that mode: a run leaves the journal mode as it is, since it needs no other.
Loading 20,000 rows takes 4.5 to 5.7 s with a write-ahead log and without, replacing them 5.5 to 6.9 (five runs each, in
turn)."""


class SQLiteStore(Store):
    """Writes to a file of SQLite, through one connection.

    Args:
        connection: An open connection, which stays the caller's to close, and which the caller may use too. In a
            transaction of the caller's everything is a part of that one.
        target: Where the tables are.
    """

    dialect = "sqlite"

    def __init__(self, connection: sqlite3.Connection, target: Target) -> None:
        self._connection, self._target = connection, target
        self._owned = False
        self.on_wait: Callable[[str], None] = lambda what: None

    @property
    def target(self) -> Target:
        return self._target

    def _own(self) -> None:
        """The connection is this store's alone."""
        self._owned = True
        with translated("opening"):
            self._connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            # Without a write-ahead log, pages written before the COMMIT would shut readers out until then.
            self._connection.execute("PRAGMA cache_spill = OFF")

    # -- before and after a run ------------------------------------------------------------------------

    def begin_run(self, *, fingerprint: str, model: str, dimensions: int, wait: float) -> RunSpec:
        with translated("taking the lock"):
            return sqlite_runs.begin(
                self._connection,
                self.target,
                fingerprint=fingerprint,
                model=model,
                dimensions=dimensions,
                wait=wait,
                on_wait=self.on_wait,
            )

    def after_a_crash(self, run: int) -> bool:
        with translated("looking at earlier runs"):
            return sqlite_runs.after_a_crash(self._connection, self.target, run)

    def heartbeat(self, run: int, phase: str) -> None:
        with translated("giving a sign of life"):
            sqlite_runs.heartbeat(self._connection, run, phase)

    def end_run(self, run: int, state: str, receipt: dict[str, Any]) -> None:
        with translated("recording the end of the run"):
            sqlite_runs.end(self._connection, run, state, receipt)

    def drop_index(self) -> IndexOutcome:
        return IndexOutcome(IndexAction.NONE)

    def check_index(self, policy: IndexPolicy) -> tuple[str, ...]:
        return (f"SQLite has no index of vectors; --index {policy.value} changes nothing.",)

    # -- reading and writing ---------------------------------------------------------------------------

    def flush(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
    ) -> FlushResult:
        return self._write(run, number, slots, rejects, deletes)

    def _write(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
        *,
        earlier: FlushResult = FlushResult(),  # noqa: B008 - a constant
        last: bool = True,
    ) -> FlushResult:
        """One transaction: a flush, or a part of it.

        Args:
            earlier: What became of the parts before this one.
            last: With this one all of the flush is written.
        """
        fault("store.before_begin")
        with self._flush_cache(), self._transaction():
            before = sqlite_runs.fence(self._connection, run.number, number)
            if before is not None:
                return before
            deleted = self._delete(deletes) if self.in_pieces else 0
            writer = self._writer(run)
            fault("store.before_copy")
            for flush_slot in slots:
                writer.write(flush_slot)
            writer.finish()
            fault("store.after_copy")
            if not self.in_pieces:
                deleted = self._delete(deletes)
            sqlite_rejects.forget_stored(self._connection, self.target, run.number, writer.stored)
            all_rejects = [*rejects, *refused(slots, writer.rejected, in_pieces=self.in_pieces)]
            sqlite_rejects.write(self._connection, self.target, run.number, all_rejects)
            result = FlushResult(writer.rows, writer.bytes, deleted, tuple(writer.superseded), tuple(writer.rejected))
            result = earlier.plus(result)
            if last:
                sqlite_runs.record_flush(self._connection, run.number, number, result)
            fault("store.before_commit")
        fault("store.after_commit")
        return result

    @contextlib.contextmanager
    def _flush_cache(self) -> Iterator[None]:
        """Room in our own connection's page cache for what a flush changes; given back at the end."""
        if not self._owned:
            yield
            return
        with translated("writing"):
            self._connection.execute(f"PRAGMA cache_size = -{FLUSH_CACHE_KIB}")
        try:
            yield
        finally:
            with contextlib.suppress(sqlite3.Error):  # then the next flush does it
                self._connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with translated("writing"), transaction(self._connection):
            yield

    @abstractmethod
    def _writer(self, run: RunSpec) -> RowWriter:
        """What takes the rows of one flush into the tables."""

    @abstractmethod
    def _delete(self, keys: Sequence[Key]) -> int:
        """Take away what is stored for records that have no text any more; how many there were."""

    # -- rejects, and the end --------------------------------------------------------------------------

    def rejects(self, entity: str | None = None) -> Iterable[KeptReject]:
        with translated("reading the rejects"):
            return sqlite_rejects.read(self._connection, self.target, entity)

    def forget_older_rejects(self, entities: Sequence[str], run: int) -> int:
        with translated("forgetting older rejects"):
            return sqlite_rejects.forget_older(self._connection, self.target, entities, run)

    def forget_rejects_of_input(self, entity: str | None, name: str, run: int) -> int:
        with translated("forgetting older rejects"):
            return sqlite_rejects.forget_of_input(self._connection, self.target, entity, name, run)

    def clear_rejects(self, keys: Iterable[Key] | None = None, entity: str | None = None) -> int:
        with translated("clearing the rejects"):
            return sqlite_rejects.clear(self._connection, self.target, keys, entity)

    def close(self) -> None:
        if self._owned:
            self._connection.close()
