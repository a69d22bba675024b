"""SQLite: what each error means, for all that reads or writes.

| result code | what happened | kind | why |
|---|---|---|---|
| BUSY | another connection holds the lock | passing | its transaction ends; waited for until the busy time-out |
| LOCKED | this program itself holds a lock, in a shared cache | failed | it may be this very thread that would wait |
| FULL IOERR NOMEM | disk or memory ran out or fail | resource | as full a second later |
| CONSTRAINT TOOBIG MISMATCH | a value, a constraint, a size, a trigger | data | the row will never be taken |
| ERROR READONLY PERM AUTH | table, column, right | refused | a person must look |
| else, none | a damaged file, a file that cannot be opened, Python's module | failed | as above, or a defect |

There is no time-out and no connection to lose: what is not a lock is final.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

from ..errors import DatabaseError, KdbFastError, ResourceError, SchemaError
from . import sqlite_vec
from .retrying import ErrorKind

KINDS = {
    sqlite3.SQLITE_BUSY: ErrorKind.PASSING,
    **dict.fromkeys((sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM), ErrorKind.RESOURCE),
    **dict.fromkeys((sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH), ErrorKind.DATA),
    **dict.fromkeys(
        (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH), ErrorKind.REFUSED
    ),
}
"""By primary result code; all others are failures."""

REASONS = {
    "SQLITE_CONSTRAINT_NOTNULL": "not_null",
    "SQLITE_CONSTRAINT_CHECK": "check",
    "SQLITE_CONSTRAINT_UNIQUE": "unique",
    "SQLITE_CONSTRAINT_PRIMARYKEY": "unique",
    "SQLITE_CONSTRAINT_ROWID": "unique",
    "SQLITE_CONSTRAINT_FOREIGNKEY": "foreign_key",
}
"""Why a row is rejected; for all other errors of the kind ``data``: ``database_refused``."""


class RowIgnoredError(sqlite3.IntegrityError):
    """A statement changed fewer rows than it was given: a trigger dropped one without an error."""


def primary_code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code, or None for an error of Python's module itself."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def kind_of(error: BaseException) -> ErrorKind | None:
    """What an error means; None for one that is not sqlite3's."""
    if isinstance(error, RowIgnoredError):
        return ErrorKind.DATA
    if not isinstance(error, sqlite3.Error):
        return None
    return KINDS.get(primary_code(error) or 0, ErrorKind.FAILED)


def reason_of(error: sqlite3.Error) -> str:
    """Why the row is rejected that an error of the kind ``data`` speaks about."""
    return REASONS.get(getattr(error, "sqlite_errorname", ""), "database_refused")


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Errors of sqlite3 become errors of kdb-fast.

    Args:
        doing: What is being done, for the message: "writing", "taking the lock".
    """
    try:
        yield
    except sqlite3.Error as error:
        raise explain(error, doing) from error
    except MemoryError as error:
        raise ResourceError(
            f"SQLite ran out of memory while {doing}.", remedy="Give the process more memory."
        ) from error


def explain(error: sqlite3.Error, doing: str) -> KdbFastError:
    """The error of kdb-fast that says what an error of sqlite3 means."""
    text = f"while {doing}: {error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})."
    kind, code = kind_of(error), primary_code(error)
    if kind is ErrorKind.RESOURCE:
        return ResourceError(
            f"The disk is full or failing {text}",
            remedy="Free disk space, then run the same command again; what was committed is kept.",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DatabaseError(
            f"Another program kept the database locked {text}",
            remedy="End its transaction, then run the same command again; what was committed is kept.",
        )
    if code == sqlite3.SQLITE_READONLY:
        return SchemaError(
            f"The database cannot be written {text}",
            remedy="Make its directory writable, and the file: SQLite keeps its journal beside it.",
        )
    if kind is ErrorKind.REFUSED:
        if sqlite_vec.UNKNOWN in str(error):
            return SchemaError(f"A table of sqlite-vec was needed {text}", remedy=f"{sqlite_vec.TO_HAVE_IT}.")
        return SchemaError(
            f"SQLite refused it {text}",
            remedy="Was a table changed during the run? What was committed is kept.",
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DatabaseError(
            f"The database file is damaged {text}",
            remedy="Check it with PRAGMA integrity_check, and restore a copy from before the damage.",
        )
    return DatabaseError(f"SQLite failed {text}", remedy="What was committed is kept; run the same command again.")
