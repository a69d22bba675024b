"""SQLite: a vector column of the user's own table as a store; see :mod:`kdb_fast.tables.column_target`."""

from __future__ import annotations

import functools
import re
import sqlite3
import time
from collections.abc import Callable, Sequence

from ...db.address import DatabaseAddress
from ...db.sqlite_connection import connect_sqlite
from ...db.sqlite_errors import translated
from ...db.sqlite_session import transaction
from ...faults import fault
from ...records import Key, Reject, storable_key
from ...tables.column_target import COUNT, NOTE_TRIGGERS, ColumnTarget, altered_rows, times_written, triggers_key
from ...tables.index_policy import IndexAction, IndexOutcome
from ...tables.key import KeyColumn
from ...tables.known_rows import SAME_VECTOR, KnownRows
from ...tables.target import LiveRows, Target
from ..base import FlushResult, FlushSlot, RunSpec, Stored, version_of_text
from ..flush_parts import PartSize, first_part
from . import prepare as sqlite_prepare
from .column_find import prepare_column
from .column_flush import ColumnWriter, clear_keys, find_rows
from .flush import RowWriter
from .keyword import fill_in
from .store import SQLiteStore

KNOWN = (
    "LEFT JOIN (SELECT {kept}, fingerprint AS kdb_fast_kept_model, text_hash AS kdb_fast_kept_text, "
    "vector_hash AS kdb_fast_kept_vector FROM {state}) kdb_fast_kept ON {same_state}"
)
KNOWN_OURS = (
    "kdb_fast_kept_model = '{fingerprint}' AND {same_vector}(CAST(t.{embedding} AS BLOB), kdb_fast_kept_vector)"
)

FORGET_VANISHED = "DELETE FROM {state} AS st WHERE NOT EXISTS (SELECT 1 FROM {table} t WHERE {same_row})"

TRIGGERS = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE ORDER BY name"
ON_UPDATE = re.compile(r"\bUPDATE(?:\s+OF\s+(?P<columns>.+?))?\s+ON\b", re.IGNORECASE | re.DOTALL)
"""The event of a trigger: the first of its words that can be meant."""

WITHOUT_TEXT = (
    "SELECT {text}, st.kdb_fast_text, {kept_keys} FROM (SELECT {state_keys}, text_hash AS kdb_fast_text FROM {state} "
    "WHERE content IS NULL LIMIT 10000) st LEFT JOIN {table} t ON {same_row}"
)
FILL_IN = "UPDATE {state} SET content = ? WHERE {same_state}"

ALTERED_ROWS = 1_000
"""Keys of a run that are compared at a time."""


class SQLiteColumnStore(SQLiteStore):
    """Writes the vectors of one column, and nothing else of its table."""

    def __init__(self, connection: sqlite3.Connection, column: ColumnTarget) -> None:
        super().__init__(connection, Target(kept_as=column.identity))
        self.column = column
        self.longest_lock = 0.0
        """Seconds for which the file was locked, at most."""
        self._part = PartSize()
        self._last_writer: ColumnWriter | None = None

    @classmethod
    def open_column(cls, address: DatabaseAddress, column: ColumnTarget) -> SQLiteColumnStore:
        """A store with its own connection, which :meth:`close` closes."""
        store = cls(connect_sqlite(address), column)
        store._own()
        return store

    @property
    def key(self) -> tuple[KeyColumn, ...]:
        return self.column.key

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int, wait: float = 0.0) -> tuple[str, ...]:
        with translated("preparing the tables"):
            make = functools.partial(prepare_column, self._connection, self.column)
            sqlite_prepare.prepare(self._connection, make, wait, self.on_wait)
        return ()

    def forecast(self, run: RunSpec, rows: int | None = None) -> tuple[str, ...]:
        with translated("looking at the table"):
            triggers = self._triggers()
            if not triggers:
                return ()
            count = self.column.statement(
                "SELECT (SELECT count(*) FROM {table}) - (SELECT count(*) FROM {state} WHERE fingerprint = ?)"
            )
            (pending,) = self._connection.execute(count.decode(), (run.fingerprint,)).fetchone()
            shown = ", ".join(triggers[:5])
            note = self.target.statement(NOTE_TRIGGERS, value="?").decode()
            if not self._connection.execute(note, (triggers_key(self.column), shown)).rowcount:
                return ()
        times = times_written(pending)
        return (f"Triggers of {self.column.shown} fire as vectors are written, {times}: {shown}.",)

    def _triggers(self) -> list[str]:
        """The triggers of the table that fire where the column is updated."""
        found = []
        for name, statement in self._connection.execute(TRIGGERS, (self.column.table,)):
            event = ON_UPDATE.search(statement or "")
            columns = (event["columns"] or "").lower() if event else ""
            if event and (not columns or self.column.vector.name.lower() in columns):
                found.append(storable_key(name))
        return found

    def altered(self, run: int) -> list[str]:
        with translated("looking at what was stored"):
            triggers = self._triggers()
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

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        beat("forgetting rows that are gone")
        with translated("forgetting rows that are gone"), transaction(self._connection):
            fault("store.prune")
            same_row = self.column.same_key("t.{column}", "st.key_{number}")
            self._connection.execute(self.column.statement(FORGET_VANISHED, same_row=same_row).decode())
        if self.column.keyword:
            self._fill_in_texts(beat)
        return IndexOutcome(IndexAction.NONE)

    def _fill_in_texts(self, beat: Callable[[str], None]) -> None:
        """The texts of rows that were embedded before there was keyword search."""
        column = self.column
        select = column.statement(
            WITHOUT_TEXT,
            kept_keys=column.each_key("st.kdb_fast_state_{number}"),
            state_keys=column.each_key("key_{number} AS kdb_fast_state_{number}"),
            same_row=column.same_key("t.{column}", "st.kdb_fast_state_{number}"),
        ).decode()
        fill = column.statement(FILL_IN, same_state=column.same_key("key_{number}", "?")).decode()
        fill_in(self._connection, select, fill, beat)

    def count(self) -> int:
        """Rows with a vector that we know of; where there is none, with any."""
        with translated("counting rows"):
            return int(self._connection.execute(self.column.statement(COUNT).decode()).fetchone()[0])

    def known_rows(self, fingerprint: str) -> KnownRows:
        column = self.column
        same_state = column.same_key("kdb_fast_kept.kdb_fast_kept_{number}", "t.{column}")
        kept = column.each_key("key_{number} AS kdb_fast_kept_{number}")
        return KnownRows(
            column.statement(KNOWN, kept=kept, same_state=same_state).decode(),
            column.statement(KNOWN_OURS, fingerprint=fingerprint, same_vector=SAME_VECTOR).decode(),
            "kdb_fast_kept_text",
        )

    # -- reading and writing ---------------------------------------------------------------------------

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        with translated("looking up what is stored"):
            return {
                key: Stored(
                    row.text_hash or b"",
                    row.fingerprint,
                    version_of_text(row.text_hash),
                    row.foreign and not self.column.replace,
                )
                for key, row in find_rows(self._connection, self.column, keys).items()
            }

    def flush(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
    ) -> FlushResult:
        """In parts, so that the file is locked for no longer than a moment."""
        done, rest = FlushResult(), list(slots)
        while True:
            part, rest = first_part(rest, self._part.rows)
            if rest:
                done = self._write(run, number, part, (), (), earlier=done, last=False)
            else:
                done = self._write(run, number, part, rejects, deletes, earlier=done)
            self._note_time()
            if not rest:
                return done

    def _note_time(self) -> None:
        """Learn from the part that was just committed, how long the file was locked."""
        writer, self._last_writer = self._last_writer, None
        if writer is not None:
            seconds = time.monotonic() - writer.began
            self.longest_lock = max(self.longest_lock, seconds)
            self._part.note(writer.rows, seconds)

    def _writer(self, run: RunSpec) -> RowWriter:
        self._last_writer = ColumnWriter(self._connection, self.column, run)
        return self._last_writer

    def _delete(self, keys: Sequence[Key]) -> int:
        return clear_keys(self._connection, self.column, keys)

    def prune(self, entity: str, live_rows: LiveRows) -> int:
        """Rows of the table are never removed."""
        return 0
