"""What KameleonDB changes between two searches of one engine is seen by the very next one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from search_engines import Words, sqlalchemy_url
from servers import execute

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import SchemaError, UsageError
from kdb_fast.search.engine import SearchEngine

FIELDS = [{"name": "title", "type": "string"}, {"name": "city", "type": "string"}]
RECORDS = [{"title": f"copper kettle {i}", "city": ("Oslo", "Rome")[i % 2]} for i in range(6)]


@pytest.fixture
def client(address: DatabaseAddress) -> Iterator[Any]:
    from kameleondb import KameleonDB

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = KameleonDB(sqlalchemy_url(address))
        yield client
        client.close()


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def search(client: Any, address: DatabaseAddress, words: Words) -> Iterator[SearchEngine]:
    """An engine that has searched already, so that it has read the definitions."""
    with SearchEngine(address, words) as engine:
        for name in ("Note", "Memo"):
            keys = client.create_entity(name=name, fields=FIELDS).insert_many(RECORDS)
            engine.index_records_batch((name, key, r["title"]) for key, r in zip(keys, RECORDS, strict=True))
        for _ in range(2):
            assert len(engine.search("copper kettle", limit=20)) == 12
        yield engine


def found(search: SearchEngine, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    return sorted(
        ((result.entity, result.data) for result in search.search("copper kettle", limit=20, **options)), key=str
    )


def test_a_dropped_entity_is_not_found(search: SearchEngine, client: Any, words: Words) -> None:
    client.drop_entity("Note")
    words.embedded.clear()
    assert {entity for entity, _ in found(search)} == {"Memo"}
    assert words.embedded == ["copper kettle"]
    assert len(found(search)) == 6


def test_a_new_entity_is_found_and_its_deleted_records_are_not(search: SearchEngine, client: Any) -> None:
    entity = client.create_entity(name="Card", fields=FIELDS)
    keys = entity.insert_many(RECORDS)
    search.index_records_batch(("Card", key, "copper kettle") for key in keys)
    entity.delete(keys[0])
    assert [name for name, _ in found(search)].count("Card") == 5


def test_a_renamed_field_has_its_new_name(search: SearchEngine, client: Any) -> None:
    client.entity("Note").rename_field("city", "town")
    assert {tuple(data) for entity, data in found(search) if entity == "Note"} == {("title", "town")}
    client.entity("Note").rename_field("town", "place")
    assert len(found(search, where={"place": "Oslo"})) == 3
    client.entity("Note").rename_field("place", "spot")
    with pytest.raises(UsageError, match="No searched entity has a field 'place'"):
        found(search, where={"place": "Oslo"})


def test_an_added_field_is_there_and_a_dropped_one_is_not(search: SearchEngine, client: Any) -> None:
    client.entity("Memo").add_field("colour", "string")
    assert len(found(search, where={"colour": None})) == 6
    client.entity("Memo").drop_field("colour")
    assert {tuple(data) for entity, data in found(search) if entity == "Memo"} == {("title", "city")}


def test_records_are_found_where_they_were_moved(search: SearchEngine, client: Any, address: DatabaseAddress) -> None:
    before = found(search)
    client.materialize_entity("Note")
    assert found(search) == before
    assert len(found(search, where={"city": "Rome"})) == 6
    client.dematerialize_entity("Note")
    assert found(search) == before


def test_tables_that_are_gone_are_asked_for_no_more(search: SearchEngine, address: DatabaseAddress) -> None:
    for table in ("kdb_field_definitions", "kdb_records", "kdb_entity_definitions"):
        execute(address, f"DROP TABLE {table}" + (" CASCADE" if address.dialect == "postgresql" else ""))
    assert found(search) == [("Memo", {})] * 6 + [("Note", {})] * 6
    assert len(found(search)) == 12


def test_an_index_that_is_gone_is_an_error_and_found_again(search: SearchEngine, address: DatabaseAddress) -> None:
    execute(address, "ALTER TABLE kdb_search RENAME TO kdb_search_away")
    with pytest.raises(SchemaError):
        found(search)
    execute(address, "ALTER TABLE kdb_search_away RENAME TO kdb_search")
    assert len(found(search)) == 12
