"""PostgreSQL: a vector column of the user's own table as a store; see :mod:`kdb_fast.tables.column_target`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...db.address import DatabaseAddress
from ...faults import fault
from ...records import Key, Reject, storable_key
from ...tables.column_target import COUNT, ColumnTarget, altered_rows
from ...tables.index_policy import IndexOutcome, IndexPolicy
from ...tables.key import KeyColumn
from ...tables.known_rows import KnownRows
from ...tables.target import LiveRows, Target
from ..base import FlushResult, FlushSlot, RunSpec, Stored, version_of_text
from ..flush_parts import FIRST_ROWS, PartSize, first_part
from . import prepare as pg_prepare
from .by_key import by_key
from .column_effects import SIZE, find_triggers, forecast
from .column_find import prepare_column
from .column_flush import ColumnWriter, clear_keys
from .flush import FlushWriter
from .indexed import Indexed
from .keyword import finish_column
from .session import LIMITS
from .store import PostgreSQLStore

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

OURS = "(st.version = x.version OR st.vector_hash = sha256({sender}(x.vector)))"
"""Whether a vector is the noted one. The version of its row is a short cut, which may fail: 384 dimensions are hashed
in 15 us. That it fits by chance, after wraparound or in a restored database, costs no more than a count that is not
exact: what is written, and of which text, is decided by hashes alone."""

LOOK_UP = """
SELECT f.i, f.text_hash, CASE WHEN f.ours AND f.same_text THEN f.fingerprint END, f.has_vector AND f.ours IS NOT TRUE
FROM unnest({arrays}) WITH ORDINALITY AS k({names}, i), LATERAL (
  SELECT k.i, x.text_hash, st.fingerprint, x.vector IS NOT NULL AS has_vector, st.text_hash = x.text_hash AS same_text,
    x.vector IS NOT NULL AND {ours} AS ours
  FROM (SELECT {row_keys}, sha256({text}) AS text_hash, t.{embedding} AS vector, t.xmin AS version
        FROM {table} t WHERE {same_row} OFFSET 0) x
  LEFT JOIN {state} st ON {same_state} OFFSET 0) f
"""
"""Key by key, and each hash made once (OFFSET keeps it so). The last value: a vector of another program."""

KNOWN = (
    "LEFT JOIN LATERAL (SELECT fingerprint AS kdb_fast_kept_model, text_hash AS kdb_fast_kept_text, "
    "vector_hash AS kdb_fast_kept_vector, version AS kdb_fast_kept_version FROM {state} kdb_fast_state "
    "WHERE {same_state} OFFSET 0) kdb_fast_kept ON true"
)
"""Key by key (OFFSET keeps it so): a page of the table must not be joined with all of the state."""
KNOWN_OURS = (
    "kdb_fast_kept_model = '{fingerprint}' AND t.{embedding} IS NOT NULL AND (kdb_fast_kept_version = t.xmin "
    "OR kdb_fast_kept_vector = sha256({sender}(t.{embedding})))"
)

FORGET_VANISHED = "DELETE FROM {state} st WHERE NOT EXISTS (SELECT FROM {table} t WHERE {same_row})"

ALTERED = """
SELECT count(*) FROM {state} st JOIN {table} t ON {same_row}
WHERE st.run = %s AND (sha256({text}) IS DISTINCT FROM st.text_hash
  OR sha256({sender}(t.{embedding})) IS DISTINCT FROM st.vector_hash)
"""


VACUUM_ROWS = 20_000
VACUUM_SHARE = 5
"""With ``vacuum``, the versions of rows that are left behind are freed when there are so many, and when they are a
fifth of the table, which is what autovacuum waits for too. It reads the whole table."""


class PostgreSQLColumnStore(PostgreSQLStore):
    """Writes the vectors of one column, and nothing else of its table."""

    default_index = IndexPolicy.KEEP  # they are its owner's

    def __init__(
        self,
        address: DatabaseAddress,
        role: str,
        column: ColumnTarget,
        *,
        retry_seconds: float | None = None,
        patient: bool = False,
        limits: str = LIMITS,
    ) -> None:
        super().__init__(address, role, retry_seconds=retry_seconds, patient=patient, limits=limits)
        self.column = column
        self.longest_lock = 0.0
        """Seconds for which rows were held locked, at most."""
        self._part = PartSize()
        self._left_behind = 0
        self._vacuum_rows = VACUUM_ROWS
        self._last_writer: ColumnWriter | None = None
        self.session.rename_target(column.identity)

    @property
    def key(self) -> tuple[KeyColumn, ...]:
        return self.column.key

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int, wait: float = 0.0) -> tuple[str, ...]:
        def make(cursor: Cursor, home: Target) -> tuple[str, ...]:
            prepare_column(cursor, self.column, dimensions)
            return ()

        return pg_prepare.prepare(self.session, make, wait, (self.column.state,))

    def _check(self, dimensions: int) -> None:
        with self.session.transaction() as cursor:
            prepare_column(cursor, self.column, dimensions)

    def column_dimensions(self) -> int | None:
        return self.column.vector.dimensions

    def forecast(self, run: RunSpec, rows: int | None = None) -> tuple[str, ...]:
        def work() -> tuple[str, ...]:
            with self.session.transaction() as cursor:
                return tuple(forecast(cursor, self.column, run.fingerprint, run.dimensions))

        return (*self.session.retrying("looking at the table", work), *super().forecast(run, rows))

    def altered(self, run: int) -> list[str]:
        column = self.column

        def work() -> list[str]:
            with self.session.transaction() as cursor:
                triggers = find_triggers(cursor, column)
                if not triggers:
                    return []
                same_row = column.same_key("t.{column}", "st.key_{number}")
                row = cursor.execute(column.statement(ALTERED, same_row=same_row), (run,)).fetchone()
            by = ", ".join(f"trigger {storable_key(trigger.name)}" for trigger in triggers[:5])
            if not row or not row[0]:
                return []
            return [altered_rows(column.shown, row[0], by)]

        return self.session.retrying("looking at what was stored", work)

    @property
    def indexed(self) -> Indexed:
        column = self.column
        assert column.schema is not None
        return Indexed(self.target, column.schema, column.table, column.vector.name)

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        beat("forgetting rows that are gone")
        self.session.retrying("forgetting rows that are gone", self._forget_vanished)
        outcome = super().finish_index(beat, run)
        if self.column.keyword:
            finish_column(self.session, self.column, beat)
        return outcome

    def _built_for(self, run: RunSpec | None) -> Indexed:
        # Its owner's programs write the table meanwhile.
        return replace(self.indexed, concurrently=run is not None and run.indexes is not IndexPolicy.DEFER)

    def _forget_vanished(self) -> int:
        with self.session.transaction() as cursor:
            # What a policy hides must not look deleted: in this transaction hiding is an error.
            cursor.execute("SET LOCAL row_security = off")
            fault("store.prune")
            same_row = self.column.same_key("t.{column}", "st.key_{number}")
            return cursor.execute(self.column.statement(FORGET_VANISHED, same_row=same_row)).rowcount

    def count(self) -> int:
        """Rows with a vector that we know of; where there is none, with any."""

        def work() -> int:
            row = self.session.connection().execute(self.column.statement(COUNT), ()).fetchone()
            return int(row[0]) if row else 0

        return self.session.retrying("counting rows", work)

    def known_rows(self, fingerprint: str) -> KnownRows:
        column = self.column
        join = column.statement(KNOWN, same_state=column.same_key("t.{column}", "kdb_fast_state.key_{number}"))
        ours = column.statement(KNOWN_OURS, fingerprint=fingerprint)
        return KnownRows(join.decode(), ours.decode(), "kdb_fast_kept_text")

    # -- reading and writing ---------------------------------------------------------------------------

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        wanted = self.session.holdable(keys)
        return self.session.retrying("looking up what is stored", lambda: self._look_up(wanted))

    def _look_up(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        column = self.column
        statement = column.statement(
            LOOK_UP,
            ours=column.statement(OURS).decode(),
            arrays=column.each_key("%s::text[]"),
            names=column.each_key("key_{number}"),
            row_keys=column.each_key("t.{column} AS key_{number}"),
            same_row=column.same_key("t.{column}", "k.key_{number}::{type}"),
            same_state=column.same_key("st.key_{number}", "x.key_{number}"),
        )

        def execute(keys: Sequence[Key], arrays: list[str]) -> dict[Key, Stored]:
            return {
                keys[i - 1]: Stored(text or b"", fingerprint, version_of_text(text), foreign and not column.replace)
                for i, text, fingerprint, foreign in self.session.connection().execute(statement, arrays)
            }

        return dict(chain.from_iterable(found.items() for found in by_key(keys, len(column.key), execute)))

    def _flush_once(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
        careful: bool,
    ) -> FlushResult:
        """In parts, so that no row is locked for long."""
        done, rest = FlushResult(), list(slots)
        while True:
            # A part in which rows are refused is halved again and again, within its transaction.
            part, rest = first_part(rest, min(self._part.rows, FIRST_ROWS // 2) if careful else self._part.rows)
            if rest:
                done = self._write(run, number, part, (), (), careful, earlier=done, last=False)
            else:
                done = self._write(run, number, part, rejects, deletes, careful, earlier=done)
            self._note_time()
            if not rest:
                return done

    def flush(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
    ) -> FlushResult:
        result = super().flush(run, number, slots, rejects, deletes)
        self._left_behind += result.rows
        if self.column.vacuum and self._left_behind >= self._vacuum_rows:
            self.session.retrying("vacuuming", self._vacuum)
        return result

    def _vacuum(self) -> None:
        """Free the versions of rows that were left behind; nobody waits for it, nor does it for anybody."""
        import psycopg

        # A cursor of psycopg's own: ours would put the statement into a transaction, where VACUUM is refused.
        statement = self.column.statement("VACUUM (SKIP_LOCKED, TRUNCATE FALSE) {table}")
        psycopg.Cursor(self.session.connection()).execute(statement, ())
        self._left_behind = 0
        row = self.session.connection().execute(SIZE.encode(), {"table": self.column.regclass}).fetchone()
        self._vacuum_rows = max(VACUUM_ROWS, (row[0] if row else 0) // VACUUM_SHARE)

    def _note_time(self) -> None:
        """Learn from the part that was just committed, how long its rows were locked."""
        writer, self._last_writer = self._last_writer, None
        if writer is not None and writer.locked_since is not None:
            seconds = time.monotonic() - writer.locked_since
            self.longest_lock = max(self.longest_lock, seconds)
            self._part.note(writer.rows, seconds)

    def _writer(self, cursor: Cursor, run: RunSpec, now: int) -> FlushWriter:
        self._last_writer = ColumnWriter(cursor, self.column, run, now, pieces=self._pieces)
        return self._last_writer

    def _delete(self, cursor: Cursor, keys: Sequence[Key]) -> int:
        return clear_keys(cursor, self.column, keys)

    def prune(self, entity: str, live_rows: LiveRows) -> int:
        """Rows of the table are never removed."""
        return 0
