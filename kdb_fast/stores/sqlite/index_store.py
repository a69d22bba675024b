"""SQLite with FTS5: a search index as KameleonDB has it, as a store.

Vectors are written twice: as JSON text into the search table, where KameleonDB reads them, and as float32
into ``kdb_fast_vectors``, where search reads them 100 times as fast.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from ...db.address import DatabaseAddress
from ...db.sqlite_connection import connect_sqlite
from ...db.sqlite_errors import translated
from ...ipc.beside import beside
from ...records import Key, Record
from ...tables import seal
from ...tables.index_policy import IndexAction, IndexOutcome
from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH
from ...tables.target import LiveRows, Target
from ..base import Answer, FlushSlot, Found, IndexStore, RunSpec, Stored
from ..rejects import refusal_of_unit
from . import prepare as sqlite_prepare
from . import prune as sqlite_prune
from . import rejects as sqlite_rejects
from .check import columns
from .flush import FlushWriter, RowWriter, row_version
from .full_text import FullText
from .keys import select_others, select_places
from .store import SQLiteStore

ANALYZE_ROWS = 10_000
"""From so many rows on the planner's statistics are worth having."""


CONTENT = "CAST(coalesce(t.{content}, '') AS BLOB)"
"""Bytes, as they are hashed: text that is not valid UTF-8 must not end the run."""

ROW = f"{CONTENT}, CAST(t.{{updated_at}} AS BLOB)"
"""What :func:`_stored` wants of a row, before its fingerprint."""


class SQLiteIndexStore(SQLiteStore, IndexStore):
    """Writes the rows of one search index. For a store with a connection of its own: :meth:`open`."""

    def __init__(self, connection: sqlite3.Connection, index: IndexTable = KDB_SEARCH) -> None:
        super().__init__(connection, Target(index=index))
        self._full_text = FullText(connection, self._target, shared=True)
        self._columns: tuple[str, ...] | None = None

    @classmethod
    def open(
        cls, address: DatabaseAddress, *, must_exist: bool = True, index: IndexTable = KDB_SEARCH
    ) -> SQLiteIndexStore:
        """A store with its own connection, which :meth:`close` closes.

        Raises:
            DatabaseError: The file does not exist, is no database, or cannot be opened.
        """
        store = cls(connect_sqlite(address, must_exist=must_exist), index)
        store._full_text = FullText(store._connection, store._target, shared=False)
        store._own()
        return store

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

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        if self.count() >= ANALYZE_ROWS:
            beat("statistics")
            with translated("refreshing statistics"):
                # A sample of 1,000 rows of each index: milliseconds, whatever the size of the table.
                self._connection.execute("PRAGMA analysis_limit = 1000")
                self._connection.execute(self._target.text("ANALYZE {index}"))
        return IndexOutcome(IndexAction.NONE, "exact search on SQLite, no vector index")

    def count(self) -> int:
        with translated("counting rows"):
            row = self._connection.execute(self._target.text("SELECT count(*) FROM {index}")).fetchone()
            return int(row[0])

    # -- reading and writing ---------------------------------------------------------------------------

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        with translated("looking up what is stored"):
            rows = select_places(self._connection, self._target, f"{ROW}, {self._fingerprint()}", keys)
            return {keys[place]: _stored(*row) for place, *row in rows}

    def compare(self, records: Sequence[Record], hashes: Sequence[bytes], fingerprint: str) -> Found | Answer:
        return beside(lambda: self._compare(records, fingerprint), "look-up")

    def _compare(self, records: Sequence[Record], fingerprint: str) -> Found:
        # By its text: SQLite has no hash of its own, and lets other threads run while it compares.
        same = f"{CONTENT} = CAST(s.kdb_fast_text AS BLOB) AND {self._fingerprint()} = ?"
        wanted = f"t.rowid IS NOT NULL, {ROW}, {self._fingerprint()}"
        with translated("looking up what is stored"):
            others = list(select_others(self._connection, self._target, wanted, same, fingerprint, records))
        differ = {records[place].key: _stored(*row) for place, is_there, *row in others if is_there}
        return Found(differ, set(range(len(records))).difference([place for place, *_ in others]))

    def _fingerprint(self) -> str:
        """That of a row ``t`` that nobody has changed since it was written."""
        ours = seal.ours("sqlite", self._seal_column(), "t.")
        return f"CASE WHEN t.{{embedding}} IS NOT NULL AND {ours} THEN t.kdb_fast_fingerprint END"

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with translated("writing"), self._full_text.transaction():
            yield

    def transaction(self) -> AbstractContextManager[None]:
        return self._transaction()

    def _writer(self, run: RunSpec, *, force: bool = False, vectors: bool = True) -> RowWriter:
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
                raise refusal_of_unit(slots, writer.rejected)
            writer.finish()
            self._delete(deletes)
            sqlite_rejects.forget_stored(self._connection, self.target, run.number, writer.stored)

    def _delete(self, keys: Sequence[Key]) -> int:
        return sqlite_prune.delete_records(self._connection, self._target, self._full_text, keys)

    def prune(self, entity: str, live_rows: LiveRows) -> int:
        with translated("removing deleted records"):
            return sqlite_prune.prune(self._connection, self._target, self._full_text, entity, live_rows)


def _stored(content: bytes, updated_at: bytes | None, fingerprint: str | None) -> Stored:
    return Stored(hashlib.sha256(content).digest(), fingerprint, row_version(updated_at, content))
