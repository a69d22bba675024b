"""SQLite: rows of the index, by key."""

from __future__ import annotations

import functools
import itertools
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from ...db.sqlite import batches
from ...records import Key, Record
from ...tables.target import Target

PARAMETERS = 999
"""Of one statement: SQLite before 3.32 takes no more."""

MOST_PARAMETERS = 5000
"""Of one statement where SQLite takes more: a page of records, each with its key and text."""


def select_keys(
    connection: sqlite3.Connection, target: Target, columns: str, keys: Sequence[Key]
) -> Iterator[tuple[Key, *tuple[Any, ...]]]:
    """For each of these keys that a row has: the key, and values of the row.

    Args:
        columns: The values, of a row ``t``: a template of :meth:`~kdb_fast.tables.target.Target.statement`.
    """
    for place, *found in select_places(connection, target, columns, keys):
        yield keys[place], *found


def select_places(
    connection: sqlite3.Connection, target: Target, columns: str, keys: Sequence[Key]
) -> Iterator[tuple[Any, ...]]:
    """As :func:`select_keys`, with the place of each key, from 0."""
    parts = len(target.index.key)
    # The column compares, with its own type and collation; so a row is told by the place of its key.
    statement = target.text(
        f"WITH s (place, {{key}}) AS (VALUES <values>) SELECT s.place + ?, {columns} "  # noqa: S608 - names
        "FROM s CROSS JOIN {index} t ON {same_key}"
    )
    first = 0
    for batch in batches(keys, (PARAMETERS - 1) // parts):
        query = statement.replace("<values>", _values(len(batch), parts))
        yield from connection.execute(query, [*itertools.chain.from_iterable(batch), first])
        first += len(batch)


def select_others(
    connection: sqlite3.Connection, target: Target, columns: str, same: str, value: object, records: Sequence[Record]
) -> Iterator[tuple[Any, ...]]:
    """The place of each record, from 0, whose row is not the same, or is not there; and values of the row.

    Args:
        columns: As for :func:`select_keys`.
        same: The condition, true or not true, that a row ``t`` is the same as a record of the text ``s.kdb_fast_text``;
            with one parameter.
        value: Of the parameter.
    """
    parts = len(target.index.key) + 1
    statement = target.text(
        f"WITH s (place, {{key}}, kdb_fast_text) AS (VALUES <values>) SELECT s.place + ?, {columns} "  # noqa: S608
        f"FROM s LEFT JOIN {{index}} t ON {{same_key}} WHERE NOT ifnull({same}, false)"
    )
    first = 0
    # One statement for a page where this SQLite takes as many parameters: other threads run while it works.
    size = (min(MOST_PARAMETERS, connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)) - 2) // parts
    for batch in batches(records, size):
        query = statement.replace("<values>", _values(len(batch), parts))
        texts = itertools.chain.from_iterable((*record.key, record.content) for record in batch)
        yield from connection.execute(query, [*texts, first, value])
        first += len(batch)


@functools.lru_cache(maxsize=4)
def _values(rows: int, parts: int) -> str:
    """A place and parameters for the parts of each key."""
    return ",".join(f"({place}{',?' * parts})" for place in range(rows))
