"""SQLite: the rows of one flush on their way into the tables, within the flush's transaction.

The transaction holds SQLite's only write lock, so what is read at its start stays true: each key is looked
up once, and that decides whether the row is new, ours to overwrite, or another program's to keep.
"""

from __future__ import annotations

import hashlib
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...db.sqlite import now, select_in, timestamp
from ...db.sqlite_errors import RowIgnoredError
from ...ipc.row_block import NO_VALUE, RowBlock
from ...records import Key, decode_key
from ...tables import seal
from ...tables.target import Target
from ..base import FlushSlot, RunSpec
from ..new_ids import ID_CHARS, new_ids
from ..rejects import NOT_FINITE
from .full_text import FullText, FullTextRow
from .halving import written_in_parts
from .json_vectors import json_vectors
from .keys import select_keys

CHUNK_ROWS = 1_000
"""Rows prepared at a time: JSON text and copies take 10 KB a row for 384 dimensions."""

INSERT = (
    "INSERT INTO {index} (rowid, {id}, {created_at}, {content}, {embedding}, kdb_fast_source_at, {updated_at}, "
    "kdb_fast_at, {model}, {dimensions}, kdb_fast_fingerprint, kdb_fast_run<seal column>, {key}) "
    "VALUES (?1, ?2, ?6, ?3, ?4, ?5, ?6, ?6, ?7, ?8, ?9, ?10<seal>, {key_values})"
)
UPDATE = (
    "UPDATE {index} SET {content} = ?3, {embedding} = ?4, kdb_fast_source_at = ?5, {updated_at} = ?6, "
    "kdb_fast_at = ?6, {model} = ?7, {dimensions} = ?8, kdb_fast_fingerprint = ?9, kdb_fast_run = ?10<set seal> "
    "WHERE rowid = ?1"
)
FIXED_VALUES = 10

SEAL = seal.expression("sqlite", "?9", "?7", "?8", "?3", "?4")
SEAL_PARTS = {"seal column": f", {seal.COLUMN}", "seal": f", {SEAL}", "set seal": f", {seal.COLUMN} = {SEAL}"}

WHOLE_SECONDS = len("2026-01-31 23:59:59")
"""Characters of a time without a fraction: two writes within a second look alike."""

RawRow = tuple[bytes, bytes]
"""Key, as :func:`~kdb_fast.records.encode_key` gives it, and content, UTF-8."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def row_version(updated_at: bytes | None, content: bytes) -> int:
    """Version of a row as an int64, never NO_VALUE: another time or another text gives another number.

    The time is whatever another program has written there: bytes, since not all of it need be text in UTF-8.
    """
    digest = hashlib.sha256((updated_at or b"") + b"\n" + content).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    return number if number != NO_VALUE else 0


def _new_ids(count: int) -> list[str]:
    texts = new_ids(count).tobytes().decode("ascii")
    return [texts[i : i + ID_CHARS] for i in range(0, len(texts), ID_CHARS)]


class _Row(NamedTuple):
    """A row to be written, without its vector, which stays in the slot until then."""

    number: int
    rowid: int
    search_id: str
    key: Key
    content: str
    source_at: str | None
    exists: bool
    same_text: bool


class _Text(NamedTuple):
    """What the full-text table is to hold for a row, and whether that was so before this flush."""

    row: FullTextRow
    exists: bool
    same: bool


class RowWriter(ABC):
    """Takes the rows of one flush into the tables: :meth:`write` for each slot, then :meth:`finish`.

    Attributes:
        rows: Rows written.
        bytes: Of texts and vectors, as written.
        stored: Keys of these rows.
        superseded: (slot, row) that another program has changed meanwhile.
        rejected: (slot, row, reason, detail) that the database refused.
    """

    def __init__(self) -> None:
        self.rows = self.bytes = 0
        self.stored: list[Key] = []
        self.superseded: list[tuple[int, int]] = []
        self.rejected: list[tuple[int, int, str, str]] = []

    @abstractmethod
    def write(self, flush_slot: FlushSlot) -> None:
        """Write the rows of a slot."""

    def finish(self) -> None:  # noqa: B027 - most write all of it in write()
        """Write what is written once for all rows."""


class FlushWriter(RowWriter):
    """Writes rows and counts what became of them. Call :meth:`write` for each slot, then :meth:`finish`.

    Args:
        force: Overwrite a row whoever wrote it.
        vectors: False leaves embedding, model and dimensions empty.
        sealed: The table has a column for seals.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        target: Target,
        full_text: FullText,
        run: RunSpec,
        *,
        force: bool = False,
        vectors: bool = True,
        sealed: bool = False,
    ) -> None:
        super().__init__()
        self._sealed, self._target = sealed, target
        self._connection, self._full_text, self._run = connection, full_text, run
        self._force, self._vectors = force, vectors
        self._at = now()
        self._texts: dict[int, _Text] = {}
        (last,) = connection.execute(target.text("SELECT max(rowid) FROM {index}")).fetchone()
        # Free in both tables, so that a record has the same rowid in both.
        self._next_rowid = max(last or 0, full_text.last_rowid()) + 1

    def write(self, flush_slot: FlushSlot) -> None:
        """Write the rows of a slot into the search table and the vectors' table."""
        flush_slot.verify()
        slot = flush_slot.slot
        raw = slot.raw_rows()
        vectors = slot.vectors[: slot.rows if self._vectors else 0]
        for numbers in chunks(raw, flush_slot.skip | reject_not_finite(flush_slot, vectors, self.rejected)):
            rows = self._plan(slot, raw, numbers)
            if rows:
                self._store_or_halve(slot, raw, rows)

    def finish(self) -> None:
        """Bring the full-text table in step with all rows written.

        In one go at the end: FTS5 writes out what it has gathered at every savepoint.
        """
        if self._sealed and self._vectors:
            self._follow_times()
        existing = [text.row for text in self._texts.values() if text.exists]
        found, taken = self._full_text.locate([(row[2], row[0]) for row in existing])
        add: list[FullTextRow] = []
        change: list[tuple[int, str, str]] = []
        for row, exists, same in self._texts.values():
            rowid, search_id, key, content = row
            there = found.get(key) if exists else None
            if there is None:
                add.append(row if rowid not in taken else (self._take_rowid(), *row[1:]))
            elif not same:
                # A row that only got another vector keeps its text, and the index of it.
                change.append((there, search_id, content))
        self._full_text.add(add)
        self._full_text.change(change)

    def _follow_times(self) -> None:
        """The copies of the vectors hold for the times that triggers have set.

        A time in whole seconds does not say that no other program writes the row within that second: searches then read
        KameleonDB's JSON text.
        """
        changed = self._target.text(
            "SELECT rowid, {updated_at} FROM {index} WHERE {updated_at} <> ? AND length({updated_at}) > ? "
            "AND rowid IN (…)"
        )
        times = list(select_in(self._connection, changed, list(self._texts), self._at, WHOLE_SECONDS))
        self._connection.executemany(
            "UPDATE kdb_fast_vectors SET at = ? WHERE search_rowid = ?", [(time, rowid) for rowid, time in times]
        )

    def _take_rowid(self) -> int:
        self._next_rowid += 1
        return self._next_rowid - 1

    def _plan(self, slot: RowBlock, raw: Sequence[RawRow], numbers: list[int]) -> list[_Row]:
        """Decide for each row whether it is new, ours to overwrite, or another program's."""
        keys = [decode_key(raw[i][0]) for i in numbers]
        existing = self._existing(keys)
        exists, versions, sources = slot.exists.tolist(), slot.row_version.tolist(), source_times(slot)
        run = self._run.number
        rows: list[_Row] = []
        for i, key, new_id in zip(numbers, keys, _new_ids(len(numbers)), strict=True):
            content = raw[i][1]
            found = existing.get(key)
            if found is None:
                rows.append(_Row(i, self._take_rowid(), new_id, key, content.decode(), sources[i], False, False))
                continue
            rowid, search_id, updated_at, ours, by, stored = found
            if self._force or (by == run and ours) or (exists[i] and versions[i] == row_version(updated_at, stored)):
                same_text = stored == content
                rows.append(_Row(i, rowid, search_id, key, content.decode(), sources[i], True, same_text))
            else:
                self.superseded.append((slot.number, i))
        return rows

    def _existing(self, keys: Sequence[Key]) -> dict[Key, tuple[Any, ...]]:
        """For each key in the table: rowid, id, updated_at, whether nobody has written the row since kdb-fast did,
        kdb_fast_run, content as bytes."""
        ours = seal.ours("sqlite", (seal.COLUMN,) if self._sealed else (), "t.")
        columns = f"t.rowid, t.{{id}}, CAST(t.{{updated_at}} AS BLOB), {ours}, t.kdb_fast_run, "
        columns += "CAST(coalesce(t.{content}, '') AS BLOB)"
        return {key: tuple(row) for key, *row in select_keys(self._connection, self._target, columns, keys)}

    def _store_or_halve(self, slot: RowBlock, raw: Sequence[RawRow], rows: Sequence[_Row]) -> None:
        """Store all rows that the database takes, and note those that it refuses."""

        def store(part: Sequence[_Row]) -> int:
            return self._store(slot, part)

        def refuse(row: _Row, reason: str, detail: str) -> None:
            self.rejected.append((slot.number, row.number, reason, detail))

        for part, size in written_in_parts(self._connection, rows, store, refuse):
            self.rows += len(part)
            self.bytes += size + sum(len(raw[row.number][1]) for row in part)
            for row in part:
                self.stored.append(row.key)
                before = self._texts.get(row.rowid)
                text = (row.rowid, row.search_id, row.key, row.content)
                if before is None:
                    self._texts[row.rowid] = _Text(text, row.exists, row.same_text)
                else:
                    self._texts[row.rowid] = _Text(text, before.exists, before.same and row.same_text)

    def _statements(self) -> tuple[str, str]:
        """Those that insert and update rows."""
        insert, update = INSERT, UPDATE
        for name, text in SEAL_PARTS.items():
            insert, update = (s.replace(f"<{name}>", text if self._sealed else "") for s in (insert, update))
        values = ", ".join(f"?{FIXED_VALUES + 1 + number}" for number in range(len(self._target.index.key)))
        return self._target.text(insert, key_values=values), self._target.text(update)

    def _store(self, slot: RowBlock, rows: Sequence[_Row]) -> int:
        """Write rows with their vectors; returns the bytes of the vectors as written."""
        run = self._run
        texts: Sequence[str | None] = [None] * len(rows)
        origin: tuple[str | None, int | None] = (None, None)
        floats: list[bytes] = []
        if self._vectors:
            matrix = slot.vectors[[row.number for row in rows]].astype("<f4", copy=False)
            floats = float32_rows(matrix)
            texts, origin = json_vectors(matrix), (run.model[:100], run.dimensions)
        fixed = (self._at, *origin, run.fingerprint, run.number)
        new: list[tuple[Any, ...]] = []
        existing: list[tuple[Any, ...]] = []
        for row, text in zip(rows, texts, strict=True):
            _, rowid, search_id, key, content, source_at, exists, _ = row
            values = (rowid, search_id, content, text, source_at, *fixed)
            if exists:
                existing.append(values)
            else:
                new.append((*values, *key))
        for statement, parameters in zip(self._statements(), (new, existing), strict=True):
            if parameters and self._connection.executemany(statement, parameters).rowcount != len(parameters):
                raise RowIgnoredError("a trigger of the table left the row out")
        if self._vectors:
            self._connection.executemany(
                "INSERT OR REPLACE INTO kdb_fast_vectors (search_rowid, search_id, at, vector) VALUES (?, ?, ?, ?)",
                [(row[1], row[2], self._at, vector) for row, vector in zip(rows, floats, strict=True)],
            )
        else:
            self._connection.executemany(
                "DELETE FROM kdb_fast_vectors WHERE search_rowid = ?", [(row.rowid,) for row in rows if row.exists]
            )
        return sum(map(len, floats)) + sum(len(text or "") for text in texts)


def float32_rows(matrix: npt.NDArray[np.float32]) -> list[bytes]:
    """The bytes of each row of a matrix (float32)."""
    floats, width = matrix.tobytes(), 4 * matrix.shape[1]
    return [floats[start : start + width] for start in range(0, len(floats), width)]


def reject_not_finite(
    flush_slot: FlushSlot, vectors: npt.NDArray[np.float32], rejected: list[tuple[int, int, str, str]]
) -> Set[int]:
    """The rows whose vector has NaN or infinity; those that were to be written are added to ``rejected``."""
    found = set(np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist())
    number = flush_slot.slot.number
    rejected += [(number, i, *NOT_FINITE) for i in sorted(found - flush_slot.skip)]
    return found


def chunks(raw: Sequence[RawRow], skip: Set[int]) -> Iterator[list[int]]:
    """Row numbers in order, at most CHUNK_ROWS at a time, no key twice: the later row finds the earlier stored."""
    chunk: list[int] = []
    keys: set[bytes] = set()
    for i, (key, _) in enumerate(raw):
        if i in skip:
            continue
        if len(chunk) == CHUNK_ROWS or key in keys:
            yield chunk
            chunk, keys = [], set()
        chunk.append(i)
        keys.add(key)
    if chunk:
        yield chunk


def source_times(slot: RowBlock) -> list[str | None]:
    """Last change of each row at its source, as text; equal neighbours are formatted once."""
    result: list[str | None] = []
    last, text = NO_VALUE, None
    for value in slot.source_at[: slot.rows].tolist():
        if value != last:
            last = value
            text = None if value == NO_VALUE else timestamp(EPOCH + timedelta(microseconds=value))
        result.append(text)
    return result
