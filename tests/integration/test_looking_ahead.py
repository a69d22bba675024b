"""While the database looks for the records of a page the next one is read: what can go wrong, on real databases."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from pooler import pooler
from proxy import CUT_AFTER, CUT_BEFORE, FORWARD, Proxy, nth_request
from servers import ListSource, execute, records_of

from kdb_fast.db import pg_settings
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import DatabaseError, KdbFastError, StoppedError, UsageError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.ipc.beside import beside
from kdb_fast.receipt import Receipt
from kdb_fast.records import Record, Reject, content_hash
from kdb_fast.settings import ReindexOptions
from kdb_fast.stores import open_store
from kdb_fast.stores.base import Found
from kdb_fast.stores.sqlite.index_store import SQLiteIndexStore

pytestmark = pytest.mark.usefixtures("loaded_once")

ROWS, PAGE = 60, 10
RECORDS = records_of([f"text {number}" for number in range(ROWS)])

LOOK_UP = b"AS compared"


def run(address: DatabaseAddress, source: ListSource | None = None) -> Receipt:
    return reindex(address, source or ListSource(RECORDS, page_rows=PAGE), ReindexOptions())


@pytest.fixture
def sqlite_database(tmp_path: Path) -> DatabaseAddress:
    path = tmp_path / "index.db"
    path.touch()
    return DatabaseAddress("sqlite", str(path), f"sqlite:///{path}")


@pytest.fixture
def filled(database: DatabaseAddress) -> DatabaseAddress:
    """A database in which all records are indexed."""
    execute(database, "CREATE EXTENSION vector")
    run(database)
    return database


@pytest.mark.parametrize("n", [1, 3, ROWS // PAGE])
@pytest.mark.parametrize("what", [CUT_BEFORE, CUT_AFTER, "strand"])
def test_a_connection_lost_in_a_look_up(
    filled: DatabaseAddress, monkeypatch: pytest.MonkeyPatch, what: str, n: int
) -> None:
    monkeypatch.setenv("KDB_FAST_SILENCE", "0.5")
    with Proxy(filled) as proxy:
        decide = nth_request(LOOK_UP, n, what)

        def request(data: bytes) -> str:
            if (found := decide(data)) != "strand":
                return found
            proxy.strand()
            return FORWARD

        proxy.on_request = request
        receipt = run(proxy.address)
        assert proxy.cuts >= 1
        assert decide.hits == ROWS // PAGE + 1  # type: ignore[attr-defined]
    assert (receipt.read, receipt.unchanged) == (ROWS, ROWS)


def test_a_pipeline_that_cannot_be_sent_without_waiting_is_waited_for() -> None:
    """As that of a psycopg whose private halves are others."""
    pipeline = Mock(spec_set=["sync"])
    pg_settings._end_of_pipeline(Mock(spec_set=()), pipeline)
    pipeline.sync.assert_called_once_with()


def test_a_session_ended_while_the_next_page_is_read(filled: DatabaseAddress) -> None:
    ended: list[int] = []

    def between(page: int) -> None:
        found = execute(
            filled,
            "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'kdb-fast/parent' AND datname = current_database()",
        )
        ended.extend(pid for pid, _ in found)

    receipt = run(filled, ListSource(RECORDS, page_rows=PAGE, between=between))
    assert len(set(ended)) > 1
    assert receipt.unchanged == ROWS


class _Failing(ListSource):
    """Fails behind its third page."""

    def pages(self) -> Iterator[list[Record | Reject]]:
        for number, page in enumerate(super().pages()):
            if number == 3:
                raise UsageError("The input is broken.")
            yield page


def test_an_error_of_the_source_leaves_nothing_under_way(index: DatabaseAddress) -> None:
    run(index)
    with pytest.raises(UsageError, match=r"The input is broken\.") as caught:
        run(index, _Failing(RECORDS, page_rows=PAGE))
    receipt = caught.value.receipt
    assert receipt is not None
    # The page before the error was looked up, and not taken in.
    assert (receipt.state, receipt.read, receipt.unchanged) == ("failed", 2 * PAGE, 2 * PAGE)
    assert execute(index, "SELECT state FROM kdb_fast_runs ORDER BY run") == [("done",), ("failed",)]
    assert run(index).unchanged == ROWS


def test_an_error_of_a_look_up_ends_the_run(index: DatabaseAddress) -> None:
    run(index)

    def between(page: int) -> None:
        if page == 2:
            execute(index, "ALTER TABLE kdb_search RENAME TO elsewhere")

    with pytest.raises(KdbFastError, match="kdb_search") as caught:
        run(index, ListSource(RECORDS, page_rows=PAGE, between=between))
    assert caught.value.receipt is not None
    assert caught.value.receipt.read in (2 * PAGE, 3 * PAGE)
    execute(index, "ALTER TABLE elsewhere RENAME TO kdb_search")
    assert run(index).unchanged == ROWS


def test_a_look_up_that_waits_is_ended_at_once_by_a_second_signal(filled: DatabaseAddress) -> None:
    stop, locked = threading.Event(), threading.Event()

    def hold() -> None:
        """Lock the table for as long as the run goes on."""
        import psycopg

        with psycopg.connect(filled.conninfo) as connection:
            connection.execute("LOCK TABLE kdb_search IN ACCESS EXCLUSIVE MODE")
            locked.set()
            stop.wait(20)

    holder = threading.Thread(target=hold)

    def between(page: int) -> None:
        if page == 2:
            holder.start()
            assert locked.wait(10)
            for seconds in (0.2, 1.0):
                threading.Timer(seconds, partial(os.kill, os.getpid(), signal.SIGINT)).start()

    with pytest.raises(StoppedError, match="Stopped at once") as caught:
        run(filled, ListSource(RECORDS, page_rows=PAGE, between=between))
    stop.set()
    holder.join(10)
    receipt = caught.value.receipt
    assert receipt is not None
    assert (receipt.state, receipt.unchanged) == ("stopped", 3 * PAGE)
    assert execute(filled, "SELECT state FROM kdb_fast_runs ORDER BY run") == [("done",), ("stopped",)]
    assert run(filled).unchanged == ROWS


def test_a_database_that_does_not_come_back_is_named(filled: DatabaseAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDB_FAST_PATIENCE", "1")
    with Proxy(filled) as proxy:

        def request(data: bytes) -> str:
            return CUT_BEFORE if LOOK_UP in data else FORWARD

        proxy.on_request = request
        with pytest.raises(DatabaseError, match="looking up what is stored"):
            run(proxy.address)


def test_an_sqlite_that_takes_few_parameters_is_asked_more_often(sqlite_database: DatabaseAddress) -> None:
    run(sqlite_database)
    store = open_store(sqlite_database, "test")
    assert isinstance(store, SQLiteIndexStore)
    with contextlib.closing(store):
        (fingerprint,) = execute(sqlite_database, "SELECT DISTINCT kdb_fast_fingerprint FROM kdb_search")[0]
        statements: list[str] = []
        store._connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 50)
        store._connection.set_trace_callback(statements.append)
        records = [*RECORDS[:40], RECORDS[40]._replace(content="another"), Record(("Note", "new"), "new"), RECORDS[41]]
        answer = store.compare(records, [content_hash(record.content) for record in records], fingerprint)
        found = answer if isinstance(answer, Found) else answer()
    assert sum(statement.startswith("WITH") for statement in statements) == 3
    assert set(found.unchanged) == {*range(40), 42}
    assert {key: row.content_hash for key, row in found.rows.items()} == {
        RECORDS[40].key: content_hash(RECORDS[40].content)
    }


def test_a_call_beside_gives_its_result_or_its_error() -> None:
    assert beside(lambda: threading.current_thread().name, "look-up")() == "look-up"

    def fail() -> None:
        raise UsageError("It failed.")

    with pytest.raises(UsageError, match=r"It failed\."):
        beside(fail, "look-up")()


@pytest.mark.parametrize(("mode", "sessions"), [("transaction", 1), ("session", 6)])
def test_a_look_up_holds_no_session_of_a_pooler(filled: DatabaseAddress, mode: str, sessions: int) -> None:
    records = [record._replace(content=f"{record.content}, changed") for record in RECORDS[::2]] + RECORDS[1::2]

    with pooler(filled, mode, sessions) as address:

        def between(page: int) -> None:
            assert execute(address, "SELECT 1") == [(1,)]  # as a source reads, while a page is looked up

        receipt = run(address, ListSource(records, page_rows=PAGE, between=between))
        assert (receipt.stored, receipt.unchanged) == (ROWS // 2, ROWS // 2)
        assert run(address, ListSource(records, page_rows=PAGE, between=between)).unchanged == ROWS
