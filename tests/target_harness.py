"""Harnesses of the stores that write a vector column, or a table of vectors, for the records of a user's table.

``STORES`` has those of every kind of store: a new one gets its harness there, and
``integration/test_store_contract.py`` runs on it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from articles import Articles, floats
from store_harness import INDEXES, Harness, OnPostgreSQL, OnSQLite

from kdb_fast.stores.base import TargetTable

COLUMNS = "entity {text}, id {text}, body {text}, embedding {vector}, PRIMARY KEY (entity, id)"
"""Of the user's table, by the key that the tests have."""


class RecordsHarness(Harness):
    """Of a store that makes no records: each is a row of the table ``notes`` before anything is written for it.

    Attributes:
        stored: Column with the texts of what is stored, in the table that is written.
    """

    types: ClassVar[dict[str, str]]
    stored: ClassVar[str]
    vector: ClassVar[str]

    def find_target(self) -> TargetTable:
        return self.target_of(Articles(self.address, COLUMNS.format(**self.types), "notes"))

    def target_of(self, notes: Articles) -> TargetTable:
        """What is written."""
        raise NotImplementedError

    def provide(self, pairs: Iterable[tuple[str, str | None]], entity: str) -> None:
        rows = dict(pairs)
        if rows:
            self.execute(
                f"INSERT INTO notes (entity, id, body) VALUES {', '.join(['(%s, %s, %s)'] * len(rows))} "
                "ON CONFLICT (entity, id) DO UPDATE SET body = excluded.body",
                *(value for key, text in rows.items() for value in (entity, key, text)),
            )

    def contents(self) -> dict[str, str]:
        return dict(self.execute(f"SELECT id, {self.stored} FROM {self.written} WHERE embedding IS NOT NULL"))

    def vectors(self) -> dict[str, Any]:
        found = self.execute(f"SELECT id, {self.vector} FROM {self.written} WHERE embedding IS NOT NULL")
        return {key: floats(value) for key, value in found}


class ColumnHarness(RecordsHarness):
    """Vectors go into a column of the table; one is written while its record has the text that was read."""

    written, stored = "notes", "body"

    def target_of(self, notes: Articles) -> TargetTable:
        return notes.target(name="notes")

    def outdate(self, key: str) -> None:
        self.execute("UPDATE notes SET body = 'theirs' WHERE id = %s", key)


class TableHarness(RecordsHarness):
    """Vectors go into a table beside it; one is written while its record is there."""

    written, stored = "note_vectors", "content"

    def target_of(self, notes: Articles) -> TargetTable:
        return notes.into("note_vectors", content=True)

    def outdate(self, key: str) -> None:
        self.execute("DELETE FROM notes WHERE id = %s", key)


class OfPostgreSQL(OnPostgreSQL, RecordsHarness):
    types: ClassVar = {"text": "text", "vector": "vector(8)"}
    vector = "embedding::text"
    vector_error = 1e-7


class OfSQLite(OnSQLite, RecordsHarness):
    types: ClassVar = {"text": "TEXT", "vector": "BLOB"}
    vector = "embedding"


class PostgreSQLColumnHarness(OfPostgreSQL, ColumnHarness):
    refusals: ClassVar = OnPostgreSQL.refused("notes", "body", "UPDATE OF embedding")
    drops_silently = OnPostgreSQL.trigger("notes", "body", "UPDATE OF embedding", "RETURN NULL")
    alters = OnPostgreSQL.meddling("notes", "UPDATE OF embedding", "NEW.body := upper(NEW.body)")
    versions = "SELECT ctid, xmin, * FROM notes ORDER BY id"


class PostgreSQLTableHarness(OfPostgreSQL, TableHarness):
    refusals: ClassVar = {
        "check": OnPostgreSQL.checked("note_vectors", "content"),
        **OnPostgreSQL.refused("note_vectors", "content", "INSERT OR UPDATE"),
    }
    drops_silently = OnPostgreSQL.trigger("note_vectors", "content", "INSERT", "RETURN NULL")
    alters = OnPostgreSQL.meddling("note_vectors", "INSERT", "NEW.embedding := NEW.embedding + NEW.embedding")
    versions = "SELECT ctid, xmin, * FROM note_vectors ORDER BY id"


class SQLiteColumnHarness(OfSQLite, ColumnHarness):
    refusals: ClassVar = OnSQLite.refused("notes", "body", ["UPDATE OF embedding"])
    drops_silently = OnSQLite.triggers("notes", "body", ["UPDATE OF embedding"], "IGNORE")
    alters = OnSQLite.meddling("notes", "UPDATE OF embedding", "id", "body = upper(body)")
    versions = "SELECT * FROM notes ORDER BY id"


class SQLiteTableHarness(OfSQLite, TableHarness):
    refusals: ClassVar = OnSQLite.refused("note_vectors", "content", ["INSERT", "UPDATE"])
    drops_silently = OnSQLite.triggers("note_vectors", "content", ["INSERT"], "IGNORE")
    alters = OnSQLite.meddling("note_vectors", "INSERT", "id", "embedding = zeroblob(32)")
    versions = "SELECT * FROM note_vectors ORDER BY id"


STORES: dict[str, type[Harness]] = {
    **INDEXES,
    "column of postgresql": PostgreSQLColumnHarness,
    "column of sqlite": SQLiteColumnHarness,
    "table of postgresql": PostgreSQLTableHarness,
    "table of sqlite": SQLiteTableHarness,
}
