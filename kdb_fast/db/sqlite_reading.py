"""SQLite files that are only read: a file that cannot be written is read as it is, and nothing is left beside it.

SQLite itself writes when it only reads: a file in write-ahead mode needs a log and a shared index beside it. Which way
a file is opened therefore depends on what is there:

================================================  ==================================================================
beside the file                                   it is opened
================================================  ==================================================================
a shared index: another program has it open       for reading only, under SQLite's locks
a log with content, no index: left by a crash     without locks, the log read into memory
neither                                           as usual; with ``mode=ro``, or where that cannot be (a file in
                                                  write-ahead mode in a directory that cannot be written), as one that
                                                  nobody writes, without locks
================================================  ==================================================================

Without locks, what is read is true only if the file was the same before and after: :func:`unchanged`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

from ..errors import DatabaseError, KdbFastError, RefusedError
from . import sqlite_connection
from .address import DatabaseAddress
from .sqlite_connection import cannot_open, check_sqlite_file
from .sqlite_errors import primary_code
from .sqlite_vec import load_for_its_tables

T = TypeVar("T")

READINGS = 5
"""Times that a file is read which another program writes meanwhile, where its locks cannot be had."""

QUIET_SECONDS = 1.0
"""A file that was written so long ago can be seen to change: file systems count time in steps of milliseconds."""

NO_WAY = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
"""Primary result codes of a way to open that this file does not allow."""

MAPPED_BYTES = (1 << 31) - 65536
"""Of a file read through memory: the most that SQLite allows as it is usually built; the rest is read as ever."""

AS_IT_IS = "mode=ro&immutable=1"
WITH_ITS_LOG = "mode=ro&vfs=unix-none"


class _Unlocked(sqlite3.Connection):
    """A connection without locks. ``state`` is what the file was before it was opened."""

    path: str
    state: tuple[object, ...]


_left_open: list[sqlite3.Connection] = []
"""Closing any descriptor of a file drops the locks that other connections of this process hold on it. SQLite minds that
for all but those with ``vfs=unix-none``, which are therefore closed with the process."""


class _WithItsLog(_Unlocked):
    def close(self) -> None:
        _left_open.append(self)


def read(address: DatabaseAddress, work: Callable[[sqlite3.Connection], T], *, mapped: bool = False) -> T:
    """``work(connection)``, again where the file was written meanwhile without SQLite's locks between us.

    Args:
        mapped: Read the file through memory if its locks can be had: a table of long rows in a third of the time. For a
            process of our own only, since a program that cuts the file off without asking for the locks ends it.

    Raises:
        DatabaseError: The file does not exist, is no database, or is written all the time.
        RefusedError: It can only be read after somebody who may write it has opened it.
    """
    for _ in range(READINGS):
        with contextlib.closing(connect_reading(address)) as connection:
            if mapped and not isinstance(connection, _Unlocked):
                connection.execute(f"PRAGMA mmap_size = {MAPPED_BYTES}")
            try:
                result = work(connection)
            except (sqlite3.Error, KdbFastError):
                if unchanged(connection):
                    raise
            else:
                if unchanged(connection):
                    return result
    raise written_meanwhile(address)


def written_meanwhile(address: DatabaseAddress) -> DatabaseError:
    """The error for a file that changes in each of READINGS attempts."""
    return DatabaseError(
        f"{address.display} is written all the time by another program, and its locks cannot be had from here.",
        remedy="Try again when that program has ended, or make the directory of the file writable.",
    )


def unchanged(connection: sqlite3.Connection) -> bool:
    """Whether all that was read on a connection of :func:`connect_reading` was one state of the file.

    Under locks SQLite sees to that.
    """
    return not isinstance(connection, _Unlocked) or connection.state == _state(connection.path)


def connect_reading(address: DatabaseAddress) -> sqlite3.Connection:
    """A connection in autocommit mode that only reads, with a busy time-out; see the module on how.

    Raises:
        DatabaseError: The file does not exist, is no database, or cannot be opened.
        RefusedError: It can only be read after somebody who may write it has opened it.
    """
    check_sqlite_file(address)
    path = address.conninfo
    has_log, has_index = _size(f"{path}-wal") > 0, os.path.exists(f"{path}-shm")
    without_locks = WITH_ITS_LOG if has_log else AS_IT_IS
    if has_index:
        ways = ["mode=ro", without_locks]
    elif has_log:
        ways = [WITH_ITS_LOG, "mode=ro" if address.read_only else "mode=rw"]
    elif address.read_only:
        ways = [AS_IT_IS] if _is_quiet(path) else ["mode=ro", AS_IT_IS]
    else:
        ways = ["mode=rw", AS_IT_IS]
    if _size(f"{path}-journal") > 0:
        # It may hold what a transaction that was cut off has overwritten: without rolling that back nothing is true.
        ways = ["mode=ro" if address.read_only else "mode=rw"]
    for way in ways:
        try:
            return _open(path, way)
        except sqlite3.Error as error:
            failed = error
            if primary_code(error) not in NO_WAY and "no such vfs" not in str(error):
                break
    if _size(f"{path}-journal") > 0 and primary_code(failed) in NO_WAY:
        raise RefusedError(
            f"{address.display} was being written when its program was cut off: what it had begun must be rolled back, "
            "and the file cannot be written from here.",
            remedy="Open it once where it may be written, or copy it together with its -journal to such a place.",
        ) from None
    raise cannot_open(address, failed) from None


def _open(path: str, way: str) -> sqlite3.Connection:
    kind = {AS_IT_IS: _Unlocked, WITH_ITS_LOG: _WithItsLog}.get(way, sqlite3.Connection)
    state = _state(path)
    connection = sqlite3.connect(
        f"file:{quote(path)}?{way}",
        uri=True,
        factory=kind,
        timeout=sqlite_connection.SQLITE_BUSY_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
    )
    if isinstance(connection, _Unlocked):
        connection.path, connection.state = path, state
    try:
        if way == WITH_ITS_LOG:
            # Alone with the file, SQLite keeps the index of the log in memory.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        load_for_its_tables(connection)  # and see that the file is a database
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _state(path: str) -> tuple[object, ...]:
    found: list[object] = []
    for suffix in ("", "-wal", "-journal"):
        try:
            at = os.stat(path + suffix)
        except OSError:
            found.append(None)
            continue
        # An empty log is one that a reader has made.
        found.append((at.st_ino, at.st_size, at.st_mtime_ns) if at.st_size else None)
    return tuple(found)


def _is_quiet(path: str) -> bool:
    try:
        return abs(time.time() - os.stat(path).st_mtime) > QUIET_SECONDS
    except OSError:
        return False


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def is_writable(address: DatabaseAddress) -> bool:
    """Whether this process may write the file, and the journal that SQLite keeps beside it."""
    path = address.conninfo
    return not address.read_only and os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)
