"""Search and status on real databases: rankings against brute force, filters, hostile input, true numbers."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdb_fast.db import pg_settings
from kdb_fast.db.address import DatabaseAddress, opened, parse_address
from kdb_fast.db.pg_connection import connect_postgresql
from kdb_fast.errors import ProviderError, SchemaError, UsageError
from kdb_fast.origins import Maker, Origin, QueryVector
from kdb_fast.records import key_json
from kdb_fast.search.query import check_query, meaning, parse_query
from kdb_fast.search.readers import postgresql as search_postgresql
from kdb_fast.search.readers import postgresql_texts, sqlite_vectors
from kdb_fast.search.readers.base import SearchReader
from kdb_fast.search.readers.postgresql import PostgresqlReader
from kdb_fast.search.readers.sqlite import SqliteReader
from kdb_fast.search.results import SearchResult
from kdb_fast.search.retrieval import search
from kdb_fast.search.scope import resolve_scope
from kdb_fast.search.status import statuses
from kdb_fast.stores.base import EntityStatus
from kdb_fast.stores.postgresql import migrate as pg_migrate
from kdb_fast.stores.sqlite import migrate as sqlite_migrate
from kdb_fast.tables import kdb_search
from kdb_fast.tables.migrations import MIGRATIONS
from kdb_fast.tables.target import Target

DIMENSIONS = 8
AT = "2026-03-01 12:00:00.000000"
EARLIER = "2026-03-01 11:00:00.000000"
LATER = "2026-03-01 13:00:00.000000"

KAMELEON = (
    "CREATE TABLE kdb_entity_definitions (id varchar(36) PRIMARY KEY, name varchar(255), table_name varchar(255), "
    "storage_mode varchar(20), dedicated_table_name varchar(255), is_active boolean)",
    "CREATE TABLE kdb_field_definitions (id varchar(36) PRIMARY KEY, entity_id varchar(36), name varchar(255), "
    "column_name varchar(255), field_type varchar(50), is_active boolean, created_at {time})",
    "CREATE TABLE kdb_records (id varchar(36) PRIMARY KEY, entity_id varchar(36), data {json}, created_at {time}, "
    "updated_at {time}, created_by varchar(255), is_deleted boolean NOT NULL)",
)
COLUMNS = {
    "postgresql": {"string": "varchar(255)", "int": "integer", "float": "double precision", "bool": "boolean"}
    | {"datetime": "timestamptz", "json": "jsonb"},
    "sqlite": {"string": "VARCHAR(255)", "int": "INTEGER", "float": "FLOAT", "bool": "BOOLEAN"}
    | {"datetime": "DATETIME", "json": "JSON"},
}

TARGET = Target("scratch", "public")


def explained_rankings(reader: SearchReader, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plan of each ranking by vector that the reader of PostgreSQL makes from now on."""
    plans: list[str] = []
    assert isinstance(reader, PostgresqlReader)
    plain = reader._read

    def explained(*statements: Any) -> Any:
        for statement, params in statements:
            if "ORDER BY s.embedding" in statement:
                plans.append("\n".join(row[0] for row in plain((f"EXPLAIN {statement}", params))[0]))
        return plain(*statements)

    monkeypatch.setattr(reader, "_read", explained)
    return plans


class Database:
    """A database being made up for a test, the same in both dialects."""

    def __init__(self, dialect: str, connection: Any) -> None:
        self.dialect, self.connection = dialect, connection
        self.fields: dict[str, dict[str, str]] = {}
        self.tables: dict[str, str] = {}

    def run(self, statement: str, *values: Any) -> Any:
        if self.postgresql:
            statement = statement.replace("%", "%%").replace("?", "%s")
        return self.connection.execute(statement, values)

    @property
    def postgresql(self) -> bool:
        return self.dialect == "postgresql"

    def create_index(self, *, own: bool = True) -> None:
        if self.postgresql:
            self.run(TARGET.statement(kdb_search.POSTGRESQL_SEARCH, dimensions=str(DIMENSIONS)).decode())
            for name in (TARGET.index.text_index, TARGET.index.vector_index):
                using = kdb_search.postgresql_indexes(TARGET.index)[name]
                self.run(TARGET.text(f"CREATE INDEX {name} ON {{index}} {using}"))
        else:
            self.run(Target().text(kdb_search.SQLITE_SEARCH))
            self.run(Target().text(kdb_search.SQLITE_FTS))
        if own:
            columns = kdb_search.POSTGRESQL_COLUMNS if self.postgresql else kdb_search.SQLITE_COLUMNS
            for name, kind in columns.items():
                self.run(f"ALTER TABLE kdb_search ADD COLUMN {name} {kind}")
            for migration in MIGRATIONS:
                if self.postgresql:
                    with self.connection.cursor() as cursor:
                        pg_migrate.apply(cursor, TARGET, migration)
                else:
                    sqlite_migrate.apply(self.connection, migration)

    def create_kameleon(self) -> None:
        for statement in KAMELEON:
            kinds = ("timestamptz", "jsonb") if self.postgresql else ("DATETIME", "JSON")
            self.run(statement.format(time=kinds[0], json=kinds[1]))

    def define(self, entity: str, fields: dict[str, str], *, table: str | None = None, active: bool = True) -> None:
        """An entity; a field's column is its name with ``c_`` before it, as after a rename."""
        self.fields[entity] = fields
        mode = "dedicated" if table else "shared"
        self.run(
            "INSERT INTO kdb_entity_definitions VALUES (?, ?, ?, ?, ?, ?)", entity, entity, "", mode, table, active
        )
        for number, (name, kind) in enumerate(fields.items()):
            self.run(
                "INSERT INTO kdb_field_definitions VALUES (?, ?, ?, ?, ?, ?, ?)",
                f"{entity}-{number}", entity, name, f"c_{name}", kind, True, f"2026-01-01 00:00:{number:02}",
            )  # fmt: skip
        if table:
            self.tables[entity] = table
            columns = "".join(f', "c_{name}" {COLUMNS[self.dialect][kind]}' for name, kind in fields.items())
            self.run(
                f'CREATE TABLE "{table}" (id varchar(36) PRIMARY KEY, created_at {COLUMNS[self.dialect]["datetime"]}, '
                f"updated_at {COLUMNS[self.dialect]['datetime']}, is_deleted boolean NOT NULL{columns})"
            )

    def record(
        self,
        entity: str,
        record_id: str,
        data: dict[str, Any],
        *,
        at: str = EARLIER,
        deleted: bool = False,
        shared: bool = False,
    ) -> None:
        data = {f"c_{name}": value for name, value in data.items()}
        if entity in self.tables and not shared:
            values = [json.dumps(v) if isinstance(v, list) else v for v in data.values()]
            names = "".join(f', "{name}"' for name in data)
            self.run(
                f'INSERT INTO "{self.tables[entity]}" (id, created_at, updated_at, is_deleted{names}) '
                f"VALUES (?, ?, ?, ?{', ?' * len(data)})",
                record_id, at, at, deleted, *values,
            )  # fmt: skip
        else:
            self.run(
                "INSERT INTO kdb_records VALUES (?, ?, ?, ?, ?, NULL, ?)",
                record_id, entity, json.dumps(data), at, at, deleted,
            )  # fmt: skip

    def index(self, entity: str, record_id: str, content: str, vector: npt.ArrayLike | None, **columns: Any) -> None:
        """A row of the index as KameleonDB writes it, with more columns if given."""
        row = {
            "id": f"{entity}/{record_id}"[:36],
            "entity_name": entity,
            "record_id": record_id,
            "content": content,
            "embedding": None if vector is None else json.dumps(np.asarray(vector, np.float64).tolist()),
            "dimensions": DIMENSIONS,
            "created_at": AT,
            "updated_at": AT,
        } | columns
        self.run(f"INSERT INTO kdb_search ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", *row.values())
        if not self.postgresql:
            self.run("INSERT INTO kdb_search_fts VALUES (?, ?, ?, ?)", row["id"], entity, record_id, content)

    def index_ours(self, entity: str, record_id: str, content: str, vector: npt.ArrayLike, **columns: Any) -> None:
        ours = {"kdb_fast_fingerprint": "now", "kdb_fast_run": 1, "kdb_fast_at": AT, "kdb_fast_source_at": EARLIER}
        self.index(entity, record_id, content, vector, **(ours | columns))

    def reader(self) -> SearchReader:
        return PostgresqlReader(self.connection) if self.postgresql else SqliteReader(self.connection)

    def ids(self, query: str = "words", vector: Any = None, **options: Any) -> list[str]:
        return [result.id for result in self.search(query, vector, **options)]

    def search(self, query: str = "words", vector: Any = None, **options: Any) -> list[SearchResult]:
        if options.get("mode") == "vector" and vector is None:
            vector = unit(0)
        return search(self.reader(), query, query_vector=vector, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatabaseAddress]:
    with opened(parse_address(f"embedded:{tmp_path_factory.mktemp('pg') / 'data'}")) as address:
        with connect_postgresql(address, role="test") as connection:
            connection.execute("CREATE EXTENSION vector")
        yield address


@pytest.fixture
def postgresql(server: DatabaseAddress) -> Iterator[Database]:
    with connect_postgresql(server, role="test") as connection:
        for statement in (
            "DROP SCHEMA IF EXISTS scratch CASCADE",
            "CREATE SCHEMA scratch",
            "SET search_path = scratch, public",
            "SET TimeZone = 'UTC'",
            "SET synchronous_commit = off",
        ):
            connection.execute(statement)
        yield Database("postgresql", connection)


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    connection = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    yield Database("sqlite", connection)
    connection.close()


@pytest.fixture(params=["postgresql", "sqlite"])
def empty(request: pytest.FixtureRequest) -> Database:
    """A database without any table."""
    database: Database = request.getfixturevalue(request.param)
    return database


@pytest.fixture
def db(empty: Database) -> Database:
    """A database with an empty index and KameleonDB's tables."""
    empty.create_index()
    empty.create_kameleon()
    return empty


def unit(axis: int, towards: int | None = None, by: float = 0.0) -> npt.NDArray[np.float32]:
    """The unit vector along ``axis``, leaning ``by`` towards another one."""
    vector = np.zeros(DIMENSIONS, np.float32)
    vector[axis] = 1
    if towards is not None:
        vector[towards] = by
    return vector


def random_vectors(rows: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, DIMENSIONS)).astype(np.float32)


def nearest(vectors: npt.NDArray[np.float32], query: npt.NDArray[np.float32], among: Sequence[int]) -> list[int]:
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ (query / np.linalg.norm(query))
    return sorted(among, key=lambda row: -cosines[row])


ROWS = 400


def fill(db: Database) -> npt.NDArray[np.float32]:
    """Two entities with 200 records each, one of them in a dedicated table; returns the vectors."""
    if db.postgresql and not db.run("SELECT to_regclass('kdb_search')").fetchone()[0]:
        db.create_index()
        db.create_kameleon()
    vectors = random_vectors(ROWS)
    db.run("BEGIN")
    for entity in ("Even", "Odd"):
        db.define(entity, {"name": "string", "group": "int"}, table="kdb_odd" if entity == "Odd" else None)
    for row, vector in enumerate(vectors):
        entity = "Odd" if row % 2 else "Even"
        db.record(entity, f"{row:03}", {"name": f"n{row}", "group": row % 40})
        db.index(entity, f"{row:03}", "words", vector)
    db.run("COMMIT")
    if db.postgresql:
        db.run("ANALYZE kdb_search")
    return vectors


class TestVectorRanking:
    @pytest.fixture
    def filled(self, db: Database) -> npt.NDArray[np.float32]:
        return fill(db)

    def test_the_ranking_is_that_of_brute_force(self, db: Database, filled: npt.NDArray[np.float32]) -> None:
        reader, right, first = db.reader(), 0, 0
        for query in random_vectors(20, seed=2):
            expected = [f"{row:03}" for row in nearest(filled, query, range(ROWS))[:10]]
            found = [r.id for r in search(reader, "q", query_vector=query, mode="vector")]
            right += len(set(expected) & set(found))
            first += expected[0] == found[0]
            if not db.postgresql:
                assert found == expected
        assert right >= 190
        assert first >= 19

    @pytest.mark.parametrize("entity", ["Even", "Odd"])
    def test_an_entity_filter_still_fills_the_limit(
        self, db: Database, filled: npt.NDArray[np.float32], entity: str
    ) -> None:
        rows = range(entity == "Odd", ROWS, 2)
        for query in random_vectors(3, seed=3):
            found = db.ids(vector=query, mode="vector", entities=[entity], limit=150)
            assert len(found) == 150
            assert found[0] == f"{nearest(filled, query, rows)[0]:03}"
            assert {int(i) % 2 for i in found} == {rows[0]}

    @pytest.mark.parametrize("mode", ["vector", "keyword", "hybrid"])
    def test_a_selective_where_still_fills_the_limit(
        self, db: Database, filled: npt.NDArray[np.float32], mode: str
    ) -> None:
        query = random_vectors(1, seed=4)[0]
        for group in (6, 7):  # in shared storage, in the dedicated table
            found = db.ids(vector=query, mode=mode, where={"group": group}, limit=10)
            rows = range(group, ROWS, 40)
            assert sorted(found) == [f"{row:03}" for row in rows]
            if mode == "vector":
                assert found == [f"{row:03}" for row in nearest(filled, query, rows)]

    def test_deleted_records_leave_their_places_to_others(self, db: Database, filled: npt.NDArray[np.float32]) -> None:
        query = random_vectors(1, seed=5)[0]
        order = nearest(filled, query, range(ROWS))
        alive = order[300:]
        for row in order[:300]:
            table = "kdb_odd" if row % 2 else "kdb_records"
            db.run(f"UPDATE {table} SET is_deleted = ? WHERE id = ?", True, f"{row:03}")
        found = db.ids(vector=query, mode="vector", limit=100)
        assert found == [f"{row:03}" for row in alive]
        assert set(db.ids("words", limit=200)) == set(found)


class TestPostgresqlRanking:
    def test_it_is_exact_where_the_index_gives_too_few(
        self, postgresql: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vectors = fill(postgresql)
        monkeypatch.setattr(PostgresqlReader, "_by_index", lambda *_: [])
        for query in random_vectors(5, seed=6):
            expected = [f"{row:03}" for row in nearest(vectors, query, range(ROWS))[:20]]
            assert postgresql.ids(vector=query, mode="vector", limit=20) == expected

    def test_the_index_is_used_through_all_filters(self, postgresql: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = fill(postgresql)
        postgresql.run("SET enable_seqscan = off")
        postgresql.run("SET enable_bitmapscan = off")
        reader = postgresql.reader()
        plans = explained_rankings(reader, monkeypatch)
        query = random_vectors(1, seed=7)[0]
        given: list[dict[str, Any]] = [{}, {"entities": ["Even", "Odd"]}, {"where": {"group": 5}}]
        for options in given:
            found = search(reader, "q", query_vector=query, mode="vector", **options)
            rows = range(5, ROWS, 40) if "where" in options else range(ROWS)
            assert [int(r.id) for r in found] == nearest(vectors, query, rows)[:10]
        assert len(plans) == 3
        assert all("Index Scan using ix_kdb_search_vector" in plan and "Sort" not in plan for plan in plans)

    def test_words_that_are_near_each_other_come_first(self, postgresql: Database) -> None:
        postgresql.create_index()
        far = " ".join(f"filler{n}" for n in range(12))
        postgresql.index("E", "a", f"a kettle {far} boils {far} water", None)
        postgresql.index("E", "b", f"a kettle {far} boils water {far}", None)
        postgresql.index("E", "c", f"a kettle boils water {far} {far}", None)
        assert postgresql.ids("kettle boils water") == ["c", "b", "a"]

    def test_long_texts_do_not_all_have_the_highest_rank(self, postgresql: Database) -> None:
        """With the default weights they do: 0.9999997, the float4 before 1, from 16 times these words on."""
        postgresql.create_index()
        for name, times in {"a": 16, "b": 24, "c": 32}.items():
            postgresql.index("E", name, "the copper kettle boils water in the kitchen " * times, None)
        assert postgresql.ids("copper kettle boils water") == ["c", "b", "a"]

    def test_the_session_stays_as_it_was(self, postgresql: Database) -> None:
        fill(postgresql)
        settings = "SELECT current_setting('hnsw.ef_search'), current_setting('hnsw.iterative_scan')"
        before = postgresql.run(settings).fetchone()
        assert len(postgresql.ids(vector=unit(0), mode="vector", limit=100)) == 100
        assert postgresql.run(settings).fetchone() == before

    def test_without_iterative_scans_the_limit_is_filled_as_well(
        self, postgresql: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(postgresql)
        monkeypatch.setattr(PostgresqlReader, "_iterative", False)
        assert len(postgresql.ids(vector=unit(0), mode="vector", entities=["Odd"], limit=150)) == 150


class TestWhileItRanks:
    """A server ranks by keyword while the query is embedded, and by vector beside it."""

    @pytest.fixture
    def vectors(self, postgresql: Database) -> npt.NDArray[np.float32]:
        vectors = fill(postgresql)
        postgresql.record("Even", "few", {"name": "few", "group": 1})
        postgresql.index("Even", "few", "other words", vectors[0])
        return vectors

    @pytest.fixture
    def beside(self, server: DatabaseAddress, postgresql: Database) -> Iterator[PostgresqlReader]:
        with connect_postgresql(server, role="test") as connection:
            connection.execute("SET search_path = scratch, public")
            yield PostgresqlReader(connection)

    @pytest.mark.parametrize("query", ["words", "other words", "other nosuchword", "nosuchword", "ERR_1 words", "-few"])
    @pytest.mark.parametrize("where", [None, {"group": 1}])
    def test_it_gives_what_is_found_one_after_the_other(
        self,
        postgresql: Database,
        vectors: npt.NDArray[np.float32],
        beside: PostgresqlReader,
        query: str,
        where: dict[str, Any] | None,
    ) -> None:
        reader = postgresql.reader()
        makers = [QueryVector(vectors[7], None), QueryVector(vectors[8], None)]
        for embedded in (vectors[7], lambda: vectors[7], makers, None):
            options: dict[str, Any] = {"query_vector": embedded, "where": where, "limit": 60}
            expected = search(postgresql.reader(), query, **options)
            for _ in range(2):
                assert search(reader, query, **options, beside=beside) == expected

    def test_neither_ranking_waits_for_the_other(
        self,
        server: DatabaseAddress,
        postgresql: Database,
        vectors: npt.NDArray[np.float32],
        beside: PostgresqlReader,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        expected = search(postgresql.reader(), "other words", query_vector=vectors[7])
        every = postgresql_texts.every
        # The one by keyword goes on until the one by vector has ended.
        lock = "pg_advisory_xact_lock_shared(7)"
        monkeypatch.setattr(
            postgresql_texts, "every", lambda query: lambda params: f"(SELECT {every(query)(params)} FROM {lock})"
        )
        with connect_postgresql(server, role="test") as holder:
            holder.execute("SELECT pg_advisory_lock(7)")
            begin = beside.begin_vector

            def release(*arguments: Any) -> Any:
                hits = begin(*arguments)
                assert hits is not None
                found = hits()
                holder.execute("SELECT pg_advisory_unlock(7)")
                return lambda: found

            monkeypatch.setattr(beside, "begin_vector", release)
            assert search(postgresql.reader(), "other words", query_vector=vectors[7], beside=beside) == expected

    def test_what_made_the_vectors_is_not_counted_in_between(
        self, postgresql: Database, vectors: npt.NDArray[np.float32], beside: PostgresqlReader
    ) -> None:
        """A statement more would meet those that are under way."""
        maker = Maker("now", "model", DIMENSIONS)
        reader = postgresql.reader()
        for _ in range(3):  # a table as small as this is counted in every search
            search(reader, "words", query_vector=[QueryVector(vectors[7], maker)], beside=beside)

    def test_definitions_that_have_changed_are_read_again(
        self, postgresql: Database, vectors: npt.NDArray[np.float32], beside: PostgresqlReader
    ) -> None:
        reader = postgresql.reader()
        assert {found.entity for found in search(reader, "words", query_vector=vectors[7], beside=beside)} == {
            "Even",
            "Odd",
        }
        postgresql.run("UPDATE kdb_entity_definitions SET name = 'Other' WHERE name = 'Odd'")
        postgresql.run("UPDATE kdb_search SET entity_name = 'Other' WHERE entity_name = 'Odd'")
        found = search(reader, "words", query_vector=vectors[7], beside=beside)
        assert {result.entity for result in found} == {"Even", "Other"}
        assert found == search(postgresql.reader(), "words", query_vector=vectors[7])

    def test_an_error_leaves_the_connection_as_it_was(
        self, postgresql: Database, vectors: npt.NDArray[np.float32], beside: PostgresqlReader
    ) -> None:
        def fail() -> Any:
            raise ProviderError("out of reach")

        reader = postgresql.reader()
        with pytest.raises(ProviderError, match="out of reach"):
            search(reader, "words", query_vector=fail, beside=beside)
        expected = search(postgresql.reader(), "words", query_vector=vectors[7])
        assert search(reader, "words", query_vector=vectors[7], beside=beside) == expected

    def test_in_a_transaction_nothing_is_begun(
        self, postgresql: Database, vectors: npt.NDArray[np.float32], beside: PostgresqlReader
    ) -> None:
        reader = postgresql.reader()
        expected = search(postgresql.reader(), "words", query_vector=vectors[7])
        with pg_settings.transaction(postgresql.connection):
            assert None is reader.begin_keyword(parse_query("words"), resolve_scope([], (), None), 5)
            assert search(reader, "words", query_vector=vectors[7], beside=beside) == expected


class TestRows:
    def test_only_rows_with_a_usable_vector_are_ranked(self, db: Database) -> None:
        db.index("File", "none", "words", None)
        db.index("File", "zero", "words", np.zeros(DIMENSIONS))
        db.index("File", "good", "words", unit(0))
        assert db.ids(mode="vector") == ["good"]
        assert set(db.ids("words")) == {"none", "zero", "good"}

    def test_records_that_do_not_live_are_never_found(self, db: Database) -> None:
        db.define("Shared", {"name": "string"})
        db.define("Moved", {"name": "string"}, table="kdb_moved")
        db.define("Dropped", {"name": "string"}, active=False)
        for entity in ("Shared", "Moved"):
            db.record(entity, f"{entity} lives", {"name": "words"})
            db.record(entity, f"{entity} deleted", {"name": "words"}, deleted=True)
        db.record("Dropped", "dropped", {"name": "words"})
        db.record("Moved", "Moved late", {"name": "words"}, shared=True)
        db.record("Moved", "Moved deleted late", {"name": "words"}, shared=True, deleted=True)
        # Being moved: the dedicated table counts.
        db.record("Moved", "both", {"name": "words"}, deleted=True)
        db.record("Moved", "both", {"name": "words"}, shared=True)
        for entity, record in [
            ("Shared", "Shared lives"), ("Shared", "Shared deleted"), ("Shared", "gone"), ("Shared", "Moved late"),
            ("Moved", "Moved lives"), ("Moved", "Moved deleted"), ("Moved", "gone"), ("Moved", "Moved late"),
            ("Moved", "Moved deleted late"), ("Moved", "both"), ("Dropped", "dropped"), ("File", "from a file"),
        ]:  # fmt: skip
            db.index(entity, record, "words", unit(0))
        expected = {
            ("Shared", "Shared lives"),
            ("Moved", "Moved lives"),
            ("Moved", "Moved late"),
            ("File", "from a file"),
        }
        for mode in ("vector", "keyword", "hybrid"):
            assert {(r.entity, r.id) for r in db.search(vector=unit(0), mode=mode, limit=50)} == expected
        assert db.ids(entities=["Dropped"]) == []
        assert db.ids(entities=["File", "Moved"], limit=50, mode="vector") == [
            "from a file",
            "Moved late",
            "Moved lives",
        ]

    def test_a_database_without_kameleondb_is_searched_as_it_is(self, empty: Database) -> None:
        empty.create_index()
        empty.index("File", "1", "some words", unit(0))
        score: Any = pytest.approx(2 / 61)
        assert empty.search(vector=unit(0)) == [SearchResult("File", "1", score, {}, "some words")]
        with pytest.raises(UsageError, match="'name'"):
            empty.search(where={"name": "x"})

    def test_a_dedicated_table_that_is_missing_is_no_error(self, db: Database) -> None:
        db.define("Moved", {"name": "string"}, table="kdb_moved")
        db.run("DROP TABLE kdb_moved")
        db.index("Moved", "1", "words", unit(0))
        assert db.ids(vector=unit(0)) == []

    def test_a_database_without_an_index_is_refused(self, empty: Database) -> None:
        for mode in ("vector", "keyword"):
            with pytest.raises(SchemaError, match="kdb_search"):
                empty.search(mode=mode)

    def test_a_query_vector_of_another_length_is_refused(self, db: Database) -> None:
        db.index("File", "1", "words", unit(0))
        with pytest.raises(UsageError):
            db.search(vector=np.ones(3, np.float32))

    def test_an_empty_index_finds_nothing(self, db: Database) -> None:
        assert db.search(vector=unit(0)) == []

    @pytest.mark.parametrize("rows", ["dict", "tuple"])
    def test_the_connections_row_factory_does_not_matter(self, db: Database, rows: str) -> None:
        db.index("File", "1", "words", unit(0))
        if db.postgresql:
            db.connection.row_factory = getattr(psycopg.rows, f"{rows}_row")
        else:
            db.connection.row_factory = sqlite3.Row if rows == "dict" else None
        assert db.ids(vector=unit(0)) == ["1"]
        assert statuses(db.connection, db.dialect, None)[0].indexed == 1


class TestData:
    FIELDS = {"name": "string", "größe": "int", '5" wide': "bool", "when": "datetime", "tags": "json", "100%": "float"}  # noqa: RUF012
    VALUES = {"name": "words", "größe": 7, '5" wide': True, "tags": ["a", 1], "100%": 0.1}  # noqa: RUF012

    @pytest.fixture(params=["shared", "dedicated"])
    def storage(self, request: pytest.FixtureRequest, db: Database) -> str:
        if request.param == "dedicated":
            self.FIELDS_OF_TABLE = {name: kind for name, kind in self.FIELDS.items() if '"' not in name}
        fields = self.FIELDS if request.param == "shared" else self.FIELDS_OF_TABLE
        db.define("E", fields, table="kdb_e" if request.param == "dedicated" else None)
        values = {name: value for name, value in self.VALUES.items() if name in fields}
        db.record("E", "full", values)
        db.record("E", "bare", {"name": "words"})
        for record in ("full", "bare"):
            db.index("E", record, "name: words", unit(0))
        return str(request.param)

    def test_results_hold_all_active_fields_by_their_logical_names(self, db: Database, storage: str) -> None:
        found = {result.id: result.data for result in db.search("words")}
        expected: dict[str, Any] = {**self.VALUES, "when": None}
        if storage == "dedicated":
            del expected['5" wide']
        assert found["full"] == expected
        assert found["bare"] == {**dict.fromkeys(expected), "name": "words"}

    def test_every_field_can_be_a_filter(self, db: Database, storage: str) -> None:
        for name, value in self.VALUES.items():
            if isinstance(value, list) or (storage == "dedicated" and '"' in name) or name == "name":
                continue
            for mode in ("vector", "keyword"):
                assert db.ids(where={name: value}, mode=mode) == ["full"], name
                assert db.ids(where={name: None}, mode=mode) == ["bare"], name

    def test_a_field_added_after_materialising_has_no_value(self, db: Database, storage: str) -> None:
        db.run(
            "INSERT INTO kdb_field_definitions VALUES ('new', 'E', 'new', 'c_new', 'string', ?, ?)", True, "2026-02-01"
        )
        assert {r.data["new"] for r in db.search("words")} == {None}
        assert db.ids(where={"new": "x"}) == []
        assert set(db.ids(where={"new": None}, vector=unit(0))) == {"full", "bare"}


class TestWhere:
    FIELDS = {"text": "string", "whole": "int", "real": "float", "flag": "bool", "when": "datetime", "doc": "json"}  # noqa: RUF012

    @pytest.fixture(params=["shared", "dedicated"])
    def typed(self, request: pytest.FixtureRequest, db: Database) -> Database:
        db.define("E", self.FIELDS, table="kdb_e" if request.param == "dedicated" else None)
        rows: dict[str, dict[str, Any]] = {
            "one": {"text": "1", "whole": 1, "real": 1.0, "flag": True},
            "two": {"text": "Two", "whole": 2, "real": 0.1, "flag": False},
            "none": {"text": None},
        }
        for record, data in rows.items():
            db.record("E", record, {**data, "when": None if record == "none" else "2026-03-01T12:00:00+00:00"})
            db.index("E", record, "words", unit(0))
        return db

    def test_values_compare_as_in_json(self, typed: Database) -> None:
        cases: list[tuple[dict[str, Any], set[str]]] = [
            ({"text": "1"}, {"one"}),
            ({"text": 1}, set()),
            ({"text": "two"}, set()),
            ({"text": "Two"}, {"two"}),
            ({"text": True}, set()),
            ({"text": None}, {"none"}),
            ({"whole": 1}, {"one"}),
            ({"whole": 1.0}, {"one"}),
            ({"whole": 1.5}, set()),
            ({"whole": "1"}, set()),
            ({"whole": True}, set()),
            ({"whole": None}, {"none"}),
            ({"real": 1}, {"one"}),
            ({"real": 0.1}, {"two"}),
            ({"real": 0.10000000000000002}, set()),
            ({"flag": True}, {"one"}),
            ({"flag": False}, {"two"}),
            ({"flag": 1}, set()),
            ({"flag": 0}, set()),
            ({"flag": "true"}, set()),
            ({"flag": None}, {"none"}),
            ({"when": "2026-03-01T12:00:00+00:00"}, {"one", "two"}),
            ({"when": "2026-03-02T12:00:00+00:00"}, set()),
            ({"when": "no time"}, set()),
            ({"when": 5}, set()),
            ({"doc": None}, {"one", "two", "none"}),
            ({"whole": 1, "flag": True}, {"one"}),
            ({"whole": 1, "flag": False}, set()),
            ({"text": "'; DROP TABLE kdb_search; --"}, set()),
        ]
        for mode in ("vector", "keyword"):
            found = [(where, set(typed.ids(where=where, mode=mode))) for where, _ in cases]
            assert found == cases

    def test_each_entity_is_filtered_as_it_is_stored_and_one_without_the_field_gives_nothing(
        self, typed: Database
    ) -> None:
        typed.define("Other", {"text": "string"})
        typed.record("Other", "other", {"text": "1"})
        typed.index("Other", "other", "words", unit(0))
        typed.index("File", "file", "words", unit(0))
        assert set(typed.ids(where={"text": "1"})) == {"one", "other"}
        assert set(typed.ids(where={"whole": 1}, entities=["E", "Other", "File"], vector=unit(0))) == {"one"}
        with pytest.raises(UsageError, match="'whole'"):
            typed.search(where={"whole": 1}, entities=["Other", "File"])


HOSTILE = [
    '"', '""', '"""', "'", "*", "-", "--", "- -", "a -", "-a", "-a -b", "AND", "OR", "NOT", "or", "or or", "a or",
    "or a", "a AND b", "NEAR(a b, 5)", "NEAR(", "a*", "^a", "content:a", "{content}:a", "a:b", "(", ")", "((a)",
    "a AND", "a NOT b", "+a", "a + b", "\\", "'; DROP TABLE kdb_search; --", "%", "%s %(x)s", ":x ?1 $1", "\x00",
    "a\x00b", "\ud800", "a\udfffb", "<->", "a <-> b", "a & b", "a | !b", "!", "!!a", "a:*", "🎧", "½ ²", "é e\u0301",
    "हिन्दी", "漢字", "\u202e\ufeff\ufffe", "x" * 5000, "a " * 5000, '"a ' * 2000, "-a " * 500, "(" * 2000,
    "the of and", "???",
]  # fmt: skip


PIECES = [*'"*-()^:{}+\\/ab1', " ", "AND", "OR", "NOT", "NEAR(", "or", "é", "\u0301", "\x00"]


class TestKeyword:
    @pytest.fixture
    def texts(self, db: Database) -> Database:
        for record, content in {
            "csv": "name: csvkit | description: Read and write comma separated files",
            "file": "name: less | description: read a file page by page, file after file",
            "comma": "name: splitter | description: comma-separated values",
            "sound": "name: Wireless Headphones | description: Premium noise-cancelling sound",
            "sound2": "name: Headphones | description: wired, with noise",
        }.items():
            db.index("Product", record, content, None)
        return db

    def test_texts_with_all_words_come_before_texts_with_some(self, texts: Database) -> None:
        found = texts.ids("read a comma separated file")
        assert found[0] == "csv"
        assert set(found) == {"csv", "file", "comma"}

    def test_the_stored_text_comes_with_the_result(self, texts: Database) -> None:
        assert texts.search("premium")[0].matched_text.startswith("name: Wireless Headphones | ")

    def test_words_phrases_and_exclusions(self, texts: Database) -> None:
        cases: dict[str, set[str]] = {
            "headphone": {"sound", "sound2"},
            "HEADPHONES": {"sound", "sound2"},
            "headphones -wireless": {"sound2"},
            'headphones -"noise cancelling"': {"sound2"},
            '"noise-cancelling sound"': {"sound"},
            '"cancelling noise"': set(),
            "premium or less": {"sound", "file"},
            "headphones - wireless": {"sound", "sound2"},
            "premium nosuchword": {"sound"},
            "nosuchword": set(),
            "-headphones": set(),
            "product": set(),  # the entity's name is no text
        }
        assert {query: set(texts.ids(query)) for query in cases} == cases

    def test_a_query_of_only_stop_words_is_no_error(self, texts: Database) -> None:
        assert texts.ids("the of") == []
        assert texts.ids("the of premium") == ["sound"]

    def test_an_excluded_word_is_not_brought_back_by_the_words_that_may_match(self, texts: Database) -> None:
        assert texts.ids("headphones nosuchword -wireless") == ["sound2"]

    def test_no_query_is_an_error(self, texts: Database) -> None:
        for query in HOSTILE:
            assert all(result.entity == "Product" for result in texts.search(query, unit(0))), query[:20]
        assert texts.ids("headphones") != []  # nothing was broken or dropped

    def test_deleted_and_filtered_matches_do_not_use_up_what_is_ranked(
        self, db: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(search_postgresql, "MAX_RANKED", 10)
        db.define("E", {"n": "int"})
        for n in range(60):
            db.record("E", f"{n:02}", {"n": n})
            db.index("E", f"{n:02}", "words", None)
        assert db.ids(where={"n": 59}) == ["59"]
        assert len(db.ids(limit=60)) == 60


class TestAnyQuery:
    @pytest.fixture
    def reader(self) -> Iterator[SqliteReader]:
        database = Database("sqlite", sqlite3.connect(":memory:", isolation_level=None))
        database.create_index()
        database.index("E", "1", 'some words, a (few) of "them": AND OR NOT 1 2 x y é', None)
        yield SqliteReader(database.connection)
        database.connection.close()

    @given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES)).map("".join))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
    def test_sqlite_answers_every_string(self, reader: SqliteReader, text: str) -> None:
        hits = reader.keyword(parse_query(text), resolve_scope([], (), None), 10)
        assert [hit.key for hit in hits] in ([], [("E", "1")])

    @pytest.fixture
    def postgresql_reader(self, postgresql: Database) -> PostgresqlReader:
        postgresql.create_index()
        postgresql.index("E", "1", 'some words, a (few) of "them": AND OR NOT 1 2 x y é', None)
        return PostgresqlReader(postgresql.connection)

    @given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES)).map("".join))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
    def test_postgresql_answers_every_string(self, postgresql_reader: PostgresqlReader, text: str) -> None:
        hits = postgresql_reader.keyword(parse_query(text), resolve_scope([], (), None), 10)
        assert [hit.key for hit in hits] in ([], [("E", "1")])


class TestSqliteCache:
    @pytest.fixture(autouse=True)
    def _matrix_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite_vectors, "load_sqlite_vec", lambda connection: False)

    @pytest.fixture
    def indexed(self, sqlite: Database) -> Database:
        sqlite.create_index()
        for axis in range(4):
            sqlite.index("E", str(axis), "words", unit(axis), updated_at=f"2026-03-01 12:00:0{axis}.000000")
        return sqlite

    @staticmethod
    def nearest(reader: SearchReader, axis: int) -> str:
        return search(reader, "q", query_vector=unit(axis), mode="vector", limit=1)[0].id

    @pytest.mark.parametrize("own", [True, False])
    def test_every_change_is_seen_by_the_next_search(self, indexed: Database, tmp_path: Path, own: bool) -> None:
        reader = indexed.reader()
        assert self.nearest(reader, 3) == "3"
        other = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
        writer = Database("sqlite", indexed.connection if own else other)
        writer.run("DELETE FROM kdb_search WHERE record_id = '3'")
        assert self.nearest(reader, 3) != "3"
        writer.index("E", "new", "words", unit(3), updated_at=LATER)
        assert self.nearest(reader, 3) == "new"
        writer.run("UPDATE kdb_search SET embedding = ?, updated_at = ? WHERE record_id = '0'", json.dumps([0, 0, 0, 0, 0, 1, 0, 0]), LATER)  # noqa: E501  # fmt: skip
        assert self.nearest(reader, 5) == "0"
        writer.index("F", "none yet", "words", None, updated_at=LATER)
        writer.run("UPDATE kdb_search SET embedding = '[0,0,0,0,0,0,1,0]', updated_at = '2026-03-02' WHERE record_id = 'none yet'")  # noqa: E501  # fmt: skip
        assert self.nearest(reader, 6) == "none yet"
        writer.run("DELETE FROM kdb_search")
        assert search(reader, "q", query_vector=unit(0), mode="vector") == []
        other.close()

    def test_two_writes_within_one_second_are_told_apart(self, indexed: Database) -> None:
        reader = indexed.reader()
        for axis in (4, 5, 6):
            vector = json.dumps(unit(axis).tolist())
            indexed.run("UPDATE kdb_search SET embedding = ?, updated_at = '2026-03-01 12:30:00' WHERE record_id = '0'", vector)  # noqa: E501  # fmt: skip
            assert self.nearest(reader, axis) == "0"

    def test_a_change_that_is_rolled_back_is_forgotten(self, indexed: Database) -> None:
        reader = indexed.reader()
        indexed.run("BEGIN")
        indexed.run("DELETE FROM kdb_search WHERE record_id = '2'")
        assert self.nearest(reader, 2) != "2"
        indexed.run("ROLLBACK")
        assert self.nearest(reader, 2) == "2"

    def test_a_search_leaves_no_transaction_open(self, indexed: Database) -> None:
        self.nearest(indexed.reader(), 0)
        assert not indexed.connection.in_transaction

    def test_nothing_is_read_again_while_nothing_is_written(
        self, indexed: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = indexed.reader()
        self.nearest(reader, 0)
        monkeypatch.setattr(sqlite_vectors.ExactVectorSearch, "_read", None)
        assert [self.nearest(reader, axis) for axis in range(4)] == list("0123")

    def test_only_changed_rows_are_read_again(self, indexed: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        reader = indexed.reader()
        self.nearest(reader, 0)
        read: list[Any] = []
        original = sqlite_vectors.ExactVectorSearch._read

        def spy(self: Any, dimensions: int, rowids: Any) -> Any:
            read.append(rowids)
            return original(self, dimensions, rowids)

        monkeypatch.setattr(sqlite_vectors.ExactVectorSearch, "_read", spy)
        indexed.index("E", "9", "words", unit(7), updated_at=LATER)
        assert self.nearest(reader, 7) == "9"
        assert read == [[5]]

    def test_the_float_copy_counts_only_while_it_is_as_new_as_the_row(self, indexed: Database) -> None:
        def copy(rowid: int, axis: int, at: str, search_id: str) -> None:
            values = (rowid, search_id, at, unit(axis).astype("<f4").tobytes())
            indexed.run(
                "INSERT INTO kdb_fast_vectors (search_rowid, search_id, at, vector) VALUES (?, ?, ?, ?)", *values
            )

        copy(1, 4, "2026-03-01 12:00:00.000000", "E/0")  # true: KameleonDB's JSON is not read
        copy(2, 5, "2026-03-01 11:00:00.000000", "E/1")  # of an older text
        copy(3, 6, "2026-03-01 12:00:02.000000", "E/1")  # of another row
        reader = indexed.reader()
        assert [self.nearest(reader, axis) for axis in (4, 1, 2, 3)] == ["0", "1", "2", "3"]

    @pytest.mark.parametrize(
        "broken", ["", "no json", "[1, 2]", "[[1]]", '["a"]', "{}", "[1e999, 0, 0, 0, 0, 0, 0, 0]", b"\xff\x00"]
    )
    def test_a_broken_embedding_hides_only_its_own_row(self, indexed: Database, broken: str | bytes) -> None:
        indexed.run("UPDATE kdb_search SET embedding = ? WHERE record_id = '1'", broken)
        assert indexed.ids(mode="vector", limit=10) == ["0", "2", "3"]

    def test_too_many_vectors_for_the_memory_are_read_in_blocks(
        self, sqlite: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sqlite.create_index()
        vectors = random_vectors(100)
        for row, vector in enumerate(vectors):
            sqlite.index("E" if row % 3 else "F", f"{row:02}", "words", vector)
        query = random_vectors(1, seed=9)[0]
        whole = sqlite.search(vector=query, mode="vector", limit=20)
        some = sqlite.search(vector=query, mode="vector", entities=["F"], limit=20)
        monkeypatch.setattr(sqlite_vectors, "CACHE_BYTES", 0)
        monkeypatch.setattr(sqlite_vectors, "BLOCK_ROWS", 7)
        assert sqlite.search(vector=query, mode="vector", limit=20) == whole
        assert sqlite.search(vector=query, mode="vector", entities=["F"], limit=20) == some
        assert [int(r.id) for r in whole] == nearest(vectors, query, range(100))[:20]


def why_no_sqlite_vec() -> str:
    """Why sqlite-vec cannot be loaded here; empty where it can."""
    try:
        import sqlite_vec  # noqa: F401
    except ImportError:
        return "sqlite-vec is not installed"
    if not hasattr(sqlite3.Connection, "enable_load_extension"):
        return "this Python's sqlite3 is built without loading of extensions"
    return ""


class TestSqliteVec:
    """The same rankings through sqlite-vec, through the matrix, and by brute force."""

    pytestmark = pytest.mark.skipif(bool(why_no_sqlite_vec()), reason=why_no_sqlite_vec() or "it is there")

    @pytest.fixture(params=["float32 copies", "JSON text", "some of both"])
    def vectors(self, request: pytest.FixtureRequest, sqlite: Database) -> npt.NDArray[np.float32]:
        sqlite.create_index()
        sqlite.create_kameleon()
        vectors = fill(sqlite)
        for row, vector in enumerate(vectors):
            if request.param == "float32 copies" or (request.param == "some of both" and row % 3):
                at = AT if row % 7 else EARLIER  # one that is older than its row does not count
                copy = vector if row % 7 else -vector
                sqlite.run(
                    "INSERT INTO kdb_fast_vectors SELECT rowid, id, ?, ? FROM kdb_search WHERE record_id = ?",
                    at, copy.tobytes(), f"{row:03}",
                )  # fmt: skip
        return vectors

    @staticmethod
    def by_matrix(db: Database, **options: Any) -> list[SearchResult]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite_vectors, "load_sqlite_vec", lambda connection: False)
            return db.search(mode="vector", **options)

    @staticmethod
    def by_sqlite_vec(db: Database, **options: Any) -> list[SearchResult]:
        """The first search of a reader, which must not have read all rows."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite_vectors.ExactVectorSearch, "_blocks", None)
            return db.search(mode="vector", **options)

    @pytest.mark.parametrize(
        ("options", "among"),
        [
            ({}, range(ROWS)),
            ({"limit": 60}, range(ROWS)),
            ({"entities": ["Odd"]}, range(1, ROWS, 2)),
            ({"entities": ["Even", "Odd"]}, range(ROWS)),
            ({"where": {"group": 7}}, range(7, ROWS, 40)),
            ({"where": {"group": 6}, "entities": ["Even"], "limit": 3}, range(6, ROWS, 40)),
        ],
    )
    def test_both_ways_give_the_ranking_of_brute_force(
        self, sqlite: Database, vectors: npt.NDArray[np.float32], options: dict[str, Any], among: range
    ) -> None:
        for query in random_vectors(5, seed=11):
            found = self.by_sqlite_vec(sqlite, vector=query, **options)
            assert [int(r.id) for r in found] == nearest(vectors, query, among)[: options.get("limit", 10)]
            assert found == self.by_matrix(sqlite, vector=query, **options)

    def test_deleted_records_and_dropped_entities_leave_their_places_to_others(
        self, sqlite: Database, vectors: npt.NDArray[np.float32]
    ) -> None:
        query = random_vectors(1, seed=12)[0]
        order = nearest(vectors, query, range(0, ROWS, 2))
        sqlite.run("UPDATE kdb_entity_definitions SET is_active = 0 WHERE name = 'Odd'")
        for row in order[:150]:
            sqlite.run("UPDATE kdb_records SET is_deleted = 1 WHERE id = ?", f"{row:03}")
        found = self.by_sqlite_vec(sqlite, vector=query, limit=40)
        assert [int(r.id) for r in found] == order[150:190]
        assert found == self.by_matrix(sqlite, vector=query, limit=40)

    def test_equal_vectors_come_in_the_order_of_their_keys(
        self, sqlite: Database, vectors: npt.NDArray[np.float32]
    ) -> None:
        query = random_vectors(1, seed=13)[0]
        twin = json.dumps((query + np.float32(0.01)).tolist())
        sqlite.run("UPDATE kdb_search SET embedding = ?, updated_at = ? WHERE rowid % 9 = 0", twin, LATER)
        twins = [row for row in range(ROWS) if (row + 1) % 9 == 0]
        found = self.by_sqlite_vec(sqlite, vector=query, limit=len(twins) + 5)
        assert [r.id for r in found[: len(twins)]] == [f"{r:03}" for r in sorted(twins, key=lambda r: (r % 2, r))]
        assert found == self.by_matrix(sqlite, vector=query, limit=len(twins) + 5)

    def test_from_the_second_search_on_the_matrix_is_used_if_it_is_not_too_large(
        self, sqlite: Database, vectors: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = SqliteReader(sqlite.connection)
        query = random_vectors(1, seed=14)[0]
        matrices = []
        for size in (sqlite_vectors.CACHE_BYTES, sqlite_vectors.CACHE_BYTES, 0, sqlite_vectors.CACHE_BYTES):
            monkeypatch.setattr(sqlite_vectors, "CACHE_BYTES", size)
            sqlite.run("UPDATE kdb_search SET updated_at = ? WHERE record_id = '000'", LATER)
            found = search(reader, "q", query_vector=query, mode="vector")
            assert [int(r.id) for r in found] == nearest(vectors, query, range(ROWS))[:10]
            matrices.append(reader._vectors._block is not None)
        assert matrices == [False, True, False, True]
        assert not sqlite.connection.in_transaction

    @pytest.mark.parametrize("broken", ["", "no json", "[1, 2]", "[1e999, 0, 0, 0, 0, 0, 0, 0]", b"\xff\x00" * 16])
    def test_a_broken_embedding_hides_only_its_own_row(
        self, sqlite: Database, vectors: npt.NDArray[np.float32], broken: str | bytes
    ) -> None:
        sqlite.run("UPDATE kdb_search SET embedding = ?, updated_at = ? WHERE record_id = '005'", broken, LATER)
        found = [int(r.id) for r in sqlite.search(mode="vector", limit=ROWS)]
        assert found == nearest(vectors, unit(0), [row for row in range(ROWS) if row != 5])

    def test_a_query_of_another_length_is_refused(self, sqlite: Database, vectors: npt.NDArray[np.float32]) -> None:
        with pytest.raises(UsageError, match="The query vector has 3 numbers, the vectors of the index have 8"):
            sqlite.search(mode="vector", vector=np.ones(3, np.float32))

    def test_no_extension_can_be_loaded_by_sql_afterwards(
        self, sqlite: Database, vectors: npt.NDArray[np.float32]
    ) -> None:
        sqlite.search(mode="vector")
        with pytest.raises(sqlite3.OperationalError, match="not authorized"):
            sqlite.run("SELECT load_extension('vec0')")


class TestWithoutSqliteVec:
    @pytest.mark.parametrize("missing", ["package", "right", "library"])
    def test_numpy_takes_over_without_a_word(
        self, sqlite: Database, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, missing: str
    ) -> None:
        class Refusing(sqlite3.Connection):
            def enable_load_extension(self, enabled: bool, /) -> None:
                if missing == "right":
                    raise sqlite3.NotSupportedError("not compiled in")

        def load(connection: sqlite3.Connection) -> None:
            raise sqlite3.OperationalError("no such file")

        monkeypatch.setitem(sys.modules, "sqlite_vec", None if missing == "package" else SimpleNamespace(load=load))
        sqlite.create_index()
        for axis in range(4):
            sqlite.index("E", str(axis), "words", unit(axis))
        (path,) = [row[2] for row in sqlite.run("PRAGMA database_list") if row[1] == "main"]
        connection = sqlite3.connect(path, isolation_level=None, factory=Refusing)
        assert not sqlite_vectors.load_sqlite_vec(connection)
        reader = SqliteReader(connection)
        assert search(reader, "q", query_vector=unit(2), mode="vector")[0].id == "2"
        assert reader._vectors._block is not None
        assert len(recwarn) == 0
        connection.close()

    def test_a_reader_for_one_search_finds_the_same_without_a_matrix(
        self, sqlite: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_vectors, "load_sqlite_vec", lambda connection: False)
        monkeypatch.setattr(sqlite_vectors, "BLOCK_ROWS", 64)
        sqlite.create_index()
        sqlite.create_kameleon()
        vectors = fill(sqlite)
        query = random_vectors(1, seed=15)[0]
        # So many of the nearest are gone that the rows of living records are ranked.
        for row in nearest(vectors, query, range(ROWS))[:200]:
            sqlite.run("UPDATE kdb_records SET is_deleted = 1 WHERE id = ?", f"{row:03}")
        for options in ({}, {"entities": ["Odd"]}, {"limit": 40}):
            once, kept = SqliteReader(sqlite.connection, once=True), SqliteReader(sqlite.connection)
            found = search(once, "q", query_vector=query, mode="vector", **options)
            assert found
            assert found == search(kept, "q", query_vector=query, mode="vector", **options)
            assert once._vectors._block is None
            assert kept._vectors._block is not None

    def test_the_callers_connection_in_memory_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded: list[Any] = []
        monkeypatch.setitem(sys.modules, "sqlite_vec", SimpleNamespace(load=loaded.append))
        connection = sqlite3.connect(":memory:")
        assert not sqlite_vectors.load_sqlite_vec(connection)
        assert loaded == []
        connection.close()


class TestStatus:
    def test_every_number_is_counted(self, db: Database) -> None:
        db.define("Shared", {"title": "string", "size": "int", "body": "text"})
        db.define("Moved", {"title": "string"}, table="kdb_moved")
        db.define("Numbers", {"size": "int"})
        for entity in ("Shared", "Moved"):
            text = {"title": "t"}
            db.record(entity, f"{entity} done", text)
            db.record(entity, f"{entity} new", text)
            db.record(entity, f"{entity} updated", text, at=LATER)
            db.record(entity, f"{entity} old model", text)
            db.record(entity, f"{entity} rewritten", text, at="2026-03-01 12:30:00.000000")
            db.record(entity, f"{entity} no vector", text)
            db.record(entity, f"{entity} rejected", text)
            db.record(entity, f"{entity} deleted", text, deleted=True)
            db.record(entity, f"{entity} empty", {"title": ""})
            db.record(entity, f"{entity} null", {"title": None})
            for record in ("done", "updated", "deleted", "gone"):
                db.index_ours(entity, f"{entity} {record}", "t", unit(0))
            db.index_ours(entity, f"{entity} old model", "t", unit(0), kdb_fast_fingerprint="old")
            # KameleonDB wrote this one after us, and after the record's last change.
            db.index_ours(entity, f"{entity} rewritten", "t", unit(0), updated_at=LATER)
            db.index(entity, f"{entity} no vector", "t", None)
            db.run(
                "INSERT INTO kdb_fast_rejects (key, key_hash, content_hash, reason, detail, run) "
                "VALUES (?, ?, ?, 'empty_text', '', 1)",
                key_json((entity, f"{entity} rejected")), entity.encode(), b"x",
            )  # fmt: skip
        db.record("Moved", "Moved late", {"title": "t"}, shared=True)
        db.record("Numbers", "n", {"size": 1})
        db.index("File", "theirs", "t", unit(0))
        db.index_ours("File", "ours", "t", unit(0))
        expected = [
            EntityStatus("File", 2, None, 1, 0, datetime(2026, 3, 1, 12, tzinfo=UTC)),
            EntityStatus("Moved", 6, 4, 2, 1, datetime(2026, 3, 1, 13, tzinfo=UTC)),
            EntityStatus("Numbers", 0, 0, 0, 0, None),
            EntityStatus("Shared", 6, 3, 2, 1, datetime(2026, 3, 1, 13, tzinfo=UTC)),
        ]
        assert statuses(db.connection, db.dialect, "now") == expected

    def test_without_a_fingerprint_that_of_the_newest_run_counts(self, db: Database) -> None:
        db.index_ours("File", "1", "t", unit(0))
        db.index_ours("File", "2", "t", unit(0), kdb_fast_fingerprint="older")
        db.index("File", "3", "t", unit(0))
        assert [s.stale for s in statuses(db.connection, db.dialect, None)] == [3]
        for fingerprint in ("older", "now"):
            db.run(
                "INSERT INTO kdb_fast_runs (state, fingerprint, model, dimensions, host, pid, process_started) "
                "VALUES ('done', ?, 'm', 8, 'h', 1, 0)",
                fingerprint,
            )
        assert [s.stale for s in statuses(db.connection, db.dialect, None)] == [2]
        assert [s.stale for s in statuses(db.connection, db.dialect, "older")] == [2]
        assert [s.stale for s in statuses(db.connection, db.dialect, "neither")] == [3]

    def test_an_index_that_only_kameleondb_has_written_is_stale_and_pending_by_its_times(self, empty: Database) -> None:
        empty.create_index(own=False)
        empty.create_kameleon()
        empty.define("E", {"title": "string"})
        empty.record("E", "1", {"title": "t"}, at=EARLIER)
        empty.record("E", "2", {"title": "t"}, at=LATER)
        empty.index("E", "1", "t", unit(0), updated_at=None)
        empty.index("E", "2", "t", unit(0), updated_at=None)
        assert statuses(empty.connection, empty.dialect, "now") == [
            EntityStatus("E", 2, 1, 2, 0, datetime(2026, 3, 1, 12, tzinfo=UTC))
        ]

    def test_a_database_without_tables_has_no_status_and_without_an_index_all_is_pending(self, empty: Database) -> None:
        assert statuses(empty.connection, empty.dialect, None) == []
        empty.create_kameleon()
        empty.define("E", {"title": "string"})
        empty.define("Dropped", {"title": "string"}, active=False)
        empty.record("E", "1", {"title": "t"})
        empty.record("E", "2", {"title": "t"}, deleted=True)
        assert statuses(empty.connection, empty.dialect, "x") == [EntityStatus("E", 0, 1, 0, 0, None)]

    @pytest.mark.parametrize(
        ("record", "row", "pending"),
        [
            ("2026-03-01T12:00:00.000000+00:00", "2026-03-01 12:00:00", 0),
            ("2026-03-01 12:00:00.250000", "2026-03-01T12:00:00+00:00", 1),
            ("2026-03-01 12:00:00", "2026-03-01T12:00:00.250000", 0),
            ("2026-03-01T14:00:00+02:00", "2026-03-01 12:00:00.000000", 0),
            ("2026-03-01T12:00:01Z", "2026-03-01 12:00:00.990000", 1),
        ],
    )
    def test_sqlite_reads_every_form_of_timestamp(self, sqlite: Database, record: str, row: str, pending: int) -> None:
        sqlite.create_index()
        sqlite.create_kameleon()
        sqlite.define("E", {"title": "string"})
        sqlite.record("E", "1", {"title": "t"}, at=record)
        sqlite.index_ours("E", "1", "t", unit(0), kdb_fast_source_at=row, updated_at=row, kdb_fast_at=row)
        (status,) = statuses(sqlite.connection, "sqlite", "now")
        assert (status.pending, status.stale) == (pending, 0)
        assert status.last_updated is not None
        assert status.last_updated.utcoffset() is not None


class TestRealKameleonDB:
    @pytest.mark.parametrize("materialized", [False, True])
    def test_its_own_records_are_found_and_filtered(self, sqlite: Database, tmp_path: Path, materialized: bool) -> None:
        kameleondb = pytest.importorskip("kameleondb")
        client = kameleondb.KameleonDB(f"sqlite:///{tmp_path / 'test.db'}")
        names = {"name": "string", "price": "float", "stock": "bool"}
        products = client.create_entity("Product", fields=[{"name": n, "type": t} for n, t in names.items()])
        ids = [products.insert({"name": f"phone {n}", "price": n * 1.5, "stock": n == 1}) for n in range(3)]
        if materialized:
            client.materialize_entity("Product")
            ids.append(products.insert({"name": "phone 3", "price": 4.5, "stock": False}))
        products.delete(ids[0]) if not materialized else None
        client.close()
        sqlite.create_index()
        for record_id in ids:
            sqlite.index("Product", record_id, "name: phone", unit(0))
        found = {r.id: r.data for r in sqlite.search("phone", unit(0))}
        assert set(found) == set(ids if materialized else ids[1:])
        assert found[ids[1]] == {"name": "phone 1", "price": 1.5, "stock": True}
        assert sqlite.ids("phone", where={"stock": True}) == [ids[1]]
        assert sqlite.ids("phone", where={"price": 3}) == [ids[2]]
        (status,) = statuses(sqlite.connection, "sqlite", None)
        assert (status.entity, status.indexed) == ("Product", len(ids))


def codes(number: int) -> str:
    """A record of a log, of which the next one differs in little more than the code."""
    who = ("Anna", "Ben", "Cleo", "Dan", "Eve")[number % 5]
    what = ("boiler", "chiller", "dryer", "feeder", "grinder", "heater", "mixer")[number % 7]
    verb = ("checks", "opens", "cleans", "replaces")[number % 4]
    return f"{who} {verb} the {what} and says the pump restarts every hour with code ERR_CONN_{1000 + number}"


IDENTIFIERS: dict[str, Callable[[int], str]] = {
    "error code": lambda n: f"ERR_CONN_{1000 + n}",
    "hyphenated code": lambda n: f"ERR-{1000 + n}",
    "SKU": lambda n: f"AB-{1000 + n}-X",
    "e-mail address": lambda n: f"user{1000 + n}@example.org",
    "path": lambda n: f"/srv/pumps/{1000 + n}/start.log",
    "dotted name": lambda n: f"pump.unit{1000 + n}.restart",
    "version": lambda n: f"3.{1000 + n}.7",
    "UUID": lambda n: f"550e8400-e29b-41d4-a716-44665544{1000 + n}",
    "phone number": lambda n: f"555-{1000 + n}",
    "hash": lambda n: f"#{1000 + n}",
    "key and value": lambda n: f"unit:{1000 + n}",
    "number": lambda n: str(1000 + n),
    "quoted phrase": lambda n: f'"unit {1000 + n} of hall"',
}


class TestIdentifiers:
    """A record that holds the identifier of a query is before all that only resemble it."""

    ROWS = 120

    def fill(self, db: Database, identifier: Any) -> None:
        db.run("BEGIN")
        for row, vector in enumerate(random_vectors(self.ROWS)):
            text = codes(row).rpartition(" ")[0] + " " + identifier(row).replace('"', "")
            db.index("Log", f"{row:03}", text, vector)
        db.run("COMMIT")

    @pytest.mark.parametrize("kind", IDENTIFIERS)
    def test_exact_identifier_comes_first(self, db: Database, kind: str) -> None:
        identifier = IDENTIFIERS[kind]
        self.fill(db, identifier)
        vectors = random_vectors(6, seed=21)  # near to other records than the one that is meant
        for row, vector in zip((11, 47, 63, 88, 100, 119), vectors, strict=True):
            queries = [identifier(row), f"pump restarts with {identifier(row)}"]
            if kind != "number":  # a bare number may count anything
                queries.append(f"why does {identifier(row)} stop?")
            for query in queries:
                found = db.search(query, vector, limit=3)
                assert found[0].id == f"{row:03}", query
                assert found[0].score >= 1 / 61
                assert db.ids(query, mode="keyword") == [f"{row:03}"], "near misses are no answers"

    def test_scores_fall_along_the_results_and_keep_their_scale(self, db: Database) -> None:
        self.fill(db, IDENTIFIERS["error code"])
        for row, vector in zip((11, 47), random_vectors(2, seed=22), strict=True):
            scores = [r.score for r in db.search(f"ERR_CONN_{1000 + row}", vector, limit=50)]
            assert scores == sorted(scores, reverse=True)
            assert scores[0] <= 2 / 61
            assert all(score <= 1 / 61 for score in scores[1:])

    def test_unknown_identifier_finds_what_resembles_it(self, db: Database) -> None:
        self.fill(db, IDENTIFIERS["error code"])
        assert len(db.ids("ERR_CONN_9999", mode="keyword", limit=50)) == 50

    def test_several_identifiers_are_all_asked_for(self, db: Database) -> None:
        db.index("Log", "one", "AB-1234 was sent to jo@example.org", unit(1))
        db.index("Log", "two", "AB-1234 was sent to mo@example.org", unit(0))
        db.index("Log", "three", "AB-1235 was sent to jo@example.org", unit(0))
        assert db.ids("who got AB-1234 and jo@example.org", unit(0))[0] == "one"
        assert set(db.ids("AB-1234 or AB-1235", mode="keyword")) == {"one", "two", "three"}

    def test_queries_without_an_identifier_keep_their_ranks(self, db: Database) -> None:
        self.fill(db, IDENTIFIERS["error code"])
        reader, scope = db.reader(), resolve_scope([], (), None)
        for text in ("pump restarts", "Anna cleans nosuchword", "why does the pump stop", "boiler or mixer"):
            query = parse_query(text)
            every, some = reader._with_all(query, scope, 50), reader._with_any(query, scope, 50)
            merged = dict.fromkeys(hit.key for hit in [*every, *some])
            found = reader.keyword(query, scope, 50)
            assert [hit.key for hit in found] == list(merged)[:50]
            assert not any(hit.exact for hit in found)


class TestExclusions:
    """A word behind a dash is in no result, whatever the mode and the filter."""

    @pytest.fixture
    def texts(self, db: Database) -> Database:
        db.define("E", {"n": "int"})
        for n, content in enumerate(
            ["red pump", "blue pump", "red valve", "blue valve", "blue two words", "two blue words"]
        ):
            db.record("E", str(n), {"n": n % 2})
            db.index("E", str(n), content, unit(0, 1, n / 10))
            db.index("File", str(n), content, unit(0, 1, n / 10))
        return db

    @pytest.mark.parametrize("mode", ["hybrid", "vector", "keyword"])
    def test_excluded_words_are_in_no_result(self, texts: Database, mode: str) -> None:
        cases = {
            "pump -blue": {"0"} | ({"2"} if mode != "keyword" else set()),
            "pump or valve -red": {"1", "3"} | ({"4", "5"} if mode != "keyword" else set()),
            'blue -"two words" -valve': {"1", "5"} | ({"0"} if mode != "keyword" else set()),
            "blue -the -valve -pump": {"4", "5"},
        }
        for query, expected in cases.items():
            for entities in (["E"], ["File"], []):
                assert set(texts.ids(query, unit(0), mode=mode, entities=entities, limit=20)) == expected, query

    def test_filters_and_exclusions_work_together(self, texts: Database) -> None:
        for mode in ("hybrid", "vector", "keyword"):
            assert set(texts.ids("pump -red", unit(0), mode=mode, where={"n": 1}, entities=["E"])) >= {"1"}
            assert "3" not in texts.ids("pump -valve", unit(0), mode=mode, where={"n": 1})

    def test_exclusions_still_fill_the_limit(self, db: Database) -> None:
        for row, vector in enumerate(random_vectors(200)):
            db.index("File", f"{row:03}", "odd words" if row % 8 else "even words", vector)
        found = db.ids("words -odd", unit(0), mode="vector", limit=25)
        assert sorted(found) == [f"{row:03}" for row in range(0, 200, 8)]

    def test_what_is_excluded_is_not_embedded(self) -> None:
        assert meaning('pump -blue -"two words" room -20') == "pump   room -20"
        assert meaning("comma-separated - values") == "comma-separated   values"
        assert meaning('-pump -"two words"') == ""

    def test_query_of_exclusions_only_finds_nothing(self, texts: Database) -> None:
        for mode in ("hybrid", "vector", "keyword"):
            assert texts.ids('-pump -"two words"', unit(0), mode=mode) == []

    @pytest.mark.parametrize("query", ["temperature -20", "-20", "temperature -20 -warm", "-20°C"])
    def test_dash_before_a_digit_is_a_sign(self, db: Database, query: str) -> None:
        db.index("File", "cold", "temperature -20 °C" if "°" not in query else "temperature -20°C", unit(0))
        db.index("File", "warm", "temperature warm", unit(0, 1, 1.0))
        for mode in ("hybrid", "keyword", "vector"):
            assert db.ids(query, unit(0), mode=mode)[0] == "cold"
        assert db.ids('temperature -"20"', mode="keyword") == (["cold", "warm"] if db.postgresql else ["warm"])


def differences() -> list[Any]:
    """The lines of the table in docs/search.md: text, query, and whether each database finds it."""
    page = Path(__file__).parents[2] / "docs" / "search.md"
    lines = page.read_text(encoding="utf-8").partition("## Where the databases differ")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return [pytest.param(*(c.strip("`") for c in cell[:4]), id=f"{cell[1]} in {cell[0]}") for cell in cells]


@pytest.mark.parametrize(("text", "query", "in_postgresql", "in_sqlite"), differences())
def test_databases_find_what_the_documents_say(
    db: Database, text: str, query: str, in_postgresql: str, in_sqlite: str
) -> None:
    db.index("File", "1", text, None)
    expected = in_postgresql if db.postgresql else in_sqlite
    assert ("found" if db.ids(query, mode="keyword") else "not found") == expected


class TestTwoModels:
    """Each row is ranked by vector only against a query of its own model."""

    A, B = Maker("aaaa", "publisher/first", DIMENSIONS), Maker("bbbb", "second", DIMENSIONS)

    def fill(self, db: Database, second: range) -> npt.NDArray[np.float32]:
        """400 rows, those of ``second`` by the model B."""
        vectors = random_vectors(ROWS, seed=31)
        db.run("BEGIN")
        for row, vector in enumerate(vectors):
            maker, suffix = (self.B, "") if row in second else (self.A, "-int8" if row % 2 else "")
            columns = {"kdb_fast_fingerprint": maker.fingerprint + suffix, "model": maker.model}
            db.index_ours("Second" if row in second else "First", f"{row:03}", "words", vector, **columns)
        db.run("COMMIT")
        return vectors

    @pytest.mark.parametrize("second", [range(0, ROWS, 2), range(7, ROWS, 20), range(5, 8)])
    def test_each_row_meets_the_query_of_its_model_only(self, db: Database, second: range) -> None:
        vectors = self.fill(db, second)
        first = [row for row in range(ROWS) if row not in second]
        for a, b in zip(random_vectors(3, seed=32), random_vectors(3, seed=33), strict=True):
            both = [QueryVector(a, self.A), QueryVector(b, self.B)]
            given: list[dict[str, Any]] = [{}, {"entities": ["First", "Second"]}, {"limit": 40}]
            for options in given:
                found = db.search("q", both, mode="vector", **options)
                limit = options.get("limit", 10)
                expected = {
                    (f"{row:03}", 1 / (61 + place))
                    for order in (nearest(vectors, a, first), nearest(vectors, b, second))
                    for place, row in enumerate(order[:limit])
                }
                right = sum((result.id, result.score) in expected for result in found)
                assert right >= (len(found) if not db.postgresql else 0.9 * len(found))
                assert found[0].score == found[1].score == 1 / 61
            only = [int(i) for i in db.ids("q", [QueryVector(b, self.B)], mode="vector", limit=len(second))]
            assert only == nearest(vectors, b, second)

    def test_another_model_takes_no_place_in_the_ranking(self, db: Database) -> None:
        for row in range(300):  # nearer to the query than any row of its own model
            db.index_ours("First", f"a{row:03}", "words", unit(0), kdb_fast_fingerprint="aaaa", model="first")
        for row in range(5):
            near = unit(1, 2, row / 10)
            db.index_ours("Second", f"b{row}", "words", near, kdb_fast_fingerprint="bbbb", model="second")
        query = [QueryVector(unit(0, 1, 0.1), self.B)]
        assert db.ids("q", query, mode="vector") == [f"b{row}" for row in range(5)]

    def test_rows_of_other_programs_are_known_by_the_name_of_their_model(self, db: Database) -> None:
        db.index("E", "named", "words", unit(0), model="first")
        db.index("E", "other", "words", unit(0), model="second")
        db.index("E", "nobody", "words", unit(0))
        # KameleonDB rewrote this one after us: what we wrote beside it is not true any more.
        db.index_ours("E", "rewritten", "words", unit(0), kdb_fast_fingerprint="bbbb", model="first", updated_at=LATER)
        db.index_ours("E", "files", "words", unit(0), kdb_fast_fingerprint="cccc", model="first")
        db.index_ours("E", "own provider", "words", unit(0), kdb_fast_fingerprint="name:0123", model="First")
        found = db.ids("q", [QueryVector(unit(0), self.A)], mode="vector")
        assert sorted(found) == ["named", "own provider", "rewritten"]
        own = Maker("name:4567", "first", DIMENSIONS)
        found = db.ids("q", [QueryVector(unit(0), own)], mode="vector")
        assert sorted(found) == ["files", "named", "own provider", "rewritten"]
        counts = {origin: rows for (_, origin), rows in db.reader().origins().items()}
        assert sum(counts.values()) == 6
        assert [sum(n for o, n in counts.items() if maker.has_made(o)) for maker in (self.A, own)] == [3, 4]

    def test_index_that_only_kameleondb_has_written_is_compared_by_name(self, empty: Database) -> None:
        empty.create_index(own=False)
        empty.index("E", "1", "words", unit(0), model="first")
        empty.index("E", "2", "words", unit(0), model="second")
        assert empty.ids("q", [QueryVector(unit(0), self.A)], mode="vector") == ["1"]

    def test_counts_follow_what_is_written(self, db: Database) -> None:
        reader = db.reader()
        assert reader.origins() == {}
        for row in range(3):
            db.index_ours("E", str(row), "words", unit(0), kdb_fast_fingerprint="aaaa", model="first")
            reader._count_again = 0.0  # on a busy machine counting may have taken long
            reader._count_again = 0.0  # on a busy machine counting may have taken long
            assert reader.origins() == {("E", Origin("aaaa", "first", DIMENSIONS)): row + 1}

    def test_database_without_an_index_has_nothing_to_count(self, empty: Database) -> None:
        with pytest.raises(SchemaError, match="There is no search index"):
            empty.reader().origins()

    def test_vector_index_is_used_through_the_filter(
        self, postgresql: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        postgresql.create_index()
        postgresql.create_kameleon()
        self.fill(postgresql, range(0, ROWS, 2))
        postgresql.run("ANALYZE kdb_search")
        reader = postgresql.reader()
        plans = explained_rankings(reader, monkeypatch)
        # Without the filter the planner takes the index for this table as well, so it is not turned away by it.
        postgresql.run("SET enable_seqscan = off")
        postgresql.run("SET enable_bitmapscan = off")
        search(reader, "q", query_vector=[QueryVector(unit(0), self.B)], mode="vector")
        assert len(plans) == 1
        assert "Index Scan using ix_kdb_search_vector" in plans[0]
        assert "Sort" not in plans[0]


class TestScale:
    """What can be reached by a score, and what a query must hold to be one."""

    @pytest.mark.parametrize(
        ("mode", "best"), [("hybrid", 2 / 61), ("vector", 1 / 61), ("keyword", 1 / 61)]
    )  # fmt: skip
    def test_best_score_of_each_mode_is_reached_and_no_more(self, db: Database, mode: str, best: float) -> None:
        db.index("File", "1", "words", unit(0))
        (found,) = db.search("words", unit(0), mode=mode, min_score=best)
        assert found.score == best
        check_query("words", mode, best)
        check_query("words", mode, 0.0)
        for value in (math.nextafter(best, 1), 0.5, 1.0, -0.001, math.nan, math.inf, -math.inf):
            with pytest.raises(UsageError, match=r"--min-score is .*; expected 0 to 0\.0(3278|1639)"):
                check_query("words", mode, value)

    def test_score_that_is_no_number_is_refused(self, db: Database) -> None:
        with pytest.raises(UsageError, match="min_score is nan"):
            db.search(min_score=math.nan)

    @pytest.mark.parametrize("mode", ["hybrid", "vector", "keyword"])
    @pytest.mark.parametrize(
        "query", ["", "   ", "\n\t", "???", "-", "- -", '""', '"-"', "\x00", "…—«»", "___", "!?*&"]
    )
    def test_blank_query_is_told(self, query: str, mode: str) -> None:
        with pytest.raises(UsageError, match="The query is blank"):
            check_query(query, mode, 0.0)
        assert meaning(query) == ""

    @pytest.mark.parametrize("mode", ["hybrid", "vector", "keyword"])
    def test_query_that_only_excludes_is_told(self, mode: str) -> None:
        with pytest.raises(UsageError, match="only excludes"):
            check_query('-pump -"two words"', mode, 0.0)

    def test_signs_have_a_meaning_but_are_no_keywords(self) -> None:
        check_query("🎧", "vector", 0.0)
        check_query("🎧", "hybrid", 0.0)
        with pytest.raises(UsageError, match="blank"):
            check_query("🎧", "keyword", 0.0)
