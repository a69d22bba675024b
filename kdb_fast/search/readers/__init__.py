"""The rankings of one search, read from PostgreSQL or SQLite."""

from __future__ import annotations

from typing import Any

from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH
from .base import SearchReader


def import_reader(dialect: str) -> None:
    """Import what :func:`open_reader` needs, in the thread that may import numpy: two that do it at once break it."""
    if dialect == "sqlite":
        from . import sqlite  # noqa: F401
    else:
        from . import postgresql  # noqa: F401


def open_reader(connection: Any, dialect: str, index: IndexTable = KDB_SEARCH, *, once: bool = False) -> SearchReader:
    """The reader of rankings for this dialect, on an open connection.

    Args:
        index: What is read.
        once: It is for one search: SQLite's vectors are not kept in memory for another.
    """
    if dialect == "sqlite":
        from .sqlite import SqliteReader

        return SqliteReader(connection, index, once=once)
    from .postgresql import PostgresqlReader

    return PostgresqlReader(connection, index)
