"""SQLite: rows that the database refuses are found one by one, and the others written."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ...db.retrying import ErrorKind
from ...db.sqlite_errors import kind_of, reason_of

R = TypeVar("R")
T = TypeVar("T")


def written_in_parts(
    connection: sqlite3.Connection,
    rows: Sequence[R],
    write: Callable[[Sequence[R]], T],
    refuse: Callable[[R, str, str], None],
) -> Iterator[tuple[Sequence[R], T]]:
    """Write all rows within the transaction or, where the database refuses one, halve until the refused stand alone.

    Args:
        write: Writes rows; whatever it has written is taken back where it raises.
        refuse: Told of each row that is refused, with reason and detail.

    Yields:
        The rows of each part that is written, and what ``write`` gave for it.

    Raises:
        sqlite3.Error: It is not the data's, or it has ended the transaction.
    """
    execute = connection.execute
    execute("SAVEPOINT kdb_fast_rows")
    try:
        result = write(rows)
    except sqlite3.Error as error:
        if kind_of(error) is not ErrorKind.DATA or not connection.in_transaction:
            raise
        execute("ROLLBACK TO kdb_fast_rows")
        execute("RELEASE kdb_fast_rows")
        if len(rows) == 1:
            refuse(rows[0], reason_of(error), str(error))
            return
        middle = len(rows) // 2
        yield from written_in_parts(connection, rows[:middle], write, refuse)
        yield from written_in_parts(connection, rows[middle:], write, refuse)
        return
    execute("RELEASE kdb_fast_rows")
    yield rows, result
