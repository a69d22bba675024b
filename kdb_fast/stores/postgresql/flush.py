"""PostgreSQL: rows of one flush → COPY and merge statements, within the flush's transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...db.pg_errors import kind_of, refusal
from ...db.retrying import ErrorKind
from ...tables import seal
from ...tables.target import Target, identifier
from ..base import FlushSlot, RunSpec
from ..rejects import NOT_FINITE
from . import pgcopy
from .slot_fields import place_fields, taken, vector_fields

if TYPE_CHECKING:
    import psycopg

STATEMENT_ROWS = 1000
"""Most rows of a statement that names them in its parameters; all others go through COPY."""

UNSENT_BYTES = 128 * 1024
"""What libpq may hold back before we wait for the server, one piece that psycopg gives it. With psycopg's own 1 MB the
server is left without rows now and then: a first load with a free encoder reaches 0.85 of the speed of the loading
example with this and 0.81 with that (15 loads of 100,000 rows each, in turn)."""

STAGING_COLUMNS = 8
TABLE_COLUMNS = 10
"""Without those of the key."""

COPY_TABLE = (
    "COPY {index} ({id}, {key}, {content}, {embedding}, {model}, {dimensions}, {updated_at}, "
    "kdb_fast_fingerprint, kdb_fast_run, kdb_fast_at, kdb_fast_source_at) FROM STDIN (FORMAT BINARY)"
)
CREATE_STAGING = (
    "CREATE TEMP TABLE {staging} (slot int4, row int4, row_exists bool, row_version timestamptz, {id} varchar(36), "
    "{staged_key}, {content} text, {embedding} {vector}, source_at timestamptz) ON COMMIT DROP"
)
COPY_STAGING = "COPY {staging} FROM STDIN (FORMAT BINARY)"
MERGE_EXISTING = """
UPDATE {index} t SET <content>{embedding} = s.{embedding}, {model} = %(model)s::text,
  {dimensions} = %(dimensions)s::int4, {updated_at} = now(), kdb_fast_fingerprint = %(fingerprint)s::text,
  kdb_fast_run = %(run)s, kdb_fast_at = now(), kdb_fast_source_at = s.source_at<set seal>
FROM {staging} s
WHERE {same_key} AND t.{content} <compared> s.{content}
  AND ((s.row_exists AND t.{updated_at} IS NOT DISTINCT FROM s.row_version)
       OR (t.kdb_fast_run = %(run)s AND <ours>))
"""
MERGE_SAME_TEXT = MERGE_EXISTING.replace("<content>", "").replace("<compared>", "=")
"""Rows that only get another vector. Left out of the statement, the text costs no new ``tsv``: the server takes 20 µs a
row of 33 tokens instead of 38 to 54."""
MERGE_NEW_TEXT = MERGE_EXISTING.replace("<content>", "{content} = s.{content}, ").replace("<compared>", "<>")
INSERT_STAGED = """
INSERT INTO {index} ({id}, {key}, {content}, {embedding}, {model}, {dimensions}, {updated_at},
  kdb_fast_fingerprint, kdb_fast_run, kdb_fast_at, kdb_fast_source_at<seal column>)
SELECT s.{id}, {cast_key}, s.{content}, s.{embedding}, %(model)s::text, %(dimensions)s::int4, now(),
  %(fingerprint)s::text, %(run)s, now(), s.source_at<seal>
FROM {staging} s
"""
MERGE_MISSING = f"""{INSERT_STAGED}
WHERE NOT EXISTS (SELECT FROM {{index}} t WHERE {{same_key}})
ON CONFLICT ({{key}}) DO NOTHING
"""
MERGE_FORCED = f"""{INSERT_STAGED}
ORDER BY {{cast_key}}
ON CONFLICT ({{key}}) DO UPDATE SET {{content}} = EXCLUDED.{{content}}, {{embedding}} = EXCLUDED.{{embedding}},
  {{model}} = EXCLUDED.{{model}}, {{dimensions}} = EXCLUDED.{{dimensions}}, {{updated_at}} = EXCLUDED.{{updated_at}},
  kdb_fast_fingerprint = EXCLUDED.kdb_fast_fingerprint, kdb_fast_run = EXCLUDED.kdb_fast_run,
  kdb_fast_at = EXCLUDED.kdb_fast_at, kdb_fast_source_at = EXCLUDED.kdb_fast_source_at<new seal>
"""
UNWRITTEN_ROWS = """
SELECT s.slot, s.row, EXISTS (SELECT FROM {index} t WHERE {same_key})
FROM {staging} s
WHERE NOT EXISTS (SELECT FROM {index} t WHERE {same_key} AND t.kdb_fast_run = %(run)s AND t.kdb_fast_at = now())
ORDER BY s.slot, s.row
"""


def dropped(table: str) -> tuple[str, str]:
    """Reason and detail of a row that the server took and did not store.

    Args:
        table: As messages name it.
    """
    return "database_refused", f"a trigger or rule of {table} dropped the row without an error"


SEAL_OF_STAGED = seal.expression(
    "postgresql", "%(fingerprint)s::text", "%(model)s::text", "%(dimensions)s::int4", "s.{content}", "s.{embedding}"
)


def _variant(statement: str, sealed: bool) -> str:
    """A merge for a table without, or with, the column for seals."""
    parts = {
        "set seal": f", {seal.COLUMN} = {SEAL_OF_STAGED}",
        "seal column": f", {seal.COLUMN}",
        "seal": f", {SEAL_OF_STAGED}",
        "new seal": f", {seal.COLUMN} = EXCLUDED.{seal.COLUMN}",
    }
    for name, text in parts.items():
        statement = statement.replace(f"<{name}>", text if sealed else "")
    return statement.replace("<ours>", seal.ours("postgresql", (seal.COLUMN,) if sealed else (), "t."))


FORCED = {sealed: _variant(MERGE_FORCED, sealed) for sealed in (False, True)}
MERGES = {
    sealed: tuple(_variant(statement, sealed) for statement in (MERGE_SAME_TEXT, MERGE_NEW_TEXT, MERGE_MISSING))
    for sealed in (False, True)
}

Group = tuple[FlushSlot, list[int]]
"""Rows of one slot, by number, in ascending order."""

Packed = bytes | memoryview


class RowsDroppedError(Exception):
    """The server took fewer rows than it was given, without an error."""


class FlushWriter:
    """Rows of one flush on their way into the tables, within the flush's transaction.

    Attributes:
        met_conflict: Fresh rows could not be copied as they are.
        rows: Rows written.
        bytes: Of rows as they were sent.
        superseded: (slot, row) that another program has changed meanwhile.
        rejected: (slot, row, reason, detail) that the database refused.
    """

    copy_table = COPY_TABLE

    @property
    def shown(self) -> str:
        """The table that is written, for a message."""
        return self._home.index.name

    def __init__(
        self,
        cursor: psycopg.Cursor[tuple[Any, ...]],
        target: Target,
        run: RunSpec,
        now: int,
        *,
        merge_all: bool,
        force: bool = False,
        vectors: bool = True,
        pieces: int = 1,
        sealed: bool = False,
    ) -> None:
        """
        Args:
            now: Time of the transaction, in microseconds since 1970 UTC.
            merge_all: Do not try to copy fresh rows straight into the table.
            force: Overwrite a row whoever wrote it.
            vectors: False leaves embedding, model and dimensions empty.
            pieces: Statements among which the rows are divided.
            sealed: The table has a column for seals, which COPY cannot compute: all rows are merged.
        """
        self.cursor, self.run, self.now = cursor, run, now
        self._home, self._statement = target, target.statement
        self._force, self._vectors, self._pieces, self._sealed = force, vectors, pieces, sealed
        self.met_conflict = False
        self.rows = self.bytes = 0
        self.superseded: list[tuple[int, int]] = []
        self.rejected: list[tuple[int, int, str, str]] = []
        self._merge_all = merge_all or sealed
        self._fresh: list[Group] = []
        self._existing: list[Group] = []
        stamp = pgcopy.timestamp_field(now)
        origin = pgcopy.text_field(run.model[:100]) + pgcopy.int_field(run.dimensions, 4)
        self._constant = (
            (origin if vectors else pgcopy.NULL + pgcopy.NULL)
            + stamp
            + pgcopy.text_field(run.fingerprint)
            + pgcopy.int_field(run.number, 8)
            + stamp
        )

    def add(self, flush_slot: FlushSlot) -> None:
        existing = flush_slot.slot.exists[: flush_slot.slot.rows].tolist()
        for group, wanted in ((self._fresh, 0), (self._existing, 1)):
            rows = [i for i, k in enumerate(existing) if k == wanted and i not in flush_slot.skip]
            if rows:
                group.append((flush_slot, rows))

    def write(self, careful: bool) -> None:
        """Write all rows.

        Args:
            careful: A row of them is refused: it is to be found.
        """
        fresh, existing = self._fresh, self._existing
        if fresh and not careful and not self._merge_all and self._copy_fresh(fresh):
            fresh = []
        if fresh or existing:
            self._merge([*fresh, *existing], careful)

    def _copy_fresh(self, groups: list[Group]) -> bool:
        """Copy rows straight into the table; False where that cannot be, and they are to be merged."""
        import psycopg

        try:
            with self.cursor.connection.transaction():
                self._copy_all(groups)
        except (psycopg.errors.UniqueViolation, RowsDroppedError):
            # Somebody else indexed one of these since the parent looked: merge decides whose is newer.
            # Or a trigger dropped rows: merge tells which.
            self.met_conflict = True
            return False
        return True

    def _copy_all(self, groups: list[Group]) -> None:
        wanted = total = _count(groups)
        for part in _parts(groups, self._pieces):
            wanted -= self._copy(self.copy_table, self._table_rows, part)
        if wanted:
            raise RowsDroppedError
        self.rows += total

    def _merge(self, groups: list[Group], careful: bool) -> None:
        if careful:
            for flush_slot, rows in groups:
                self._merge_halving(flush_slot, rows)
            return
        for part in _parts(groups, self._pieces):
            self._merge_part(part)

    def _merge_part(self, groups: list[Group]) -> None:
        cursor, parameters = self.cursor, self._parameters()
        staged = self._stage(groups)
        done = self._merge_staged(staged, parameters)
        unwritten: list[tuple[Any, ...]] = []
        if done != staged:
            unwritten = self._unwritten(parameters)
            self._note_unwritten(unwritten)
        if self._force or self._pieces > 1:
            cursor.execute(self._statement("DROP TABLE {staging}"))
        self.rows += staged - len(unwritten)

    def _note_unwritten(self, rows: Iterable[tuple[Any, ...]]) -> None:
        for slot, row, is_there in rows:
            if is_there:
                self.superseded.append((slot, row))
            else:
                self.rejected.append((slot, row, *dropped(self.shown)))

    def _stage(self, groups: list[Group]) -> int:
        self.cursor.execute(self._create_staging())
        self._copy(COPY_STAGING, self._staging_rows, groups)
        # Without this a flush of some thousand rows may be joined by reading the whole index (2 KB a row).
        self.cursor.execute(
            self._statement(
                "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; ANALYZE {staging} ({keys})",
                keys=self._staged_keys(),
            )
        )
        return _count(groups)

    def _create_staging(self) -> bytes:
        return self._statement(CREATE_STAGING)

    def _staged_keys(self) -> str:
        return ", ".join(identifier(column.name) for column in self._home.index.key)

    def _unwritten(self, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Slot and row of what was staged and not written, and whether that is because another program has."""
        return self.cursor.execute(self._statement(UNWRITTEN_ROWS), parameters).fetchall()

    def _merge_staged(self, staged: int, parameters: dict[str, Any]) -> int:
        if self._force:
            # One statement, so that it does not matter what other sessions insert and delete meanwhile.
            return self.cursor.execute(self._statement(FORCED[self._sealed]), parameters).rowcount
        done = 0
        for statement in MERGES[self._sealed]:
            done += self.cursor.execute(self._statement(statement), parameters).rowcount
            if done == staged:
                break
        return done

    def _merge_halving(self, flush_slot: FlushSlot, rows: list[int]) -> None:
        """Merge what can be merged; halve on refusal until the single rows that are refused are found."""
        import psycopg

        try:
            with self.cursor.connection.transaction():
                staged = self._stage([(flush_slot, rows)])
                done = self._merge_staged(staged, self._parameters())
                unwritten: list[tuple[Any, ...]] = []
                if done != staged:
                    unwritten = self._unwritten(self._parameters())
                self.cursor.execute(self._statement("DROP TABLE {staging}"))
            self._note_unwritten(unwritten)
            self.rows += staged - len(unwritten)
        except psycopg.Error as error:
            if kind_of(error) is not ErrorKind.DATA:
                raise
            if len(rows) == 1:
                is_finite = np.isfinite(flush_slot.slot.vectors[rows[0]]).all() or not self._vectors
                why = refusal(error) if is_finite else NOT_FINITE
                self.rejected.append((flush_slot.slot.number, rows[0], *why))
                return
            middle = len(rows) // 2
            self._merge_halving(flush_slot, rows[:middle])
            self._merge_halving(flush_slot, rows[middle:])

    def _parameters(self) -> dict[str, Any]:
        run = self.run
        return {
            "run": run.number,
            "model": run.model[:100] if self._vectors else None,
            "dimensions": run.dimensions if self._vectors else None,
            "fingerprint": run.fingerprint,
        }

    def _copy(self, statement: str, pack: Callable[[Group], Packed], groups: Sequence[Group]) -> int:
        """Returns how many rows the server says it took."""
        from psycopg.copy import LibpqWriter

        with self.cursor.copy(
            self._statement(statement), writer=LibpqWriter(self.cursor, flush_threshold=UNSENT_BYTES)
        ) as copy:
            copy.write(pgcopy.SIGNATURE)
            for chunk in map(pack, groups):
                self.bytes += len(chunk)
                copy.write(chunk)
            copy.write(pgcopy.TRAILER)
        return self.cursor.rowcount

    def _keys_and_texts(self, flush_slot: FlushSlot, rows: list[int]) -> list[pgcopy.Fields]:
        """The fields of each key column, and those of the texts."""
        raw = flush_slot.slot.raw_rows()
        keys, texts = zip(*([raw[i] for i in rows] if len(rows) < len(raw) else raw), strict=True)
        parts = zip(*[key.split(b"\0") for key in keys], strict=True)
        return [pgcopy.text_fields(values) for values in (*parts, texts)]

    def _table_rows(self, group: Group) -> Packed:
        flush_slot, rows = group
        slot = flush_slot.slot
        return pgcopy.pack_rows(
            TABLE_COLUMNS + len(self._home.index.key),
            [
                pgcopy.id_fields(len(rows)),
                *self._keys_and_texts(flush_slot, rows),
                vector_fields(flush_slot, rows) if self._vectors else pgcopy.NULL,
                self._constant,
                pgcopy.timestamp_fields(slot.source_at[taken(rows)]),
            ],
            len(rows),
        )

    def _staging_rows(self, group: Group) -> Packed:
        flush_slot, rows = group
        slot = flush_slot.slot
        return pgcopy.pack_rows(
            STAGING_COLUMNS + len(self._home.index.key),
            [
                *place_fields(flush_slot, rows),
                pgcopy.sized(slot.exists[rows].reshape(-1, 1)),
                pgcopy.version_fields(slot.row_version[rows]),
                pgcopy.id_fields(len(rows)),
                *self._keys_and_texts(flush_slot, rows),
                vector_fields(flush_slot, rows) if self._vectors else pgcopy.NULL,
                pgcopy.timestamp_fields(slot.source_at[taken(rows)]),
            ],
            len(rows),
        )


def _count(groups: Iterable[Group]) -> int:
    return sum(len(rows) for _, rows in groups)


def _parts(groups: list[Group], pieces: int) -> list[list[Group]]:
    """All rows, in about so many parts of about the same size; at least one row each."""
    if pieces == 1:
        return [groups]
    size = -(-_count(groups) // pieces)
    return [
        [(flush_slot, rows[start : start + size])] for flush_slot, rows in groups for start in range(0, len(rows), size)
    ]
