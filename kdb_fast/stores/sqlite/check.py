"""SQLite: what there is of a name, and its columns."""

from __future__ import annotations

import sqlite3

from ...db.sqlite import quoted
from ...errors import SchemaError

GENERATED = (2, 3)
"""Of ``hidden`` in ``PRAGMA table_xinfo``: virtual and stored generated columns."""


def columns(connection: sqlite3.Connection, table: str) -> dict[str, tuple[bool, bool]]:
    """Name of each column → (must not be null, has a default or is generated)."""
    rows = connection.execute(f"PRAGMA table_xinfo({quoted(table)})")
    return {
        str(name).lower(): (bool(not_null), default is not None or hidden in GENERATED)
        for _, name, _, not_null, default, _, hidden in rows
    }


def check_kind(connection: sqlite3.Connection, name: str) -> bool:
    """Whether there is an ordinary table of this name, in whatever case. Raises SchemaError for anything else."""
    row = connection.execute(
        "SELECT type, sql FROM sqlite_master WHERE name = ? COLLATE NOCASE AND type IN ('table', 'view', 'index')",
        (name,),
    ).fetchone()
    if row is None:
        return False
    kind = "virtual table" if str(row[1]).upper().startswith("CREATE VIRTUAL") else row[0]
    if kind != "table":
        raise SchemaError(
            f"{name} is {'an' if kind == 'index' else 'a'} {kind}; expected a table.",
            remedy="Rename it, or use another file for this index.",
        )
    return True
