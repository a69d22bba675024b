"""SQLite: rows of a table of vectors, by key. A value keeps its own type, and is compared as the column compares it."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...db.sqlite import KEYS_PER_QUERY, batches
from ...db.sqlite_errors import RowIgnoredError
from ...records import Key
from ...tables.table_target import TableTarget

WITH_KEYS = "WITH k(kdb_fast_i, {names}) AS (VALUES {rows}) "
FIND = (
    "SELECT k.kdb_fast_i, t.kdb_fast_hash, t.kdb_fast_seal, t.kdb_fast_fingerprint, CAST({vector} AS BLOB) "
    "FROM k CROSS JOIN {known} t ON {same_row}"
)
"""CROSS JOIN keeps the order: key by key."""

FIND_PIECES = FIND.replace(" FROM k", ", t.chunk, t.kdb_fast_chunks FROM k")

HAVE_RECORD = "SELECT k.kdb_fast_i FROM k WHERE {has_record}"

PUT = "INSERT INTO {known} ({columns}, {noted}) VALUES ({values}) ON CONFLICT ({unique}) DO UPDATE SET {changes}"
DELETE = "DELETE FROM {known} AS t WHERE {same_row}"

FIND_VEC0 = "(SELECT v.{embedding} FROM {table} v WHERE v.rowid = t.{columns})"
PUT_VEC0 = "INSERT INTO {table} (rowid, {embedding}) VALUES (?, ?)"
DELETE_VEC0 = "DELETE FROM {table} WHERE rowid = ?"

KEY_VALUE = "k.kdb_fast_key_{number}"


class Found(NamedTuple):
    """What is known of a key's row: SHA-256 of its text; the model's fingerprint, if its vector is what was written."""

    text_hash: bytes
    fingerprint: str | None


def seal_of(vector: bytes) -> bytes:
    """What tells that a vector is the one that was written."""
    return hashlib.sha256(vector).digest()


class TableRows:
    """The rows of a table; the caller's transaction is theirs."""

    def __init__(self, connection: sqlite3.Connection, target: TableTarget) -> None:
        self._connection, self._target = connection, target
        written, vector = target.written, target.vector.name
        self._vector_place = len(target.key) + written.index(vector)
        noted = [target.column(name) for name in written if not (target.vec0 and name == vector)]
        self._put = self._statement(
            PUT,
            noted=", ".join(noted),
            values=", ".join("?" * (len(target.key) + len(noted))),
            unique=", ".join(map(target.column, target.unique)),
            changes=", ".join(f"{name} = excluded.{name}" for name in noted),
        )
        self._delete = self._statement(DELETE, same_row=target.same_key("t.{column}", "?"))
        self._vector = self._statement(FIND_VEC0 if target.vec0 else "t.{embedding}")

    def _statement(self, template: str, **parts: str) -> str:
        return self._target.statement(template, **parts).decode()

    def _for_keys(self, keys: Sequence[Key], template: str, **parts: str) -> list[tuple[Any, ...]]:
        """Rows of a query over the keys ``k``; the first value of each becomes the key."""
        width = len(self._target.key)
        names = self._target.each_key("kdb_fast_key_{number}")
        result: list[tuple[Any, ...]] = []
        for part in batches(keys, KEYS_PER_QUERY // width):
            rows = ", ".join([f"({', '.join('?' * (width + 1))})"] * len(part))
            statement = self._statement(WITH_KEYS + template, names=names, rows=rows, **parts)
            values = [value for i, key in enumerate(part) for value in (i, *key)]
            result += [(part[i], *more) for i, *more in self._connection.execute(statement, values)]
        return result

    def find(self, keys: Sequence[Key]) -> dict[Key, Found]:
        """What is known of the rows that have these keys; keys without a row are left out."""
        same_row = self._target.same_key("t.{column}", KEY_VALUE)
        return {
            key: Found(text_hash, fingerprint if seal_of(vector or b"") == seal else None)
            for key, text_hash, seal, fingerprint, vector in self._for_keys(
                keys, FIND, same_row=same_row, vector=self._vector
            )
        }

    def find_whole(self, keys: Sequence[Key]) -> dict[Key, Found]:
        """:meth:`find` of records in pieces: one is known where all of its pieces are there as they were written."""
        same_row = self._target.same_key("t.{column}", KEY_VALUE)
        pieces: dict[Key, list[tuple[Any, ...]]] = {}
        each = list(dict.fromkeys(keys))
        for key, *piece in self._for_keys(each, FIND_PIECES, same_row=same_row, vector=self._vector):
            pieces.setdefault(key, []).append(tuple(piece))
        return {key: _whole(found) for key, found in pieces.items()}

    def with_record(self, keys: Sequence[Key]) -> set[Key]:
        """Those of the keys that the table that is read has now; all where it is another database's, or no table."""
        if self._target.source is None:
            return set(keys)
        has_record = self._target.has_record(KEY_VALUE)
        return {key for (key,) in self._for_keys(keys, HAVE_RECORD, has_record=has_record)}

    def put(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write rows, whether they are there or not.

        Args:
            rows: Values of the columns of the key, then of :attr:`~kdb_fast.tables.table_target.TableTarget.written`.
        """
        if self._target.vec0:
            place = self._vector_place
            self._execute_vec0(DELETE_VEC0, [row[:1] for row in rows])
            self._execute_vec0(PUT_VEC0, [(row[0], row[place]) for row in rows])
            rows = [row[:place] + row[place + 1 :] for row in rows]
        if self._connection.executemany(self._put, rows).rowcount != len(rows):
            raise RowIgnoredError("a trigger of the table left the row out")

    def delete(self, keys: Sequence[Key]) -> int:
        """Delete the rows of these keys; returns how many records there were."""
        if self._target.vec0:
            self._execute_vec0(DELETE_VEC0, keys)
        if self._target.chunked:
            return sum(self._connection.execute(self._delete, key).rowcount > 0 for key in keys)
        return max(0, self._connection.executemany(self._delete, keys).rowcount)

    def _execute_vec0(self, template: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """It has no INSERT … ON CONFLICT."""
        self._connection.executemany(self._statement(template), rows)


def _whole(pieces: list[tuple[Any, ...]]) -> Found:
    """What is known of a record from its pieces: hash, seal, fingerprint, vector, number and count of each."""
    text_hash, _, fingerprint, _, _, count = min(pieces, key=lambda piece: int(piece[-2]))
    same = {(digest, model) for digest, _, model, _, _, _ in pieces} == {(text_hash, fingerprint)}
    sealed = all(seal_of(vector or b"") == seal for _, seal, _, vector, _, _ in pieces)
    return Found(text_hash, fingerprint if same and sealed and len(pieces) == count else None)
