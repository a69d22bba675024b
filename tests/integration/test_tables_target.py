"""A table of vectors beside a table of texts, on both databases: what is written, what goes, and what is told."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest
from articles import Articles, ArticleSource, Live
from column_writer import DIMENSIONS, Writer, begun, vector_of
from servers import Oracle, Server, Vector, cosine, engine_processes, execute, mixed_texts

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.sqlite_vec import why_no_sqlite_vec
from kdb_fast.errors import SchemaError
from kdb_fast.indexing import flushing
from kdb_fast.indexing.reindex import reindex
from kdb_fast.receipt import Receipt
from kdb_fast.records import Key
from kdb_fast.settings import ReindexOptions
from kdb_fast.sources.table.input import TableInput
from kdb_fast.stores import open_store
from kdb_fast.stores.postgresql import foreign_key
from kdb_fast.stores.postgresql.table_store import PostgreSQLTableStore
from kdb_fast.stores.sqlite.table_store import SQLiteTableStore
from kdb_fast.tables.definition import Definition
from kdb_fast.tables.hidden_rows import HiddenRowsError
from kdb_fast.tables.relation import Column, Relation
from kdb_fast.tables.table_target import TableTarget
from kdb_fast.tables.table_view import drop_statement, view_name, view_statement


@pytest.fixture
def articles(index: DatabaseAddress) -> Articles:
    return Articles(index)


def can_load_extensions() -> bool:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        return not why_no_sqlite_vec(connection)


Open = Callable[[TableTarget], Writer]


@pytest.fixture
def begin(index: DatabaseAddress) -> Iterator[Open]:
    """Opens a store that is closed after the test, and begins a run."""
    with contextlib.ExitStack() as stack:
        yield lambda target: stack.enter_context(begun(index, target))


def vectors(address: DatabaseAddress) -> dict[Any, Vector]:
    """By the first column of the key."""
    return Articles(address, make=False).vectors_beside("article_vectors")


def check_vectors(address: DatabaseAddress, wanted: dict[Any, str]) -> None:
    """The table has a row for each of these texts, by id, and no other."""
    found = vectors(address)
    assert sorted(found) == sorted(wanted)
    for number, text in wanted.items():
        np.testing.assert_allclose(found[number], vector_of(text), rtol=1e-5)


def foreign_keys(articles: Articles) -> list[tuple[str, bool]]:
    """Of the table of vectors: the table that each refers to, and whether it holds for all rows."""
    if not articles.postgresql:
        rows = execute(
            articles.address, "SELECT DISTINCT \"table\", on_delete FROM pragma_foreign_key_list('article_vectors')"
        )
        return [(table, action == "CASCADE") for table, action in rows]
    statement = (
        "SELECT confrelid::regclass::text, convalidated AND confdeltype = 'c' FROM pg_constraint WHERE contype = 'f'"
    )
    return execute(articles.address, statement)


def test_what_another_program_has_written_is_not_ours(articles: Articles, begin: Open) -> None:
    articles.add("one", "two")
    writer = begin(articles.into())
    keys = [articles.key(n) for n in range(2)]
    writer.flush(*zip(keys, ["one", "two"], strict=True))
    value: Any = vector_of("theirs")
    value = value.tobytes() if not articles.postgresql else str(value.tolist())
    execute(articles.address, "UPDATE article_vectors SET embedding = %s WHERE id = 0", value)
    assert writer.fingerprints(*keys) == [None, "f"]
    assert writer.flush((keys[0], "one")).rows == 1
    assert writer.fingerprints(*keys) == ["f", "f"]


def test_row_of_another_version_is_known_by_its_hash(database: DatabaseAddress) -> None:
    """As after a dump, or by replication."""
    articles = Articles(database)
    articles.add("one", "two")
    with begun(database, articles.into()) as writer:
        keys = [articles.key(n) for n in range(2)]
        writer.flush((keys[0], "one"))
        writer.flush((keys[0], "another"), (keys[1], "two"))
        own = "SELECT count(*) FROM article_vectors WHERE kdb_fast_version = xmin"
        assert execute(database, own) == [(2,)]
        execute(database, "UPDATE article_vectors SET kdb_fast_at = kdb_fast_at")
        assert execute(database, own) == [(0,)]
        assert writer.fingerprints(*keys) == ["f", "f"]
        execute(database, "UPDATE article_vectors SET embedding = array_fill(0.5, ARRAY[8])::vector WHERE id = 0")
        assert writer.fingerprints(*keys) == [None, "f"]


def test_record_that_another_program_is_deleting_is_not_waited_for(database: DatabaseAddress) -> None:
    articles = Articles(database)
    articles.add("one", "two", "three")
    with begun(database, articles.into()) as writer:
        writer.flush((articles.key(0), "one"))
        writer.store.finish_index(lambda what: None)
        with psycopg.connect(database.conninfo) as other:
            other.execute("DELETE FROM shop.articles WHERE id = 1")
            result = writer.flush(*((articles.key(n), f"text {n}") for n in range(3)))
            assert (result.rows, result.superseded, result.rejected) == (2, ((0, 1),), ())
            # One that it deletes now waits for no other lock than those of this flush, which is over.
            other.execute("DELETE FROM shop.articles WHERE id = 2")
        check_vectors(database, {0: "text 0"})


def test_record_that_was_deleted_meanwhile_is_superseded(articles: Articles, begin: Open) -> None:
    articles.add("one", "two", "three", "four")
    writer = begin(articles.into())
    writer.flush((articles.key(0), "one"))
    assert writer.store.finish_index(lambda what: None).warnings == ()
    assert foreign_keys(articles) == [(articles.name, True)]
    articles.delete(2)
    result = writer.flush(*((articles.key(n), f"text {n}") for n in range(4)))
    assert (result.rows, result.superseded, result.rejected) == (3, ((0, 2),), ())
    check_vectors(articles.address, {n: f"text {n}" for n in (0, 1, 3)})
    if articles.postgresql:
        articles.delete(3)
        assert sorted(vectors(articles.address)) == [0, 1]


def test_rows_without_a_record_are_removed(articles: Articles, begin: Open) -> None:
    articles.add("one", "two", "three")
    writer = begin(articles.into(kind="view"))  # which nothing can refer to
    writer.flush(*((articles.key(n), f"text {n}") for n in range(3)))
    writer.store.finish_index(lambda what: None)
    assert foreign_keys(articles) == []
    articles.delete(1)
    assert sorted(vectors(articles.address)) == [0, 1, 2]
    live = Live(articles.target())
    assert writer.store.prune("", live) == 1
    assert writer.store.prune("", live) == 0
    assert sorted(vectors(articles.address)) == [0, 2]
    assert writer.store.prune("", Live(articles.target(), "t.id <> 2")) == 1
    assert sorted(vectors(articles.address)) == [0]


@pytest.mark.parametrize("condition", ["", "id <> 2"])
def test_first_load_leaves_no_row_without_a_record(articles: Articles, begin: Open, condition: str) -> None:
    articles.add("one", "two", "three", "four")
    writer = begin(articles.into())
    writer.flush(*((articles.key(n), f"text {n}") for n in range(4)))
    articles.delete(1)
    schema = "shop" if articles.postgresql else None
    definition = Definition(name="articles", schema=schema, table="articles", text=("body",), filter=condition)
    with contextlib.closing(TableInput(definition).open(articles.address)) as source:
        left = [0, 3] if condition else [0, 2, 3]
        assert writer.store.prune("", source.selection) == 4 - len(left)
        assert sorted(vectors(articles.address)) == left
        assert writer.store.prune("", source.selection) == 0
        if articles.postgresql:
            assert foreign_keys(articles) == [(articles.name, True)]
            # As the subscriber of a replication does: no foreign key removes the row of the vector.
            execute(articles.address, "SET session_replication_role = replica; DELETE FROM shop.articles WHERE id = 3")
            assert writer.store.prune("", source.selection) == 1
            assert sorted(vectors(articles.address)) == left[:-1]


KEYS = {
    "uuid": ("6f9619ff-8b86-d011-b42d-00c04fc964ff", "00000000-0000-0000-0000-000000000000"),
    "smallint": ("-7", "32767"),
    "integer": ("2147483647", "0"),
    "bigint": ("-9223372036854775808", "1"),
    "text": ("a, \t{b}", ""),
    "varchar(3)": ("ab\u00df", "ab"),
    "char(4)": ("ab", "abc"),
    "date": ("2026-02-01", "infinity"),
    "numeric": ("1.50", "NaN"),
    "timestamptz": ("2026-02-01 12:00:00.25+00", "-infinity"),
    "bytea": ("\\xdeadbeef", "\\x"),
    "mood": ("glad", "sad"),
    "even": ("4", "-2"),
}
"""Types, and two values of each."""


def test_keys_of_postgresql(database: DatabaseAddress) -> None:
    """Each type alone, which is copied as it is where it can be, and all of them in one key."""
    execute(database, "CREATE TYPE mood AS ENUM ('sad', 'glad')")
    execute(database, "CREATE DOMAIN even AS integer CHECK (VALUE % 2 = 0)")
    shapes = [{kind: values} for kind, values in KEYS.items()] + [KEYS]
    for number, shape in enumerate(shapes):
        columns = ", ".join(f"id{i} {kind}" for i, kind in enumerate(shape))
        names = ", ".join(f"id{i}" for i in range(len(shape)))
        articles = Articles(
            database, f"{columns}, body text, embedding vector, PRIMARY KEY ({names})", f"shop.articles{number}"
        )
        values: list[tuple[str, ...]] = [tuple(pair[i] for pair in shape.values()) for i in range(2)]
        for value in values:
            execute(
                database, f"INSERT INTO {articles.name} ({names}) VALUES ({', '.join(['%s'] * len(value))})", *value
            )
        keys: list[Key] = execute(database, f"SELECT {names.replace(',', '::text,')}::text FROM {articles.name}")
        with begun(database, articles.into(f"vectors{number}")) as writer:
            assert writer.flush((keys[0], "one"), (keys[1], "two")).rows == 2, shape
            assert writer.fingerprints(*keys) == ["f", "f"]
            assert writer.flush((keys[1], "another")).rows == 1
            assert writer.store.finish_index(lambda what: None).warnings == ()
            assert writer.store.prune("", Live(articles.target())) == 0
            assert writer.flush(deletes=[keys[1]]).deleted == 1
            assert writer.fingerprints(*keys) == ["f", "none"]
            writer.store.end_run(writer.run.number, "done", {})


def test_key_that_is_none_of_its_type_is_rejected(database: DatabaseAddress) -> None:
    articles = Articles(database, "id bigint PRIMARY KEY, body text, embedding vector")
    with begun(database, articles.into(kind="view")) as writer:
        result = writer.flush(
            (("1",), "one"), (("none",), "two"), (("9223372036854775808",), "three"), (("2",), "four")
        )
        assert (result.rows, result.superseded) == (2, ())
        assert [row[:3] for row in result.rejected] == [(0, 1, "database_refused"), (0, 2, "database_refused")]
        assert writer.fingerprints(("1",), ("none",), ("2",)) == ["f", "none", "f"]
        assert writer.flush(deletes=[("none",), ("2",)]).deleted == 1


SQLITE_KEYS = {
    "integer primary key": "id INTEGER PRIMARY KEY, body TEXT, embedding BLOB",
    "any type": "id UNIQUE, body TEXT, embedding BLOB",
    "integer that is no rowid": "id INTEGER, body TEXT, embedding BLOB, PRIMARY KEY (id)) WITHOUT ROWID --",
    "strict": "id ANY PRIMARY KEY, body TEXT, embedding BLOB",
    "any case": "id TEXT PRIMARY KEY COLLATE NOCASE, body TEXT, embedding BLOB",
}


@pytest.mark.parametrize("kind", SQLITE_KEYS)
def test_keys_of_sqlite(sqlite_database: DatabaseAddress, kind: str) -> None:
    """Types are kept apart; two keys are equal where they are for the table."""
    strict = "STRICT" if kind == "strict" else ""
    execute(sqlite_database, f"CREATE TABLE articles ({SQLITE_KEYS[kind]}) {strict}")
    articles = Articles(sqlite_database, make=False)
    several: dict[str, list[Key]] = {
        "any case": [("Abc",), ("xyz",)],
        "integer primary key": [(1,), (2,)],
        "strict": [(1,), ("1",), (b"1",), (1.5,)],
    }
    keys = several.get(kind, [(1,), ("one",), (b"1",), (1.5,)])
    for key in keys:
        execute(sqlite_database, "INSERT INTO articles (id, body) VALUES (%s, 'text')", *key)
    target = articles.into(key=("id",))
    with begun(articles.address, target) as writer:
        assert writer.flush(*((key, repr(key)) for key in keys)).rows == len(keys)
        assert writer.fingerprints(*keys) == ["f"] * len(keys)
        if kind == "any case":
            assert writer.fingerprints(("aBC",)) == ["f"]
            assert writer.flush((("ABC",), "another")).rows == 1
        assert writer.store.count() == len(keys)
        assert writer.store.prune("", Live(articles.target(key=("id",)))) == 0
        assert writer.flush(deletes=keys[1:]).deleted == len(keys) - 1
    assert foreign_keys(articles) == [("articles", True)]


def test_names_of_the_user(index: DatabaseAddress) -> None:
    """Names that must be quoted, and those of our own that are no column's of the table."""
    postgresql = index.dialect == "postgresql"
    name = 'shop."Big ""%d"" Table"' if postgresql else '"Big ""%d"" Table"'
    into = 'shop."100% {x} ""vectors"" "' if postgresql else '"100% {x} ""vectors"" "'
    kind = "vector" if postgresql else "BLOB"
    columns = f'"a ""key"" %d {{v}}" bigint PRIMARY KEY, slot text, body text, embedding {kind}'
    articles = Articles(index, columns, name)
    execute(index, f"INSERT INTO {name} VALUES (1, 'one', 'two', NULL)")
    target = articles.into(into, vector="{v} %", content=True)
    key = articles.key(1)[:1]
    with begun(index, target) as writer:
        assert writer.flush((key, "50% {one}")).rows == 1
        assert writer.flush((key, "60% {two}")).rows == 1
        assert writer.fingerprints(key) == ["f"]
        assert writer.store.finish_index(lambda what: None).warnings == ()
        assert writer.store.prune("", Live(articles.target())) == 0
        execute(index, f"DELETE FROM {name}")
        writer.store.prune("", Live(articles.target()))
        assert writer.store.count() == 0


def test_names_that_two_columns_would_have_are_refused(index: DatabaseAddress) -> None:
    postgresql = index.dialect == "postgresql"
    kind = "vector" if postgresql else "BLOB"
    articles = Articles(index, f"content bigint PRIMARY KEY, body text, embedding {kind}")
    with pytest.raises(SchemaError, match="cannot have a key in a column content"):
        articles.into()
    plain = Articles(index, f"id bigint PRIMARY KEY, body text, embedding {kind}", "plain")
    for vector in ("kdb_fast_hash", "id", "ID"):
        with pytest.raises(SchemaError, match=f"cannot have vectors in a column {vector}"):
            plain.into(vector=vector)


OTHER_TABLES = {
    "another program's": ("id bigint PRIMARY KEY, embedding {vector}", "is another program's table"),
    "another key": (
        "number bigint PRIMARY KEY, embedding {vector}, kdb_fast_hash {bytes}",
        "was made for something else: id is missing",
    ),
}


@pytest.mark.parametrize("kind", OTHER_TABLES)
def test_table_that_is_something_else_is_refused(articles: Articles, kind: str) -> None:
    columns, message = OTHER_TABLES[kind]
    types = {"vector": "vector(8)", "bytes": "bytea"} if articles.postgresql else {"vector": "BLOB", "bytes": "BLOB"}
    execute(articles.address, f"CREATE TABLE article_vectors ({columns.format(**types)})")
    with pytest.raises(SchemaError, match=message), begun(articles.address, articles.into()):
        pass


def test_view_in_the_place_of_the_table_is_refused(articles: Articles) -> None:
    execute(articles.address, "CREATE VIEW article_vectors AS SELECT 1 AS id")
    with pytest.raises(SchemaError, match="is a view; expected a table"), begun(articles.address, articles.into()):
        pass


def test_vectors_of_another_length_are_refused(articles: Articles, begin: Open) -> None:
    articles.add("one")
    writer = begin(articles.into())
    writer.flush((articles.key(0), "one"))
    with (
        contextlib.closing(open_store(articles.address, "test", target=articles.into())) as store,
        pytest.raises(SchemaError, match=rf"{DIMENSIONS}\D.* the model gives 5"),
    ):
        store.prepare(5)


def test_table_that_cannot_be_written_is_refused(articles: Articles, begin: Open) -> None:
    writer = begin(articles.into())
    writer.store.end_run(writer.run.number, "done", {})
    for change, message in (
        ("ADD COLUMN more integer DEFAULT 0 NOT NULL", None),
        ("RENAME COLUMN kdb_fast_seal TO seal", "kdb_fast_seal is missing"),
    ):
        execute(articles.address, f"ALTER TABLE article_vectors {change}")
        refused = pytest.raises(SchemaError, match=message) if message else contextlib.nullcontext()
        with contextlib.closing(open_store(articles.address, "test", target=articles.into())) as store, refused:
            store.prepare(DIMENSIONS)


def test_few_rights_are_enough(database: DatabaseAddress, postgres: Server) -> None:
    """To read the table, and to make tables of our own; without REFERENCES there is no foreign key."""
    execute(database, "CREATE EXTENSION vector")
    articles = Articles(database)
    articles.add("one", "two")
    role = postgres.create_role(
        database, "USAGE ON SCHEMA shop", "SELECT, UPDATE (embedding) ON shop.articles", "CREATE ON SCHEMA public"
    )
    own = Articles(role, make=False)
    with contextlib.closing(open_store(role, "test", target=own.into())) as store:
        (note,) = store.prepare(DIMENSIONS)
        assert "GRANT REFERENCES ON shop.articles TO" in note
        writer = Writer(store, store.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=0))
        assert writer.flush((("0", "en"), "one"), (("1", "en"), "two")).rows == 2
        assert store.finish_index(lambda what: None).warnings == ()
        assert foreign_keys(articles) == []
        articles.delete(1)
        assert store.prune("", Live(own.target())) == 1
        execute(database, f"GRANT REFERENCES ON shop.articles TO {execute(role, 'SELECT current_user')[0][0]}")
        assert store.prepare(DIMENSIONS) == ()
        store.finish_index(lambda what: None)
        assert foreign_keys(articles) == [("shop.articles", True)]
        store.end_run(writer.run.number, "done", {})
    ours = ", ".join(f"kdb_fast_{name}" for name in ("runs", "rejects", "state", "migrations"))
    other = postgres.create_role(
        database, "USAGE ON SCHEMA shop", "SELECT, UPDATE (embedding) ON shop.articles", f"ALL ON {ours}"
    )
    for into, message in (("article_vectors", "lacks rights on public.article_vectors"), ("shop.v", "may not make")):
        with (
            contextlib.closing(open_store(other, "test", target=Articles(other, make=False).into(into))) as store,
            pytest.raises(SchemaError, match=message),
        ):
            store.prepare(DIMENSIONS)


def test_hidden_records_are_not_taken_for_deleted(database: DatabaseAddress, postgres: Server) -> None:
    execute(database, "CREATE EXTENSION vector")
    articles = Articles(database)
    articles.add("one", "two")
    role = postgres.create_role(
        database, "USAGE ON SCHEMA shop", "SELECT, UPDATE (embedding) ON shop.articles", "CREATE ON SCHEMA public"
    )
    own = Articles(role, make=False)
    with begun(role, own.into()) as writer:
        writer.flush((("0", "en"), "one"), (("1", "en"), "two"))
        execute(database, "ALTER TABLE shop.articles ENABLE ROW LEVEL SECURITY")
        with pytest.raises(HiddenRowsError, match="row-level security"):
            writer.store.prune("", Live(own.target()))
        assert writer.store.count() == 2


def test_key_is_added_while_others_write(database: DatabaseAddress) -> None:
    """Nobody waits for it; the next run adds it."""
    articles = Articles(database)
    articles.add("one")
    with begun(database, articles.into()) as writer, psycopg.connect(database.conninfo) as other:
        writer.flush((articles.key(0), "one"))
        other.execute("UPDATE shop.articles SET body = 'another'")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(foreign_key, "PATIENCE_MS", 10)
            (warning,) = writer.store.finish_index(lambda what: None).warnings
        assert "the next run adds it" in warning
        other.rollback()
        assert writer.store.finish_index(lambda what: None).warnings == ()
        assert foreign_keys(articles) == [("shop.articles", True)]


def test_half_made_foreign_key_is_finished(database: DatabaseAddress) -> None:
    articles = Articles(database)
    articles.add("one", "two")
    with begun(database, articles.into()) as writer:
        writer.flush((articles.key(0), "one"), (articles.key(1), "two"))
        articles.delete(1)
        execute(
            database,
            "ALTER TABLE article_vectors ADD FOREIGN KEY (id, lang) REFERENCES shop.articles "
            "ON DELETE CASCADE NOT VALID",
        )
        assert writer.store.finish_index(lambda what: None).warnings == ()
        assert foreign_keys(articles) == [("shop.articles", True)]
        assert sorted(vectors(database)) == [0]


def test_partitioned_table_is_referred_to(database: DatabaseAddress) -> None:
    articles = Articles(database, "id bigint PRIMARY KEY, body text, embedding vector) PARTITION BY HASH (id")
    for number in range(2):
        values = f"FOR VALUES WITH (MODULUS 2, REMAINDER {number})"
        execute(database, f"CREATE TABLE shop.part{number} PARTITION OF {articles.name} {values}")
    execute(database, f"INSERT INTO {articles.name} SELECT i, 'text ' || i FROM generate_series(0, 9) i")
    with begun(database, articles.into(kind="partitioned table")) as writer:
        assert writer.flush(*(((str(n),), f"text {n}") for n in range(10))).rows == 10
        assert writer.store.finish_index(lambda what: None).warnings == ()
        articles.delete(3)
        assert sorted(vectors(database)) == [n for n in range(10) if n != 3]


def test_trigger_of_the_table_is_named(articles: Articles, begin: Open) -> None:
    articles.add("one", "two")
    writer = begin(articles.into())
    triggers = Articles(articles.address, name="article_vectors", make=False)
    if articles.postgresql:
        triggers.add_trigger("NEW.embedding := NEW.embedding + NEW.embedding; RETURN NEW;", "BEFORE INSERT OR UPDATE")
    else:
        change = "UPDATE article_vectors SET embedding = zeroblob(32) WHERE id = NEW.id"
        triggers.add_trigger(change, "AFTER INSERT")
    assert writer.flush((articles.key(0), "one")).rows == 1
    assert writer.fingerprints(articles.key(0)) == ["f" if articles.postgresql else None]
    (warning,) = writer.store.altered(writer.run.number)
    assert warning.startswith("1 row of ")
    assert "trigger meddle" in warning


@pytest.mark.parametrize("content", [False, True])
def test_text_for_keyword_search(database: DatabaseAddress, content: bool) -> None:
    articles = Articles(database)
    articles.add("riding bicycles", "two")
    with begun(database, articles.into(keyword="english", content=content)) as writer:
        assert writer.flush((articles.key(0), "riding bicycles"), (articles.key(1), "two")).rows == 2
        assert writer.flush((articles.key(1), "a bicycle")).rows == 1
        assert writer.fingerprints(articles.key(0), articles.key(1)) == ["f", "f"]
        found = execute(database, "SELECT id FROM article_vectors WHERE tsv @@ to_tsquery('english', 'bicycle')")
        assert sorted(found) == [(0,), (1,)]


def test_view_with_what_was_read(articles: Articles, begin: Open) -> None:
    articles.add("one", "two")
    target = articles.into()
    writer = begin(target)
    writer.flush((articles.key(0), "one"))
    columns = tuple(Column(name, "text") for name in ("id", "lang", "body", "embedding"))
    relation = Relation(articles.target().schema, articles.target().table, "table", columns)
    execute(articles.address, view_statement(target, relation))
    (row,) = execute(articles.address, f"SELECT * FROM {view_name(target)}")
    assert row[:4] == (0, "en", "one", None)
    assert row[4] is not None
    execute(articles.address, drop_statement(target))


@pytest.mark.usefixtures("loaded_once")
def test_unchanged_rows_are_known_without_their_texts(articles: Articles, oracle: Oracle) -> None:
    """The database itself compares; what another program has written to the vectors it tells, too."""
    articles.add(*TEXTS, "100% {text}")
    assert reindexed(articles) == {"stored": 41}
    store = PostgreSQLTableStore if articles.postgresql else SQLiteTableStore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "lookup", None)
        assert reindexed(articles) == {"unchanged": 41}
    value: Any = oracle.vector("theirs")
    value = value.tobytes() if not articles.postgresql else str(value.tolist())
    execute(articles.address, "UPDATE article_vectors SET embedding = %s WHERE id = 7", value)
    articles.set(8, "another")
    assert reindexed(articles) == {"stored": 2, "unchanged": 39}
    check(articles, oracle.vector)


# -- tables of sqlite-vec ----------------------------------------------------------------------------------


def test_what_no_table_of_sqlite_vec_can_be_is_refused(sqlite_database: DatabaseAddress) -> None:
    articles = Articles(sqlite_database)
    with pytest.raises(
        SchemaError, match=r"sqlite-vec: .*sqlite|INTEGER PRIMARY KEY; the key is id INTEGER, lang TEXT"
    ):
        articles.into(vec0=True)


@pytest.mark.skipif(not can_load_extensions(), reason="this Python's sqlite3 loads no extension, or no sqlite-vec")
def test_table_of_sqlite_vec(sqlite_database: DatabaseAddress) -> None:
    articles = Articles(sqlite_database, "id INTEGER PRIMARY KEY, body TEXT, embedding BLOB")
    for number in range(3):
        execute(sqlite_database, "INSERT INTO articles (id, body) VALUES (%s, 'text')", number)
    with begun(sqlite_database, articles.into(vec0=True)) as writer:
        assert isinstance(writer.store, SQLiteTableStore)
        run = writer.store._connection.execute
        assert writer.flush(*(((n,), f"text {n}") for n in range(3))).rows == 3
        assert writer.flush(((1,), "another"), ((7,), "gone")).superseded == ((0, 1),)
        assert writer.fingerprints((0,), (1,), (7,)) == ["f", "f", "none"]
        found = dict(run("SELECT rowid, embedding FROM article_vectors").fetchall())
        np.testing.assert_array_equal(np.frombuffer(found[1], "<f4"), vector_of("another"))
        nearest = "SELECT rowid FROM article_vectors WHERE embedding MATCH ? AND k = 1"
        assert run(nearest, (vector_of("another").tobytes(),)).fetchall() == [(1,)]
        run("UPDATE article_vectors SET embedding = ? WHERE rowid = 0", (vector_of("theirs").tobytes(),))
        run("DELETE FROM article_vectors WHERE rowid = 2")
        assert writer.fingerprints((0,), (1,), (2,)) == [None, "f", None]
        assert writer.flush(((0,), "text 0"), ((2,), "text 2")).rows == 2
        assert writer.fingerprints((0,), (1,), (2,)) == ["f", "f", "f"]
        execute(sqlite_database, "DELETE FROM articles WHERE id = 2")
        assert writer.store.prune("", Live(articles.target())) == 1
        assert [row[0] for row in run("SELECT rowid FROM article_vectors")] == [0, 1]


# -- whole runs --------------------------------------------------------------------------------------------

TEXTS = mixed_texts(40, longest=60)
PARTS = ("stored", "unchanged", "reused", "superseded", "rejected")


def reindexed(articles: Articles, target: TableTarget | None = None, **options: Any) -> dict[str, int]:
    """One run; the parts of its receipt that are not 0."""
    options = {"complete": True, **options}
    source = ArticleSource(articles.address, articles.target(), page_rows=16, **options)
    return numbers(reindex(articles.address, source, ReindexOptions(), target=target or articles.into()))


def numbers(receipt: Receipt) -> dict[str, int]:
    assert receipt.state == "done"
    assert receipt.read == sum(getattr(receipt, part) for part in PARTS)
    assert engine_processes() == []
    return {part: getattr(receipt, part) for part in (*PARTS, "deleted", "empty") if getattr(receipt, part)}


def check(articles: Articles, vector: Callable[[str], Vector]) -> None:
    """Each article with a text has its vector in the table, and nothing else is there."""
    found = vectors(articles.address)
    texts = {number: text for number, (text, _) in articles.rows().items() if text is not None and text.strip()}
    assert sorted(found) == sorted(texts)
    for number, text in texts.items():
        assert cosine(found[number], vector(text)) >= 0.99999, number


@pytest.mark.usefixtures("loaded_once")
def test_a_table_is_brought_up_to_date(articles: Articles, oracle: Oracle) -> None:
    articles.add(*TEXTS, "  ", None)
    assert reindexed(articles) == {"stored": 40, "empty": 2}
    check(articles, oracle.vector)
    assert foreign_keys(articles) == [(articles.name, True)]
    assert reindexed(articles) == {"unchanged": 40, "empty": 2}
    articles.set(3, "another text")
    articles.delete(5)
    articles.set(6, None)
    articles.set(40, "has a text now")
    deleted = 1 if articles.postgresql else 2  # the foreign key has removed the other
    assert reindexed(articles) == {"stored": 2, "unchanged": 37, "deleted": deleted, "empty": 2}
    check(articles, oracle.vector)
    assert reindexed(articles) == {"unchanged": 39, "empty": 2}


@pytest.mark.usefixtures("loaded_once")
def test_records_that_change_during_a_run(articles: Articles, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushing, "MAX_WAIT_SECONDS", math.inf)  # on a slow machine rows were written before
    articles.add(*TEXTS)

    def meanwhile(page: int) -> None:
        if page == 1:
            articles.set(2, "changed meanwhile")
            articles.delete(3)
            articles.add("new", first=100)

    # Rows of a first load are not checked one by one: what was deleted goes in the end.
    first = reindexed(articles, between=meanwhile)
    assert first == ({"stored": 41, "deleted": 1} if articles.postgresql else {"stored": 40, "superseded": 1})
    assert sorted(vectors(articles.address)) == [n for n in range(40) if n != 3] + [100]
    assert reindexed(articles) == {"stored": 1, "unchanged": 39}
    check(articles, oracle.vector)
