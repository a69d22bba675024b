"""The state of the index in true numbers.

Every number is counted by SQL at the time of the call. A table or column that does not exist yet counts as
empty, so the status of a fresh database, or of one that only KameleonDB has written, is right as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ..catalog.definitions import Entity, load_entities
from ..catalog.records import EARLIEST, LATEST, LIVES, counted, has_text, owned
from ..stores.base import EntityStatus
from ..tables import seal
from ..tables.reading import rows_of
from ..tables.target import REJECTS, RUNS, Params, Rows, Target, columns_of, find_target


def statuses(connection: Any, dialect: str, fingerprint: str | None, *, vectors: bool = True) -> list[EntityStatus]:
    """The state of every active entity of KameleonDB and of every other entity in the index, by name.

    Args:
        connection: Open psycopg or sqlite3 connection; it is only read.
        dialect: ``postgresql`` or ``sqlite``.
        fingerprint: Fingerprint of the current model, in whatever precision; None means exactly that of the newest run.
        vectors: False for an index by keyword alone: a row without a vector is indexed as well.

    Returns:
        For each entity: ``indexed`` rows with a vector; ``stale`` ones among them, made by another model or
        rewritten by another program; ``pending`` live records with text that have no vector or were changed
        since it was made, without the rejected ones (None where KameleonDB does not define the entity);
        ``rejected`` rows of the rejects table; ``last_updated`` as an aware datetime.

    Raises:
        SchemaError: No right to read a table.
        DatabaseError: The database cannot answer.
    """
    rows = rows_of(connection, dialect)
    target = find_target(rows, dialect)
    if dialect == "sqlite":
        seal.register(connection)
    present = columns_of(rows, target, (target.index.name, RUNS, REJECTS))
    any_precision = fingerprint is not None
    if fingerprint is None and RUNS in present:
        newest = rows(f"SELECT fingerprint FROM {target.table(RUNS)} ORDER BY run DESC LIMIT 1", {})  # noqa: S608
        fingerprint = newest[0][0] if newest else None
    index = _index_counts(rows, target, present.get(target.index.name), fingerprint, vectors, any_precision)
    rejected: dict[str, int] = {}
    if REJECTS in present:
        rejected = dict(rows(f"SELECT entity_name, count(*) FROM {target.table(REJECTS)} GROUP BY entity_name", {}))  # noqa: S608
    defined = {entity.name: entity for entity in load_entities(rows, target) if entity.active}
    result = []
    for name in sorted(defined.keys() | index.keys()):
        indexed, stale, last_updated = index.get(name, (0, 0, None))
        pending = _pending(rows, target, present, defined[name], vectors) if name in defined else None
        result.append(EntityStatus(name, indexed, pending, stale, rejected.get(name, 0), last_updated))
    return result


def _index_counts(
    rows: Rows,
    target: Target,
    columns: frozenset[str] | None,
    fingerprint: str | None,
    vectors: bool,
    any_precision: bool,
) -> dict[str, tuple[int, int, datetime | None]]:
    if columns is None:
        return {}
    dialect = target.dialect
    params = Params(dialect)
    stale = "true"
    if fingerprint is not None and {"kdb_fast_fingerprint", "kdb_fast_at"} <= columns:
        differs = "IS DISTINCT FROM" if dialect == "postgresql" else "IS NOT"
        other = f"kdb_fast_fingerprint {differs} {params(fingerprint)}"
        if any_precision:
            other += f" AND coalesce(kdb_fast_fingerprint, '') NOT LIKE {params(fingerprint + '-%')}"
        stale = f"({other} OR NOT coalesce({_ours(target, columns)}, false))"
    changed = "coalesce(updated_at, created_at)"
    # SQLite returns the bare column of the row that has the maximum; julianday() reads every form of timestamp.
    last = f"{changed}, max(julianday({changed}))"
    if dialect == "postgresql":
        last = f"max(CASE WHEN {changed} BETWEEN {EARLIEST} AND {LATEST} THEN {changed} END)"
    counts = {}
    for entity, indexed, stale_rows, moment, *_ in rows(
        f"SELECT entity_name, count({'embedding' if vectors else '*'}), "  # noqa: S608
        f"sum(CASE WHEN embedding IS NOT NULL AND {stale} THEN 1 ELSE 0 END), {last} "
        f"FROM {target.table(target.index.name)} GROUP BY entity_name",
        params.values,
    ):
        counts[entity] = (int(indexed), int(stale_rows), _aware(moment))
    return counts


def _aware(moment: object) -> datetime | None:
    """A timestamp of either dialect with a time zone; a text without one is UTC. None if it cannot be read."""
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment.strip())
        except ValueError:
            return None
    if not isinstance(moment, datetime):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _pending(rows: Rows, target: Target, present: Mapping[str, frozenset[str]], entity: Entity, vectors: bool) -> int:
    total = 0
    for place in entity.places:
        params = Params(target.dialect)
        text = has_text(entity, place, params)
        if not text:
            continue
        conditions = [f"{LIVES} AND ({text}){owned(place, params)}{counted(place, target)}"]
        join = ""
        if target.index.name in present:
            key = f"s.entity_name = {params(entity.name)} AND s.record_id = r.id"
            join = f"LEFT JOIN {target.table(target.index.name)} s ON {key}"
            missing = "s.embedding" if vectors else "s.id"
            conditions.append(f"({missing} IS NULL OR {_newer(present[target.index.name], target)})")
        if REJECTS in present and vectors:
            conditions.append(
                f"NOT EXISTS (SELECT 1 FROM {target.table(REJECTS)} x "  # noqa: S608
                f"WHERE x.entity_name = {params(entity.name)} AND x.record_id = r.id)"
            )
        statement = f"SELECT count(*) FROM {target.table(place.table)} r {join} WHERE {' AND '.join(conditions)}"  # noqa: S608
        total += int(rows(statement, params.values)[0][0])
    return total


def _ours(target: Target, columns: frozenset[str], alias: str = "") -> str:
    """The condition that nobody has written a row of the index since kdb-fast did."""
    condition = seal.ours(target.dialect, columns, alias)
    return target.text(condition)


def _newer(columns: frozenset[str], target: Target) -> str:
    """The condition that a record ``r`` was changed after its row ``s`` of the index was made."""
    seen = "coalesce(s.updated_at, s.created_at)"
    if {"kdb_fast_at", "kdb_fast_source_at"} <= columns:
        # Once another program has rewritten the row, its own time of writing counts.
        ours = f"s.kdb_fast_source_at IS NOT NULL AND {_ours(target, columns, 's.')}"
        seen = f"CASE WHEN {ours} THEN s.kdb_fast_source_at ELSE {seen} END"
    if target.dialect == "postgresql":
        return f"(r.updated_at > {seen} AND r.updated_at < {LATEST})"
    # Reads every form of timestamp: with a T or a space, with or without fraction and time zone.
    return f"julianday(r.updated_at) > julianday({seen})"
