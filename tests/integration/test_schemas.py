"""Which schema of a PostgreSQL database a command means: that of the records, whatever else the search path shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from kameleon import Kameleon, close_kameleon, open_kameleon
from search_engines import Hashes
from servers import Server, connect_as, execute

from kdb_fast import FastEmbedProvider, SearchEngine, SearchWarning
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.sources.kameleondb import KameleonDBSource
from kdb_fast.stores.postgresql.index_store import PostgreSQLIndexStore
from kdb_fast.tables.target import Target, identifier

pytest.importorskip("kameleondb")
pytestmark = pytest.mark.usefixtures("loaded_once")

INDEXES = {"ix_kdb_search_entity", "ix_kdb_search_record", "ix_kdb_search_fts", "ix_kdb_search_vector"}

Tenant = Callable[[str | None], Kameleon]


@pytest.fixture
def kameleon(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Kameleon]:
    """A database with KameleonDB's tables in ``public``."""
    opened = open_kameleon("postgresql", request, capsys, tmp_path)
    yield opened
    close_kameleon(opened, request)


@pytest.fixture
def tenant(kameleon: Kameleon, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Tenant]:
    """Opens the same database with another search path (None: as the server sets it)."""
    clients = []

    def open_tenant(path: str | None) -> Kameleon:
        address, url = kameleon.address, kameleon.url
        if path is not None:
            address = connect_as(address, options=f"-csearch_path={path}")
            url += f"&options={quote(f'-csearch_path={path}', safe='')}"
        made = Kameleon(address, url, capsys, tmp_path)
        clients.append(made.client)
        return made

    yield open_tenant
    for client in clients:
        client.close()


def seed(database: Kameleon, entity: str, count: int) -> None:
    made = database.client.create_entity(entity, fields=[{"name": "title", "type": "string"}])
    made.insert_many([{"title": f"{entity} {i} about {'tea' if i % 2 else 'boats'}"} for i in range(count)])


def snapshot(database: Kameleon, schema: str) -> list[tuple[Any, ...]]:
    """Every row of a schema's index with its physical version."""
    return database.execute(f"SELECT xmin::text, ctid::text, * FROM {identifier(schema)}.kdb_search ORDER BY id")


def indexes(database: Kameleon, schema: str) -> set[str]:
    return {
        row[0]
        for row in database.execute(
            "SELECT indexname FROM pg_indexes WHERE schemaname = %s AND tablename = 'kdb_search'", schema
        )
    }


@pytest.fixture
def two(kameleon: Kameleon, tenant: Tenant) -> Kameleon:
    """15 contacts indexed in ``public``; 10 contacts in ``tenant1``, whose session's path also shows ``public``."""
    seed(kameleon, "Contact", 15)
    assert kameleon.reindex()["stored"] == 15
    kameleon.execute("CREATE SCHEMA tenant1")
    seed(tenant("tenant1"), "Contact", 10)
    return tenant("tenant1,public")


def test_another_schemas_index_is_neither_written_nor_emptied(kameleon: Kameleon, two: Kameleon) -> None:
    before = snapshot(kameleon, "public")
    answer = two.kdb_fast("reindex", "--no-progress")
    assert answer.code == 0, answer
    assert "schema tenant1: 10 of 10 records written" in answer.out
    assert "made in tenant1.kdb_search" in answer.out
    assert "public.kdb_search, is left as it is" in answer.out
    assert snapshot(kameleon, "public") == before
    assert len(snapshot(kameleon, "tenant1")) == 10
    assert indexes(kameleon, "tenant1") >= INDEXES
    again = two.reindex()
    assert (again["unchanged"], again["deleted"], again["schema"], again["warnings"]) == (10, 0, "tenant1", [])
    assert (kameleon.reindex()["unchanged"], snapshot(kameleon, "public")) == (15, before)


def test_each_command_means_the_schema_of_the_records(kameleon: Kameleon, two: Kameleon, tmp_path: Path) -> None:
    status = two.kdb_fast("status", "--json").json
    assert (status["schema"], status["indexed"], status["pending"], status["run"]) == ("tenant1", 0, 10, None)
    answer = two.kdb_fast("search", "boats", "--json")
    assert answer.code == 4
    assert "no search index in the schema tenant1 of this database" in answer.err
    assert "public.kdb_search is another schema's" in answer.err
    two.reindex()
    found = two.kdb_fast("search", "boats", "--limit", "50", "--json").json["results"]
    assert {row["id"] for row in found} == {row[0] for row in two.execute("SELECT id FROM tenant1.kdb_records")}
    before = snapshot(kameleon, "public")
    inserted = two.insert("Contact", [{"title": "a new one"}, {"title": 7}])
    assert (inserted.json["inserted"], inserted.json["rejected"]) == (1, 1)
    assert len(snapshot(two, "tenant1")) == 11
    assert len(json.loads(two.kdb_fast("rejects", "list", "--json").out)["rejects"]) == 1
    assert json.loads(kameleon.kdb_fast("rejects", "list", "--json").out)["rejects"] == []
    path = tmp_path / "one.jsonl"
    path.write_text('{"id": "1", "text": "a note from a file"}\n')
    assert two.kdb_fast("reindex", "--from", str(path), "--entity", "Note", "--no-progress").code == 0
    assert len(snapshot(two, "tenant1")) == 12
    assert snapshot(kameleon, "public") == before
    assert two.execute("SELECT count(*) FROM public.kdb_records") == [(15,)]


def test_dropped_indexes_come_back_in_their_own_schema(kameleon: Kameleon, two: Kameleon, tenant: Tenant) -> None:
    two.reindex()
    here, there = PostgreSQLIndexStore(two.address, "test"), PostgreSQLIndexStore(kameleon.address, "test")
    try:
        assert here.drop_index().text == "dropped for the load"
        assert (indexes(two, "tenant1") & INDEXES, indexes(two, "public") >= INDEXES) == (
            {"ix_kdb_search_entity", "ix_kdb_search_record"},
            True,
        )
        assert there.finish_index(lambda what: None).text == "kept"
    finally:
        here.close()
        there.close()
    # Under another search path the same words would name another table.
    other = PostgreSQLIndexStore(
        replace(connect_as(two.address, options="-csearch_path=public"), schema="tenant1"), "test"
    )
    try:
        assert other.finish_index(lambda what: None).text.startswith("built")
    finally:
        other.close()
    assert indexes(two, "tenant1") >= INDEXES
    assert len(indexes(two, "public")) == 6


ODD = ['Te"n an.t', "{kdb_search} 100%s", "Grüße 東京 \\ 50%", "select"]


@pytest.mark.parametrize("schema", ODD)
def test_a_schema_may_have_any_name(kameleon: Kameleon, tenant: Tenant, schema: str) -> None:
    name = '"' + schema.replace('"', '""') + '"'
    kameleon.execute("DROP TABLE kdb_records, kdb_field_definitions, kdb_entity_definitions CASCADE")
    kameleon.execute(f"CREATE SCHEMA {name}")
    ((database,),) = kameleon.execute("SELECT current_database()")
    kameleon.execute(f"ALTER DATABASE {database} SET search_path = {name}, public")
    kameleon = tenant(None)
    seed(kameleon, "Contact", 1)
    assert kameleon.reindex()["stored"] == 1
    inserted = kameleon.insert("Contact", [{"title": "a second one"}])
    assert inserted.json["inserted"] == 1
    assert kameleon.client.materialize_entity("Contact")["success"]
    assert kameleon.insert("Contact", [{"title": "a third one"}]).json["inserted"] == 1
    kameleon.execute(f"DELETE FROM {name}.kdb_contact WHERE title LIKE 'a second%'")
    receipt = kameleon.reindex()
    assert (receipt["unchanged"], receipt["deleted"], receipt["schema"]) == (2, 1, schema)
    found = kameleon.kdb_fast("search", "third", "--where", '{"title": "a third one"}', "--json").json["results"]
    assert [row["data"] for row in found] == [{"title": "a third one"}]
    assert kameleon.kdb_fast("status", "--json").json["indexed"] == 2
    assert kameleon.kdb_fast("status").out.splitlines()[0].endswith("2 records indexed")
    assert len(snapshot(kameleon, schema)) == 2
    assert kameleon.execute("SELECT to_regclass('public.kdb_search')") == [(None,)]


def test_a_temporary_table_shadows_nothing(kameleon: Kameleon) -> None:
    seed(kameleon, "Contact", 3)
    kameleon.reindex()
    sqlalchemy = pytest.importorskip("sqlalchemy")
    engine = sqlalchemy.create_engine(kameleon.url)

    def shadow(connection: Any, record: Any) -> None:
        for table in ("kdb_search", "kdb_records", "kdb_entity_definitions", "kdb_field_definitions", "kdb_fast_runs"):
            connection.execute(f"CREATE TEMP TABLE {table} (id text)")
        connection.execute("SET search_path = pg_temp, public")
        connection.commit()

    sqlalchemy.event.listen(engine, "connect", shadow)
    with SearchEngine(engine, Hashes(384)) as search:
        search.index_record("Extra", "1", "an extra record")
        assert {status.entity: status.indexed for status in search.get_status()} == {"Contact": 3, "Extra": 1}
        with pytest.warns(SearchWarning, match="3 rows of Contact"):
            assert [found.id for found in search.search("extra", limit=1)] == ["1"]
    engine.dispose()


def test_pgvector_may_be_out_of_the_search_path(kameleon: Kameleon) -> None:
    kameleon.execute('CREATE SCHEMA "ext 1"; CREATE EXTENSION vector SCHEMA "ext 1"')
    seed(kameleon, "Contact", 3)
    assert kameleon.reindex()["stored"] == 3
    kameleon.execute("UPDATE kdb_records SET data = jsonb_set(data, '{title}', '\"another\"')")
    assert kameleon.reindex()["stored"] == 1  # one text, three records
    assert len(kameleon.kdb_fast("search", "another", "--mode", "vector", "--json").json["results"]) == 3
    assert indexes(kameleon, "public") >= INDEXES


def test_a_new_pgvector_is_not_put_into_a_tenants_schema(kameleon: Kameleon, tenant: Tenant) -> None:
    kameleon.execute("CREATE SCHEMA tenant1")
    seed(tenant("tenant1"), "Contact", 1)
    assert tenant("tenant1,public").reindex()["stored"] == 1
    assert kameleon.execute("SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'vector'") == [
        ("public",)
    ]


def test_without_records_the_schema_is_that_of_the_index_or_else_the_first(
    postgres: Server, database: DatabaseAddress
) -> None:
    execute(database, "CREATE SCHEMA one; CREATE SCHEMA two")
    both = connect_as(database, options="-csearch_path=missing,one,two")

    def schema() -> str | None:
        store = PostgreSQLIndexStore(both, "test")
        store.close()
        return store.target.schema

    assert schema() == "one"
    execute(database, "CREATE TABLE two.kdb_search (id int)")
    assert schema() == "two"
    execute(database, "CREATE TABLE one.kdb_records (id int)")
    assert schema() == "one"


def test_a_search_path_without_a_schema_is_named(database: DatabaseAddress) -> None:
    from kdb_fast.errors import SchemaError

    with pytest.raises(SchemaError, match="No schema of the session's search_path exists"):
        PostgreSQLIndexStore(connect_as(database, options="-csearch_path=nowhere"), "test")


def test_each_connection_that_an_engine_lends_has_a_schema_of_its_own(kameleon: Kameleon) -> None:
    """An application with a search path for each tenant, set on the session's connection."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    from sqlalchemy.orm import Session

    kameleon.execute("CREATE SCHEMA tenant1; CREATE SCHEMA tenant2")
    engine = sqlalchemy.create_engine(kameleon.url)
    with SearchEngine(engine, Hashes(8)) as search:
        search.index_record("Note", "0", "of public")
        for name in ("tenant1", "tenant2", "tenant1"):
            with Session(engine) as session:
                session.execute(sqlalchemy.text(f"SET LOCAL search_path = {name}, pg_temp"))
                search.for_session(session).index_record("Note", "1", f"of {name}")
                session.commit()
        assert [found.matched_text for found in search.search("of", limit=9)] == ["of public"]
    engine.dispose()
    for name in ("tenant1", "tenant2"):
        assert kameleon.execute(f"SELECT record_id, content FROM {name}.kdb_search") == [("1", f"of {name}")]
        assert indexes(kameleon, name) >= INDEXES


@pytest.mark.parametrize("when", ["connect", "checkout"])
def test_a_search_path_set_by_a_listener_of_the_engine_is_kept(kameleon: Kameleon, when: str) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    kameleon.execute("CREATE SCHEMA listened; CREATE TABLE listened.kdb_records (id text)")
    engine = sqlalchemy.create_engine(kameleon.url)

    def to_the_tenant(connection: Any, *others: Any) -> None:
        # Not committed, as such listeners are often written.
        connection.execute("SET search_path = listened, public")

    sqlalchemy.event.listen(engine, when, to_the_tenant)
    with SearchEngine(engine, Hashes(8)) as search:
        search.index_record("Note", "1", "tea")
        assert [result.matched_text for result in search.search("tea")] == ["tea"]
    engine.dispose()
    tables = kameleon.execute("SELECT schemaname FROM pg_tables WHERE tablename = 'kdb_search'")
    assert ("listened",) in tables
    assert kameleon.execute("SELECT count(*) FROM listened.kdb_search") == [(1,)]
    if ("public",) in tables:
        assert kameleon.execute("SELECT count(*) FROM public.kdb_search") == [(0,)]


def test_a_source_and_a_store_find_the_same_schema(two: Kameleon) -> None:
    source = KameleonDBSource(two.address)
    store = PostgreSQLIndexStore(two.address, "test")
    try:
        assert source.catalog.target == store.target == Target("tenant1", "public")
    finally:
        source.close()
        store.close()


def test_the_library_writes_beside_the_records(two: Kameleon, kameleon: Kameleon, minilm: Model) -> None:
    before = snapshot(kameleon, "public")
    with SearchEngine(two.url.replace("+psycopg", ""), FastEmbedProvider(minilm.name)) as search:
        search.index_record("Contact", "1", "text")
        search.delete_record("Contact", before[0][4])
        assert [status.indexed for status in search.get_status()] == [1]
    assert snapshot(kameleon, "public") == before
