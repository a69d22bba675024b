"""PostgreSQL: what an error means for a flush."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..database import DatabaseAddress, redact
from ..errors import DatabaseError, KdbFastError, LockedError, ResourceError, SchemaError

if TYPE_CHECKING:
    import psycopg


def classify(error: BaseException) -> str:
    """What an error means for a flush: ``data`` (a row is at fault), ``passing``, ``resource``, ``schema`` or
    ``internal`` (the server itself failed)."""
    import psycopg

    if isinstance(error, DatabaseError):
        return "passing"
    state = getattr(error, "sqlstate", None)
    if state is None:
        # No SQLSTATE: libpq lost the connection, or psycopg itself could not do something.
        return "passing" if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)) else "schema"
    if state in ("53100", "53200") or state.startswith("58"):
        return "resource"
    if state[:2] in ("08", "57", "40", "53") or state in ("55P03", "25006", "25P03", "55006"):
        return "passing"
    if state[:2] in ("22", "23", "21", "54", "P0", "44", "09", "27"):
        return "data"
    return "internal" if state[:2] in ("F0", "XX") else "schema"


def explain(what: str, error: Exception, address: DatabaseAddress) -> KdbFastError:
    """The error of kdb-fast that says what an error of psycopg means for the user.

    Args:
        what: What was being done: "writing", "taking the lock".
    """
    if isinstance(error, (DatabaseError, LockedError)):
        return error
    kind = classify(error)
    state = getattr(error, "sqlstate", None) or "no SQLSTATE"
    diag = getattr(error, "diag", None)
    text = redact(" ".join(((diag and diag.message_primary) or str(error)).split()), address)
    if kind == "resource":
        return ResourceError(
            f"PostgreSQL ran out of a resource while {what}: {text} ({state}).",
            remedy="Free disk space or memory on the server, then run the same command again; a failed COPY "
            "leaves dead rows, so VACUUM kdb_search.",
        )
    if kind in ("schema", "data"):
        return SchemaError(
            f"PostgreSQL refused {what}: {text} ({state}).",
            remedy="Was the table changed or a right revoked during the run? What was committed is kept.",
        )
    if kind == "internal":
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
            remedy="Another session holds a lock on kdb_search (see pg_locks); run the same command again later.",
        )
    if state[:2] == "40":
        return DatabaseError(
            f"Another transaction wrote the same rows while {what}: {text} ({state}).",
            remedy="The server has rolled back this one; run the same command again.",
        )
    if state == "25006":
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
    names = {
        "22021": "bad_encoding", "22P05": "bad_encoding", "22001": "too_long", "23502": "not_null",
        "23503": "foreign_key", "23505": "unique", "23514": "check", "54000": "too_large", "22000": "bad_vector",
    }  # fmt: skip
    state = error.sqlstate or "unknown"
    constraint = error.diag.constraint_name
    detail = f"the database refused the row with SQLSTATE {state}"
    if constraint:
        detail += f", constraint {constraint}"
    return names.get(state, "database_refused"), detail
