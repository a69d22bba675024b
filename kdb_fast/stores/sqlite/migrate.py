"""SQLite: bring our own tables up to date, a migration at a time (see :mod:`kdb_fast.tables.migrations`)."""

from __future__ import annotations

import sqlite3

from ...faults import fault
from ...tables import migrations
from ...tables.migrations import Migration
from ...tables.migrations.step import Rewrite
from ...tables.target import MIGRATIONS, OWN, VECTORS, Target
from .check import check_kind, columns


def _statement(template: str) -> str:
    return Target().statement(template).decode().replace("%s", "?")


def find_next(connection: sqlite3.Connection) -> Migration | None:
    """The migration that is to be applied next; None where the tables are up to date.

    Raises:
        SchemaError: A newer kdb-fast has changed the tables.
    """
    noted = connection.execute(_statement(migrations.NOTED)).fetchall() if check_kind(connection, MIGRATIONS) else []
    return migrations.find_next(noted, MIGRATIONS)


def apply(connection: sqlite3.Connection, migration: Migration) -> None:
    """Apply a migration and note it down, within a write transaction.

    Raises:
        SchemaError: A table that it would make belongs to another program.
    """
    for step in (migrations.NOTEBOOK["sqlite"], *migration.sqlite):
        if isinstance(step, Rewrite):
            changed = map(step.change, connection.execute(_statement(step.select)).fetchall())
            connection.executemany(_statement(step.statement), changed)
            continue
        made = migrations.created(step)
        if made is not None and check_kind(connection, made[0]):
            have = columns(connection, made[0])
            if missing := [name for name in made[1] if name not in have]:
                raise migrations.another_programs(made[0], missing)
            continue
        connection.execute(_statement(step))
    connection.execute(_statement(migrations.NOTE), migrations.note(migration))
    fault("store.migrate")


def check_there(connection: sqlite3.Connection) -> None:
    """Raise SchemaError where one of our own tables was made and is not there any more."""
    tables = (*OWN, VECTORS)
    missing = [table for table in tables if not check_kind(connection, table)]
    if missing:
        raise migrations.lost(missing, [table for table in tables if table not in missing])
