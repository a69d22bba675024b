"""``kdb_fast.kameleondb.install()``: KameleonDB's own classes on the batch engine, with the release and the
development branch, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from development import TheirEngine, develop
from kameleon import Kameleon, close_kameleon, open_kameleon
from search_engines import Words

from kdb_fast import SearchEngine
from kdb_fast.errors import KdbFastError, ModelError, SchemaError, UsageError
from kdb_fast.kameleondb import install, installed, uninstall

pytest.importorskip("kameleondb")
pytestmark = pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")

RECORDS = [{"name": "Alice", "note": "likes coffee"}, {"name": "Bob", "note": "likes tea"}, {"age": 7}]
FIELDS = [{"name": "name", "type": "string"}, {"name": "age", "type": "int"}, {"name": "note", "type": "text"}]


class Failing(Words):
    """A provider that can be told to fail."""

    fails = False

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        if self.fails:
            raise RuntimeError("the provider is away")
        return super().embed_batch(texts)


@pytest.fixture(autouse=True)
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # before the stand-in is taken away
    yield
    uninstall()


@pytest.fixture(params=["release", "development"])
def branch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "development":
        develop(monkeypatch)
    return str(request.param)


@pytest.fixture(params=["sqlite", "postgresql"])
def kameleon(
    request: pytest.FixtureRequest, branch: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Kameleon]:
    found = open_kameleon(request.param, request, capsys, tmp_path)
    if branch == "development":
        found.client._embeddings_enabled = True
    found.client.create_entity("Contact", fields=FIELDS)
    yield found
    close_kameleon(found, request)


def names(client: Any) -> dict[str, dict[str, Any]]:
    """All attributes of the classes that are replaced."""
    return {c.__name__: dict(vars(c)) for c in (type(client), type(client.entity("Contact")))}


def test_insert_many_indexes_in_one_batch(kameleon: Kameleon) -> None:
    provider = Words()
    install(provider)
    ids = kameleon.client.entity("Contact").insert_many(RECORDS, created_by="me")
    assert len(ids) == 3
    assert [len(batch) for batch in provider.batches] == [2], "one call, and nothing for a record without text"
    assert kameleon.index() == {ids[0]: "name: Alice | note: likes coffee", ids[1]: "name: Bob | note: likes tea"}
    assert kameleon.execute("SELECT DISTINCT created_by FROM kdb_records") == [("me",)]
    (found,) = kameleon.client.search("coffee", entity="Contact", limit=1)
    assert found["id"] == ids[0]
    assert found["data"]["name"] == "Alice"
    assert set(found) == {"entity", "id", "score", "data", "matched_text"}


def test_insert_and_update_index_one_record(kameleon: Kameleon) -> None:
    install(Words())
    contacts = kameleon.client.entity("Contact")
    key = contacts.insert({"name": "Carol"})
    assert kameleon.index() == {key: "name: Carol"}
    contacts.update(key, {"name": "Caroline"})
    assert kameleon.index() == {key: "name: Caroline"}
    contacts.update(key, {"name": ""})
    assert kameleon.index() == {}


def test_what_it_indexes_a_reindex_leaves(kameleon: Kameleon) -> None:
    install(Words())
    kameleon.client.entity("Contact").insert_many(RECORDS)
    result = kameleon.client.reindex_embeddings("Contact", batch_size=100)
    assert (result["records_indexed"], result["indexed"], result["skipped"]) == (0, 0, 2)


def test_a_reindex_takes_all_records_and_returns_both_counts(kameleon: Kameleon) -> None:
    contacts = kameleon.client.entity("Contact")
    if not hasattr(type(kameleon.client), "_index_record_for_search"):
        contacts.insert({"name": "before"})
    contacts.insert_many(RECORDS)
    before = len(kameleon.execute("SELECT id FROM kdb_records")) - 1
    install(Words())
    result = kameleon.client.reindex_embeddings(batch_size=10)
    assert result == {
        "status": "complete",
        "entities_processed": 1,
        "records_indexed": before,
        "indexed": before,
        "skipped": 0,
        "rejected": 0,
    }
    (status,) = kameleon.client.embedding_status("Contact")
    assert (status["indexed"], status["pending"]) == (before, 0)
    assert kameleon.client.reindex_embeddings("Contact")["skipped"] == before
    with pytest.raises(SchemaError, match="Nobody"):
        kameleon.client.reindex_embeddings("Nobody")
    with pytest.raises(UsageError, match="batch-size"):
        kameleon.client.reindex_embeddings(batch_size=0)


def test_records_stay_and_a_reindex_completes_them_when_indexing_fails(kameleon: Kameleon) -> None:
    provider = Failing()
    install(provider)
    contacts = kameleon.client.entity("Contact")
    contacts.insert_many(RECORDS[:1])
    provider.fails = True
    with pytest.raises(KdbFastError, match="Failing failed") as failure:
        contacts.insert_many(RECORDS[1:2])
    said = str(failure.value)
    assert "1 record of Contact stored and not indexed: reindex_embeddings('Contact') completes it" in said
    assert len(failure.value.record_ids) == 1  # type: ignore[attr-defined]
    assert [s["pending"] for s in kameleon.client.embedding_status()] == [1]
    provider.fails = False
    assert kameleon.client.reindex_embeddings("Contact")["indexed"] == 1
    assert len(kameleon.index()) == 2


def test_nothing_is_indexed_when_inserting_fails(kameleon: Kameleon) -> None:
    from kameleondb.exceptions import KameleonDBError

    install(Words())
    with pytest.raises(KameleonDBError):
        kameleon.client.entity("Contact").insert_many([*RECORDS, {"no such field": 1}])
    assert kameleon.index() == {}
    assert kameleon.execute("SELECT count(*) FROM kdb_records") == [(0,)]


def test_nothing_is_inserted_when_the_model_is_not_to_be_had(kameleon: Kameleon) -> None:
    from kdb_fast import FastEmbedProvider

    install(FastEmbedProvider("no/such-model"))
    with pytest.raises(ModelError):
        kameleon.client.entity("Contact").insert_many(RECORDS)
    assert kameleon.execute("SELECT count(*) FROM kdb_records") == [(0,)]


def test_uninstall_restores_everything_and_a_second_install_is_none(kameleon: Kameleon) -> None:
    before = names(kameleon.client)
    install(Words())
    once = names(kameleon.client)
    assert once != before
    install(Words())
    assert names(kameleon.client) == once
    assert installed()
    uninstall()
    assert names(kameleon.client) == before
    assert not installed()
    uninstall()
    kameleon.client.entity("Contact").insert_many(RECORDS)
    assert kameleon.execute("SELECT count(*) FROM kdb_records") == [(3,)]


def test_threads_share_one_engine(kameleon: Kameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def noted(*arguments: Any) -> SearchEngine:
        made.append(arguments)
        return SearchEngine(*arguments)

    monkeypatch.setattr("kdb_fast.search.engine.SearchEngine", noted)
    contacts = kameleon.client.entity("Contact")
    start, errors = threading.Barrier(4), []

    def work(number: int) -> None:
        try:
            start.wait(30)
            install(Words())
            contacts.insert_many([{"name": f"thread {number}"}])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(made) == 1
    assert sorted(kameleon.index().values()) == [f"name: thread {n}" for n in range(4)]


def test_close_closes_the_engine_and_it_may_be_used_again(kameleon: Kameleon) -> None:
    install(Words())
    first = kameleon.client._search_engine
    kameleon.client.close()
    assert kameleon.client._search_engine is not first
    assert kameleon.client.search("nothing there") == []


def test_without_embeddings_nothing_is_indexed(
    branch: str, kameleon: Kameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAMELEONDB_EMBEDDINGS", "0")
    if branch == "development":
        kameleon.client._embeddings_enabled = False
    install(Words())
    kameleon.client.entity("Contact").insert_many(RECORDS)
    assert kameleon.client.embedding_status() == []
    for call in (kameleon.client.reindex_embeddings, lambda: kameleon.client.search("coffee")):
        with pytest.raises(RuntimeError, match="KAMELEONDB_EMBEDDINGS=1"):
            call()


# -- one database is enough ------------------------------------------------------------------------------------


def test_a_missing_name_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from kameleondb.core.engine import Entity, KameleonDB

    before = dict(vars(KameleonDB))
    monkeypatch.delattr(Entity, "insert_many")
    with pytest.raises(SchemaError, match=r"no kameleondb\.core\.engine\.Entity\.insert_many") as refusal:
        install()
    assert "\n" not in str(refusal.value)
    assert dict(vars(KameleonDB)) == before
    assert not installed()


def test_a_missing_kameleondb_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kameleondb.core.engine", None)
    monkeypatch.setitem(__import__("sys").modules, "kameleondb", None)
    with pytest.raises(KdbFastError) as refusal:
        install()
    assert "pip install 'kdb-fast[kameleondb]'" in str(refusal.value)


def test_in_memory_records_are_indexed_and_a_reindex_is_refused() -> None:
    from kameleondb import KameleonDB

    install(Words())
    client: Any
    with KameleonDB("sqlite:///:memory:") as client:
        client.create_entity("Contact", fields=FIELDS).insert_many(RECORDS)
        assert client.search("coffee", limit=1)[0]["data"]["name"] == "Alice"
        with pytest.raises(UsageError, match="in memory"):
            client.reindex_embeddings()


def test_the_development_branch_gets_our_engine_and_keeps_its_providers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    develop(monkeypatch)
    from kameleondb import KameleonDB, search

    first: Any = KameleonDB  # its new arguments are the stand-in's
    theirs = Words()
    old = first(f"sqlite:///{tmp_path / 'a.db'}", embeddings=True, embedding_provider=theirs)
    assert isinstance(old._search_engine, TheirEngine)
    install(Words(8))
    assert search.SearchEngine is SearchEngine
    assert isinstance(old._search_engine, SearchEngine)
    provider: object = old._search_engine.embedding_provider
    assert provider is theirs
    own = Words(4)
    new = first(f"sqlite:///{tmp_path / 'b.db'}", embeddings=True, embedding_provider=own)
    assert new._search_engine.embedding_provider is own
    given = first(f"sqlite:///{tmp_path / 'c.db'}", embeddings=True)
    assert given._search_engine.embedding_provider.dimensions == 8
    off = first(f"sqlite:///{tmp_path / 'd.db'}")
    assert off._search_engine is None
    uninstall()
    installed: object = search.SearchEngine
    assert installed is TheirEngine
    assert isinstance(old._search_engine, TheirEngine)
    assert off._search_engine is None
    for client in (old, new, given, off):
        client.close()
