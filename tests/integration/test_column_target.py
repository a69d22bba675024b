"""A vector column of the user's own table, on both databases: what is written, what is left alone, and what is told."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest
from articles import Articles, ArticleSource
from column_writer import DIMENSIONS, Writer, begun, vector_of
from servers import Oracle, Server, engine_processes, execute, mixed_texts

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import SchemaError
from kdb_fast.indexing import flushing
from kdb_fast.indexing.reindex import reindex
from kdb_fast.receipt import Receipt
from kdb_fast.records import MAX_CONTENT_BYTES, Key, content_hash, cut_content
from kdb_fast.settings import ReindexOptions
from kdb_fast.stores import open_store
from kdb_fast.tables.column_target import ColumnTarget


@pytest.fixture
def articles(index: DatabaseAddress) -> Articles:
    return Articles(index)


Open = Callable[[ColumnTarget], Writer]


@pytest.fixture
def begin(index: DatabaseAddress) -> Iterator[Open]:
    """Opens a store that is closed after the test, and begins a run."""
    with contextlib.ExitStack() as stack:
        yield lambda target: stack.enter_context(begun(index, target))


def test_rows_without_a_vector_are_looked_up_too(articles: Articles, begin: Open) -> None:
    articles.add("one", None)
    writer = begin(articles.target())
    keys = [articles.key(n) for n in range(3)]
    found = writer.store.lookup(keys)
    assert list(found) == keys[:2]
    assert (found[keys[0]].content_hash, found[keys[1]].content_hash) == (content_hash("one"), b"")
    assert writer.fingerprints(*keys[:2]) == [None, None]
    assert writer.store.count() == 0


def test_what_another_program_has_changed_is_not_ours(articles: Articles, begin: Open) -> None:
    articles.add("one", "two", "three")
    writer = begin(articles.target())
    keys = [articles.key(n) for n in range(3)]
    assert writer.flush(*zip(keys, ["one", "two", "three"], strict=True)).rows == 3
    articles.set(0, "another")
    articles.set_vector(1, vector_of("one"))
    assert writer.fingerprints(*keys) == [None, None, "f"]
    articles.set(0, "one")  # as it was
    assert writer.fingerprints(*keys) == ["f", None, "f"]


def test_vectors_of_another_program_are_left_alone(articles: Articles, begin: Open) -> None:
    """One that was there, one over ours, and one that comes between look-up and flush; with or without ``replace``."""
    texts = ["there", "over ours", "meanwhile", "ours"]
    articles.add(*texts)
    writer = begin(articles.target())
    rows = [(articles.key(n), text) for n, text in enumerate(texts)]
    articles.set_vector(0, vector_of("theirs"))
    assert writer.flush(*rows[1:2], rows[3]).rows == 2
    articles.set_vector(1, vector_of("theirs"))
    articles.set(3, "another text")
    found = writer.store.lookup([key for key, _ in rows])
    assert [found[key].foreign for key, _ in rows] == [True, True, False, False]
    articles.set_vector(2, vector_of("theirs"))
    rows[3] = articles.key(3), "another text"
    assert writer.flush(*rows).superseded == ((0, 0), (0, 1), (0, 2))
    for number in range(3):
        np.testing.assert_allclose(articles.vector(number), vector_of("theirs"), rtol=1e-5)
    np.testing.assert_allclose(articles.vector(3), vector_of("another text"), rtol=1e-5)
    writer.store.end_run(writer.run.number, "done", {})
    writer = begin(articles.target(replace=True))
    assert [stored.foreign for stored in writer.store.lookup([key for key, _ in rows]).values()] == [False] * 4
    assert writer.flush(*rows).rows == 4
    for number, (_, text) in enumerate(rows):
        np.testing.assert_allclose(articles.vector(number), vector_of(text), rtol=1e-5)


def test_row_that_changed_or_vanished_since_it_was_read_is_superseded(articles: Articles, begin: Open) -> None:
    articles.add("one", "two", "three")
    writer = begin(articles.target())
    articles.set(0, "another")
    articles.delete(1)
    result = writer.flush(*((articles.key(n), text) for n, text in enumerate(["one", "two", "three"])))
    assert (result.rows, result.superseded, result.rejected) == (1, ((0, 0), (0, 1)), ())
    assert articles.rows()[0][1] is None
    assert articles.state() == [(2, "en", writer.run.number)]


def test_row_that_another_session_holds_is_not_waited_for(database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION vector")
    articles = Articles(database)
    articles.add("one", "two", "three")
    with begun(database, articles.target()) as writer, psycopg.connect(database.conninfo) as other:
        assert writer.flush((articles.key(2), "three")).rows == 1
        other.execute("UPDATE shop.articles SET body = 'another' WHERE id = 0")
        other.execute("UPDATE shop.articles SET body = NULL WHERE id = 2")
        result = writer.flush((articles.key(0), "one"), (articles.key(1), "two"), deletes=[articles.key(2)])
        assert (result.rows, result.superseded, result.rejected, result.deleted) == (1, ((0, 0),), (), 0)
        other.commit()
        assert articles.rows()[0] == ("another", None)
        assert writer.flush((articles.key(0), "another"), deletes=[articles.key(2)])[:3:2] == (1, 1)
        assert [number for number, _, _ in articles.state()] == [0, 1]


def test_row_without_text_loses_our_vector_and_no_other(articles: Articles, begin: Open) -> None:
    articles.add("one", "two", "three")
    writer = begin(articles.target())
    keys = [articles.key(n) for n in range(3)]
    writer.flush(*zip(keys, ["one", "two", "three"], strict=True))
    articles.set(0, None)
    articles.set(1, None)
    articles.set_vector(1, vector_of("theirs"))
    assert writer.flush(deletes=keys).deleted == 1
    assert articles.rows()[0][1] is None
    np.testing.assert_allclose(articles.vector(1), vector_of("theirs"), rtol=1e-5)
    np.testing.assert_allclose(articles.vector(2), vector_of("three"), rtol=1e-5)  # its text is there
    # A vector that is ours, and of the text that the row has, stays known.
    assert [number for number, _, _ in articles.state()] == [2]


KEYS = (
    ("uuid", "6F9619FF-8B86-D011-B42D-00C04FC964FF", "6f9619ff-8b86-d011-b42d-00c04fc964ff"),
    ("bigint", "-9223372036854775808", "-09223372036854775808"),
    ("numeric", "1.50", "1.5"),
    ("numeric", "NaN", "nan"),
    ("date", "infinity", "infinity"),
    ("timestamptz", "2026-01-31 23:59:59.123456+00", "2026-01-31T23:59:59.123456Z"),
    ("char(5)", "ab", "ab   "),
    ("varchar(3)", "ab\u00df", "ab\u00df"),
    ("bytea", "\\xDEADBEEF", "\\xdeadbeef"),
    ("mood", "glad", "glad"),
    ("even", "4", "04"),
)
"""Type, a value, and another way to write it; equal for the column."""


def test_keys_of_postgresql_are_equal_where_the_column_says_so(database: DatabaseAddress) -> None:
    execute(database, "CREATE TYPE mood AS ENUM ('sad', 'glad')")
    execute(database, "CREATE DOMAIN even AS integer CHECK (VALUE % 2 = 0)")
    for number, (declared, value, same) in enumerate(KEYS):
        columns = f"id {declared} PRIMARY KEY, body text, embedding vector({DIMENSIONS})"
        articles = Articles(database, columns, f"shop.articles{number}")
        execute(database, f"INSERT INTO {articles.name} VALUES (%s, 'one')", value)
        target = articles.target(name=f"articles{number}")
        with begun(database, target) as writer:
            keys: list[Key] = [*dict.fromkeys([(value,), (same,)]), ("none of its kind",)]
            assert list(writer.store.lookup(keys)) == keys[:-1]
            assert writer.flush(((same,), "one")).rows == 1
            assert set(writer.fingerprints(*keys[:-1])) == {"f"}
            assert writer.flush(deletes=keys).deleted == 0
            result = writer.flush(((value,), "one"), (("none of its kind",), "one"))
            assert result.rows == 1, declared
            assert len(result.rejected) + len(result.superseded) == 1
            writer.store.end_run(writer.run.number, "done", {})


def test_keys_are_compared_by_the_operator_of_their_index(database: DatabaseAddress) -> None:
    """Wherever it lies: here not on the search path."""
    try:
        execute(database, "CREATE SCHEMA extensions; CREATE EXTENSION citext SCHEMA extensions")
    except psycopg.Error as error:
        pytest.skip(f"this server has no citext: {error}")
    articles = Articles(database, "id extensions.citext PRIMARY KEY, body text, embedding vector")
    execute(database, f"INSERT INTO {articles.name} VALUES ('Abc', 'one')")
    with begun(database, articles.target()) as writer:
        assert writer.flush((("aBC",), "one")).rows == 1
        assert writer.fingerprints(("ABC",), ("abc",)) == ["f", "f"]


def test_types_of_keys_are_kept_apart_on_sqlite(sqlite_database: DatabaseAddress) -> None:
    articles = Articles(sqlite_database, "id, lang, body, embedding, UNIQUE (id, lang)")
    keys: list[Key] = [(1, "en"), ("1", "en"), (b"1", "en"), (1.5, "en")]
    for key in keys:
        execute(sqlite_database, "INSERT INTO articles (id, lang, body) VALUES (%s, %s, %s)", *key, repr(key))
    with begun(articles.address, articles.target(key=("id", "lang"))) as writer:
        assert writer.flush(*((key, repr(key)) for key in keys[:3])).rows == 3
        assert writer.fingerprints(*keys) == ["f", "f", "f", None]
        for key in keys[:3]:
            ((value,),) = execute(sqlite_database, "SELECT embedding FROM articles WHERE id = %s", key[0])
            np.testing.assert_array_equal(np.frombuffer(value, "<f4"), vector_of(repr(key)))


SQLITE_TABLES = {
    "integer primary key": "id INTEGER PRIMARY KEY, body TEXT, embedding BLOB",
    "without rowid": "id INTEGER, body TEXT, embedding BLOB, PRIMARY KEY (id)) WITHOUT ROWID --",
    "strict": "id ANY PRIMARY KEY, body TEXT, embedding BLOB) STRICT --",
    "any case": "id TEXT PRIMARY KEY COLLATE NOCASE, body TEXT, embedding BLOB",
}


@pytest.mark.parametrize("kind", SQLITE_TABLES)
@pytest.mark.parametrize("form", ["blob", "json"])
def test_tables_of_sqlite(sqlite_database: DatabaseAddress, kind: str, form: str) -> None:
    columns = SQLITE_TABLES[kind]
    articles = Articles(
        sqlite_database, columns.replace("embedding BLOB", "embedding ANY" if "STRICT" in columns else "e")
    )
    key = "Abc" if kind == "any case" else 7
    execute(sqlite_database, "INSERT INTO articles (id, body) VALUES (%s, 'one')", key)
    vector = "embedding" if "STRICT" in columns else "e"
    with begun(articles.address, articles.target(vector=vector, form=form)) as writer:
        assert writer.flush(((key,), "one")).rows == 1
        assert writer.fingerprints((key,)) == ["f"]
        if kind == "any case":
            assert writer.fingerprints(("aBC",)) == ["f"]
        ((value,),) = execute(sqlite_database, f"SELECT {vector} FROM articles")
        found = np.frombuffer(value, "<f4") if form == "blob" else np.array(json.loads(value), np.float32)
        np.testing.assert_allclose(found, vector_of("one"), atol=1e-6)


def test_rounded_vectors_are_known_again(database: DatabaseAddress) -> None:
    """Their type is in a schema that is not on the search path."""
    execute(database, "CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    articles = Articles(database, f"id bigint PRIMARY KEY, body text, embedding extensions.halfvec({DIMENSIONS})")
    execute(database, f"INSERT INTO {articles.name} VALUES (1, 'one')")
    target = articles.target()
    assert target.vector.dimensions == DIMENSIONS
    with begun(articles.address, target) as writer:
        assert writer.flush((("1",), "one")).rows == 1
        assert writer.fingerprints(("1",)) == ["f"]


def test_names_and_expressions_of_the_user(index: DatabaseAddress) -> None:
    """Names that ours must not be taken for, and names that must be quoted."""
    postgresql = index.dialect == "postgresql"
    vector = "vector" if postgresql else "BLOB"
    name = 'shop."Big ""%d"" Table"' if postgresql else '"Big ""%d"" Table"'
    columns = f'"a ""key"" %d" bigint PRIMARY KEY, run text, "100% {{x}}" text, at text, "{{v}} %" {vector}'
    articles = Articles(index, columns, name)
    execute(index, f"INSERT INTO {name} VALUES (1, 'one', 'two', 'three', NULL)")
    text = "run || '%' || coalesce(\"100% {x}\", '{y}') || at"
    target = articles.target(text, vector="{v} %")
    with begun(articles.address, target) as writer:
        key = articles.key(1)[:1]
        assert writer.store.lookup([key])[key].content_hash == content_hash("one%twothree")
        assert writer.flush((key, "one%twothree")).rows == 1
        assert writer.fingerprints(key) == ["f"]
        assert writer.flush((key, "one%two")).superseded == ((0, 0),)
        assert writer.flush(deletes=[key]).deleted == 0


def test_a_long_text_counts_as_far_as_it_is_read(articles: Articles, begin: Open) -> None:
    """Cut at a character, as it is by who embeds it."""
    longest = [
        text * (MAX_CONTENT_BYTES // len(text.encode()) + 2) for text in ("a", "x\u00e9", "\u20ac", "z\U0001f600z")
    ]
    articles.add(*longest, "a" * MAX_CONTENT_BYTES)
    writer = begin(articles.target())
    for number, text in enumerate([*longest, "a" * MAX_CONTENT_BYTES]):
        key = articles.key(number)
        assert writer.flush((key, cut_content(text))).rows == 1
        assert writer.fingerprints(key) == ["f"]


TRIGGERS = {
    "dropped": ("RETURN NULL", "RAISE(IGNORE)"),
    "emptied": ("NEW.embedding := NULL; RETURN NEW", None),
}


@pytest.mark.parametrize("kind", TRIGGERS)
def test_row_that_a_trigger_keeps_from_being_written_is_rejected(articles: Articles, begin: Open, kind: str) -> None:
    articles.add("one", "two")
    in_postgresql, in_sqlite = TRIGGERS[kind]
    if articles.postgresql:
        articles.add_trigger(f"IF NEW.id = 1 THEN {in_postgresql}; END IF; RETURN NEW;")
    elif in_sqlite:
        articles.add_trigger(f"SELECT {in_sqlite}", "BEFORE UPDATE", "WHEN NEW.id = 1")
    else:
        set_null = "UPDATE articles SET embedding = NULL WHERE id = NEW.id"
        articles.add_trigger(set_null, "AFTER UPDATE", "WHEN NEW.id = 1 AND NEW.embedding IS NOT NULL")
    writer = begin(articles.target())
    result = writer.flush((articles.key(0), "one"), (articles.key(1), "two"))
    assert (result.rows, result.superseded) == (1, ())
    assert [row[:3] for row in result.rejected] == [(0, 1, "database_refused")]
    assert "trigger" in result.rejected[0][3]
    assert [row[0] for row in articles.state()] == [0]
    assert writer.store.altered(writer.run.number) == []


def test_trigger_that_changes_what_is_written_is_named(articles: Articles, begin: Open) -> None:
    """A vector is known as the database keeps it; a text that it changes is embedded again."""
    articles.add("one", "two")
    if articles.postgresql:
        articles.add_trigger("NEW.body := upper(NEW.body); NEW.embedding := NEW.embedding + NEW.embedding; RETURN NEW;")
    else:
        articles.add_trigger("UPDATE articles SET body = upper(body) WHERE id = NEW.id", "AFTER UPDATE", "")
    writer = begin(articles.target())
    assert writer.flush((articles.key(0), "one"), (articles.key(1), "two")).rows == 2
    assert writer.fingerprints(articles.key(0)) == [None]
    (warning,) = writer.store.altered(writer.run.number)
    assert warning.startswith(f"2 rows of {articles.name} do not hold the text")
    assert "trigger meddle" in warning
    assert writer.flush((articles.key(0), "ONE"), (articles.key(1), "TWO")).rows == 2
    assert writer.fingerprints(articles.key(0), articles.key(1)) == ["f", "f"]
    assert writer.store.altered(writer.run.number) == []


def test_state_of_rows_that_are_gone_goes(articles: Articles, begin: Open) -> None:
    articles.add("one", "two")
    writer = begin(articles.target())
    writer.flush((articles.key(0), "one"), (articles.key(1), "two"))
    articles.delete(0)
    assert len(articles.state()) == 2
    writer.store.finish_index(lambda what: None)
    assert [row[0] for row in articles.state()] == [1]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no key": ("id bigint, body text, embedding {vector}", {}, "has no primary key"),
    "not unique": (
        "id bigint PRIMARY KEY, body text, embedding {vector}",
        {"key": ("body",)},
        "has no unique index on",
    ),
    "no column": (
        "id bigint PRIMARY KEY, body text, embedding {vector}",
        {"vector": "vectors"},
        "has no column vectors",
    ),
    "not null": ("id bigint PRIMARY KEY, body text, embedding {vector} NOT NULL", {}, "must not be NULL"),
    "generated": (
        "id bigint PRIMARY KEY, body text, embedding {vector} GENERATED ALWAYS AS (NULL) STORED",
        {},
        "generated",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_written_is_refused(index: DatabaseAddress, kind: str) -> None:
    columns, options, message = REFUSED[kind]
    articles = Articles(index, columns.format(vector="vector" if index.dialect == "postgresql" else "BLOB"))
    with pytest.raises(SchemaError, match=message):
        articles.target(**options)


def test_what_is_no_table_is_refused(articles: Articles) -> None:
    execute(articles.address, f"CREATE VIEW seen AS SELECT * FROM {articles.name}")
    for name, message in (("seen", "is a view"), ("nowhere", "There is no table nowhere")):
        articles.name = name
        with pytest.raises(SchemaError, match=message):
            articles.target()


@pytest.mark.parametrize("text", ["nowhere", "body ||", "no_function(body)"])
def test_text_that_cannot_be_read_is_refused(articles: Articles, text: str) -> None:
    with (
        pytest.raises(SchemaError, match=r"The text of .*articles cannot be read by"),
        begun(articles.address, articles.target(text)),
    ):
        pass


def test_names_of_any_length_have_a_state_of_their_own(articles: Articles) -> None:
    articles.add("one")
    for number, name in enumerate(("ü" * 60 + "1", "ü" * 60 + "2")):
        # What one of them wrote is another program's for the other.
        with begun(articles.address, articles.target(name=name, replace=number > 0)) as writer:
            assert writer.fingerprints(articles.key(0)) == [None]
            assert writer.flush((articles.key(0), "one")).rows == 1
            assert writer.fingerprints(articles.key(0)) == ["f"], number
            writer.store.end_run(writer.run.number, "done", {})


def test_state_of_a_table_with_another_key_is_refused(articles: Articles) -> None:
    with begun(articles.address, articles.target()):
        pass
    execute(articles.address, f"DROP TABLE {articles.name}")
    vector = "vector" if articles.postgresql else "BLOB"
    another = Articles(articles.address, f"id bigint PRIMARY KEY, body text, embedding {vector}")
    with pytest.raises(SchemaError, match="was made for a key of the types"), begun(another.address, another.target()):
        pass


def test_few_rights_are_enough(database: DatabaseAddress, postgres: Server) -> None:
    """To write a column, and to make tables of our own."""
    execute(database, "CREATE EXTENSION vector")
    articles = Articles(database)
    articles.add("one")
    role = postgres.create_role(
        database,
        "USAGE ON SCHEMA shop",
        "SELECT, UPDATE (embedding) ON shop.articles",
        "CREATE ON SCHEMA public",
    )
    with begun(role, Articles(role, make=False).target()) as writer:
        assert writer.flush((("0", "en"), "one")).rows == 1
        writer.store.finish_index(lambda what: None)
        assert writer.fingerprints(("0", "en")) == ["f"]
        assert writer.store.altered(writer.run.number) == []
    other = postgres.create_role(database, "USAGE ON SCHEMA shop", "SELECT ON shop.articles")
    with pytest.raises(SchemaError, match=r"may not write shop\.articles\.embedding"):
        Articles(other, make=False).target()


def test_partitioned_table(database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION vector")
    articles = Articles(database, "id bigint PRIMARY KEY, body text, embedding vector) PARTITION BY HASH (id")
    for number in range(2):
        values = f"FOR VALUES WITH (MODULUS 2, REMAINDER {number})"
        execute(database, f"CREATE TABLE shop.part{number} PARTITION OF {articles.name} {values}")
    execute(database, f"INSERT INTO {articles.name} SELECT i, 'text ' || i FROM generate_series(0, 9) i")
    with begun(database, articles.target()) as writer:
        rows: list[tuple[Key, str]] = [((str(number),), f"text {number}") for number in range(10)]
        assert writer.flush(*rows).rows == 10
        assert writer.fingerprints(*(key for key, _ in rows)) == ["f"] * 10


def test_vectors_of_another_length_are_refused(database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION vector")
    articles = Articles(database, "id bigint PRIMARY KEY, body text, embedding vector(3)")
    with (
        pytest.raises(SchemaError, match="holds vectors of 3 dimensions; the model gives 8"),
        begun(articles.address, articles.target()),
    ):
        pass


# -- whole runs --------------------------------------------------------------------------------------------

TEXTS = mixed_texts(40, longest=60)
PARTS = ("stored", "unchanged", "reused", "superseded", "rejected")
ALSO = ("foreign", "deleted", "empty")


def reindexed(articles: Articles, target: ColumnTarget | None = None, **options: Any) -> dict[str, int]:
    """One run; the parts of its receipt that are not 0."""
    target = target or articles.target()
    source = ArticleSource(articles.address, target, page_rows=16, **options)
    receipt = reindex(articles.address, source, ReindexOptions(), target=target)
    without = "no index of shop.articles.embedding: one is made from 10,000 rows on"
    assert receipt.index == (without if articles.postgresql else "none")
    return numbers(receipt)


def numbers(receipt: Receipt) -> dict[str, int]:
    assert receipt.state == "done"
    assert receipt.read == sum(getattr(receipt, part) for part in PARTS)
    assert engine_processes() == []
    return {part: getattr(receipt, part) for part in (*PARTS, *ALSO) if getattr(receipt, part)}


@pytest.mark.usefixtures("loaded_once")
def test_a_column_is_brought_up_to_date(articles: Articles, oracle: Oracle) -> None:
    articles.add(*TEXTS, "  ", None)
    assert reindexed(articles) == {"stored": 40, "empty": 2}
    articles.check(oracle.vector)
    assert reindexed(articles) == {"unchanged": 40, "empty": 2}
    articles.set(3, "another text")
    assert reindexed(articles) == {"stored": 1, "unchanged": 39, "empty": 2}
    articles.check(oracle.vector)
    # Another program's vector is not taken for ours, and left alone.
    articles.set_vector(4, oracle.vector("theirs"))
    articles.delete(5)
    articles.set(6, None)
    articles.set(40, "has a text now")
    assert reindexed(articles) == {"stored": 1, "unchanged": 38, "foreign": 1, "deleted": 1, "empty": 2}
    np.testing.assert_allclose(articles.vector(4), oracle.vector("theirs"), rtol=1e-5)
    assert reindexed(articles, articles.target(replace=True)) == {"stored": 1, "unchanged": 38, "empty": 2}
    articles.check(oracle.vector)
    assert sorted(key for key, _, _ in articles.state()) == [n for n in range(41) if n not in (5, 6)]
    assert reindexed(articles) == {"unchanged": 39, "empty": 2}


@pytest.mark.usefixtures("loaded_once")
def test_rows_that_change_during_a_run_are_taken_again_by_it(
    articles: Articles, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushing, "MAX_WAIT_SECONDS", math.inf)  # on a slow machine rows were written before
    articles.add(*TEXTS)

    def meanwhile(page: int) -> None:
        if page == 1:
            articles.set(2, "changed meanwhile")
            articles.delete(3)
            articles.set_vector(4, oracle.vector("theirs"))
            articles.set(5, None)
            articles.add("new", first=100)

    # Of those that were read: gone is superseded, without a text is empty, with another program's vector is left alone.
    counts = reindexed(articles, between=meanwhile)
    assert counts == {"stored": 38, "unchanged": 1, "foreign": 1, "superseded": 1, "empty": 1}
    np.testing.assert_allclose(articles.vector(4), oracle.vector("theirs"), rtol=1e-5)
    assert reindexed(articles) == {"unchanged": 39, "foreign": 1, "empty": 1}
    assert reindexed(articles, articles.target(replace=True)) == {"stored": 1, "unchanged": 38, "empty": 1}
    articles.check(oracle.vector)
    assert len(articles.state()) == 39


@pytest.mark.usefixtures("loaded_once")
def test_a_row_that_changes_all_the_time_is_superseded_in_the_end(
    articles: Articles, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times it is taken; so a source that lags behind the table cannot keep a run going."""
    monkeypatch.setattr(flushing, "MAX_WAIT_SECONDS", math.inf)  # on a slow machine rows were written before
    articles.add(*TEXTS[:8])
    changes = itertools.count(1)

    def meanwhile(page: int) -> None:
        articles.set(3, f"changed {next(changes)} times")

    source = ArticleSource(articles.address, articles.target(), between=meanwhile)
    counts = numbers(reindex(articles.address, source, ReindexOptions(), target=articles.target()))
    assert counts == {"stored": 7, "superseded": 1}
    assert source.again == [articles.key(3)] * 2
    assert articles.rows()[3] == ("changed 3 times", None)
    assert reindexed(articles) == {"stored": 1, "unchanged": 7}
    articles.check(oracle.vector)


@pytest.mark.usefixtures("loaded_once")
def test_a_source_that_lags_behind_ends(database: DatabaseAddress, postgres: Server) -> None:
    execute(database, "CREATE EXTENSION vector")
    articles, replica = Articles(database), Articles(postgres.create_database())
    for table in (articles, replica):
        table.add(*TEXTS[:8])
    articles.set(3, "newer than the replica's")
    articles.set(4, None)

    source = ArticleSource(replica.address, articles.target(), elsewhere=True)
    counts = numbers(reindex(articles.address, source, ReindexOptions(), target=articles.target()))
    assert counts == {"stored": 6, "superseded": 2}
    assert [vector is None for _, vector in articles.rows().values()].count(True) == 2
    postgres.drop_database(replica.address)


@pytest.mark.usefixtures("loaded_once")
def test_refused_row_is_rejected_and_taken_once_it_fits(articles: Articles, oracle: Oracle) -> None:
    articles.add(*TEXTS[:12])
    if articles.postgresql:
        articles.add_trigger("IF NEW.id = 7 THEN RAISE EXCEPTION 'not seven'; END IF; RETURN NEW;")
    else:
        articles.add_trigger("SELECT RAISE(ABORT, 'not seven')", "BEFORE UPDATE", "WHEN NEW.id = 7")
    assert reindexed(articles) == {"stored": 11, "rejected": 1}
    with contextlib.closing(open_store(articles.address, "test", target=articles.target())) as store:
        assert [reject.reason for reject in store.rejects()] == ["database_refused"]
    assert reindexed(articles) == {"unchanged": 11, "rejected": 1}
    articles.drop_trigger()
    assert reindexed(articles) == {"unchanged": 11, "stored": 1}
    assert execute(articles.address, "SELECT count(*) FROM kdb_fast_rejects") == [(0,)]
    articles.check(oracle.vector)
