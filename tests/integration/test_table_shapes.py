"""Search tables that users have changed, and what others have written into them: refused by name before anything is
embedded, or borne."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from search_engines import Hashes, new_database, sqlalchemy_url
from servers import Server, execute, role_name

from kdb_fast import cli
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import SchemaError
from kdb_fast.search.commands import run_search, run_status
from kdb_fast.search.engine import SearchEngine
from kdb_fast.stores import open_store
from kdb_fast.tables import kdb_search
from kdb_fast.tables.target import Target

DIMENSIONS = 8

BOTH = pytest.mark.parametrize("kind", ["postgresql", "sqlite"])


@pytest.fixture
def index(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseAddress:
    """An empty database, with pgvector."""
    address = new_database(kind, request, tmp_path)
    if kind == "postgresql":
        execute(address, "CREATE EXTENSION vector")
    else:
        execute(address, "CREATE TABLE other (a)")
    return address


def prepare(address: DatabaseAddress) -> None:
    with contextlib.closing(open_store(address, "test")) as store:
        store.prepare(DIMENSIONS)


def search_for_tea(address: DatabaseAddress) -> object:
    return run_search(address, "tea", mode="keyword", entities=(), limit=3, where=None, min_score=0.0)


def refused(address: DatabaseAddress) -> SchemaError:
    with pytest.raises(SchemaError) as caught:
        prepare(address)
    return caught.value


# -- the name belongs to something else --------------------------------------------------------------------

OTHERS = {
    "view": "CREATE VIEW {name} AS SELECT * FROM made",
    "materialized view": "CREATE MATERIALIZED VIEW {name} AS SELECT * FROM made",
    "foreign table": "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; "
    "CREATE FOREIGN TABLE {name} (id text) SERVER s",
    "sequence": "CREATE SEQUENCE {name}",
    "composite type": "CREATE TYPE {name} AS (id text)",
    "index": "CREATE INDEX {name} ON made (id)",
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", ["kdb_search", "kdb_fast_runs"])
@pytest.mark.parametrize("kind", ["postgresql"])
def test_a_name_that_is_no_tables_is_said_to_be_what_it_is(index: DatabaseAddress, what: str, name: str) -> None:
    execute(index, "CREATE TABLE made (id text, entity_name text, record_id text, content text, embedding vector(8), "
                   "model text, dimensions int, created_at timestamptz, updated_at timestamptz)")  # fmt: skip
    execute(index, OTHERS[what].format(name=name))
    error = refused(index)
    article = "an" if what == "index" else "a"
    assert f"{name} is {article} {what}; expected a table." in error.message
    assert "ALTER TABLE" not in error.remedy


@pytest.mark.parametrize("what", ["sequence", "composite type", "index"])
@pytest.mark.parametrize("kind", ["postgresql"])
def test_a_search_of_a_name_that_is_no_tables(index: DatabaseAddress, what: str) -> None:
    execute(index, f"CREATE TABLE made (id text); {OTHERS[what].format(name='kdb_search')}")
    with pytest.raises(SchemaError, match="The search index cannot be read"):
        search_for_tea(index)


@pytest.mark.parametrize("kind", ["postgresql"])
def test_a_search_by_a_role_that_may_not_read(index: DatabaseAddress, postgres: Server) -> None:
    prepare(index)
    role = postgres.create_role(index)
    with pytest.raises(SchemaError, match="permission denied") as caught:
        search_for_tea(role)
    assert "grant this role SELECT" in caught.value.remedy
    execute(index, f"GRANT SELECT ON kdb_search TO {role_name(role)}")
    assert search_for_tea(role) == ([], [])


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("CREATE VIEW {name} AS SELECT 1", "is a view"),
        ("CREATE VIRTUAL TABLE {name} USING fts5(id, entity_name)", "is a virtual table"),
        ("CREATE INDEX {name} ON other (a)", "is an index"),
    ],
)
@pytest.mark.parametrize("name", ["kdb_search", "KDB_Search", "kdb_fast_runs", "kdb_fast_vectors"])
@pytest.mark.parametrize("kind", ["sqlite"])
def test_a_name_that_is_no_tables_in_sqlite(index: DatabaseAddress, script: str, what: str, name: str) -> None:
    execute(index, script.format(name=name))
    assert f"{name.lower()} {what}; expected a table." in refused(index).message


@pytest.mark.parametrize("script", ["CREATE TYPE kdb_search AS ENUM ('a')", "CREATE DOMAIN kdb_search AS text"])
@pytest.mark.parametrize("kind", ["postgresql"])
def test_a_type_that_has_the_name_of_the_table(index: DatabaseAddress, script: str) -> None:
    execute(index, script)
    assert "kdb_search is a data type" in refused(index).message


@BOTH
def test_a_table_of_another_program_with_one_of_our_names(index: DatabaseAddress) -> None:
    execute(index, "CREATE TABLE kdb_fast_runs (id text)")
    error = refused(index)
    assert "kdb_fast_runs has no column run, state, phase" in error.message
    execute(index, error.remedy.partition("? ")[2].partition(";")[0].replace("…", "runs_of_theirs"))
    prepare(index)


@pytest.mark.parametrize("kind", ["sqlite"])
def test_a_trigger_may_have_the_name_of_the_table(index: DatabaseAddress) -> None:
    prepare(index)
    execute(index, "CREATE TRIGGER kdb_search AFTER INSERT ON other BEGIN SELECT 1; END")
    prepare(index)


# -- no row could be written -------------------------------------------------------------------------------

UNWRITABLE = {
    "not null": ("ADD COLUMN tenant text NOT NULL", "needs a value in tenant", "DROP NOT NULL"),
    "two": ('ADD COLUMN a int NOT NULL, ADD COLUMN "B c" int NOT NULL', "needs a value in a, B c", '"B c" SET DEFAULT'),
    "domain": ("ADD COLUMN tenant needed", "needs a value in tenant", "SET DEFAULT"),
    "created_at": ("ALTER COLUMN created_at DROP DEFAULT", "needs a value in created_at", "SET DEFAULT"),
    "check": ("ADD COLUMN t text, ADD CHECK (t IS NOT NULL)", "The constraint kdb_search_t_check", "DROP CONSTRAINT"),
    "check of a default": ('ADD COLUMN t int DEFAULT 1, ADD CONSTRAINT "Big" CHECK (t > 1) NOT VALID', "Big", '"Big"'),
    "generated": ("DROP COLUMN model, ADD COLUMN model text GENERATED ALWAYS AS ('m') STORED", "model is a generated",
                  "DROP EXPRESSION"),
    "uuid": ("ALTER COLUMN id TYPE uuid USING NULL", "id is of type uuid; expected text", "TYPE"),
    "bigint": ("ALTER COLUMN dimensions TYPE bigint", "dimensions is of type int8; expected int4", "TYPE"),
    "date": ("ALTER COLUMN updated_at TYPE date", "updated_at is of type date; expected timestamptz", "TYPE"),
    "enum": ("ALTER COLUMN entity_name TYPE mood USING NULL", "entity_name is of type mood", "TYPE"),
}  # fmt: skip


@pytest.mark.parametrize("change", UNWRITABLE)
@pytest.mark.parametrize("kind", ["postgresql"])
def test_a_table_into_which_no_row_fits_is_refused_before_anything_is_embedded(
    index: DatabaseAddress, change: str
) -> None:
    prepare(index)
    execute(index, "CREATE DOMAIN needed AS text NOT NULL; CREATE TYPE mood AS ENUM ('a')")
    how, message, remedy = UNWRITABLE[change]
    execute(index, f"ALTER TABLE kdb_search {how}")
    error = refused(index)
    assert message in error.message
    assert remedy in error.remedy


@pytest.mark.parametrize(
    "change",
    [
        "ADD COLUMN tenant text NOT NULL DEFAULT 'x'",
        "ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY",
        "ADD COLUMN number bigserial",
        "ADD COLUMN size int NOT NULL GENERATED ALWAYS AS (length(content)) STORED",
        "ADD COLUMN tenant filled NOT NULL",
        "ADD COLUMN t int, ADD CHECK (t > 1)",
        "ADD COLUMN t int DEFAULT 5, ADD CHECK (t > 1)",
        "ADD CHECK (length(content) > 0)",
        "ALTER COLUMN content TYPE varchar(2000)",
        "ALTER COLUMN model TYPE short",
    ],
)
@pytest.mark.parametrize("kind", ["postgresql"])
def test_a_table_into_which_rows_fit_is_taken_as_it_is(index: DatabaseAddress, change: str) -> None:
    prepare(index)
    execute(index, "CREATE DOMAIN filled AS text DEFAULT 'x'; CREATE DOMAIN short AS varchar(50)")
    execute(index, "ALTER TABLE kdb_search DROP COLUMN tsv") if "content TYPE" in change else None
    execute(index, f"ALTER TABLE kdb_search {change}")
    with SearchEngine(sqlalchemy_url(index), Hashes(DIMENSIONS)) as search:
        search.index_record("Note", "1", "a text")
    assert execute(index, "SELECT content FROM kdb_search") == [("a text",)]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("tenant TEXT NOT NULL", "needs a value in tenant"),
        ("a TEXT NOT NULL, b TEXT NOT NULL", "needs a value in a, b"),
    ],
)
@pytest.mark.parametrize("kind", ["sqlite"])
def test_a_table_of_sqlite_into_which_no_row_fits(index: DatabaseAddress, column: str, message: str) -> None:
    execute(index, Target().text(kdb_search.SQLITE_SEARCH).replace("updated_at TEXT,", f"updated_at TEXT, {column},"))
    assert message in refused(index).message


@pytest.mark.parametrize("kind", ["sqlite"])
def test_a_generated_column_of_sqlite(index: DatabaseAddress) -> None:
    generated = "model TEXT GENERATED ALWAYS AS ('m') VIRTUAL"
    execute(index, Target().text(kdb_search.SQLITE_SEARCH).replace("model VARCHAR(100)", generated))
    assert 'cannot INSERT into generated column "model"' in refused(index).message
    execute(index, "DROP TABLE kdb_search")
    size = "size INTEGER NOT NULL GENERATED ALWAYS AS (length(content)) VIRTUAL"
    execute(index, Target().text(kdb_search.SQLITE_SEARCH).replace("updated_at TEXT,", f"updated_at TEXT, {size},"))
    prepare(index)


# -- times that Python does not know -----------------------------------------------------------------------

TIMES: dict[str, list[Any]] = {
    "postgresql": ["infinity", "-infinity", "294276-12-31 23:59:59.999999+00", "9999-12-31 23:59:59+00",
                   "0044-03-15 BC", "4713-01-01 BC"],
    "sqlite": ["infinity", "-infinity", "294276-12-31 23:59:59", "9999-12-31T23:59:59-14:00", "0000-00-00 00:00:00",
               "0001-01-01T00:00:00+14:00", "-0043-03-15", "yesterday", "", 2460000.5, 1700000000, b"\xff\xfe"],
}  # fmt: skip
"""Of which KameleonDB writes none; but programs write what a column takes."""


def store_time(address: DatabaseAddress, table: str, key: str, record: str, time: object) -> None:
    """As another program writes it."""
    value = "CAST(CAST(%s AS BLOB) AS TEXT)" if isinstance(time, bytes) else "%s"
    execute(address, f"UPDATE {table} SET updated_at = {value} WHERE {key} = %s", time, record)


@BOTH
def test_a_time_that_python_does_not_know_ends_nothing(
    kind: str, index: DatabaseAddress, kameleon_records: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """In rows of the index and in records: all are stored, and the next run changes nothing."""
    times = TIMES[kind]
    n = len(times)
    db, ids = kameleon_records(index, 2 * n)
    assert cli.run(["reindex", "--db", db, "--json"]) == 0
    for time, of_index, of_record in zip(times, ids[:n], ids[n:], strict=True):
        store_time(index, "kdb_search", "record_id", of_index, time)
        store_time(index, "kdb_records", "id", of_record, time)
    capfd.readouterr()
    found = []
    for _ in range(2):
        assert cli.run(["reindex", "--db", db, "--json"]) == 0, capfd.readouterr().err
        receipt = json.loads(capfd.readouterr().out)
        found.append((receipt["stored"] + receipt["reused"], receipt["unchanged"], receipt["superseded"]))
    assert found == [(n, n, 0), (0, 2 * n, 0)]
    assert run_status(index).pending == 0

    # Once more where they are, for those who only read.
    for time, of_index in zip(times, ids[:n], strict=True):
        store_time(index, "kdb_search", "record_id", of_index, time)
    state = run_status(index)
    assert (state.indexed, state.stale) == (2 * n, n)
    assert state.entities[0].last_updated is not None
    with SearchEngine(sqlalchemy_url(index), None) as search:
        assert {hit.id for hit in search.search("copper", limit=99)} == set(ids)
        assert [row.indexed for row in search.get_status()] == [2 * n]
        for record in ids[:n]:
            search.index_record("Note", record, "copper spoon")
        assert [row.indexed for row in search.get_status()] == [2 * n]
    execute(index, "UPDATE kdb_search SET updated_at = %s", times[0])
    assert run_status(index).entities[0].last_updated is None


@pytest.fixture
def kameleon_records(kind: str) -> Iterator[Any]:
    """Creates records through KameleonDB; gives the address as text, and their ids."""
    pytest.importorskip("kameleondb")
    from kameleondb import KameleonDB

    opened = []

    def make(address: DatabaseAddress, count: int) -> tuple[str, list[str]]:
        url = sqlalchemy_url(address)
        db = KameleonDB(url)
        opened.append(db)
        entity = db.create_entity("Note", fields=[{"name": "title", "type": "string"}])
        return url, sorted(entity.insert_many([{"title": f"copper kettle {i}"} for i in range(count)]))

    yield make
    for db in opened:
        with contextlib.suppress(Exception):
            db.close()
