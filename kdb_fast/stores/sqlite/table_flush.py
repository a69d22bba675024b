"""SQLite: rows of one flush → the table of vectors. The transaction holds SQLite's only write lock."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from ...db.sqlite import now
from ...records import Key, decode_key
from ...tables.table_target import TableTarget
from ..base import FlushSlot, RunSpec
from .flush import RowWriter, chunks, float32_rows, reject_not_finite
from .halving import written_in_parts
from .table_rows import TableRows, seal_of


class _Row(NamedTuple):
    """A row to be written, without its vector and text, which stay in the slot until then."""

    number: int
    key: Key


class TableWriter(RowWriter):
    """Writes rows and counts what became of them."""

    def __init__(self, connection: sqlite3.Connection, target: TableTarget, rows: TableRows, run: RunSpec) -> None:
        super().__init__()
        self._connection, self._target, self._table = connection, target, rows
        self._origin = run.fingerprint, run.number, now()

    def write(self, flush_slot: FlushSlot) -> None:
        """Write the rows of a slot whose records are still there."""
        flush_slot.verify()
        slot = flush_slot.slot
        raw = slot.raw_rows()
        unfit = reject_not_finite(flush_slot, slot.vectors[: slot.rows], self.rejected)
        for numbers in chunks(raw, flush_slot.skip | unfit):
            rows = [_Row(i, decode_key(raw[i][0])) for i in numbers]
            living = self._table.with_record([row.key for row in rows])
            self.superseded += [(slot.number, row.number) for row in rows if row.key not in living]
            rows = [row for row in rows if row.key in living]
            if rows:
                self._store_or_halve(flush_slot, raw, rows)

    def _store_or_halve(self, flush_slot: FlushSlot, raw: list[tuple[bytes, bytes]], rows: Sequence[_Row]) -> None:
        """Store all rows that the database takes, and note those that it refuses."""
        slot = flush_slot.slot

        def store(part: Sequence[_Row]) -> int:
            matrix = slot.vectors[[row.number for row in part]].astype("<f4", copy=False)
            values = []
            for (number, key), vector in zip(part, float32_rows(matrix), strict=True):
                text = raw[number][1]
                content = (text.decode(),) if self._target.content else ()
                digest = hashlib.sha256(text).digest()
                values.append((*key, *content, vector, digest, seal_of(vector), *self._origin))
            self._table.put(values)
            return matrix.nbytes

        def refuse(row: _Row, reason: str, detail: str) -> None:
            self.rejected.append((slot.number, row.number, reason, detail))

        for part, size in written_in_parts(self._connection, rows, store, refuse):
            self.stored += [row.key for row in part]
            self.rows += len(part)
            self.bytes += size
