"""SQLite: a table of vectors in which a record has a row for each piece of its text, as a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...db.sqlite_errors import translated
from ...db.sqlite_session import transaction
from ...records import Key
from ...tables.index_policy import IndexOutcome
from ...tables.table_target import REVISION
from ...tables.target import identifier
from ..base import RunSpec
from .check import columns
from .chunk_flush import ChunkWriter
from .flush import RowWriter
from .table_rows import Found
from .table_store import SQLiteTableStore

MAKE_ASIDE = (
    "CREATE TABLE {aside} ({columns}, {written}, {revision})",
    "CREATE INDEX {aside_index} ON {aside} ({revision})",
)
"""Columns without a type keep values as they are."""
DROP_ASIDE = "DROP TABLE IF EXISTS {aside}"
CLEAR_ASIDE = "DELETE FROM {aside}"


class SQLiteChunkStore(SQLiteTableStore):
    """Writes records in pieces, each record whole or not at all."""

    in_pieces = True

    def _prepare_table(self, dimensions: int) -> tuple[str, ...]:
        notes = super()._prepare_table(dimensions)
        table = self.table
        wanted = {name.lower() for name in (*(key.name for key in table.key), *table.written, REVISION)}
        if columns(self._connection, table.aside).keys() != wanted:
            index = identifier(f"{table.aside}_revision", "sqlite")
            for statement in (DROP_ASIDE, *MAKE_ASIDE):
                self._connection.execute(table.statement(statement, aside_index=index).decode())
        return notes

    def begin_run(self, *, fingerprint: str, model: str, dimensions: int, wait: float) -> RunSpec:
        run = super().begin_run(fingerprint=fingerprint, model=model, dimensions=dimensions, wait=wait)
        self._clear_aside()  # what a run has left that was killed
        return run

    def finish_index(self, beat: Callable[[str], None], run: RunSpec | None = None) -> IndexOutcome:
        self._clear_aside()  # pieces of records that could not be stored
        return super().finish_index(beat, run)

    def _clear_aside(self) -> None:
        with translated("clearing pieces"), transaction(self._connection):
            self._connection.execute(self.table.statement(CLEAR_ASIDE).decode())

    def _find(self, keys: Sequence[Key]) -> dict[Key, Found]:
        return self._rows.find_whole(keys)

    def _writer(self, run: RunSpec) -> RowWriter:
        return ChunkWriter(self._connection, self.table, self._rows, run)
