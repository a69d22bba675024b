"""PostgreSQL: rows of one flush → the table of vectors.

Keys travel as text. Rows that are new are copied straight into the table where the types of the key have a binary form
that is ours to make; the others are staged, and their keys read by the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...tables.table_target import TableTarget
from ..base import FlushSlot, RunSpec
from . import pgcopy
from .flush import FlushWriter, Group, Packed
from .foreign_key import Reference
from .key_fields import key_fields
from .keyword import tsvector_of
from .slot_fields import place_fields, taken, vector_fields

if TYPE_CHECKING:
    import psycopg

COPY_TABLE = "COPY {table} ({columns}, {written}) FROM STDIN (FORMAT BINARY)"
CREATE_STAGING = (
    "CREATE TEMP TABLE {staging} (slot int4, row int4, {keys}, <content>vector {vector}, hash bytea, seal bytea) "
    "ON COMMIT DROP"
)
WRITE = """
INSERT INTO {table} AS t ({columns}, {written})
SELECT {typed_keys}, <content>s.vector, s.hash, s.seal, %(fingerprint)s::text, %(run)s, now(){tsvector}
FROM {staging} s {living} ORDER BY {typed_keys}
ON CONFLICT ({columns}) DO UPDATE SET {changes}, kdb_fast_version = EXCLUDED.kdb_fast_version
"""
UNWRITTEN_ROWS = """
SELECT s.slot, s.row, {gone} FROM {staging} s
WHERE NOT EXISTS (SELECT FROM {table} t WHERE {same_row} AND t.kdb_fast_run = %(run)s AND t.kdb_fast_at = now())
ORDER BY 1, 2
"""
"""Slot and row, and whether the record is gone or locked: else something has kept the row from being written."""

LOCK = " FOR KEY SHARE OF r SKIP LOCKED"
"""As the foreign key will lock a record, without waiting for another program that is deleting it."""

STAGED_KEY = "s.key_{number}::{type}"


class TableWriter(FlushWriter):
    """Rows of one flush on their way into the table, within the flush's transaction."""

    copy_table = COPY_TABLE

    def __init__(
        self,
        cursor: psycopg.Cursor[tuple[Any, ...]],
        target: TableTarget,
        run: RunSpec,
        now: int,
        *,
        reference: Reference,
        merge_all: bool,
        pieces: int = 1,
    ) -> None:
        fields = [key_fields(key.type) for key in target.key]
        self._key_fields = [field for field in fields if field is not None]
        # What the server makes of a text, COPY cannot say; and a foreign key might refuse all of it for one row.
        merge_all |= len(self._key_fields) < len(fields) or bool(target.keyword) or reference.exists
        super().__init__(cursor, target.home, run, now, merge_all=merge_all, pieces=pieces)
        self._target = target
        self._statement = target.statement
        self._has_record = ""
        if target.source:
            self._has_record = target.has_record(STAGED_KEY, LOCK if reference.exists and reference.lockable else "")
        self._constant = (
            pgcopy.text_field(run.fingerprint) + pgcopy.int_field(run.number, 8) + pgcopy.timestamp_field(now)
        )

    @property
    def shown(self) -> str:
        return self._target.shown

    @property
    def _stages_text(self) -> bool:
        return self._target.content or bool(self._target.keyword)

    def _create_staging(self) -> bytes:
        statement = CREATE_STAGING.replace("<content>", "content text, " if self._stages_text else "")
        return self._statement(statement, keys=self._target.each_key("key_{number} text"))

    def _staged_keys(self) -> str:
        return self._target.each_key("key_{number}")

    def _copy_fresh(self, groups: list[Group]) -> bool:
        """Without a savepoint, so that the rows are the transaction's own: that is how they are known again."""
        self._copy_all(groups)
        return True

    def _merge_staged(self, staged: int, parameters: dict[str, Any]) -> int:
        target = self._target
        statement = self._statement(
            WRITE.replace("<content>", "s.content, " if target.content else ""),
            tsvector=f", {staged_words(target.keyword)}" if target.keyword else "",
            typed_keys=target.each_key(STAGED_KEY),
            living=f"WHERE {self._has_record}" if target.source else "",
            changes=", ".join(f"{name} = EXCLUDED.{name}" for name in map(target.column, target.written)),
        )
        return self.cursor.execute(statement, parameters).rowcount

    def _unwritten(self, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        target = self._target
        statement = self._statement(
            UNWRITTEN_ROWS,
            gone=f"NOT {self._has_record}" if target.source else "false",
            same_row=target.same_key("t.{column}", STAGED_KEY),
        )
        return self.cursor.execute(statement, parameters).fetchall()

    def _fields(
        self, group: Group, keys: Iterable[pgcopy.Fields], texts: Sequence[bytes], *, text: bool
    ) -> list[pgcopy.Fields]:
        """The fields of each column up to what is the same in all rows.

        Args:
            keys: The fields of each column of the key.
            texts: Of the rows.
            text: Whether the text is among the fields.
        """
        flush_slot, rows = group
        vectors = vector_fields(flush_slot, rows)
        hashes = flush_slot.slot.hashes[taken(rows)], pgcopy.vector_hashes(vectors)
        content = [pgcopy.text_fields(texts)] if text else []
        return [*keys, *content, vectors, *map(pgcopy.sized, hashes)]

    def _table_rows(self, group: Group) -> Packed:
        flush_slot, rows = group
        columns, texts = _keys_and_texts(flush_slot, rows)
        keys = [fields(values) for fields, values in zip(self._key_fields, columns, strict=True)]
        count = len(self._target.key) + len(self._target.written)
        return pgcopy.pack_rows(
            count, [*self._fields(group, keys, texts, text=self._target.content), self._constant], len(rows)
        )

    def _staging_rows(self, group: Group) -> Packed:
        flush_slot, rows = group
        columns, texts = _keys_and_texts(flush_slot, rows)
        keys = [pgcopy.text_fields(values) for values in columns]
        count = 5 + len(keys) + self._stages_text
        fields = self._fields(group, keys, texts, text=self._stages_text)
        return pgcopy.pack_rows(count, [*place_fields(flush_slot, rows), *fields], len(rows))


def _keys_and_texts(flush_slot: FlushSlot, rows: Sequence[int]) -> tuple[list[tuple[bytes, ...]], Sequence[bytes]]:
    """The values of each column of the key, and the texts."""
    raw = flush_slot.slot.raw_rows()
    keys, texts = zip(*[raw[i] for i in rows], strict=True)
    return list(zip(*[key.split(b"\0") for key in keys], strict=True)), texts


def staged_words(configuration: str) -> str:
    """SQL expression of what keyword search reads of a staged text, for a statement with parameters."""
    return tsvector_of("s.content", configuration).replace("%", "%%")
