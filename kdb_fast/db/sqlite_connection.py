"""SQLite files: make one, open one for writing, say why it cannot be opened. To read only: :mod:`.sqlite_reading`."""

from __future__ import annotations

import os
import sqlite3

from ..errors import DatabaseError, KdbFastError, RefusedError, ResourceError
from . import sqlite_errors
from .address import DatabaseAddress, shown
from .retrying import ErrorKind
from .sqlite_vec import load_for_its_tables

SQLITE_BUSY_TIMEOUT = 30.0
"""Seconds to wait for another process that is writing the same SQLite file."""


def create_sqlite(address: DatabaseAddress) -> None:
    """Make an SQLite file that does not exist yet; nothing for other addresses.

    Raises:
        DatabaseError: Its directory does not exist or may not be written.
    """
    if address.dialect == "sqlite" and address.may_create and not os.path.exists(address.conninfo):
        connect_sqlite(address, must_exist=False).close()


def check_sqlite_file(address: DatabaseAddress) -> None:
    """Raise DatabaseError unless there is a file of this name."""
    if not os.path.exists(address.conninfo):
        raise DatabaseError(
            f"There is no SQLite file {shown(address.conninfo)}, or it is in a directory that may not be read.",
            remedy=f"Check the path after sqlite:/// in {address.given_as} (four / for absolute).",
        )


def connect_sqlite(address: DatabaseAddress, *, must_exist: bool = True) -> sqlite3.Connection:
    """A connection to write through, in autocommit mode (transactions are begun explicitly), with a busy time-out.

    Raises:
        DatabaseError: The file does not exist, is not a database, or cannot be opened.
        RefusedError: The address says ``mode=ro``, or the file's directory cannot be written.
        ResourceError: The disk is full or fails.
    """
    if must_exist or not address.may_create:
        check_sqlite_file(address)
    if address.read_only:
        raise RefusedError(
            f"{address.display} is to be read only, and this would write it.",
            remedy="Leave mode=ro or immutable=1 out of the address.",
        )
    connection = None
    try:
        connection = sqlite3.connect(
            address.conninfo, timeout=SQLITE_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        load_for_its_tables(connection)  # and see that the file is a database
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise cannot_open(address, error) from None
    return connection


def cannot_open(address: DatabaseAddress, error: sqlite3.Error) -> KdbFastError:
    """The error of kdb-fast that says why an SQLite file cannot be opened."""
    text = f"Cannot open {address.display}: {error}."
    code = sqlite_errors.primary_code(error)
    if sqlite_errors.kind_of(error) is ErrorKind.RESOURCE:
        return ResourceError(text, remedy="Is the disk full, or a limit reached (ulimit -f)? Then run it again.")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        directory = os.path.dirname(address.conninfo)
        if os.path.isdir(address.conninfo):
            return DatabaseError(text, remedy="This is a directory; expected a file.")
        if os.path.exists(address.conninfo) and not os.access(address.conninfo, os.R_OK):
            return RefusedError(text, remedy="This user may not read the file.")
        if os.path.isdir(directory) and not os.access(directory, os.W_OK):
            return RefusedError(
                text, remedy="Make its directory writable, and the file: SQLite keeps its journal beside it."
            )
        return DatabaseError(text, remedy="Is its directory there, and may more files be opened?")
    if code == sqlite3.SQLITE_NOTADB:
        return DatabaseError(text, remedy="Is it a SQLite database?")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DatabaseError(
            f"Another program kept {address.display} locked for {SQLITE_BUSY_TIMEOUT:.0f} s: {error}.",
            remedy="End its transaction, then run the same command again.",
        )
    if code == sqlite3.SQLITE_CORRUPT:
        return DatabaseError(text, remedy="Check it with PRAGMA integrity_check, and restore an undamaged copy.")
    return DatabaseError(text)
