"""New rows of one entity in PostgreSQL, by COPY."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

from ...catalog.records import new_row
from ...db import pg_errors, pg_settings
from ...db.address import DatabaseAddress
from ...db.pg_characters import Characters
from ...db.pg_connection import connect_postgresql
from ...db.retrying import Backoff, ErrorKind, retry
from ...errors import SchemaError
from ...records import bad_encoding
from ...tables.target import Dialect, identifier
from .base import Column, Inserter, NewRow, Outcome, Refusal, RowRefusedError

if TYPE_CHECKING:
    import psycopg

BITS = {"int2": 15, "int4": 31, "int8": 63}
"""Bits of PostgreSQL's whole numbers beside the sign."""


class PostgreSQLInserter(Inserter):
    """One transaction a page. A lost connection is opened again, and no page is inserted twice."""

    dialect: ClassVar[Dialect] = "postgresql"

    def __init__(self, address: DatabaseAddress, entity: str, created_by: str | None = None) -> None:
        self._lock_key = secrets.randbits(62)
        self._unconfirmed: Outcome | None = None
        super().__init__(address, entity, created_by)

    def insert(self, rows: Sequence[NewRow]) -> Outcome:
        self._unconfirmed = None

        def work() -> Outcome:
            if self._connection is None:
                self._connect()
            return self._insert_once(rows)

        def explained(error: Exception) -> Exception:
            return pg_errors.explain(f"inserting into {self._target.shown(self._table)}", error, self._address)

        return retry(work, Backoff(), pg_errors.kind_of, explained, again=lambda error: self.close())

    def _insert_once(self, rows: Sequence[NewRow]) -> Outcome:
        with self._transaction():
            if self._unconfirmed is not None and self._committed(rows, self._unconfirmed):
                return self._unconfirmed
            unheld = self._unheld(rows)
            outcome = self._insert_all([row for row in rows if row.record_id not in unheld])
            outcome.refused.update(unheld)
            # If the answer to the COMMIT is lost, this is what became of the page, or nothing did.
            self._unconfirmed = outcome
        return outcome

    def _committed(self, rows: Sequence[NewRow], outcome: Outcome) -> bool:
        """Whether an attempt whose answer was lost had been committed: its new ids are there."""
        ids = [row.record_id for row in rows if row.record_id not in outcome.refused]
        table = self._target.table(self._table)
        return bool(ids and self._query(f"SELECT 1 FROM {table} WHERE id = ANY(%s) LIMIT 1", ids))  # noqa: S608 - quoted

    def _unheld(self, rows: Sequence[NewRow]) -> dict[str, Refusal]:
        """The rows with characters that the database's encoding lacks: found before they are sent, not by halving."""
        if self._characters is None:
            return {}
        texts = {row.record_id: self._text_of(row) for row in rows}
        missing = self._characters.missing(self._connection, texts.values())
        return {
            record_id: Refusal(*bad_encoding("record", missing.intersection(text), self._characters.encoding))
            for record_id, text in texts.items()
            if not missing.isdisjoint(text)
        }

    def _text_of(self, row: NewRow) -> str:
        # In the shared table there is one JSON text, which has escapes for all characters beyond ASCII.
        values = [json.dumps(json.loads(row.fields[0]), ensure_ascii=False)] if self._shared else row.fields
        return "\n".join(value for value in values if isinstance(value, str))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        # The advisory lock makes a repeated attempt wait until the server has ended the lost one. Constraints that only
        # the COMMIT would check could not be traced to a row.
        settings = (
            "SET LOCAL lock_timeout = '30s'; SET LOCAL idle_in_transaction_session_timeout = '60s'; "
            f"SELECT pg_advisory_xact_lock({self._lock_key}); SET CONSTRAINTS ALL IMMEDIATE"
        )
        with pg_settings.transaction(self._connection, settings):
            yield

    def _savepoint(self) -> contextlib.AbstractContextManager[Any]:
        savepoint: contextlib.AbstractContextManager[Any] = self._connection.transaction()
        return savepoint

    def _write(self, rows: Sequence[NewRow], at: datetime) -> None:
        import psycopg

        columns, constant = new_row(self._place, self._types, at, self._created_by)
        names = ", ".join(map(identifier, columns))
        statement = f"COPY {self._target.table(self._table)} ({names}) FROM STDIN"
        try:
            with self._connection.cursor() as cursor:
                with cursor.copy(statement.encode()) as copy:
                    for row in rows:
                        copy.write_row((row.record_id, *row.fields, *constant))
                taken = cursor.rowcount
        except psycopg.Error as error:
            if pg_errors.kind_of(error) is not ErrorKind.DATA:
                raise
            raise RowRefusedError(_refusal(error)) from None
        if taken != len(rows):
            detail = "a trigger or rule of the table dropped the row without an error"
            raise RowRefusedError(Refusal("database_refused", detail))

    def _connect(self) -> None:
        self._connection = connect_postgresql(self._address, role="insert")
        self._characters = Characters.of(self._connection)

    def _query(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return list(self._connection.execute(query.encode(), parameters).fetchall())

    def _declared(self) -> dict[str, Column]:
        columns = {}
        for name, kind, size, not_null, has_default in self._query(
            "SELECT a.attname, t.typname, a.atttypmod, a.attnotnull, a.atthasdef OR a.attidentity <> '' "
            "FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped",
            self._target.regclass(self._table),
        ):
            bits = BITS.get(kind)
            columns[name] = Column(
                not_null,
                has_default,
                size - 4 if kind in ("varchar", "bpchar") and size > 4 else None,
                (-(1 << bits), (1 << bits) - 1) if bits else None,
            )
        return columns

    def _check_rights(self) -> None:
        table = self._target.regclass(self._table)
        (may, filtered, user), *_ = self._query(
            "SELECT has_any_column_privilege(to_regclass(%s), 'INSERT'), row_security_active(to_regclass(%s)), "
            "current_user",
            table,
            table,
        )
        if not may:
            raise SchemaError(
                f"The role {user!r} may not insert into {self._target.shown(self._table)}.",
                remedy=f"Let the owner run: GRANT INSERT ON {self._target.shown(self._table)} TO {user};",
            )
        if filtered:
            raise SchemaError(
                f"Row level security is active for the role {user} on {self._target.shown(self._table)}, where COPY is "
                "not allowed then.",
                remedy="Insert with KameleonDB and then reindex, or run as a role with BYPASSRLS or as the table's "
                "owner (without FORCE ROW LEVEL SECURITY).",
            )

    def _moment(self, text: str) -> datetime:
        moment = datetime.fromisoformat(text)
        # A time without a zone is UTC, as KameleonDB's own times are, whatever zone the session has.
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _refusal(error: psycopg.Error) -> Refusal:
    """Without the row's text, which the server's own DETAIL may quote."""
    state = error.sqlstate or ""
    about = error.diag.constraint_name or error.diag.column_name
    detail = f"the database refused the row with SQLSTATE {state}" + (f" ({about})" if about else "")
    if state == "23505":
        detail = f"a record with the same value is there already ({about})"
    elif state == "23503":
        detail = f"there is no such record to refer to ({about})"
    return Refusal(pg_errors.REASONS.get(state, "database_refused"), detail)
