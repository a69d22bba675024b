"""SQLite: records that could not be stored, with their reasons."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from ...db.sqlite import moment
from ...db.sqlite_session import transaction
from ...records import Key, Reject, storable_key
from ...tables.target import Target
from .. import rejects as shared


def _statement(template: str) -> str:
    return Target().statement(template).decode().replace("%s", "?")


def write(connection: sqlite3.Connection, run: int, rejects: Sequence[Reject]) -> None:
    """Keep rejected records, within a flush's transaction."""
    connection.executemany(
        _statement(f"INSERT OR REPLACE {shared.INTO_TABLE}"),
        [shared.row_of(reject, run, storable_key) for reject in rejects],
    )


def forget_stored(connection: sqlite3.Connection, run: int, stored: Sequence[Key]) -> None:
    """A record that a run has stored is no longer rejected; what this run itself rejected stays."""
    row = connection.execute("SELECT EXISTS (SELECT 1 FROM kdb_fast_rejects WHERE run <> ?)", (run,)).fetchone()
    if row[0]:
        connection.executemany(
            "DELETE FROM kdb_fast_rejects WHERE entity_name = ? AND record_id = ? AND run <> ?",
            [(*shared.key_columns(key, storable_key), run) for key in stored],
        )


def read(connection: sqlite3.Connection, entity: str | None) -> list[dict[str, Any]]:
    """See :meth:`kdb_fast.stores.base.Store.rejects`."""
    where = "" if entity is None else "WHERE entity_name = %s "
    values = () if entity is None else (storable_key(entity),)
    rows = connection.execute(_statement(shared.READ + where + shared.NEWEST_FIRST), values)
    return [shared.as_dictionary((*row[:6], moment(row[6]), row[7])) for row in rows]


def forget_older(connection: sqlite3.Connection, entities: Sequence[str], run: int) -> int:
    """See :meth:`kdb_fast.stores.base.Store.forget_older_rejects`."""
    return connection.executemany(
        "DELETE FROM kdb_fast_rejects WHERE entity_name = ? AND run < ? AND record_id <> ''",
        [(storable_key(entity), run) for entity in entities],
    ).rowcount


def forget_of_input(connection: sqlite3.Connection, entity: str, name: str, run: int) -> int:
    """See :meth:`kdb_fast.stores.base.Store.forget_rejects_of_input`."""
    entity = storable_key(entity)
    receipts = connection.execute(_statement(shared.RECEIPTS), (run, entity)).fetchall()
    return connection.executemany(
        "DELETE FROM kdb_fast_rejects WHERE entity_name = ? AND run = ?",
        [(entity, number) for number in shared.runs_of_input(receipts, name)],
    ).rowcount


def clear(connection: sqlite3.Connection, keys: Iterable[Key] | None) -> int:
    """See :meth:`kdb_fast.stores.base.Store.clear_rejects`."""
    with transaction(connection):
        if keys is None:
            return connection.execute("DELETE FROM kdb_fast_rejects").rowcount
        return connection.executemany(
            "DELETE FROM kdb_fast_rejects WHERE entity_name = ? AND record_id = ?",
            [shared.key_columns(key, storable_key) for key in keys],
        ).rowcount
