"""New rows of one entity in SQLite, by one prepared statement."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, ClassVar

from ...catalog.records import new_row
from ...db.retrying import ErrorKind
from ...db.sqlite_connection import connect_sqlite
from ...db.sqlite_errors import kind_of, reason_of, translated
from ...db.sqlite_session import transaction
from ...records import storable_key
from ...tables.target import Dialect, identifier
from .base import Column, Inserter, NewRow, Outcome, Refusal, RowRefusedError

BOUNDS = (-(1 << 63), (1 << 63) - 1)
"""Whole numbers that SQLite holds; Python's module raises OverflowError for others."""


class SQLiteInserter(Inserter):
    """One transaction a page; another writer is waited for."""

    dialect: ClassVar[Dialect] = "sqlite"

    def insert(self, rows: Sequence[NewRow]) -> Outcome:
        with translated(f"inserting into {storable_key(self._table)}"), transaction(self._connection):
            return self._insert_all(rows)

    @contextlib.contextmanager
    def _savepoint(self) -> Iterator[None]:
        self._connection.execute("SAVEPOINT kdb_fast_rows")
        try:
            yield
        except RowRefusedError:
            self._connection.execute("ROLLBACK TO kdb_fast_rows")
            self._connection.execute("RELEASE kdb_fast_rows")
            raise
        self._connection.execute("RELEASE kdb_fast_rows")

    def _write(self, rows: Sequence[NewRow], at: datetime) -> None:
        # As KameleonDB's SQLAlchemy writes times: UTC, without a zone.
        moment = at.strftime("%Y-%m-%d %H:%M:%S.%f")
        columns, constant = new_row(self._place, self._types, moment, self._created_by)
        names = ", ".join(identifier(column, self.dialect) for column in columns)
        marks = ", ".join("?" * len(columns))
        statement = f"INSERT INTO {identifier(self._table, self.dialect)} ({names}) VALUES ({marks})"  # noqa: S608 - quoted
        try:
            taken = self._connection.executemany(
                statement, [(row.record_id, *row.fields, *constant) for row in rows]
            ).rowcount
        except sqlite3.Error as error:
            if kind_of(error) is not ErrorKind.DATA or not self._connection.in_transaction:
                raise
            raise RowRefusedError(_refusal(error)) from None
        except OverflowError:
            raise RowRefusedError(Refusal("out_of_range", "a whole number has more than 64 bits")) from None
        if taken != len(rows):
            raise RowRefusedError(Refusal("database_refused", "a trigger of the table left the row out"))

    def _connect(self) -> None:
        self._connection = connect_sqlite(self._address)

    def _query(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return list(self._connection.execute(query.replace("%s", "?"), parameters).fetchall())

    def _declared(self) -> dict[str, Column]:
        rows = self._query(
            'SELECT name, type, "notnull", dflt_value IS NOT NULL FROM pragma_table_info(%s)', self._table
        )
        return {
            name: Column(bool(not_null), bool(has_default), None, BOUNDS if "INT" in kind.upper() else None)
            for name, kind, not_null, has_default in rows
        }

    def _check_rights(self) -> None:
        """A file that cannot be written is noticed when the run takes its lock, before the first page."""

    def _moment(self, text: str) -> str:
        # As it is given, which is how KameleonDB moves it; but the column would make a number of mere digits.
        return datetime.fromisoformat(text).isoformat() if text.isdigit() else text


def _refusal(error: sqlite3.Error) -> Refusal:
    reason = reason_of(error)
    if reason == "unique":
        return Refusal(reason, f"a record with the same value is there already ({str(error).rpartition(': ')[2]})")
    return Refusal(reason, f"the database refused the row: {error}")
