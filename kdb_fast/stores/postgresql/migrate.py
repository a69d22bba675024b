"""PostgreSQL: bring our own tables up to date, a migration at a time (see :mod:`kdb_fast.tables.migrations`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...faults import fault
from ...tables import migrations
from ...tables.hidden_rows import check_unfiltered
from ...tables.migrations import Migration
from ...tables.migrations.step import Rewrite
from ...tables.target import MIGRATIONS, Target, rows_on
from .check import check_kind, check_rights, column_names, exists

if TYPE_CHECKING:
    import psycopg


def find_next(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> Migration | None:
    """The migration that is to be applied next; None where the tables are up to date.

    Raises:
        SchemaError: A newer kdb-fast has changed the tables, or what was applied cannot be read.
    """
    noted: list[tuple[int, str]] = []
    if exists(cursor, target, MIGRATIONS):
        _check_notebook(cursor, target)
        noted = [(row[0], row[1]) for row in cursor.execute(target.statement(migrations.NOTED))]
    return migrations.find_next(noted, target.shown(MIGRATIONS))


def _check_notebook(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> None:
    check_kind(cursor, target, MIGRATIONS)
    row = cursor.execute("SELECT has_table_privilege(%s, 'SELECT')", (target.regclass(MIGRATIONS),)).fetchone()
    if row == (False,):
        check_rights(cursor, target, (target.index.name,))
    check_unfiltered(rows_on(cursor, target.dialect), target, (MIGRATIONS,), "a run must see every row")


def apply(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, migration: Migration) -> None:
    """Apply a migration and note it down, within a transaction that holds the lock for it.

    Raises:
        SchemaError: A table that it would make belongs to another program.
    """
    for step in (migrations.NOTEBOOK["postgresql"], *migration.postgresql):
        if isinstance(step, Rewrite):
            changed = map(step.change, cursor.execute(target.statement(step.select)).fetchall())
            cursor.executemany(target.statement(step.statement), list(changed))
            continue
        made = migrations.created(step)
        if made is not None and exists(cursor, target, made[0]):
            check_kind(cursor, target, made[0])
            have = column_names(cursor, target, made[0])
            if missing := [name for name in made[1] if name not in have]:
                raise migrations.another_programs(target.shown(made[0]), missing)
            continue
        cursor.execute(target.statement(step))
    cursor.execute(target.statement(migrations.NOTE), migrations.note(migration))
    fault("store.migrate")
