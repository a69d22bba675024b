"""The library's connections: one that writes, as many that read as there are searches at a time, and the caller's own.

Where they come from is in :mod:`.sqlalchemy_engines`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from ..db import pg_errors, pg_settings, sqlite_reading
from ..db.address import DatabaseAddress, opened
from ..db.pg_connection import connect_postgresql
from ..db.retrying import ErrorKind
from ..errors import DatabaseError, SchemaError, UsageError
from ..stores.base import IndexStore
from ..tables.kdb_search import KDB_SEARCH
from .reading_connections import ReadingConnections, check_usable, close_quietly

if TYPE_CHECKING:
    import psycopg

    from ..stores.postgresql.index_store import PostgreSQLIndexStore

T = TypeVar("T")

LIBRARY_LIMITS = "SET LOCAL lock_timeout = '30s'; SET LOCAL idle_in_transaction_session_timeout = 0"
"""Of our own transactions in PostgreSQL: nobody's lock is waited for longer, while an embedding provider may take
minutes (rate limits) between two statements."""

PLANNER = ("enable_hashjoin", "enable_mergejoin")
"""Settings that writing changes for the rest of a transaction; in the caller's they are set back."""


class _Prepared(NamedTuple):
    """For which schema the tables were prepared, and the lengths that were asked for."""

    schema: str | None
    dimensions: int | None
    otherwise: int


class Connections:
    """Connections to one database: one for writing, as many for reading as there are searches at a time.

    One lock keeps writers apart: the writing connection carries one transaction at a time. Searches do not take it, but
    where a database in memory has one connection for everything.

    Args:
        address: The database; an embedded server is started at once.
        shared: The one connection of an SQLite database in memory, which no other can see.
        connect: Opens a connection to PostgreSQL in autocommit mode, instead of one by the address.
        keep: Something that must live as long as the connections.

    Attributes:
        reading: The connections that searches read on.
    """

    def __init__(
        self,
        address: DatabaseAddress,
        shared: sqlite3.Connection | None = None,
        connect: Callable[[], psycopg.Connection[tuple[Any, ...]]] | None = None,
        keep: object = None,
    ) -> None:
        self.dialect: Literal["postgresql", "sqlite"] = address.dialect
        self._shared, self._connect, self._keep = shared, connect, keep
        self._lock = threading.RLock()
        self._closing = contextlib.ExitStack()
        self._address = address
        if address.embedded_dir is not None:
            self._address = replace(self._closing.enter_context(opened(address)), display=address.display)
        self._store: IndexStore | None = None
        self._prepared: _Prepared | None = None
        self.reading = ReadingConnections(self._address, self._open, shared, self._lock)

    # -- writing ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[IndexStore]:
        """The store within one transaction, which an exception rolls back; one user at a time.

        Raises:
            DatabaseError: The database cannot be reached or was lost. A connection that was cut while it was idle
                is replaced.
        """
        with self._lock, contextlib.ExitStack() as stack:
            if self.dialect == "sqlite":
                store = self._sqlite_store()
                stack.enter_context(store.transaction())
            else:
                store = self._begun(stack)
            yield store

    def prepare(self, dimensions: int | None, otherwise: int) -> None:
        """Create what search tables are missing.

        Args:
            dimensions: Length of the vectors to come; None if none will.
            otherwise: Length to declare in a new table then.

        Raises:
            SchemaError: The tables are not KameleonDB's, or hold vectors of another length.
        """
        if self.dialect == "postgresql":
            with self.writing() as store:
                store.prepare(dimensions or store.column_dimensions() or otherwise)
                self._prepared = _Prepared(store.target.schema, dimensions, otherwise)
            return
        if self._shared is None and os.path.exists(self._address.conninfo):
            writable = sqlite_reading.is_writable(self._address)
        else:
            writable = not self._address.read_only
        if writable:
            with self._lock:
                self._sqlite_store().prepare(dimensions or otherwise)
        else:
            self.reading.read(lambda connection, reader: _check_there(connection, self._address))
        if dimensions is not None:
            self.reading.read(lambda connection, reader: _check_dimensions(connection, dimensions))

    def _prepare_elsewhere(self, store: PostgreSQLIndexStore) -> None:
        """Create what is missing where this connection's search path leads to another schema than the first one's did.

        An application may set one path for each tenant; each has an index of its own.
        """
        first = self._prepared
        if first is not None and store.target.schema != first.schema and not store.is_prepared():
            store.prepare(first.dimensions or store.column_dimensions() or first.otherwise)

    def _sqlite_store(self) -> IndexStore:
        from ..stores.sqlite.index_store import SQLiteIndexStore

        if self._shared is not None:
            check_usable(self._shared)
        if self._store is None:
            if self._shared is None:
                self._store = SQLiteIndexStore.open(self._address, must_exist=False)
            else:
                self._store = SQLiteIndexStore(self._shared)
        return self._store

    def _begun(self, stack: contextlib.ExitStack) -> IndexStore:
        """The store with its transaction entered into ``stack``."""
        while True:
            known = self._store is not None
            store = self._postgresql_store()
            try:
                with contextlib.ExitStack() as begun:
                    begun.enter_context(_explained(store.address))
                    begun.enter_context(store.transaction())
                    self._prepare_elsewhere(store)
                    stack.enter_context(begun.pop_all())
                    return store
            except DatabaseError as error:
                if not known or pg_errors.kind_of(error) is not ErrorKind.PASSING:
                    raise
                # It was idle since the last use, so nothing of this one was sent on it.
                self._store = None

    def _postgresql_store(self) -> PostgreSQLIndexStore:
        from ..stores.postgresql.index_store import PostgreSQLIndexStore

        store = self._store
        if not isinstance(store, PostgreSQLIndexStore) or store.connection().closed:
            store = PostgreSQLIndexStore(self._address, "library", borrowed=self._open(), limits=LIBRARY_LIMITS)
            self._store = store
        return store

    def _open(self) -> Any:
        if self.dialect == "sqlite":
            return sqlite_reading.connect_reading(self._address)
        return self._connect() if self._connect is not None else connect_postgresql(self._address, role="library")

    @contextlib.contextmanager
    def borrowed(self, connection: Any) -> Iterator[IndexStore]:
        """A store on the caller's connection: its rows are kept or undone together, within the caller's transaction.

        Raises:
            UsageError: The driver is neither psycopg 3 nor sqlite3, the connection commits by itself, or it is one
                to another database.
        """
        if isinstance(connection, sqlite3.Connection) and self.dialect == "sqlite":
            from ..stores.sqlite.index_store import SQLiteIndexStore

            self._check_same(connection)
            if not connection.in_transaction:
                # sqlite3 begins one only at the first INSERT; a savepoint before that would commit by itself.
                connection.execute("BEGIN")
            store: IndexStore = SQLiteIndexStore(connection)
            with self._lock if self._shared is not None else contextlib.nullcontext(), store.transaction():
                yield store
            return
        import psycopg

        if not isinstance(connection, psycopg.Connection) or self.dialect == "sqlite":
            raise UsageError(
                f"The session's driver is {type(connection).__module__}; expected psycopg 3 for PostgreSQL or "
                f"sqlite3 for SQLite, and this engine is for {self.dialect}.",
                remedy="Use postgresql+psycopg:// in the engine's URL.",
            )
        if connection.autocommit:
            raise _commits_by_itself()
        from ..stores.postgresql.index_store import PostgreSQLIndexStore

        # A statement of lent() begins the caller's transaction, of which the store's own is then a part.
        with _explained(self._address), pg_settings.lent(connection, self._address.display, PLANNER):
            postgresql = PostgreSQLIndexStore(self._address, "library", borrowed=connection)
            with postgresql.transaction():
                self._prepare_elsewhere(postgresql)
                yield postgresql

    def _check_same(self, connection: sqlite3.Connection) -> None:
        if getattr(connection, "autocommit", False) is True:  # Python 3.12 and later
            raise _commits_by_itself()
        if connection is self._shared:
            return
        path = main_file(connection)
        if self._shared is None:
            same = bool(path) and os.path.samefile(path, self._address.conninfo)
        else:
            # With a shared cache several connections see one database in memory.
            exists = f"SELECT 1 FROM sqlite_master WHERE name = '{KDB_SEARCH.name}'"  # noqa: S608
            same = not path and connection.execute(exists).fetchone() is not None
        if same:
            return
        raise UsageError(
            "The session is bound to another SQLite database than this engine.",
            remedy="Bind both to the same engine; in memory use poolclass=StaticPool.",
        )

    def close(self) -> None:
        """Close what was opened here; the caller's own connections stay open."""
        with self._lock:
            self.reading.close()
            store, self._store = self._store, None
            if store is not None:
                store.close()
                if store.dialect == "postgresql":
                    close_quietly(store.connection())  # type: ignore[attr-defined]
            self._closing.close()


def main_file(connection: sqlite3.Connection) -> str:
    """Path of the main database; '' in memory."""
    return next((str(row[2] or "") for row in connection.execute("PRAGMA database_list") if row[1] == "main"), "")


def _check_there(connection: sqlite3.Connection, address: DatabaseAddress) -> None:
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (KDB_SEARCH.name,)).fetchone() is None:
        raise SchemaError(
            f"There is no search index in {address.display}, and the file cannot be written.",
            remedy="Is it the right file? If so, make the file and its directory writable.",
        )


def _check_dimensions(connection: sqlite3.Connection, dimensions: int) -> None:
    """SQLite declares no length: what is stored tells. While a run replaces the vectors there are both."""
    stored = f"SELECT dimensions FROM {KDB_SEARCH.name} WHERE embedding IS NOT NULL AND dimensions {{}} LIMIT 1"  # noqa: S608
    first = connection.execute(stored.format("IS NOT NULL")).fetchone()
    if first in (None, (dimensions,)):
        return
    if connection.execute(stored.format("= ?"), (dimensions,)).fetchone() is None:
        raise SchemaError(
            f"{KDB_SEARCH.name} holds vectors of {first[0]} dimensions; the model gives {dimensions}.",
            remedy="Choose the model that the index was made with, or make it anew: kdb-fast reindex --model …, or "  # noqa: S608
            f"UPDATE {KDB_SEARCH.name} SET embedding = NULL; and index every record again.",
        )


def _commits_by_itself() -> UsageError:
    return UsageError(
        "The session's connection is in autocommit mode: there is no transaction to write in.",
        remedy="Bind the session to an engine with another isolation level than AUTOCOMMIT.",
    )


@contextlib.contextmanager
def _explained(address: DatabaseAddress) -> Iterator[None]:
    """Errors of psycopg become those of kdb-fast."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        raise pg_errors.explain("writing the index", error, address) from error
