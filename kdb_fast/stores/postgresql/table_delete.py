"""PostgreSQL: rows of a table of vectors are deleted, and counted as the records that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...records import Key
from ...tables.table_target import TableTarget
from .by_key import by_key

if TYPE_CHECKING:
    import psycopg

DELETE = "DELETE FROM {table} t USING unnest({arrays}) AS k({names}) WHERE {same_row}"

FIRST_PIECES = "WITH gone AS ({delete} RETURNING t.chunk) SELECT count(*), count(*) FILTER (WHERE chunk = 0) FROM gone"


def delete_rows(
    cursor: psycopg.Cursor[tuple[Any, ...]],
    target: TableTarget,
    statement: bytes,
    params: Sequence[Any] | Mapping[str, Any],
) -> tuple[int, int]:
    """Run a DELETE of rows ``t``; returns how many rows and how many records they were."""
    if not target.chunked:
        rows = cursor.execute(statement, params).rowcount
        return rows, rows
    row = cursor.execute(FIRST_PIECES.encode().replace(b"{delete}", statement), params).fetchone()
    return (row[0], row[1]) if row else (0, 0)


def delete_keys(cursor: psycopg.Cursor[tuple[Any, ...]], target: TableTarget, keys: Sequence[Key]) -> int:
    """Delete the rows of these keys; returns how many records there were. A key that is none of its type has no row."""
    if not keys:
        return 0
    statement = target.statement(
        DELETE,
        arrays=target.each_key("%s::text[]"),
        names=target.each_key("key_{number}"),
        same_row=target.same_key("t.{column}", "k.key_{number}::{type}"),
    )

    def execute(keys: Sequence[Key], arrays: list[str]) -> int:
        with cursor.connection.transaction():
            return delete_rows(cursor, target, statement, arrays)[1]

    return sum(by_key(keys, len(target.key), execute))
