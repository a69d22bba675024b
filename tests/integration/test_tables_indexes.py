"""The indexes of a user's own table are after a run what they were, whatever they are; a table without one gets one."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from articles import Articles, ArticleSource
from servers import Server, execute, mixed_texts, role_name

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import DatabaseError, SchemaError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.settings import ReindexOptions
from kdb_fast.stores.base import RunSpec
from kdb_fast.stores.postgresql import index as pg_index
from kdb_fast.stores.postgresql import index_build, index_default, index_session
from kdb_fast.stores.postgresql.column_store import PostgreSQLColumnStore
from kdb_fast.stores.postgresql.index_store import PostgreSQLIndexStore
from kdb_fast.stores.postgresql.table_store import PostgreSQLTableStore
from kdb_fast.tables import index_policy
from kdb_fast.tables.index_policy import IndexPolicy

DIMENSIONS = 8
ROWS = 60
COLUMNS = (
    "id bigint PRIMARY KEY, lang text, body text, published bool DEFAULT true, embedding vector(8), other vector(8)"
)

SNAPSHOT = """
SELECT i.indrelid::regclass::text, c.relname::text, pg_get_indexdef(c.oid), i.indisvalid, i.indisready, c.reloptions,
  (SELECT spcname::text FROM pg_tablespace WHERE oid = c.reltablespace), obj_description(c.oid, 'pg_class'),
  (SELECT array_agg((attnum, attstattarget) ORDER BY attnum) FROM pg_attribute WHERE attrelid = c.oid
   AND attstattarget > -1)::text,
  (SELECT inhparent::regclass::text FROM pg_inherits WHERE inhrelid = c.oid)
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
WHERE t.relname LIKE 'articles%' ORDER BY 1, 2
"""


def snapshot(address: DatabaseAddress) -> list[tuple[Any, ...]]:
    """All that is known of each index of the table and of its partitions."""
    return execute(address, SNAPSHOT)


def names(address: DatabaseAddress) -> set[str]:
    return {row[1] for row in snapshot(address)}


def files(address: DatabaseAddress) -> dict[str, int]:
    """Where the server keeps each index: another file is another build."""
    statement = "SELECT c.relname::text, pg_relation_filenode(c.oid)::bigint FROM pg_class c WHERE c.relkind = 'i'"
    return dict(execute(address, statement))


def invalidate(address: DatabaseAddress, name: str) -> None:
    """What an interrupted CREATE INDEX CONCURRENTLY leaves behind."""
    execute(address, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = to_regclass(%s)", name)


def fill(articles: Articles, rows: int = ROWS, dimensions: int = DIMENSIONS, first: int = 0) -> None:
    """Rows with random vectors."""
    execute(
        articles.address,
        f"INSERT INTO {articles.name} (id, lang, body, embedding) SELECT n, 'en', 'text ' || n, "
        f"(SELECT array_agg(random()) FROM generate_series(1, {dimensions}) WHERE n >= 0)::real[]::vector "
        f"FROM generate_series({first}, {first + rows - 1}) n",
    )


@contextlib.contextmanager
def begun(
    articles: Articles, policy: IndexPolicy = IndexPolicy.KEEP, model: str = "f", dimensions: int = DIMENSIONS
) -> Iterator[tuple[PostgreSQLColumnStore, RunSpec]]:
    """A store in a run, which has written something."""
    target = articles.target()
    store = PostgreSQLColumnStore(articles.address, "test", target)
    with contextlib.closing(store):
        store.prepare(dimensions)
        run = store.begin_run(fingerprint=model, model="m", dimensions=dimensions, wait=0)
        execute(articles.address, "UPDATE kdb_fast_runs SET last_flush = 1 WHERE run = %s", run.number)
        try:
            yield store, run._replace(target=target, indexes=policy)
        finally:
            store.end_run(run.number, "done", {})


def finished(articles: Articles, policy: IndexPolicy = IndexPolicy.KEEP, **options: Any) -> index_policy.IndexOutcome:
    """What became of the indexes at the end of a run."""
    with begun(articles, policy, **options) as (store, run):
        return store.finish_index(no_beat, run)


def no_beat(what: str) -> None:
    pass


OTHERS = """
CREATE INDEX by_lang ON shop.articles (lang);
CREATE INDEX unembedded ON shop.articles (id) WHERE embedding IS NULL;
CREATE INDEX by_length ON shop.articles ((vector_dims(embedding)));
CREATE INDEX words ON shop.articles USING gin (to_tsvector('simple', body));
CREATE INDEX near_other ON shop.articles USING hnsw (other vector_cosine_ops) WHERE embedding IS NOT NULL;
"""
"""Indexes that are not of the column's vectors."""

NOT_OURS = {"articles_pkey", "by_lang", "unembedded", "by_length", "words", "near_other"}

KINDS = {
    "hnsw": "CREATE INDEX near ON shop.articles USING hnsw (embedding vector_cosine_ops);",
    "ivfflat": "CREATE INDEX lists ON shop.articles USING ivfflat (embedding vector_ip_ops) WITH (lists = 3);",
    "every operator class": "".join(
        f"CREATE INDEX near_{name} ON shop.articles USING hnsw (embedding vector_{name}_ops);"
        for name in ("l2", "ip", "cosine", "l1")
    ),
    "parameters, comment and statistics": """
        CREATE INDEX "Near %s you" ON shop.articles USING hnsw (embedding vector_l2_ops)
          WITH (m = 5, ef_construction = 17);
        COMMENT ON INDEX shop."Near %s you" IS 'tuned: 100 % of it''s rows';
        CREATE INDEX halves ON shop.articles USING hnsw ((embedding::halfvec(8)) halfvec_cosine_ops);
        ALTER INDEX shop.halves ALTER COLUMN 1 SET STATISTICS 321;""",
    "partial": """
        CREATE INDEX popular ON shop.articles USING hnsw (embedding vector_cosine_ops)
          WHERE published AND body LIKE '%s 100 %' AND lang = ANY ('{en,de}');
        CREATE INDEX rest ON shop.articles USING ivfflat (embedding vector_l2_ops) WITH (lists = 1)
          WHERE NOT published;""",
    "on expressions": """
        CREATE INDEX head ON shop.articles
          USING hnsw ((subvector(embedding, 1, 4)::halfvec(4)) halfvec_cosine_ops) WITH (m = 8);
        CREATE INDEX bits ON shop.articles USING hnsw ((binary_quantize(embedding)::bit(8)) bit_hamming_ops);
        CREATE INDEX same ON shop.articles USING hnsw ((embedding::vector(8)) vector_l2_ops);""",
}


@pytest.fixture(scope="module")
def shared(postgres: Server) -> Iterator[DatabaseAddress]:
    """One database for all tests here."""
    address = postgres.create_database()
    yield address
    postgres.drop_database(address)


@pytest.fixture
def database(shared: DatabaseAddress) -> Iterator[DatabaseAddress]:
    """It, without a user's tables."""
    yield shared
    ours = execute(shared, "SELECT string_agg(relname, ', ') FROM pg_class WHERE relname ~ '^kdb_.*' AND relkind = 'r'")
    execute(shared, f"DROP SCHEMA IF EXISTS shop CASCADE; DROP TABLE IF EXISTS {ours[0][0]}")


@pytest.fixture
def articles(database: DatabaseAddress) -> Articles:
    return Articles(database, COLUMNS)


# -- dropped and built again -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [IndexPolicy.DEFER, IndexPolicy.KEEP])
def test_indexes_of_the_vectors_are_built_again_exactly_and_no_other_is_touched(
    articles: Articles, policy: IndexPolicy
) -> None:
    execute(articles.address, "".join(KINDS.values()) + OTHERS)
    before, kept = snapshot(articles.address), files(articles.address)
    with begun(articles, policy) as (store, run):
        assert store.drop_index().text == "dropped for the load"
        assert names(articles.address) == NOT_OURS
        fill(articles)
        outcome = store.finish_index(no_beat, run)
    assert outcome.text.startswith("built ")
    assert [warning for warning in outcome.warnings if "lists" not in warning] == []
    assert snapshot(articles.address) == before
    assert {name: files(articles.address)[name] for name in NOT_OURS} == {name: kept[name] for name in NOT_OURS}
    assert execute(articles.address, "SELECT key FROM kdb_fast_state WHERE key LIKE 'dropped%%'") == []
    assert finished(articles).text == "kept"


PARTITIONS = """
CREATE TABLE shop.articles_en PARTITION OF shop.articles FOR VALUES IN ('en');
CREATE TABLE shop.articles_rest PARTITION OF shop.articles DEFAULT;
CREATE INDEX near ON shop.articles USING hnsw (embedding vector_cosine_ops) WITH (m = 7);
CREATE INDEX own ON shop.articles_en USING ivfflat (embedding vector_l2_ops) WITH (lists = 2);
CREATE INDEX by_body ON shop.articles (body);
COMMENT ON INDEX shop.near IS 'of all';
COMMENT ON INDEX shop.articles_en_embedding_idx IS 'of one';
"""


@pytest.fixture
def partitioned(database: DatabaseAddress) -> Articles:
    columns = "id bigint, lang text, body text, embedding vector(8), PRIMARY KEY (id, lang)) PARTITION BY LIST (lang"
    return Articles(database, columns)


@pytest.mark.parametrize("policy", [IndexPolicy.DEFER, IndexPolicy.KEEP])
def test_indexes_of_partitions_are_built_again_exactly(partitioned: Articles, policy: IndexPolicy) -> None:
    execute(partitioned.address, PARTITIONS)
    before = snapshot(partitioned.address)
    with begun(partitioned, policy) as (store, run):
        assert store.drop_index().text == "dropped for the load"
        assert not [row for row in snapshot(partitioned.address) if "hnsw" in row[2] or "ivfflat" in row[2]]
        fill(partitioned)
        assert store.finish_index(no_beat, run).text.startswith("built ")
    assert snapshot(partitioned.address) == before


@pytest.mark.parametrize(
    ("policy", "after"),
    [(IndexPolicy.DEFER, 2), (IndexPolicy.KEEP, 1), (IndexPolicy.KEEP, 3)],
)
def test_a_run_that_is_killed_between_is_completed_by_the_next(
    partitioned: Articles, monkeypatch: pytest.MonkeyPatch, policy: IndexPolicy, after: int
) -> None:
    execute(partitioned.address, PARTITIONS)
    before = snapshot(partitioned.address)
    left = iter(range(1, after))

    def fail(point: str) -> None:
        if point == "store.index_build" and next(left, None) is None:
            raise RuntimeError(point)

    with begun(partitioned, policy) as (store, run):
        store.drop_index()
        fill(partitioned)
        with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
            patch.setattr(index_build, "fault", fail)
            store.finish_index(no_beat, run)
        assert snapshot(partitioned.address) != before
    if after % 2:
        with begun(partitioned, policy) as (store, _):
            store.drop_index()  # a run that loads again remembers both what is there and what was
    assert finished(partitioned, policy).text.startswith("built ")
    assert snapshot(partitioned.address) == before


def test_what_a_build_beside_others_has_left_is_built_again(articles: Articles) -> None:
    execute(articles.address, KINDS["parameters, comment and statistics"])
    before = snapshot(articles.address)
    with begun(articles) as (store, _):
        store.drop_index()
        fill(articles)
    # As CREATE INDEX CONCURRENTLY leaves it where its session is ended: invalid, without its comment.
    (definition,) = [row[2] for row in before if row[1] == "Near %s you"]
    execute(articles.address, definition)
    invalidate(articles.address, 'shop."Near %s you"')
    assert "Near %s you" in finished(articles).text
    assert snapshot(articles.address) == before


def test_an_index_stays_in_its_tablespace(postgres: Server) -> None:
    database = postgres.create_database()
    place = Path(execute(postgres.address, "SHOW data_directory")[0][0]).parent / "a space"
    place.mkdir()
    owner = Path(execute(postgres.address, "SHOW data_directory")[0][0]).stat()
    with contextlib.suppress(PermissionError):
        shutil.chown(place, owner.st_uid, owner.st_gid)
    try:
        execute(postgres.address, f"CREATE TABLESPACE \"a space\" LOCATION '{place}'")
        articles = Articles(database, COLUMNS)
        execute(database, KINDS["hnsw"] + KINDS["on expressions"])
        execute(database, 'ALTER INDEX shop.near SET TABLESPACE "a space"')
        before = snapshot(database)
        assert {row[6] for row in before} == {None, "a space"}
        with begun(articles) as (store, run):
            store.drop_index()
            fill(articles)
            assert store.finish_index(no_beat, run).warnings == ()
        assert snapshot(database) == before
    finally:
        postgres.drop_database(database)
        execute(postgres.address, 'DROP TABLESPACE IF EXISTS "a space"')
        place.rmdir()


def test_an_invalid_index_is_named_and_left_alone(articles: Articles) -> None:
    execute(articles.address, KINDS["hnsw"])
    invalidate(articles.address, "shop.near")
    before = snapshot(articles.address)
    outcome = finished(articles)
    assert outcome.text == "kept"
    (warning,) = outcome.warnings
    assert snapshot(articles.address) == before
    # The remedy that is printed.
    execute(articles.address, warning.partition("uses it: ")[2])
    assert [row[3] for row in snapshot(articles.address) if row[1] == "near"] == [True]


def test_gin_indexes_of_other_columns_of_the_search_table_are_left_alone(database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION IF NOT EXISTS vector")
    with contextlib.closing(PostgreSQLIndexStore(database, "test")) as store:
        store.prepare(DIMENSIONS)
        execute(
            database,
            "ALTER TABLE kdb_search ADD COLUMN tags text[], ADD COLUMN old vector(3); "
            "CREATE INDEX by_tag ON kdb_search USING gin (tags); "
            "CREATE INDEX by_old ON kdb_search USING hnsw (old vector_l2_ops)",
        )
        before = files(database)
        assert store.drop_index().text == "dropped for the load"
        dropped = before.keys() - files(database).keys()
        assert dropped == {"ix_kdb_search_fts", "ix_kdb_search_vector"}
        store.finish_index(no_beat)
        assert files(database).keys() == before.keys()


# -- kept --------------------------------------------------------------------------------------------------


def run_over(articles: Articles, **options: Any) -> Any:
    """A whole run, in this process."""
    target = articles.target()
    source = ArticleSource(articles.address, target)
    return reindex(articles.address, source, ReindexOptions(**options), target=target)


@pytest.fixture
def small_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of ten rows is large enough to drop an index for, and of a thousand seconds."""
    monkeypatch.setattr(index_policy, "DEFER_FLOOR", 10)
    monkeypatch.setattr(index_policy, "LIVE_SECONDS", 100.0)


@pytest.mark.usefixtures("loaded_once", "small_floor")
def test_a_run_keeps_the_index_unless_it_is_asked_to(database: DatabaseAddress) -> None:
    articles = Articles(database, COLUMNS.replace("embedding vector(8)", "embedding vector(384)"))
    execute(database, KINDS["hnsw"])
    articles.add(*mixed_texts(20, longest=40))
    before, kept = snapshot(database), files(database)["near"]
    text = run_over(articles).index
    would_have = "dropped and built again (--index defer) they would have cost about 2000 s less"
    assert text == f"kept: about 20 of 20 rows change; {would_have}"
    assert files(database)["near"] == kept
    assert run_over(articles).index == "kept"
    text = run_over(articles, index="defer", force=True).index
    assert text == "deferred: about 20 of 20 rows change, a quarter or more; built near"
    assert files(database)["near"] != kept
    assert snapshot(database) == before
    execute(database, "UPDATE shop.articles SET body = body || '!' WHERE id < 3")
    assert run_over(articles, index="defer").index == "kept: about 3 of 20 rows change, under a quarter"


def test_lists_are_made_again_after_a_change_of_the_model(articles: Articles) -> None:
    execute(articles.address, KINDS["ivfflat"] + KINDS["hnsw"])
    fill(articles)
    before, first = snapshot(articles.address), files(articles.address)
    assert finished(articles).text == "built again lists for the vectors of this model"
    second = files(articles.address)
    assert second["lists"] != first["lists"]
    assert second["near"] == first["near"]
    assert finished(articles).text == "kept"
    assert finished(articles, IndexPolicy.DEFER).text == "kept"
    assert files(articles.address) == second
    assert finished(articles, IndexPolicy.DEFER, model="g").text.startswith("built again lists")
    assert files(articles.address)["lists"] != second["lists"]
    assert snapshot(articles.address) == before


def test_lists_that_were_made_of_this_models_vectors_are_left_alone(articles: Articles) -> None:
    finished(articles)
    fill(articles)
    execute(articles.address, KINDS["ivfflat"])
    before = files(articles.address)
    assert finished(articles).text == "kept"
    assert files(articles.address) == before
    assert finished(articles, model="g").text.startswith("built again lists")


def test_lists_are_left_alone_while_nothing_was_written(articles: Articles) -> None:
    execute(articles.address, KINDS["ivfflat"])
    with begun(articles) as (store, run):
        execute(articles.address, "UPDATE kdb_fast_runs SET last_flush = 0")
        assert store.finish_index(no_beat, run).text == "kept"
        execute(articles.address, "UPDATE kdb_fast_runs SET last_flush = 1, state = 'abandoned'")
    # That run was killed before its end: the next one does it, though it writes nothing itself.
    with begun(articles) as (store, run):
        execute(articles.address, "UPDATE kdb_fast_runs SET last_flush = 0 WHERE run = %s", run.number)
        assert store.finish_index(no_beat, run).text.startswith("built again lists")


def test_an_index_is_exchanged_beside_its_readers(articles: Articles) -> None:
    execute(articles.address, KINDS["hnsw"] + KINDS["on expressions"])
    fill(articles)
    before, first = snapshot(articles.address), files(articles.address)
    # What a REINDEX CONCURRENTLY that was killed has left behind.
    execute(articles.address, KINDS["hnsw"].replace("near", "near_ccnew"))
    invalidate(articles.address, "shop.near_ccnew")
    text = finished(articles, IndexPolicy.CONCURRENTLY).text
    assert text == "built again bits, head, near, same for the vectors of this model"
    assert snapshot(articles.address) == before
    second = files(articles.address)
    assert all(second[name] != first[name] for name in ("near", "head", "bits", "same"))
    assert finished(articles, IndexPolicy.CONCURRENTLY).text == "kept"
    assert files(articles.address) == second


# -- where there is none -----------------------------------------------------------------------------------


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as there are here are enough for an index."""
    monkeypatch.setattr(index_default, "INDEX_ROWS", ROWS)


DEFAULTS = [
    ("vector(8)", 8, IndexPolicy.KEEP, "hnsw (embedding vector_cosine_ops)"),
    ("vector", 8, IndexPolicy.KEEP, "hnsw (((embedding)::vector(8)) vector_cosine_ops)"),
    ("halfvec", 8, IndexPolicy.CONCURRENTLY, "hnsw (((embedding)::halfvec(8)) halfvec_cosine_ops)"),
    ("vector(2001)", 2001, IndexPolicy.DEFER, "hnsw (((embedding)::halfvec(2001)) halfvec_cosine_ops)"),
    ("halfvec(2001)", 2001, IndexPolicy.KEEP, "hnsw (embedding halfvec_cosine_ops)"),
]


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(("kind", "dimensions", "policy", "using"), DEFAULTS)
def test_a_table_without_an_index_gets_one(
    database: DatabaseAddress, kind: str, dimensions: int, policy: IndexPolicy, using: str
) -> None:
    articles = Articles(database, COLUMNS.replace("embedding vector(8)", f"embedding {kind}"))
    fill(articles, ROWS - 1, dimensions)
    shown = "no index of shop.articles.embedding"
    assert finished(articles, policy, dimensions=dimensions).text == f"{shown}: one is made from {ROWS} rows on"
    fill(articles, 1, dimensions, first=ROWS)
    assert finished(articles, IndexPolicy.NONE, dimensions=dimensions).text == f"{shown}: --index none"
    text = finished(articles, policy, dimensions=dimensions).text
    assert text == "built articles_embedding_idx (HNSW for the cosine, since there was none)"
    (made,) = [row for row in snapshot(database) if row[1] == "articles_embedding_idx"]
    assert made[2].endswith(using)
    assert made[3]
    assert finished(articles, policy, dimensions=dimensions).text == "kept"


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("policy", [IndexPolicy.KEEP, IndexPolicy.DEFER])
def test_each_partition_gets_its_part_of_the_new_index(
    partitioned: Articles, monkeypatch: pytest.MonkeyPatch, policy: IndexPolicy
) -> None:
    execute(partitioned.address, PARTITIONS.partition("CREATE INDEX")[0])
    fill(partitioned)
    built = iter(range(2))

    def fail(point: str) -> None:
        if point == "store.index_build" and next(built, None) is None:
            raise RuntimeError(point)

    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr(index_build, "fault", fail)
        finished(partitioned, policy)
    finished(partitioned, policy)
    found = {row[1]: row for row in snapshot(partitioned.address) if "hnsw" in row[2]}
    assert set(found) == {"articles_embedding_idx", "articles_en_embedding_idx", "articles_rest_embedding_idx"}
    assert all(row[3] for row in found.values())
    assert finished(partitioned, policy).text == "kept"


@pytest.mark.usefixtures("few_rows")
def test_vectors_that_no_index_holds_get_none(database: DatabaseAddress) -> None:
    articles = Articles(database, COLUMNS.replace("embedding vector(8)", "embedding vector"))
    fill(articles)
    execute(database, "UPDATE shop.articles SET embedding = '[1,2]' WHERE id = 5")
    shown = "no index of shop.articles.embedding"
    assert finished(articles).text == f"{shown}: embedding holds vectors of 2 numbers beside those of 8"
    outcome = finished(articles, dimensions=4001)
    assert outcome.text == f"{shown}: an index of pgvector holds at most 4,000 numbers, and a vector has 4,001"


@pytest.mark.usefixtures("few_rows")
def test_a_table_of_vectors_gets_one_and_has_it_built_again(articles: Articles) -> None:
    target = articles.into()
    with contextlib.closing(PostgreSQLTableStore(articles.address, "test", target)) as store:
        assert store.default_index is IndexPolicy.DEFER
        store.prepare(DIMENSIONS)
        run = store.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=0)._replace(target=target)
        assert not store.has_vector_index
        text = store.finish_index(no_beat, run).text
        assert text == f"no index of {target.shown}.embedding: one is made from {ROWS} rows on"
        fill(articles)
        execute(
            articles.address,
            f"INSERT INTO {target.shown} SELECT id, embedding, '', '', 'f', 1, now() FROM shop.articles",
        )
        assert store.finish_index(no_beat, run).text.startswith("built article_vectors_embedding_idx (HNSW")
        execute(articles.address, f"CREATE INDEX lists ON {target.shown} USING ivfflat (embedding vector_l2_ops)")
        statement = "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = to_regclass(%s) ORDER BY 1"
        before = execute(articles.address, statement, target.shown)
        assert len(before) == 3
    with contextlib.closing(PostgreSQLTableStore(articles.address, "test", target)) as store:
        assert store.has_vector_index
        assert store.drop_index().text == "dropped for the load"
        assert len(execute(articles.address, statement, target.shown)) == 1
        assert store.finish_index(no_beat, run).text == "built article_vectors_embedding_idx, lists"
    assert execute(articles.address, statement, target.shown) == before


# -- rights and locks --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_rows")
def test_a_role_that_does_not_own_the_table_is_told_before_or_gets_the_statement(
    postgres: Server, articles: Articles
) -> None:
    role = postgres.create_role(articles.address, "ALL ON SCHEMA public", "USAGE ON SCHEMA shop")
    user = role_name(role)
    execute(articles.address, f"GRANT SELECT, UPDATE (embedding) ON shop.articles TO {user}")
    fill(articles)
    theirs = Articles(role, make=False)
    target = theirs.target()
    with contextlib.closing(PostgreSQLColumnStore(role, "test", target)) as store:
        store.prepare(DIMENSIONS)
        for policy in (IndexPolicy.KEEP, IndexPolicy.NONE):
            assert store.check_index(policy) == ()
        for policy in (IndexPolicy.DEFER, IndexPolicy.CONCURRENTLY):
            with pytest.raises(SchemaError, match=r"this role does not own shop\.articles") as caught:
                store.check_index(policy)
        run = store.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=0)
        run = run._replace(indexes=IndexPolicy.KEEP)
        outcome = store.finish_index(no_beat, run)
        assert outcome.text == "not built: this role does not own shop.articles"
        assert [row[1] for row in snapshot(articles.address)] == ["articles_pkey"]
        execute(articles.address, outcome.warnings[0].removeprefix("Let the owner run: "))
        assert store.finish_index(no_beat, run).text == "kept"
        assert "GRANT postgres TO " + user in caught.value.remedy
        execute(articles.address, f"GRANT ALL ON SCHEMA shop TO {user}; ALTER TABLE shop.articles OWNER TO {user}")
        assert store.check_index(IndexPolicy.DEFER) == ()
    execute(articles.address, "DROP TABLE shop.articles")


def test_who_holds_the_table_is_named(articles: Articles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pg_index, "DROP_PATIENCE_MS", 50)
    execute(articles.address, KINDS["hnsw"])
    before = snapshot(articles.address)
    with begun(articles) as (store, _), psycopg.connect(articles.address.conninfo, application_name="shop") as other:
        other.execute("SELECT FROM shop.articles")
        store.session._retry_seconds = 0.0
        outcome = store.drop_index()
    assert outcome.text == "kept: another session is using shop.articles, so the index could not be dropped"
    assert "application shop" in outcome.warnings[0]
    assert "holds shop.articles" in outcome.warnings[0]
    assert snapshot(articles.address) == before


@pytest.mark.usefixtures("few_rows")
def test_a_build_that_must_wait_too_long_names_whom_for_and_is_completed_later(
    articles: Articles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_session, "CONCURRENT_PATIENCE", "50ms")
    monkeypatch.setattr(index_build, "CLEAR_PATIENCE", "50ms")
    fill(articles)
    with begun(articles) as (store, run), psycopg.connect(articles.address.conninfo, application_name="shop") as other:
        other.execute("UPDATE shop.articles SET body = 'x' WHERE id = 1")
        store.session._retry_seconds = 0.0
        assert re.search(
            r"^not built: .*application shop.* holds shop\.articles, .*; the next run builds what is missing$",
            store.finish_index(no_beat, run).text,
        )
        store.session._limits = "SET LOCAL lock_timeout = 50"
        with pytest.raises(DatabaseError, match=r"could not be built: .*application shop.* holds shop\.articles"):
            store.finish_index(no_beat, run._replace(indexes=IndexPolicy.DEFER))
        other.rollback()
    assert finished(articles).text == "built articles_embedding_idx"
    assert [row[3] for row in snapshot(articles.address)] == [True, True]


def test_sqlite_says_that_it_has_no_index(sqlite_database: DatabaseAddress) -> None:
    from kdb_fast.stores import open_store

    articles = Articles(sqlite_database)
    with contextlib.closing(open_store(sqlite_database, "test", target=articles.target())) as store:
        assert store.check_index(IndexPolicy.DEFER) == (
            "SQLite has no index of vectors; --index defer changes nothing.",
        )
