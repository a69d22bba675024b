"""SQLite: a vector column of the user's own table as a store; see :mod:`kdb_fast.tables.column_target`."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Callable, Iterator, Sequence

from ...db.address import DatabaseAddress
from ...db.sqlite_connection import connect_sqlite
from ...db.sqlite_errors import translated
from ...db.sqlite_session import transaction
from ...faults import fault
from ...records import Key, storable_key
from ...tables.column_target import ColumnTarget, altered_rows
from ...tables.index_policy import IndexAction, IndexOutcome
from ...tables.key import KeyColumn
from ...tables.target import LiveRows, Target
from ..base import FlushSlot, RunSpec, Stored, version_of_text
from . import prepare as sqlite_prepare
from .column_find import prepare_column
from .column_flush import ColumnWriter, clear_keys, find_rows
from .flush import RowWriter
from .store import SQLiteStore

FORGET_VANISHED = "DELETE FROM {state} AS st WHERE NOT EXISTS (SELECT 1 FROM {table} t WHERE {same_row})"

LIVE_TRIGGERS = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE ORDER BY name"

ALTERED_ROWS = 1_000
"""Keys of a run that are compared at a time."""


class SQLiteColumnStore(SQLiteStore):
    """Writes the vectors of one column, and nothing else of its table."""

    def __init__(self, connection: sqlite3.Connection, column: ColumnTarget) -> None:
        super().__init__(connection)
        self.column = column
        self._target = Target(kept_as=column.identity)

    @classmethod
    def open_column(cls, address: DatabaseAddress, column: ColumnTarget) -> SQLiteColumnStore:
        """A store with its own connection, which :meth:`close` closes."""
        store = cls(connect_sqlite(address), column)
        store._own()
        return store

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with translated("writing"), transaction(self._connection):
            yield

    @property
    def key(self) -> tuple[KeyColumn, ...]:
        return self.column.key

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int, wait: float = 0.0) -> tuple[str, ...]:
        with translated("preparing the tables"):
            make = functools.partial(prepare_column, self._connection, self.column)
            sqlite_prepare.prepare(self._connection, make, wait, self.on_wait)
        return ()

    def altered(self, run: int) -> list[str]:
        with translated("looking at what was stored"):
            triggers = [storable_key(name) for (name,) in self._connection.execute(LIVE_TRIGGERS, (self.column.table,))]
            if not triggers:
                return []
            keys = self.column.each_key("key_{number}")
            statement = self.column.statement("SELECT {keys} FROM {state} WHERE run = ?", keys=keys).decode()
            count = 0
            written = self._connection.execute(statement, (run,))
            while part := written.fetchmany(ALTERED_ROWS):
                found = find_rows(self._connection, self.column, part)
                count += sum((row.text_hash, row.vector_hash) != row.noted for row in found.values())
        if not count:
            return []
        by = ", ".join(f"trigger {name}" for name in triggers[:5])
        return [altered_rows(self.column.shown, count, by)]

    def finish_index(self, beat: Callable[[str], None]) -> IndexOutcome:
        beat("forgetting rows that are gone")
        with translated("forgetting rows that are gone"), transaction(self._connection):
            fault("store.prune")
            same_row = self.column.same_key("t.{column}", "st.key_{number}")
            self._connection.execute(self.column.statement(FORGET_VANISHED, same_row=same_row).decode())
        return IndexOutcome(IndexAction.NONE)

    def count(self, entity: str | None = None) -> int:
        """Rows that have a vector, whoever wrote it."""
        with translated("counting rows"):
            statement = self.column.statement("SELECT count(*) FROM {table} t WHERE t.{embedding} IS NOT NULL")
            return int(self._connection.execute(statement.decode()).fetchone()[0])

    # -- reading and writing ---------------------------------------------------------------------------

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        with translated("looking up what is stored"):
            return {
                key: Stored(row.text_hash or b"", row.fingerprint, version_of_text(row.text_hash))
                for key, row in find_rows(self._connection, self.column, keys).items()
            }

    def _writer(self, run: RunSpec, *, force: bool = False, vectors: bool = True) -> RowWriter:
        return ColumnWriter(self._connection, self.column, run)

    def _delete(self, keys: Sequence[Key]) -> int:
        return clear_keys(self._connection, self.column, keys)

    def upsert(self, run: RunSpec, slots: Sequence[FlushSlot], deletes: Sequence[Key], *, vectors: bool = True) -> None:
        """The library makes rows, and those of this table are its owner's to make."""
        raise NotImplementedError

    def prune(self, entity: str, live_rows: LiveRows) -> int:
        """Rows of the table are never removed."""
        return 0
