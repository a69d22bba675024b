"""Where vectors go: PostgreSQL with pgvector, or SQLite."""

from __future__ import annotations

from ..db.address import DatabaseAddress
from ..tables.column_target import ColumnTarget
from ..tables.kdb_search import KDB_SEARCH
from ..tables.table_target import TableTarget
from .base import Store, TargetTable


def open_store(
    address: DatabaseAddress, role: str, *, target: TargetTable = KDB_SEARCH, patient: bool = False
) -> Store:
    """A store for this address with a connection of its own.

    Args:
        role: What the connection is for (``parent``, ``writer``); shown in the server's list of sessions.
        target: What is written.
        patient: Wait for a PostgreSQL server that is away: it was there a moment ago.

    Raises:
        DatabaseError: The database cannot be reached.
    """
    if isinstance(target, ColumnTarget):
        return _open_column(address, role, target, patient)
    if isinstance(target, TableTarget):
        return _open_table(address, role, target, patient)
    if address.dialect == "sqlite":
        from .sqlite.index_store import SQLiteIndexStore

        return SQLiteIndexStore.open(address, index=target)
    from .postgresql.index_store import PostgreSQLIndexStore

    return PostgreSQLIndexStore(address, role, patient=patient, index=target)


def _open_column(address: DatabaseAddress, role: str, column: ColumnTarget, patient: bool) -> Store:
    if address.dialect == "sqlite":
        from .sqlite.column_store import SQLiteColumnStore

        return SQLiteColumnStore.open_column(address, column)
    from .postgresql.column_store import PostgreSQLColumnStore

    return PostgreSQLColumnStore(address, role, column, patient=patient)


def _open_table(address: DatabaseAddress, role: str, table: TableTarget, patient: bool) -> Store:
    if address.dialect == "sqlite":
        from .sqlite.chunk_store import SQLiteChunkStore
        from .sqlite.table_store import SQLiteTableStore

        return (SQLiteChunkStore if table.chunked else SQLiteTableStore).open_table(address, table)
    from .postgresql.chunk_store import PostgreSQLChunkStore
    from .postgresql.table_store import PostgreSQLTableStore

    if table.chunked:
        return PostgreSQLChunkStore(address, role, table, patient=patient)
    return PostgreSQLTableStore(address, role, table, patient=patient)
