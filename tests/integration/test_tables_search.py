"""Search of tables of any kind on both databases, compared with all rows ranked in NumPy."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import psycopg
import pytest
from articles import Articles
from psycopg.conninfo import conninfo_to_dict
from servers import Vector, database_name, execute

import kdb_fast
from kdb_fast.cli import console, run
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.errors import SchemaError, UsageError
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.origins import IndexModel, Maker
from kdb_fast.records import Key, Record, content_hash
from kdb_fast.search import query_model
from kdb_fast.search.ahead import QueryAhead
from kdb_fast.search.tables import postgresql as pg_reader
from kdb_fast.search.tables.indexes import uses
from kdb_fast.search.tables.results import Chunk, Outcome, TableResult
from kdb_fast.search.tables.search import Question, search_definition
from kdb_fast.stores import open_store, targets
from kdb_fast.stores.base import FlushSlot, TargetTable
from kdb_fast.stores.postgresql import keyword as pg_keyword
from kdb_fast.stores.postgresql import table_find as pg_table
from kdb_fast.stores.postgresql.session import PgSession
from kdb_fast.stores.sqlite import keyword as sqlite_keyword
from kdb_fast.stores.sqlite import table_find as sqlite_table
from kdb_fast.tables.definition import Definition
from kdb_fast.tables.find_relation import find_relation
from kdb_fast.tables.key import KeyColumn
from kdb_fast.tables.pieces import PieceOf, piece_key
from kdb_fast.tables.table_target import TableTarget
from kdb_fast.tables.target import rows_on

DIMENSIONS = 8
MODEL, OTHER = "stub/one", "stub/other"
ROWS = 300
LANGS = ("en", "de", "fr")

_numbers = itertools.count(10)


def fingerprint(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()[:16]


def vector_of(text: str, model: str = MODEL) -> Vector:
    """A vector that depends on the text and the model alone; its length is not 1."""
    seed = int.from_bytes(hashlib.sha256(f"{model} {text}".encode()).digest()[:8], "big")
    vector: Vector = np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)
    return vector * np.float32(0.5 + seed % 7 / 4)


def cosines(texts: Mapping[Any, str], query: str, model: str = MODEL) -> dict[Any, float]:
    """Of each row with the query, the nearest first."""
    wanted = vector_of(query, model).astype(np.float64)
    wanted /= np.linalg.norm(wanted)
    found = {}
    for key, text in texts.items():
        vector = vector_of(text, model).astype(np.float64)
        found[key] = float(vector @ wanted / np.linalg.norm(vector))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@pytest.fixture(autouse=True)
def stub_models(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What embeds queries; gives the texts that were embedded."""
    embedded: list[str] = []

    def embed_query(query: str, made: Any, *, model: str | None = None, **options: Any) -> tuple[Vector, Maker]:
        name = model or (made.name if made is not None else MODEL)
        embedded.append(query)
        return vector_of(query, name), Maker(fingerprint(name), name, DIMENSIONS)

    monkeypatch.setattr(query_model, "embed_query", embed_query)
    monkeypatch.setattr(query_model, "_not_to_be_had", lambda origins: {})
    return embedded


def embed(address: DatabaseAddress, target: TargetTable, texts: Mapping[Key, str], model: str = MODEL) -> None:
    """What a run does with these rows."""
    with contextlib.closing(open_store(address, "test", target=target)) as store:
        store.prepare(DIMENSIONS)
        run = store.begin_run(fingerprint=fingerprint(model), model=model, dimensions=DIMENSIONS, wait=0)
        rows = list(texts.items())
        for start in range(0, len(rows), 128):
            part = rows[start : start + 128]
            slot = Slab.local(SlabShape(1, len(part), DIMENSIONS)).slots[0]
            slot.put(1, [Row(Record(key, text)) for key, text in part], [NO_VALUE] * len(part))
            for i, (_, text) in enumerate(part):
                slot.vectors[i] = vector_of(text, model)
            result = store.flush(run, next(_numbers), [FlushSlot(slot, frozenset())], [], [])
            assert result.rows == len(part)
        store.end_run(run.number, "done", {})


class Filled(NamedTuple):
    """A table whose rows all have vectors."""

    articles: Articles
    definition: Definition
    texts: dict[int, str]

    def search(self, query: str, **options: Any) -> list[TableResult]:
        return self.ask(query, **options).results

    def ask(self, query: str, **options: Any) -> Outcome:
        return search_definition(self.articles.address, self.definition, Question(query=query, **options))

    def lang(self, number: int) -> str:
        return LANGS[number % len(LANGS)]


def text_of(number: int) -> str:
    return f"text {number}"


COLUMNS = {
    "postgresql": "id bigint PRIMARY KEY, lang text, body text, published boolean, "
    '"odd % {name} """ int, embedding vector(8)',
    "sqlite": "id INTEGER PRIMARY KEY, lang TEXT, body TEXT, published INTEGER, "
    '"odd % {name} """ INTEGER, embedding BLOB',
}
ODD = 'odd % {name} "'


@pytest.fixture
def filled(index: DatabaseAddress) -> Filled:
    return fill(index, COLUMNS[index.dialect])


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """The same for tests that only read."""
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("shared") / "index.db"
        yield fill(DatabaseAddress("sqlite", str(path), f"sqlite:///{path}"), COLUMNS["sqlite"])
        return
    server = request.getfixturevalue("postgres")
    address = server.create_database()
    yield fill(address, COLUMNS["postgresql"])
    server.drop_database(address)


def fill(address: DatabaseAddress, columns: str, *, rows: int = ROWS, model: str = MODEL) -> Filled:
    """A table ``articles`` with ``rows`` rows, each with a vector of ``model``."""
    articles = Articles(address, columns)
    insert_rows(articles, rows)
    texts = {number: text_of(number) for number in range(rows)}
    embed(address, articles.target(), {as_key(address, n): text for n, text in texts.items()}, model)
    return Filled(articles, defined(articles), texts)


def as_key(address: DatabaseAddress, number: int) -> Key:
    return (str(number),) if address.dialect == "postgresql" else (number,)


def insert_rows(articles: Articles, rows: int) -> None:
    odd = ', "odd % {name} """'
    values = ", ".join(f"({n}, '{LANGS[n % 3]}', '{text_of(n)}', {n} % 2 = 0, {n * 2})" for n in range(rows))
    execute(articles.address, f"INSERT INTO {articles.name} (id, lang, body, published{odd}) VALUES {values}")


def defined(articles: Articles, **options: Any) -> Definition:
    postgresql = articles.postgresql
    given: dict[str, Any] = {
        "name": "articles",
        "schema": "shop" if postgresql else None,
        "table": "articles",
        "key": ("id",),
        "text": ("body",),
        "form": "" if postgresql else "blob",
        "model": MODEL,
        "dimensions": DIMENSIONS,
    }
    return Definition(**{**given, **options})


def ids(results: Iterable[TableResult]) -> list[Any]:
    return [result.key["id"] for result in results]


def agree(results: Sequence[TableResult], expected: Mapping[Any, float], limit: int = 10) -> None:
    """The results are the first ``limit`` of these, in their order."""
    assert ids(results) == list(expected)[:limit]
    for result in results:
        assert result.similarity == pytest.approx(expected[result.key["id"]], abs=1e-5)


def test_table_of_an_odd_name(index: DatabaseAddress) -> None:
    table, name = 'tea % "{0}" & more', "100 %"
    quoted = '"' + table.replace('"', '""') + '"'
    articles = Articles(index, COLUMNS[index.dialect], f"shop.{quoted}" if index.dialect == "postgresql" else quoted)
    insert_rows(articles, 20)
    texts = {number: text_of(number) for number in range(20)}
    target = replace(articles.target(name=name), keyword=with_keyword(index))
    for _ in range(2):  # the second time what is known of it is there
        embed(index, target, {as_key(index, n): text for n, text in texts.items()})
        with contextlib.closing(open_store(index, "test", target=target)) as store:
            store.finish_index(lambda what: None)
    filled = Filled(articles, defined(articles, table=table, name=name, keyword=target.keyword), texts)
    expected = cosines({n: t for n, t in texts.items() if n > 2}, "a query")
    agree(filled.search("a query", where="id > 2", mode="vector"), expected)
    assert ids(filled.search("text 7", mode="keyword"))[0] == 7
    assert filled.search("a query", columns=("lang",), limit=1)[0].columns.keys() == {"lang"}
    with pytest.raises(UsageError, match="nearest: lang"):
        filled.search("a query", columns=("lag",))


def test_nearest_rows_in_their_order_with_text_and_columns(shared: Filled) -> None:
    results = shared.search("a query", columns=("lang", ODD))
    agree(results, cosines(shared.texts, "a query"))
    first = results[0]
    number = first.key["id"]
    assert first.matched_text == shared.texts[number]
    assert first.columns == {"lang": shared.lang(number), ODD: number * 2}
    assert first.score == pytest.approx(1 / 61)
    assert first.chunk is None
    agree(shared.search("a query", limit=1), cosines(shared.texts, "a query"), 1)
    assert len(shared.search("a query", limit=1000)) == ROWS


@pytest.mark.parametrize(
    ("where", "meets"),
    [
        ("published AND lang = 'en'", lambda n: n % 6 == 0),
        ("articles.id < 7 -- the first ones", lambda n: n < 7),
        ("lang LIKE 'd%' OR id = 0", lambda n: n % 3 == 1 or n == 0),
        ('"odd % {name} """ % 8 = 0', lambda n: n % 4 == 0),
        ("id IN (SELECT max(id) FROM {articles})", lambda n: n == ROWS - 1),
        ("body = 'text 1'", lambda n: n == 1),
        ("false", lambda n: False),
    ],
)
def test_condition(shared: Filled, where: str, meets: Callable[[int], bool]) -> None:
    where = where.replace("{articles}", shared.articles.name)
    texts = {n: text for n, text in shared.texts.items() if meets(n)}
    agree(shared.search("a query", where=where), cosines(texts, "a query"))


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("publshed", "publshed"),
        ("id = ", "syntax error"),
        ("id = ?", ""),
        ("true; DROP TABLE articles", ""),
        ("id = :x", ""),
    ],
)
def test_condition_that_does_not_parse_is_one_line(shared: Filled, where: str, says: str) -> None:
    with pytest.raises(UsageError, match="--where is no condition over the columns of the source: ") as caught:
        shared.search("a query", where=where)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert shared.search("a query")


def test_condition_that_fails_on_a_row(database: DatabaseAddress) -> None:
    filled = fill(database, COLUMNS["postgresql"], rows=5)
    with pytest.raises(UsageError, match="--where fails on a row: division by zero"):
        filled.search("a query", where="1 / (id - 3) > 0")


def test_condition_can_write_nothing(database: DatabaseAddress) -> None:
    filled = fill(database, COLUMNS["postgresql"], rows=5)
    execute(database, "CREATE FUNCTION shop.meddle() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN "
            "DELETE FROM shop.articles; RETURN true; END $$")  # fmt: skip
    with pytest.raises(UsageError, match="read-only transaction"):
        filled.search("a query", where="shop.meddle()")
    assert len(filled.search("a query")) == 5


@pytest.mark.parametrize("name", ["lnag", "", "embedding, id"])
def test_column_that_is_not_there(shared: Filled, name: str) -> None:
    with pytest.raises(UsageError, match="The source has no column") as caught:
        shared.search("a query", columns=(name,))
    assert ("nearest: lang" in str(caught.value)) == (name == "lnag")


def test_rows_of_another_model_and_of_another_program_are_not_ranked(filled: Filled) -> None:
    articles = filled.articles
    other = {as_key(articles.address, n): filled.texts[n] for n in range(100, 200)}
    embed(articles.address, articles.target(), other, OTHER)
    for number in range(50):
        articles.set_vector(number, vector_of("a query"))  # the nearest there can be
    for number in range(50, 60):
        execute(articles.address, f"UPDATE {articles.name} SET embedding = NULL WHERE id = {number}")
    by_one = {n: t for n, t in filled.texts.items() if n >= 60 and not 100 <= n < 200}
    by_other = {n: t for n, t in filled.texts.items() if 100 <= n < 200}
    outcome = filled.ask("a query", limit=300)
    found = {result.key["id"]: result.similarity for result in outcome.results}
    expected = {**cosines(by_one, "a query"), **cosines(by_other, "a query", OTHER)}
    assert found == pytest.approx(expected, abs=1e-5)
    assert outcome.left_out == []

    only = filled.ask("a query", model=OTHER, limit=300)
    foreign = dict.fromkeys(range(50), "a query")
    assert set(ids(only.results)) == by_other.keys() | foreign.keys()
    assert [(part.model, part.rows, part.reason) for part in only.left_out] == [
        (MODEL, 200, "another one was asked for.")
    ]
    named = filled.search("a query", model=MODEL)
    assert set(ids(named)) <= foreign.keys()
    assert named[0].similarity == pytest.approx(1)


def test_edited_text_is_found_by_the_vector_that_it_had_and_shown_as_it_is(filled: Filled) -> None:
    first = next(iter(cosines(filled.texts, "a query")))
    filled.articles.set(first, "edited")
    result = filled.search("a query")[0]
    assert (result.key["id"], result.matched_text) == (first, "edited")


def test_nothing_was_embedded(index: DatabaseAddress) -> None:
    articles = Articles(index, COLUMNS[index.dialect])
    insert_rows(articles, 3)
    definition = defined(articles)
    with pytest.raises(SchemaError, match="no vector is known to be of any model") as caught:
        search_definition(index, definition, Question(query="a query"))
    assert "kdb-fast reindex articles" in str(caught.value)
    articles.set_vector(1, vector_of("text 1"))
    found = search_definition(index, definition, Question(query="text 1", model=MODEL))
    assert ids(found.results) == [1]


def test_query_that_says_nothing(shared: Filled) -> None:
    assert shared.search(" -- ") == []


def test_command_embeds_the_query_ahead_by_the_model_of_most_rows(shared: Filled, stub_models: list[str]) -> None:
    asked: list[tuple[str, IndexModel | None]] = []

    class Ahead(QueryAhead):
        def embed(self, query: str, likely: Future[IndexModel | None]) -> tuple[Vector, Maker]:
            asked.append((query, likely.result()))
            return vector_of(query), Maker(fingerprint(MODEL), MODEL, DIMENSIONS)

    definition = defined(shared.articles, query_prefix="query: ")
    made = IndexModel(MODEL, DIMENSIONS, fingerprint(MODEL))
    for model, likely in (None, made), (MODEL, None):
        question = Question(query="text 7", model=model)
        search_definition(shared.articles.address, definition, question, Ahead(None, "not/here", None))
        assert asked.pop() == ("query: text 7", likely)


def test_query_prefix_is_read_before_the_query(shared: Filled, stub_models: list[str]) -> None:
    definition = defined(shared.articles, query_prefix="query: ")
    found = search_definition(shared.articles.address, definition, Question(query="text 7"))
    assert stub_models == ["query: text 7"]
    agree(found.results, cosines(shared.texts, "query: text 7"))


def test_query_of_another_length_is_refused(index: DatabaseAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = fill(index, COLUMNS[index.dialect], rows=3)
    short = np.ones(4, np.float32)
    monkeypatch.setattr(query_model, "embed_query", lambda *a, **k: (short, Maker(fingerprint(MODEL), MODEL, 4)))
    with pytest.raises(UsageError, match="holds vectors of 8 numbers; the model of the query gives 4"):
        filled.search("a query", model=MODEL)


@pytest.mark.parametrize("columns", ["id int PRIMARY KEY, body text, embedding vector",
                                     "id int PRIMARY KEY, body text, embedding halfvec(8)"])  # fmt: skip
def test_other_types_of_columns(database: DatabaseAddress, columns: str) -> None:
    execute(database, "CREATE EXTENSION vector SCHEMA public")
    filled = fill_plain(database, columns)
    found = filled.search("a query")
    expected = cosines(filled.texts, "a query")
    assert ids(found) == list(expected)[:10]
    assert found[0].similarity == pytest.approx(expected[found[0].key["id"]], abs=1e-3)
    if "halfvec" not in columns:
        execute(database, "UPDATE shop.articles SET embedding = '[1,2,3]' WHERE id = 0")  # of another length
        texts = {n: t for n, t in filled.texts.items() if n}
        agree(filled.search("a query", model=MODEL), cosines(texts, "a query"))


def test_pgvector_outside_of_the_search_path(database: DatabaseAddress) -> None:
    execute(database, "CREATE SCHEMA ext")
    execute(database, "CREATE EXTENSION vector SCHEMA ext")
    execute(database, f"ALTER DATABASE {database_name(database)} SET enable_sort = off")
    filled = fill_plain(database, "id int PRIMARY KEY, body text, embedding ext.vector(8)")
    index = "USING hnsw ((ext.subvector(embedding, 1, 6)::ext.halfvec(6)) ext.halfvec_l2_ops)"
    execute(database, f"CREATE INDEX ON shop.articles {index}")
    agree(filled.search("a query", where="id < 5"), cosines({n: filled.texts[n] for n in range(5)}, "a query"))
    assert filled.search("a query")


def test_json_vectors(sqlite_database: DatabaseAddress) -> None:
    articles = Articles(sqlite_database, "id INTEGER PRIMARY KEY, body TEXT, embedding TEXT")
    texts = {n: text_of(n) for n in range(50)}
    for number, text in texts.items():
        execute(sqlite_database, "INSERT INTO articles (id, body) VALUES (?, ?)", number, text)
    embed(sqlite_database, articles.target(form="json"), {(n,): t for n, t in texts.items()})
    execute(sqlite_database, "UPDATE articles SET embedding = 'no vector' WHERE id = 3")
    del texts[3]
    filled = Filled(articles, defined(articles, form="json"), texts)
    agree(filled.search("a query"), cosines(texts, "a query"))


def fill_plain(address: DatabaseAddress, columns: str, rows: int = 50) -> Filled:
    """A table of id, body and embedding."""
    articles = Articles(address, columns)
    values = ", ".join(f"({n}, '{text_of(n)}')" for n in range(rows))
    execute(address, f"INSERT INTO {articles.name} (id, body) VALUES {values}")
    texts = {n: text_of(n) for n in range(rows)}
    embed(address, articles.target(), {as_key(address, n): t for n, t in texts.items()})
    return Filled(articles, defined(articles), texts)


KEYS: dict[str, tuple[str, str, list[Any]]] = {
    "uuid": ("postgresql", "id uuid PRIMARY KEY", [uuid.UUID(int=n) for n in range(20)]),
    "date": (
        "postgresql",
        "id date PRIMARY KEY",
        [*(datetime.date(2020, 1, n + 1) for n in range(19)), "infinity"],
    ),
    "interval": (
        "postgresql",
        "id interval PRIMARY KEY",
        ["1 mon", "00:00:00", *(f"{n} days" for n in range(2, 20))],
    ),
    "text": ("both", "id text PRIMARY KEY", [f"a\"b\\c,{{}} %s ' {n}" for n in range(20)]),
    "nocase": ("sqlite", "id TEXT COLLATE NOCASE PRIMARY KEY", [f"Key {n}" for n in range(20)]),
    "blob": ("sqlite", "id BLOB PRIMARY KEY", [b"\x00" + bytes([n]) for n in range(20)]),
    "mixed": ("sqlite", "id PRIMARY KEY", [1, "1", 2.5, b"1", *(f"x{n}" for n in range(16))]),
    "without rowid": ("sqlite", "id TEXT PRIMARY KEY", [f"x{n}" for n in range(20)]),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_type_come_back_as_they_are(index: DatabaseAddress, kind: str) -> None:
    dialect, column, keys = KEYS[kind]
    if dialect not in ("both", index.dialect):
        pytest.skip(f"{kind} is of {dialect}")
    postgresql = index.dialect == "postgresql"
    articles = Articles(index, f"{column}, body text, embedding {'vector(8)' if postgresql else 'blob'}")
    texts: dict[Any, str] = {key: text_of(number) for number, key in enumerate(keys)}
    for key, text in texts.items():
        execute(index, f"INSERT INTO {articles.name} (id, body) VALUES (%s, %s)", key, text)
    embed(index, articles.target(), {(str(k) if postgresql else k,): t for k, t in texts.items()})
    filled = Filled(articles, defined(articles), {})
    agree(filled.search("a query", limit=20), cosines(texts, "a query"), 20)


def test_key_of_several_columns(index: DatabaseAddress) -> None:
    articles = Articles(index)
    articles.add(*(text_of(n) for n in range(20)))
    embed(index, articles.target(), {articles.key(n): text_of(n) for n in range(20)})
    filled = Filled(articles, defined(articles, key=()), {})
    found = filled.search("a query", where="lang = 'en'")
    agree(found, cosines({n: text_of(n) for n in range(20)}, "a query"))
    assert found[0].key.keys() == {"id", "lang"}


def test_rows_that_left_the_filter_are_not_found(shared: Filled) -> None:
    definition = defined(shared.articles, filter="id % 2 = 1 -- odd ones")
    found = search_definition(shared.articles.address, definition, Question(query="a query", where="id < 100"))
    texts = {n: t for n, t in shared.texts.items() if n % 2 and n < 100}
    agree(found.results, cosines(texts, "a query"))


# -- indexes of PostgreSQL ---------------------------------------------------------------------------------

INDEXES = {
    "hnsw cosine": "USING hnsw (embedding vector_cosine_ops)",
    "hnsw l2": "USING hnsw (embedding vector_l2_ops) WITH (m = 8)",
    "hnsw ip": "USING hnsw (embedding vector_ip_ops)",
    "hnsw l1": "USING hnsw (embedding vector_l1_ops)",
    "ivfflat cosine": "USING ivfflat (embedding vector_cosine_ops) WITH (lists = 4)",
    "ivfflat l2": "USING ivfflat (embedding vector_l2_ops) WITH (lists = 4)",
    "partial": "USING hnsw (embedding vector_cosine_ops) WHERE published",
    "halfvec": "USING hnsw ((embedding::halfvec(8)) halfvec_cosine_ops)",
    "subvector": "USING hnsw ((subvector(embedding, 1, 6)::halfvec(6)) halfvec_cosine_ops)",
    "bits": "USING hnsw ((binary_quantize(embedding)::bit(8)) bit_hamming_ops)",
}


@pytest.fixture(scope="module")
def indexed(postgres: Any) -> Iterator[Filled]:
    """A table of PostgreSQL with more rows than are read without an index, which the tests may give indexes."""
    address = postgres.create_database()
    # The server then prefers an index to sorting so few rows.
    execute(address, f"ALTER DATABASE {database_name(address)} SET enable_sort = off")
    yield fill(address, COLUMNS["postgresql"], rows=2000)
    postgres.drop_database(address)


@pytest.mark.parametrize("kind", INDEXES)
def test_search_goes_through_whatever_index_there_is(
    indexed: Filled, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = indexed.articles.address
    try:
        execute(address, f"CREATE INDEX the_index ON shop.articles {INDEXES[kind]}")
    except (psycopg.errors.UndefinedObject, psycopg.errors.UndefinedFunction) as error:
        pytest.skip(f"this pgvector is too old: {error.diag.message_primary}")
    execute(address, "ANALYZE shop.articles")
    used: list[bool] = []
    ranked = pg_reader.PostgresqlTableReader._ranked

    def explained(self: Any, vector: Any, wanted: Any, rows: int, index: Any = None) -> Any:
        statement, params = self._rank(vector, wanted, rows, index)
        plan = self._query("EXPLAIN (FORMAT JSON) " + statement, params)[0][0]
        used.append(uses(plan, {"the_index"}))
        return ranked(self, vector, wanted, rows, index)

    monkeypatch.setattr(pg_reader.PostgresqlTableReader, "_ranked", explained)
    try:
        where = "published" if kind == "partial" else ""
        texts = {n: t for n, t in indexed.texts.items() if n % 2 == 0 or not where}
        found = indexed.search("a query", where=where)
        expected = cosines(texts, "a query")
        assert used[0]
        best = set(list(expected)[:10])
        # Lists, parts of vectors and orders by something else than the cosine are approximations.
        assert len(best & set(ids(found))) >= (8 if kind in ("hnsw cosine", "partial", "halfvec") else 5)
        for result in found:
            assert result.similarity == pytest.approx(expected[result.key["id"]], abs=1e-5)
        assert [r.similarity for r in found] == sorted((r.similarity or 0 for r in found), reverse=True)

        # Few rows meet it: the ranking is whole all the same.
        where = "published AND id BETWEEN 1000 AND 1030"
        texts = {n: indexed.texts[n] for n in range(1000, 1031, 2)}
        agree(indexed.search("a query", where=where), cosines(texts, "a query"))
        if kind == "partial":
            used.clear()
            agree(indexed.search("a query"), cosines(indexed.texts, "a query"))
            assert used == [False]
    finally:
        execute(address, "DROP INDEX shop.the_index")


def test_partitioned_table_with_an_index(database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION vector")
    articles = Articles(
        database,
        'id bigint PRIMARY KEY, lang text, body text, published boolean, "odd % {name} """ int, '
        "embedding vector(8)) PARTITION BY RANGE (id",
    )
    for part, (first, last) in {"low": (0, 1000), "high": (1000, 5000)}.items():
        execute(database, f"CREATE TABLE shop.{part} PARTITION OF shop.articles FOR VALUES FROM ({first}) TO ({last})")
    insert_rows(articles, 2000)
    texts = {n: text_of(n) for n in range(2000)}
    embed(database, articles.target(), {(str(n),): t for n, t in texts.items()})
    execute(database, "CREATE INDEX ON shop.articles USING hnsw ((embedding::halfvec(8)) halfvec_cosine_ops)")
    filled = Filled(articles, defined(articles), texts)
    expected = cosines(texts, "a query")
    assert len(set(ids(filled.search("a query"))) & set(list(expected)[:10])) >= 8
    agree(filled.search("a query", where="id < 5"), cosines({n: texts[n] for n in range(5)}, "a query"))


# -- tables of vectors -------------------------------------------------------------------------------------


def into_target(filled: Filled, **options: Any) -> TableTarget:
    """The table of vectors ``article_vectors`` beside the articles."""
    address = filled.articles.address
    wanted: dict[str, Any] = {"key": (KeyColumn("id", "bigint", "id"),), **options}
    with contextlib.closing(PgSession(address, "test")) as session, session.transaction() as cursor:
        source = find_relation(rows_on(cursor, "postgresql"), "postgresql", "shop.articles")
        return pg_table.find_table(
            cursor, session.target, "beside", "shop.article_vectors", source=source, text="body", **wanted
        )


def into_target_on_sqlite(filled: Filled, **options: Any) -> TableTarget:
    with contextlib.closing(connect_sqlite(filled.articles.address)) as connection:
        source = find_relation(rows_on(connection, "sqlite"), "sqlite", "articles")
        return sqlite_table.find_table(
            connection, "beside", "article_vectors", key=source.keys[0], source=source, text="body", **options
        )


def into(filled: Filled, **options: Any) -> Filled:
    """The same articles with their vectors in a table beside them, and none in their own column."""
    articles = filled.articles
    address = articles.address
    execute(address, f"UPDATE {articles.name} SET embedding = NULL")
    find = into_target if articles.postgresql else into_target_on_sqlite
    target = find(filled, **options)
    embed(address, target, {as_key(address, n): text for n, text in filled.texts.items()})
    definition = defined(
        articles,
        name="beside",
        into="article_vectors",
        into_schema="shop" if articles.postgresql else None,
        keyword=options.get("keyword", ""),
        form="vec0" if options.get("vec0") else "blob",
    )
    return filled._replace(definition=definition)


def test_table_of_vectors(filled: Filled) -> None:
    beside = into(filled)
    texts = filled.texts
    found = beside.search("a query", columns=("lang", ODD))
    agree(found, cosines(texts, "a query"))
    assert found[0].columns == {"lang": filled.lang(found[0].key["id"]), ODD: found[0].key["id"] * 2}
    assert found[0].matched_text == texts[found[0].key["id"]]
    chosen = {n: t for n, t in texts.items() if n % 6 == 0}
    agree(beside.search("a query", where="published AND lang = 'en'"), cosines(chosen, "a query"))
    with pytest.raises(UsageError, match="--where is no condition"):
        beside.search("a query", where="publshed")


def test_record_without_a_row_any_more_makes_room_for_the_next(filled: Filled) -> None:
    beside = into(filled)
    gone = list(cosines(filled.texts, "a query"))[:20]
    for number in gone:
        filled.articles.delete(number)
    texts = {n: t for n, t in filled.texts.items() if n not in gone}
    agree(beside.search("a query"), cosines(texts, "a query"))


def test_vector_that_another_program_wrote_into_the_table(filled: Filled) -> None:
    beside = into(filled)
    table = "shop.article_vectors" if filled.articles.postgresql else "article_vectors"
    value: Any = vector_of("a query").tobytes()
    if filled.articles.postgresql:
        value = "[" + ",".join(map(str, vector_of("a query").tolist())) + "]"
    execute(filled.articles.address, f"UPDATE {table} SET embedding = %s WHERE id = 3", value)
    texts = {n: t for n, t in filled.texts.items() if n != 3}
    agree(beside.search("a query"), cosines(texts, "a query"))
    assert ids(beside.search("a query", model=MODEL))[0] == 3


def test_table_of_vectors_with_an_index(indexed: Filled) -> None:
    beside = into(indexed)
    address = indexed.articles.address
    execute(address, "CREATE INDEX ON shop.article_vectors USING hnsw (embedding vector_cosine_ops)")
    expected = cosines(indexed.texts, "a query")
    assert len(set(ids(beside.search("a query"))) & set(list(expected)[:10])) >= 8
    texts = {n: indexed.texts[n] for n in range(1000, 1031, 2)}
    agree(beside.search("a query", where="published AND id BETWEEN 1000 AND 1030"), cosines(texts, "a query"))


def test_table_of_sqlite_vec(sqlite_database: DatabaseAddress) -> None:
    pytest.importorskip("sqlite_vec")
    if not hasattr(sqlite3.Connection, "enable_load_extension"):
        pytest.skip("this Python's sqlite3 loads no extensions")
    filled = fill(sqlite_database, COLUMNS["sqlite"])
    beside = into(filled, vec0=True)
    agree(beside.search("a query"), cosines(filled.texts, "a query"))
    chosen = {n: t for n, t in filled.texts.items() if n % 6 == 0}
    agree(beside.search("a query", where="published AND lang = 'en'"), cosines(chosen, "a query"))
    agree(beside.search("a query", where="id < 4"), cosines({n: filled.texts[n] for n in range(4)}, "a query"))
    other: dict[Key, str] = {(n,): filled.texts[n] for n in list(cosines(filled.texts, "a query"))[:250]}
    embed(sqlite_database, into_target_on_sqlite(filled, vec0=True), other, OTHER)
    rest = {n: t for n, t in filled.texts.items() if (n,) not in other}
    assert beside.ask("a query", model=MODEL, limit=300).left_out[0].rows == 250
    agree(beside.search("a query", model=MODEL, limit=300), cosines(rest, "a query"), 300)


# -- keyword search ----------------------------------------------------------------------------------------

TEXTS = {
    0: "the pump is noisy",
    1: "a valve leaks water",
    2: "pumps and valves: error ERR-1234",
    3: "error ERR-1235 of the pump",
    4: "quiet water",
    5: "the noisy neighbour's pump",
}


def with_keyword(address: DatabaseAddress, language: str = "english") -> str:
    if address.dialect == "sqlite":
        return {"english": "porter unicode61"}.get(language, "unicode61")
    return f"pg_catalog.{language}"


def worded(address: DatabaseAddress, kind: str, language: str = "english") -> Filled:
    """Articles with TEXTS, with keyword search on their column or in a table beside them."""
    articles = Articles(address, COLUMNS[address.dialect])
    for number, text in TEXTS.items():
        execute(
            address,
            f"INSERT INTO {articles.name} (id, lang, body) VALUES (%s, %s, %s)",
            number,
            LANGS[number % 3],
            text,
        )
    filled = Filled(articles, defined(articles, keyword=with_keyword(address, language)), dict(TEXTS))
    if kind == "table":
        return into(filled, keyword=with_keyword(address, language))
    keyed(filled, kind)
    return filled


def keyed(filled: Filled, kind: str, texts: Mapping[int, str] = TEXTS) -> None:
    """Embed these with keyword search."""
    address, keyword = filled.articles.address, filled.definition.keyword
    if kind == "table":
        find = into_target if filled.articles.postgresql else into_target_on_sqlite
        target: TargetTable = find(filled, keyword=keyword)
    else:
        target = replace(filled.articles.target(), keyword=keyword)
    embed(address, target, {as_key(address, n): text for n, text in texts.items()})


@pytest.mark.parametrize("kind", ["column", "table"])
def test_keyword_and_hybrid(index: DatabaseAddress, kind: str) -> None:
    filled = worded(index, kind)
    assert set(ids(filled.search("noisy pumps", mode="keyword"))[:2]) == {0, 5}
    assert ids(filled.search("ERR-1234", mode="keyword")) == [2]
    assert set(ids(filled.search("pump -noisy", mode="keyword"))) == {2, 3}
    assert set(ids(filled.search("pump -noisy", mode="vector"))) == {1, 2, 3, 4}
    assert ids(filled.search("pump", mode="keyword", where="id < 1")) == [0]
    assert set(ids(filled.search('"valve leaks" or quiet', mode="keyword"))) == {1, 4}

    outcome = filled.ask("noisy pump")
    assert (outcome.mode, outcome.notes) == ("hybrid", [])
    scores = dict.fromkeys(TEXTS, 0.0)
    for ranking in (list(cosines(TEXTS, "noisy pump")), ids(filled.search("noisy pump", mode="keyword"))):
        for place, number in enumerate(ranking, 1):
            scores[number] += 1 / (60 + place)
    assert {r.key["id"]: r.score for r in outcome.results} == pytest.approx(scores)
    assert [r.score for r in outcome.results] == sorted(scores.values(), reverse=True)
    by_keyword = filled.search("water", mode="keyword", columns=("lang",))
    assert {r.key["id"]: (r.similarity, r.matched_text, r.columns["lang"]) for r in by_keyword} == {
        n: (None, TEXTS[n], LANGS[n % 3]) for n in (1, 4)
    }


@pytest.mark.parametrize("kind", ["column", "table"])
def test_words_follow_the_text_that_was_embedded(index: DatabaseAddress, kind: str) -> None:
    filled = worded(index, kind)
    articles = filled.articles
    articles.set(1, "a lighthouse")
    assert ids(filled.search("valve", mode="keyword", limit=1)) == [2] or 1 in ids(filled.search("valve"))
    keyed(filled, kind, {1: "a lighthouse"})
    assert ids(filled.search("lighthouse", mode="keyword")) == [1]
    assert ids(filled.search("leaks", mode="keyword")) == []
    articles.delete(1)
    assert ids(filled.search("lighthouse", mode="keyword")) == []


@pytest.mark.parametrize("kind", ["column", "table"])
def test_keyword_search_that_is_added_later_or_in_another_language(index: DatabaseAddress, kind: str) -> None:
    filled = worded(index, kind, "simple")
    assert ids(filled.search("pumps", mode="keyword")) == [2]
    english = filled._replace(definition=replace(filled.definition, keyword=with_keyword(index)))
    finish(english, kind)
    assert set(ids(english.search("pumps", mode="keyword"))) == {0, 2, 3, 5}

    place = "kdb_fast_articles_state" if kind == "column" else filled.definition.into
    if index.dialect == "postgresql":
        execute(index, f"ALTER TABLE {'' if kind == 'column' else 'shop.'}{place} DROP COLUMN tsv")
        filled.articles.set(5, "another text by now")
        finish(english, kind)
        assert set(ids(english.search("pumps", mode="keyword"))) == {0, 2, 3}
        indexes = f"SELECT count(*) FROM pg_indexes WHERE tablename = '{place}' AND indexdef LIKE '%gin (tsv)%'"
        assert execute(index, indexes) == [(1,)]


def test_keyword_search_that_is_added_later_on_sqlite(sqlite_database: DatabaseAddress) -> None:
    filled = worded(sqlite_database, "column")
    plain = replace(filled.definition, keyword="")
    finish(filled._replace(definition=plain), "column")
    execute(sqlite_database, "UPDATE kdb_fast_articles_state SET content = NULL")
    filled.articles.set(5, "another text by now")
    finish(filled, "column")
    assert set(ids(filled.search("pumps", mode="keyword"))) == {0, 2, 3}


def finish(filled: Filled, kind: str) -> None:
    """A run that embeds nothing."""
    keyword = filled.definition.keyword
    if kind == "table":
        find = into_target if filled.articles.postgresql else into_target_on_sqlite
        target: TargetTable = find(filled, keyword=keyword)
    else:
        target = replace(filled.articles.target(), keyword=keyword)
    with contextlib.closing(open_store(filled.articles.address, "test", target=target)) as store:
        store.prepare(DIMENSIONS)
        store.finish_index(lambda phase: None)


@pytest.mark.parametrize("mode", ["hybrid", "keyword"])
def test_keyword_search_that_is_not_there_is_refused(shared: Filled, mode: Any) -> None:
    with pytest.raises(SchemaError, match=f"articles has no keyword search, which the mode {mode} needs") as caught:
        shared.search("a query", mode=mode)
    assert "kdb-fast reindex articles --keyword" in str(caught.value)
    with pytest.raises(SchemaError, match="The query excludes pump, which needs keyword search"):
        shared.search("a query -pump")
    outcome = shared.ask("a query")
    assert outcome.mode == "vector"
    assert outcome.notes == ["By meaning only. To search by keyword, too: kdb-fast reindex articles --keyword"]


def test_language_that_is_not_there(index: DatabaseAddress) -> None:
    if index.dialect == "sqlite":
        with contextlib.closing(connect_sqlite(index, must_exist=False)) as connection:
            assert sqlite_keyword.find_tokenizer(connection, "English") == "porter unicode61"
            assert sqlite_keyword.find_tokenizer(connection, "") == "unicode61"
            with pytest.raises(SchemaError, match="FTS5 has no tokenizer 'klingon'"):
                sqlite_keyword.find_tokenizer(connection, "klingon")
        return
    with contextlib.closing(PgSession(index, "test")) as session, session.transaction() as cursor:
        assert pg_keyword.find_configuration(cursor, "german") == "pg_catalog.german"
        cursor.execute("SET LOCAL default_text_search_config = 'simple'")
        assert pg_keyword.find_configuration(cursor, "") == "pg_catalog.simple"
        with pytest.raises(SchemaError, match="no text search configuration germen; nearest: german"):
            pg_keyword.find_configuration(cursor, "germen")


PIECES = {
    0: ("about pumps and their parts", "a quiet one", "noisy ones"),
    1: ("water",),
    2: ("a valve", "ERR-1234 and noisy pumps"),
}


def test_one_result_a_record_with_the_piece_that_matched(index: DatabaseAddress) -> None:
    articles = Articles(index, COLUMNS[index.dialect])
    keys: dict[Key, str] = {}
    for number, pieces in PIECES.items():
        whole = " ".join(pieces)
        execute(index, f"INSERT INTO {articles.name} (id, body) VALUES (%s, %s)", number, whole)
        for i, piece in enumerate(pieces):
            start = whole.index(piece)
            of = PieceOf(number, i, len(pieces), start, start + len(piece), content_hash(whole))
            keys[piece_key(as_key(index, number), of)] = piece
    keyword = with_keyword(index)
    definition = defined(
        articles,
        name="beside",
        into="article_vectors",
        into_schema="shop" if articles.postgresql else None,
        keyword=keyword,
        chunk=32,
    )
    filled = Filled(articles, definition, {})
    find = into_target if articles.postgresql else into_target_on_sqlite
    embed(index, find(filled, keyword=keyword, chunked=True), keys)

    texts = {(n, i): piece for n, pieces in PIECES.items() for i, piece in enumerate(pieces)}
    nearest: dict[int, tuple[int, float]] = {}
    for (number, i), cosine in cosines(texts, "a query").items():
        nearest.setdefault(number, (i, cosine))
    found = filled.search("a query", mode="vector", columns=("id",))
    assert [(r.key["id"], r.chunk.number if r.chunk else None) for r in found] == [
        (number, i) for number, (i, _) in nearest.items()
    ]
    for result in found:
        number = result.key["id"]
        assert result.chunk is not None
        assert result.matched_text == PIECES[number][result.chunk.number]
        assert " ".join(PIECES[number])[result.chunk.start : result.chunk.end] == result.matched_text
        assert result.columns == {"id": number}
        assert result.similarity == pytest.approx(nearest[number][1], abs=1e-5)

    by_keyword = filled.search("noisy", mode="keyword")
    assert {(r.key["id"], r.chunk.number if r.chunk else None) for r in by_keyword} == {(0, 2), (2, 1)}
    assert [(r.key["id"], r.matched_text) for r in filled.search("ERR-1234", mode="keyword")] == [(2, PIECES[2][1])]
    # No result holds an excluded word, in whatever piece.
    assert ids(filled.search("pumps -noisy", mode="keyword")) == []
    assert ids(filled.search("pumps -noisy", mode="vector")) == [1]
    assert set(ids(filled.search("noisy pumps"))) == {0, 1, 2}


# -- a target that is kept, from the library and the command line ------------------------------------------


def test_search_of_a_target_by_its_name(index: DatabaseAddress, capsys: pytest.CaptureFixture[str]) -> None:
    filled = worded(index, "column")
    targets.keep(index, filled.definition)
    found = kdb_fast.search_table(
        index, "articles", "noisy pump", mode="keyword", where="id <> 5", columns=["lang"], limit=1
    )
    assert [(r.key, r.matched_text, r.columns) for r in found] == [({"id": 0}, TEXTS[0], {"lang": "en"})]

    command = ["search", "--db", as_url(index), "articles", "noisy pump", "--where", "id <> 5", "--columns", "lang, id"]
    assert run([*command, "--mode", "keyword", "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "id 0" in out
    assert "lang: en" in out
    assert TEXTS[0] in out
    assert run([*command, "--json", "--mode", "keyword", "--min-score", "0.01"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["target"], answer["mode"], answer["left_out"], answer["notes"]) == ("articles", "keyword", [], [])
    assert answer["results"][0] == {
        "key": {"id": 0},
        "score": pytest.approx(1 / 61),
        "similarity": None,
        "matched_text": TEXTS[0],
        "columns": {"lang": "en", "id": 0},
        "chunk": None,
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["articls", "pump"], "There is no target articls; nearest: articles."),
        (["nothing", "pump"], "There is no target nothing; there is: articles."),
        (["articles", "pump", "--where", "true) OR (true"], "--where is no condition over the columns of the source"),
        (["noisy", "pump", "valve"], "Put the query in quotes: kdb-fast search"),
        (["articles", "pump", "--entity", "Note"], "--entity is for KameleonDB's index."),
        (["pump", "--columns", "lang"], "--columns is for a table."),
        (["articles", "pump", "--where", "nope"], "--where is no condition over the columns of the source"),
        (["articles", " "], "The query is blank"),
    ],
)
def test_command_that_makes_no_sense(
    shared: Filled, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    address = shared.articles.address
    targets.keep(address, shared.definition)
    assert run(["search", "--db", as_url(address), *arguments]) in (2, 4)
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def as_url(address: DatabaseAddress) -> str:
    """For ``--db``."""
    if address.dialect == "sqlite":
        return address.display
    parts = conninfo_to_dict(address.conninfo)
    return f"postgresql:///{parts.pop('dbname')}?{urlencode(parts)}"


def test_values_that_json_does_not_have() -> None:
    values = {"a": b"\x01\xff", "b": float("nan"), "c": (1, datetime.date(2020, 1, 2)), "d": None, "e": Chunk(1, 2, 3)}
    assert console._plain(values) == {
        "a": "01ff",
        "b": "nan",
        "c": [1, "2020-01-02"],
        "d": None,
        "e": {"number": 1, "start": 2, "end": 3},
    }
