"""The statements that read records of one table, for both dialects.

A value is always a parameter; a name comes from KameleonDB's own tables and is quoted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..target import Dialect, Target, identifier


@dataclass(frozen=True)
class FieldDefinition:
    """One active field: ``name`` is what users see, ``column_name`` where it is stored (a rename keeps it)."""

    name: str
    column_name: str
    type: str


@dataclass(frozen=True)
class Place:
    """A table that holds records of an entity.

    Attributes:
        table: Its name.
        entity_id: The entity's id where the table is shared by all entities, else None.
        without: A table whose ids do not count here.
        columns: Columns of a dedicated table; None where the fields are in one JSON column ``data``.
    """

    table: str
    entity_id: str | None = None
    without: str | None = None
    columns: frozenset[str] | None = None


def stored_fields(place: Place, fields: Sequence[FieldDefinition]) -> list[FieldDefinition]:
    """The fields that this place can hold: one added after materialising has no column."""
    return [field for field in fields if place.columns is None or field.column_name in place.columns]


def rows_query(
    place: Place, target: Target, fields: Sequence[FieldDefinition], record_ids: Sequence[str]
) -> tuple[Any, tuple[Any, ...]]:
    """Query for live records by id, as (query, parameters), in the order of their ids.

    Columns: id, updated_at, then the fields' columns, or ``data`` as JSON text in a shared table.
    """
    dialect = target.dialect
    if place.columns is not None:
        values = [identifier(field.column_name, dialect) for field in fields]
    else:
        values = ["data::text" if dialect == "postgresql" else "data"]
    changed, ids = "updated_at", "id IN (SELECT value FROM json_each(?))"
    if dialect == "postgresql":
        # psycopg cannot load a year beyond 9999 or 'infinity': one such row would fail the whole page.
        changed = "CASE WHEN updated_at BETWEEN '1900-01-01' AND '9000-01-01' THEN updated_at AT TIME ZONE 'UTC' END"
        ids = "id = ANY(%s::text[])"
    where, parameters = _where(place, dialect, by_primary_key=True)
    query = f"SELECT {', '.join(['id', changed, *values])} FROM {target.table(place.table)} WHERE {ids} AND {where}"  # noqa: S608
    return encoded(f"{query} ORDER BY id", dialect), (_id_list(record_ids, dialect), *parameters)


def ids_query(
    place: Place, target: Target, after: str | None, rows: int, *, by_primary_key: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """Query for the next ``rows`` ids of live records after ``after``, as (query, parameters).

    Args:
        by_primary_key: On SQLite, walk the primary key instead of the index on the entity.
    """
    dialect, table = target.dialect, target.table(place.table)
    mark = "%s" if dialect == "postgresql" else "?"
    where, parameters = _where(place, dialect, by_primary_key=by_primary_key)
    if after is not None:
        where += f" AND id > {mark}"
        parameters += (after,)
    if place.without is not None:
        where += f" AND NOT EXISTS (SELECT 1 FROM {target.table(place.without)} AS d WHERE d.id = {table}.id)"  # noqa: S608
    query = f"SELECT id FROM {table} WHERE {where} ORDER BY id LIMIT {mark}"  # noqa: S608
    return encoded(query, dialect), (*parameters, rows)


def count_query(place: Place, target: Target) -> tuple[Any, tuple[Any, ...]]:
    """Query for the number of live records, as (query, parameters)."""
    where, parameters = _where(place, target.dialect)
    return encoded(f"SELECT count(*) FROM {target.table(place.table)} WHERE {where}", target.dialect), parameters  # noqa: S608


def _where(place: Place, dialect: Dialect, *, by_primary_key: bool = False) -> tuple[str, tuple[Any, ...]]:
    if dialect == "postgresql":
        live, owner = "NOT is_deleted", "entity_id = %s"
    else:
        # A unary plus keeps SQLite from using the index on the column.
        plus = "+" if by_primary_key else ""
        live, owner = f"{plus}is_deleted = 0", f"{plus}entity_id = ?"
    return (live, ()) if place.entity_id is None else (f"{owner} AND {live}", (place.entity_id,))


def encoded(query: str, dialect: Dialect) -> Any:
    """A query as the driver of this dialect takes it."""
    # psycopg takes a query that is not a literal as bytes only.
    return query.encode() if dialect == "postgresql" else query


def _id_list(record_ids: Sequence[str], dialect: Dialect) -> str:
    if dialect == "sqlite":
        return json.dumps(list(record_ids))
    # As an array literal: three times as fast as psycopg's own dumper of lists.
    joined = "\x00".join(record_ids)
    if '"' in joined or "\\" in joined:
        joined = joined.replace("\\", "\\\\").replace('"', '\\"')
    return '{"' + joined.replace("\x00", '","') + '"}' if record_ids else "{}"
