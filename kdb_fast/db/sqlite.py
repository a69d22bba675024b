"""SQLite: pieces of statements that its modules share."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from ..errors import SchemaError

T = TypeVar("T")

KEYS_PER_QUERY = 500
"""Keys of one ``IN (…)``: SQLite before 3.32 takes at most 999 parameters."""


def batches(values: Sequence[T], size: int = KEYS_PER_QUERY) -> Iterator[Sequence[T]]:
    """The values in order, at most ``size`` at a time."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def select_in(
    connection: sqlite3.Connection, query: str, values: Sequence[object], *first: object
) -> Iterator[tuple[Any, ...]]:
    """Rows of a query for many values.

    Args:
        query: A SELECT that ends in ``IN (…)``; the values are put there, a bounded number at a time.
        first: Parameters that come before the values.
    """
    for batch in batches(values):
        yield from connection.execute(query.replace("…", ",".join("?" * len(batch))), (*first, *batch))


def now() -> str:
    """Now in UTC, as text (see :func:`timestamp`). SQLite has no other clock than the machine's."""
    return timestamp(datetime.now(UTC))


def timestamp(moment: datetime) -> str:
    """A moment as KameleonDB's SQLAlchemy writes it, in UTC: ``2026-01-31 23:59:59.000000``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def moment(text: str) -> datetime:
    """The aware datetime of a timestamp of SQLite: UTC, written without a zone."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def quoted(identifier: str) -> str:
    """An SQL identifier, quoted. Raises SchemaError for one with a NUL, which SQL text cannot hold."""
    if "\x00" in identifier:
        raise SchemaError("The name of a table holds a NUL character; it cannot be read.")
    return '"' + identifier.replace('"', '""') + '"'


def table_exists(connection: sqlite3.Connection, name: str) -> bool:
    """Whether the main database has a table (ordinary or virtual) of this name."""
    row = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)).fetchone()
    return row is not None
