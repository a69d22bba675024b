"""Tables, views and queries of any shape as a source: what is read of them, by which key, and what is refused."""

from __future__ import annotations

import contextlib
import pickle
import sqlite3
from typing import Any

import psycopg
import pytest
from articles import Articles, floats
from servers import Oracle, Server, cosine, execute, role_name

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.reading import open_connection
from kdb_fast.errors import DatabaseError, SchemaError, UsageError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.records import MAX_CONTENT_BYTES, Key, Record, Reject
from kdb_fast.settings import ReindexOptions
from kdb_fast.sources.table.input import TableInput
from kdb_fast.sources.table.source import TableSource
from kdb_fast.tables.definition import Definition
from kdb_fast.tables.find_relation import find_relation
from kdb_fast.tables.relation import Relation
from kdb_fast.tables.selection import Selection
from kdb_fast.tables.target import ALL, Params, Target, rows_on
from kdb_fast.tables.text import text_columns, text_expression

CUT_OFF = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE application_name = 'kdb-fast/reader' AND datname = current_database()"
)


class Texts(dict[Key, str]):
    """What a source has given: texts by key.

    Attributes:
        empty: Keys of the rows without text.
        rejects: What was no record.
        pages: How many there were.
    """

    def __init__(self, source: TableSource) -> None:
        super().__init__()
        self.empty: list[Key] = []
        self.rejects: list[Reject] = []
        self.pages = 0
        for page in source.pages():
            self.pages += 1
            for record in page:
                if isinstance(record, Reject):
                    self.rejects.append(record)
                    continue
                assert record.key not in self, "read twice"
                self[record.key] = record.content
            self.empty += source.take_empty()
        assert source.empty == len(self.empty)


def described(address: DatabaseAddress, name: str = "", **options: Any) -> Definition:
    """The description of a target; ``name`` is as SQL writes it."""
    if name:
        relation = relation_of(address, name)
        options = {"schema": relation.schema, "table": relation.name, **options}
    return Definition(name="texts", **options)


def opened(address: DatabaseAddress, name: str = "", **options: Any) -> TableSource:
    """A source with pages of few rows."""
    limit, elsewhere, page_rows = options.pop("limit", None), options.pop("source", None), options.pop("page_rows", 3)
    return TableInput(described(address, name, **options), limit, elsewhere, page_rows).open(address)


def texts(address: DatabaseAddress, name: str = "", **options: Any) -> Texts:
    """Everything that is read."""
    with contextlib.closing(opened(address, name, **options)) as source:
        return Texts(source)


def relation_of(address: DatabaseAddress, name: str) -> Relation:
    with contextlib.closing(open_connection(address)) as connection:
        return find_relation(rows_on(connection, address.dialect), address.dialect, name)


def refused(address: DatabaseAddress, name: str = "", error: type[Exception] = SchemaError, **options: Any) -> str:
    """What is said where nothing is read."""
    with pytest.raises(error) as raised:
        opened(address, name, **options).close()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def articles(index: DatabaseAddress) -> DatabaseAddress:
    """A database with a table of seven articles, the last without text."""
    execute(
        index,
        "CREATE TABLE articles (id integer PRIMARY KEY, title varchar(80), body text, words integer, "
        "published integer)",
    )
    for number in range(1, 7):
        body = f"Body {number}" if number % 2 else None
        execute(index, "INSERT INTO articles VALUES (%s, %s, %s, 2, %s)", number, f"Title {number}", body, number % 3)
    execute(index, "INSERT INTO articles VALUES (7, '', NULL, 0, 0)")
    return index


def key(address: DatabaseAddress, *parts: Any) -> Key:
    """A key as it travels: in PostgreSQL as texts."""
    return tuple(map(str, parts)) if address.dialect == "postgresql" else parts


# -- what is read ------------------------------------------------------------------------------------------


def test_all_texts_are_read_in_pages_by_key(articles: DatabaseAddress) -> None:
    found = texts(articles, "articles")
    assert found == {
        key(articles, number): f"Title {number}" + (f"\n\nBody {number}" if number % 2 else "")
        for number in range(1, 7)
    }
    assert (found.empty, found.pages) == ([key(articles, 7)], 3)


def test_columns_expressions_and_a_template_make_the_text(articles: DatabaseAddress) -> None:
    one, two = key(articles, 1), key(articles, 2)
    assert texts(articles, "articles", text=("body",))[one] == "Body 1"
    assert texts(articles, "articles", text=("Body", "upper(title) -- loud"))[one] == "Body 1\n\nTITLE 1"
    assert texts(articles, "articles", text=("title || ' 100%'",))[two] == "Title 2 100%"
    found = texts(articles, "articles", template=r"{{{title}}}:\n{body} 100%")
    assert (found[one], found[two]) == ("{Title 1}:\nBody 1 100%", "{Title 2}:\n 100%")
    assert found.empty == [key(articles, 7)], "of a row without any text the template is not filled"


def test_more_columns_than_a_function_takes_are_one_text(index: DatabaseAddress) -> None:
    names = [f"c{number}" for number in range(120)]
    execute(index, f"CREATE TABLE wide (id integer PRIMARY KEY, {', '.join(f'{name} text' for name in names)})")
    execute(index, "INSERT INTO wide (id, c3, c7, c119) VALUES (1, 'three', '', 'last')")
    assert texts(index, "wide") == {key(index, 1): "three\n\nlast"}


def test_a_filter_and_a_limit_leave_rows_out(articles: DatabaseAddress) -> None:
    condition = "published % 3 = 1 -- those"
    assert list(texts(articles, "articles", filter=condition)) == [key(articles, n) for n in (1, 4)]
    assert list(texts(articles, "articles", limit=4)) == [key(articles, n) for n in (1, 2, 3, 4)]


def test_a_query_is_read_once(articles: DatabaseAddress) -> None:
    query = "SELECT id % 3 AS remainder, max(title) AS last, count(*) AS n FROM articles GROUP BY 1 ; "
    found = texts(articles, query=query, key=("remainder",), text=("last",), into="v", page_rows=2)
    assert found == {key(articles, 0): "Title 6", key(articles, 1): "Title 4", key(articles, 2): "Title 5"}


def test_views_are_read(articles: DatabaseAddress) -> None:
    for kind in ("view", "aggregate", "materialised"):
        what = "MATERIALIZED VIEW" if kind == "materialised" and articles.dialect == "postgresql" else "VIEW"
        tail = "GROUP BY id, title, body" if kind == "aggregate" else ""
        execute(articles, f"CREATE {what} chosen AS SELECT id, title, body FROM articles WHERE id < 6 {tail}")
        check_view(articles, kind)
        execute(articles, f"DROP {what} chosen")


def check_view(articles: DatabaseAddress, kind: str) -> None:
    """The view ``chosen`` is read; a simple one by key."""
    found = texts(articles, "chosen", key=("id",), into="v", text=("title",))
    assert found == {key(articles, n): f"Title {n}" for n in range(1, 6)}
    with contextlib.closing(opened(articles, "chosen", key=("id",), into="v", text=("title",))) as source:
        assert source.selection.paged == (kind == "view" and articles.dialect == "postgresql")
        assert source.estimate() is not None
        assert source.sample(2)


def test_sample_and_estimate(articles: DatabaseAddress) -> None:
    with contextlib.closing(opened(articles, "articles", text=("title",))) as source:
        assert source.sample(2) == ["Title 1", "Title 2"]
        assert source.estimate() == 7
        assert len(Texts(source)) == 6
        assert source.entities == (ALL,)


def test_rows_that_change_meanwhile_are_read_as_they_are_then(articles: DatabaseAddress) -> None:
    with contextlib.closing(opened(articles, "articles", text=("title",))) as source:
        pages = source.pages()
        assert [record.key for record in next(pages)] == [key(articles, n) for n in (1, 2, 3)]
        execute(articles, "DELETE FROM articles WHERE id IN (3, 4)")
        execute(articles, "UPDATE articles SET title = 'other' WHERE id = 5")
        execute(articles, "INSERT INTO articles (id, title) VALUES (0, 'before'), (9, 'new')")
        rest = {record.key: record.content for page in pages for record in page if isinstance(record, Record)}
    assert rest == {key(articles, 5): "other", key(articles, 6): "Title 6", key(articles, 9): "new"}


# -- keys --------------------------------------------------------------------------------------------------

KEYS: list[tuple[str, list[str]]] = [
    ("bigint", ["-9223372036854775808", "0", "9223372036854775807"]),
    ("text", ["", " ", "%s", "a", "B", "b", "é", "a\nb", '{"x"}', "\\"]),
    ("varchar(5)", ["a", "b ", "b"]),
    ("char(5)", ["a", "b", " b"]),
    ("uuid", ["00000000-0000-0000-0000-000000000000", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"]),
    ("date", ["-infinity", "0044-03-15 BC", "2024-02-29", "infinity"]),
    ("timestamptz", ["-infinity", "2024-10-27 00:30:00.123456+00", "2024-10-27 01:30:00.123456+00", "infinity"]),
    ("numeric", ["-Infinity", "-1.50", "0", "1e300", "Infinity", "NaN"]),
    ("float8", ["-Infinity", "0.1", "0.30000000000000004", "1e-320", "NaN"]),
    ("boolean", ["false", "true"]),
    ("bytea", ["\\x", "\\x00ff", "\\xff"]),
    ("inet", ["10.0.0.1", "10.0.0.0/8", "::1"]),
    ("interval", ["-1 day", "1 mon", "30 days 00:00:01"]),
    ("integer[]", ["{}", "{1,2}", "{1,NULL}"]),
    ("shop.mood", ["sad", "fine"]),
    ("shop.slug", ["a", "B", "b"]),
    ("shop.citext", ["A", "b", "C"]),
    ('text COLLATE "shop"."folded"', ["A", "b", "C"]),
]
"""Types of a key, and values that are different ones."""

MISSING = {"shop.citext": "citext", 'text COLLATE "shop"."folded"': "ICU"}
"""What a server may not have."""


def make_types(address: DatabaseAddress) -> set[str]:
    """The types of KEYS in a schema that no search path names; returns those that this server has not."""
    execute(address, "CREATE SCHEMA shop")
    execute(address, "CREATE TYPE shop.mood AS ENUM ('sad', 'fine')")
    execute(address, "CREATE DOMAIN shop.slug AS text CHECK (VALUE <> '')")
    missing = set(MISSING)
    for kind, statement in zip(
        MISSING,
        (
            "CREATE EXTENSION citext SCHEMA shop",
            "CREATE COLLATION shop.folded (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        ),
        strict=True,
    ):
        with contextlib.suppress(psycopg.Error):
            execute(address, statement)
            missing.remove(kind)
    return missing


def orphans(address: DatabaseAddress, selection: Selection, table: str, column: str = "k") -> list[tuple[Any, ...]]:
    """Of a column of a table of vectors, the values in rows that have none in what is read."""
    with contextlib.closing(open_connection(address)) as connection:
        rows, params = rows_on(connection, address.dialect), Params(address.dialect)
        live = pickle.loads(pickle.dumps(selection))(rows, Target(), ALL, params)
        return rows(f"SELECT CAST(s.{column} AS text) FROM {table} s WHERE NOT {live}", params.values)


def test_keys_of_every_type(database: DatabaseAddress) -> None:
    missing = make_types(database)
    for kind, values in KEYS:
        if kind in missing:
            continue
        execute(database, f"CREATE TABLE keys (k {kind} PRIMARY KEY, body text)")
        for value in values:
            execute(database, f"INSERT INTO keys VALUES (%s::text::{kind.partition(' ')[0]}, %s)", value, value)
        expected = {(k,): body for k, body in execute(database, "SELECT k::text, body FROM keys")}
        with contextlib.closing(opened(database, "keys", text=("'x' || body",), page_rows=1)) as source:
            found = Texts(source)
            assert len(found) == len(values) == found.pages, kind
            assert {text[1:] for text in found.values()} == set(values), kind
            # As it travels a key is found again, and so is what has gone.
            execute(database, "CREATE TABLE vectors AS SELECT k FROM keys")
            execute(database, "DELETE FROM keys WHERE body = %s", values[-1])
            gone = orphans(database, source.selection, "vectors")
            assert len(gone) == 1, kind
            for (travelled,) in found:
                cast = source.selection.key[0].type
                assert len(execute(database, f"SELECT 1 FROM vectors WHERE k = (%s::text)::{cast}", travelled)) == 1
        assert len(expected) == len(values)
        execute(database, "DROP TABLE keys, vectors")


def test_a_key_of_several_columns(database: DatabaseAddress) -> None:
    missing = make_types(database)
    folded = "text" if missing else 'text COLLATE "shop"."folded"'
    execute(
        database,
        f'CREATE TABLE parts (a {folded}, b numeric, "C %s" shop.mood, d date, body text, '
        'PRIMARY KEY (a, b, "C %s", d))',
    )
    execute(
        database,
        "INSERT INTO parts SELECT a, b, c, d, concat_ws('/', a, b, c, d) FROM unnest(ARRAY['x', 'Y', 'z']) a, "
        "unnest(ARRAY['NaN', 1, 'Infinity']::numeric[]) b, unnest(enum_range(NULL::shop.mood)) c, "
        "unnest(ARRAY['infinity', '-infinity', 'today']::date[]) d",
    )
    with contextlib.closing(opened(database, "parts", text=("body",), page_rows=4)) as source:
        found = Texts(source)
        assert len(found) == 54
        assert all("/".join(map(str, key)) == text for key, text in found.items())
        assert [part.name for part in source.selection.key] == ["a", "b", "C %s", "d"]
        execute(database, "CREATE TABLE vectors AS SELECT * FROM parts")
        execute(database, "DELETE FROM parts WHERE b = 'NaN' AND d = 'infinity'")
        assert len(orphans(database, source.selection, "vectors", "a")) == 6


def test_a_key_is_compared_by_its_own_index(database: DatabaseAddress) -> None:
    """An operator class whose operators are in no search path, and by which "a" is "A"."""
    execute(database, "CREATE SCHEMA shop")
    for operator, name in (("<", "lt"), ("<=", "le"), ("=", "eq"), (">=", "ge"), (">", "gt")):
        body = f'SELECT lower(a) COLLATE "C" {operator} lower(b) COLLATE "C"'
        execute(
            database,
            f"CREATE FUNCTION shop.{name}(a text, b text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $${body}$$",
        )
        execute(
            database,
            f"CREATE OPERATOR shop.{operator}# (LEFTARG = text, RIGHTARG = text, FUNCTION = shop.{name})",
        )
    execute(
        database,
        "CREATE FUNCTION shop.cmp(a text, b text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$ SELECT CASE "
        'WHEN lower(a) COLLATE "C" < lower(b) COLLATE "C" THEN -1 '
        'WHEN lower(a) COLLATE "C" > lower(b) COLLATE "C" THEN 1 ELSE 0 END $$',
    )
    execute(
        database,
        "CREATE OPERATOR CLASS shop.folded_ops FOR TYPE text USING btree AS OPERATOR 1 shop.<#, OPERATOR 2 shop.<=#, "
        "OPERATOR 3 shop.=#, OPERATOR 4 shop.>=#, OPERATOR 5 shop.>#, FUNCTION 1 shop.cmp(text, text)",
    )
    execute(database, "CREATE TABLE words (number bigint, word text, body text)")
    execute(database, "CREATE UNIQUE INDEX ON words (number, word shop.folded_ops)")
    execute(database, "ALTER TABLE words ALTER number SET NOT NULL, ALTER word SET NOT NULL")
    for word in ("b", "A", "_", "Z", "c"):
        execute(database, "INSERT INTO words VALUES (1, %s, %s), (2, %s, %s)", word, word, word, word)
    with contextlib.closing(opened(database, "words", text=("body",), page_rows=1)) as source:
        assert list(Texts(source)) == [(n, word) for n in ("1", "2") for word in ("_", "A", "b", "c", "Z")]
        execute(database, "CREATE TABLE vectors AS SELECT number, lower(word) AS word FROM words")
        assert orphans(database, source.selection, "vectors", "word") == []


def test_keys_of_sqlite_keep_their_types(sqlite_database: DatabaseAddress) -> None:
    execute(sqlite_database, "CREATE TABLE keys (k PRIMARY KEY, body TEXT)")
    values = [-(2**63), 2**63 - 1, 0.5, float("inf"), "", "1", "é", "%s", b"", b"\x00\xff"]
    for value in values:
        execute(sqlite_database, "INSERT INTO keys VALUES (%s, 'text')", value)
    with contextlib.closing(opened(sqlite_database, "keys", page_rows=1)) as source:
        assert [k for (k,) in Texts(source)] == [
            -(2**63),
            0.5,
            2**63 - 1,
            float("inf"),
            "",
            "%s",
            "1",
            "é",
            b"",
            b"\0\xff",
        ]
        execute(sqlite_database, "CREATE TABLE vectors AS SELECT k FROM keys")
        execute(sqlite_database, "DELETE FROM keys WHERE k = '1'")
        assert orphans(sqlite_database, source.selection, "vectors") == [("1",)]


def test_a_key_without_case_on_sqlite(sqlite_database: DatabaseAddress) -> None:
    execute(
        sqlite_database,
        "CREATE TABLE keys (lang TEXT COLLATE NOCASE, n INT, body TEXT, PRIMARY KEY (lang, n)) WITHOUT ROWID",
    )
    for number, lang in enumerate(("de", "EN", "Fr", "DE", "zh")):
        execute(sqlite_database, "INSERT INTO keys VALUES (%s, %s, 'text')", lang, number)
    with contextlib.closing(opened(sqlite_database, "keys", page_rows=1)) as source:
        assert list(Texts(source)) == [("de", 0), ("DE", 3), ("EN", 1), ("Fr", 2), ("zh", 4)]
        assert [part.collation for part in source.selection.key] == ["NOCASE", "BINARY"]
        plan = execute(
            sqlite_database,
            f"EXPLAIN QUERY PLAN SELECT {source.selection.selected} FROM {source.selection.source()} "
            f"WHERE {source.selection.after(['%s', '%s'])} ORDER BY {source.selection.order} LIMIT 3",
            "de",
            1,
        )
        assert "PRIMARY KEY" in str(plan), plan
        assert "TEMP B-TREE" not in str(plan), plan


def test_a_page_is_found_by_the_index_of_the_key(database: DatabaseAddress) -> None:
    execute(database, "CREATE TABLE many (a bigint, b text, body text, PRIMARY KEY (a, b))")
    execute(database, "INSERT INTO many SELECT n / 10, n::text, 'text' FROM generate_series(1, 20000) n")
    execute(database, "ANALYZE many")
    with contextlib.closing(opened(database, "many", text=("body",))) as source:
        selection = source.selection
        plan = execute(
            database,
            f"EXPLAIN SELECT {selection.selected} FROM {selection.source()} "
            f"WHERE {selection.after(['%s', '%s'])} ORDER BY {selection.order} LIMIT 100",
            "500",
            "x",
        )
    assert "Index Cond" in str(plan), plan
    assert "Sort" not in str(plan), plan


def test_a_key_that_is_not_the_first(articles: DatabaseAddress) -> None:
    execute(articles, "CREATE TABLE other (id integer PRIMARY KEY, b text NOT NULL, a text NOT NULL, UNIQUE (a, b))")
    execute(articles, "INSERT INTO other VALUES (1, 'x', 'y'), (2, 'x', 'z')")
    assert list(texts(articles, "other", key=("b", "a"), text=("b",))) == [("y", "x"), ("z", "x")]
    assert list(texts(articles, "other", text=("b",))) == [key(articles, 1), key(articles, 2)]


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("into", ["", "vectors"])
def test_a_run_finds_its_rows_again_by_such_keys(index: DatabaseAddress, into: str, oracle: Oracle) -> None:
    """No text at all, no number, no end: each is a key of its own, and the next run knows them all."""
    articles = Articles(
        index,
        "id text, lang numeric, body text, embedding vector, PRIMARY KEY (id, lang)"
        if index.dialect == "postgresql"
        else "id TEXT COLLATE NOCASE, lang REAL, body TEXT, embedding BLOB, PRIMARY KEY (id, lang)",
    )
    numbers = ["NaN", "Infinity", "1.50"] if articles.postgresql else [float("inf"), -1.5, 2.0]
    for name in ("", "a", "%s"):
        for number in numbers:
            execute(index, f"INSERT INTO {articles.name} VALUES (%s, %s, %s, NULL)", name, number, f"{name} {number}")
    execute(
        index, f"INSERT INTO {articles.name} VALUES ('bad', 1, %s, NULL)", "nul" if articles.postgresql else "n\0ul"
    )
    definition = described(index, articles.name, into=into, text=("body",), key=("lang", "id"))
    target = articles.into(into, key=("lang", "id")) if into else articles.target(key=("lang", "id"))
    column = f"SELECT {{}} FROM {target.quoted} WHERE embedding IS NOT NULL ORDER BY 1"

    def run() -> tuple[int, int, int, int]:
        receipt = reindex(index, TableInput(definition), ReindexOptions(), target=target)
        return receipt.stored, receipt.unchanged, receipt.rejected, receipt.deleted

    bad = 0 if articles.postgresql else 1
    assert run() == (10 - bad, 0, bad, 0)
    vector = "embedding::text" if articles.postgresql else "embedding"
    if not into:
        for body, found in execute(index, f"SELECT body, {vector} FROM {articles.name} WHERE embedding IS NOT NULL"):
            assert cosine(floats(found), oracle.vector(body)) >= 0.99999, body
    assert len(execute(index, column.format("id"))) == 10 - bad
    assert run() == (0, 10 - bad, bad, 0)
    execute(index, f"UPDATE {articles.name} SET body = 'mended' WHERE id = 'bad'")
    execute(index, f"DELETE FROM {articles.name} WHERE id = '' AND lang = %s", numbers[0])
    execute(index, f"UPDATE {articles.name} SET body = NULL WHERE id = 'a' AND lang = %s", numbers[1])
    stored, unchanged, rejected, deleted = run()
    assert (stored, unchanged, rejected) == (1, 7, 0)
    assert deleted >= 1
    assert execute(index, "SELECT count(*) FROM kdb_fast_rejects") == [(0,)], "what was rejected has been mended"
    assert len(execute(index, column.format("id"))) == 8


# -- names and columns of any shape ------------------------------------------------------------------------

ODD = ["My Docs", '"Big" Table', "100%", "%s {v} %(p)s", "é ß 日本", "select", "a'b\\", "x" * 60]


def test_odd_names(index: DatabaseAddress) -> None:
    for name in ODD:
        check_odd_name(index, name)


def check_odd_name(index: DatabaseAddress, name: str) -> None:
    """A schema, a table and columns of this name are read."""
    quoted = '"' + name.replace('"', '""') + '"'
    table = f"{quoted}.{quoted}" if index.dialect == "postgresql" else quoted
    statements = (
        f'CREATE TABLE {table} ({quoted} text PRIMARY KEY, {quoted[:-1]}_" text, c text)',
        f"INSERT INTO {table} VALUES ('k', 't', 'c')",
    )
    if index.dialect == "postgresql":
        execute(index, f"CREATE SCHEMA {quoted}")
        for statement in statements:
            execute(index, statement)
    else:  # without a helper that takes %s for a place
        with contextlib.closing(sqlite3.connect(index.conninfo)) as connection, connection:
            for statement in statements:
                connection.execute(statement)
    column = f"{name}_"
    for found in (
        texts(index, table),
        texts(index, table, text=(column, "c")),
        texts(index, table, template="{" + column + "}\n\n{c}") if "{" not in name else {("k",): "t\n\nc"},
    ):
        assert found == {("k",): "t\n\nc"}
    assert texts(index, table, key=(name,), text=("c",), filter=f"{quoted} = 'k'") == {("k",): "c"}


def test_identifiers_are_read_as_sql_reads_them(database: DatabaseAddress) -> None:
    execute(database, 'CREATE SCHEMA shop; CREATE SCHEMA "My Docs"; CREATE TABLE shop.articles (id int PRIMARY KEY)')
    execute(database, 'CREATE TABLE articles (id int PRIMARY KEY); CREATE TABLE "Articles" (id int PRIMARY KEY)')
    execute(database, 'CREATE TABLE "My Docs"."Big ""Table" (id int PRIMARY KEY)')
    for written, found in {
        "articles": "public.articles",
        "ARTICLES": "public.articles",
        ' "Articles" ': 'public."Articles"',
        "Shop . Articles": "shop.articles",
        '"My Docs"."Big ""Table"': '"My Docs"."Big ""Table"',
        "pg_catalog.pg_class": "pg_catalog.pg_class",
    }.items():
        assert relation_of(database, written).shown == found
    with pytest.raises(SchemaError, match=r'no table artcles; nearest: "Articles", articles, shop\.articles\.'):
        relation_of(database, "artcles")
    with pytest.raises(SchemaError, match=r"There is no table shop\.aritcles; nearest: shop\.articles, "):
        relation_of(database, "shop.Aritcles")
    with pytest.raises(SchemaError, match=r"There is no table zzz; there are: "):
        relation_of(database, "zzz")
    for nothing in ("", "a b", "a.b.c", 'a"b', "1a", '""'):
        with pytest.raises(SchemaError, match="is no name of a table"):
            relation_of(database, nothing)


def test_identifiers_of_sqlite(sqlite_database: DatabaseAddress, tmp_path: Any) -> None:
    execute(sqlite_database, 'CREATE TABLE "Big Table" (id INTEGER PRIMARY KEY, body TEXT)')
    for written in ('"big table"', "[Big Table]", "`BIG TABLE`", 'main."Big Table"'):
        assert relation_of(sqlite_database, written).name == "Big Table"
    with pytest.raises(SchemaError, match=r'There is no table Big_Table; nearest: "Big Table"\.'):
        relation_of(sqlite_database, "Big_Table")
    with pytest.raises(SchemaError, match=r"no database other attached to this file.* --source"):
        relation_of(sqlite_database, "other.articles")
    with contextlib.closing(sqlite3.connect(sqlite_database.conninfo)) as connection:
        connection.execute("ATTACH ? AS other", (str(tmp_path / "other.db"),))
        connection.execute("CREATE TABLE other.articles (id INTEGER PRIMARY KEY, body TEXT)")
        for written in ("articles", "OTHER.Articles"):
            found = find_relation(rows_on(connection, "sqlite"), "sqlite", written)
            assert (found.schema, found.name, len(found.keys)) == ("other", "articles", 1)
        selection = Selection("sqlite", found, found.keys[0], text_expression(found, (), "", "sqlite"))
        connection.execute("INSERT INTO other.articles VALUES (1, 'text')")
        statement = f"SELECT {selection.selected} FROM {selection.source()} ORDER BY {selection.order}"
        assert connection.execute(statement).fetchall() == [(1, "text")]


def test_columns_of_every_kind(database: DatabaseAddress) -> None:
    make_types(database)
    execute(
        database,
        "CREATE DOMAIN shop.name AS shop.slug; CREATE DOMAIN shop.names AS text[]; "
        "CREATE DOMAIN shop.all AS shop.names",
    )
    columns = {
        "id": "bigint PRIMARY KEY",
        "plain": "text",
        "short": "varchar(20)",
        "padded": "char(8)",
        "mood": "shop.mood",
        "slug": "shop.name",
        "tags": "text[]",
        "moods": "shop.mood[]",
        "names": "shop.all",
        "number": "integer",
        "payload": "jsonb",
        "raw": "bytea",
        "made": "text GENERATED ALWAYS AS (plain || '!') STORED",
    }
    execute(database, f"CREATE TABLE wide ({', '.join(f'{name} {kind}' for name, kind in columns.items())})")
    execute(
        database,
        "INSERT INTO wide VALUES (1, 'plain', 'short', 'padded', 'sad', 'slug', '{a,NULL,b}', '{sad,fine}', '{x}', 1, "
        """'{"data": "json"}', 'raw')""",
    )
    execute(database, "INSERT INTO wide (id) VALUES (2)")
    relation = relation_of(database, "wide")
    kinds = {column.name: column.type for column in relation.columns}
    assert kinds["short"] == "character varying(20)"
    assert (kinds["mood"], kinds["slug"], kinds["moods"]) == ("shop.mood", "shop.name", "shop.mood[]")
    names = ("plain", "short", "padded", "mood", "slug", "tags", "moods", "names")
    assert text_columns(relation, ["ID"]) == names
    found = texts(database, "wide")
    assert found[("1",)] == "\n\n".join(("plain", "short", "padded", "sad", "slug", "a\nb", "sad\nfine", "x"))
    assert found.empty == [("2",)]
    assert texts(database, "wide", text=("made", "payload->>'data'"))[("1",)] == "plain!\n\njson"
    assert texts(database, "wide", template="{tags}, {padded}|") == {("1",): "a\nb, padded|"}
    assert "number is of type integer; expected text." in refused(database, "wide", text=("number",))
    assert "CAST(number + 1 AS text)" in refused(database, "wide", text=("number + 1",))
    assert "CAST(raw AS text)" in refused(database, "wide", text=("raw",))
    assert "payload ->> " in refused(database, "wide", template="{payload}")
    assert "--text number + 1 is of type integer" in refused(database, "wide", text=("number + 1",))


def test_columns_of_sqlite(sqlite_database: DatabaseAddress) -> None:
    execute(
        sqlite_database,
        "CREATE TABLE wide (id INTEGER PRIMARY KEY, plain TEXT, short VARCHAR(20), any, number INT, payload JSON, "
        "vector TEXT, made TEXT GENERATED ALWAYS AS (plain || '!') VIRTUAL)",
    )
    execute(
        sqlite_database,
        """INSERT INTO wide VALUES (1, 'plain', 'short', 5, 1, '{"data": "json"}', '[1.0]'), """
        "(2, NULL, '', NULL, 1, NULL, NULL), (3, x'ff', 'x', NULL, 1, NULL, NULL), "
        "(4, 'nul' || char(0), '', 1, 1, 1, 1)",
    )
    relation = relation_of(sqlite_database, "wide")
    assert text_columns(relation, ["id", "VECTOR"]) == ("plain", "short")
    found = texts(sqlite_database, "wide", text=("plain", "short", "any"))
    assert found[(1,)] == "plain\n\nshort\n\n5"
    assert found[(4,)] == "nul\0\n\n1"
    assert found.empty == [(2,)]
    assert [(reject.key, reject.reason) for reject in found.rejects] == [((3,), "not_utf8")]
    assert texts(sqlite_database, "wide", text=("made", "payload ->> 'data'"))[(1,)] == "plain!\n\njson"
    assert "number is of type INT; expected text." in refused(sqlite_database, "wide", text=("number",))
    assert "payload ->> " in refused(sqlite_database, "wide", text=("payload",))


def test_a_key_that_is_not_utf_8_is_a_reject_and_no_end(sqlite_database: DatabaseAddress) -> None:
    execute(sqlite_database, "CREATE TABLE keys (k TEXT PRIMARY KEY, body TEXT)")
    for number, value in enumerate(("'a'", "CAST(x'62ff' AS TEXT)", "'c'")):
        execute(sqlite_database, f"INSERT INTO keys VALUES ({value}, 'text {number}')")
    found = texts(sqlite_database, "keys", page_rows=1)
    assert found == {("a",): "text 0", ("c",): "text 2"}
    assert [reject.reason for reject in found.rejects] == ["not_utf8"]


def test_kinds_of_relations(database: DatabaseAddress) -> None:
    execute(
        database,
        "CREATE TABLE parts (id bigint, day date, body text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day); "
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2025-01-01'); "
        "CREATE TABLE parts_2 PARTITION OF parts DEFAULT; "
        "INSERT INTO parts SELECT n, '2024-12-20'::date + n, 'text ' || n FROM generate_series(1, 30) n; "
        "CREATE MATERIALIZED VIEW copied AS SELECT * FROM parts; CREATE UNIQUE INDEX ON copied (id)",
    )
    assert relation_of(database, "parts").kind == "partitioned table"
    assert len(texts(database, "parts")) == 30
    assert relation_of(database, "copied").kind == "materialised view"
    with contextlib.closing(opened(database, "copied", into="v")) as source:
        assert source.selection.paged
        assert len(Texts(source)) == 30


def test_kinds_of_tables_of_sqlite(sqlite_database: DatabaseAddress) -> None:
    for statement in (
        "CREATE TABLE strict (k ANY PRIMARY KEY, body TEXT) STRICT",
        "INSERT INTO strict VALUES (1, 'a'), ('1', 'b'), (x'31', 'c')",
        "CREATE TABLE falling (k INTEGER PRIMARY KEY DESC, body TEXT)",  # which is not the number of the row
        "INSERT INTO falling VALUES (1, 'a'), (2, 'b')",
        "CREATE TABLE numbered (body TEXT, made TEXT GENERATED ALWAYS AS (upper(body)), k INTEGER PRIMARY KEY)",
        "INSERT INTO numbered (k, body) VALUES (1, 'a'), (2, 'b')",
        "CREATE TABLE none (body TEXT)",
        "CREATE VIRTUAL TABLE docs USING fts5(body, k UNINDEXED)",
        "INSERT INTO docs VALUES ('a', 1), ('b', 2)",
    ):
        execute(sqlite_database, statement)
    assert texts(sqlite_database, "strict", page_rows=1) == {(1,): "a", ("1",): "b", (b"1",): "c"}
    assert texts(sqlite_database, "falling", page_rows=1) == {(1,): "a", (2,): "b"}
    assert texts(sqlite_database, "numbered") == {(1,): "a", (2,): "b"}
    said = refused(sqlite_database, "none")
    assert "with id INTEGER PRIMARY KEY: VACUUM may number the rows of this one anew." in said
    assert "docs is a virtual table: its rows have no place" in refused(sqlite_database, "docs", key=("k",))
    assert texts(sqlite_database, "docs", key=("k",), into="v") == {(1,): "a", (2,): "b"}
    query = "SELECT rowid AS id, body FROM docs"
    assert texts(sqlite_database, query=query, key=("id",), into="v") == {(1,): "a", (2,): "b"}


def test_an_index_of_another_collation_than_its_column(index: DatabaseAddress) -> None:
    collations = ('"C"', '"default"') if index.dialect == "postgresql" else ("BINARY", "NOCASE")
    execute(index, f"CREATE TABLE words (word text COLLATE {collations[1]} NOT NULL, body text)")
    execute(index, f"CREATE UNIQUE INDEX word_index ON words (word COLLATE {collations[0]})")
    for word in ("b", "A", "a", "B"):
        execute(index, "INSERT INTO words VALUES (%s, 'text')", word)
    with contextlib.closing(opened(index, "words", text=("body",), page_rows=1)) as source:
        assert [word for (word,) in Texts(source)] == ["A", "B", "a", "b"]
        assert "COLLATE" in source.selection.order


def test_a_table_that_others_inherit_from_has_no_key_of_its_own(database: DatabaseAddress) -> None:
    execute(database, "CREATE TABLE parent (id int PRIMARY KEY, body text); CREATE TABLE child () INHERITS (parent)")
    execute(database, "INSERT INTO parent VALUES (1, 'a'); INSERT INTO child VALUES (1, 'b')")
    assert relation_of(database, "parent").keys == ()
    assert "Other tables inherit from public.parent" in refused(database, "parent")
    query = "SELECT * FROM ONLY parent"
    assert texts(database, query=query, key=("id",), into="v") == {("1",): "a"}


def test_a_foreign_table(postgres: Server, database: DatabaseAddress) -> None:
    try:
        execute(database, "CREATE EXTENSION postgres_fdw")
    except psycopg.Error:
        pytest.skip("this server has no postgres_fdw")
    execute(database, "CREATE TABLE far (id bigint PRIMARY KEY, body text); INSERT INTO far VALUES (1, 'a'), (2, 'b')")
    parts = psycopg.conninfo.conninfo_to_dict(database.conninfo)
    options = ", ".join(f"{name} '{parts[name]}'" for name in ("host", "port", "dbname") if name in parts)
    execute(
        database,
        f"CREATE SERVER there FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({options}); "
        f"CREATE USER MAPPING FOR CURRENT_USER SERVER there OPTIONS (user '{role_name(database)}'); "
        "CREATE FOREIGN TABLE near (id bigint, body text) SERVER there OPTIONS (table_name 'far')",
    )
    assert "is a foreign table" in refused(database, "near")
    assert "Nothing says which columns" in refused(database, "near", into="v")
    assert texts(database, "near", into="v", key=("id",)) == {("1",): "a", ("2",): "b"}
    execute(database, "ALTER TABLE far DROP CONSTRAINT far_pkey; INSERT INTO far VALUES (2, 'c')")
    assert "does not tell its rows apart: 2 have 2" in refused(database, "near", into="v", key=("id",))


# -- another database --------------------------------------------------------------------------------------


def test_another_database_is_read(articles: DatabaseAddress, tmp_path: Any) -> None:
    written = DatabaseAddress("sqlite", str(tmp_path / "vectors.db"), "sqlite:///vectors.db")
    definition = described(articles, "articles", text=("title",))
    with contextlib.closing(TableInput(definition, None, articles).open(written)) as source:
        assert len(Texts(source)) == 6
        assert source.live_rows is None, "it may lag behind"
        assert not source.complete
        assert not source.changed()


# -- what is refused ---------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused_in_one_line(articles: DatabaseAddress) -> None:
    postgresql = articles.dialect == "postgresql"
    shown = "public.articles" if postgresql else "articles"
    assert f"{shown} has no column titel; nearest: title." in refused(articles, "articles", text=("titel",))
    assert "has no column nr" in refused(articles, "articles", key=("nr",))
    assert "has no column titel; nearest: title" in refused(articles, "articles", template="{titel}")
    assert "single {" in refused(articles, "articles", UsageError, template="{title")
    assert "no column" in refused(articles, "articles", UsageError, template="text")
    assert "expected one of them" in refused(articles, "articles", UsageError, template="{title}", text=("title",))
    assert "words is of type" in refused(articles, "articles", text=("words",))
    assert "has no unique index on (words)" in refused(articles, "articles", key=("words",))
    said = refused(articles, "articles", filter="publishd = 1")
    assert f"The --filter of {shown} cannot be read: " in said
    assert "nearest: published." in said
    assert "--filter" in refused(articles, "articles", filter="published = ")
    assert "cannot be read by" in refused(articles, "articles", text=("upper(titel)",))
    assert "The query cannot be read" in refused(articles, query="SELEC 1", key=("id",), into="v")
    assert "The query cannot be read" in refused(articles, query="SELECT 1 AS id; SELECT 2", key=("id",), into="v")
    assert "--into" in refused(articles, query="SELECT * FROM articles", key=("id",))
    assert "--key id" in refused(articles, query="SELECT * FROM articles", into="v")
    assert "has no column number" in refused(articles, query="SELECT * FROM articles", into="v", key=("number",))
    doubled = "SELECT id % 2 AS id, title FROM articles"
    assert "does not tell its rows apart: " in refused(articles, query=doubled, key=("id",), into="v")
    null = "SELECT nullif(id, 3) AS id, title FROM articles"
    assert "is NULL in a row" in refused(articles, query=null, key=("id",), into="v")


def test_two_sources_are_one_where_their_keys_differ(articles: DatabaseAddress) -> None:
    both = "SELECT {}id, title FROM articles UNION ALL SELECT {}id, body FROM articles"
    said = refused(articles, query=both.format("", ""), key=("id",), into="v", text=("title",))
    assert "SELECT 'a' AS source" in said
    query = both.format("'a' AS source, ", "'b' AS source, ")
    found = texts(articles, query=query, key=("source", "id"), into="v", text=("title",))
    assert len(found) == 9


def test_a_table_without_a_key_is_refused_with_what_to_add(index: DatabaseAddress) -> None:
    execute(index, "CREATE TABLE notes (id integer, slug text, body text)")
    execute(index, "INSERT INTO notes VALUES (1, NULL, 'text')")
    said = refused(index, "notes")
    assert "has no primary key and no unique index; a row could not be found again." in said
    assert (
        "ALTER TABLE public.notes ADD COLUMN row_id bigint" if index.dialect == "postgresql" else "CREATE UNIQUE"
    ) in said
    said = refused(index, "notes", key=("id", "slug"))
    run = said.partition("Run: ")[2]
    execute(index, run)
    assert "is NULL in a row" in refused(index, "notes", key=("slug", "id"))
    execute(index, "UPDATE notes SET slug = ''")
    found = texts(index, "notes", key=("slug", "id"), text=("body",))
    assert found == {key(index, 1, ""): "text"}


def test_a_right_that_is_missing_is_named(postgres: Server, database: DatabaseAddress) -> None:
    execute(database, "CREATE SCHEMA shop; CREATE TABLE shop.notes (id int PRIMARY KEY, body text, secret text)")
    user = postgres.create_role(database)
    assert "GRANT USAGE ON SCHEMA shop TO " in refused(user, query="", schema="shop", table="notes")
    execute(database, f"GRANT USAGE ON SCHEMA shop TO {role_name(user)}")
    assert f"GRANT SELECT ON shop.notes TO {role_name(user)};" in refused(user, "shop.notes")
    execute(database, f"GRANT SELECT (id, body) ON shop.notes TO {role_name(user)}")
    assert texts(user, "shop.notes", text=("body",)) == {}
    assert "GRANT SELECT" in refused(user, "shop.notes")


def test_paid_texts_are_named(articles: DatabaseAddress) -> None:
    relation = relation_of(articles, "articles")
    with pytest.raises(UsageError, match=r"several columns of text \(title, body\).*--text title"):
        text_columns(relation, provider="openai")
    assert text_columns(relation, ["body"], provider="openai") == ("title",)


def test_a_connection_that_is_lost_between_two_pages_is_made_again(database: DatabaseAddress) -> None:
    execute(database, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    execute(database, "INSERT INTO notes SELECT n, 'x' FROM generate_series(1, 9) n")
    with contextlib.closing(opened(database, "notes")) as source:
        pages = source.pages()
        assert len(next(pages)) == 3
        execute(database, CUT_OFF)
        assert sum(map(len, pages)) == 6


def test_a_query_that_is_cut_off_says_so(database: DatabaseAddress) -> None:
    query = "SELECT n AS id, 'x' AS body FROM generate_series(1, 9) n"
    with contextlib.closing(opened(database, query=query, key=("id",), into="v")) as source:
        pages = source.pages()
        next(pages)
        execute(database, CUT_OFF)
        with pytest.raises(DatabaseError, match="lost while reading the query"):
            list(pages)


def test_long_texts_are_cut_where_they_are_read(database: DatabaseAddress) -> None:
    execute(database, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    execute(database, "INSERT INTO notes SELECT n, repeat('é', n) FROM unnest(ARRAY[10, 2000000]) n")
    assert [len(text) for text in texts(database, "notes").values()] == [10, MAX_CONTENT_BYTES]


def test_a_query_writes_nothing(database: DatabaseAddress) -> None:
    execute(database, "CREATE TABLE notes (id int PRIMARY KEY, body text); INSERT INTO notes VALUES (1, 'x')")
    execute(
        database,
        "CREATE FUNCTION meddle(n int) RETURNS text LANGUAGE plpgsql AS "
        "$$ BEGIN UPDATE notes SET body = 'y'; RETURN 'z'; END $$",
    )
    said = refused(database, query="SELECT id, meddle(id) AS m FROM notes", key=("id",), into="v")
    assert "The query writes: " in said
