"""Where vectors go: PostgreSQL with pgvector, or SQLite."""

from __future__ import annotations

from ..db.address import DatabaseAddress
from .base import Store


def open_store(address: DatabaseAddress, role: str, *, patient: bool = False) -> Store:
    """A store for this address with a connection of its own.

    Args:
        role: What the connection is for (``parent``, ``writer``); shown in the server's list of sessions.
        patient: Wait for a PostgreSQL server that is away: it was there a moment ago.

    Raises:
        DatabaseError: The database cannot be reached.
    """
    if address.dialect == "sqlite":
        from .sqlite.store import SQLiteStore

        return SQLiteStore.open(address)
    from .postgresql.store import PostgreSQLStore

    return PostgreSQLStore(address, role, patient=patient)
