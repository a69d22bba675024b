"""SQLite with FTS5: look up what is stored, write a flush in one transaction.

Vectors are written twice: as JSON text into the search table, where KameleonDB reads them, and as float32
into ``kdb_fast_vectors``, where search reads them 100 times as fast.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ...db.address import DatabaseAddress
from ...db.sqlite_connection import connect_sqlite
from ...db.sqlite_errors import translated
from ...errors import RecordError
from ...faults import fault
from ...records import Key, Reject, shown_key
from ...tables import seal
from ...tables.index_policy import IndexAction, IndexOutcome, IndexPolicy
from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH
from ...tables.target import LiveRows, Target
from ..base import FlushResult, FlushSlot, RunSpec, Store, Stored
from ..rejects import refused
from . import prepare as sqlite_prepare
from . import prune as sqlite_prune
from . import rejects as sqlite_rejects
from . import runs as sqlite_runs
from .check import columns
from .flush import FlushWriter, RowWriter, row_version
from .full_text import FullText
from .keys import select_keys

CACHE_KIB = 16 * 1024
"""Page cache of our own connection, in KiB: the inner pages of the indexes; with 64 MiB a load is no faster."""

CHECKPOINT_PAGES = 16_384
"""Write-ahead log of 64 MB before it is copied into the file: index pages that many flushes touch are copied
once. Loads 100,000 rows a third faster than SQLite's 1,000 pages.

Only where the owner of the file has chosen that mode: a run leaves the journal mode as it is, since it needs no other.
Loading 20,000 rows takes 4.5 to 5.7 s with a write-ahead log and without, replacing them 5.5 to 6.9 (five runs each, in
turn)."""

ANALYZE_ROWS = 10_000
"""From so many rows on the planner's statistics are worth having."""


class SQLiteStore(Store):
    """One connection to a search index in SQLite.

    Args:
        connection: An open connection, which stays the caller's to close, and which the caller may use too. In a
            transaction of the caller's everything is a part of that one. For a connection of its own: :meth:`open`.
    """

    dialect = "sqlite"

    def __init__(self, connection: sqlite3.Connection, index: IndexTable = KDB_SEARCH) -> None:
        self._connection, self._target = connection, Target(index=index)
        self._owned = False
        self._full_text = FullText(connection, self._target, shared=True)
        self._columns: tuple[str, ...] | None = None
        self.on_wait: Callable[[str], None] = lambda what: None

    @property
    def target(self) -> Target:
        return self._target

    @classmethod
    def open(cls, address: DatabaseAddress, *, must_exist: bool = True, index: IndexTable = KDB_SEARCH) -> SQLiteStore:
        """A store with its own connection, which :meth:`close` closes.

        Raises:
            DatabaseError: The file does not exist, is no database, or cannot be opened.
        """
        store = cls(connect_sqlite(address, must_exist=must_exist), index)
        store._full_text = FullText(store._connection, store._target, shared=False)
        store._own()
        return store

    def _own(self) -> None:
        """The connection is this store's alone."""
        self._owned = True
        with translated("opening"):
            self._connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            # Without a write-ahead log, pages written before the COMMIT would shut readers out until then.
            self._connection.execute("PRAGMA cache_spill = OFF")

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int, wait: float = 0.0) -> tuple[str, ...]:
        """See :meth:`Store.prepare`. SQLite's columns are not bound to a dimension: older vectors are just stale."""
        with translated("preparing the tables"):
            sqlite_prepare.prepare(
                self._connection,
                lambda: sqlite_prepare.search_table(self._connection, self._target),
                wait,
                self.on_wait,
            )
        self._columns = None
        return ()

    def _seal_column(self) -> tuple[str, ...]:
        """The column for seals where the table has it; asked for once."""
        if self._columns is None:
            seal.register(self._connection)
            has = seal.COLUMN in columns(self._connection, self._target.index.name)
            self._columns = (seal.COLUMN,) if has else ()
        return self._columns

    def altered(self, run: int) -> list[str]:
        with translated("looking at what was stored"):
            return sqlite_prepare.altered(self._connection, self._target, run) if self._seal_column() else []

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

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        if self.count() >= ANALYZE_ROWS:
            beat("statistics")
            with translated("refreshing statistics"):
                # A sample of 1,000 rows of each index: milliseconds, whatever the size of the table.
                self._connection.execute("PRAGMA analysis_limit = 1000")
                self._connection.execute(self._target.text("ANALYZE {index}"))
        return IndexOutcome(IndexAction.NONE, "exact search on SQLite, no vector index")

    def count(self, entity: str | None = None) -> int:
        with translated("counting rows"):
            if entity is None:
                row = self._connection.execute(self._target.text("SELECT count(*) FROM {index}")).fetchone()
            else:
                row = self._connection.execute(
                    self._target.text("SELECT count(*) FROM {index} WHERE {group} = ?"), (entity,)
                ).fetchone()
            return int(row[0])

    # -- reading and writing ---------------------------------------------------------------------------

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        result: dict[Key, Stored] = {}
        with translated("looking up what is stored"):
            ours = seal.ours("sqlite", self._seal_column(), "t.")
            # Bytes, as they are hashed: text that is not valid UTF-8 must not end the run.
            columns = "CAST(coalesce(t.{content}, '') AS BLOB), CAST(t.{updated_at} AS BLOB), "
            columns += f"CASE WHEN t.{{embedding}} IS NOT NULL AND {ours} THEN t.kdb_fast_fingerprint END"
            for key, content, updated_at, fingerprint in select_keys(self._connection, self._target, columns, keys):
                result[key] = Stored(hashlib.sha256(content).digest(), fingerprint, row_version(updated_at, content))
        return result

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
        with self.transaction():
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
    def transaction(self) -> Iterator[None]:
        with translated("writing"), self._full_text.transaction():
            yield

    def _writer(self, run: RunSpec, *, force: bool = False, vectors: bool = True) -> RowWriter:
        """What takes the rows of one flush into the tables."""
        sealed = bool(self._seal_column())
        return FlushWriter(
            self._connection, self._target, self._full_text, run, force=force, vectors=vectors, sealed=sealed
        )

    def upsert(self, run: RunSpec, slots: Sequence[FlushSlot], deletes: Sequence[Key], *, vectors: bool = True) -> None:
        with translated("writing"):
            writer = self._writer(run, force=True, vectors=vectors)
            for flush_slot in slots:
                writer.write(flush_slot)
            if writer.rejected:
                first = refused(slots, writer.rejected)[0]
                raise RecordError(
                    f"The record {shown_key(first.key)} was refused ({first.reason}): {first.detail}.",
                    remedy="Nothing of the batch was stored.",
                )
            writer.finish()
            self._delete(deletes)
            sqlite_rejects.forget_stored(self._connection, self.target, run.number, writer.stored)

    def _delete(self, keys: Sequence[Key]) -> int:
        return sqlite_prune.delete_records(self._connection, self._target, self._full_text, keys)

    def prune(self, entity: str, live_rows: LiveRows) -> int:
        with translated("removing deleted records"):
            return sqlite_prune.prune(self._connection, self._target, self._full_text, entity, live_rows)

    # -- rejects, and the end --------------------------------------------------------------------------

    def rejects(self, entity: str | None = None) -> Iterable[dict[str, Any]]:
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
