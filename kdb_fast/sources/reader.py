"""The connection that a source reads on, by short queries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from ..db import pg_errors, pg_settings
from ..db.address import DatabaseAddress
from ..db.pg_connection import connect_postgresql
from ..db.retrying import Backoff, ErrorKind, retry
from ..db.sqlite_connection import connect_sqlite
from ..db.sqlite_errors import translated
from ..db.sqlite_reading import connect_reading
from ..db.sqlite_session import patiently
from ..errors import DatabaseError, SchemaError
from ..tables.target import rows_on

ONLY_READING = "SET TRANSACTION READ ONLY"
"""For the beginning of a transaction."""


def writes(error: Exception) -> bool:
    """Whether a statement was refused because it writes."""
    return pg_errors.sqlstate(error) == pg_errors.READ_ONLY


class Reader:
    """Reads one database; nothing is held open between two queries.

    Args:
        address: The database, running.
        only_read: The run writes another database; an SQLite file is read whatever rights there are on it.

    Raises:
        DatabaseError: The database cannot be reached.
    """

    def __init__(self, address: DatabaseAddress, *, only_read: bool = False) -> None:
        self.address, self._only_read = address, only_read
        self._connection: Any = None
        self.connection()

    def connection(self) -> Any:
        """The connection, opened again if it was lost."""
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> Any:
        if self.address.dialect == "postgresql":
            return connect_postgresql(self.address, role="reader")
        return connect_reading(self.address) if self._only_read else connect_sqlite(self.address)

    def fetch(
        self,
        query: str,
        parameters: Mapping[str, Any],
        *,
        text: Callable[[bytes], Any] = str,
        only_reading: bool = False,
    ) -> list[tuple[Any, ...]]:
        """All rows of one short query, repeated on a new connection where that can help.

        Args:
            text: On SQLite, what is made of a text; ``bytes`` where one value that is not UTF-8 fails no query.
            only_reading: In PostgreSQL, the query may write nothing.

        Raises:
            DatabaseError: The connection was lost and did not come back in time.
            SchemaError: The database refuses the query.
        """
        if self.address.dialect == "sqlite":
            connection = self.connection()
            with translated("reading records"):
                connection.text_factory = text
                return patiently(connection, lambda: rows_on(connection, "sqlite")(query, parameters))
        backoff = Backoff()

        def work() -> list[tuple[Any, ...]]:
            connection = self.connection()
            alone = pg_settings.transaction(connection, ONLY_READING) if only_reading else contextlib.nullcontext()
            with alone, connection.cursor(binary=True) as cursor:
                return rows_on(cursor, "postgresql")(query, parameters)

        def kind(error: Exception) -> ErrorKind | None:
            return ErrorKind.REFUSED if only_reading and writes(error) else pg_errors.kind_of(error)

        def explained(error: Exception) -> Exception:
            if only_reading and writes(error):
                return SchemaError(
                    f"The query writes: {pg_errors.primary_message(error)}.", remedy="Give one that only reads."
                )
            if not isinstance(error, DatabaseError):
                return pg_errors.explain("reading records", error, self.address)
            return DatabaseError(
                f"The connection to {self.address.display} was lost while reading records, and did not come "
                f"back for {backoff.seconds:g} s: {error.message}",
                remedy="What was committed is safe; the same command carries on.",
            )

        return retry(work, backoff, kind, explained, again=lambda error: self.close())

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None
