"""Our own tables, made and changed by migrations in their order: one file each, for both databases.

Each migration runs once, in a transaction of its own that also notes it down in ``kdb_fast_migrations``, in the schema
of the index; what is noted there is the version of the tables. A migration that has landed is never changed. Statements
are templates for :meth:`kdb_fast.tables.target.Target.statement`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ... import __version__
from ...errors import SchemaError
from . import m0001_first_tables, m0002_per_target, m0003_targets
from .step import Step


class Migration(NamedTuple):
    """A change of our own tables.

    Attributes:
        number: Its place, from 1.
        name: What it is about.
        postgresql: Its steps.
        sqlite: Its steps.
    """

    number: int
    name: str
    postgresql: tuple[Step, ...]
    sqlite: tuple[Step, ...]


MIGRATIONS = (
    Migration(1, "first tables", m0001_first_tables.POSTGRESQL, m0001_first_tables.SQLITE),
    Migration(2, "per target", m0002_per_target.POSTGRESQL, m0002_per_target.SQLITE),
    Migration(3, "targets", m0003_targets.POSTGRESQL, m0003_targets.SQLITE),
)

NOTEBOOK = {
    "postgresql": """
CREATE TABLE IF NOT EXISTS {kdb_fast_migrations} (
  number integer PRIMARY KEY,
  name text NOT NULL,
  applied_at timestamptz NOT NULL DEFAULT now(),
  kdb_fast text NOT NULL
)
""",
    "sqlite": """
CREATE TABLE IF NOT EXISTS {kdb_fast_migrations} (
  number INTEGER PRIMARY KEY,
  name TEXT NOT NULL,
  applied_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  kdb_fast TEXT NOT NULL
)
""",
}
"""The table of what was applied: when, and by which version of kdb-fast."""

NOTED = "SELECT number, kdb_fast FROM {kdb_fast_migrations} ORDER BY number"

NOTE = "INSERT INTO {kdb_fast_migrations} (number, name, kdb_fast) VALUES (%s, %s, %s)"
"""What :func:`note` gives."""


def note(migration: Migration) -> tuple[int, str, str]:
    """The row of a migration that is applied now."""
    return migration.number, migration.name, __version__


def find_next(noted: Sequence[tuple[int, str]], shown: str) -> Migration | None:
    """The migration that is to be applied next; None where the tables are up to date.

    Args:
        noted: Rows of ``NOTED``; none where there is no such table.
        shown: That table, for a message.

    Raises:
        SchemaError: A newer kdb-fast has changed the tables.
    """
    version, by = noted[-1] if noted else (0, "")
    if version > len(MIGRATIONS):
        raise SchemaError(
            f"{shown} says that kdb-fast's tables have version {version}, made by kdb-fast {by}; this is kdb-fast "
            f"{__version__}, which expects version {len(MIGRATIONS)}.",
            remedy=f"Use kdb-fast {by} or newer for this index. Nothing was written.",
        )
    return MIGRATIONS[version] if version < len(MIGRATIONS) else None


def created(statement: str) -> tuple[str, list[str]] | None:
    """Table and columns of a CREATE TABLE IF NOT EXISTS; None for another statement."""
    found = re.search(r"CREATE TABLE IF NOT EXISTS \{(\w+)\}", statement)
    return (found[1], re.findall(r"[(,]\s*([a-z_]+) [A-Za-z]", statement)) if found else None


def another_programs(shown: str, missing: Sequence[str]) -> SchemaError:
    """The error for a table that has one of our names and lacks columns of ours."""
    return SchemaError(
        f"The table {shown} has no column {', '.join(missing)}; expected kdb-fast's own table.",
        remedy=f"Is it another program's? ALTER TABLE {shown} RENAME TO …; then it is made anew.",
    )


def lost(missing: Sequence[str], others: Sequence[str]) -> SchemaError:
    """The error for tables that were made and are not there any more.

    Args:
        missing: As messages show them.
        others: Our own tables that are left.
    """
    return SchemaError(
        f"{', '.join(missing)} is missing, which kdb-fast has made.",
        remedy=f"Restore it. Or DROP TABLE {', '.join(others)}; then all are made anew: the lists of runs and rejects "
        "are lost, no text is embedded again.",
    )
