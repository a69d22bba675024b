"""SQLite: rows of one flush → the vector column of the user's table, and the table of its state.

The transaction holds SQLite's only write lock, so what is read at its start stays true. A value keeps its own type on
its way, and is compared as the column compares it.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...db.sqlite import KEYS_PER_QUERY, batches, now
from ...records import Key, decode_key
from ...tables.column_target import ColumnTarget
from ...tables.known_rows import text_hash_of, value_hash_of
from ..base import FlushSlot, RunSpec
from .flush import RowWriter, chunks, float32_rows, reject_not_finite, source_times
from .halving import written_in_parts
from .json_vectors import json_vectors

# The text is an expression of the user's over bare names of columns: ours beside them have names that no table has.
LOOK_UP = (
    "WITH k(kdb_fast_i, {names}) AS (VALUES {rows}) "
    "SELECT k.kdb_fast_i, {text}, CAST(t.{embedding} AS BLOB), st.kdb_fast_model, st.kdb_fast_text, st.kdb_fast_vector "
    "FROM k CROSS JOIN {table} t ON {same_row} LEFT JOIN (SELECT {state_keys}, fingerprint AS kdb_fast_model, "
    "text_hash AS kdb_fast_text, vector_hash AS kdb_fast_vector FROM {state}) st ON {same_state}"
)
"""CROSS JOIN keeps the order. Text and vector are read as bytes, whatever another program has made of them."""

WRITE = "UPDATE {table} AS t SET {embedding} = ? WHERE {same_row}"
NOTE = (
    "INSERT INTO {state} ({names}, fingerprint, text_hash, vector_hash, run, at, source_at{content}) "
    "VALUES ({keys}, ?, ?, ?, ?, ?, ?{value}) ON CONFLICT ({names}) DO UPDATE SET fingerprint = excluded.fingerprint, "
    "text_hash = excluded.text_hash, vector_hash = excluded.vector_hash, run = excluded.run, at = excluded.at, "
    "source_at = excluded.source_at{set_content}"
)
FORGET = "DELETE FROM {state} AS st WHERE {same_state}"


class Found(NamedTuple):
    """A row of the table as it is, with what we know of it.

    Attributes:
        text_hash: SHA-256 of its text; None where that is NULL.
        vector_hash: SHA-256 of its vector as it is stored; None where that is NULL.
        fingerprint: Of the model, if both are what we have written.
        noted: The two hashes as we have noted them.
    """

    text_hash: bytes | None
    vector_hash: bytes | None
    fingerprint: str | None
    noted: tuple[bytes | None, bytes | None]

    @property
    def foreign(self) -> bool:
        """Whether its vector is another program's."""
        return self.vector_hash is not None and self.vector_hash != self.noted[1]


def find_rows(connection: sqlite3.Connection, target: ColumnTarget, keys: Sequence[Key]) -> dict[Key, Found]:
    """The rows that have these keys; keys without a row are left out."""
    width = len(target.key)
    names = target.each_key("kdb_fast_key_{number}")
    state_keys = target.each_key("key_{number} AS kdb_fast_state_{number}")
    same_row = target.same_key("t.{column}", "k.kdb_fast_key_{number}")
    same_state = target.same_key("st.kdb_fast_state_{number}", "t.{column}")
    result: dict[Key, Found] = {}
    for part in batches(keys, KEYS_PER_QUERY // width):
        rows = ", ".join([f"({', '.join('?' * (width + 1))})"] * len(part))
        statement = target.statement(
            LOOK_UP, names=names, rows=rows, state_keys=state_keys, same_row=same_row, same_state=same_state
        )
        values = [value for i, key in enumerate(part) for value in (i, *key)]
        for i, text, vector, fingerprint, noted_text, noted_vector in connection.execute(statement.decode(), values):
            hashes = text_hash_of(text), value_hash_of(vector)
            ours = None not in hashes and hashes == (noted_text, noted_vector)
            result[part[i]] = Found(*hashes, fingerprint if ours else None, (noted_text, noted_vector))
    return result


class _Row(NamedTuple):
    """A row to be written, without its vector, which stays in the slot until then. ``text`` is for keyword search."""

    number: int
    key: Key
    text_hash: bytes
    vector_before: bytes | None
    source_at: str | None
    text: tuple[str, ...]


class ColumnWriter(RowWriter):
    """Writes the vectors of rows, and what is known of them."""

    def __init__(self, connection: sqlite3.Connection, target: ColumnTarget, run: RunSpec) -> None:
        super().__init__()
        self._connection, self._target, self._run = connection, target, run
        self._at = now()
        self.began = time.monotonic()
        """When the file was locked, as ``time.monotonic()`` has it."""
        same_row = target.same_key("t.{column}", "?")
        self._write = target.statement(WRITE, same_row=same_row).decode()
        names = target.each_key("key_{number}")
        content, value, set_content = (
            (", content", ", ?", ", content = excluded.content") if target.keyword else [""] * 3
        )
        self._note = target.statement(
            NOTE, names=names, keys=target.each_key("?"), content=content, value=value, set_content=set_content
        ).decode()

    def write(self, flush_slot: FlushSlot) -> None:
        """Write the vectors of those rows that still have the text that was read, and none of another program's."""
        flush_slot.verify()
        slot = flush_slot.slot
        raw = slot.raw_rows()
        sources = source_times(slot)
        unfit = reject_not_finite(flush_slot, slot.vectors[: slot.rows], self.rejected)
        for numbers in chunks(raw, flush_slot.skip | unfit):
            keys = [decode_key(raw[i][0]) for i in numbers]
            found = find_rows(self._connection, self._target, keys)
            rows: list[_Row] = []
            for i, key in zip(numbers, keys, strict=True):
                digest = hashlib.sha256(raw[i][1]).digest()
                row = found.get(key)
                if row is None or row.text_hash != digest or (row.foreign and not self._target.replace):
                    self.superseded.append((slot.number, i))
                else:
                    text = (raw[i][1].decode(),) if self._target.keyword else ()
                    rows.append(_Row(i, key, digest, row.vector_hash, sources[i], text))
            if rows:
                self._store_or_halve(slot.number, slot.vectors, rows)

    def _store_or_halve(self, slot: int, vectors: npt.NDArray[np.float32], rows: Sequence[_Row]) -> None:
        """Store all rows that the database takes, and note those that it refuses."""

        def store(part: Sequence[_Row]) -> set[int]:
            return self._store(vectors, part)

        def refuse(row: _Row, reason: str, detail: str) -> None:
            self.rejected.append((slot, row.number, reason, detail))

        for part, dropped in written_in_parts(self._connection, rows, store, refuse):
            self.rejected += [(slot, number, *DROPPED) for number in sorted(dropped)]
            self.stored += [row.key for row in part if row.number not in dropped]
            self.rows += len(part) - len(dropped)

    def _store(self, vectors: npt.NDArray[np.float32], rows: Sequence[_Row]) -> set[int]:
        """Write rows; returns the numbers of those that a trigger has kept from being written."""
        matrix = vectors[[row.number for row in rows]].astype("<f4", copy=False)
        values: Sequence[bytes | str] = (
            float32_rows(matrix) if self._target.vector.type == "blob" else json_vectors(matrix)
        )
        self._connection.executemany(self._write, [(value, *row.key) for value, row in zip(values, rows, strict=True)])
        after = find_rows(self._connection, self._target, [row.key for row in rows])
        dropped: set[int] = set()
        notes: list[tuple[Any, ...]] = []
        for row, value in zip(rows, values, strict=True):
            stored = after[row.key].vector_hash if row.key in after else None
            if stored is None or (stored == row.vector_before != value_hash_of(value)):
                dropped.add(row.number)
            else:
                run = self._run
                origin = (run.fingerprint, row.text_hash, stored, run.number, self._at, row.source_at)
                notes.append((*row.key, *origin, *row.text))
        self._connection.executemany(self._note, notes)
        self.bytes += sum(map(len, values))
        return dropped


DROPPED = ("database_refused", "a trigger of the table kept the row from being written")


def clear_keys(connection: sqlite3.Connection, target: ColumnTarget, keys: Sequence[Key]) -> int:
    """Take the vectors of these rows away, as far as they are ours and of a text that the row has no more, within a
    transaction; returns how many rows there were."""
    write = target.statement(WRITE, same_row=target.same_key("t.{column}", "?")).decode()
    forget = target.statement(FORGET, same_state=target.same_key("st.key_{number}", "?")).decode()
    others = {key: row for key, row in find_rows(connection, target, keys).items() if row.text_hash != row.noted[0]}
    cleared = [key for key, row in others.items() if row.vector_hash is not None and not row.foreign]
    connection.executemany(write, [(None, *key) for key in cleared])
    connection.executemany(forget, others)
    return len(cleared)
