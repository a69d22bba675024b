"""The state of the index in true numbers.

Every number is counted by SQL at the time of the call. A table or column that does not exist yet counts as
empty, so the status of a fresh database, or of one that only KameleonDB has written, is right as well.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ..catalog.definitions import Entity, load_entities
from ..catalog.records import EARLIEST, LATEST, LIVES, counted, has_text, owned
from ..db.pg_characters import Characters
from ..stores.base import EntityStatus
from ..stores.past_runs import newest_runs, rejected_keys
from ..tables import seal
from ..tables.kdb_search import entity_and_id
from ..tables.reading import rows_of
from ..tables.target import Params, Rows, Target, columns_of, find_target


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
    present = columns_of(rows, target, [target.index.name])
    any_precision = fingerprint is not None
    if fingerprint is None:
        newest = newest_runs(rows, target, "fingerprint", 1)
        fingerprint = newest[0][0] if newest else None
    index = _index_counts(rows, target, present.get(target.index.name), fingerprint, vectors, any_precision)
    rejected: defaultdict[str, list[str]] = defaultdict(list)
    for entity_name, record_id in map(entity_and_id, rejected_keys(rows, target)):
        rejected[entity_name].append(record_id)
    defined = {entity.name: entity for entity in load_entities(rows, target) if entity.active}
    result = []
    for name in sorted(defined.keys() | index.keys()):
        indexed, stale, last_updated = index.get(name, (0, 0, None))
        pending = None
        if name in defined:
            left_out = _of_records(connection, target, rejected[name]) if vectors else []
            pending = _pending(rows, target, present.get(target.index.name), defined[name], left_out, vectors)
        result.append(EntityStatus(name, indexed, pending, stale, len(rejected[name]), last_updated))
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


def _of_records(connection: Any, target: Target, record_ids: Sequence[str]) -> list[str]:
    """Those of the ids of rejects that a record can have, each once: others end a statement of PostgreSQL."""
    known = {record_id for record_id in record_ids if record_id and "\0" not in record_id and _is_text(record_id)}
    characters = Characters.of(connection) if target.dialect == "postgresql" and known else None
    missing = characters.missing(connection, known) if characters is not None else frozenset()
    return sorted(record_id for record_id in known if missing.isdisjoint(record_id))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pending(
    rows: Rows,
    target: Target,
    columns: frozenset[str] | None,
    entity: Entity,
    rejected: Sequence[str],
    vectors: bool,
) -> int:
    """Live records with text that the index does not have as they are.

    Args:
        columns: Those of the search table; None where there is none.
        rejected: Ids of records that are not counted.
    """
    total = 0
    for place in entity.places:
        params = Params(target.dialect)
        text = has_text(entity, place, params)
        if not text:
            continue
        conditions = [f"{LIVES} AND ({text}){owned(place, params)}{counted(place, target)}"]
        join = ""
        if columns is not None:
            key = f"s.entity_name = {params(entity.name)} AND s.record_id = r.id"
            join = f"LEFT JOIN {target.table(target.index.name)} s ON {key}"
            missing = "s.embedding" if vectors else "s.id"
            conditions.append(f"({missing} IS NULL OR {_newer(columns, target)})")
        if rejected:
            if target.dialect == "postgresql":
                conditions.append(f"r.id NOT IN (SELECT unnest({params(rejected)}::text[]))")
            else:
                conditions.append(f"r.id NOT IN (SELECT value FROM json_each({params(json.dumps(rejected))}))")  # noqa: S608
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
