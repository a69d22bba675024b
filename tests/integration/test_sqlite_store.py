"""What only SQLiteIndexStore does: full text and copies of vectors beside the rows, files, locks, a connection lent.

What every store does is in ``test_store_contract.py``.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from store_harness import (
    DIMENSIONS,
    SQLiteHarness,
    begin,
    end,
    flush,
    fresh,
    harness_of,
    lookup,
    numbered,
    products_of,
    put,
    slot_of,
    write,
)

from kdb_fast.catalog.records import live_rows
from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.errors import DatabaseError, ResourceError
from kdb_fast.records import content_hash
from kdb_fast.stores.sqlite import store as sqlite_store
from kdb_fast.stores.sqlite.index_store import SQLiteIndexStore


@pytest.fixture
def empty(request: pytest.FixtureRequest) -> Iterator[SQLiteHarness]:
    """A store on an empty file."""
    with harness_of(SQLiteHarness, request) as harness:
        yield harness


@pytest.fixture
def index(empty: SQLiteHarness) -> Iterator[SQLiteHarness]:
    """A store that is prepared; after the test full text and copies of vectors must be in step with the rows."""
    empty.store.prepare(DIMENSIONS)
    yield empty
    empty.check()


def connection_of(index: SQLiteHarness) -> sqlite3.Connection:
    """The store's own connection."""
    assert isinstance(index.store, SQLiteIndexStore)
    return index.store._connection


# -- rows and what stands beside them ----------------------------------------------------------------------


def test_a_new_row_has_its_vector_as_text_and_as_a_copy(index: SQLiteHarness) -> None:
    slot = slot_of(fresh(("a", "first words")))
    slot.slot.source_at[0] = 1_700_000_000_123_456
    flush(index.store, begin(index.store), slot)
    ((embedding, updated, source),) = index.execute("SELECT embedding, updated_at, kdb_fast_source_at FROM kdb_search")
    assert isinstance(embedding, str)
    assert json.loads(embedding) == pytest.approx(slot.slot.vectors[0].tolist(), abs=1e-8)
    assert source == "2023-11-14 22:13:20.123456"
    ((stored_at, vector),) = index.execute("SELECT at, vector FROM kdb_fast_vectors")
    assert stored_at == updated
    assert np.frombuffer(vector, "<f4").tolist() == slot.slot.vectors[0].tolist()


def test_copies_of_vectors_leave_with_their_rows(index: SQLiteHarness) -> None:
    run = begin(index.store)
    write(index.store, run, numbered(10))
    write(index.store, run, {"new": "more"}, deletes=["r003", "r004"])
    assert index.execute("SELECT count(*) FROM kdb_fast_vectors") == [(9,)]
    with index.index_store.transaction():
        put(index.index_store, {"r000": "plain", "bare": "plain"}, vectors=False)
    assert index.execute("SELECT count(*) FROM kdb_fast_vectors") == [(8,)]


def test_text_that_is_not_valid_utf8_can_be_looked_up_and_replaced(index: SQLiteHarness) -> None:
    index.connection.execute(
        "INSERT INTO kdb_search (id, entity_name, record_id, content) VALUES ('i', 'Note', 'a', CAST(x'ff41' AS TEXT))"
    )
    assert lookup(index.store, "a")["a"].content_hash != content_hash("A")
    assert write(index.store, begin(index.store), {"a": "mended"}).rows == 1
    assert index.contents() == {"a": "mended"}


def test_a_row_with_the_same_text_leaves_the_full_text_table_alone(index: SQLiteHarness) -> None:
    run = begin(index.store)
    write(index.store, run, numbered(20))
    statements: list[str] = []
    connection_of(index).set_trace_callback(lambda s: statements.append(s.replace(chr(34), "")))
    assert write(index.store, run, numbered(20)).rows == 20
    connection_of(index).set_trace_callback(None)
    assert any(s.startswith("UPDATE kdb_search SET") for s in statements)
    assert not [s for s in statements if "kdb_search_fts" in s and not s.startswith(("SELECT", "--"))]


def test_the_later_of_two_rows_with_one_key_wins(index: SQLiteHarness) -> None:
    run = begin(index.store)
    assert flush(index.store, run, slot_of(fresh(("a", "one"), ("b", "two"), ("a", "three")))).rows == 3
    assert index.contents() == {"a": "three", "b": "two"}
    assert flush(index.store, run, slot_of(fresh(("a", "four")))).rows == 1
    assert index.contents() == {"a": "four", "b": "two"}


def test_full_text_rows_are_found_though_every_rowid_differs(index: SQLiteHarness) -> None:
    index.connection.execute("INSERT INTO kdb_search_fts(rowid, id) VALUES (3, 'in the way')")
    for i in range(30):
        index.index(f"r{i:03d}", f"theirs number{i}")
    index.connection.execute("DELETE FROM kdb_search_fts WHERE id = 'in the way'")
    run = begin(index.store)
    for word in ("one", "two"):
        assert write(index.store, run, numbered(31, word)).rows == 31
        index.check()
        index.index("r005", "moved")
        index.index("r006", "moved without its text", full_text=False)
    assert write(index.store, run, numbered(31, "three")).rows == 31


def test_full_text_rows_without_a_row_are_removed(index: SQLiteHarness) -> None:
    with products_of(index.address) as (_, ids):
        pass
    write(index.store, begin(index.store), dict.fromkeys(ids, "thing"), entity="Product")
    index.connection.execute("DELETE FROM kdb_search WHERE record_id = ?", (ids[4],))
    index.connection.execute("DELETE FROM kdb_fast_vectors WHERE search_rowid = 5")
    assert len(index.matching("thing")) == 8
    assert index.store.prune("Product", live_rows) == 0
    assert len(index.matching("thing")) == 7


def test_no_vector_index_is_dropped_built_or_missed(index: SQLiteHarness) -> None:
    assert index.store.drop_index().text == "none"
    outcome = index.store.finish_index(lambda doing: None)
    assert (outcome.text, outcome.warnings) == ("exact search on SQLite, no vector index", ())


# -- preparing ---------------------------------------------------------------------------------------------


def test_a_table_that_was_moved_away_keeps_its_indexes_and_the_new_one_gets_its_own(index: SQLiteHarness) -> None:
    index.connection.execute("ALTER TABLE kdb_search RENAME TO kdb_search_old")
    for _ in range(2):
        index.store.prepare(DIMENSIONS)
        found = index.execute("SELECT tbl_name, name FROM sqlite_master WHERE name LIKE 'ix%' ORDER BY 1, 2")
        assert found == [
            ("kdb_search", "ix_kdb_search_entity1"), ("kdb_search", "ix_kdb_search_record1"),
            ("kdb_search_old", "ix_kdb_search_entity"), ("kdb_search_old", "ix_kdb_search_record"),
        ]  # fmt: skip


def test_a_table_without_full_text_search_gets_it_with_all_its_rows(empty: SQLiteHarness) -> None:
    empty.execute(empty.bare_table)
    empty.execute("INSERT INTO kdb_search (id, entity_name, record_id, content) VALUES ('i','e','r','word')")
    empty.store.prepare(DIMENSIONS)
    assert empty.matching("word") == ["r"]
    empty.check()


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="There is no SQLite file"):
        SQLiteIndexStore.open(parse_address(f"sqlite:///{tmp_path / 'nowhere.db'}"))


# -- files and locks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "wal"])
def test_the_journal_mode_stays_as_the_owner_has_it(sqlite_database: DatabaseAddress, mode: str) -> None:
    path = Path(sqlite_database.conninfo)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
    index = SQLiteHarness(sqlite_database)
    with index.stack:
        index.store.prepare(DIMENSIONS)
        run = begin(index.store)
        assert write(index.store, run, numbered(40)).rows == 40
        end(index.store, run)
        # Of the modes, only that of a write-ahead log is kept in the file.
        assert index.execute("PRAGMA journal_mode") == [("wal" if mode == "wal" else "delete",)]
    assert [file.name for file in path.parent.iterdir()] == ["index.db"]


def cache_kib(connection: sqlite3.Connection) -> int:
    (size,) = connection.execute("PRAGMA cache_size").fetchone()
    return -int(size)


def pages_read() -> int:
    """System calls of this process that read; SQLite reads a page of the file with one."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["syscr"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no count of this process's reads")
def test_a_flush_reads_no_page_again_for_each_row_however_many_it_changes(
    index: SQLiteHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "CACHE_KIB", 64)  # 16 pages, where a flush changes hundreds
    run = begin(index.store)
    write(index.store, run, numbered(300))
    before = pages_read()
    write(index.store, run, numbered(300, "other"))
    once = pages_read() - before
    monkeypatch.setattr(sqlite_store, "FLUSH_CACHE_KIB", 64)
    write(index.store, run, numbered(300, "third"))
    again = pages_read() - before - once
    assert once < 300 < again
    assert cache_kib(connection_of(index)) == 64


def test_the_page_cache_of_a_connection_that_is_lent_stays_as_it_is(index: SQLiteHarness) -> None:
    with contextlib.closing(sqlite3.connect(index.address.conninfo, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = -100")
        store = SQLiteIndexStore(connection)
        run = begin(store)
        seen: list[int] = []
        connection.create_function("seen", 0, lambda: seen.append(cache_kib(connection)))
        connection.execute("CREATE TEMP TRIGGER looks AFTER INSERT ON main.kdb_search BEGIN SELECT seen(); END")
        assert write(store, run, numbered(2)).rows == 2
        end(store, run)
        assert [*seen, cache_kib(connection)] == [100, 100, 100]


def test_a_flush_waits_for_readers_of_a_file_without_a_write_ahead_log(index: SQLiteHarness) -> None:
    run = begin(index.store)
    write(index.store, run, numbered(9))
    reader = sqlite3.connect(index.address.conninfo, isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM kdb_search").fetchone() == (9,)
    ended = threading.Timer(0.5, lambda: reader.execute("COMMIT"))
    ended.start()
    assert write(index.store, run, numbered(20)).rows == 20
    ended.join()
    reader.close()


def test_a_heartbeat_leaves_the_time_that_the_store_waits_for_locks(index: SQLiteHarness) -> None:
    index.store.heartbeat(begin(index.store).number, "embed")
    assert connection_of(index).execute("PRAGMA busy_timeout").fetchone() == (30_000,)


def test_a_database_locked_for_too_long_is_a_database_error_and_nothing_is_written(index: SQLiteHarness) -> None:
    run = begin(index.store)
    connection_of(index).execute("PRAGMA busy_timeout = 10")
    index.connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="locked"):
        write(index.store, run, {"a": "text"})
    index.connection.execute("ROLLBACK")
    assert write(index.store, run, {"a": "text"}).rows == 1


def test_a_full_disk_takes_back_the_whole_flush_and_it_can_be_repeated(index: SQLiteHarness) -> None:
    run = begin(index.store)
    write(index.store, run, {"a": "text"})
    (pages,) = connection_of(index).execute("PRAGMA page_count").fetchone()
    connection_of(index).execute(f"PRAGMA max_page_count = {pages + 3}")
    large = {key: text + " word" * 500 for key, text in numbered(60).items()}
    with pytest.raises(ResourceError, match="disk is full"):
        write(index.store, run, large)
    assert not connection_of(index).in_transaction
    assert index.contents() == {"a": "text"}
    assert cache_kib(connection_of(index)) == sqlite_store.CACHE_KIB
    connection_of(index).execute("PRAGMA max_page_count = 1000000")
    assert write(index.store, run, large).rows == 60


def test_a_trigger_that_rolls_everything_back_ends_the_flush_with_nothing_written(index: SQLiteHarness) -> None:
    run = begin(index.store)
    index.connection.execute(
        "CREATE TRIGGER all_back BEFORE INSERT ON kdb_search WHEN NEW.record_id = 'r002' "
        "BEGIN SELECT RAISE(ROLLBACK, 'away'); END"
    )
    with pytest.raises(DatabaseError, match="away"):
        write(index.store, run, numbered(4))
    assert index.store.count() == 0
    index.connection.execute("DROP TRIGGER all_back")
    assert write(index.store, run, numbered(4)).rows == 4


# -- the caller's connection -------------------------------------------------------------------------------


def test_an_open_connection_in_memory_serves_and_stays_open() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        store = SQLiteIndexStore(connection)
        store.prepare(DIMENSIONS)
        run = begin(store)
        assert write(store, run, {"a": "text"}).rows == 1
        store.heartbeat(run.number, "embed")
        end(store, run)
        store.close()
        assert not connection.in_transaction
        assert connection.execute("SELECT record_id FROM kdb_search").fetchall() == [("a",)]


def put_one(store: SQLiteIndexStore, key: str, failure: type[Exception] | None = None) -> None:
    with store.transaction():
        put(store, {key: "text"})
        if failure is not None:
            raise failure


def test_a_unit_within_the_callers_transaction_is_committed_or_rolled_back_with_it(index: SQLiteHarness) -> None:
    with contextlib.closing(sqlite3.connect(index.address.conninfo)) as connection:
        store = SQLiteIndexStore(connection)
        for finish, expected in ((connection.rollback, {}), (connection.commit, {"a": "text"})):
            connection.execute("INSERT OR REPLACE INTO kdb_fast_state VALUES ('of', 'the caller')")
            assert connection.in_transaction
            put_one(store, "a")
            with pytest.raises(KeyError):
                put_one(store, "b", KeyError)
            assert index.contents() == {}
            finish()
            assert index.contents() == expected
