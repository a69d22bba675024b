"""PostgreSQL: a table of vectors in which a record has a row for each piece of its text, as a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...tables.index_policy import IndexOutcome
from ..base import RunSpec
from .chunk_flush import ChunkWriter
from .flush import FlushWriter
from .table_store import PostgreSQLTableStore

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

LOOK_UP = """
SELECT k.i, f.* FROM unnest({arrays}) WITH ORDINALITY AS k({names}, i), LATERAL (
  SELECT (array_agg(t.kdb_fast_hash ORDER BY t.chunk))[1] AS text_hash,
    CASE WHEN count(*) = max(t.kdb_fast_chunks) AND count(DISTINCT t.kdb_fast_hash) = 1
      AND count(DISTINCT t.kdb_fast_fingerprint) = 1
      AND bool_and(t.kdb_fast_seal = sha256({pgvector}vector_send(t.{embedding}))) THEN min(t.kdb_fast_fingerprint) END
  FROM {table} t WHERE {same_row} OFFSET 0) f
WHERE f.text_hash IS NOT NULL
"""
"""A record is known where all of its pieces are there, as they were written."""

IS_THERE = """
SELECT to_regclass(%(aside)s) IS NOT NULL, NOT EXISTS (
  SELECT attname, atttypid, atttypmod FROM pg_attribute
  WHERE attrelid = to_regclass(%(table)s) AND attname = ANY(%(columns)s::text[])
  EXCEPT SELECT attname, atttypid, atttypmod FROM pg_attribute WHERE attrelid = to_regclass(%(aside)s))
"""
"""Whether there is a table for pieces, and of the columns that the table of vectors has now."""
MAKE_ASIDE = (
    "CREATE TABLE {aside} AS SELECT {columns}, {written}, 0::int8 AS {revision} FROM {table} WITH NO DATA; "
    "ALTER TABLE {aside} ADD PRIMARY KEY ({revision}, chunk)"
)
"""With a key, without which nothing can be deleted where a publication takes in all tables."""
DROP_ASIDE = "DROP TABLE {aside}"
TRUNCATE_ASIDE = "TRUNCATE {aside}"
"""Gives back the room of all pieces that were put aside. Waits for whoever reads the table, such as pg_dump."""
CLEAR_ASIDE = "DELETE FROM {aside}"


class PostgreSQLChunkStore(PostgreSQLTableStore):
    """Writes records in pieces, each record whole or not at all."""

    in_pieces = True
    look_up = LOOK_UP

    def _prepare_table(self, cursor: Cursor, dimensions: int) -> tuple[str, ...]:
        notes = super()._prepare_table(cursor, dimensions)
        table = self.table
        columns = [*(key.name for key in table.key), *table.written]
        names = {"aside": table.home.regclass(table.aside), "table": table.regclass, "columns": columns}
        is_there, fits = cursor.execute(IS_THERE.encode(), names).fetchone() or (False, False)
        if is_there and not fits:
            cursor.execute(table.statement(DROP_ASIDE))
        if not (is_there and fits):
            cursor.execute(table.statement(MAKE_ASIDE))
        return notes

    def begin_run(self, *, fingerprint: str, model: str, dimensions: int, wait: float) -> RunSpec:
        run = super().begin_run(fingerprint=fingerprint, model=model, dimensions=dimensions, wait=wait)
        self._clear_aside()  # what a run has left that was killed
        return run

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        self._clear_aside()  # pieces of records that could not be stored
        return super().finish_index(beat, run)

    def _clear_aside(self) -> None:
        self.session.retrying("clearing pieces", self._clear_once)

    def _clear_once(self) -> None:
        import psycopg

        try:
            with self.session.transaction() as cursor:
                cursor.execute("SET LOCAL lock_timeout = '1s'")
                cursor.execute(self.table.statement(TRUNCATE_ASIDE))
        except (psycopg.errors.LockNotAvailable, psycopg.errors.InsufficientPrivilege):
            self.session.connection().execute(self.table.statement(CLEAR_ASIDE))

    def _writer(self, cursor: Cursor, run: RunSpec, now: int) -> FlushWriter:
        return ChunkWriter(cursor, self.table, run, now, reference=self._find_reference(cursor), pieces=self._pieces)
