"""Reading the index: what the errors of both drivers mean for who reads it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from ..db import pg_errors, sqlite_errors, sqlite_vec
from ..db.retrying import ErrorKind
from ..errors import DatabaseError, SchemaError
from .target import Rows, Target, other_indexes


def rows_of(connection: Any, dialect: str) -> Rows:
    """A function that runs statements on this connection, whatever row factory it has.

    The function raises SchemaError for a missing table, column, extension or right, ResourceError when the database
    runs out of disk or memory, and DatabaseError when it cannot answer; other errors of the driver pass through.
    """
    return _sqlite_rows(connection) if dialect == "sqlite" else _postgresql_rows(connection)


_NO_INDEX = "Run: kdb-fast reindex"


@contextlib.contextmanager
def sqlite_cursor(connection: sqlite3.Connection) -> Iterator[sqlite3.Cursor]:
    """A cursor that gives tuples; errors are those of :func:`rows_of`."""
    with contextlib.closing(connection.cursor()) as cursor:
        cursor.row_factory = None
        try:
            yield cursor
        except sqlite3.Error as error:
            kind = sqlite_errors.kind_of(error)
            if kind is ErrorKind.DATA or sqlite_errors.primary_code(error) is None:
                raise
            if kind is ErrorKind.RESOURCE:
                raise sqlite_errors.explain(error, "reading the index") from error
            if str(error).startswith(("no such table", "no such column")):
                raise SchemaError(f"The search index cannot be read: {error}.", remedy=_NO_INDEX) from None
            if sqlite_vec.UNKNOWN in str(error):
                raise sqlite_errors.explain(error, "reading it") from None
            raise DatabaseError(f"The SQLite database cannot be read: {error}.") from error


def _sqlite_rows(connection: sqlite3.Connection) -> Rows:
    def rows(statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with sqlite_cursor(connection) as cursor:
            return cursor.execute(statement, params).fetchall()

    return rows


@contextlib.contextmanager
def postgresql_errors() -> Iterator[None]:
    """Errors of psycopg are those of :func:`rows_of`."""
    import psycopg
    from psycopg import errors

    try:
        yield
    except (errors.UndefinedTable, errors.UndefinedColumn, errors.WrongObjectType) as error:
        detail = error.diag.message_primary
        raise SchemaError(f"The search index cannot be read: {detail}.", remedy=_NO_INDEX) from None
    except errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"The search index cannot be read: {error.diag.message_primary}.",
            remedy="Let its owner grant this role SELECT on it, and USAGE on its schema.",
        ) from None
    except psycopg.Error as error:
        kind = pg_errors.kind_of(error)
        if kind is ErrorKind.RESOURCE:
            raise pg_errors.explain("reading the index", error) from error
        ours = kind in (ErrorKind.DATA, ErrorKind.REFUSED)  # a statement of ours, or a value in it
        if ours and not isinstance(error, psycopg.OperationalError):
            raise
        detail = pg_errors.primary_message(error)
        raise DatabaseError(f"The PostgreSQL database cannot be read: {detail}.") from error


def _postgresql_rows(connection: Any) -> Rows:
    from psycopg.rows import tuple_row

    def rows(statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with postgresql_errors(), connection.cursor(row_factory=tuple_row) as cursor:
            cursor.execute(statement.encode(), params)
            result: list[tuple[Any, ...]] = cursor.fetchall()
            return result

    return rows


def no_index(rows: Rows, target: Target) -> SchemaError:
    """The error that says that there is no search index here, and in which schema there is one."""
    where = "this database" if target.schema is None else f"the schema {target.shown()} of this database"
    others = ", ".join(other_indexes(rows, target))
    if others:
        where += f", the one of its records; {others} is another schema's"
    return SchemaError(f"There is no search index in {where}.", remedy="Build it: kdb-fast reindex --db …")
