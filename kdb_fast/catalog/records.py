"""Statements about KameleonDB's records, for both dialects: which of them live, and what they hold.

A value is always a parameter; a name comes from KameleonDB's own tables and is quoted. In every condition ``r`` is
the record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ..records import UNSEEN
from ..tables.hidden_rows import check_whole
from ..tables.key import array_literal
from ..tables.target import RECORDS, Dialect, Params, Rows, Target, identifier
from .definitions import ENTITIES, Entity, Field, Place, storage_of

SYSTEM_COLUMNS = frozenset({"id", "created_at", "updated_at", "created_by", "is_deleted"})
"""Columns that every dedicated table has beside those of the fields."""

EARLIEST, LATEST = "'1900-01-01'", "'9000-01-01'"
"""Between these a time of PostgreSQL's is one that Python knows, in every time zone: no infinity, no year 10000."""

LIVES = "NOT r.is_deleted"
"""The condition that a record lives; a soft-deleted one must not be found."""


# -- conditions --------------------------------------------------------------------------------------------


def owned(place: Place, params: Params) -> str:
    """A condition to add: that a record of this place is the entity's."""
    return "" if place.entity_id is None else f" AND r.entity_id = {params(place.entity_id)}"


def counted(place: Place, target: Target, key: str = "r.id") -> str:
    """A condition to add: that the record of this id is not in a place that counts before this one."""
    if place.without is None:
        return ""
    return f" AND NOT EXISTS (SELECT 1 FROM {target.table(place.without)} f WHERE f.id = {key})"  # noqa: S608


def live_rows(rows: Rows, target: Target, entity: str, params: Params) -> str | None:
    """The condition that the record of a row ``s`` of the index lives, as the database has it now.

    Args:
        rows: Runs a statement in the transaction of the one that the condition is for: an entity that moves to a table
            of its own meanwhile must not look empty.
        entity: Name of the entity of these rows.
        params: Parameters of that statement.

    Returns:
        None where KameleonDB has no such entity (any more).

    Raises:
        HiddenRowsError: A record that is not seen may be there all the same.
        SchemaError: The entity's dedicated table does not exist.
    """
    if ENTITIES not in check_whole(rows, target, (ENTITIES, RECORDS)):
        return None
    storage = storage_of(rows, target, key="name", value=entity)
    if storage is None or not storage.active:
        return None
    if storage.dedicated and (storage.table is None or not check_whole(rows, target, (storage.table,))):
        raise storage.missing(target)
    conditions = []
    for place in storage.places(SYSTEM_COLUMNS):  # those of its fields play no part
        live = (
            f"EXISTS (SELECT 1 FROM {target.table(place.table)} r "  # noqa: S608
            f"WHERE r.id = s.record_id{owned(place, params)} AND {LIVES})"
        )
        conditions.append(f"({live}{counted(place, target, 's.record_id')})")
    return f"({' OR '.join(conditions)})"


def has_text(entity: Entity, place: Place, params: Params) -> str:
    """The condition that a record of this place has any text to embed; '' when it never can."""
    texts = []
    for field in place.stored(entity.text_fields):
        if place.columns is not None:
            texts.append(f"CAST(r.{identifier(field.column, params.dialect)} AS text)")
        elif params.dialect == "postgresql":
            texts.append(f"r.data ->> {params(field.column)}::text")
        else:
            texts.append(json_member(field.column, params)[1])
    if params.dialect == "postgresql":
        # A class and not the characters themselves, which the database's encoding may lack.
        return " OR ".join(f"{text} ~ '[^[:space:]]'" for text in texts)
    return " OR ".join(f"trim(coalesce({text}, ''), {params(UNSEEN)}) <> ''" for text in texts)


def json_member(column: str, params: Params) -> tuple[str, str]:
    """SQLite's expressions for the JSON type and the value of a top-level key of ``r.data``.

    A path can hold no quote, and before SQLite 3.45 it never finds a key that ``json.dumps`` wrote with an
    escape (any letter beyond ASCII); such keys are looked up among all keys.
    """
    if column and column.isascii() and column.isprintable() and not set(column) & set('"\\'):
        path = params(f'$."{column}"')
        return f"json_type(r.data, {path})", f"json_extract(r.data, {path})"
    key = params(column)
    member = "(SELECT j.{} FROM json_each(r.data) j WHERE j.key = {})"
    return member.format("type", key), member.format("value", key)


# -- the statements of a reader ----------------------------------------------------------------------------


def rows_query(
    place: Place, target: Target, fields: Sequence[Field], record_ids: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Query for live records by id, as (query, parameters), in the order of their ids.

    Columns: id, updated_at, then the fields' columns, or ``data`` as JSON text in a shared table.
    """
    dialect, params = target.dialect, Params(target.dialect)
    ids = params(_id_list(record_ids, dialect))
    if place.columns is not None:
        values = [f"r.{identifier(field.column, dialect)}" for field in fields]
    else:
        values = ["r.data::text" if dialect == "postgresql" else "r.data"]
    changed, among = "r.updated_at", f"r.id IN (SELECT value FROM json_each({ids}))"  # noqa: S608
    if dialect == "postgresql":
        # psycopg cannot load a year beyond 9999 or 'infinity': one such row would fail the whole page.
        known = f"r.updated_at BETWEEN {EARLIEST} AND {LATEST}"
        changed = f"CASE WHEN {known} THEN r.updated_at AT TIME ZONE 'UTC' END"
        among = f"r.id = ANY({ids}::text[])"
    columns = ", ".join(["r.id", changed, *values])
    where = f"{among} AND {_walked(place, params, by_primary_key=True)}"
    return f"SELECT {columns} FROM {target.table(place.table)} r WHERE {where} ORDER BY r.id", params.values  # noqa: S608


def ids_query(
    place: Place, target: Target, after: str | None, rows: int, *, by_primary_key: bool = False
) -> tuple[str, dict[str, Any]]:
    """Query for the next ``rows`` ids of live records after ``after``, as (query, parameters).

    Args:
        by_primary_key: On SQLite, walk the primary key instead of the index on the entity.
    """
    params = Params(target.dialect)
    where = _walked(place, params, by_primary_key=by_primary_key)
    if after is not None:
        where += f" AND r.id > {params(after)}"
    where += counted(place, target)
    query = f"SELECT r.id FROM {target.table(place.table)} r WHERE {where} ORDER BY r.id LIMIT {params(rows)}"  # noqa: S608
    return query, params.values


def count_query(place: Place, target: Target) -> tuple[str, dict[str, Any]]:
    """Query for the number of live records, as (query, parameters)."""
    params = Params(target.dialect)
    return f"SELECT count(*) FROM {target.table(place.table)} r WHERE {_walked(place, params)}", params.values  # noqa: S608


def _walked(place: Place, params: Params, *, by_primary_key: bool = False) -> str:
    """The condition that a record of this place lives and is the entity's, for a walk through the place."""
    if params.dialect == "postgresql":
        return LIVES + owned(place, params)
    # As KameleonDB's index on (entity_id, is_deleted) has it; a unary plus keeps SQLite from using that.
    plus = "+" if by_primary_key else ""
    owner = "" if place.entity_id is None else f"{plus}r.entity_id = {params(place.entity_id)} AND "
    return f"{owner}{plus}r.is_deleted = 0"


def _id_list(record_ids: Sequence[str], dialect: Dialect) -> str:
    if dialect == "sqlite":
        return json.dumps(list(record_ids))
    return array_literal(record_ids)


# -- a new record ------------------------------------------------------------------------------------------


def new_row(place: Place, columns: Iterable[str], at: Any, created_by: str | None) -> tuple[list[str], tuple[Any, ...]]:
    """The columns of a new record in order, and the values that come after its id and fields.

    Args:
        place: Where it is inserted.
        columns: Those of its fields in a dedicated table; a shared one has them all in ``data``.
        at: Its ``created_at`` and ``updated_at``.
    """
    shared = place.columns is None
    names = ["id", *(["data"] if shared else columns), "created_at", "updated_at", "is_deleted"]
    constant: tuple[Any, ...] = (at, at, False)
    if shared:
        names, constant = [*names, "entity_id"], (*constant, place.entity_id)
    if created_by is not None:
        names, constant = [*names, "created_by"], (*constant, created_by)
    return names, constant
