"""Which rows of a table need nothing, told by the database itself: they need not be sent to be told unchanged."""

from __future__ import annotations

import hashlib
import sqlite3
from typing import NamedTuple

from ..records import MAX_CONTENT_BYTES

SQLITE_FUNCTION = "kdb_fast_is_known"


class KnownRows(NamedTuple):
    """SQL for a query that reads the texts of a table as ``t``, with per cent signs doubled as parameters want it.

    Attributes:
        join: To be written after the table: what is known of each of its rows, if anything is.
        unchanged: Whether a row needs nothing: text and vector are those that were noted, and the fingerprint is the
            run's. True or false.
    """

    join: str
    unchanged: str


def register(connection: sqlite3.Connection) -> None:
    """Make the function that :class:`KnownRows` uses known to an SQLite connection."""
    connection.create_function(SQLITE_FUNCTION, 4, _is_known, deterministic=True)


def _is_known(text: bytes | None, text_hash: bytes | None, vector: bytes | None, vector_hash: bytes | None) -> bool:
    return text_hash is not None and text_hash_of(text) == text_hash and value_hash_of(vector) == vector_hash


def text_hash_of(text: bytes | None) -> bytes | None:
    """SHA-256 of a text in UTF-8 as :func:`~kdb_fast.records.cut_content` leaves it; None for NULL."""
    if text is None:
        return None
    if len(text) > MAX_CONTENT_BYTES:
        text = text[:MAX_CONTENT_BYTES].decode("utf-8", "ignore").encode()
    return hashlib.sha256(text).digest()


def value_hash_of(value: bytes | str | None) -> bytes | None:
    """SHA-256 of a vector as SQLite has it; None for NULL."""
    if value is None:
        return None
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).digest()
