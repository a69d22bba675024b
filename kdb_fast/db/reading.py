"""Connections that only read, of either dialect."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from . import sqlite_reading
from .address import DatabaseAddress
from .pg_connection import connect_postgresql

T = TypeVar("T")


def open_connection(address: DatabaseAddress) -> Any:
    """A connection for reading, of either dialect, in autocommit mode. For one question: :func:`read`."""
    if address.dialect == "sqlite":
        return sqlite_reading.connect_reading(address)
    return connect_postgresql(address, role="search")


def read(address: DatabaseAddress, work: Callable[[Any], T], *, mapped: bool = False) -> T:
    """``work(connection)`` on a connection for reading; called again where an SQLite file was written meanwhile without
    its locks between us.

    Args:
        mapped: Read an SQLite file through memory where that can be, see :func:`.sqlite_reading.read`.

    Raises:
        DatabaseError: The database cannot be reached.
    """
    if address.dialect == "sqlite":
        return sqlite_reading.read(address, work, mapped=mapped)
    with contextlib.closing(open_connection(address)) as connection:
        return work(connection)
