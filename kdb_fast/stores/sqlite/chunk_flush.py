"""SQLite: pieces of records in one flush → the table of vectors, in which a record appears whole or not at all.

Each piece is put aside, in a table of ours, until the last one of its record is there; then they replace its rows, in
the flush's transaction. So a long text holds no slot longer than a short one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from ...db.sqlite import now, select_in
from ...db.sqlite_errors import RowIgnoredError
from ...records import Key, decode_key
from ...tables.pieces import PieceOf, piece_of, record_key
from ...tables.table_target import TableTarget
from ..base import FlushSlot, RunSpec
from .flush import RowWriter, chunks, float32_rows, reject_not_finite
from .halving import written_in_parts
from .table_rows import TableRows, seal_of

PUT_ASIDE = "INSERT INTO {aside} ({columns}, {written}, {revision}) VALUES ({values})"
WHOLE = (
    "SELECT {revision}, {columns}, count(*) FROM {aside} WHERE {revision} IN (…) "
    "GROUP BY {revision} HAVING count(*) = max(kdb_fast_chunks)"
)
INSERT = "INSERT INTO {table} ({columns}, {written}) SELECT {columns}, {written} FROM {aside} WHERE {revision} = ?"
CLEAR_ASIDE = "DELETE FROM {aside} WHERE {revision} = ?"


class _Row(NamedTuple):
    """A piece to be written, without its vector and text, which stay in the slot until then."""

    number: int
    key: Key
    piece: PieceOf


class _Shown(NamedTuple):
    """What became of the pieces that were written: bytes; records that are visible now, and revisions of those that are
    gone."""

    bytes: int
    keys: list[Key]
    gone: set[int]


class ChunkWriter(RowWriter):
    """Writes pieces and counts what became of them; ``stored`` are the keys of the records that are visible now."""

    def __init__(self, connection: sqlite3.Connection, target: TableTarget, rows: TableRows, run: RunSpec) -> None:
        super().__init__()
        self._connection, self._target, self._table = connection, target, rows
        self._origin = run.fingerprint, run.number, now()
        values = ", ".join("?" * (len(target.key) + len(target.written) + 1))
        self._put_aside = self._statement(PUT_ASIDE, values=values)

    def _statement(self, template: str, **parts: str) -> str:
        return self._target.statement(template, **parts).decode()

    def write(self, flush_slot: FlushSlot) -> None:
        """Write the pieces of a slot."""
        flush_slot.verify()
        slot = flush_slot.slot
        raw = slot.raw_rows()
        unfit = reject_not_finite(flush_slot, slot.vectors[: slot.rows], self.rejected)
        for numbers in chunks(raw, flush_slot.skip | unfit):
            keys = [decode_key(raw[i][0]) for i in numbers]
            rows = [_Row(i, record_key(key), piece_of(key)) for i, key in zip(numbers, keys, strict=True)]
            self._write_or_halve(flush_slot, raw, rows)

    def _write_or_halve(self, flush_slot: FlushSlot, raw: list[tuple[bytes, bytes]], rows: Sequence[_Row]) -> None:
        """Write all pieces that the database takes, and note those that it refuses."""
        slot = flush_slot.slot

        def write(part: Sequence[_Row]) -> _Shown:
            matrix = slot.vectors[[row.number for row in part]].astype("<f4", copy=False)
            values = []
            for (number, key, piece), vector in zip(part, float32_rows(matrix), strict=True):
                place = (piece.number, piece.start, piece.end, piece.of)
                state = (piece.content_hash, seal_of(vector), *self._origin, piece.revision)
                values.append((*key, *place, raw[number][1].decode(), vector, *state))
            self._connection.executemany(self._put_aside, values)
            return self._show({row.piece.revision for row in part}, matrix.nbytes)

        def refuse(row: _Row, reason: str, detail: str) -> None:
            self.rejected.append((slot.number, row.number, reason, detail))

        for part, shown in written_in_parts(self._connection, rows, write, refuse):
            self.stored += shown.keys
            self.superseded += [(slot.number, row.number) for row in part if row.piece.revision in shown.gone]
            self.rows += sum(row.piece.revision not in shown.gone for row in part)
            self.bytes += shown.bytes

    def _show(self, revisions: set[int], size: int) -> _Shown:
        """Make the records visible of which all pieces are there now."""
        found = list(select_in(self._connection, self._statement(WHOLE), sorted(revisions)))
        whole: dict[int, Key] = {revision: tuple(key) for revision, *key, _ in found}
        counts = {revision: count for revision, *_, count in found}
        living = self._table.with_record(list(whole.values()))
        shown = [revision for revision, key in whole.items() if key in living]
        self._table.delete([whole[revision] for revision in shown])
        for revision in shown:
            if self._connection.execute(self._statement(INSERT), (revision,)).rowcount != counts[revision]:
                raise RowIgnoredError("a trigger of the table left the row out")
        self._connection.executemany(self._statement(CLEAR_ASIDE), [(revision,) for revision in whole])
        return _Shown(size, [whole[revision] for revision in shown], whole.keys() - set(shown))
