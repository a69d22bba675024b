"""A connection to PostgreSQL with what a store's statements need: bounded waits, and repetition where that is safe.

The parts of :class:`~kdb_fast.stores.postgresql.store.PostgreSQLStore` are functions of a :class:`PgSession`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ...db import pg_settings
from ...db.address import DatabaseAddress
from ...db.pg_characters import Characters, escaped
from ...db.pg_connection import connect_postgresql
from ...db.pg_errors import READ_ONLY, explain, kind_of, sqlstate
from ...db.pg_settings import ENCODING
from ...db.retrying import Backoff, ErrorKind, retry
from ...errors import DatabaseError, SchemaError
from ...records import Key, storable_key
from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH
from ...tables.reading import rows_of
from ...tables.target import Target, find_target

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")

LIMITS = (
    # Nobody's lock is waited for longer, and nobody waits longer for ours.
    "SET LOCAL lock_timeout = '30s'; SET LOCAL idle_in_transaction_session_timeout = '60s'; "
    # The server notices within 25 s that our machine is gone, instead of two hours.
    "SET LOCAL tcp_keepalives_idle = 10; SET LOCAL tcp_keepalives_interval = 5; SET LOCAL tcp_keepalives_count = 3"
)
"""Of each transaction. Behind a transaction-mode pooler a setting of the session would leak to others."""

CHECK_CLIENT = "; SET LOCAL client_connection_check_interval = '2s'"
"""A statement ends soon after its client was killed, and its locks with it (PostgreSQL 14 or newer on a Unix)."""


class PgSession:
    """One connection to PostgreSQL. Reconnects by itself where a repeat is safe.

    Attributes:
        target: Where the tables are.
        encoding: What the database keeps texts in.
        on_wait: Called with what is being waited for, before each pause.
    """

    def __init__(
        self,
        address: DatabaseAddress,
        role: str,
        *,
        retry_seconds: float | None = None,
        patient: bool = False,
        borrowed: psycopg.Connection[tuple[Any, ...]] | None = None,
        limits: str = LIMITS,
        index: IndexTable = KDB_SEARCH,
    ) -> None:
        """
        Args:
            address: The database.
            role: What the connection is for; shown in the server's list of sessions.
            retry_seconds: How long a lost database is waited for; None for ``KDB_FAST_PATIENCE``.
            patient: Wait so long for the first connection too: the database was there a moment ago.
            borrowed: A connection of the caller's to use instead of an own one, within the caller's transaction if
                there is one.
            limits: Statements that bound the waits of each transaction.
            index: What is written.
        """
        self.address = address
        self._borrowed, self._index = borrowed, index
        self._role = role
        self._retry_seconds = retry_seconds
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._limits = limits
        self._backend = 0
        self._characters: Characters | None = None
        self.encoding = ENCODING
        self._kept_as = ""
        self.on_wait: Callable[[str], None] = lambda what: None
        connection = self.retrying("connecting", self.connection, seconds=None if patient else 0.0)
        try:
            self._characters = Characters.of(connection)
            if self._characters is not None:
                self.encoding = self._characters.encoding
            self.target = self.retrying("finding the tables", self.find_target, seconds=None if patient else 0.0)
        except BaseException:
            self.close()
            raise

    def find_target(self) -> Target:
        """Where the tables are, asked for anew; kept as ``target``, since what is written belongs into one index."""
        found = find_target(rows_of(self.connection(), "postgresql"), "postgresql", self.address.schema, self._index)
        self.target = replace(found, kept_as=self._kept_as)
        return self.target

    def rename_target(self, name: str) -> None:
        """Let runs, rejects and state be those of another target than the search table."""
        self._kept_as = name
        self.target = replace(self.target, kept_as=name)

    def connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The connection, opened again if it was lost."""
        if self._borrowed is not None:
            return self._borrowed
        if self._connection is None or self._connection.closed:
            self._connection = connect_postgresql(self.address, role=self._role)
            # The server may not know that our last connection is lost, and keep its locks, which we would wait for.
            row = self._connection.execute(
                "SELECT version(), (SELECT bool_and(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid = %s "
                "AND application_name = %s AND datname = current_database() AND usename = current_user)",
                (self._backend, f"kdb-fast/{self._role}"),
            ).fetchone()
            self._backend = self._connection.info.backend_pid
            modern = self._connection.info.server_version >= 140_000 and "windows" not in str(row).lower()
            self._limits = LIMITS + CHECK_CLIENT if modern else LIMITS
        return self._connection

    @property
    def is_ended_with_client(self) -> bool:
        """Whether the server ends a statement whose client was killed."""
        return CHECK_CLIENT in self._limits

    @contextlib.contextmanager
    def transaction(self) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        """A transaction whose waits for locks and for us are bounded; within the caller's, those are the caller's."""
        connection = self.connection()
        with pg_settings.transaction(connection, self._limits), connection.cursor() as cursor:
            yield cursor

    @contextlib.contextmanager
    def writing(self) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        """:meth:`transaction` of a command that has written nothing yet: a server that is read-only is not waited for.

        Raises:
            SchemaError: It is one.
        """
        import psycopg

        try:
            with self.transaction() as cursor:
                yield cursor
        except psycopg.errors.ReadOnlySqlTransaction:
            raise read_only() from None

    def missing_characters(self, texts: Iterable[str]) -> frozenset[str]:
        """See :meth:`kdb_fast.stores.base.Store.missing_characters`."""
        characters = self._characters
        if characters is None:
            return frozenset()
        known = list(texts)
        return self.retrying("looking at characters", lambda: characters.missing(self.connection(), known))

    def holdable(self, keys: Sequence[Key]) -> Sequence[Key]:
        """Those of the keys that a row can have in this database."""
        missing = self.missing_characters(str(part) for key in keys for part in key)
        return [key for key in keys if missing.isdisjoint("".join(map(str, key)))] if missing else keys

    def storable(self, value: object, limit: int = 200) -> str:
        """:func:`~kdb_fast.records.storable_key` as this database can hold it."""
        text = storable_key(value, limit)
        return escaped(text, self.missing_characters([text]))

    def retrying(self, what: str, work: Callable[[], T], *, rows: bool = False, seconds: float | None = None) -> T:
        """``work()``, again after a passing failure (lost connection, restart, deadlock) for a bounded time.

        Args:
            what: What is being done, for messages: "writing", "taking the lock".
            rows: Errors that a row is at fault for are psycopg's own: the caller deals with them.
            seconds: How long from the first failure on, where not as long as usual. An index may be built for
                an hour before the connection is lost.

        Raises:
            DatabaseError, ResourceError, SchemaError, LockedError: what the last failure means for the user.
        """
        # In a transaction of the caller's nothing can be repeated.
        backoff = Backoff(0.0 if self._borrowed is not None else self._retry_seconds if seconds is None else seconds)

        def explained(error: Exception) -> Exception:
            return error if rows and kind_of(error) is ErrorKind.DATA else explain(what, error, self.address)

        def again(error: Exception) -> None:
            if sqlstate(error) == READ_ONLY:
                self.close()  # after a failover another host of the address may be the one that can be written
            self.on_wait(f"waiting for the database ({what})")

        return retry(work, backoff, kind_of, explained, again)

    def send(self, what: str, statement: bytes, parameters: Sequence[Any]) -> Callable[[], list[tuple[Any, ...]]]:
        """Send a statement that only reads, and do not wait for it.

        Args:
            what: As for :meth:`retrying`.

        Returns:
            Gives its rows, and repeats it where that helps. Nothing else may be done in the session before.
        """
        import psycopg

        sent: Callable[[], list[list[tuple[Any, ...]]]] | None = None
        with contextlib.suppress(psycopg.Error, DatabaseError):  # if anything is still wrong, the repetition says it
            sent = pg_settings.send(self.connection(), [(statement, parameters)])

        def rows() -> list[tuple[Any, ...]]:
            nonlocal sent
            fetch, sent = sent, None
            return self.connection().execute(statement, parameters).fetchall() if fetch is None else fetch()[0]

        return lambda: self.retrying(what, rows)

    def close(self) -> None:
        """Close the connection, unless it is the caller's; what was not committed is rolled back by the database."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None


def read_only() -> SchemaError:
    """The error for a server that is to be written and may not."""
    return SchemaError(
        "The server is read-only (a standby, or default_transaction_read_only is on).",
        remedy="Give the address of the primary server, or add target_session_attrs=read-write.",
    )
