"""PostgreSQL: rows of one flush → the vector column of the user's table, and the table of its state.

Keys travel as text, are cast to the type of their column, and compared by the operator of its unique index.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...records import Key
from ...tables.column_target import ColumnTarget
from ..base import RunSpec
from . import pgcopy
from .by_key import by_key
from .flush import FlushWriter, Group, Packed
from .keyword import tsvector_of
from .slot_fields import place_fields, taken, vector_fields

if TYPE_CHECKING:
    import psycopg

# The text is an expression of the user's over bare names of columns: ours beside them have names that no table has.
CREATE_STAGING = (
    "CREATE TEMP TABLE {staging} (kdb_fast_slot int4, kdb_fast_row int4, {keys}, kdb_fast_text bytea, "
    "kdb_fast_hash bytea, kdb_fast_vector {plain_vector}, kdb_fast_source timestamptz) ON COMMIT DROP"
)
WRITE = """
WITH locked AS MATERIALIZED (
  SELECT {row_keys}{words}, s.ctid AS staged, s.kdb_fast_slot::bigint << 32 | s.kdb_fast_row AS place
  FROM {staging} s JOIN {table} t ON {same_row}
  LEFT JOIN (SELECT {kept_keys}, vector_hash AS kdb_fast_kept_vector FROM {state}) st ON {same_state}
  WHERE sha256({text}) = s.kdb_fast_text AND {mine}
  ORDER BY {keys} FOR NO KEY UPDATE OF t SKIP LOCKED
), written AS (
  UPDATE {table} t SET {embedding} = s.kdb_fast_vector::{type} FROM locked l JOIN {staging} s ON s.ctid = l.staged
  WHERE {same_locked}
  RETURNING {locked_keys}{locked_words}, s.kdb_fast_text AS text_hash, {stored_hash} AS vector_hash,
    t.xmin AS version, s.kdb_fast_source AS source_at
), known AS (
  INSERT INTO {state} AS st ({state_keys}, fingerprint, text_hash, vector_hash, version, run, at, source_at{tsv})
  SELECT {state_keys}, %(fingerprint)s::text, text_hash, vector_hash, version, %(run)s, now(), source_at{tsv}
  FROM written WHERE vector_hash IS NOT NULL
  ON CONFLICT ({state_keys}) DO UPDATE SET fingerprint = EXCLUDED.fingerprint, text_hash = EXCLUDED.text_hash,
    vector_hash = EXCLUDED.vector_hash, version = EXCLUDED.version, run = EXCLUDED.run, at = EXCLUDED.at,
    source_at = EXCLUDED.source_at{set_words}
  RETURNING 1
)
SELECT n, CASE WHEN n < %(staged)s THEN (SELECT array_agg(place) FROM locked) END FROM (SELECT count(*) FROM known) k(n)
"""
"""A row is written while its text is the one that was read, and its vector none of another program's. Rows are locked
first, in the order of their keys, and none that is locked is waited for: so neither this nor an application that
writes the same rows can come into a deadlock. The vector is known as the database keeps it. Gives how many rows were
written, and where that is not all of them, which were locked."""

STORED_HASH = "sha256({sender}(t.{embedding}))"
SAME_HASH = (
    "CASE WHEN t.{embedding} OPERATOR({pgvector}=) s.kdb_fast_vector THEN s.kdb_fast_hash "
    "ELSE sha256({sender}(t.{embedding})) END"
)
"""Of the vector as the column has it. Where that is the one that was sent, its hash was sent too: the server takes
15 us to make that of 384 dimensions, and 0.3 us to compare them."""

MINE = "(t.{embedding} IS NULL OR sha256({sender}(t.{embedding})) = st.kdb_fast_kept_vector)"

UNWRITTEN_ROWS = """
SELECT s.kdb_fast_slot, s.kdb_fast_row FROM {staging} s
WHERE NOT EXISTS (SELECT FROM {state} st WHERE {same_state} AND st.run = %(run)s AND st.at = now())
ORDER BY 1, 2
"""

CLEAR = """
WITH locked AS MATERIALIZED (
  SELECT {row_keys}, st.kdb_fast_kept_vector AS kept, sha256({sender}(t.{embedding})) AS found
  FROM unnest({arrays}) AS k({names}) JOIN {table} t ON {same_row}
  JOIN (SELECT {kept_keys}, text_hash AS kdb_fast_kept_text, vector_hash AS kdb_fast_kept_vector FROM {state}) st
    ON {same_state}
  WHERE sha256({text}) IS DISTINCT FROM st.kdb_fast_kept_text
  ORDER BY {keys} FOR NO KEY UPDATE OF t SKIP LOCKED
), cleared AS (
  UPDATE {table} t SET {embedding} = NULL FROM locked l WHERE {same_locked} AND l.found = l.kept RETURNING 1
), forgotten AS (
  DELETE FROM {state} st USING locked l WHERE {state_locked}
)
SELECT count(*) FROM cleared
"""
"""A row that has no text any more loses the vector of the text it had, if that is ours. One that is locked is left to
the next run."""


class ColumnWriter(FlushWriter):
    """Rows of one flush on their way into the column, within the flush's transaction."""

    def __init__(
        self, cursor: psycopg.Cursor[tuple[Any, ...]], target: ColumnTarget, run: RunSpec, now: int, *, pieces: int = 1
    ) -> None:
        super().__init__(cursor, target.home, run, now, merge_all=True, pieces=pieces)
        self._target = target
        self._statement = target.statement
        self._columns = 6 + len(target.key)
        # A column of another type rounds what it is given.
        self._hashed = target.vector.sender.endswith(".vector_send")
        self._locked: set[int] = set()
        self.locked_since: float | None = None
        """Since when rows are locked, as ``time.monotonic()`` has it; None before."""

    @property
    def shown(self) -> str:
        return self._target.shown

    def _create_staging(self) -> bytes:
        return self._target.statement(
            CREATE_STAGING,
            keys=self._target.each_key("kdb_fast_key_{number} text"),
            plain_vector=self._target.home.statement("{vector}").decode(),
        )

    def _staged_keys(self) -> str:
        return self._target.each_key("kdb_fast_key_{number}")

    def _merge_staged(self, staged: int, parameters: dict[str, Any]) -> int:
        target, pgvector = self._target, self._home.statement("{pgvector}").decode()
        statement = target.statement(
            WRITE,
            mine="true" if target.replace else target.statement(MINE).decode(),
            stored_hash=target.statement(SAME_HASH if self._hashed else STORED_HASH, pgvector=pgvector).decode(),
            same_row=target.same_key("t.{column}", "s.kdb_fast_key_{number}::{type}"),
            same_locked=target.same_key("t.{column}", "l.key_{number}"),
            row_keys=target.each_key("t.{column} AS key_{number}"),
            locked_keys=target.each_key("l.key_{number}"),
            state_keys=target.each_key("key_{number}"),
            **_kept(target),
            **_words(target),
        )
        if self.locked_since is None:
            self.locked_since = time.monotonic()
        row = self.cursor.execute(statement, {**parameters, "staged": staged}).fetchone()
        assert row is not None
        self._locked = set(row[1] or ())
        return int(row[0])

    def _unwritten(self, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        target = self._target
        same_state = target.same_key("st.key_{number}", "s.kdb_fast_key_{number}::{type}")
        rows = self.cursor.execute(target.statement(UNWRITTEN_ROWS, same_state=same_state), parameters).fetchall()
        # What was locked and not written something has kept from it; all else is another program's doing.
        return [(slot, row, slot << 32 | row not in self._locked) for slot, row in rows]

    def _staging_rows(self, group: Group) -> Packed:
        flush_slot, rows = group
        slot = flush_slot.slot
        raw = slot.raw_rows()
        keys = zip(*[raw[i][0].split(b"\0") for i in rows], strict=True)
        vectors = vector_fields(flush_slot, rows)
        return pgcopy.pack_rows(
            self._columns,
            [
                *place_fields(flush_slot, rows),
                *map(pgcopy.text_fields, keys),
                pgcopy.sized(slot.hashes[taken(rows)]),
                pgcopy.sized(pgcopy.vector_hashes(vectors)) if self._hashed else pgcopy.NULL,
                vectors,
                pgcopy.timestamp_fields(slot.source_at[taken(rows)]),
            ],
            len(rows),
        )


def _kept(target: ColumnTarget) -> dict[str, str]:
    """Parts of a statement that looks at the state of a row ``t``; its columns get names that no table has."""
    return {
        "keys": target.each_key("t.{column}"),
        "kept_keys": target.each_key("key_{number} AS kdb_fast_kept_{number}"),
        "same_state": target.same_key("t.{column}", "st.kdb_fast_kept_{number}"),
    }


def _words(target: ColumnTarget) -> dict[str, str]:
    """Parts of the statement that writes what keyword search needs, of the text as it is compared."""
    if not target.keyword:
        return dict.fromkeys(("words", "locked_words", "tsv", "set_words"), "")
    words = tsvector_of(f"({target.text})::text", target.keyword).replace("%", "%%")
    return {
        "words": f", {words} AS tsv",
        "locked_words": ", l.tsv",
        "tsv": ", tsv",
        "set_words": ", tsv = EXCLUDED.tsv",
    }


def clear_keys(cursor: psycopg.Cursor[tuple[Any, ...]], target: ColumnTarget, keys: Sequence[Key]) -> int:
    """Take the vectors of these rows away, as far as they are ours and of a text that the row has no more; returns how
    many rows there were. A key that is none of its column's type has no row."""
    if not keys:
        return 0
    statement = target.statement(
        CLEAR,
        arrays=target.each_key("%s::text[]"),
        names=target.each_key("kdb_fast_key_{number}"),
        row_keys=target.each_key("t.{column} AS key_{number}"),
        same_row=target.same_key("t.{column}", "k.kdb_fast_key_{number}::{type}"),
        same_locked=target.same_key("t.{column}", "l.key_{number}"),
        state_locked=target.same_key("st.key_{number}", "l.key_{number}"),
        **_kept(target),
    )

    def execute(keys: Sequence[Key], arrays: list[str]) -> int:
        with cursor.connection.transaction():
            row = cursor.execute(statement, arrays).fetchone()
            return int(row[0]) if row else 0

    return sum(by_key(keys, len(target.key), execute))
