"""Connections for the library: from a database URL, or from an SQLAlchemy engine of the caller's."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from .database import DatabaseAddress, connect_postgresql, connect_sqlite, opened, parse_address
from .errors import UsageError
from .stores import open_store
from .stores.base import Store


class Connections:
    """Opens connections to one database: one for each reading thread, one for writing.

    Args:
        address: The database; an embedded server is started on first use.
        shared: The one connection of an SQLite database in memory, which no other can see.
    """

    def __init__(self, address: DatabaseAddress, shared: sqlite3.Connection | None = None) -> None:
        self.dialect: Literal["postgresql", "sqlite"] = address.dialect
        self._shared = shared
        self._lock = threading.RLock()
        self._local = threading.local()
        self._closing = contextlib.ExitStack()
        self._address = address
        if address.embedded_dir is not None:
            self._address = replace(self._closing.enter_context(opened(address)), display=address.display)
        self._store: Store | None = None
        self._readers: list[Any] = []

    @contextlib.contextmanager
    def store(self) -> Iterator[Store]:
        """The store for writing; one user at a time."""
        with self._lock:
            if self._store is None:
                self._store = self._own_store()
            yield self._store

    def _own_store(self) -> Store:
        if self._shared is not None:
            from .stores.sqlite import SQLiteStore

            return SQLiteStore(self._shared)
        if self.dialect == "sqlite":
            from .stores.sqlite import SQLiteStore

            return SQLiteStore.open(self._address, must_exist=False)
        return open_store(self._address, "library")

    @contextlib.contextmanager
    def borrowed(self, connection: Any) -> Iterator[Store]:
        """A store on the caller's connection, within the caller's transaction.

        Raises:
            UsageError: The driver is neither psycopg 3 nor sqlite3.
        """
        if isinstance(connection, sqlite3.Connection):
            from .stores.sqlite import SQLiteStore

            yield SQLiteStore(connection)
            return
        import psycopg

        if not isinstance(connection, psycopg.Connection):
            raise UsageError(
                f"The session's driver is {type(connection).__module__}; expected psycopg 3 or sqlite3.",
                remedy="Use postgresql+psycopg:// in the engine's URL.",
            )
        from .stores.postgresql import PostgreSQLStore

        yield PostgreSQLStore(self._address, "library", borrowed=connection)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Any]:
        """This thread's connection for reading (the shared one, under its lock, for a database in memory)."""
        if self._shared is not None:
            with self._lock:
                yield self._shared
            return
        connection = getattr(self._local, "connection", None)
        if connection is None or (self.dialect == "postgresql" and connection.closed):
            connection = self._connect()
            self._local.connection, self._local.reader = connection, None
            self._readers.append(connection)
        yield connection

    def reader(self, connection: Any, make: Callable[[Any, str], Any]) -> Any:
        """The reader of this thread's connection; it may hold vectors in memory, so it is kept."""
        owner: Any = self if self._shared is not None else self._local
        reader = getattr(owner, "reader_", None)
        if reader is None or getattr(owner, "reader_of", None) is not connection:
            reader = make(connection, self.dialect)
            owner.reader_, owner.reader_of = reader, connection
        return reader

    def _connect(self) -> Any:
        if self.dialect == "sqlite":
            return connect_sqlite(self._address)
        return connect_postgresql(self._address, role="library")

    def close(self) -> None:
        """Close what was opened here."""
        for connection in self._readers:
            with contextlib.suppress(Exception):
                connection.close()
        self._readers = []
        if self._store is not None:
            self._store.close()
            self._store = None
        self._closing.close()


def connections_for(engine: Any) -> Connections:
    """Connections to the database of a URL or of an SQLAlchemy engine.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(engine, str):
        return Connections(parse_address(engine))
    if isinstance(engine, DatabaseAddress):
        return Connections(engine)
    url = getattr(engine, "url", None)
    if url is None or not hasattr(engine, "raw_connection"):
        raise UsageError(
            f"engine is {type(engine).__name__}; expected a database URL or an SQLAlchemy engine.",
        )
    if engine.dialect.name == "sqlite":
        if url.database in (None, "", ":memory:") or "mode=memory" in str(url):
            raw = engine.raw_connection()
            # The pool keeps this connection for the engine's life; ours is only a second reference.
            shared = raw.driver_connection
            return Connections(DatabaseAddress("sqlite", ":memory:", "sqlite:///:memory:"), shared)
        return Connections(parse_address(f"sqlite:///{url.database}"))
    if engine.dialect.name != "postgresql":
        raise UsageError(f"The engine is for {engine.dialect.name}; expected PostgreSQL or SQLite.")
    return Connections(parse_address(url.render_as_string(hide_password=False)))
