"""SQLite: a table of vectors beside what is read, as a store; see :mod:`kdb_fast.tables.table_target`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from ...db.address import DatabaseAddress
from ...db.retrying import ErrorKind
from ...db.sqlite_connection import connect_sqlite
from ...db.sqlite_errors import kind_of, translated
from ...db.sqlite_session import transaction
from ...faults import fault
from ...records import Key, number_of, storable_key
from ...tables.hidden_rows import HiddenRowsError
from ...tables.index_policy import IndexAction, IndexOutcome
from ...tables.key import KeyColumn
from ...tables.known_rows import SAME_VECTOR, KnownRows
from ...tables.table_target import TableTarget
from ...tables.target import LiveRows, Params, Target, rows_on
from ..base import RunSpec, Stored, version_of_text
from . import prepare as sqlite_prepare
from .flush import RowWriter
from .keyword import fill_in
from .prune import PRUNE_KEYS
from .store import SQLiteStore
from .table_find import load_vec0, prepare_table
from .table_flush import TableWriter
from .table_rows import Found, TableRows

TRIGGERS = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE ORDER BY name"

IS_EMPTY = "SELECT NOT EXISTS (SELECT 1 FROM {known})"

KNOWN = (
    "LEFT JOIN (SELECT {kept_keys}, kdb_fast_hash AS kdb_fast_kept_text, kdb_fast_seal AS kdb_fast_kept_vector, "
    "kdb_fast_fingerprint AS kdb_fast_kept_model, CAST({embedding} AS BLOB) AS kdb_fast_vector FROM {table}) "
    "kdb_fast_kept ON {same_row}"
)
KNOWN_OURS = "kdb_fast_kept_model = '{fingerprint}' AND {same_vector}(kdb_fast_vector, kdb_fast_kept_vector)"

OF_RUN = "SELECT DISTINCT {columns} FROM {known} WHERE kdb_fast_run = ?"

DEAD = "SELECT {row_keys} FROM {known} s WHERE NOT {live} LIMIT {batch}"

WITHOUT_TEXT = (
    "SELECT {text}, st.kdb_fast_noted, {kept_keys} FROM (SELECT {known_keys}, kdb_fast_hash AS kdb_fast_noted "
    "FROM {known} WHERE content IS NULL LIMIT 10000) st LEFT JOIN {source} t ON {same_row}"
)
FILL_IN = "UPDATE {known} SET content = ? WHERE {same_row}"


class SQLiteTableStore(SQLiteStore):
    """Writes the rows of one table of vectors."""

    def __init__(self, connection: sqlite3.Connection, table: TableTarget) -> None:
        super().__init__(connection, Target(kept_as=table.identity))
        self.table = table
        self._rows = TableRows(connection, table)

    @classmethod
    def open_table(cls, address: DatabaseAddress, table: TableTarget) -> SQLiteTableStore:
        """A store with its own connection, which :meth:`close` closes."""
        store = cls(connect_sqlite(address), table)
        store._own()
        if table.vec0:
            load_vec0(store._connection)
        return store

    @property
    def key(self) -> tuple[KeyColumn, ...]:
        return self.table.key

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int, wait: float = 0.0) -> tuple[str, ...]:
        notes: list[str] = []

        def make() -> None:
            notes[:] = self._prepare_table(dimensions)

        with translated("preparing the tables"):
            sqlite_prepare.prepare(self._connection, make, wait, self.on_wait)
        return tuple(notes)

    def _prepare_table(self, dimensions: int) -> tuple[str, ...]:
        """Make or check the table; what the user should know."""
        return prepare_table(self._connection, self.table, dimensions)

    def altered(self, run: int) -> list[str]:
        with translated("looking at what was stored"):
            triggers = [storable_key(name) for (name,) in self._connection.execute(TRIGGERS, (self.table.table,))]
            if not triggers:
                return []
            written = self._connection.execute(self.table.statement(OF_RUN).decode(), (run,))
            count = 0
            while part := written.fetchmany(PRUNE_KEYS):
                count += sum(found.fingerprint is None for found in self._find(part).values())
        if not count:
            return []
        return [
            f"{number_of(count, 'row')} of {self.table.shown} {'does' if count == 1 else 'do'} not hold the vector "
            f"that was written (trigger {', '.join(triggers[:5])}, or another program): the next run embeds again."
        ]

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        if self.table.keyword and self.table.text:
            table = self.table
            select = table.statement(
                WITHOUT_TEXT,
                text=f"CAST(({table.text}) AS BLOB)",
                kept_keys=table.each_key("st.kdb_fast_state_{number}"),
                known_keys=table.each_key("{column} AS kdb_fast_state_{number}"),
                same_row=table.same_key("t.{column}", "st.kdb_fast_state_{number}"),
            )
            fill = table.statement(FILL_IN, same_row=table.same_key("{column}", "?"))
            fill_in(self._connection, select.decode(), fill.decode(), beat)
        return IndexOutcome(IndexAction.NONE, "exact search on SQLite, no vector index")

    def count(self) -> int:
        with translated("counting rows"):
            row = self._connection.execute(self.table.statement("SELECT count(*) FROM {known}").decode()).fetchone()
            return int(row[0])

    def known_rows(self, fingerprint: str) -> KnownRows | None:
        table = self.table
        if table.chunked or table.vec0:
            return None  # a record has several rows; what is known lies in another table than the vectors
        with translated("looking for rows"):
            (empty,) = self._connection.execute(table.statement(IS_EMPTY).decode()).fetchone()
        if empty:
            return None
        join = table.statement(
            KNOWN,
            kept_keys=table.each_key("{column} AS kdb_fast_kept_{number}"),
            same_row=table.same_key("kdb_fast_kept.kdb_fast_kept_{number}", "t.{column}"),
        )
        ours = table.statement(KNOWN_OURS, fingerprint=fingerprint, same_vector=SAME_VECTOR)
        return KnownRows(join.decode(), ours.decode(), "kdb_fast_kept_text")

    # -- reading and writing ---------------------------------------------------------------------------

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        with translated("looking up what is stored"):
            return {
                key: Stored(found.text_hash, found.fingerprint, version_of_text(found.text_hash))
                for key, found in self._find(keys).items()
            }

    def _find(self, keys: Sequence[Key]) -> dict[Key, Found]:
        """What is known of the records that have these keys."""
        return self._rows.find(keys)

    def _writer(self, run: RunSpec) -> RowWriter:
        return TableWriter(self._connection, self.table, self._rows, run)

    def _delete(self, keys: Sequence[Key]) -> int:
        return self._rows.delete(keys)

    def prune(self, entity: str, live_rows: LiveRows) -> int:
        """Remove rows without a record; ``entity`` says nothing here."""
        removed = 0
        with translated("removing deleted records"):
            while True:
                fault("store.prune")
                try:
                    dead = self._dead(entity, live_rows)
                    if not dead:
                        return removed
                    with transaction(self._connection):
                        # Most runs find nothing and need no lock; what was found is looked at again under it.
                        deleted = self._rows.delete(self._dead(entity, live_rows))
                except sqlite3.OperationalError as error:
                    if kind_of(error) is not ErrorKind.REFUSED:
                        raise
                    raise HiddenRowsError(str(error)) from None
                removed += deleted
                if not deleted:
                    return removed

    def _dead(self, entity: str, live_rows: LiveRows) -> list[tuple[Any, ...]]:
        """Keys of rows without a record, up to PRUNE_KEYS."""
        params = Params("sqlite")
        live = live_rows(rows_on(self._connection, "sqlite"), self._target, entity, params)
        if live is None:
            return []
        statement = self.table.statement(
            DEAD, row_keys=self.table.each_key("s.{column}"), live=live, batch=params(PRUNE_KEYS)
        )
        return self._connection.execute(statement.decode(), params.values).fetchall()

    # -- rejects ---------------------------------------------------------------------------------------

    def forget_older_rejects(self, entities: Sequence[str], run: int) -> int:
        """All of the table's, where it was read as a whole."""
        if not entities:
            return 0
        with translated("forgetting older rejects"):
            statement = "DELETE FROM kdb_fast_rejects WHERE target = ? AND run < ?"
            return self._connection.execute(statement, (self.target.name, run)).rowcount
