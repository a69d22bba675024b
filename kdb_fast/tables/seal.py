"""How a row is known to be as kdb-fast wrote it, in a table whose triggers change ``updated_at``.

Elsewhere ``kdb_fast_at = updated_at`` says so. A trigger that sets ``updated_at`` makes that false for every row; and
what it has set cannot be written down in the row afterwards, since that would set it again. So where the table has
triggers there is one more column, ``kdb_fast_seal``: SHA-256 of what was written. A row that another program has given
another text, vector, model or fingerprint does not match its seal; a copy of the table (dump and restore) does.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Collection

from ..records import number_of

COLUMN = "kdb_fast_seal"

SQLITE_FUNCTION = "kdb_fast_seal_of"

VALUES = ("kdb_fast_fingerprint", "{model}", "{dimensions}", "{content}", "{embedding}")


def expression(dialect: str, fingerprint: str, model: str, dimensions: str, content: str, embedding: str) -> str:
    """The seal of these values, as SQL; for PostgreSQL a template of :meth:`~.target.Target.statement`."""
    if dialect == "sqlite":
        # As bytes, since not all text need be UTF-8.
        return (
            f"{SQLITE_FUNCTION}({fingerprint}, {model}, {dimensions}, CAST({content} AS BLOB), "
            f"CAST({embedding} AS BLOB))"
        )
    return (
        f"sha256(convert_to(concat_ws(chr(10), {fingerprint}, {model}, {dimensions}, {content}), 'UTF8') "
        f"|| coalesce({{pgvector}}vector_send({embedding}), ''))"
    )


def of_row(dialect: str, alias: str = "") -> str:
    """The seal that a row ``alias`` of the search table would have now."""
    return expression(dialect, *(f"{alias}{name}" for name in VALUES))


def ours(dialect: str, columns: Collection[str], alias: str = "") -> str:
    """The condition, true or not true, that nobody has written a row since kdb-fast did.

    Args:
        columns: Those of the search table: without triggers there is no column for a seal.
        alias: What the row is called, with a dot.
    """
    since = f"{alias}kdb_fast_at = {alias}{{updated_at}}"
    return f"({since} OR {alias}{COLUMN} = {of_row(dialect, alias)})" if COLUMN in columns else since


def register(connection: sqlite3.Connection) -> None:
    """Make the function of :func:`expression` known to an SQLite connection."""
    connection.create_function(SQLITE_FUNCTION, 5, _seal, deterministic=True)


def _seal(
    fingerprint: str | None, model: str | None, dimensions: int | None, content: bytes | None, embedding: bytes | None
) -> bytes:
    digest = hashlib.sha256(f"{fingerprint}\n{model}\n{dimensions}\n".encode("utf-8", "surrogatepass"))
    digest.update(content or b"")
    digest.update(b"\n")
    digest.update(embedding or b"")
    return digest.digest()


def warnings(table: str, causes: Collection[str], times: int, others: int, *, sealed: bool, remedy: str) -> list[str]:
    """What a person must know of rows of this run that are not stored as they were written.

    Args:
        table: As it is shown.
        causes: Triggers and the like, such as ``trigger touch``.
        times: Rows whose time was changed.
        others: Rows whose text or vector was changed.
        sealed: Whether the table has the column for seals.
        remedy: How a trigger leaves a time alone, or what the owner must run where there is no such column.
    """
    by = ", ".join(sorted(causes)[:5])
    found = []
    if times and sealed:
        found.append(
            f"updated_at of {table} does not stay as it is written ({by}). Rows are told by their text and vector "
            f"instead, which costs time. {remedy}"
        )
    elif times:
        found.append(
            f"updated_at of {table} does not stay as it is written ({by}), so that every record is embedded again in "
            f"every run. {remedy}"
        )
    if others:
        found.append(
            f"{number_of(others, 'row')} of {table} {'does' if others == 1 else 'do'} not hold the text and vector "
            f"that were written ({by}, or another program): their records are embedded again by the next run."
        )
    return found
