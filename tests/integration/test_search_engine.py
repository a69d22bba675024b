"""SearchEngine on both databases: what it writes, what it finds, and with what it can be built."""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from search_engines import EXACT, Hashes, Words, sqlalchemy_url
from servers import (
    IndexRow,
    Oracle,
    connect_as,
    cosine,
    database_name,
    engine_processes,
    execute,
    index_rows,
    mixed_texts,
    records_of,
)
from sqlalchemy.pool import StaticPool

import kdb_fast
from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.providers.fastembed import FastEmbedProvider
from kdb_fast.errors import (
    DatabaseError,
    ProviderError,
    ProviderInputError,
    RecordError,
    SchemaError,
    SearchWarning,
    UsageError,
)
from kdb_fast.origins import Maker, QueryVector
from kdb_fast.search import batches, connections, query_model, transactions
from kdb_fast.search.batches import BatchWriter
from kdb_fast.search.commands import run_search
from kdb_fast.search.engine import IndexStatus, SearchEngine, SearchResult
from kdb_fast.search.readers import base as reader
from kdb_fast.search.readers import open_reader
from kdb_fast.search.readers.base import SearchReader, count_origins
from kdb_fast.stores.base import RunSpec
from kdb_fast.tables.kdb_search import entity_and_id

Build = Callable[..., SearchEngine]
Key = tuple[str, str]
EACH_EXAMPLE = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def engine(address: DatabaseAddress) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(sqlalchemy_url(address))
    yield engine
    engine.dispose()


@pytest.fixture
def build() -> Iterator[Build]:
    """Builds search engines that are closed at the end."""
    built: list[SearchEngine] = []

    def build(*arguments: Any) -> SearchEngine:
        built.append(SearchEngine(*arguments))
        return built[-1]

    yield build
    for search in built:
        search.close()


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def search(engine: sqlalchemy.Engine, words: Words, build: Build) -> SearchEngine:
    return build(engine, words)


@pytest.fixture(scope="module")
def fastembed(minilm: Model) -> FastEmbedProvider:
    return FastEmbedProvider(minilm.name)


def contents(address: DatabaseAddress) -> dict[Key, str]:
    return {key: row.content for key, row in index_rows(address).items()}


def full_text(address: DatabaseAddress) -> list[tuple[Any, ...]]:
    """What the full-text index of SQLite holds; PostgreSQL's is a generated column."""
    return sorted(execute(address, "SELECT id, entity_name, record_id, content FROM kdb_search_fts"))


def check_in_step(address: DatabaseAddress) -> None:
    if address.dialect == "sqlite":
        rows = execute(address, "SELECT id, entity_name, record_id, content FROM kdb_search")
        assert full_text(address) == sorted(rows)


def check_vectors(rows: dict[Key, IndexRow], provider: Hashes) -> None:
    for row in rows.values():
        assert row.vector is not None
        assert cosine(row.vector, provider.vectors([row.content])[0]) >= EXACT
        assert (row.model, row.dimensions) == (provider.model_name, provider.dimensions)


def ids(results: Sequence[SearchResult]) -> list[str]:
    return [result.id for result in results]


# -- batches -----------------------------------------------------------------------------------------------


def test_index_records_batch_empty(search: SearchEngine, address: DatabaseAddress, words: Words) -> None:
    search.index_records_batch([])
    search.index_records_batch(iter(()))
    assert index_rows(address) == {}
    assert (words.batches, words.embedded) == ([], [])


def test_index_records_batch_small(search: SearchEngine, address: DatabaseAddress, words: Words) -> None:
    search.index_records_batch([("Note", f"r{i}", f"note number {i} about birds") for i in range(10)])
    rows = index_rows(address)
    assert {key: row.content for key, row in rows.items()} == {
        ("Note", f"r{i}"): f"note number {i} about birds" for i in range(10)
    }
    check_vectors(rows, words)
    check_in_step(address)
    assert ids(search.search("birds 7", limit=1)) == ["r7"]


def test_index_records_batch_large(search: SearchEngine, address: DatabaseAddress, words: Words) -> None:
    search.index_records_batch(("Note", f"r{i}", f"note {i}") for i in range(1000))
    rows = index_rows(address)
    assert len(rows) == 1000
    check_vectors(rows, words)
    check_in_step(address)
    assert search.get_status("Note")[0].indexed == 1000
    assert words.embedded == []


def test_index_records_batch_no_provider(engine: sqlalchemy.Engine, address: DatabaseAddress, build: Build) -> None:
    search = build(engine)
    search.index_records_batch([("Note", f"r{i}", f"note {i} about birds") for i in range(300)])
    rows = index_rows(address)
    assert len(rows) == 300
    assert {(row.vector is None, row.model, row.dimensions) for row in rows.values()} == {(True, None, None)}
    check_in_step(address)
    assert ids(search.search("birds 123"))[:1] == ["r123"]
    assert search.search("fish") == []


def test_batch_with_mixed_entities(search: SearchEngine, address: DatabaseAddress) -> None:
    search.index_records_batch([("Note", "1", "a red bird"), ("Mail", "1", "a blue bird"), ("Note", "2", "a fish")])
    assert contents(address) == {
        ("Note", "1"): "a red bird",
        ("Mail", "1"): "a blue bird",
        ("Note", "2"): "a fish",
    }
    assert {(r.entity, r.id) for r in search.search("bird")[:2]} == {("Note", "1"), ("Mail", "1")}


def test_of_two_records_with_one_key_the_last_one_counts(
    search: SearchEngine, address: DatabaseAddress, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.index_record("Note", "1", "before")
    monkeypatch.setattr(batches, "CHUNK_ROWS", 3)
    given = [("1", "first"), ("2", "only"), ("1", "second"), ("3", "one"), ("4", "x"), ("3", "two"), ("1", "third")]
    search.index_records_batch([("Note", key, text) for key, text in given])
    rows = index_rows(address)
    assert {key[1]: row.content for key, row in rows.items()} == {"1": "third", "2": "only", "3": "two", "4": "x"}
    check_vectors(rows, words)
    check_in_step(address)


def test_equal_texts_are_embedded_once(search: SearchEngine, address: DatabaseAddress, words: Words) -> None:
    search.index_records_batch([("Note", f"r{i}", f"text {i % 3}") for i in range(30)])
    assert sorted(text for batch in words.batches for text in batch) == ["text 0", "text 1", "text 2"]
    rows = index_rows(address)
    assert len(rows) == 30
    check_vectors(rows, words)


def test_single_record_after_a_batch_and_a_batch_after_it(
    search: SearchEngine, address: DatabaseAddress, words: Words
) -> None:
    search.index_records_batch([("Note", f"r{i}", f"text {i}") for i in range(5)])
    search.index_record("Note", "r3", "changed alone")
    search.index_record("Note", "new", "added alone")
    search.index_records_batch([("Note", "r4", "changed in a batch"), ("Note", "new", "changed again")])
    rows = index_rows(address)
    assert {key[1]: row.content for key, row in rows.items()} == {
        "r0": "text 0", "r1": "text 1", "r2": "text 2", "r3": "changed alone", "r4": "changed in a batch",
        "new": "changed again",
    }  # fmt: skip
    check_vectors(rows, words)
    check_in_step(address)
    assert ids(search.search("changed alone", limit=1)) == ["r3"]


def test_empty_text_takes_a_record_out(search: SearchEngine, address: DatabaseAddress) -> None:
    search.index_records_batch([("Note", "1", "one"), ("Note", "2", "two"), ("Note", "3", "three")])
    search.index_record("Note", "1", "")
    search.index_records_batch([("Note", "2", " \n\u200b"), ("Note", "never there", "")])
    assert contents(address) == {("Note", "3"): "three"}
    check_in_step(address)


def test_deleting_a_record_and_one_that_is_not_there(search: SearchEngine, address: DatabaseAddress) -> None:
    search.index_records_batch([("Note", "1", "one bird"), ("Mail", "1", "one bird")])
    search.delete_record("Note", "1")
    for key in ("1", "other", "x" * 100, "nul\x00", "\ud800", ""):
        search.delete_record("Note", key)
    assert contents(address) == {("Mail", "1"): "one bird"}
    check_in_step(address)
    assert [(r.entity, r.id) for r in search.search("bird")] == [("Mail", "1")]


def test_thousands_of_deletions_in_one_batch(search: SearchEngine, address: DatabaseAddress) -> None:
    records = [("Note", f"r{i}", "same text") for i in range(2500)]
    search.index_records_batch(records)
    with search.transaction():
        for entity, record_id, _ in records[:2300]:
            search.delete_record(entity, record_id)
    assert sorted(contents(address)) == sorted(record[:2] for record in records[2300:])
    check_in_step(address)


BAD = [
    (("Note", "x" * 37, "text"), "the record id has 37 characters"),
    (("Note", uuid.uuid4(), "text"), "record id is UUID, expected text"),
    (("Note", "bad", None), "content is NoneType, expected text"),
    (("Note", "bad", "a\x00b"), "NUL"),
    (("Note", "bad", "\ud800"), "lone surrogate"),
    (("", "bad", "text"), "the entity name has 0 characters"),
    (("Note", "bad"), r"Record 7 of the batch is tuple; expected \(entity name, record id, text\)"),
    (None, "Record 7 of the batch is NoneType"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_failing_record_in_the_middle_leaves_nothing(
    search: SearchEngine, address: DatabaseAddress, bad: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK_ROWS", 3)  # the first chunks are written before it is read
    search.index_record("Note", "r0", "before")
    before = index_rows(address)
    records: list[Any] = [("Note", f"r{i}", f"text {i}") for i in range(14)]
    with pytest.raises(RecordError, match=message):
        search.index_records_batch([*records[:7], bad, *records[7:]])
    after = index_rows(address)
    assert {key: row.content for key, row in after.items()} == {key: row.content for key, row in before.items()}
    check_in_step(address)
    search.index_records_batch(records)
    assert len(index_rows(address)) == 14


class Odd(Hashes):
    """Gives no usable vector for some texts."""

    def vectors(self, texts: Sequence[str]) -> Any:
        vectors = super().vectors(texts)
        for row, text in enumerate(texts):
            if text == "nothing":
                vectors[row] = 0
            elif text == "infinite":
                vectors[row, 3] = np.inf
        return vectors

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        if "refused" in texts:
            raise ProviderInputError(texts.index("refused"), "the provider does not like it")
        if "broken" in texts:
            raise ZeroDivisionError("a message that quotes the text: broken")
        return super().embed_batch(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "'Note'/'r9' cannot be embedded: the model gave a vector of zeros"),
        ("infinite", "'Note'/'r9' cannot be embedded: the provider gives a vector that is not finite"),
        ("refused", "'Note'/'r9' cannot be embedded: the provider does not like it"),
    ],
)
def test_record_that_cannot_be_embedded_leaves_nothing_and_is_named(
    engine: sqlalchemy.Engine, address: DatabaseAddress, build: Build, text: str, message: str
) -> None:
    search = build(engine, Odd())
    records = [("Note", f"r{i}", text if i == 9 else f"text {i} " * (i + 1)) for i in range(20)]
    with pytest.raises(RecordError, match=message):
        search.index_records_batch(records)
    assert index_rows(address) == {}


def test_provider_that_breaks_leaves_nothing(engine: sqlalchemy.Engine, address: DatabaseAddress, build: Build) -> None:
    search = build(engine, Odd())
    search.index_record("Note", "r1", "fine")
    with pytest.raises(ProviderError, match="Odd failed with ZeroDivisionError") as caught:
        search.index_records_batch([("Note", "r1", "fine again"), ("Note", "r2", "broken")])
    assert "broken" not in str(caught.value)
    assert contents(address) == {("Note", "r1"): "fine"}


def test_iterable_that_breaks_leaves_nothing(
    search: SearchEngine, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK_ROWS", 3)

    def records() -> Iterator[tuple[str, str, str]]:
        for i in range(8):
            yield "Note", f"r{i}", f"text {i}"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search.index_records_batch(records())
    assert index_rows(address) == {}


def test_row_that_the_database_refuses_leaves_nothing(search: SearchEngine, address: DatabaseAddress) -> None:
    if address.dialect == "postgresql":
        execute(address, "ALTER TABLE kdb_search ADD CHECK (content <> 'forbidden')")
    else:
        execute(
            address,
            "CREATE TRIGGER refuse BEFORE INSERT ON kdb_search WHEN NEW.content = 'forbidden' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END",
        )
    with pytest.raises(RecordError, match="refused"):
        search.index_records_batch([("Note", "1", "fine"), ("Note", "2", "forbidden"), ("Note", "3", "fine")])
    assert index_rows(address) == {}
    search.index_record("Note", "1", "fine")
    assert contents(address) == {("Note", "1"): "fine"}


def test_longest_text_is_indexed_and_a_longer_one_cut(search: SearchEngine, address: DatabaseAddress) -> None:
    long = "wörd " * 200_000
    search.index_records_batch([("Note", "1", long), ("Note", "2", "short"), ("Note", "3", "x" * 999_999)])
    rows = contents(address)
    assert len(rows["Note", "1"].encode()) in (999_999, 1_000_000)
    assert long.startswith(rows["Note", "1"])
    assert rows["Note", "3"] == "x" * 999_999
    assert ids(search.search("short", limit=1)) == ["2"]


@pytest.fixture
def hashing(engine: sqlalchemy.Engine, build: Build) -> SearchEngine:
    """With a provider that gives every text a direction."""
    return build(engine, Hashes())


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
keys = st.sampled_from(["1", "2", "3", "zwölf", "'; --", "x" * 36])


@EACH_EXAMPLE
@given(records=st.lists(st.tuples(st.sampled_from(["Note", "Mail"]), keys, texts | st.just("same")), max_size=12))
def test_batch_equals_its_records_one_by_one(
    hashing: SearchEngine, address: DatabaseAddress, records: list[tuple[str, str, str]]
) -> None:
    search = hashing
    expected = {record[:2]: record[2] for record in records}
    found: list[dict[Key, IndexRow]] = []

    def one_by_one() -> None:
        for record in records:
            search.index_record(*record)

    def at_once() -> None:
        search.index_records_batch(records)

    for index in (at_once, one_by_one):
        index()
        check_in_step(address)
        assert contents(address) == {key: text for key, text in expected.items() if not text.isspace()}
        found.append(index_rows(address))
        for key in expected:
            search.delete_record(*key)
        assert index_rows(address) == {}
    for key, row in found[0].items():
        single = found[1][key]
        assert row.vector is not None
        assert single.vector is not None
        assert cosine(row.vector, single.vector) >= EXACT
        assert row._replace(vector=None) == single._replace(vector=None)


# -- worker processes --------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often worker processes are started; they are from 20 records on."""
    counts: list[int] = []
    start = batches._start_workers

    def counting(*arguments: Any) -> Any:
        counts.append(len(counts))
        return start(*arguments)

    monkeypatch.setattr(batches, "_start_workers", counting)
    monkeypatch.setattr(batches, "WORKERS_FROM", 20)
    return counts


def test_worker_processes_give_the_same_vectors(
    tmp_path: Path, build: Build, fastembed: FastEmbedProvider, oracle: Oracle, started: list[int]
) -> None:
    address = DatabaseAddress("sqlite", str(tmp_path / "index.db"), "")
    search = build(address, fastembed)
    records = records_of([*mixed_texts(40, longest=300), "equal", "equal"])
    search.index_records_batch([(*entity_and_id(record.key), record.content) for record in records])
    assert started == [0]
    assert engine_processes() == []
    by_workers = index_rows(address)
    oracle.check(by_workers, records)
    search.index_records_batch([(*entity_and_id(record.key), record.content) for record in records[:19]])
    assert started == [0]
    for key, row in index_rows(address).items():
        assert row.vector is not None
        other = by_workers[key].vector
        assert other is not None
        assert cosine(row.vector, other) >= EXACT


def test_worker_processes_end_when_a_batch_fails(
    tmp_path: Path, build: Build, fastembed: FastEmbedProvider, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK_ROWS", 25)
    url = f"sqlite:///{tmp_path}/index.db"
    search = build(url, fastembed)
    records: list[Any] = [("Note", f"r{i}", f"text {i}") for i in range(30)]
    records.append(("Note", "bad", None))
    with pytest.raises(RecordError):
        search.index_records_batch(records)
    assert (started, engine_processes()) == ([0], [])
    assert search.search("text") == []


def test_in_a_daemonic_process_no_workers_are_started(monkeypatch: pytest.MonkeyPatch, minilm: Model) -> None:
    spec = FastEmbedProvider(minilm.name).spec
    store: Any = SimpleNamespace()
    run = RunSpec(0, "", "", 384)
    assert BatchWriter(store, run, SimpleNamespace, spec)._spec is spec
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    assert BatchWriter(store, run, SimpleNamespace, spec)._spec is None


def test_real_model_finds_by_meaning(engine: sqlalchemy.Engine, build: Build, fastembed: FastEmbedProvider) -> None:
    search = build(engine, fastembed)
    search.index_records_batch(
        [
            ("Ticket", "1", "The parcel arrived broken and support never answered"),
            ("Ticket", "2", "How do I change my password?"),
            ("Ticket", "3", "Invoice for the month of March"),
        ]
    )
    assert ids(search.search("furious customer with damaged goods", limit=1)) == ["1"]
    assert ids(search.search("bill", limit=1)) == ["3"]
    status = search.get_status()
    assert [(s.entity, s.indexed, s.pending, s.stale) for s in status] == [("Ticket", 3, 0, 0)]


# -- searching ---------------------------------------------------------------------------------------------


@pytest.fixture
def library(search: SearchEngine) -> SearchEngine:
    search.index_records_batch(
        [("Book", f"b{i}", f"a book about whales {i}") for i in range(30)]
        + [("Film", f"f{i}", f"a film about whales {i}") for i in range(30)]
        + [("Song", "s0", "a song about rivers")]
    )
    return search


def test_entity_filters(library: SearchEngine) -> None:
    for chosen, filters in [
        ({"Book"}, {"entity": "Book"}),
        ({"Film"}, {"entities": ["Film"]}),
        ({"Book", "Film"}, {"entities": ("Book", "Film")}),
        ({"Book", "Song"}, {"entity": "Book", "entities": ["Song"]}),
        ({"Book", "Film", "Song"}, {"entities": []}),
        ({"Book", "Film", "Song"}, {}),
        (set(), {"entity": "Poem"}),
    ]:
        results = library.search("whales", limit=100, **filters)  # type: ignore[arg-type]
        assert {result.entity for result in results} == chosen
        assert len(results) == sum({"Book": 30, "Film": 30, "Song": 1}[entity] for entity in chosen)


def test_string_of_entities_is_refused(library: SearchEngine) -> None:
    with pytest.raises(UsageError, match="entities is the string 'Book'; expected a list"):
        library.search("whales", entities="Book")


def test_limit_is_filled_and_kept(library: SearchEngine) -> None:
    for limit in (1, 7, 50, 61):
        assert len(library.search("whales", limit=limit)) == limit
    assert len(library.search("whales", limit=500)) == 61
    assert len(library.search("rivers", entity="Film", limit=25)) == 25
    for limit in (0, -1):
        with pytest.raises(UsageError, match="limit"):
            library.search("whales", limit=limit)


def test_results_come_best_first_with_fused_scores(library: SearchEngine) -> None:
    results = library.search("a song about rivers")
    assert results[0] == SearchResult("Song", "s0", 2 / 61, {}, "a song about rivers")
    scores = [result.score for result in results]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 2 / 61 for score in scores)


def test_min_score_compares_with_the_fused_score(library: SearchEngine) -> None:
    everything = library.search("rivers", limit=61)
    least = everything[9].score
    kept = library.search("rivers", limit=61, min_score=least)
    assert [r for r in everything if r.score >= least] == kept
    assert library.search("rivers", min_score=5.0) == []


def test_ranking_by_vector_is_that_of_brute_force(engine: sqlalchemy.Engine, build: Build) -> None:
    provider = Hashes()
    search = build(engine, provider)
    stored = [f"text{i}" for i in range(300)]
    search.index_records_batch([("Note", f"r{i}", text) for i, text in enumerate(stored)])
    matrix = provider.vectors(stored)
    matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    for number in range(5):
        query = f"nothing alike {number}"  # no text has one of its words: the ranking is by vector alone
        best = np.argsort(-(matrix @ provider.vectors([query])[0]))[:12]
        results = search.search(query, limit=12)
        assert ids(results) == [f"r{i}" for i in best]
        assert [r.score for r in results] == [pytest.approx(1 / (60 + rank)) for rank in range(1, 13)]


HOSTILE = [
    '"', "'", "*", "-", "- -", "AND", "NOT", "OR", "NEAR(", "a AND", '"unclosed', "col:x", "content:whales", "^a",
    "{a}", "a*", "(", ")", "((", "; DROP TABLE kdb_search", "%", "%s", "%(p0)s", ":p0", "?", "$1", "\\", "\x00",
    "a\x00b", "\ud800", "\udfff\ud800", "", " ", "\n", "-whales", '-"whales', "whales -", "!", "& | !", "<->", "🐋",
    "ﷺ" * 40, "x" * 100_000, "whale " * 5_000, "--force", "a'b\"c", "NULL", "\u202e", "ı", "whales' OR '1'='1",
]  # fmt: skip


@pytest.mark.parametrize("with_provider", [True, False])
def test_no_query_is_an_error(library: SearchEngine, with_provider: bool) -> None:
    if not with_provider:
        library._provider = None
    for query in HOSTILE:
        assert isinstance(library.search(query), list)
    assert len(library.search("whales", limit=100)) >= 60


@EACH_EXAMPLE
@given(query=st.text(max_size=40))
def test_any_string_is_a_query(library: SearchEngine, query: str) -> None:
    assert len(library.search(query, limit=5)) <= 5


def test_real_model_takes_every_query(tmp_path: Path, build: Build, fastembed: FastEmbedProvider) -> None:
    search = build(f"sqlite:///{tmp_path}/index.db", fastembed)
    search.index_record("Note", "1", "whales")
    for query in HOSTILE:
        assert isinstance(search.search(query), list)


class OddQueries(Hashes):
    """Gives no proper vector for some queries."""

    def embed(self, text: str) -> list[float]:
        odd = {"short": [1.0], "nan": [float("nan")] * 16, "huge": [1e300] * 16, "zero": [0.0] * 16}
        return odd.get(text) or super().embed(text)


def test_query_vector_is_checked(engine: sqlalchemy.Engine, build: Build) -> None:
    search = build(engine, OddQueries())
    search.index_records_batch([("Note", "1", "zero words"), ("Note", "2", "other")])
    assert ids(search.search("zero")) == ["1"], "without a direction there is only the ranking by keyword"
    for query in ("short", "nan", "huge"):
        with pytest.raises(ProviderError, match=r"OddQueries.embed gave .*; expected 16 finite numbers"):
            search.search(query)


def test_index_of_vectors_is_searched_by_keyword_without_a_provider(
    library: SearchEngine, engine: sqlalchemy.Engine, build: Build
) -> None:
    assert ids(build(engine).search("rivers")) == ["s0"]


# -- status ------------------------------------------------------------------------------------------------


def test_status_counts_rows_by_entity(library: SearchEngine) -> None:
    status = library.get_status()
    assert [(s.entity, s.indexed, s.pending) for s in status] == [("Book", 30, 0), ("Film", 30, 0), ("Song", 1, 0)]
    assert all(isinstance(s, IndexStatus) and s.last_updated is not None for s in status)
    assert all(s.last_updated.tzinfo is not None for s in status if s.last_updated)
    assert library.get_status("Song") == status[2:]
    assert library.get_status("Poem") == []


def test_status_tells_vectors_of_another_model(library: SearchEngine, engine: sqlalchemy.Engine, build: Build) -> None:
    other = build(engine, Hashes())
    other.index_record("Song", "s0", "a song about rivers")
    assert [(s.entity, s.stale) for s in library.get_status()] == [("Book", 0), ("Film", 0), ("Song", 1)]
    assert [(s.entity, s.stale) for s in other.get_status()] == [("Book", 30), ("Film", 30), ("Song", 0)]


def test_rows_of_another_model_are_left_out_of_the_ranking_by_vector_and_counted(
    library: SearchEngine, engine: sqlalchemy.Engine, build: Build
) -> None:
    hashes = Hashes()
    other = build(engine, hashes)
    other.index_record("Song", "s0", "a song about rivers")
    with pytest.warns(SearchWarning, match="1 row of Song, embedded by the model hashes: the provider's is") as told:
        assert "s0" not in ids(library.search("nosuchword", limit=100))
    assert told[0].filename == __file__
    with pytest.warns(SearchWarning, match="1 row of Song"):
        assert "s0" in ids(library.search("rivers", limit=2)), "by keyword"
    assert library.search("whales", entity="Book"), "nothing is left out of this entity"
    assert ids(other.search("nosuchword", entity="Song")) == ["s0"]
    with pytest.warns(SearchWarning, match="60 rows of Book, Film, embedded by the model words"):
        assert ids(other.search("nosuchword")) == ["s0"]


def test_a_command_counts_what_made_the_vectors_once(
    library: SearchEngine, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = library.embedding_provider
    assert provider is not None
    vector = np.array(provider.embed("whales"), np.float32)
    maker = Maker("name:words", provider.model_name, 16)
    counts: list[Any] = []

    def counted(*arguments: Any) -> Any:
        counts.append(count_origins(*arguments))
        return counts[-1]

    monkeypatch.setattr(reader, "count_origins", counted)
    monkeypatch.setattr(query_model, "query_vectors", lambda *a, **k: ([QueryVector(vector, maker)], lambda o: ""))
    found, missed = run_search(
        address, "whales", mode="hybrid", entities=(), limit=5, where=None, min_score=0.0, alone=True
    )
    assert len(counts) == 1
    assert missed == []
    assert [r["id"] for r in found] == ids(library.search("whales", limit=5))


def test_a_command_ranks_by_keyword_on_its_one_connection_while_it_embeds(
    library: SearchEngine, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked, opened = threading.Event(), 0
    keyword = SearchReader.keyword

    def noting(*arguments: Any) -> Any:
        hits = keyword(*arguments)
        ranked.set()
        return hits

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        return open_reader(*arguments, **options)

    def embedded(*arguments: Any, **options: Any) -> Any:
        assert ranked.wait(30)
        raise ProviderError("out of reach")

    monkeypatch.setattr(SearchReader, "keyword", noting)
    monkeypatch.setattr("kdb_fast.search.commands.open_reader", counting)
    monkeypatch.setattr(query_model, "query_vectors", embedded)
    with pytest.raises(ProviderError, match="out of reach"):
        run_search(address, "whales", mode="hybrid", entities=(), limit=5, where=None, min_score=0.0)
    assert opened == 1


def test_a_command_whose_connection_is_cut_while_it_embeds_opens_another(
    library: SearchEngine, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    if address.dialect == "sqlite":
        pytest.skip("a file has no connection that a server could cut")
    provider = library.embedding_provider
    assert provider is not None
    vector = np.array(provider.embed("whales"), np.float32)
    maker = Maker("name:words", provider.model_name, 16)

    def embedded(*arguments: Any, **options: Any) -> Any:
        execute(
            address,
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'kdb-fast/search'",
        )
        return [QueryVector(vector, maker)], lambda origin: ""

    monkeypatch.setattr(query_model, "query_vectors", embedded)
    found, _ = run_search(address, "whales", mode="hybrid", entities=(), limit=5, where=None, min_score=0.0)
    assert [r["id"] for r in found] == ids(library.search("whales", limit=5))


def test_a_command_that_cannot_ask_the_database_waits_for_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty.db"
    sqlite3.connect(empty).close()
    with pytest.raises(SchemaError, match="There is no search index"):
        run_search(
            parse_address(f"sqlite:///{empty}"),
            "whales",
            mode="hybrid",
            entities=(),
            limit=5,
            where=None,
            min_score=0.0,
        )


def test_status_of_a_keyword_index_counts_its_rows(engine: sqlalchemy.Engine, build: Build) -> None:
    search = build(engine)
    assert search.get_status() == []
    search.index_records_batch([("Note", f"r{i}", "text") for i in range(3)])
    assert [(s.entity, s.indexed, s.pending) for s in search.get_status()] == [("Note", 3, 0)]


# -- providers ---------------------------------------------------------------------------------------------


def test_provider_of_another_dimension_is_refused(
    library: SearchEngine, engine: sqlalchemy.Engine, address: DatabaseAddress
) -> None:
    before = contents(address)
    with pytest.raises(SchemaError, match="holds vectors of 16 dimensions; the model gives 24"):
        SearchEngine(engine, Words(24))
    assert contents(address) == before
    assert ids(library.search("rivers", limit=1)) == ["s0"]


def test_unusable_provider_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for provider, message in [
        (Words, "Words is a class"),
        (object(), r"object is no embedding provider; missing: embed\(\), embed_batch\(\), dimensions"),
        ("fastembed", "str is no embedding provider"),
    ]:
        with pytest.raises(UsageError, match=message):
            SearchEngine(f"sqlite:///{tmp_path}/index.db", provider)
    assert list(tmp_path.iterdir()) == []


def test_provider_is_given_back(search: SearchEngine, engine: sqlalchemy.Engine, build: Build, words: Words) -> None:
    given: object = words
    assert search.embedding_provider is given
    assert build(engine).embedding_provider is None


# -- both directions: rows of KameleonDB and rows for it ---------------------------------------------------


def test_rows_are_written_in_kameleondbs_format(search: SearchEngine, address: DatabaseAddress, words: Words) -> None:
    search.index_record("Note", "1", "first text")
    search.index_record("Note", "1", "second text")
    columns = "id, entity_name, record_id, content, model, dimensions, created_at, updated_at, "
    if address.dialect == "sqlite":
        (row,) = execute(address, f"SELECT {columns} embedding, typeof(embedding) FROM kdb_search")
        assert row[-1] == "text"
        vector = json.loads(row[-2])
        assert [type(number) for number in vector] == [float] * 16
        assert isinstance(row[6], str)
        found = "SELECT record_id FROM kdb_search_fts WHERE kdb_search_fts MATCH %s"
        assert execute(address, found, "second") == [("1",)]
        assert execute(address, found, "first") == []
    else:
        (row,) = execute(address, f"SELECT {columns} embedding::text, pg_typeof(embedding)::text FROM kdb_search")
        assert row[-1] == "vector"
        vector = json.loads(row[-2])
        found = "SELECT record_id FROM kdb_search WHERE tsv @@ plainto_tsquery('english', %s)"
        assert execute(address, found, "second") == [("1",)]
        indexes = "SELECT indexname FROM pg_indexes WHERE indexname LIKE 'ix_kdb_search%' ORDER BY 1"
        assert execute(address, indexes) == [
            ("ix_kdb_search_entity",), ("ix_kdb_search_fts",), ("ix_kdb_search_record",), ("ix_kdb_search_vector",),
        ]  # fmt: skip
    assert uuid.UUID(row[0]).version == 7
    assert row[1:6] == ("Note", "1", "second text", "words", 16)
    assert cosine(np.array(vector, np.float32), words.vectors(["second text"])[0]) >= EXACT


KAMELEONS_TABLES = {
    "postgresql": (
        "CREATE EXTENSION vector",
        "CREATE TABLE kdb_search (id varchar(36) PRIMARY KEY, entity_name varchar(255) NOT NULL, "
        "record_id varchar(36) NOT NULL, content text NOT NULL, embedding vector(16), model varchar(100), "
        "dimensions integer, created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz, "
        "UNIQUE (entity_name, record_id))",
        "CREATE INDEX ix_kdb_search_entity ON kdb_search (entity_name)",
        "CREATE INDEX ix_kdb_search_record ON kdb_search (record_id)",
        "ALTER TABLE kdb_search ADD COLUMN tsv tsvector GENERATED ALWAYS AS (to_tsvector('english', content)) STORED",
        "CREATE INDEX ix_kdb_search_fts ON kdb_search USING gin (tsv)",
        "CREATE INDEX ix_kdb_search_vector ON kdb_search USING hnsw (embedding vector_cosine_ops)",
    ),
    "sqlite": (
        "CREATE TABLE kdb_search (id TEXT PRIMARY KEY, entity_name TEXT NOT NULL, record_id TEXT NOT NULL, "
        "content TEXT NOT NULL, embedding BLOB, model TEXT, dimensions INTEGER, "
        "created_at TEXT NOT NULL DEFAULT (datetime('now')), updated_at TEXT, UNIQUE (entity_name, record_id))",
        "CREATE INDEX ix_kdb_search_entity ON kdb_search (entity_name)",
        "CREATE INDEX ix_kdb_search_record ON kdb_search (record_id)",
        "CREATE VIRTUAL TABLE kdb_search_fts USING fts5(id UNINDEXED, entity_name, record_id UNINDEXED, content, "
        "tokenize='porter unicode61')",
    ),
}


def insert_as_kameleondb(address: DatabaseAddress, entity: str, record_id: str, text: str, vector: list[float]) -> None:
    """A new row of the index, written with KameleonDB's own statements."""
    values = (str(uuid.uuid4()), entity, record_id, text, json.dumps(vector), "words", len(vector))
    execute(
        address,
        "INSERT INTO kdb_search (id, entity_name, record_id, content, embedding, model, dimensions) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s)",
        *values,
    )
    if address.dialect == "sqlite":
        execute(
            address,
            "INSERT INTO kdb_search_fts (id, entity_name, record_id, content) VALUES (%s, %s, %s, %s)",
            *values[:4],
        )


def test_tables_and_rows_of_kameleondb_are_taken_over(
    address: DatabaseAddress, engine: sqlalchemy.Engine, build: Build, words: Words
) -> None:
    for statement in KAMELEONS_TABLES[address.dialect]:
        execute(address, statement)
    insert_as_kameleondb(address, "Note", "1", "a text about whales", words.embed("a text about whales"))
    search = build(engine, words)
    insert_as_kameleondb(address, "Note", "2", "a text about rivers", words.embed("a text about rivers"))
    insert_as_kameleondb(address, "Mail", "3", "something else", words.embed("something else"))
    by_both = search.search("whales", limit=1)
    assert (ids(by_both), by_both[0].score) == (["1"], 2 / 61)
    assert ids(search.search("rivers", limit=1)) == ["2"]
    assert [(s.entity, s.indexed) for s in search.get_status()] == [("Mail", 1), ("Note", 2)]
    search.index_records_batch([("Note", "1", "now about ships"), ("Note", "4", "new")])
    search.delete_record("Note", "2")
    assert contents(address) == {
        ("Note", "1"): "now about ships",
        ("Mail", "3"): "something else",
        ("Note", "4"): "new",
    }
    check_in_step(address)
    assert ids(search.search("ships", limit=1)) == ["1"]
    check_vectors(index_rows(address), words)


def test_row_that_kameleondb_changes_is_found_as_it_is_now(
    search: SearchEngine, address: DatabaseAddress, words: Words
) -> None:
    search.index_records_batch([("Note", "1", "about whales"), ("Note", "2", "about ships")])
    assert ids(search.search("whales", limit=1)) == ["1"]
    vector = json.dumps(words.embed("about rivers"))
    now = "now()" if address.dialect == "postgresql" else "datetime('now')"
    execute(
        address,
        f"UPDATE kdb_search SET content = %s, embedding = %s, updated_at = {now} WHERE record_id = '1'",
        "about rivers",
        vector,
    )
    if address.dialect == "sqlite":
        (found,) = execute(address, "SELECT id FROM kdb_search WHERE record_id = '1'")
        execute(address, "DELETE FROM kdb_search_fts WHERE entity_name = %s AND record_id = %s", "Note", "1")
        execute(address, "INSERT INTO kdb_search_fts VALUES (%s, 'Note', '1', 'about rivers')", *found)
    results = search.search("rivers", limit=1)
    assert (ids(results), results[0].score) == (["1"], 2 / 61)
    assert "1" not in ids(search.search("whales", limit=1, min_score=0.03))


# -- what an engine may be ---------------------------------------------------------------------------------


def test_tables_are_created_with_the_engine(engine: sqlalchemy.Engine, address: DatabaseAddress, build: Build) -> None:
    build(engine)
    assert set(KAMELEONS_COLUMNS) <= columns_of(address, "kdb_search")
    if address.dialect == "sqlite":
        assert columns_of(address, "kdb_search_fts") == {"id", "entity_name", "record_id", "content"}
    else:
        assert "tsv" in columns_of(address, "kdb_search")


KAMELEONS_COLUMNS = (
    "id", "entity_name", "record_id", "content", "embedding", "model", "dimensions", "created_at", "updated_at",
)  # fmt: skip


def columns_of(address: DatabaseAddress, table: str) -> set[str]:
    statement = "SELECT column_name FROM information_schema.columns WHERE table_name = %s"
    if address.dialect == "sqlite":
        statement = "SELECT name FROM pragma_table_info(%s)"
    return {name for (name,) in execute(address, statement, table)}


def test_url_and_engine_lead_to_the_same_index(
    engine: sqlalchemy.Engine, address: DatabaseAddress, build: Build, words: Words
) -> None:
    build(sqlalchemy_url(address), words).index_record("Note", "1", "by url")
    build(sqlalchemy_url(address).replace("+psycopg", ""), words).index_record("Note", "2", "by short url")
    build(address, words).index_record("Note", "3", "by address")
    assert sorted(ids(build(engine, words).search("by"))) == ["1", "2", "3"]


def test_engine_whose_url_does_not_say_all(database: DatabaseAddress, build: Build, words: Words) -> None:
    from psycopg import connect
    from psycopg.conninfo import conninfo_to_dict

    execute(database, "CREATE SCHEMA apart")
    parts = conninfo_to_dict(database.conninfo)
    arguments: dict[str, Any] = {**parts, "options": "-c search_path=apart,public"}
    engines = [
        sqlalchemy.create_engine("postgresql+psycopg://", connect_args=arguments),
        sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: connect(**arguments)),
    ]
    for number, engine in enumerate(engines):
        search = build(engine, words)
        search.index_record("Note", str(number), "in a schema of its own")
        assert len(search.search("schema")) == number + 1
        search.close()
        engine.dispose()
    assert execute(database, "SELECT count(*) FROM apart.kdb_search") == [(2,)]


def test_engine_in_static_pool_of_postgresql(database: DatabaseAddress, build: Build, words: Words) -> None:
    engine = sqlalchemy.create_engine(sqlalchemy_url(database), poolclass=StaticPool)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE mine (x int)"))
        search = build(engine, words)
        search.index_record("Note", "1", "text")
        connection.commit()
    assert execute(database, "SELECT count(*) FROM mine") == [(0,)]
    engine.dispose()


def test_relative_path_is_that_of_the_engine(
    tmp_path: Path, build: Build, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = sqlalchemy.create_engine(sqlalchemy.URL.create("sqlite", database="a%20b?.db"))
    search = build(engine, words)
    search.index_record("Note", "1", "text")
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT count(*) FROM kdb_search")).scalar() == 1
    assert [path.name for path in tmp_path.glob("*.db")] == ["a%20b?.db"]
    engine.dispose()


def test_engine_of_a_file_uri(tmp_path: Path, build: Build, words: Words) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///file:{tmp_path}/index.db?uri=true")
    build(engine, words).index_record("Note", "1", "text")
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT count(*) FROM kdb_search")).scalar() == 1
    assert (tmp_path / "index.db").exists()
    engine.dispose()


def test_other_things_than_databases_are_refused(tmp_path: Path) -> None:
    mysql = SimpleNamespace(url="", raw_connection=None, dialect=SimpleNamespace(name="mysql"))
    asynchronous = SimpleNamespace(url="", raw_connection=None, sync_engine=None)
    for engine, message in [
        (None, "engine is NoneType; expected a database URL or an SQLAlchemy Engine"),
        (tmp_path, "engine is PosixPath; expected"),
        (sqlite3.connect, "expected a database URL"),
        (asynchronous, "engine is SimpleNamespace; expected"),
        (mysql, "The engine is for mysql; expected PostgreSQL or SQLite"),
        ("mysql://host/db", "starts with 'mysql:'"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ]:
        with pytest.raises(UsageError, match=message):
            SearchEngine(engine)


def test_server_that_is_not_there(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://user:s3cret@/db?host={tmp_path}&port=5999"
    engine = sqlalchemy.create_engine(url)
    for where in (url, engine):
        with pytest.raises(DatabaseError, match="Cannot connect to postgresql") as caught:
            SearchEngine(where)
        assert "s3cret" not in str(caught.value)
    with pytest.raises(DatabaseError, match="Cannot open"):
        SearchEngine(f"sqlite:///{tmp_path}/missing/index.db")


def test_table_of_another_program_is_refused(address: DatabaseAddress, engine: sqlalchemy.Engine) -> None:
    execute(address, "CREATE TABLE kdb_search (id varchar(36) PRIMARY KEY, title text)")
    with pytest.raises(SchemaError, match="has no column entity_name"):
        SearchEngine(engine)


def test_sqlalchemy_is_not_needed_for_a_url(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "from kdb_fast import SearchEngine, UsageError\n"
        "with SearchEngine(sys.argv[1]) as search:\n"
        "    search.index_records_batch([('Note', '1', 'about whales'), ('Note', '2', 'about ships')])\n"
        "    print(search.search('whales')[0].id)\n"
        "    try: search.for_session(None)\n"
        "    except UsageError as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{tmp_path}/index.db"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert answer.stdout.splitlines() == ["1", "for_session needs SQLAlchemy, which is not installed."]


def test_embedded_server_runs_as_long_as_the_engine(words: Words) -> None:
    with tempfile.TemporaryDirectory(prefix="kdb-fast-tests-") as folder:
        Path(folder).chmod(0o755)
        data = Path(folder) / "data"
        for number in (1, 2):
            with SearchEngine(f"embedded:{data}", words) as search:
                search.index_record("Note", str(number), "about whales")
                assert len(search.search("whales")) == number
                assert (data / "postmaster.pid").exists()
            assert not (data / "postmaster.pid").exists()


# -- SQLite in memory --------------------------------------------------------------------------------------


@pytest.fixture(params=["default pool", "StaticPool"])
def memory(request: pytest.FixtureRequest) -> Iterator[sqlalchemy.Engine]:
    options: dict[str, Any] = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    engine = sqlalchemy.create_engine("sqlite://", **options if request.param == "StaticPool" else {})
    yield engine
    engine.dispose()


def test_sqlite_in_memory_is_that_of_the_engine(memory: sqlalchemy.Engine, build: Build, words: Words) -> None:
    search = build(memory, words)
    search.index_records_batch([("Note", "1", "about whales"), ("Note", "2", "about ships")])
    gc.collect()  # a connection that only a variable held would go back to the pool now
    assert ids(search.search("whales", limit=1)) == ["1"]
    search.delete_record("Note", "1")
    with memory.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT record_id FROM kdb_search")).all() == [("2",)]
    assert [(s.entity, s.indexed) for s in search.get_status()] == [("Note", 1)]


def test_engine_in_memory_leaves_open_work_alone(memory: sqlalchemy.Engine, words: Words) -> None:
    with memory.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE mine (x int)"))
        connection.execute(sqlalchemy.text("INSERT INTO mine VALUES (1)"))
        search = SearchEngine(memory, words)
        gc.collect()
        search.index_record("Note", "1", "text")
        assert len(search.search("text")) == 1
        connection.commit()
        assert connection.execute(sqlalchemy.text("SELECT x FROM mine")).all() == [(1,)]
    search.close()


def test_memory_of_one_thread_is_refused_in_another(words: Words, build: Build) -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    search = build(engine, words)
    with ThreadPoolExecutor(1) as pool:
        for call in (lambda: search.search("text"), lambda: search.index_record("Note", "1", "text")):
            with pytest.raises(UsageError, match="cannot be used here") as caught:
                pool.submit(call).result()
            assert "StaticPool" in caught.value.remedy
    engine.dispose()


def test_memory_in_a_static_pool_is_for_all_threads(words: Words, build: Build) -> None:
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    search = build(engine, words)
    with ThreadPoolExecutor(4) as pool:
        for i, _ in enumerate(pool.map(lambda i: search.index_record("Note", f"r{i}", f"text {i}"), range(20))):
            assert len(search.search("text", limit=50)) >= i
    assert len(search.search("text", limit=50)) == 20
    engine.dispose()


# -- threads, lost connections and the end -----------------------------------------------------------------


def sessions(address: DatabaseAddress) -> int:
    """Other sessions in this PostgreSQL database."""
    ((count,),) = execute(
        address,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
        database_name(address),
    )
    return int(count)


def test_searching_and_writing_threads(search: SearchEngine, address: DatabaseAddress, words: Words) -> None:
    search.index_record("Note", "first", "a text")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                search.index_records_batch([("Note", f"{number}-{i}-{k}", f"text {number} {i} {k}") for k in range(3)])
                assert search.search(f"text {number}", limit=3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    rows = index_rows(address)
    assert len(rows) == 6 * 5 * 3 + 1
    check_vectors(rows, words)
    check_in_step(address)


class Meeting(Words):
    """Two of these wait for each other once, when both have embedded their second text."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        vectors = super().embed_batch(texts)
        if len(self.batches) == 2:
            self.barrier.wait(20)
        return vectors


class Crosswise:
    """Two engines write the same two records in opposite orders, each holding its first when it wants the other's.

    Attributes:
        errors: What came of each engine's batch.
        begun: Transactions that each began.
    """

    def __init__(self, address: DatabaseAddress, build: Build, write: Callable[[SearchEngine, Any], None]) -> None:
        execute(address, f"ALTER DATABASE {database_name(address)} SET deadlock_timeout = '20ms'")
        barrier = threading.Barrier(2)
        self.providers = [Meeting(barrier) for _ in range(2)]
        self.errors: list[BaseException | None] = [None, None]
        self.begun = [0, 0]
        self._write = write
        searches = [build(address, provider) for provider in self.providers]
        threads = [threading.Thread(target=self._run, args=(n, search)) for n, search in enumerate(searches)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self, number: int, search: SearchEngine) -> None:
        begin = search._begin

        def counting() -> Any:
            self.begun[number] += 1
            return begin()

        search._begin = counting  # type: ignore[method-assign]
        keys = ("x", "y") if number == 0 else ("y", "x")
        try:
            self._write(search, [("Note", key, f"{key} of engine {number}") for key in keys])
        except BaseException as error:
            self.errors[number] = error


def in_a_batch(search: SearchEngine, records: Any) -> None:
    search.index_records_batch(iter(records))


def in_a_block(search: SearchEngine, records: Any) -> None:
    with search.transaction():
        for record in records:
            search.index_record(*record)


@pytest.mark.parametrize("write", [in_a_batch, in_a_block])
@pytest.mark.parametrize("existing", [True, False])
def test_batches_that_lock_each_other_out_are_both_written(
    database: DatabaseAddress,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
    write: Callable[[SearchEngine, Any], None],
) -> None:
    if existing:
        build(database, Words()).index_records_batch([("Note", key, "before") for key in ("x", "y")])
    monkeypatch.setattr(batches, "CHUNK_ROWS", 1)  # else they would be written in the order of their keys
    both = Crosswise(database, build, write)
    assert both.errors == [None, None]
    assert sorted(both.begun) == [1, 2], "one of them was rolled back and written again"
    assert [len(provider.batches) for provider in both.providers] == [2, 2], "no text was embedded again"
    rows = index_rows(database)
    assert {row.content for row in rows.values()} in [{f"{key} of engine {n}" for key in "xy"} for n in (0, 1)]
    check_vectors(rows, both.providers[0])


@pytest.mark.parametrize("why", ["every attempt failed", "too many to remember"])
def test_batch_that_cannot_be_written_again_is_an_error_and_nothing_of_it_stored(
    database: DatabaseAddress, build: Build, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(batches, "CHUNK_ROWS", 1)
    if why == "every attempt failed":
        monkeypatch.setattr(transactions, "WAITS", ())
    else:
        monkeypatch.setattr(transactions, "QUEUE_BYTES", 1)
    both = Crosswise(database, build, in_a_batch)
    (loser,) = [n for n, error in enumerate(both.errors) if error]
    with pytest.raises(DatabaseError, match="Another transaction wrote the same rows while writing: deadlock"):
        raise both.errors[loser] or AssertionError
    assert both.begun == [1, 1]
    assert {row.content for row in index_rows(database).values()} == {f"{key} of engine {1 - loser}" for key in "xy"}


def test_overlapping_batches_of_several_threads_all_succeed(database: DatabaseAddress, build: Build) -> None:
    keys = [f"r{number}" for number in range(60)]
    engines = [build(database, Hashes()) for _ in range(3)]

    def work(number: int) -> None:
        order = random.Random(number)
        for turn in range(4):
            order.shuffle(keys_of[number])
            engines[number].index_records_batch([("Note", k, f"{k} {number} {turn}") for k in keys_of[number]])
            engines[number].delete_record("Note", keys_of[number][0])
            engines[number].index_record("Note", keys_of[number][0], "again")

    keys_of = [list(keys) for _ in engines]
    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(work, range(len(engines))))
    rows = index_rows(database)
    assert sorted(key[1] for key in rows) == sorted(keys)
    check_vectors(rows, Hashes())


def test_threads_that_ended_leave_no_connections(database: DatabaseAddress, words: Words, build: Build) -> None:
    search = build(database, words)
    for _ in range(12):
        thread = threading.Thread(target=search.search, args=("text",))
        thread.start()
        thread.join()
    assert sessions(database) == 3  # one that writes, two that read side by side


@pytest.mark.parametrize("by", ["engine", "address"])
def test_connections_that_were_cut_are_replaced(database: DatabaseAddress, words: Words, build: Build, by: str) -> None:
    engine = sqlalchemy.create_engine(sqlalchemy_url(database))
    with engine.connect(), engine.connect(), engine.connect(), engine.connect():
        pass  # the pool keeps these, and they will be dead
    search = build(engine if by == "engine" else database, words)

    def cut() -> None:
        execute(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()",
        )

    search.index_record("Note", "1", "first text")
    assert len(search.search("text")) == 1
    cut()
    assert len(search.search("text")) == 1
    search.index_record("Note", "2", "second text")
    cut()
    with search.transaction():
        search.index_record("Note", "3", "third text")
    assert len(search.search("text")) == 3
    engine.dispose()


def test_search_does_with_one_connection_where_the_server_gives_no_second(
    database: DatabaseAddress, words: Words, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = build(database, words)
    search.index_record("Note", "1", "text")
    opened: list[Any] = []
    open_connection = search._connections.reading._open

    def open_once() -> Any:
        if opened:
            raise DatabaseError("sorry, too many clients already")
        opened.append(open_connection())
        return opened[0]

    monkeypatch.setattr(search._connections.reading, "_open", open_once)
    assert [result.id for result in search.search("text")] == ["1"]
    assert [result.id for result in search.search("text")] == ["1"]
    assert len(opened) == 1


def test_query_is_embedded_once_however_often_a_connection_is_replaced(
    database: DatabaseAddress, words: Words, build: Build
) -> None:
    search = build(database, words)
    search.index_record("Note", "1", "text")
    assert len(search.search("text")) == 1
    for reading in (*search._connections.reading._idle, *search._connections.reading._idle_beside):
        reading.connection.close()
    words.embedded.clear()
    assert len(search.search("text")) == 1
    assert words.embedded == ["text"]


def test_connection_that_is_lost_while_writing_is_an_error_and_nothing_stored(
    database: DatabaseAddress, words: Words, build: Build
) -> None:
    search = build(database, words)

    def records() -> Iterator[tuple[str, str, str]]:
        for i in range(batches.CHUNK_ROWS):
            yield "Note", f"r{i}", f"text {i % 7}"
        execute(
            database,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()",
        )
        yield "Note", "last", "text"

    with pytest.raises(DatabaseError, match="The database was lost while writing"):
        search.index_records_batch(records())
    assert index_rows(database) == {}
    search.index_record("Note", "1", "text")
    assert len(index_rows(database)) == 1


def test_provider_may_take_its_time_within_a_transaction(
    database: DatabaseAddress, words: Words, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sqlalchemy.create_engine(sqlalchemy_url(database))
    for where in (database, engine):
        search = build(where, words)
        with search._connections.writing() as store:
            connection = store.connection()  # type: ignore[attr-defined]
            assert connection.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("0",)
            assert connection.execute("SHOW lock_timeout").fetchone() == ("30s",)
        assert connection.execute("SHOW lock_timeout").fetchone() == ("0",), "a pooler would hand it to others"
    engine.dispose()


def test_lock_of_another_session_is_not_waited_for_long(
    database: DatabaseAddress, words: Words, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LIBRARY_LIMITS", connections.LIBRARY_LIMITS.replace("'30s'", "'10ms'"))
    search = build(database, words)
    engine = sqlalchemy.create_engine(sqlalchemy_url(database))
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("LOCK TABLE kdb_search"))
        with pytest.raises(DatabaseError, match="A lock was not granted"):
            search.index_record("Note", "1", "text")
    search.index_record("Note", "1", "text")
    assert len(index_rows(database)) == 1
    engine.dispose()


def test_closing_gives_every_connection_back(database: DatabaseAddress, words: Words) -> None:
    for end in ("close", "with", "del"):
        search = SearchEngine(database, words)
        search.index_record("Note", "1", "text")
        assert len(search.search("text")) == 1
        assert sessions(database) == 3
        if end == "close":
            search.close()
        elif end == "with":
            with search as same:
                assert same is search
        del search
        assert_no_sessions(database)


def test_engine_that_was_not_built_holds_no_connection(database: DatabaseAddress) -> None:
    SearchEngine(database, Words(16)).close()
    with pytest.raises(SchemaError):
        SearchEngine(database, Words(24))
    assert_no_sessions(database)


def assert_no_sessions(address: DatabaseAddress) -> None:
    from servers import eventually

    eventually(lambda: sessions(address) == 0)  # the server notices a moment later


def test_role_that_may_not_create_the_tables_is_told(database: DatabaseAddress, postgres: Any) -> None:
    role = postgres.create_role(database)
    execute(database, "CREATE EXTENSION vector")
    execute(database, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with pytest.raises(SchemaError, match="may not prepare the index"):
        SearchEngine(connect_as(role))


# -- the package's names -----------------------------------------------------------------------------------


def test_names_of_the_package() -> None:
    from kdb_fast.search import engine as module

    assert kdb_fast.SearchEngine is SearchEngine
    for name in kdb_fast.__all__:
        assert getattr(kdb_fast, name).__name__ == name
    assert set(kdb_fast.__all__) <= set(dir(kdb_fast))
    assert {"SearchEngine", "SearchResult", "IndexStatus"} <= set(module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'SearchEngin'"):
        _ = kdb_fast.SearchEngin


def test_importing_the_package_costs_nothing() -> None:
    code = "import sys, kdb_fast; before = set(sys.modules); kdb_fast.SearchEngine; print(*before)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = {name.split(".")[0] for name in answer.stdout.split()}
    assert "kdb_fast" in loaded
    assert not loaded & {"numpy", "psycopg", "onnxruntime", "fastembed", "sqlalchemy", "httpx", "psutil"}
