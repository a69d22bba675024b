"""PostgreSQL: one statement for many keys, where a key may be no value of its column's type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ...db.pg_errors import kind_of
from ...db.retrying import ErrorKind
from ...records import Key
from ...tables.key import text_arrays

T = TypeVar("T")


def by_key(keys: Sequence[Key], columns: int, execute: Callable[[Sequence[Key], list[str]], T]) -> Iterator[T]:
    """Execute a statement for all keys at once or, where the server cannot read one of them, halve until it stands
    alone; that one is left out, since no row has it.

    Args:
        columns: Of a key.
        execute: Given keys, and a ``text[]`` for each column of them. Where it fails, it leaves no transaction aborted.

    Yields:
        What ``execute`` gave for each part.

    Raises:
        psycopg.Error: It is not a key's.
    """
    import psycopg

    if not keys:
        return
    try:
        result = execute(keys, text_arrays(keys, columns))
    except psycopg.Error as error:
        if kind_of(error) is not ErrorKind.DATA:
            raise
        middle = len(keys) // 2
        if middle:
            yield from by_key(keys[:middle], columns, execute)
            yield from by_key(keys[middle:], columns, execute)
        return
    yield result
