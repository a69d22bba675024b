"""PostgreSQL: rows of one flush → the vector column of the user's table, and the table of its state.

Keys travel as text, are cast to the type of their column, and compared by the operator of its unique index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...db.pg_errors import kind_of
from ...db.retrying import ErrorKind
from ...records import Key
from ...tables.column_target import ColumnTarget
from ...tables.key import text_arrays
from ..base import FlushSlot, RunSpec
from . import pgcopy
from .flush import FlushWriter, Group

if TYPE_CHECKING:
    import psycopg

# The text is an expression of the user's over bare names of columns: ours beside them have names that no table has.
CREATE_STAGING = (
    "CREATE TEMP TABLE {staging} (kdb_fast_slot int4, kdb_fast_row int4, {keys}, kdb_fast_text bytea, "
    "kdb_fast_vector {plain_vector}, kdb_fast_source timestamptz) ON COMMIT DROP"
)
WRITE = """
WITH written AS (
  UPDATE {table} t SET {embedding} = s.kdb_fast_vector::{type} FROM {staging} s
  WHERE {same_row} AND sha256({text}) = s.kdb_fast_text
  RETURNING {row_keys}, s.kdb_fast_text AS text_hash, sha256({sender}(t.{embedding})) AS vector_hash,
    s.kdb_fast_source AS source_at
), known AS (
  INSERT INTO {state} AS st ({state_keys}, fingerprint, text_hash, vector_hash, run, at, source_at)
  SELECT {state_keys}, %(fingerprint)s::text, text_hash, vector_hash, %(run)s, now(), source_at FROM written
  WHERE vector_hash IS NOT NULL
  ON CONFLICT ({state_keys}) DO UPDATE SET fingerprint = EXCLUDED.fingerprint, text_hash = EXCLUDED.text_hash,
    vector_hash = EXCLUDED.vector_hash, run = EXCLUDED.run, at = EXCLUDED.at, source_at = EXCLUDED.source_at
  RETURNING 1
)
SELECT count(*) FROM known
"""
"""A row is written while its text is the one that was read; the vector is known as the database keeps it."""

UNWRITTEN_ROWS = """
SELECT s.kdb_fast_slot, s.kdb_fast_row,
  NOT EXISTS (SELECT FROM {table} t WHERE {same_row} AND sha256({text}) = s.kdb_fast_text)
FROM {staging} s
WHERE NOT EXISTS (SELECT FROM {state} st WHERE {same_state} AND st.run = %(run)s AND st.at = now())
ORDER BY 1, 2
"""
"""Slot and row, and whether it is gone or has another text now: else something has kept the row from being written."""

CLEAR = """
WITH gone AS (
  DELETE FROM {state} st USING unnest({arrays}) AS k({names}) WHERE {same_state}
  RETURNING {gone_keys}, st.text_hash AS kdb_fast_text_hash, st.vector_hash AS kdb_fast_vector_hash
)
UPDATE {table} t SET {embedding} = NULL FROM gone
WHERE {same_gone} AND sha256({sender}(t.{embedding})) = gone.kdb_fast_vector_hash
  AND sha256({text}) IS DISTINCT FROM gone.kdb_fast_text_hash
"""
"""A row that has no text any more loses the vector of the text it had, if that is ours."""


class ColumnWriter(FlushWriter):
    """Rows of one flush on their way into the column, within the flush's transaction."""

    def __init__(
        self, cursor: psycopg.Cursor[tuple[Any, ...]], target: ColumnTarget, run: RunSpec, now: int, *, pieces: int = 1
    ) -> None:
        super().__init__(cursor, target.home, run, now, merge_all=True, pieces=pieces)
        self._target = target
        self._statement = target.statement
        self._columns = 5 + len(target.key)

    def _create_staging(self) -> bytes:
        return self._target.statement(
            CREATE_STAGING,
            keys=self._target.each_key("kdb_fast_key_{number} text"),
            plain_vector=self._target.home.statement("{vector}").decode(),
        )

    def _staged_keys(self) -> str:
        return self._target.each_key("kdb_fast_key_{number}")

    def _merge_staged(self, staged: int, parameters: dict[str, Any]) -> int:
        target = self._target
        statement = target.statement(
            WRITE,
            same_row=target.same_key("t.{column}", "s.kdb_fast_key_{number}::{type}"),
            row_keys=target.each_key("t.{column} AS key_{number}"),
            state_keys=target.each_key("key_{number}"),
        )
        row = self.cursor.execute(statement, parameters).fetchone()
        return int(row[0]) if row else 0

    def _unwritten(self, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        target = self._target
        statement = target.statement(
            UNWRITTEN_ROWS,
            same_row=target.same_key("t.{column}", "s.kdb_fast_key_{number}::{type}"),
            same_state=target.same_key("st.key_{number}", "s.kdb_fast_key_{number}::{type}"),
        )
        return self.cursor.execute(statement, parameters).fetchall()

    def _staging_rows(self, group: Group) -> bytes:
        flush_slot, rows = group
        slot = flush_slot.slot
        number = pgcopy.int_field(slot.number, 4)
        return pgcopy.pack_rows(
            self._columns,
            [
                [number + pgcopy.int_field(i, 4) for i in rows],
                _keys_and_hashes(flush_slot, rows),
                self._vector_fields(flush_slot, rows),
                pgcopy.timestamp_fields(slot.source_at[rows]),
            ],
            len(rows),
        )


def _keys_and_hashes(flush_slot: FlushSlot, rows: list[int]) -> list[bytes]:
    """The parts of each key, which is of texts only, and SHA-256 of the text."""
    raw = flush_slot.slot.raw_rows()
    size, hashed = int.to_bytes, hashlib.sha256
    return [
        b"".join([size(len(part), 4, "big") + part for part in (*raw[i][0].split(b"\0"), hashed(raw[i][1]).digest())])
        for i in rows
    ]


def clear_keys(cursor: psycopg.Cursor[tuple[Any, ...]], target: ColumnTarget, keys: Sequence[Key]) -> int:
    """Take the vectors of these rows away, as far as they are ours and of a text that the row has no more; returns how
    many rows there were. A key that is none of its column's type has no row."""
    import psycopg

    if not keys:
        return 0
    statement = target.statement(
        CLEAR,
        arrays=target.each_key("%s::text[]"),
        names=target.each_key("key_{number}"),
        same_state=target.same_key("st.key_{number}", "k.key_{number}::{type}"),
        gone_keys=target.each_key("st.key_{number} AS kdb_fast_key_{number}"),
        same_gone=target.same_key("t.{column}", "gone.kdb_fast_key_{number}"),
    )
    try:
        with cursor.connection.transaction():
            return cursor.execute(statement, text_arrays(keys, len(target.key))).rowcount
    except psycopg.Error as error:
        if kind_of(error) is not ErrorKind.DATA:
            raise
    middle = len(keys) // 2
    return clear_keys(cursor, target, keys[:middle]) + clear_keys(cursor, target, keys[middle:]) if middle else 0
