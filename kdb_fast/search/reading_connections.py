"""The connections that searches read on: as many as there are searches at a time, each kept with its reader."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..db import sqlite_reading
from ..db.address import DatabaseAddress
from ..errors import DatabaseError, UsageError
from .readers import open_reader
from .readers.base import SearchReader

T = TypeVar("T")


class _Reading(NamedTuple):
    connection: Any
    reader: SearchReader


class ReadingConnections:
    """Connections of one database that only read.

    Args:
        address: The database.
        open_connection: Opens one more.
        shared: The one connection of an SQLite database in memory, which no other can see.
        lock: Held while the shared connection is used.
    """

    def __init__(
        self,
        address: DatabaseAddress,
        open_connection: Callable[[], Any],
        shared: sqlite3.Connection | None,
        lock: threading.RLock,
    ) -> None:
        self._address, self._open, self._shared, self._lock = address, open_connection, shared, lock
        self._idle: deque[_Reading] = deque()
        self._idle_beside: deque[_Reading] = deque()

    def read(self, work: Callable[[Any, SearchReader], T]) -> T:
        """``work(connection, reader)`` on a connection of its own; a database in memory has one for all.

        The connection used last is taken first: its reader may hold the vectors of the index in memory. One that
        was cut while it was idle is replaced.

        Raises:
            DatabaseError: The database cannot be reached.
        """
        if self._shared is not None:
            with self._lock:
                check_usable(self._shared)
                if not self._idle:
                    self._idle.append(_Reading(self._shared, open_reader(self._shared, self._address.dialect)))
                return work(*self._idle[0])
        return self._on_own(self._idle, work)

    def search(self, work: Callable[[SearchReader, SearchReader | None], T]) -> T:
        """``work(reader, beside)``: as :meth:`read`, with a second reader to use beside the first.

        None where there is no second connection: a database in memory has one for all, and a server may have no more to
        give. Second readers are kept apart: the first ones may hold the vectors of the index in memory.
        """
        if self._shared is not None:
            return self.read(lambda connection, reader: work(reader, None))

        def with_second(connection: Any, reader: SearchReader) -> T:
            def side_by_side(second: Any, beside: SearchReader) -> T:
                # The caller's connections may have several search paths; a search reads one index.
                beside.target = reader.target
                return work(reader, beside)

            return self._on_own(self._idle_beside, side_by_side, lambda: work(reader, None))

        return self._on_own(self._idle, with_second)

    def _on_own(
        self,
        idle: deque[_Reading],
        work: Callable[[Any, SearchReader], T],
        without: Callable[[], T] | None = None,
    ) -> T:
        """``work`` on one of the ``idle`` or a new connection; ``without`` instead where none can be opened.

        Between leaving ``idle`` and coming back to it a connection is this thread's alone: deque's pop and append are
        atomic, so no lock is held while a search runs.

        Again where an SQLite file was written meanwhile without its locks between us.
        """
        attempts = 0
        while True:
            try:
                reading, known = idle.pop(), True
            except IndexError:
                try:
                    connection = self._open()
                except DatabaseError:
                    if without is None:
                        raise
                    return without()
                reading, known = _Reading(connection, open_reader(connection, self._address.dialect)), False
            if known and not sqlite_reading.unchanged(reading.connection):
                close_quietly(reading.connection)
                continue
            attempts += 1
            try:
                result = work(*reading)
            except BaseException as error:
                if not sqlite_reading.unchanged(reading.connection):
                    close_quietly(reading.connection)
                    if isinstance(error, Exception) and attempts < sqlite_reading.READINGS:
                        continue
                elif self._address.dialect == "sqlite" or not reading.connection.closed:
                    idle.append(reading)
                elif known and isinstance(error, DatabaseError):
                    continue
                raise
            if sqlite_reading.unchanged(reading.connection):
                idle.append(reading)
                return result
            close_quietly(reading.connection)
            if attempts == sqlite_reading.READINGS:
                raise sqlite_reading.written_meanwhile(self._address)

    def close(self) -> None:
        """Close what was opened here; a shared connection stays open."""
        for idle in (self._idle, self._idle_beside):
            for reading in idle:
                if self._shared is None:
                    close_quietly(reading.connection)
            idle.clear()


def check_usable(shared: sqlite3.Connection) -> None:
    """Raises UsageError where a database in memory cannot be used by this thread."""
    try:
        shared.cursor().close()
    except sqlite3.ProgrammingError as error:
        raise UsageError(
            f"The SQLite database in memory cannot be used here: {error}",
            remedy="For several threads: create_engine('sqlite://', poolclass=StaticPool, "
            "connect_args={'check_same_thread': False}).",
        ) from None


def close_quietly(connection: Any) -> None:
    """Close a connection, whatever state it is in."""
    with contextlib.suppress(Exception):
        connection.close()
