"""PostgreSQL: what an error means for a flush."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DatabaseError

if TYPE_CHECKING:
    import psycopg


def classify(error: BaseException) -> str:
    """What an error means for a flush: ``data`` (a row is at fault), ``passing``, ``resource`` or ``schema``."""
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
    return "schema"


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
