"""The drop-in proof: KameleonDB's search layer with this package's SearchEngine, over databases of the real KameleonDB.

The published KameleonDB has no search layer yet, so what its development branch does with one stands in for it here.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from search_engines import Hashes, Words, sqlalchemy_url
from servers import execute, index_rows

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.records import content_of
from kdb_fast.search.engine import IndexStatus, SearchEngine, SearchResult

kameleondb = pytest.importorskip("kameleondb")
from kameleondb.core.engine import Entity  # noqa: E402

# KameleonDB hands datetimes to sqlite3 as they are, which Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")

PAGE = Path(__file__).parents[2] / "docs" / "kameleondb.md"


def code_blocks() -> list[str]:
    """The Python code of the page."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


# -- a stand-in for KameleonDB's development branch --------------------------------------------------------


class IndexedEntity(Entity):
    """Keeps the index in step with the records."""

    _db: Any

    def insert(self, data: dict[str, Any], created_by: str | None = None) -> str:
        record_id: str = super().insert(data, created_by)
        self._db.index(self.name, [record_id])
        return record_id

    def insert_many(self, records: list[dict[str, Any]], created_by: str | None = None) -> list[str]:
        ids: list[str] = super().insert_many(records, created_by)
        self._db.index(self.name, ids)
        return ids

    def update(self, record_id: str, data: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = super().update(record_id, data)
        self._db.index(self.name, [record_id])
        return result

    def delete(self, record_id: str, cascade: bool = True, force: bool = False) -> bool:
        deleted: bool = super().delete(record_id, cascade, force)
        self._db.engine.delete_record(self.name, record_id)
        return deleted


class IndexedKameleonDB(kameleondb.KameleonDB):  # type: ignore[misc, name-defined]
    """KameleonDB with a search layer, which it takes from its module ``search``."""

    def __init__(self, url: str, embedding_provider: Any = None) -> None:
        super().__init__(url)
        from kameleondb.search import SearchEngine as Imported

        self.engine = Imported(self._connection.engine, embedding_provider)

    def entity(self, name: str) -> IndexedEntity:
        super().entity(name)
        return IndexedEntity(name, self)

    def index(self, name: str, ids: list[str]) -> None:
        names = [f.name for f in self._schema_engine.get_fields(name) if f.field_type in ("string", "text")]
        records = [(record_id, super(IndexedKameleonDB, self).entity(name).find_by_id(record_id)) for record_id in ids]
        batch = [(name, record_id, content_of(record or {}, names)) for record_id, record in records]
        if len(batch) == 1:
            self.engine.index_record(*batch[0])
        else:
            self.engine.index_records_batch(batch)

    def search(self, query: str, **options: Any) -> list[dict[str, Any]]:
        found = self.engine.search(query=query, **options)
        return [
            {"entity": r.entity, "id": r.id, "score": r.score, "data": r.data, "matched_text": r.matched_text}
            for r in found
        ]

    def reindex_embeddings(self) -> int:
        total = 0
        for name in self.list_entities():
            shared = "SELECT r.id FROM kdb_records r JOIN kdb_entity_definitions e ON e.id = r.entity_id"
            ids = [row["id"] for row in self.execute_sql(f"{shared} WHERE e.name = '{name}' AND NOT r.is_deleted").rows]
            self.index(name, ids)
            total += len(ids)
        return total

    def embedding_status(self, entity_name: str | None = None) -> list[dict[str, Any]]:
        return [
            {
                "entity": s.entity,
                "indexed": s.indexed,
                "pending": s.pending,
                "last_updated": s.last_updated.isoformat() if s.last_updated else None,
            }
            for s in self.engine.get_status(entity_name)
        ]


@pytest.fixture
def adopted(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """``kameleondb.search`` as the page says it should be."""
    module = types.ModuleType("kameleondb.search")
    exec(code_blocks()[1], module.__dict__)
    monkeypatch.setitem(sys.modules, "kameleondb.search", module)
    monkeypatch.setattr(kameleondb, "search", module, raising=False)
    return module


Open = Callable[..., IndexedKameleonDB]


@pytest.fixture
def open_kameleondb(address: DatabaseAddress, adopted: types.ModuleType) -> Iterator[Open]:
    opened: list[IndexedKameleonDB] = []

    def open_kameleondb(provider: Any = None) -> IndexedKameleonDB:
        opened.append(IndexedKameleonDB(sqlalchemy_url(address), provider))
        return opened[-1]

    yield open_kameleondb
    for db in opened:
        db.engine.close()
        db.close()


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def db(open_kameleondb: Open, words: Words) -> IndexedKameleonDB:
    return open_kameleondb(words)


TICKET = [
    {"name": "title", "type": "string"},
    {"name": "body", "type": "text"},
    {"name": "status", "type": "string"},
    {"name": "votes", "type": "int"},
]


def ids(results: list[dict[str, Any]]) -> list[str]:
    return [result["id"] for result in results]


def test_the_module_is_this_packages(adopted: types.ModuleType, db: IndexedKameleonDB) -> None:
    assert (adopted.SearchEngine, adopted.SearchResult, adopted.IndexStatus) == (
        SearchEngine,
        SearchResult,
        IndexStatus,
    )
    assert type(db.engine) is SearchEngine


def test_a_records_life_is_followed(db: IndexedKameleonDB, address: DatabaseAddress) -> None:
    tickets = db.create_entity("Ticket", fields=TICKET)
    first = tickets.insert({"title": "Broken parcel", "body": "It arrived in pieces", "status": "open", "votes": 3})
    second = tickets.insert({"title": "Lost password", "status": "closed"})
    (found,) = db.search("broken pieces", limit=1)
    assert found == {
        "entity": "Ticket",
        "id": first,
        "score": pytest.approx(2 / 61),
        "data": {"title": "Broken parcel", "body": "It arrived in pieces", "status": "open", "votes": 3},
        "matched_text": "title: Broken parcel | body: It arrived in pieces | status: open",
    }
    tickets.update(first, {"title": "Wrong invoice", "body": None})
    assert index_rows(address)["Ticket", first].content == "title: Wrong invoice | status: open"
    assert ids(db.search("invoice", limit=1)) == [first]
    tickets.delete(first)
    assert ids(db.search("invoice")) == [second]
    assert set(index_rows(address)) == {("Ticket", second)}


def test_a_record_that_loses_its_text_leaves_the_index(db: IndexedKameleonDB, address: DatabaseAddress) -> None:
    notes = db.create_entity("Note", fields=[{"name": "text", "type": "text"}, {"name": "votes", "type": "int"}])
    record = notes.insert({"text": "something", "votes": 1})
    notes.update(record, {"text": ""})
    assert index_rows(address) == {}
    assert [(s["indexed"], s["pending"]) for s in db.embedding_status("Note")] == [(0, 0)]


@pytest.mark.parametrize("materialized", [False, True])
def test_filters_and_data_in_both_ways_of_storage(db: IndexedKameleonDB, materialized: bool) -> None:
    tickets = db.create_entity("Ticket", fields=TICKET)
    notes = db.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    states = ["open", "closed", "waiting"]
    numbered = tickets.insert_many(
        [{"title": f"parcel {i}", "status": states[i % 3], "votes": i % 4} for i in range(24)]
    )
    notes.insert({"text": "a parcel came"})
    if materialized:
        db.materialize_entity("Ticket")
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({"status": "open"}, {i for i in range(24) if i % 3 == 0}),
        ({"status": "open", "votes": 2}, {i for i in range(24) if i % 3 == 0 and i % 4 == 2}),
        ({"votes": 99}, set()),
    ]
    for where, expected in cases:
        results = db.search("parcel", where=where, limit=50)
        assert {numbered.index(result["id"]) for result in results} == expected
        assert all(result["data"][name] == value for result in results for name, value in where.items())
    assert len(db.search("parcel", where={"status": "waiting"}, limit=8)) == 8
    assert {r["entity"] for r in db.search("parcel", limit=50)} == {"Ticket", "Note"}
    assert [r["data"] for r in db.search("parcel", entity="Note")] == [{"text": "a parcel came"}]
    assert len(db.search("parcel", entities=["Ticket"], limit=50)) == 24


def test_status_has_what_kameleondb_shows(db: IndexedKameleonDB) -> None:
    assert db.embedding_status() == []
    tickets = db.create_entity("Ticket", fields=TICKET)
    db.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    before = datetime.now(UTC)
    tickets.insert_many([{"title": f"parcel {i}"} for i in range(3)])
    note, ticket = db.embedding_status()
    assert note == {"entity": "Note", "indexed": 0, "pending": 0, "last_updated": None}
    assert (ticket["entity"], ticket["indexed"], ticket["pending"]) == ("Ticket", 3, 0)
    assert (datetime.fromisoformat(ticket["last_updated"]) - before).total_seconds() > -1
    assert db.embedding_status("Ticket") == [ticket]


def test_keyword_index_alone(open_kameleondb: Open) -> None:
    db = open_kameleondb()
    tickets = db.create_entity("Ticket", fields=TICKET)
    tickets.insert_many([{"title": f"parcel {i}"} for i in range(5)])
    plain = kameleondb.core.engine.Entity("Ticket", db)
    late = plain.insert({"title": "parcel late"})
    assert [(s["indexed"], s["pending"]) for s in db.embedding_status()] == [(5, 1)]
    assert len(db.search("parcel")) == 5
    assert db.reindex_embeddings() == 6
    assert [(s["indexed"], s["pending"]) for s in db.embedding_status()] == [(6, 0)]
    plain.update(late, {"title": "something else"})
    assert [(s["indexed"], s["pending"]) for s in db.embedding_status()] == [(6, 1)]
    plain.delete(late)
    assert len(db.search("parcel")) == 5
    assert db.search("quantum") == []


# -- what was wrong and is not -----------------------------------------------------------------------------


class TestWhatWasWrong:
    def test_a_provider_is_called_once_for_many_records(self, db: IndexedKameleonDB, words: Words) -> None:
        db.create_entity("Ticket", fields=TICKET).insert_many([{"title": f"parcel {i}"} for i in range(100)])
        assert words.embedded == []
        assert sum(map(len, words.batches)) == 100
        assert len(words.batches) <= 3

    def test_more_than_ten_thousand_records_are_indexed(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/index.db"
        with SearchEngine(url, Hashes(4)) as search:
            search.index_records_batch(("Ticket", f"r{i}", f"parcel {i}") for i in range(10_001))
            assert search.get_status("Ticket")[0].indexed == 10_001
            assert search.search("parcel 10000", limit=1)[0].id == "r10000"

    def test_records_inserted_in_bulk_are_found_at_once(self, db: IndexedKameleonDB) -> None:
        tickets = db.create_entity("Ticket", fields=TICKET)
        inserted = tickets.insert_many([{"title": "red parcel"}, {"title": "blue letter"}])
        assert ids(db.search("letter", limit=1)) == inserted[1:]

    def test_postgresql_is_indexed_and_searched_by_vector(self, database: DatabaseAddress) -> None:
        from sqlalchemy import create_engine

        engine, provider = create_engine(sqlalchemy_url(database)), Words()
        with SearchEngine(engine, provider) as search:
            search.index_record("Ticket", "1", "parcel in pieces")
            search.index_records_batch([("Ticket", "2", "lost password")])
            search._connections.reading.read(
                lambda connection, reader: connection.execute("UPDATE kdb_search SET content = ''")
            )
            assert [r.id for r in search.search("password")] == ["2", "1"], "without a text only the vector can tell"
        engine.dispose()

    def test_the_last_row_of_the_table_may_be_the_nearest(self, db: IndexedKameleonDB, words: Words) -> None:
        tickets = db.create_entity("Ticket", fields=[{"name": "title", "type": "string"}])
        inserted = tickets.insert_many([{"title": f"parcel {i}"} for i in range(60)] + [{"title": "far away"}])
        words.embed = lambda text: [float(x) for x in words.vectors(["title: far away"])[0]]  # type: ignore[method-assign]
        assert ids(db.search("synonym", limit=1)) == inserted[-1:]

    def test_pending_is_counted_and_deleted_records_are_not_found(self, db: IndexedKameleonDB) -> None:
        tickets = db.create_entity("Ticket", fields=TICKET)
        inserted = tickets.insert_many([{"title": f"parcel {i}"} for i in range(4)])
        plain = Entity("Ticket", db)  # writes records behind the index's back
        plain.insert({"title": "parcel new"})
        plain.update(inserted[0], {"title": "parcel changed"})
        plain.delete(inserted[1])
        (status,) = db.embedding_status("Ticket")
        assert (status["indexed"], status["pending"]) == (4, 2)
        assert inserted[1] not in ids(db.search("parcel", limit=50))
        assert db.reindex_embeddings() == 4
        (status,) = db.embedding_status("Ticket")
        assert status["pending"] == 0
        assert len(db.search("parcel", limit=50)) == 4

    # That the vector index is not kept up to date during a load is the reindex's part: test_provider_reindex.py.

    def test_a_query_is_any_text(self, db: IndexedKameleonDB) -> None:
        tickets = db.create_entity("Ticket", fields=TICKET)
        record = tickets.insert({"title": 'a "quoted" parcel*'})
        for query in (
            '"',
            "parcel*",
            "-parcel",
            "parcel AND",
            "NEAR(parcel",
            'say "parcel',
            "title: parcel",
            "^parcel",
        ):
            assert set(ids(db.search(query))) <= {record}
        assert ids(db.search('"quoted parcel*')) == [record]


# -- names and results -------------------------------------------------------------------------------------

SIGNATURES = {
    "__init__": "self, engine, embedding_provider=None",
    "index_record": "self, entity_name, record_id, content",
    "index_records_batch": "self, records",
    "delete_record": "self, entity_name, record_id",
    "search": "self, query, entity=None, entities=None, limit=10, min_score=0.0, where=None",
    "get_status": "self, entity=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_kameleondbs(name: str) -> None:
    parameters = inspect.signature(getattr(SearchEngine, name)).parameters.values()
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    written = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(written) == SIGNATURES[name]


def test_results_are_kameleondbs() -> None:
    assert [f.name for f in fields(SearchResult)] == ["entity", "id", "score", "data", "matched_text"]
    assert [f.name for f in fields(IndexStatus)][:4] == ["entity", "indexed", "pending", "last_updated"]
    now = datetime.now(UTC)
    status = IndexStatus(entity="Ticket", indexed=100, pending=5, last_updated=now)
    assert (status.entity, status.indexed, status.pending, status.last_updated) == ("Ticket", 100, 5, now)
    result = SearchResult(entity="Ticket", id="1", score=0.5, data={"a": 1}, matched_text="a: 1")
    assert (result.entity, result.id, result.score, result.data, result.matched_text) == (
        "Ticket", "1", 0.5, {"a": 1}, "a: 1",
    )  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------


def test_code_of_the_page_does_what_it_says(tmp_path: Path, minilm: Model) -> None:
    adoption, module = code_blocks()
    assert len(adoption.strip().splitlines()) - adoption.count("\n\n") <= 10
    compile(module, "search/__init__.py", "exec")
    answer = subprocess.run(
        [sys.executable, "-c", adoption], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert (answer.returncode, answer.stdout.strip()) == (0, "{'title': 'Espresso machine'}"), answer.stderr
    assert execute(DatabaseAddress("sqlite", str(tmp_path / "shop.db"), ""), "SELECT count(*) FROM kdb_search") == [
        (3,)
    ]
