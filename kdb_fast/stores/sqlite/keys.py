"""SQLite: rows of the index, by key."""

from __future__ import annotations

import functools
import itertools
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from ...db.sqlite import batches
from ...records import Key
from ...tables.target import Target

PARAMETERS = 999
"""Of one statement: SQLite before 3.32 takes no more."""


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


@functools.lru_cache(maxsize=4)
def _values(rows: int, parts: int) -> str:
    """A place and parameters for the parts of each key."""
    return ",".join(f"({place}{',?' * parts})" for place in range(rows))
