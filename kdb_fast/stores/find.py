"""From the definition of a target to the target, as the database that is written has it now."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..db.address import DatabaseAddress
from ..tables.column_target import ColumnTarget
from ..tables.definition import Definition
from ..tables.describe import quoted
from ..tables.selection import Selection
from ..tables.target import Target

if TYPE_CHECKING:
    import sqlite3

    import psycopg

T = TypeVar("T")


def find_table_target(
    address: DatabaseAddress,
    definition: Definition,
    selection: Selection,
    *,
    replace: bool = False,
    vacuum: bool = False,
) -> ColumnTarget:
    """What a run of this definition writes.

    Args:
        address: With the schema of our own tables.
        selection: What is read.
        replace: Vectors of other programs are overwritten.
        vacuum: PostgreSQL: free the versions of rows that are left behind, during the run.

    Raises:
        SchemaError: A run could not write it.
        DatabaseError: The database cannot be reached.
    """
    key = [column.name for column in selection.key]
    name, table, vector = definition.name, definition.table, definition.vector
    if address.dialect == "sqlite":
        from .sqlite.column_find import find_column as find_in_file

        return _in_file(
            address,
            lambda file: find_in_file(
                file, name, table, text=selection.text, vector=vector, form=definition.form, key=key, replace=replace
            ),
        )
    from .postgresql.column_find import find_column

    place = quoted(definition.schema, table)
    return _in_postgresql(
        address,
        lambda cursor, home: find_column(
            cursor, home, name, place, text=selection.text, vector=vector, key=key, replace=replace, vacuum=vacuum
        ),
    )


def create_vector_column(address: DatabaseAddress, definition: Definition, dimensions: int) -> None:
    """Add the column of the vectors to the table, which has none of this name.

    Raises:
        SchemaError: The database refuses it.
        DatabaseError: The database cannot be reached.
    """
    table, vector = definition.table, definition.vector
    if address.dialect == "sqlite":
        from .sqlite.column_find import create_column as create_in_file

        _in_file(address, lambda file: create_in_file(file, table, vector, definition.form or "blob"))
        return
    from .postgresql.column_find import create_column

    place = quoted(definition.schema, table)
    _in_postgresql(address, lambda cursor, home: create_column(cursor, home, place, vector, dimensions))


def _in_file(address: DatabaseAddress, work: Callable[[sqlite3.Connection], T]) -> T:
    from ..db.sqlite_connection import connect_sqlite
    from ..db.sqlite_errors import translated
    from ..db.sqlite_session import transaction

    with contextlib.closing(connect_sqlite(address)) as file, translated("looking at the table"), transaction(file):
        return work(file)


def _in_postgresql(address: DatabaseAddress, work: Callable[[psycopg.Cursor[tuple[Any, ...]], Target], T]) -> T:
    from .postgresql.session import PgSession

    session = PgSession(address, "targets")

    def attempt() -> T:
        with session.transaction() as cursor:
            return work(cursor, session.target)

    with contextlib.closing(session):
        return session.retrying("looking at the table", attempt)
