"""SQLite: rows of the index, by key."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from ...db.sqlite import batches
from ...records import Key
from ...tables.kdb_search import KEY

PARAMETERS = 999
"""Of one statement: SQLite before 3.32 takes no more."""


def select_keys(
    connection: sqlite3.Connection, columns: str, keys: Sequence[Key]
) -> Iterator[tuple[Key, *tuple[Any, ...]]]:
    """For each of these keys that a row has: the key, and values of the row.

    Args:
        columns: The values, of a row ``s``.
    """
    names = [column.name for column in KEY]
    # The column compares, with its own type and collation; so a row is told by the place of its key.
    equal = " AND ".join(f"s.{name} = k.column{number}" for number, name in enumerate(names, 2))
    places = "(" + ",".join("?" * (1 + len(names))) + ")"
    for batch in batches(keys, PARAMETERS // (1 + len(names))):
        values = ",".join([places] * len(batch))
        statement = f"SELECT k.column1, {columns} FROM (VALUES {values}) k CROSS JOIN kdb_search s ON {equal}"  # noqa: S608
        parameters = [value for place, key in enumerate(batch) for value in (place, *key)]
        for place, *row in connection.execute(statement, parameters):
            yield batch[place], *row
