"""The rankings of one search, read from PostgreSQL or SQLite."""

from __future__ import annotations

from typing import Any

from .base import SearchReader


def open_reader(connection: Any, dialect: str, *, once: bool = False) -> SearchReader:
    """The reader of rankings for this dialect, on an open connection.

    Args:
        once: It is for one search: SQLite's vectors are not kept in memory for another.
    """
    if dialect == "sqlite":
        from .sqlite import SqliteReader

        return SqliteReader(connection, once=once)
    from .postgresql import PostgresqlReader

    return PostgresqlReader(connection)
