"""PostgreSQL with pgvector: runs and their lock, a flush in one transaction, rejects; alike for all that is written.

What is written says how its rows are: :mod:`.index_store`, :mod:`.column_store`, :mod:`.table_store`.

A flush to a search index takes one of two ways for each row:

* *fresh*, no row had that key when the parent looked: binary COPY straight into the search table;
* *existing*, or a fresh one that met a unique violation: binary COPY into a temporary table, then an UPDATE
  join that leaves rows alone which another program has changed since, then an INSERT of what is missing.

Straight COPY writes a first load 1.5 times as fast as staging and merging it.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...db.address import DatabaseAddress
from ...faults import fault
from ...records import KeptReject, Key, Reject
from ...tables.index_policy import IndexOutcome, IndexPolicy
from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH
from ...tables.target import Target
from ..base import FlushResult, FlushSlot, RunSpec, Store
from ..rejects import refused
from . import index as pg_index
from . import rejects as pg_rejects
from . import runs as pg_runs
from .flush import FlushWriter
from .index_default import INDEX_ROWS
from .index_session import build_memory
from .indexed import Indexed
from .session import LIMITS, PgSession

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

MOST_PIECES = 64
"""Statements that the rows of a flush are divided among where a short ``statement_timeout`` asks for it."""


class PostgreSQLStore(Store):
    """Writes to PostgreSQL, through one session of the server."""

    dialect = "postgresql"

    def __init__(
        self,
        address: DatabaseAddress,
        role: str,
        *,
        retry_seconds: float | None = None,
        patient: bool = False,
        borrowed: psycopg.Connection[tuple[Any, ...]] | None = None,
        limits: str = LIMITS,
        index: IndexTable = KDB_SEARCH,
    ) -> None:
        """As :class:`~kdb_fast.stores.postgresql.session.PgSession`, whose session this store works in."""
        self.session = PgSession(
            address,
            role,
            retry_seconds=retry_seconds,
            patient=patient,
            borrowed=borrowed,
            limits=limits,
            index=index,
        )
        self.encoding = self.session.encoding
        self._rejects: tuple[int, dict[bytes, bytes]] | None = None
        """A run, and the rejects of others."""
        self._merge_all = False
        self._pieces = 1

    @property
    def address(self) -> DatabaseAddress:
        return self.session.address

    @property
    def target(self) -> Target:
        return self.session.target

    @property
    def on_wait(self) -> Callable[[str], None]:
        return self.session.on_wait

    @on_wait.setter
    def on_wait(self, on_wait: Callable[[str], None]) -> None:
        self.session.on_wait = on_wait

    def connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The session's connection, opened again if it was lost."""
        return self.session.connection()

    def missing_characters(self, texts: Iterable[str]) -> frozenset[str]:
        return self.session.missing_characters(texts)

    # -- before and after a run ------------------------------------------------------------------------

    def begin_run(self, *, fingerprint: str, model: str, dimensions: int, wait: float) -> RunSpec:
        return pg_runs.begin(self.session, fingerprint=fingerprint, model=model, dimensions=dimensions, wait=wait)

    def after_a_crash(self, run: int) -> bool:
        return self.session.retrying("looking at earlier runs", lambda: pg_runs.after_a_crash(self.session, run))

    def heartbeat(self, run: int, phase: str) -> None:
        pg_runs.heartbeat(self.session, run, phase)

    def end_run(self, run: int, state: str, receipt: dict[str, Any]) -> None:
        pg_runs.end(self.session, run, state, receipt)

    @property
    @abstractmethod
    def indexed(self) -> Indexed:
        """The table whose indexes are looked after."""

    @functools.cached_property
    def has_vector_index(self) -> bool:
        def work() -> bool:
            with self.session.transaction() as cursor:
                return pg_index.has_vector_index(cursor, self.indexed)

        return self.indexed.standard or self.session.retrying("looking at the indexes", work)

    def check_index(self, policy: IndexPolicy) -> tuple[str, ...]:
        if policy in (IndexPolicy.DEFER, IndexPolicy.CONCURRENTLY):
            self.session.retrying("looking at the indexes", lambda: pg_index.check(self.session, self.indexed))
        return ()

    def forecast(self, run: RunSpec, rows: int | None = None) -> tuple[str, ...]:
        if run.indexes is IndexPolicy.NONE or rows is None or rows < INDEX_ROWS or self.has_vector_index:
            return ()
        return self.build_outlook(rows, run.dimensions)

    def build_outlook(self, rows: int, dimensions: int) -> tuple[str, ...]:
        def work() -> tuple[str, ...]:
            with self.session.transaction() as cursor:
                indexed = self.indexed
                place = indexed.schema, indexed.table
                return build_memory(cursor, place, indexed.vector, dimensions, rows).shortage(rows)

        return self.session.retrying("looking at the memory of an index", work)

    def drop_index(self) -> IndexOutcome:
        return self.session.retrying("dropping the vector index", lambda: pg_index.defer(self.session, self.indexed))

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        return pg_index.finish(self.session, self._built_for(run), beat, run)

    def _built_for(self, run: RunSpec | None) -> Indexed:
        """The table, and how its indexes are built after a run."""
        concurrently = run is not None and run.indexes is IndexPolicy.CONCURRENTLY
        return replace(self.indexed, concurrently=concurrently)

    # -- writing ---------------------------------------------------------------------------------------

    def flush(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
    ) -> FlushResult:
        import psycopg

        deletes = self.session.holdable(deletes)

        def attempt(careful: bool) -> FlushResult:
            try:
                return self._flush_once(run, number, slots, rejects, deletes, careful)
            except psycopg.errors.QueryCanceled:
                # statement_timeout holds for one statement: smaller ones may pass.
                self._pieces = min(2 * self._pieces, MOST_PIECES)
                raise

        try:
            return self.session.retrying("writing", lambda: attempt(False), rows=True)
        except psycopg.Error:
            # A column of another type would refuse every row.
            self.session.retrying("checking the table", lambda: self._check(run.dimensions))
            # A row that the database refuses: find it by halving; all others are written.
            return self.session.retrying("writing", lambda: attempt(True), rows=True)

    def _flush_once(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
        careful: bool,
    ) -> FlushResult:
        return self._write(run, number, slots, rejects, deletes, careful)

    def _write(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[Key],
        careful: bool,
        *,
        earlier: FlushResult = FlushResult(),  # noqa: B008 - a constant
        last: bool = True,
    ) -> FlushResult:
        """One transaction: a flush, or a part of it.

        Args:
            earlier: What became of the parts before this one.
            last: With this one all of the flush is written.
        """
        target = self.target
        fault("store.before_begin")
        with self.session.transaction() as cursor:
            before, now = pg_runs.fence(cursor, target, run.number, number)
            if before is not None:
                return before
            if careful:
                # A row that only the COMMIT would refuse could not be found by halving.
                cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
            deleted = self._delete(cursor, deletes) if self.in_pieces else 0
            writer = self._writer(cursor, run, now)
            for flush_slot in slots:
                writer.add(flush_slot)
            fault("store.before_copy")
            writer.write(careful)
            self._merge_all = self._merge_all or writer.met_conflict
            fault("store.after_copy")
            if not self.in_pieces:
                deleted = self._delete(cursor, deletes)
            all_rejects = [*rejects, *refused(slots, writer.rejected, in_pieces=self.in_pieces)]
            if all_rejects:
                pg_rejects.write(cursor, self.session, run.number, all_rejects)
            if self._rejects is None or self._rejects[0] != run.number:
                self._rejects = run.number, pg_rejects.of_other_runs(cursor, target, run.number)
            if others := self._rejects[1]:
                unwritten = {*writer.superseded, *(refusal[:2] for refusal in writer.rejected)}
                pg_rejects.forget_stored(cursor, target, run.number, others, slots, unwritten, self.in_pieces)
            result = FlushResult(writer.rows, writer.bytes, deleted, tuple(writer.superseded), tuple(writer.rejected))
            result = earlier.plus(result)
            if last:
                pg_runs.record_flush(cursor, target, run.number, number, result)
            fault("store.before_commit")
        fault("store.after_commit")
        return result

    @abstractmethod
    def _check(self, dimensions: int) -> None:
        """Raise SchemaError if the table is no longer what rows can be written to."""

    @abstractmethod
    def _writer(self, cursor: Cursor, run: RunSpec, now: int) -> FlushWriter:
        """What takes the rows of one flush into the tables; ``now`` as in :class:`.flush.FlushWriter`."""

    @abstractmethod
    def _delete(self, cursor: Cursor, keys: Sequence[Key]) -> int:
        """Take away what is stored for records that have no text any more; how many there were."""

    # -- rejects, and the end --------------------------------------------------------------------------

    def rejects(self, entity: str | None = None) -> Iterable[KeptReject]:
        return pg_rejects.read(self.session, entity)

    def forget_older_rejects(self, entities: Sequence[str], run: int) -> int:
        return pg_rejects.forget_older(self.session, entities, run)

    def forget_rejects_of_input(self, entity: str | None, name: str, run: int) -> int:
        return pg_rejects.forget_of_input(self.session, entity, name, run)

    def clear_rejects(self, keys: Iterable[Key] | None = None, entity: str | None = None) -> int:
        return pg_rejects.clear(self.session, keys, entity)

    def close(self) -> None:
        self.session.close()
