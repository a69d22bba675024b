"""Names of what keyword search of a table of any kind is made with, on SQLite."""

from __future__ import annotations

NUMBER = "kdb_fast_number"
"""Column by which a row is told in the FTS5 table."""


def full_text_of(table: str) -> str:
    """Name of the FTS5 table over the texts of a table of ours."""
    return f"{table}_fts"
