"""Reading records that the real KameleonDB wrote, on SQLite and on PostgreSQL."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from servers import Server, connect_as

from kdb_fast.catalog.definitions import Catalog, load_entities
from kdb_fast.catalog.records import ids_query, rows_query
from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.db.pg_connection import connect_postgresql
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.errors import DatabaseError, SchemaError
from kdb_fast.records import Key, Record, Reject
from kdb_fast.search.readers.postgresql import PostgresqlReader
from kdb_fast.search.readers.sqlite import SqliteReader
from kdb_fast.search.scope import resolve_scope
from kdb_fast.sources import kameleondb as module
from kdb_fast.sources.kameleondb import KameleonDBSource
from kdb_fast.tables.target import Target, find_target, rows_on

KameleonDB = pytest.importorskip("kameleondb").KameleonDB

# KameleonDB hands datetimes to sqlite3 as they are, which Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")

PRODUCTS = 2600
MakeDatabase = Callable[[], "Database"]


class Database:
    """A database with KameleonDB's tables, the client that wrote them, and plain SQL."""

    def __init__(self, address: DatabaseAddress, url: str) -> None:
        self.address = address
        self.url = url
        self.client = KameleonDB(url)

    @property
    def is_postgresql(self) -> bool:
        return self.address.dialect == "postgresql"

    def connect(self) -> Any:
        if self.is_postgresql:
            return connect_postgresql(self.address, role="test")
        return connect_sqlite(self.address)

    def execute(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of a statement with %s for its parameters; without parameters it is sent as it is."""
        with closing(self.connect()) as connection:
            if not self.is_postgresql:
                marked = statement.replace("%s", "?") if parameters else statement
                return list(connection.execute(marked, parameters).fetchall())
            cursor = connection.execute(statement.encode(), parameters or None)
            return list(cursor.fetchall()) if cursor.description else []

    def read(self, *entities: str, **options: Any) -> list[Record | Reject]:
        with closing(KameleonDBSource(self.address, entities, **options)) as source:
            return [item for page in source.pages() for item in page]

    def contents(self, *entities: str) -> dict[str, str]:
        """Content by record id; every item must be a record and no id twice."""
        found = self.read(*entities)
        assert all(isinstance(item, Record) for item in found)
        result = {str(item.key[1]): item.content for item in found if isinstance(item, Record)}
        assert len(result) == len(found)
        return result

    def data(self, entity: str, record_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The fields of live records by id, as a search gives them."""
        with closing(self.connect()) as connection:
            reader = PostgresqlReader(connection) if self.is_postgresql else SqliteReader(connection)
            scope = resolve_scope(reader.definitions(), [entity], None)
            found = reader.data([(entity, record_id) for record_id in record_ids], scope)
        return {str(key[1]): fields for key, fields in found.items()}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def make_database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeDatabase]:
    made: list[Database] = []
    directory = tmp_path_factory.mktemp("sqlite")

    def make() -> Database:
        if request.param == "sqlite":
            url = f"sqlite:///{directory / f'{len(made)}.db'}"
            database = Database(parse_address(url), url)
        else:
            server: Server = request.getfixturevalue("postgres")
            address = server.create_database()
            parts = conninfo_to_dict(address.conninfo)
            host = quote(str(parts["host"]), safe="")
            where = f"{parts['dbname']}?host={host}&port={parts['port']}"
            database = Database(address, f"postgresql+psycopg://postgres@/{where}")
        made.append(database)
        return database

    yield make
    for database in made:
        database.client.close()
        if database.is_postgresql:
            request.getfixturevalue("postgres").drop_database(database.address)


ONLY_SQLITE = pytest.mark.parametrize("make_database", ["sqlite"], indirect=True)
ONLY_POSTGRESQL = pytest.mark.parametrize("make_database", ["postgresql"], indirect=True)


@pytest.fixture
def empty(make_database: MakeDatabase) -> Database:
    return make_database()


@pytest.fixture(scope="module")
def shop(make_database: MakeDatabase) -> Database:
    """Product: many records. Contact: materialised. Measure: no text. Gone: dropped."""
    database = make_database()
    client = database.client
    product = client.create_entity(
        "Product",
        fields=[
            {"name": "title", "type": "string"},
            {"name": "price", "type": "float"},
            {"name": "sku", "type": "string"},
            {"name": "description", "type": "text"},
            {"name": "stock", "type": "int"},
            {"name": "active", "type": "bool"},
            {"name": "extra", "type": "json"},
            {"name": "since", "type": "datetime"},
            {"name": "brand", "type": "string"},
        ],
    )
    product.insert_many(
        [
            {
                "title": f"Item {i}",
                "price": i / 2,
                "sku": f"SKU-{i}",
                "description": None if i % 3 == 0 else f"Thing {i} ünïcode 日本" if i % 3 == 1 else "",
                "stock": i,
                "active": i % 2 == 0,
                "extra": {"deep": [i]},
                "since": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            }
            for i in range(PRODUCTS)
        ]
    )
    product.rename_field("title", "name")
    product.drop_field("sku")
    client.create_entity(
        "Contact",
        fields=[
            {"name": "name", "type": "string"},
            {"name": "age", "type": "int"},
            {"name": "active", "type": "bool"},
            {"name": "extra", "type": "json"},
            {"name": "since", "type": "datetime"},
            {"name": "bio", "type": "text"},
        ],
    )
    contact = client.entity("Contact")
    contact.insert_many(
        [
            {"name": f"Person {i}", "age": i, "active": True, "extra": {"a": [1]}, "bio": f"About {i}" if i else None}
            for i in range(20)
        ]
    )
    contact.rename_field("bio", "about")
    moved = client.materialize_entity("Contact")
    assert moved["success"], moved["error"]
    client.create_entity("Measure", fields=[{"name": "value", "type": "float"}]).insert_many([{"value": 1.0}] * 3)
    client.create_entity("Gone", fields=[{"name": "name", "type": "string"}]).insert({"name": "x"})
    client.drop_entity("Gone")
    return database


def test_content_follows_the_definitions_with_renamed_and_dropped_fields(shop: Database) -> None:
    expected = {
        f"name: Item {i} | description: Thing {i} ünïcode 日本" if i % 3 == 1 else f"name: Item {i}"
        for i in range(PRODUCTS)
    }
    assert set(shop.contents("Product").values()) == expected
    assert len(shop.contents("Product")) == PRODUCTS


def test_pages_are_bounded_and_in_the_order_of_ids(shop: Database) -> None:
    with closing(KameleonDBSource(shop.address, ["Product"])) as source:
        pages = [[item.key[1] for item in page] for page in source.pages()]
    assert max(map(len, pages)) <= 1000
    assert len(pages) > 3
    ids = [record_id for page in pages for record_id in page]
    assert ids == sorted(ids)


@pytest.mark.parametrize("block", [1, 7, 1300, 2600, 2599])
def test_no_record_is_lost_or_doubled_where_blocks_of_ids_meet(
    shop: Database, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    entity, count = ("Product", PRODUCTS) if block > 10 else ("Contact", 20)
    assert len(shop.contents(entity)) == count


def test_the_primary_key_walk_of_sqlite_reads_the_same(shop: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = shop.contents("Product")
    for walk in (True, False):
        monkeypatch.setattr(KameleonDBSource, "_walk_primary_key", lambda self, place, walk=walk: walk)
        assert shop.contents("Product") == expected


def test_a_materialised_entity_is_read_from_its_own_table(shop: Database) -> None:
    assert shop.execute("SELECT count(*) FROM kdb_contact") == [(20,)]
    assert set(shop.contents("Contact").values()) == {
        f"name: Person {i} | about: About {i}" if i else "name: Person 0" for i in range(20)
    }


def test_without_names_all_active_entities_are_read(shop: Database) -> None:
    with closing(KameleonDBSource(shop.address)) as source:
        assert source.entities == ("Contact", "Measure", "Product")
        assert source.estimate() == PRODUCTS + 20 + 3
        found = [item for page in source.pages() for item in page]
        assert source.empty == 3
        assert source.warnings() == []
        assert (source.complete, source.unique_keys) == (True, True)
    assert [entity for entity, _ in itertools.groupby(item.key[0] for item in found)] == ["Contact", "Product"]
    assert len(found) == PRODUCTS + 20


def test_names_are_read_in_the_order_given_and_once(shop: Database) -> None:
    with closing(KameleonDBSource(shop.address, ["Product", "Contact", "Product"])) as source:
        assert source.entities == ("Product", "Contact")


@pytest.mark.parametrize("limit", [1, 20, 21, 1100])
def test_limit_stops_after_that_many_records_overall(shop: Database, limit: int) -> None:
    with closing(KameleonDBSource(shop.address, ["Contact", "Product"], limit=limit)) as source:
        assert source.estimate() == limit
        assert sum(len(page) for page in source.pages()) == limit
        assert not source.complete


def test_source_at_is_when_the_record_was_last_changed_in_utc(empty: Database) -> None:
    note = empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    before = datetime.now(UTC)
    record_id = note.insert({"text": "one"})
    other = note.insert({"text": "two"})
    between = datetime.now(UTC)
    note.update(record_id, {"text": "changed"})

    found = {item.key[1]: item for item in empty.read() if isinstance(item, Record)}
    assert found[record_id].content == "text: changed"
    changed, unchanged = found[record_id].source_at, found[other].source_at
    assert changed is not None
    assert unchanged is not None
    assert changed.utcoffset() == unchanged.utcoffset() == timedelta(0)
    assert before <= unchanged <= between <= changed <= datetime.now(UTC)
    assert note.find_by_id(record_id)["updated_at"][:26] == changed.replace(tzinfo=None).isoformat()[:26]


@pytest.mark.parametrize("text", ["nonsense", "infinity", "-infinity"])
def test_a_time_that_no_clock_shows_is_none(empty: Database, text: str) -> None:
    if empty.is_postgresql and text == "nonsense":
        text = "0001-01-01 BC"
    empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}]).insert({"text": "x"})
    empty.execute("UPDATE kdb_records SET updated_at = %s", text)
    assert [item.source_at for item in empty.read() if isinstance(item, Record)] == [None]


def test_deleted_records_are_not_read(empty: Database) -> None:
    note = empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    ids = note.insert_many([{"text": f"t{i}"} for i in range(4)])
    note.delete(ids[1])
    assert set(empty.contents("Note")) == {ids[0], ids[2], ids[3]}

    assert empty.client.materialize_entity("Note")["success"]
    empty.execute("UPDATE kdb_note SET is_deleted = %s WHERE id = %s", True, ids[2])
    assert set(empty.contents("Note")) == {ids[0], ids[3]}
    with closing(KameleonDBSource(empty.address)) as source:
        assert source.estimate() == 2


def test_records_without_text_are_counted_and_their_keys_handed_over_once(empty: Database) -> None:
    note = empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}, {"name": "n", "type": "int"}])
    bare = note.insert_many([{"n": 1}, {"text": None}, {"text": ""}, {"text": " "}])
    full = note.insert({"text": " x "})
    with closing(KameleonDBSource(empty.address)) as source:
        taken: list[Key] = []
        found = []
        for page in source.pages():
            found += page
            taken += source.take_empty()
        assert source.take_empty() == []
        assert source.empty == 4
    assert sorted(taken) == sorted(("Note", record_id) for record_id in bare)
    assert [item.key[1] for item in found] == [full]


def test_a_value_that_is_not_text_is_written_as_python_writes_it(empty: Database) -> None:
    note = empty.client.create_entity(
        "Note", fields=[{"name": name, "type": "string"} for name in ("i", "f", "b", "l", "z", "s")]
    )
    data = {"i": 7, "f": 2.0, "b": True, "l": [1, "x"], "z": 0, "s": "a|b"}
    record_id = note.insert(data)
    assert empty.contents("Note") == {record_id: "i: 7 | f: 2.0 | b: True | l: [1, 'x'] | z: 0 | s: a|b"}


def test_names_with_quotes_and_percent_signs_are_safe(empty: Database) -> None:
    names = ['x"; DROP TABLE kdb_records; --', "100%", "%s", "a.b", "select", "ä"]
    note = empty.client.create_entity("Note", fields=[{"name": name, "type": "string"} for name in names])
    record_id = note.insert({name: f"v{i}" for i, name in enumerate(names)})
    expected = {record_id: " | ".join(f"{name}: v{i}" for i, name in enumerate(names))}
    assert empty.contents("Note") == expected

    # KameleonDB cannot materialise such names itself.
    table = 'odd "table" 100%'
    quoted, *columns = ('"' + name.replace('"', '""') + '"' for name in [table, *names])
    kind = "timestamptz" if empty.is_postgresql else "text"
    columns = ["id varchar(36)", f"updated_at {kind}", "is_deleted boolean", *(f"{column} text" for column in columns)]
    empty.execute(f"CREATE TABLE {quoted} ({', '.join(columns)})")
    values = ", ".join(f"'v{i}'" for i in range(len(names)))
    empty.execute(f"INSERT INTO {quoted} VALUES ('r1', '2026-01-02 03:04:05', false, {values})")
    empty.execute("UPDATE kdb_entity_definitions SET storage_mode = 'dedicated', dedicated_table_name = %s", table)
    empty.execute("DELETE FROM kdb_records")
    assert empty.contents("Note") == {"r1": expected[record_id]}
    assert empty.data("Note", ["r1"]) == {"r1": {name: f"v{i}" for i, name in enumerate(names)}}


def test_fields_tied_in_time_are_in_the_order_in_which_kameleondb_has_them(empty: Database) -> None:
    names = ["zeta", "alpha", "omega", "beta"]
    note = empty.client.create_entity("Note", fields=[{"name": name, "type": "string"} for name in names])
    record_id = note.insert({name: name.upper() for name in names})
    empty.execute("UPDATE kdb_field_definitions SET created_at = '2026-01-01 00:00:00.000000'")
    empty.execute("UPDATE kdb_field_definitions SET created_at = '2025-01-01 00:00:00.000000' WHERE name = 'omega'")
    order = ["omega", "alpha", "beta", "zeta"]
    assert empty.contents("Note") == {record_id: " | ".join(f"{name}: {name.upper()}" for name in order)}
    assert list(empty.data("Note", [record_id])[record_id]) == order
    with closing(empty.connect()) as connection:
        rows = rows_on(connection, empty.address.dialect)
        (entity,) = load_entities(rows, find_target(rows, empty.address.dialect))
    assert [field.name for field in entity.fields] == order
    if not empty.is_postgresql:  # where it depends on the planner
        assert [field.name for field in empty.client._schema_engine.get_fields("Note")] == order


def test_records_inserted_after_materialising_are_read_too_and_none_twice(empty: Database) -> None:
    note = empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    moved = note.insert({"text": "moved"})
    assert empty.client.materialize_entity("Note")["success"]
    note = empty.client.entity("Note")
    later = note.insert({"text": "later"})
    note.add_field("extra", "string")  # which adds no column to the dedicated table
    with closing(KameleonDB(empty.url)) as client:
        last = client.entity("Note").insert({"text": "last", "extra": "more"})
    # As in the middle of a migration: the same record in both tables.
    empty.execute(
        "INSERT INTO kdb_records (id, entity_id, data, created_at, updated_at, is_deleted)"
        " SELECT %s, entity_id, data, created_at, updated_at, is_deleted FROM kdb_records WHERE id = %s",
        moved,
        later,
    )
    assert empty.contents("Note") == {moved: "text: moved", later: "text: later", last: "text: last | extra: more"}


def test_records_written_and_deleted_between_pages_are_read_as_they_are_then(empty: Database) -> None:
    note = empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    ids = sorted(note.insert_many([{"text": "old"}] * 300))
    found: list[Record | Reject] = []
    with closing(KameleonDBSource(empty.address)) as source:
        for number, page in enumerate(source.pages()):
            found += page
            if number == 0:
                note.update(ids[-1], {"text": "new"})
                note.delete(ids[-2])
                assert not empty.is_postgresql or _idle(empty)
    contents = {str(item.key[1]): item.content for item in found if isinstance(item, Record)}
    assert contents == dict.fromkeys(ids[:-2], "text: old") | {ids[-1]: "text: new"}


def _idle(database: Database) -> bool:
    """Whether the reader holds no transaction open."""
    rows = database.execute(
        "SELECT state, backend_xmin FROM pg_stat_activity"
        " WHERE application_name = 'kdb-fast/reader' AND datname = current_database()"
    )
    return rows == [("idle", None)]


def test_a_definition_that_changes_during_the_run_is_reported(empty: Database) -> None:
    note = empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    note.insert_many([{"text": "x"}] * 150)
    with closing(KameleonDBSource(empty.address)) as source:
        for number, _ in enumerate(source.pages()):
            if number == 0:
                note.rename_field("text", "body")
        (warning,) = source.warnings()
    assert "Note" in warning


class TestRefusals:
    def test_a_database_without_kameleondb_says_what_was_expected(self, empty: Database) -> None:
        empty.execute("DROP TABLE kdb_field_definitions")
        with pytest.raises(SchemaError, match=r"no kdb_field_definitions; expected .*kdb_records") as refused:
            KameleonDBSource(empty.address)
        assert "--from" in refused.value.remedy

    def test_an_unknown_entity_names_the_close_ones_first(self, shop: Database) -> None:
        with pytest.raises(SchemaError, match=r"no entity 'product'; found: Product, Contact, Measure\.") as refused:
            KameleonDBSource(shop.address, ["product"])
        assert "Product" in refused.value.remedy

    def test_a_dropped_entity_is_named_as_dropped(self, shop: Database) -> None:
        with pytest.raises(SchemaError, match="'Gone' any more: it was dropped"):
            KameleonDBSource(shop.address, ["Gone"])

    def test_at_most_ten_names_are_shown(self, empty: Database) -> None:
        for i in range(13):
            empty.client.create_entity(f"Kind{i:02}")
        with pytest.raises(SchemaError, match=r"found: .* and 3 more\.") as refused:
            KameleonDBSource(empty.address, ["Zebra"])
        assert refused.value.message.count("Kind") == 10

    def test_a_missing_dedicated_table_is_refused_only_for_its_entity(self, empty: Database) -> None:
        empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
        empty.client.create_entity("Other", fields=[{"name": "text", "type": "text"}]).insert({"text": "x"})
        assert empty.client.materialize_entity("Note")["success"]
        empty.execute("DROP TABLE kdb_note")
        with pytest.raises(SchemaError, match=r"table .(public\.)?kdb_note., which does not exist"):
            KameleonDBSource(empty.address)
        assert len(empty.read("Other")) == 1

    def test_a_table_dropped_during_the_run_is_a_schema_error(self, empty: Database) -> None:
        note = empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
        note.insert({"text": "x"})
        with closing(KameleonDBSource(empty.address)) as source:
            empty.execute("DROP TABLE kdb_records")
            with pytest.raises(SchemaError):
                list(source.pages())

    def test_entities_without_records_or_none_at_all_are_no_error(self, empty: Database) -> None:
        assert empty.read() == []
        empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
        assert empty.read("Note") == []


class TestData:
    def test_all_active_fields_come_by_their_logical_name(self, shop: Database) -> None:
        wanted = {str(item.key[1]) for item in shop.read("Product", limit=5)}
        found = shop.data("Product", [*wanted, "no such record"])
        client = shop.client.entity("Product")
        hidden = {"id", "created_at", "updated_at", "created_by"}
        assert set(found) == wanted
        for record_id, data in found.items():
            expected = client.find_by_id(record_id)
            assert data == {name: value for name, value in expected.items() if name not in hidden}
            assert list(data) == ["name", "price", "description", "stock", "active", "extra", "since", "brand"]

    def test_a_materialised_record_looks_like_one_in_shared_storage(self, shop: Database) -> None:
        record_id = next(i for i, content in shop.contents("Contact").items() if "Person 7" in content)
        data = shop.data("Contact", [record_id])[record_id]
        assert data == {
            "name": "Person 7",
            "age": 7,
            "active": True,
            "extra": {"a": [1]},
            "since": None,
            "about": "About 7",
        }
        assert data["active"] is True
        json.dumps(data)

    def test_deleted_records_are_left_out(self, empty: Database) -> None:
        note = empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
        kept, deleted = note.insert_many([{"text": "a"}, {"text": "b"}])
        note.delete(deleted)
        assert empty.data("Note", [kept, deleted]) == {kept: {"text": "a"}}


@ONLY_POSTGRESQL
class TestPostgreSQL:
    @pytest.fixture
    def notes(self, empty: Database) -> Database:
        empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}]).insert_many(
            [{"text": f"t{i}"} for i in range(250)]
        )
        return empty

    def terminate(self, database: Database) -> None:
        rows = database.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'kdb-fast/reader' AND datname = current_database()"
        )
        assert rows == [(True,)]

    def test_a_lost_connection_is_replaced_and_nothing_is_read_twice(self, notes: Database) -> None:
        found: list[str] = []
        with closing(KameleonDBSource(notes.address)) as source:
            self.terminate(notes)
            assert source.estimate() == 250
            for page in source.pages():
                found += [str(item.key[1]) for item in page]
                self.terminate(notes)
        assert len(found) == len(set(found)) == 250

    def test_a_connection_that_does_not_come_back_is_a_database_error(
        self, notes: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KDB_FAST_PATIENCE", "0.5")
        with closing(KameleonDBSource(notes.address)) as source:
            pages = source.pages()
            next(pages)
            self.terminate(notes)
            stranger = make_conninfo(notes.address.conninfo, user="nobody")
            monkeypatch.setattr(source._reader, "address", replace(notes.address, conninfo=stranger))
            with pytest.raises(DatabaseError, match=r"did not come back for 0\.5 s") as lost:
                next(pages)
        assert "carries on" in lost.value.remedy

    def test_a_cancelled_statement_is_tried_again_three_times(
        self, notes: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurried = connect_as(notes.address, options="-c statement_timeout=50ms")
        with psycopg.connect(notes.address.conninfo) as other, closing(KameleonDBSource(hurried)) as source:
            other.execute("LOCK TABLE kdb_records IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(DatabaseError, match="cancelled each time while reading records") as told:
                next(source.pages())
            assert "statement_timeout" in told.value.remedy
            close = source._reader.close

            def release() -> None:
                """Before the next attempt."""
                other.rollback()
                close()

            monkeypatch.setattr(source._reader, "close", release)
            assert next(source.pages())

    def test_a_count_that_takes_too_long_is_estimated(self, notes: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        notes.execute("ANALYZE kdb_records")
        monkeypatch.setattr(module, "COUNT_SECONDS", 0.0)
        with (
            closing(KameleonDBSource(notes.address)) as source,
            closing(notes.connect()) as other,
            other.transaction(),
        ):
            # The count waits for this lock until its time is up; the holder itself may ask the planner.
            other.execute("LOCK TABLE kdb_records IN ACCESS EXCLUSIVE MODE")
            monkeypatch.setattr(source._reader, "fetch", rows_on(other, "postgresql"))
            assert source.estimate() == 250

    def test_a_user_who_may_not_read_is_told_so(self, notes: Database, postgres: Server) -> None:
        stranger = postgres.create_role(notes.address, "SELECT ON kdb_entity_definitions")
        with pytest.raises(SchemaError, match="Not allowed to read") as refused:
            KameleonDBSource(stranger)
        assert "SELECT" in refused.value.remedy

    def test_pages_are_looked_up_by_primary_key_however_many_entities_share_the_table(self, notes: Database) -> None:
        for i in range(30):
            notes.client.create_entity(f"Other{i}")
        notes.execute(
            "INSERT INTO kdb_records (id, entity_id, data, created_at, updated_at, is_deleted)"
            " SELECT gen_random_uuid()::text, e.id, '{}', now(), now(), false"
            " FROM kdb_entity_definitions e, generate_series(1, 400)"
        )
        notes.execute("ANALYZE kdb_records")
        with closing(notes.connect()) as connection:
            catalog = Catalog.load(connection, "postgresql")
            entity = catalog.entities["Note"]
            (place,) = entity.places
            rows = rows_on(connection, "postgresql")
            ids = [row[0] for row in rows(*ids_query(place, catalog.target, None, 100))]
            query, parameters = rows_query(place, catalog.target, entity.text_fields, ids)
            plan = "\n".join(row[0] for row in rows("EXPLAIN " + query, parameters))
        assert "kdb_records_pkey" in plan
        assert "Seq Scan" not in plan


@ONLY_SQLITE
class TestSQLite:
    @pytest.fixture
    def notes(self, empty: Database) -> Database:
        empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}]).insert({"text": "good"})
        return empty

    @pytest.mark.parametrize(
        ("stored", "reason"),
        [
            ("'{\"text\": '", "invalid_json"),
            ("CAST(x'7b2274657874223a2022ff227d' AS TEXT)", "not_utf8"),
            ("'[1]'", "not_an_object"),
            ("replace(hex(zeroblob(50000)), '0', '[')", "too_deep"),
            ("'{\"text\": ' || replace(hex(zeroblob(5000)), '0', '7') || '}'", "invalid_json"),
        ],
    )
    def test_one_damaged_row_is_one_reject(self, notes: Database, stored: str, reason: str) -> None:
        notes.execute(
            "INSERT INTO kdb_records (id, entity_id, data, created_at, updated_at, is_deleted)"
            f" SELECT 'bad', entity_id, {stored}, created_at, updated_at, 0 FROM kdb_records"
        )
        good, reject = sorted(notes.read(), key=lambda item: isinstance(item, Reject))
        assert isinstance(good, Record)
        assert good.content == "text: good"
        assert isinstance(reject, Reject)
        assert (*reject.key, reject.reason) == ("Note", "bad", reason)
        assert len(reject.content_hash) == 32

    def test_a_busy_database_is_waited_for_and_then_reported(self, notes: Database) -> None:
        notes.client.close()
        notes.execute("PRAGMA journal_mode = DELETE")
        with closing(KameleonDBSource(notes.address)) as source:
            source._reader.connection().execute("PRAGMA busy_timeout = 1")
            with closing(sqlite3.connect(notes.address.conninfo, isolation_level=None)) as other:
                other.execute("BEGIN EXCLUSIVE")
                with pytest.raises(DatabaseError, match="locked"):
                    list(source.pages())

    def test_the_ids_of_a_page_are_found_by_an_index(self, notes: Database) -> None:
        with closing(notes.connect()) as connection:
            entity = Catalog.load(connection, "sqlite").entities["Note"]
            (place,) = entity.places
            plans = []
            for query, parameters in (
                rows_query(place, Target(), entity.text_fields, ["a"]),
                ids_query(place, Target(), "a", 10),
                ids_query(place, Target(), "a", 10, by_primary_key=True),
            ):
                rows = connection.execute("EXPLAIN QUERY PLAN " + query, parameters).fetchall()
                plans.append(rows[0][3])
        assert "sqlite_autoindex_kdb_records_1 (id=?)" in plans[0]
        assert "ix_kdb_records_entity" in plans[1]
        assert "sqlite_autoindex_kdb_records_1 (id>?)" in plans[2]


def test_a_missing_file_is_a_database_error(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="no SQLite file"):
        KameleonDBSource(parse_address(f"sqlite:///{tmp_path / 'missing.db'}"))
