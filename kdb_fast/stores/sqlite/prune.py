"""SQLite: remove rows of the index, with their text and vector."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from ...db.sqlite import batches
from ...faults import fault
from ...records import Key
from ...tables.target import LiveRows, Params, Target, rows_on
from .full_text import FullText
from .keys import select_keys

PRUNE_KEYS = 5_000
"""Keys looked at in one step: a step that removes rows holds the write lock for some ten milliseconds."""


def prune(connection: sqlite3.Connection, target: Target, full_text: FullText, entity: str, live_rows: LiveRows) -> int:
    """See :meth:`kdb_fast.stores.base.Store.prune`."""

    def dead(after: str, last: str) -> list[Key]:
        """Keys of the index, of record ids greater than ``after`` up to ``last``, that have no live record."""
        rows, params = rows_on(connection, "sqlite"), Params("sqlite")
        live = live_rows(rows, target, entity, params)
        if live is None:
            return []
        found = rows(
            target.text(
                "SELECT s.{member} FROM {index} s WHERE s.{group} = {entity} "
                "AND s.{member} > {after} AND s.{member} <= {last} AND NOT {live}",
                entity=params(entity),
                after=params(after),
                last=params(last),
                live=live,
            ),
            params.values,
        )
        return [(entity, record_id) for (record_id,) in found]

    if live_rows(rows_on(connection, "sqlite"), target, entity, Params("sqlite")) is None:
        return 0
    removed, after = 0, ""
    while True:
        fault("store.prune")
        (last,) = connection.execute(
            target.text(
                "SELECT max({member}) FROM (SELECT {member} FROM {index} WHERE {group} = ? AND {member} > ? "
                "ORDER BY {member} LIMIT ?)"
            ),
            (entity, after, PRUNE_KEYS),
        ).fetchone()
        if last is None:
            break
        # Most steps find nothing and need no lock. Those that do look again under the lock: the entity may
        # have moved to its own table meanwhile, and then every record seems gone from the old one.
        if dead(after, last):
            with full_text.transaction():
                removed += delete_records(connection, target, full_text, dead(after, last))
        after = last
    _prune_full_text(connection, full_text, entity)
    return removed


def _prune_full_text(connection: sqlite3.Connection, full_text: FullText, entity: str) -> None:
    """Remove full-text rows of an entity that no row of the index belongs to."""
    for rowids in batches(full_text.orphans(entity)):
        with full_text.transaction():
            full_text.remove(full_text.orphans(entity, rowids))


def delete_records(connection: sqlite3.Connection, target: Target, full_text: FullText, keys: Sequence[Key]) -> int:
    """Within a transaction: remove these rows of the index; returns how many there were."""
    removed = 0
    for batch in batches(keys):
        rows = list(select_keys(connection, target, "t.rowid", batch))
        found, _ = full_text.locate(rows)
        full_text.remove(list(found.values()))
        rowids = [(rowid,) for _, rowid in rows]
        connection.executemany("DELETE FROM kdb_fast_vectors WHERE search_rowid = ?", rowids)
        connection.executemany(target.text("DELETE FROM {index} WHERE rowid = ?"), rowids)
        removed += len(rows)
    return removed
