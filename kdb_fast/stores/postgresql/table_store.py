"""PostgreSQL: a table of vectors beside what is read, as a store; see :mod:`kdb_fast.tables.table_target`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...db.address import DatabaseAddress
from ...db.pg_errors import kind_of, primary_message
from ...db.retrying import ErrorKind
from ...faults import fault
from ...records import Key, Reject, number_of
from ...tables.hidden_rows import HiddenRowsError
from ...tables.index_policy import IndexOutcome
from ...tables.key import KeyColumn
from ...tables.known_rows import KnownRows
from ...tables.selection import Selection
from ...tables.table_target import TSVECTOR, TableTarget
from ...tables.target import LiveRows, Params, Target, rows_on
from ..base import FlushResult, FlushSlot, RunSpec, Stored, version_of_text
from . import prepare as pg_prepare
from . import rejects as pg_rejects
from .by_key import by_key
from .flush import FlushWriter, RowsDroppedError
from .foreign_key import Reference, find_reference, refer
from .indexed import Indexed
from .key_fields import NotInBinaryError
from .keyword import finish_table
from .prepare import PRUNE_BATCH
from .session import LIMITS
from .store import PostgreSQLStore
from .table_delete import delete_keys, delete_rows
from .table_find import prepare_table
from .table_flush import TableWriter

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

LOOK_UP = """
SELECT k.i, f.* FROM unnest({arrays}) WITH ORDINALITY AS k({names}, i), LATERAL (
  SELECT t.kdb_fast_hash,
    CASE WHEN t.kdb_fast_version = t.xmin OR t.kdb_fast_seal = sha256({pgvector}vector_send(t.{embedding}))
      THEN t.kdb_fast_fingerprint END
  FROM {table} t WHERE {same_row} OFFSET 0) f
"""
"""Key by key (OFFSET keeps it so). A vector that another program has written is not ours, whatever stands beside it."""

KNOWN = (
    "LEFT JOIN LATERAL (SELECT kdb_fast_v.kdb_fast_hash AS kdb_fast_kept_text, kdb_fast_v.kdb_fast_fingerprint = "
    "'{fingerprint}' AND (kdb_fast_v.kdb_fast_version = kdb_fast_v.xmin OR kdb_fast_v.kdb_fast_seal = "
    "sha256({pgvector}vector_send(kdb_fast_v.{embedding}))) AS kdb_fast_ours FROM {table} kdb_fast_v WHERE {same_row} "
    "OFFSET 0) kdb_fast_kept ON true"
)
"""Key by key, as LOOK_UP."""

IS_EMPTY = "SELECT NOT EXISTS (SELECT FROM {table})"

PRUNE = """
DELETE FROM {table} t USING (SELECT {row_keys} FROM {table} s WHERE NOT {live} LIMIT {batch}) gone WHERE {same_row}
"""

ALTERED = """
SELECT count(*) FROM {table} t WHERE t.kdb_fast_run = %s
AND t.kdb_fast_seal IS DISTINCT FROM sha256({pgvector}vector_send(t.{embedding}))
"""

CONFLICTS = 2
"""How often a flush meets one before the rows at fault are looked for."""

TRIGGERS = """
SELECT string_agg(DISTINCT tgname::text, ', ') FROM pg_trigger
WHERE tgrelid = to_regclass(%s) AND NOT tgisinternal AND tgenabled <> 'D' AND tgtype & 20 <> 0
"""
"""Those that fire at an INSERT or UPDATE."""


class PostgreSQLTableStore(PostgreSQLStore):
    """Writes the rows of one table of vectors."""

    look_up = LOOK_UP

    def __init__(
        self,
        address: DatabaseAddress,
        role: str,
        table: TableTarget,
        *,
        retry_seconds: float | None = None,
        patient: bool = False,
        limits: str = LIMITS,
    ) -> None:
        super().__init__(address, role, retry_seconds=retry_seconds, patient=patient, limits=limits)
        self.session.rename_target(table.identity)
        self._reference: Reference | None = None
        # Where the extension is, this session knows: it may have been made since the table was found.
        self.table = replace(table, home=self.session.target)

    @property
    def key(self) -> tuple[KeyColumn, ...]:
        return self.table.key

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int, wait: float = 0.0) -> tuple[str, ...]:
        def make(cursor: Cursor, home: Target) -> tuple[str, ...]:
            self.table, self._reference = replace(self.table, home=home), None
            return self._prepare_table(cursor, dimensions)

        return pg_prepare.prepare(self.session, make, wait, ())

    def _check(self, dimensions: int) -> None:
        with self.session.transaction() as cursor:
            self._prepare_table(cursor, dimensions)

    def _prepare_table(self, cursor: Cursor, dimensions: int) -> tuple[str, ...]:
        """Make or check the table; what the user should know."""
        return prepare_table(cursor, self.table, dimensions)

    def column_dimensions(self) -> int | None:
        statement = (
            "SELECT nullif(atttypmod, -1) FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attname = %s AND NOT attisdropped"
        )
        parameters = (self.table.regclass, self.table.vector.name)

        def work() -> int | None:
            row = self.session.connection().execute(statement, parameters).fetchone()
            return row[0] if row else None

        return self.session.retrying("reading the table's definition", work)

    def altered(self, run: int) -> list[str]:
        table = self.table

        def work() -> list[str]:
            with self.session.transaction() as cursor:
                (names,) = cursor.execute(TRIGGERS, (table.regclass,)).fetchone() or (None,)
                if names is None:
                    return []
                (count,) = cursor.execute(table.statement(ALTERED), (run,)).fetchone() or (0,)
            if not count:
                return []
            return [
                f"{number_of(count, 'row')} of {table.shown} {'does' if count == 1 else 'do'} not hold the vector that "
                f"was written (trigger {names}, or another program)."
            ]

        return self.session.retrying("looking at what was stored", work)

    @property
    def indexed(self) -> Indexed:
        table = self.table
        assert table.schema is not None
        return Indexed(self.target, table.schema, table.table, table.vector.name, (TSVECTOR,) if table.keyword else ())

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        beat("adding the foreign key")
        self._reference = None
        warnings = refer(self.session, self.table).warnings
        outcome = super().finish_index(beat, run)
        if self.table.keyword:
            warnings += finish_table(self.session, self.table, beat)
        return replace(outcome, warnings=(*warnings, *outcome.warnings))

    def count(self) -> int:
        def work() -> int:
            statement = self.table.statement("SELECT count(*) FROM {table}")
            row = self.session.connection().execute(statement).fetchone()
            return int(row[0]) if row else 0

        return self.session.retrying("counting rows", work)

    def is_empty(self) -> bool:
        def work() -> bool:
            row = self.session.connection().execute(self.table.statement(IS_EMPTY)).fetchone()
            return bool(row and row[0])

        return self.session.retrying("looking for rows", work)

    def known_rows(self, fingerprint: str) -> KnownRows | None:
        if self.table.chunked:
            return None  # a record has several rows
        if self.is_empty():
            return None  # to find that out of each row took the server more time than to read it
        same_row = self.table.same_key("kdb_fast_v.{column}", "t.{column}")
        join = self.table.statement(KNOWN, fingerprint=fingerprint, same_row=same_row)
        return KnownRows(join.decode(), "kdb_fast_ours", "kdb_fast_kept_text")

    # -- reading and writing ---------------------------------------------------------------------------

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        wanted = self.session.holdable(keys)
        return self.session.retrying("looking up what is stored", lambda: self._look_up(wanted))

    def _look_up(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        table = self.table
        statement = table.statement(
            self.look_up,
            arrays=table.each_key("%s::text[]"),
            names=table.each_key("key_{number}"),
            same_row=table.same_key("t.{column}", "k.key_{number}::{type}"),
        )

        def execute(keys: Sequence[Key], arrays: list[str]) -> dict[Key, Stored]:
            rows = self.session.connection().execute(statement, arrays)
            return {keys[i - 1]: Stored(text, fingerprint, version_of_text(text)) for i, text, fingerprint in rows}

        return dict(chain.from_iterable(found.items() for found in by_key(keys, len(table.key), execute)))

    def _writer(self, cursor: Cursor, run: RunSpec, now: int) -> FlushWriter:
        return TableWriter(
            cursor,
            self.table,
            run,
            now,
            reference=self._find_reference(cursor),
            merge_all=self._merge_all,
            pieces=self._pieces,
        )

    def _find_reference(self, cursor: Cursor) -> Reference:
        """Asked for once, in the first flush."""
        if self._reference is None:
            self._reference = find_reference(cursor, self.table)
        return self._reference

    def _flush_once(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
        careful: bool,
    ) -> FlushResult:
        import psycopg

        conflicts = psycopg.errors.UniqueViolation, psycopg.errors.ForeignKeyViolation
        for _ in range(0 if careful else CONFLICTS):
            try:
                return super()._flush_once(run, number, slots, rejects, deletes, careful)
            except (*conflicts, RowsDroppedError, NotInBinaryError):
                # A row is there that was not when the parent looked, a record was deleted in that very moment, or a
                # trigger dropped a row: the merge, with its look at each, tells which.
                self._merge_all = True
        return super()._flush_once(run, number, slots, rejects, deletes, careful)

    def _delete(self, cursor: Cursor, keys: Sequence[Key]) -> int:
        return delete_keys(cursor, self.table, keys)

    def prune(self, entity: str, live_rows: LiveRows) -> int:
        """Remove rows without a record; ``entity`` says nothing here."""
        fault("store.prune")
        referred, source = refer(self.session, self.table), self.table.source
        if referred.checked and isinstance(live_rows, Selection) and source is not None and live_rows.is_all_of(source):
            return referred.deleted  # each row has just been found to have its record
        pruned = self.session.retrying("removing deleted records", lambda: self._prune(entity, live_rows))
        return referred.deleted + pruned

    def _prune(self, entity: str, live_rows: LiveRows) -> int:
        import psycopg

        total = 0
        while True:
            try:
                with self.session.transaction() as cursor:
                    rows, records = self._prune_once(cursor, entity, live_rows)
            except psycopg.Error as error:
                if kind_of(error) not in (ErrorKind.REFUSED, ErrorKind.DATA):
                    raise
                raise HiddenRowsError(primary_message(error)) from None
            total += records
            if rows < PRUNE_BATCH:
                return total

    def _prune_once(self, cursor: Cursor, entity: str, live_rows: LiveRows) -> tuple[int, int]:
        """How many rows and records were removed."""
        # What a policy hides must not look deleted: in this transaction hiding is an error.
        cursor.execute("SET LOCAL row_security = off")
        table, params = self.table, Params("postgresql")
        live = live_rows(rows_on(cursor, "postgresql"), table.home, entity, params)
        if live is None:
            return 0, 0
        statement = table.statement(
            PRUNE,
            row_keys=table.each_key("s.{column}"),
            live=live,
            batch=params(PRUNE_BATCH),
            same_row=table.same_key("t.{column}", "gone.{column}"),
        )
        return delete_rows(cursor, table, statement, params.values)

    # -- rejects ---------------------------------------------------------------------------------------

    def forget_older_rejects(self, entities: Sequence[str], run: int) -> int:
        """All of the table's, where it was read as a whole."""
        statement = self.target.statement(f"{pg_rejects.DELETE} AND run < %s")

        def work() -> int:
            return self.session.connection().execute(statement, (self.target.name, run)).rowcount

        return self.session.retrying("forgetting older rejects", work) if entities else 0
