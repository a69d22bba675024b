"""A vector column of a table in use: locks, triggers, growth, and what its state survives."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest
from articles import Articles, ArticleSource
from column_writer import DIMENSIONS, Writer, begun, vector_of
from servers import execute

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.errors import SchemaError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.records import MAX_CONTENT_BYTES
from kdb_fast.settings import ReindexOptions
from kdb_fast.stores.flush_parts import LOCK_SECONDS
from kdb_fast.stores.postgresql import column_find as pg_find
from kdb_fast.stores.postgresql.column_store import PostgreSQLColumnStore
from kdb_fast.stores.postgresql.session import PgSession
from kdb_fast.stores.sqlite import column_find as sqlite_find
from kdb_fast.stores.sqlite.column_store import SQLiteColumnStore


@pytest.fixture
def articles(index: DatabaseAddress) -> Articles:
    return Articles(index)


@pytest.fixture
def pg_articles(database: DatabaseAddress) -> Articles:
    execute(database, "CREATE EXTENSION vector")
    return Articles(database)


# -- an application writes the same rows -------------------------------------------------------------------


def fill(articles: Articles, rows: int) -> None:
    """Rows 0 to ``rows`` - 1 with the texts ``text 0`` and so on."""
    if articles.postgresql:
        texts = "SELECT i, 'en', 'text ' || i FROM generate_series(0, %s) i"
    else:
        numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < %s)"
        texts = f"{numbers} SELECT i, 'en', 'text ' || i FROM n"
    execute(articles.address, f"INSERT INTO {articles.name} (id, lang, body) {texts}", rows - 1)


class Application:
    """Updates rows in the order of falling keys, several in each transaction, until told to stop."""

    def __init__(self, articles: Articles, rows: int) -> None:
        self._articles, self._rows = articles, rows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.updates = 0
        self.errors: list[BaseException] = []

    def _work(self) -> None:
        try:
            with self._connected() as (execute, commit):
                while not self._stop.is_set():
                    for row in range(self._rows - 1, -1, -7):
                        execute(f"UPDATE {self._articles.name} SET lang = lang WHERE id = {row}")
                        self.updates += 1
                        if row % 4 == 0:
                            commit()
                    commit()
        except BaseException as error:
            self.errors.append(error)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[tuple[Any, Any]]:
        if self._articles.postgresql:
            with psycopg.connect(self._articles.address.conninfo) as connection:
                yield lambda statement: connection.execute(statement.encode()), connection.commit
        else:
            with contextlib.closing(sqlite3.connect(self._articles.address.conninfo, timeout=20)) as file:
                yield file.execute, file.commit

    def __enter__(self) -> Application:
        self._thread.start()
        return self

    def __exit__(self, *what: object) -> None:
        self._stop.set()
        self._thread.join(30)


def flush_all(writer: Writer, articles: Articles, numbers: Sequence[int]) -> list[int]:
    """The rows that were not written."""
    result = writer.flush(*((articles.key(n), f"text {n}") for n in numbers))
    assert result.rejected == ()
    assert result.rows + len(result.superseded) == len(numbers)
    return [numbers[row] for _, row in result.superseded]


def test_application_that_updates_the_same_rows_goes_on(articles: Articles) -> None:
    """Neither has an error (a deadlock would be one), and in the end all rows are written."""
    rows = 600
    fill(articles, rows)
    with begun(articles.address, articles.target()) as writer, Application(articles, rows) as application:
        left = list(range(rows))
        deadline = time.monotonic() + 60
        while left and time.monotonic() < deadline:
            left = flush_all(writer, articles, left)
        assert left == []
    assert application.errors == []
    assert application.updates > 0
    assert len(articles.state()) == rows


def test_application_waits_for_a_part_only(articles: Articles) -> None:
    """A flush whose rows take long is written in parts."""
    rows = 300
    fill(articles, rows)
    if articles.postgresql:
        articles.add_trigger("PERFORM pg_sleep(0.004); RETURN NEW;")
    with begun(articles.address, articles.target()) as writer:
        store = writer.store
        assert isinstance(store, PostgreSQLColumnStore | SQLiteColumnStore)
        assert flush_all(writer, articles, range(rows)) == []
        assert store.longest_lock > 0
        if articles.postgresql:
            # 4 ms a row: 1.2 s in one transaction.
            assert len({at for (at,) in execute(articles.address, "SELECT at FROM kdb_fast_articles_state")}) > 3
            assert store._part.rows < LOCK_SECONDS / 0.004
    assert len(articles.state()) == rows


def test_a_part_is_written_once_more_after_its_flush_failed(pg_articles: Articles) -> None:
    """A row that is refused in a later part: all others are written, and none twice to another end."""
    rows = 200
    fill(pg_articles, rows)
    pg_articles.add_trigger("IF NEW.id = 190 THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW;")
    with begun(pg_articles.address, pg_articles.target()) as writer:
        result = writer.flush(*((pg_articles.key(n), f"text {n}") for n in range(rows)))
        assert (result.rows, result.superseded) == (rows - 1, ())
        assert [row[:3] for row in result.rejected] == [(0, 190, "database_refused")]
    assert len(pg_articles.state()) == rows - 1


# -- what updates set off ----------------------------------------------------------------------------------


def forecast(articles: Articles, **options: Any) -> tuple[str, ...]:
    with begun(articles.address, articles.target(**options)) as writer:
        found = writer.store.forecast(writer.run)
        writer.store.end_run(writer.run.number, "done", {})
    return found


def test_triggers_are_named_before_anything_is_done(articles: Articles) -> None:
    articles.add("one", "two", "three")
    assert forecast(articles) == ()
    articles.add_trigger("RETURN NEW;" if articles.postgresql else "SELECT 1", "AFTER UPDATE OF body")
    assert forecast(articles) == ()
    articles.drop_trigger()
    if articles.postgresql:
        execute(articles.address, "DROP FUNCTION meddle")
    articles.add_trigger("RETURN NEW;" if articles.postgresql else "SELECT 1", "AFTER UPDATE")
    (note,) = forecast(articles)
    assert note.startswith(f"Triggers of {articles.name} fire as vectors are written, up to 3 times: meddle")
    assert forecast(articles) == ()  # that is known
    with begun(articles.address, articles.target()) as writer:
        writer.flush(*((articles.key(n), text) for n, text in enumerate(("one", "two", "three"))))
        assert writer.store.forecast(writer.run) == ()  # nothing is left to be written
        writer.store.end_run(writer.run.number, "done", {})
    articles.drop_trigger()
    if articles.postgresql:
        execute(articles.address, "DROP FUNCTION meddle")
    # All rows have vectors; which texts have changed since, the run will see.
    articles.add_trigger("RETURN NEW;" if articles.postgresql else "SELECT 1", "AFTER UPDATE OF embedding")
    execute(articles.address, "DELETE FROM kdb_fast_state WHERE key LIKE 'triggers/%'")
    (note,) = forecast(articles)
    assert "once for each row that has changed: meddle" in note
    articles.drop_trigger()
    articles.add("four", first=9)
    if articles.postgresql:
        execute(articles.address, "DROP FUNCTION meddle")
    articles.add_trigger("RETURN NEW;" if articles.postgresql else "SELECT 1", "BEFORE UPDATE")
    assert len(forecast(articles)) == articles.postgresql  # before each row: another one; SQLite's has the same name


def test_rule_of_the_table_is_refused(pg_articles: Articles) -> None:
    execute(pg_articles.address, f"CREATE RULE quiet AS ON UPDATE TO {pg_articles.name} DO ALSO NOTIFY articles")
    with pytest.raises(SchemaError, match=r"rule quiet of shop\.articles rewrites its updates") as caught:
        forecast(pg_articles)
    assert 'ALTER TABLE "shop"."articles" DISABLE RULE "quiet"' in caught.value.remedy
    execute(pg_articles.address, f"ALTER TABLE {pg_articles.name} DISABLE RULE quiet")
    assert forecast(pg_articles) == ()


def test_published_table_without_a_replica_identity_is_refused(database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION vector")
    articles = Articles(database, "id bigint NOT NULL UNIQUE, body text, embedding vector")
    assert forecast(articles) == ()
    execute(database, f"CREATE PUBLICATION news FOR TABLE {articles.name}")
    with pytest.raises(SchemaError, match=r"publication news publishes updates of .*articles.*no replica identity"):
        forecast(articles)
    execute(database, f"ALTER TABLE {articles.name} REPLICA IDENTITY USING INDEX articles_id_key")
    assert forecast(articles) == ()
    execute(database, f"INSERT INTO {articles.name} VALUES (1, 'one')")
    with begun(database, articles.target()) as writer:
        assert writer.flush((("1",), "one")).rows == 1


def test_growth_of_the_table_is_said(pg_articles: Articles) -> None:
    insert = f"INSERT INTO {pg_articles.name} SELECT i, 'en', repeat('x', 1900) FROM generate_series(0, 9999) i"
    execute(pg_articles.address, insert)
    execute(pg_articles.address, f"ANALYZE {pg_articles.name}")
    (note,) = forecast(pg_articles)
    assert note.startswith("An UPDATE writes a new version of the whole row: shop.articles (2")
    assert "--vacuum" in note
    assert "--into" in note  # 1,900 bytes are written for the sake of a vector of 8 numbers


def test_vacuum_frees_what_is_left_behind(pg_articles: Articles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdb_fast.stores.postgresql.column_store.VACUUM_ROWS", 100)
    fill(pg_articles, 300)
    with begun(pg_articles.address, pg_articles.target(vacuum=True)) as writer:
        for start in range(0, 300, 100):
            assert flush_all(writer, pg_articles, range(start, start + 100)) == []
    vacuumed = "SELECT vacuum_count FROM pg_stat_user_tables WHERE relname = 'articles'"
    assert execute(pg_articles.address, vacuumed) == [(3,)]


def test_vacuum_without_the_right_is_refused(pg_articles: Articles, postgres: Any) -> None:
    role = postgres.create_role(
        pg_articles.address, "USAGE ON SCHEMA shop", "SELECT, UPDATE ON shop.articles", "CREATE ON SCHEMA public"
    )
    with pytest.raises(SchemaError, match="may not vacuum"):
        forecast(Articles(role, make=False), vacuum=True)


# -- what the state survives -------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["vacuum full", "rename", "restore"])
def test_vectors_are_known_again_after(articles: Articles, event: str) -> None:
    """By key and content: neither the table's name nor its number, nor the version of a row, is noted."""
    articles.add("one", "two")
    keys = [articles.key(n) for n in range(2)]
    with begun(articles.address, articles.target()) as writer:
        assert writer.flush(*zip(keys, ["one", "two"], strict=True)).rows == 2
        writer.store.end_run(writer.run.number, "done", {})
    if event == "vacuum full":
        execute(articles.address, f"VACUUM FULL {articles.name}" if articles.postgresql else "VACUUM")
    elif event == "rename":
        execute(articles.address, f"ALTER TABLE {articles.name} RENAME TO posts")
        articles = Articles(articles.address, name="shop.posts" if articles.postgresql else "posts", make=False)
    else:  # a dump is the rows of both tables, in new tables
        for table in (articles.name, "kdb_fast_articles_state"):
            execute(articles.address, f"CREATE TABLE copied AS SELECT * FROM {table}")
            execute(articles.address, f"DELETE FROM {table}")
            execute(articles.address, f"INSERT INTO {table} SELECT * FROM copied ORDER BY 1 DESC")
            execute(articles.address, "DROP TABLE copied")
    with begun(articles.address, articles.target()) as writer:
        assert writer.fingerprints(*keys) == ["f", "f"]


# -- nothing has changed ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("into", [False, True])
def test_rows_that_need_nothing_are_only_counted(articles: Articles, into: bool) -> None:
    """By the database itself: neither their texts nor their keys are records. Of any target, in the same way."""
    articles.add(*(f"text {number}" for number in range(30)), "z" * (MAX_CONTENT_BYTES + 1), None)

    def run(**options: Any) -> tuple[int, int, int]:
        source = ArticleSource(articles.address, articles.target(), page_rows=8)
        target = articles.into() if into else articles.target()
        receipt = reindex(articles.address, source, ReindexOptions(**options), target=target)
        assert receipt.read == 31
        return receipt.written, receipt.unchanged, source.sent

    assert run() == (31, 0, 31)
    assert run() == (0, 31, 0)
    articles.set(3, "changed")
    assert run() == (1, 30, 1)
    if articles.postgresql:  # another version of each row, and the same texts and vectors
        table = "article_vectors" if into else articles.name
        execute(articles.address, f"UPDATE {table} SET embedding = embedding")
    assert run() == (0, 31, 0)
    assert run(force=True) == (31, 0, 31)


# -- columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vector", "halfvec"])
def test_missing_column_is_created(database: DatabaseAddress, kind: str) -> None:
    execute(database, "CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    articles = Articles(database, "id bigint PRIMARY KEY, body text")
    execute(database, f"INSERT INTO {articles.name} VALUES (1, 'one')")
    name = 'v "100%"'
    with contextlib.closing(PgSession(database, "test")) as session, session.transaction() as cursor:
        pg_find.create_column(cursor, session.target, articles.name, name, DIMENSIONS, kind)
    target = articles.target(vector=name)
    assert target.vector.dimensions == DIMENSIONS
    assert target.vector.type == f"extensions.{kind}({DIMENSIONS})"
    with begun(database, target) as writer:
        assert writer.flush((("1",), "one")).rows == 1
        assert writer.fingerprints(("1",)) == ["f"]


def test_column_that_cannot_be_created_is_refused(pg_articles: Articles, postgres: Any) -> None:
    role = postgres.create_role(pg_articles.address, "USAGE ON SCHEMA shop", "SELECT ON shop.articles")
    session = PgSession(role, "test")
    with contextlib.closing(session), session.transaction() as cursor, pytest.raises(SchemaError) as caught:
        pg_find.create_column(cursor, session.target, "shop.articles", "v", 3)
    assert 'ALTER TABLE "shop"."articles" ADD COLUMN "v" "public".vector(3)' in caught.value.remedy


FORMS: dict[str, tuple[str, str | bytes | None, str]] = {
    "blob": ("BLOB", None, "blob"),
    "no type": ("", None, "blob"),
    "text": ("TEXT", None, "json"),
    "json": ("JSON", None, "json"),
    "blob in text": ("TEXT", b"\0\0\0\0", "blob"),
    "json in blob": ("BLOB", "[0.5]", "json"),
}


@pytest.mark.parametrize("case", FORMS)
def test_form_of_vectors_on_sqlite_is_that_of_those_there(sqlite_database: DatabaseAddress, case: str) -> None:
    declared, value, form = FORMS[case]
    articles = Articles(sqlite_database, f"id INTEGER PRIMARY KEY, body TEXT, embedding {declared}")
    execute(sqlite_database, "INSERT INTO articles VALUES (1, 'one', %s), (2, 'two', NULL)", value)
    assert articles.target().vector.type == form


@pytest.mark.parametrize("form", ["blob", "json"])
def test_missing_column_is_created_on_sqlite(sqlite_database: DatabaseAddress, form: str) -> None:
    articles = Articles(sqlite_database, "id INTEGER PRIMARY KEY, body TEXT")
    execute(sqlite_database, "INSERT INTO articles VALUES (1, 'one')")
    with contextlib.closing(connect_sqlite(sqlite_database)) as connection:
        sqlite_find.create_column(connection, "articles", "v 100%", form)
        with pytest.raises(SchemaError, match="cannot be added to articles: duplicate column"):
            sqlite_find.create_column(connection, "articles", "V 100%", form)
    target = articles.target(vector="v 100%")
    assert target.vector.type == form
    with begun(sqlite_database, target) as writer:
        assert writer.flush(((1,), "one")).rows == 1


def test_vectors_of_another_length_are_left_alone(pg_articles: Articles) -> None:
    """A column without a length may hold any."""
    pg_articles.add("one", "two")
    pg_articles.set_vector(0, vector_of("theirs")[:3])
    with begun(pg_articles.address, pg_articles.target()) as writer:
        result = writer.flush((pg_articles.key(0), "one"), (pg_articles.key(1), "two"))
        assert (result.rows, result.superseded) == (1, ((0, 0),))
