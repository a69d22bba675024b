"""PostgreSQL: what each error means, for all that reads or writes.

A run may be left alone, so what passes by itself must not end it, and what does not must not be waited for.

| SQLSTATE | what happened | kind | why |
|---|---|---|---|
| none | connection lost, or none to be had | passing | a restart, a network, a failover |
| FATAL | the server ended the session, whatever the rest | passing | a new session may do (not if a resource ran out) |
| 08 | connection | passing | as above |
| 40 | deadlock, serialisation | passing | the server has chosen one of two; the other is through soon |
| 53 | too many connections | passing | one comes free |
| 53100 53200 53400 | disk, memory, a limit of both | resource | as full a second later; failed COPYs leave dead rows |
| 58 | the server's system: a file, a read | resource | a disk that fails goes on failing |
| 57 | shutdown, crash, start, end of an idle session | passing | restarts take seconds |
| 57014 | statement cancelled | time-out | by hand it was this one only; by a time-out a smaller or later one may pass |
| 55P03 | lock not granted | time-out | its holder may end, yet 30 s were waited already |
| 55006 | object in use | passing | its user ends |
| 25006 | read-only | passing | after a failover a new connection leads to the new primary |
| 25P03 25P04 | the transaction took too long | passing | our machine may have slept |
| 09 21 22 23 27 44 54 P0 | a value, a constraint, a size, a trigger | data | the row will never be taken |
| F0 XX | the server's own fault, a damaged page | failed | its log says more |
| else | table, column, right, type | refused | a person must look |

A run (store, source, inserter) tries again what passes for ``KDB_FAST_PATIENCE`` seconds, and after a time-out at most
three times. A call of the library is an application's, which must not be held up: it repeats a conflict
(:data:`CONFLICTS`), for a few seconds, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DatabaseError, KdbFastError, ResourceError, SchemaError
from .address import DatabaseAddress, redact
from .retrying import ErrorKind

if TYPE_CHECKING:
    import psycopg

KINDS = {
    **dict.fromkeys(("08", "40", "53", "57", "55006", "25006", "25P03", "25P04"), ErrorKind.PASSING),
    **dict.fromkeys(("57014", "55P03"), ErrorKind.TIMEOUT),
    **dict.fromkeys(("53100", "53200", "53400", "58"), ErrorKind.RESOURCE),
    **dict.fromkeys(("09", "21", "22", "23", "27", "44", "54", "P0"), ErrorKind.DATA),
    **dict.fromkeys(("F0", "XX"), ErrorKind.FAILED),
}
"""By SQLSTATE or, where that is not named, by its class, the first two characters; all others are refusals."""

CONFLICTS = frozenset({"40P01", "40001"})
"""A deadlock, and a transaction that cannot be serialised: the server has rolled back one of two."""

READ_ONLY = "25006"
NO_RIGHT = "42501"

REASONS = {
    "22001": "too_long",
    "22021": "bad_encoding",
    "22P05": "bad_encoding",
    "23502": "not_null",
    "23503": "foreign_key",
    "23505": "unique",
    "23514": "check",
    "54000": "too_large",
}
"""Why a row is rejected; for all other errors of the kind ``data``: ``database_refused``."""


def kind_of(error: BaseException) -> ErrorKind | None:
    """What an error means; None for one that is neither the driver's nor made of such a one."""
    import psycopg

    error = _origin(error)
    if isinstance(error, DatabaseError):
        return ErrorKind.PASSING  # no connection was to be had
    if not isinstance(error, psycopg.Error):
        return None
    state = error.sqlstate
    if state is None:  # libpq lost the connection, or psycopg itself could not do something
        lost = isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        return ErrorKind.PASSING if lost else ErrorKind.REFUSED
    kind = KINDS.get(state) or KINDS.get(state[:2], ErrorKind.REFUSED)
    ended = (error.diag.severity_nonlocalized or error.diag.severity) in ("FATAL", "PANIC")
    return ErrorKind.PASSING if ended and kind is not ErrorKind.RESOURCE else kind


def sqlstate(error: BaseException) -> str:
    """The SQLSTATE of an error of the driver's, or of the one that an error of kdb-fast was made of; '' without."""
    return getattr(_origin(error), "sqlstate", None) or ""


def _origin(error: BaseException) -> BaseException:
    """The driver's error behind one of kdb-fast's."""
    cause = error.__cause__
    return cause if isinstance(error, DatabaseError) and hasattr(cause, "sqlstate") else error  # type: ignore[return-value]


def primary_message(error: BaseException) -> str:
    """What the server says of an error, in one line, without the DETAIL that may quote a row."""
    diag = getattr(error, "diag", None)
    return " ".join(((diag and diag.message_primary) or str(error)).split()) or type(error).__name__


def explain(what: str, error: Exception, address: DatabaseAddress | None = None) -> Exception:
    """The error of kdb-fast that says what an error of psycopg means for the user.

    Args:
        what: What was being done: "writing", "taking the lock".
        address: Whose password must not be told; None where the error is a statement's, which knows none.
    """
    kind, state, origin = kind_of(error), sqlstate(error) or "no SQLSTATE", _origin(error)
    if isinstance(origin, KdbFastError):
        return error
    text = primary_message(origin)
    text = text if address is None else redact(text, address)
    if kind is ErrorKind.RESOURCE:
        return ResourceError(
            f"PostgreSQL ran out of a resource while {what}: {text} ({state}).",
            remedy="Free disk space or memory on the server, then run the same command again; a failed COPY "
            "leaves dead rows, so VACUUM its table.",
        )
    if kind in (ErrorKind.REFUSED, ErrorKind.DATA):
        return SchemaError(
            f"PostgreSQL refused {what}: {text} ({state}).",
            remedy="Was the table changed or a right revoked during the run? What was committed is kept.",
        )
    if kind is ErrorKind.FAILED:
        return DatabaseError(
            f"PostgreSQL failed while {what}: {text} ({state}).",
            remedy="See the server's log. What was committed is safe; run the same command again.",
        )
    if state == "57014":
        return DatabaseError(
            f"A statement was cancelled each time while {what}: {text} ({state}).",
            remedy="Raise statement_timeout for this role, then run the same command again.",
        )
    if state == "55P03":
        return DatabaseError(
            f"A lock was not granted while {what}: {text} ({state}).",
            remedy="Another session holds a lock on the table (see pg_locks); run the same command again later.",
        )
    if state[:2] == "40":
        return DatabaseError(
            f"Another transaction wrote the same rows while {what}: {text} ({state}).",
            remedy="The server has rolled back this one; run the same command again. On a standby, "
            "hot_standby_feedback = on or a longer max_standby_streaming_delay keeps it from ending what is read.",
        )
    if state == READ_ONLY:
        return DatabaseError(
            f"The server became read-only while {what}: {text} ({state}).",
            remedy="What was committed is safe; run the same command again with the address of the primary server, "
            "or with several hosts and target_session_attrs=read-write.",
        )
    return DatabaseError(
        f"The database was lost while {what}: {text} ({state}).",
        remedy="What was committed is safe; run the same command again.",
    )


def refusal(error: psycopg.Error) -> tuple[str, str]:
    """(reason, detail) of a refused row, without the row's text: the server's DETAIL may quote it."""
    state = error.sqlstate or "unknown"
    constraint = error.diag.constraint_name
    detail = f"the database refused the row with SQLSTATE {state}"
    if constraint:
        detail += f", constraint {constraint}"
    return REASONS.get(state, "database_refused"), detail
