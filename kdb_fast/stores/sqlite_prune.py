"""SQLite: remove rows of the index, with their text and vector."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from ..faults import fault
from ..records import storable_key
from ..target import ENTITIES, RECORDS
from .base import HiddenRowsError
from .sqlite_base import batches, quoted, select_in, table_exists
from .sqlite_fts import FullText

PRUNE_KEYS = 5_000
"""Keys looked at in one step: a step that removes rows holds the write lock for some ten milliseconds."""


def prune(connection: sqlite3.Connection, full_text: FullText, entity: str) -> int:
    """See :meth:`kdb_fast.stores.base.Store.prune`."""
    if not table_exists(connection, "kdb_entity_definitions") or _definition(connection, entity) is None:
        return 0
    _check_whole(connection, entity)
    removed, after = 0, ""
    while True:
        fault("store.prune")
        (last,) = connection.execute(
            "SELECT max(record_id) FROM (SELECT record_id FROM kdb_search WHERE entity_name = ? AND record_id > ? "
            "ORDER BY record_id LIMIT ?)",
            (entity, after, PRUNE_KEYS),
        ).fetchone()
        if last is None:
            break
        # Most steps find nothing and need no lock. Those that do look again under the lock: the entity may
        # have moved to its own table meanwhile, and then every record seems gone from the old one.
        if _dead(connection, entity, after, last):
            with full_text.transaction():
                removed += delete_records(connection, full_text, entity, _dead(connection, entity, after, last))
        after = last
    _prune_full_text(connection, full_text, entity)
    return removed


def _check_whole(connection: sqlite3.Connection, entity: str) -> None:
    """Raises HiddenRowsError where records are read through a view, which may leave some out."""
    definition = _definition(connection, entity)
    tables = [ENTITIES, RECORDS, *([definition[2]] if definition is not None and definition[2] else [])]
    query = "SELECT name FROM sqlite_master WHERE type = 'view' AND name IN (…)"
    for (name,) in select_in(connection, query, tables):
        raise HiddenRowsError(f"{storable_key(name)} is a view, which may leave records out")


def _definition(connection: sqlite3.Connection, entity: str) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = connection.execute(
        "SELECT id, storage_mode, dedicated_table_name FROM kdb_entity_definitions WHERE name = ?", (entity,)
    ).fetchone()
    return row


def _dead(connection: sqlite3.Connection, entity: str, after: str, last: str) -> list[str]:
    """Record ids of the index, greater than ``after`` up to ``last``, that have no live record."""
    definition = _definition(connection, entity)
    if definition is None:
        return []
    entity_id, mode, dedicated = definition
    shared = "SELECT 1 FROM kdb_records r WHERE r.id = s.record_id AND r.entity_id = :entity_id AND NOT r.is_deleted"
    live = f"EXISTS ({shared})"
    if mode == "dedicated" and dedicated:
        # KameleonDB 0.2 goes on inserting into the shared table after an entity was materialised.
        own = f"SELECT 1 FROM {quoted(dedicated)} r WHERE r.id = s.record_id"  # noqa: S608 - quoted
        live = f"(EXISTS ({own} AND NOT r.is_deleted) OR ({live} AND NOT EXISTS ({own})))"
    rows = connection.execute(
        "SELECT s.record_id FROM kdb_search s WHERE s.entity_name = :entity AND s.record_id > :after "  # noqa: S608 - quoted
        f"AND s.record_id <= :last AND NOT {live}",
        {"entity": entity, "entity_id": entity_id, "after": after, "last": last},
    )
    return [record_id for (record_id,) in rows]


def _prune_full_text(connection: sqlite3.Connection, full_text: FullText, entity: str) -> None:
    """Remove full-text rows of an entity that no row of the index belongs to."""
    for rowids in batches(full_text.orphans(entity)):
        with full_text.transaction():
            full_text.remove(full_text.orphans(entity, rowids))


def delete_records(connection: sqlite3.Connection, full_text: FullText, entity: str, record_ids: Sequence[str]) -> int:
    """Within a transaction: remove these rows of the index; returns how many there were."""
    removed = 0
    for batch in batches(record_ids):
        query = "SELECT rowid, record_id FROM kdb_search WHERE entity_name = ? AND record_id IN (…)"
        rows = list(select_in(connection, query, batch, entity))
        found, _ = full_text.locate([(entity, record_id, rowid) for rowid, record_id in rows])
        full_text.remove(list(found.values()))
        rowids = [(rowid,) for rowid, _ in rows]
        connection.executemany("DELETE FROM kdb_fast_vectors WHERE search_rowid = ?", rowids)
        connection.executemany("DELETE FROM kdb_search WHERE rowid = ?", rowids)
        removed += len(rows)
    return removed
