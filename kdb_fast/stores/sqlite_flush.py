"""SQLite: the rows of one flush on their way into the tables, within the flush's transaction.

The transaction holds SQLite's only write lock, so what is read at its start stays true: each key is looked
up once, and that decides whether the row is new, ours to overwrite, or another program's to keep.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from ..records import Reject
from ..slab import NO_STAMP, Slot
from .base import FlushSlot, RunSpec
from .json_vectors import json_vectors
from .sqlite_base import RowIgnoredError, refusal, select_in, timestamp
from .sqlite_fts import FullText, Key

CHUNK_ROWS = 1_000
"""Rows prepared at a time: JSON text and copies take 10 KB a row for 384 dimensions."""

INSERT = (
    "INSERT INTO kdb_search (rowid, id, entity_name, record_id, created_at, content, embedding, model, dimensions, "
    "updated_at, kdb_fast_fingerprint, kdb_fast_run, kdb_fast_at, kdb_fast_source_at) "
    "VALUES (?1, ?2, ?3, ?4, ?7, ?5, ?6, ?8, ?9, ?7, ?10, ?11, ?7, ?12)"
)
UPDATE = (
    "UPDATE kdb_search SET content = ?5, embedding = ?6, model = ?8, dimensions = ?9, updated_at = ?7, "
    "kdb_fast_fingerprint = ?10, kdb_fast_run = ?11, kdb_fast_at = ?7, kdb_fast_source_at = ?12 WHERE rowid = ?1"
)
INSERT_VECTOR = "INSERT OR REPLACE INTO kdb_fast_vectors (search_rowid, search_id, at, vector) VALUES (?, ?, ?, ?)"

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def row_stamp(updated_at: object, content: bytes | str) -> int:
    """Version of a row as an int64, never NO_STAMP: another time or another text gives another number."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    digest = hashlib.sha256(f"{updated_at or ''}\n".encode() + raw).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    return number if number != NO_STAMP else 0


def new_ids(count: int) -> list[str]:
    """Random version 4 UUIDs as text."""
    raw = np.frombuffer(os.urandom(16 * count), dtype=np.uint8).reshape(count, 16).copy()
    raw[:, 6] = (raw[:, 6] & 0x0F) | 0x40
    raw[:, 8] = (raw[:, 8] & 0x3F) | 0x80
    text = raw.tobytes().hex()
    digits = [text[i : i + 32] for i in range(0, 32 * count, 32)]
    return [f"{d[:8]}-{d[8:12]}-{d[12:16]}-{d[16:20]}-{d[20:]}" for d in digits]


@dataclass(slots=True)
class _Row:
    """A row with all that is needed to write it."""

    number: int
    entity: str
    record_id: str
    content: str
    source_at: str | None
    rowid: int
    search_id: str
    new: bool
    same_text: bool
    embedding: str = ""
    vector: bytes = b""
    fts_rowid: int = 0
    in_fts: bool = False


class _Existing:
    """What is in the table for a key."""

    __slots__ = ("content", "own", "rowid", "search_id", "updated_at")

    def __init__(self, row: tuple[Any, ...], run: int) -> None:
        self.rowid: int
        self.search_id: str
        self.updated_at: str | None
        self.content: bytes
        self.rowid, self.search_id, self.updated_at, at, by, self.content = row
        self.own = by == run and at is not None and at == self.updated_at


class FlushWriter:
    """Writes rows and counts what became of them.

    Args:
        at: Time of the flush, as text.
    """

    def __init__(self, connection: sqlite3.Connection, full_text: FullText, run: RunSpec, at: str) -> None:
        self._connection, self._full_text, self._run, self._at = connection, full_text, run, at
        self.rows = self.bytes = 0
        self.stored: list[Key] = []
        self.lost: list[tuple[int, int]] = []
        self.rejected: list[tuple[int, int, str, str]] = []
        self.rejects: list[Reject] = []
        (last,) = connection.execute("SELECT max(rowid) FROM kdb_search").fetchone()
        # Free in both tables, so that a record has the same rowid in both.
        self._next_rowid = max(last or 0, full_text.last_rowid()) + 1

    def write(self, flush_slot: FlushSlot) -> None:
        """Write the rows of a slot."""
        slot = flush_slot.slot
        raw = slot.raw_rows()
        finite: list[bool] = np.isfinite(slot.vectors[: slot.rows]).all(axis=1, keepdims=False).tolist()
        for chunk in _chunks(raw, flush_slot.skip):
            for i in chunk:
                if not finite[i]:
                    self._reject(slot, raw[i], i, "not_finite", "the vector has NaN or infinity")
            self._write_chunk(slot, raw, [i for i in chunk if finite[i]])

    def _write_chunk(self, slot: Slot, raw: Sequence[tuple[bytes, bytes, bytes]], numbers: list[int]) -> None:
        rows = self._plan(slot, raw, numbers)
        if not rows:
            return
        matrix = slot.vectors[[row.number for row in rows]].astype("<f4", copy=False)
        width = matrix.shape[1] * 4
        floats = matrix.tobytes()
        for i, (row, text) in enumerate(zip(rows, json_vectors(matrix), strict=True)):
            row.embedding = text
            row.vector = floats[i * width : (i + 1) * width]
        self._plan_full_text([row for row in rows if not row.new])
        self._store_or_halve(slot, raw, rows)

    def _plan(self, slot: Slot, raw: Sequence[tuple[bytes, bytes, bytes]], numbers: list[int]) -> list[_Row]:
        texts = [(raw[i][0].decode(), raw[i][1].decode(), raw[i][2].decode()) for i in numbers]
        existing = self._existing([(entity, record_id) for entity, record_id, _ in texts])
        known, stamps, sources = slot.known.tolist(), slot.stamp.tolist(), _source_times(slot)
        rows: list[_Row] = []
        for i, search_id, (entity, record_id, content) in zip(numbers, new_ids(len(numbers)), texts, strict=True):
            found = existing.get((entity, record_id))
            if found is None:
                row = _Row(i, entity, record_id, content, sources[i], self._next_rowid, search_id, True, False)
                row.fts_rowid = self._next_rowid
                self._next_rowid += 1
                rows.append(row)
            elif found.own or (known[i] and stamps[i] == row_stamp(found.updated_at, found.content)):
                same = found.content == raw[i][2]
                rows.append(_Row(i, entity, record_id, content, sources[i], found.rowid, found.search_id, False, same))
            else:
                self.lost.append((slot.number, i))
        return rows

    def _existing(self, keys: Sequence[Key]) -> dict[Key, _Existing]:
        by_entity: dict[str, list[str]] = {}
        for entity, record_id in keys:
            by_entity.setdefault(entity, []).append(record_id)
        result: dict[Key, _Existing] = {}
        for entity, record_ids in by_entity.items():
            rows = select_in(
                self._connection,
                "SELECT record_id, rowid, id, updated_at, kdb_fast_at, kdb_fast_run, CAST(content AS BLOB) "
                "FROM kdb_search WHERE entity_name = ? AND record_id IN (…)",
                record_ids,
                entity,
            )
            result.update(((entity, row[0]), _Existing(row[1:], self._run.number)) for row in rows)
        return result

    def _plan_full_text(self, rows: Sequence[_Row]) -> None:
        """Find the full-text rows of known records; choose a rowid for those that have none."""
        if not rows:
            return
        found, taken = self._full_text.locate([(row.entity, row.record_id, row.rowid) for row in rows])
        for row in rows:
            there = found.get((row.entity, row.record_id))
            row.in_fts = there is not None
            if there is not None:
                row.fts_rowid = there
            elif row.rowid in taken:
                row.fts_rowid = self._next_rowid
                self._next_rowid += 1
            else:
                row.fts_rowid = row.rowid

    def _store_or_halve(self, slot: Slot, raw: Sequence[tuple[bytes, bytes, bytes]], rows: list[_Row]) -> None:
        """Store all rows or, where the database refuses one, halve until the refused ones stand alone."""
        execute = self._connection.execute
        execute("SAVEPOINT kdb_fast_rows")
        try:
            self._store(rows)
        except sqlite3.Error as error:
            refused = refusal(error)
            if refused is None or not self._connection.in_transaction:
                raise
            execute("ROLLBACK TO kdb_fast_rows")
            execute("RELEASE kdb_fast_rows")
            if len(rows) == 1:
                self._reject(slot, raw[rows[0].number], rows[0].number, *refused)
                return
            middle = len(rows) // 2
            self._store_or_halve(slot, raw, rows[:middle])
            self._store_or_halve(slot, raw, rows[middle:])
            return
        execute("RELEASE kdb_fast_rows")
        self.rows += len(rows)
        self.bytes += sum(len(raw[row.number][2]) + len(row.embedding) + len(row.vector) for row in rows)
        self.stored += [(row.entity, row.record_id) for row in rows]

    def _store(self, rows: Sequence[_Row]) -> None:
        self._change(INSERT, [row for row in rows if row.new])
        self._change(UPDATE, [row for row in rows if not row.new])
        self._connection.executemany(INSERT_VECTOR, [(row.rowid, row.search_id, self._at, row.vector) for row in rows])
        self._full_text.add(
            [(row.fts_rowid, row.search_id, row.entity, row.record_id, row.content) for row in rows if not row.in_fts]
        )
        # A row that only got another vector keeps its text, and the index of it.
        self._full_text.change(
            [(row.fts_rowid, row.search_id, row.content) for row in rows if row.in_fts and not row.same_text]
        )

    def _change(self, statement: str, rows: Sequence[_Row]) -> None:
        if not rows:
            return
        run, at = self._run, self._at
        model, dimensions, fingerprint, number = run.model[:100], run.dimensions, run.fingerprint, run.number
        changed = self._connection.executemany(
            statement,
            [
                (r.rowid, r.search_id, r.entity, r.record_id, r.content, r.embedding, at, model, dimensions,
                 fingerprint, number, r.source_at)
                for r in rows
            ],
        ).rowcount  # fmt: skip
        if changed != len(rows):
            raise RowIgnoredError("a trigger of the table left the row out")

    def _reject(self, slot: Slot, row: tuple[bytes, bytes, bytes], number: int, reason: str, detail: str) -> None:
        entity, record_id, content = row
        self.rejected.append((slot.number, number, reason, detail))
        self.rejects.append(
            Reject(entity.decode(), record_id.decode(), reason, detail, hashlib.sha256(content).digest())
        )


def _chunks(raw: Sequence[tuple[bytes, bytes, bytes]], skip: frozenset[int]) -> Iterator[list[int]]:
    """Row numbers in order, at most CHUNK_ROWS at a time, no key twice: the later row finds the earlier stored."""
    chunk: list[int] = []
    keys: set[tuple[bytes, bytes]] = set()
    for i, (entity, record_id, _) in enumerate(raw):
        if i in skip:
            continue
        if len(chunk) == CHUNK_ROWS or (entity, record_id) in keys:
            yield chunk
            chunk, keys = [], set()
        chunk.append(i)
        keys.add((entity, record_id))
    if chunk:
        yield chunk


def _source_times(slot: Slot) -> list[str | None]:
    """Last change of each row at its source, as text; equal neighbours are formatted once."""
    result: list[str | None] = []
    last, text = NO_STAMP, None
    for value in slot.source[: slot.rows].tolist():
        if value != last:
            last = value
            text = None if value == NO_STAMP else timestamp(EPOCH + timedelta(microseconds=value))
        result.append(text)
    return result
