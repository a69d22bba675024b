"""Which rows of a table need nothing, told by the database itself: they need not be sent to be told unchanged."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ..records import MAX_CONTENT_BYTES
from .column_target import text_bytes

SAME_TEXT = "kdb_fast_same_text"
SAME_VECTOR = "kdb_fast_same_vector"
"""Functions of an SQLite connection: whether a value, as bytes, has the noted hash."""


class KnownRows(NamedTuple):
    """SQL for a query that reads the texts of a table as ``t``, with per cent signs doubled as parameters want it.

    Attributes:
        join: To be written after the table: what is known of each of its rows, if anything is.
        ours: Whether a row has a vector of the run's fingerprint that is the one that was noted; or NULL.
        text_hash: The noted SHA-256 of its text, with which it needs nothing; or NULL.
    """

    join: str
    ours: str
    text_hash: str

    def unchanged(self, text: str, dialect: str) -> str:
        """Whether a row needs nothing, true or false.

        Args:
            text: SQL expression of its text.
        """
        if dialect == "postgresql":
            return f"coalesce({self.ours} AND {self.text_hash} = sha256({text_bytes(text)}), false)"
        return f"ifnull({self.ours} AND {SAME_TEXT}(CAST(({text}) AS BLOB), {self.text_hash}), false)"


def register(connection: sqlite3.Connection) -> None:
    """Make the functions that :class:`KnownRows` uses known to an SQLite connection."""
    for name, hash_of in ((SAME_TEXT, text_hash_of), (SAME_VECTOR, value_hash_of)):
        connection.create_function(name, 2, partial(_is_same, hash_of), deterministic=True)


def _is_same(hash_of: Callable[[bytes | None], bytes | None], value: bytes | None, noted: bytes | None) -> bool:
    return noted is not None and hash_of(value) == noted


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
