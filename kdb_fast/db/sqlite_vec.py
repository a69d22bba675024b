"""SQLite: the extension sqlite-vec, on a connection."""

from __future__ import annotations

import sqlite3

HAS_ITS_TABLES = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL TABLE %vec0%')"
"""Between the words may be line ends, as another program has written them."""

UNKNOWN = "no such module: vec0"
"""What SQLite says of its tables without it."""

TO_HAVE_IT = "pip install 'kdb-fast[sqlite-vec]', with a Python whose sqlite3 may load extensions"


def why_no_sqlite_vec(connection: sqlite3.Connection) -> str:
    """Make sqlite-vec's functions and tables known to this connection; returns why that cannot be done, '' if it was.

    It needs the package, and a Python whose sqlite3 may load extensions, which many builds may not.
    """
    try:
        import sqlite_vec
    except ImportError:
        return "the package sqlite-vec is not installed"
    if not hasattr(connection, "enable_load_extension"):
        return "this Python's sqlite3 is built without loading of extensions"
    try:
        connection.enable_load_extension(True)
        try:
            sqlite_vec.load(connection)
        finally:
            connection.enable_load_extension(False)
    except (AttributeError, OSError, sqlite3.Error) as error:
        return f"sqlite-vec cannot be loaded ({error})"
    return ""


def load_for_its_tables(connection: sqlite3.Connection) -> None:
    """Make sqlite-vec known, if that can be done, where the file has tables of it: without it nothing can be asked of
    them, not even their columns."""
    if connection.execute(HAS_ITS_TABLES).fetchone()[0]:
        why_no_sqlite_vec(connection)
