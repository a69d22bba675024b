"""Databases and connections in other encodings than UTF-8: text is stored as it is, or the record is rejected."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy
from articles import Articles
from kameleon import Answer
from search_engines import Words, sqlalchemy_url
from servers import Server, connect_as, database_name, execute, index_rows
from sqlalchemy.orm import Session

from kdb_fast.cli import run
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.pg_characters import Characters
from kdb_fast.db.pg_connection import connect_postgresql
from kdb_fast.errors import RecordError, RefusedError
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record, Reject, content_hash
from kdb_fast.search.engine import SearchEngine
from kdb_fast.stores import open_store
from kdb_fast.stores.base import FlushSlot

LATIN1 = "Zürich café"
BEYOND = {"LATIN1": "日€\u2019ő😀", "WIN1252": "日ő😀", "EUC_JP": "ก😀€", "KOI8R": "日ü"}
"""Characters that an encoding lacks."""
WITHIN = {
    "LATIN1": "Zürich café",
    "WIN1252": "Zürich 5 € ‘café’",
    "EUC_JP": "lake 日本の湖",
    "KOI8R": "kettle и чайник",
}
"""Text that it has."""


class Database(NamedTuple):
    """One database, and kdb-fast's commands on it."""

    address: DatabaseAddress
    capture: pytest.CaptureFixture[str]

    @property
    def url(self) -> str:
        return sqlalchemy_url(self.address).replace("+psycopg", "")

    def kdb_fast(self, *arguments: str, stdin: str = "", query: str = "") -> Answer:
        """Run a command; ``query`` is added to the address."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            self.capture.readouterr()
            code = run([*arguments, "--db", self.url + query])
        return Answer(code, *self.capture.readouterr())

    def reindex(self, texts: dict[str, str], entity: str = "N", query: str = "") -> dict[str, Any]:
        """Receipt of a reindex of these records by id."""
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in texts.items())
        options = ("--from", "-", "--entity", entity, "--json", "--no-progress", "--max-rejects", "99")
        answer = self.kdb_fast("reindex", *options, stdin=lines, query=query)
        assert answer.code == (3 if answer.json["rejected"] else 0), answer.err
        return answer.json

    def stored(self) -> dict[str, str]:
        """Content by record id, as another program in UTF-8 sees it."""
        with closing(psycopg.connect(self.address.conninfo, client_encoding="UTF8")) as connection:
            return dict(connection.execute("SELECT record_id, content FROM kdb_search").fetchall())

    def found(self, query: str, *options: str) -> list[str]:
        answer = self.kdb_fast("search", query, "--json", *options)
        assert answer.code == 0, answer.err
        return [result["id"] for result in answer.json["results"]]

    def rejects(self, *options: str) -> list[tuple[str, str, str]]:
        rows = self.kdb_fast("rejects", "list", "--json", *options).json["rejects"]
        return sorted((row["entity"], row["record_id"], row["reason"]) for row in rows)


Make = Callable[[str], Database]


@pytest.fixture
def make(postgres: Server, capsys: pytest.CaptureFixture[str]) -> Iterator[Make]:
    """Makes an empty database of an encoding."""
    made: list[DatabaseAddress] = []

    def create(encoding: str) -> Database:
        address = postgres.create_database()
        name = database_name(address)
        execute(postgres.address, f"DROP DATABASE {name}")
        options = f"ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        execute(postgres.address, f"CREATE DATABASE {name} {options}")
        made.append(address)
        return Database(replace(address, display=f"postgresql://tests/{name}"), capsys)

    yield create
    for address in made:
        postgres.drop_database(address)


def ways() -> list[Any]:
    return [
        pytest.param({"PGCLIENTENCODING": "LATIN1"}, "", "", id="environment"),
        pytest.param({"PGOPTIONS": "-c client_encoding=latin1"}, "", "", id="options of the environment"),
        pytest.param({}, "&client_encoding=latin1", "", id="address"),
        pytest.param({}, "&options=-cclient_encoding%3Dlatin1", "", id="options of the address"),
        pytest.param({}, "", "ALTER DATABASE {} SET client_encoding = latin1", id="database"),
    ]


@pytest.mark.parametrize(("environment", "query", "statement"), ways())
def test_text_is_stored_as_it_is_whatever_encoding_a_connection_is_asked_to_have(
    make: Make, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], query: str, statement: str
) -> None:
    database = make("UTF8")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if statement:
        execute(database.address, statement.format(database_name(database.address)))
    texts = {"1": LATIN1, "Zürich-2": "5 € 日本"}
    assert database.reindex(texts, "Küche", query)["stored"] == 2
    assert database.stored() == {key: f"text: {text}" for key, text in texts.items()}
    assert database.reindex(texts, "Küche", query)["unchanged"] == 2
    answer = database.kdb_fast("search", "Zürich", "--mode", "keyword", "--json", "--entity", "Küche", query=query)
    assert [(r["entity"], r["id"]) for r in answer.json["results"]] == [("Küche", "1")]


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP"])
def test_what_an_encoding_lacks_is_rejected_and_everything_else_stored(make: Make, encoding: str) -> None:
    database = make(encoding)
    within, beyond = WITHIN[encoding], BEYOND[encoding]
    texts = {"1": within, "2": "plain", **{f"b{i}": f"a {c} b" for i, c in enumerate(beyond)}, beyond[0]: "plain key"}
    for run_number in range(2):
        receipt = database.reindex(texts)
        assert (receipt["stored"], receipt["unchanged"]) == ((2, 0), (0, 2))[run_number]
        assert receipt["rejected"] == len(texts) - 2
    assert database.stored() == {"1": f"text: {within}", "2": "text: plain"}
    rejects = database.rejects()
    assert {reason for _, _, reason in rejects} == {"bad_encoding"}
    assert ("N", ascii(beyond[0])[1:-1], "bad_encoding") in rejects
    word = within.split()[0]
    assert database.found(word, "--mode", "keyword") == ["1"]
    # What no text can have is not found by keyword; the vectors rank as ever.
    for query in (beyond[0], f"{beyond[0]} {beyond[-1]}", f'"{beyond[0]} x"'):
        assert database.found(query, "--mode", "keyword") == []
        assert set(database.found(query)) == {"1", "2"}
    assert database.found(f"{word} {beyond[0]}", "--mode", "keyword") == ["1"]
    assert database.found(f"{word} -{beyond[0]}", "--mode", "keyword") == ["1"]
    assert database.found(f"plain -{word}", "--mode", "keyword") == ["2"]
    assert database.found(word, "--entity", beyond[0]) == []
    assert set(database.found(word, "--entity", beyond[0], "--entity", "N")) == {"1", "2"}
    assert database.kdb_fast("status").code == 0


def test_an_entity_that_cannot_be_written_is_rejected_listed_and_forgotten(make: Make) -> None:
    database = make("LATIN1")
    assert database.reindex({"1": "a"}, "Zürich")["stored"] == 1
    assert database.reindex({"1": "a", "€": "b"}, "日本")["rejected"] == 2
    wanted = [("\\u65e5\\u672c", "1", "bad_encoding"), ("\\u65e5\\u672c", "\\u20ac", "bad_encoding")]
    assert sorted(database.rejects("--entity", "日本")) == sorted(wanted)
    assert database.kdb_fast("rejects", "clear", "--entity", "日本", "--json").json == {"cleared": 2}
    assert database.rejects() == []


def test_a_page_full_of_what_cannot_be_stored_costs_no_embedding_and_few_questions(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = make("LATIN1")
    letters = [chr(0x4E00 + i) for i in range(2000)]
    texts = {f"b{i}": "".join(letters[(7 * i + j) % 2000] for j in range(50)) for i in range(1500)}
    asked = []
    real = Characters.missing

    def noted(*arguments: Any) -> Any:
        asked.append(1)
        return real(*arguments)

    monkeypatch.setattr(Characters, "missing", noted)
    receipt = database.kdb_fast(
        "reindex", "--from", "-", "--entity", "N", "--json", "--no-progress", "--max-rejects", "2000",
        stdin="".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in [*texts.items(), ("ok", LATIN1)]),
    ).json  # fmt: skip
    assert (receipt["rejected"], receipt["stored"], receipt["tokens"] < 20) == (1500, 1, True)
    assert database.stored() == {"ok": f"text: {LATIN1}"}


@pytest.mark.parametrize("version", [0, 150_000])
@pytest.mark.parametrize("encoding", list(BEYOND))
def test_the_server_says_which_characters_it_has(
    make: Make, monkeypatch: pytest.MonkeyPatch, encoding: str, version: int
) -> None:
    """In one question, or (before PostgreSQL 16) by halving; also within a transaction, which stays usable."""
    database = make(encoding)
    if version:
        monkeypatch.setattr(psycopg.ConnectionInfo, "server_version", version)
    with closing(connect_postgresql(database.address, role="test")) as connection:
        characters = Characters.of(connection)
        assert characters is not None
        texts = [WITHIN[encoding], BEYOND[encoding], "plain", "\ud800", "日本 кот café"]
        with connection.transaction():
            missing = characters.missing(connection, texts)
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert missing >= {*BEYOND[encoding], "\ud800"}
        assert missing.isdisjoint(WITHIN[encoding])
        assert characters.missing(connection, ["plain"]) == frozenset()


def test_a_character_that_comes_back_as_another_one_is_not_held(make: Make) -> None:
    """Its record would look changed in every run, and its key never be found."""
    database = make("EUC_JP")
    everything = [chr(n) for n in range(0xA0, 0xFFFF) if not 0xD800 <= n < 0xE000]
    with closing(connect_postgresql(database.address, role="test")) as connection:
        characters = Characters.of(connection)
        assert characters is not None
        missing = characters.missing(connection, everything)
        held = "".join(c for c in everything if c not in missing)
        assert len(held) > 6000
        assert connection.execute("SELECT %s::text", (held,)).fetchone() == (held,)


def test_keys_that_cannot_be_written_end_nothing(make: Make) -> None:
    database = make("LATIN1")
    with closing(open_store(database.address, "parent")) as store:
        store.prepare(16)
        run_spec = store.begin_run(fingerprint="f", model="m", dimensions=16, wait=0)
        assert store.lookup([("N", "1"), ("N", "€"), ("N", "日")]) == {}
        assert store.lookup([("日本", "1")]) == {}
        reject = Reject(("日本", "€" * 30), "some_reason", "the key '日' is € and …", content_hash("日"))
        store.flush(run_spec, 1, [], [reject], [("N", "€"), ("日本", "1")])
        assert [(r.entity, r.record_id, r.detail) for r in store.rejects("日本")] == [
            ("\\u65e5\\u672c", "\\u20ac" * 30, "the key '\\u65e5' is \\u20ac and \\u2026")
        ]
        assert store.forget_older_rejects(["日本"], 99) == 1


def test_insert_rejects_what_the_records_table_cannot_hold(make: Make) -> None:
    kameleondb = pytest.importorskip("kameleondb")
    database = make("LATIN1")
    client = kameleondb.KameleonDB(sqlalchemy_url(database.address))
    for name in ("Shared", "Own"):
        client.create_entity(name, fields=[{"name": "title", "type": "string"}, {"name": "more", "type": "json"}])
    assert client.materialize_entity("Own")["success"]
    for name in ("Shared", "Own"):
        lines = [
            {"title": LATIN1},
            {"title": "5 €"},
            {"title": "a", "more": {"日": 1}},
            {"title": "b", "more": {"é": 1}},
        ]
        stdin = "".join(json.dumps(line) + "\n" for line in lines)
        answer = database.kdb_fast("insert", name, "-", "--json", "--no-progress", "--max-rejects", "9", stdin=stdin)
        assert answer.code == 3, answer.err
        assert (answer.json["inserted"], answer.json["stored"]) == (2, 2)
        assert [(r["line"], r["reason"]) for r in answer.json["rejects"]] == [(2, "bad_encoding"), (3, "bad_encoding")]
    assert sorted(database.stored().values()) == ["title: Zürich café", "title: Zürich café", "title: b", "title: b"]
    for where, found in (({"title": LATIN1}, 2), ({"title": "日本"}, 0), ({"title": "5 €"}, 0)):
        assert len(database.found("Zürich", "--where", json.dumps(where))) == found
    assert database.kdb_fast("reindex", "--json", "--no-progress").json["unchanged"] == 4
    client.close()


def test_a_lent_engine_in_another_encoding(make: Make) -> None:
    database = make("UTF8")
    engine = sqlalchemy.create_engine(sqlalchemy_url(database.address), connect_args={"client_encoding": "latin1"})
    with SearchEngine(engine, Words()) as search:
        search.index_record("Note", "é", LATIN1)
        with Session(engine) as session:
            search.for_session(session).index_record("Note", "日", "日本 and €")
            session.commit()
            connection = session.connection().connection.driver_connection
            assert connection is not None
            assert connection.info.encoding == "iso8859-1"
        assert database.stored() == {"é": LATIN1, "日": "日本 and €"}
        assert [r.id for r in search.search("café")][:1] == ["é"]
        search.delete_record("Note", "é")
    assert database.stored() == {"日": "日本 and €"}
    engine.dispose()


def test_the_library_names_what_a_database_cannot_hold(make: Make) -> None:
    database = make("LATIN1")
    engine = sqlalchemy.create_engine(sqlalchemy_url(database.address))
    with SearchEngine(engine, Words()) as search:
        with pytest.raises(RecordError, match="bad_encoding"):
            search.index_records_batch([("Note", "1", "a"), ("Note", "2", "日本")])
        search.index_record("Note", "1", LATIN1)
        search.delete_record("Note", "日")
        with Session(engine) as session:
            session.execute(sqlalchemy.text("CREATE TABLE other (n int)"))
            search.for_session(session).index_record("Note", "2", "日本")
            with pytest.raises(RecordError, match="bad_encoding"):
                session.commit()
        assert search.search("日本", entity="日") == []
        assert [r.id for r in search.search("café")] == ["1"]
    assert database.stored() == {"1": LATIN1}
    engine.dispose()


def test_a_database_without_an_encoding_is_refused_before_anything_is_read(make: Make, tmp_path: Path) -> None:
    database = make("SQL_ASCII")
    missing = str(tmp_path / "missing.jsonl")
    for command in (
        ["reindex"],
        ["reindex", "--from", missing, "--entity", "N"],
        ["search", "x"],
        ["status"],
        ["rejects", "list"],
        ["rejects", "clear"],
        ["rejects", "retry"],
        ["demo"],
    ):
        answer = database.kdb_fast(*command)
        assert (answer.code, answer.out) == (4, ""), command
        assert "SQL_ASCII" in answer.err
        assert len([line for line in answer.err.splitlines() if line.startswith("kdb-fast:")]) == 1
    assert database.kdb_fast("insert", "N", "-", stdin='{"id": 1}').code == 4
    engine = sqlalchemy.create_engine(sqlalchemy_url(database.address))
    for given in (database.url, engine):
        with pytest.raises(RefusedError, match="SQL_ASCII"):
            SearchEngine(given, Words())
    engine.dispose()
    assert execute(database.address, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]


def test_index_rows_of_a_latin1_database_have_vectors(make: Make) -> None:
    database = make("LATIN1")
    database.reindex({str(i): f"{LATIN1} {i}" for i in range(250)})  # by processes, with COPY
    rows = index_rows(connect_as(database.address, client_encoding="UTF8"))
    assert len(rows) == 250
    assert all(row.vector is not None for row in rows.values())
    receipt = database.reindex({str(i): f"{LATIN1} {i}{'.' if i == 3 else ''}" for i in range(250)})
    assert (receipt["stored"], receipt["unchanged"]) == (1, 249)


def test_vectors_of_a_table_of_another_encoding_are_known_again(make: Make) -> None:
    articles = Articles(make("LATIN1").address)
    articles.add(LATIN1, "plain", "Ñandú")
    for stored in (3, 0):
        target = articles.target()
        with closing(open_store(articles.address, "test", target=target)) as store:
            store.prepare(8)
            run = store.begin_run(fingerprint="f", model="m", dimensions=8, wait=0)
            keys = [articles.key(n) for n in range(3)]
            assert [row.content_hash for row in store.lookup(keys).values()] == [
                content_hash(text) for text in (LATIN1, "plain", "Ñandú")
            ]
            slot = Slab.local(SlabShape(1, 3, 8)).slots[0]
            texts = zip(keys, (LATIN1, "plain", "Ñandú"), strict=True)
            rows = [Row(Record(k, t)) for k, t in texts if store.lookup([k])[k].fingerprint != "f"]
            assert len(rows) == stored
            if rows:
                slot.put(1, rows, [NO_VALUE] * len(rows))
                slot.vectors[:] = 0.5
                assert store.flush(run, 1, [FlushSlot(slot, frozenset())], [], []).rows == 3
            store.end_run(run.number, "done", {})
