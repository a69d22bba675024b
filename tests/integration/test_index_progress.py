"""What is told of an index that takes long to build: before, whether it fits into memory; meanwhile, how far it is."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import psycopg
import pytest
from articles import Articles
from servers import execute

from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.stores.postgresql import index_progress, index_session
from kdb_fast.stores.postgresql.column_store import PostgreSQLColumnStore
from kdb_fast.stores.postgresql.index_progress import BuildEstimate, watched
from kdb_fast.tables.index_policy import IndexAction, IndexPolicy

COLUMNS = "id bigint PRIMARY KEY, lang text, body text, embedding vector(64)"
ROWS = 11_000


@pytest.fixture
def articles(database: DatabaseAddress) -> Articles:
    """A table that gets an index: it has rows enough and none."""
    articles = Articles(database, COLUMNS)
    execute(
        database,
        f"INSERT INTO {articles.name} SELECT n, 'en', 'text ' || n, (SELECT array_agg(random()) "
        f"FROM generate_series(1, 64) WHERE n >= 0)::real[]::vector FROM generate_series(1, {ROWS}) n",
    )
    return articles


def test_the_build_of_an_index_tells_how_far_it_is(
    articles: Articles, monkeypatch: pytest.MonkeyPatch, new_threads: Callable[[str], list[threading.Thread]]
) -> None:
    monkeypatch.setattr(index_progress, "ASK_SECONDS", 0.02)
    told: list[str] = []
    store = PostgreSQLColumnStore(articles.address, "test", target := articles.target())
    store.prepare(64)
    run = store.begin_run(fingerprint="f", model="m", dimensions=64, wait=0)._replace(target=target)
    outcome = store.finish_index(told.append, run)
    store.close()
    assert outcome.action is IndexAction.BUILT
    shares = [int(found[1]) for line in told if (found := re.fullmatch(r"building \S+_idx: (\d+)%.*", line))]
    assert shares
    assert shares == sorted(shares)
    assert any(line.endswith(" left") for line in told)
    assert not new_threads("index progress")


def test_a_build_on_a_server_that_is_away_tells_nothing_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_progress, "ASK_SECONDS", 0.01)
    asked = threading.Event()

    def refuse(address: DatabaseAddress, role: str) -> None:
        asked.set()
        raise OSError("away")

    monkeypatch.setattr(index_progress, "connect_postgresql", refuse)
    told: list[str] = []
    with watched(parse_address("postgresql://nowhere.invalid/x"), ("public", "t"), "building t_idx", told.append):
        assert asked.wait(5)
    assert told == []


def left(estimate: BuildEstimate) -> float | None:
    return estimate.seconds_left


def test_the_time_left_follows_the_last_minute_and_begins_anew_with_another_stage() -> None:
    estimate = BuildEstimate()
    estimate.take(0, 1000, 0.0)
    assert left(estimate) is None
    estimate.take(500, 1000, 10.0)
    assert (estimate.share, left(estimate)) == (0.5, 10.0)
    for second in range(11, 111):
        estimate.take(500 + (second - 10), 1000, float(second))
    assert left(estimate) == pytest.approx(400.0, rel=0.02)
    estimate.take(3, 77, 111.0)
    assert left(estimate) is None


@pytest.mark.parametrize(("kind", "megabytes"), [("vector(384)", 2_252), ("halfvec(384)", 1_483)])
def test_the_memory_of_a_build_is_what_was_measured_and_a_little_more(
    database: DatabaseAddress, kind: str, megabytes: int
) -> None:
    execute(database, "CREATE EXTENSION IF NOT EXISTS vector")
    execute(database, f"CREATE TABLE measured (id bigint, v {kind})")
    with psycopg.connect(database.conninfo) as connection, connection.cursor() as cursor:
        memory = index_session.build_memory(cursor, ("public", "measured"), "v", 384, 1_000_000)
    assert megabytes * 1_000_000 < memory.needed < megabytes * 1_100_000


def test_a_graph_that_will_not_fit_into_memory_is_said_before_anything_is_embedded(
    articles: Articles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_session, "available_memory", lambda: 2 << 30)
    store = PostgreSQLColumnStore(articles.address, "test", target := articles.target())
    store.prepare(64)
    run = store.begin_run(fingerprint="f", model="m", dimensions=64, wait=0)._replace(target=target)
    (note,) = (text for text in store.forecast(run, 1_000_000) if "index" in text)
    assert "An index of 1,000,000 vectors needs about 1,042 MB" in note
    assert "a quarter of this machine's free memory is 537 MB, which holds about 515,4" in note
    execute(articles.address, note[note.index("ALTER ROLE") :])
    try:
        store.close()
        store = PostgreSQLColumnStore(articles.address, "test", target)
        assert not [text for text in store.forecast(run, 1_000_000) if "index" in text], (
            "with the memory that was named"
        )
        assert not [text for text in store.forecast(run, 20_000) if "index" in text]
        none = run._replace(indexes=IndexPolicy.NONE)
        assert not [text for text in store.forecast(none, 10_000_000) if "index" in text]
    finally:
        execute(articles.address, "ALTER ROLE CURRENT_USER RESET maintenance_work_mem")
        store.close()
