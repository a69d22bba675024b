"""The search index in SQLite: real files, the real KameleonDB package, and programs that write in between."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdb_fast.catalog.records import live_rows
from kdb_fast.db.address import parse_address
from kdb_fast.errors import DatabaseError, LockedError, RecordError, ResourceError, SchemaError
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record, Reject, content_hash
from kdb_fast.stores.base import FlushResult, FlushSlot, RunSpec, Stored
from kdb_fast.stores.sqlite.store import SQLiteStore

DIMENSIONS = 8

KAMELEON_TABLES = """
CREATE TABLE kdb_search (
  id TEXT PRIMARY KEY, entity_name TEXT NOT NULL, record_id TEXT NOT NULL, content TEXT NOT NULL, embedding BLOB,
  model TEXT, dimensions INTEGER, created_at TEXT NOT NULL DEFAULT (datetime('now')), updated_at TEXT,
  UNIQUE(entity_name, record_id)
);
CREATE INDEX ix_kdb_search_entity ON kdb_search(entity_name);
CREATE INDEX ix_kdb_search_record ON kdb_search(record_id);
"""
KAMELEON_FTS = """
CREATE VIRTUAL TABLE kdb_search_fts USING fts5(
  id UNINDEXED, entity_name, record_id UNINDEXED, content, tokenize='porter unicode61');
"""


class KameleonDB:
    """Another program that writes the index, with the statements of KameleonDB."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)

    def index(self, record_id: str, content: str, entity: str = "note", *, fts: bool = True) -> None:
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        key = (entity, record_id)
        found = execute("SELECT id FROM kdb_search WHERE entity_name = ? AND record_id = ?", key).fetchone()
        if found:
            execute(
                "UPDATE kdb_search SET content = ?, embedding = '[1.0]', updated_at = datetime('now') "
                "WHERE entity_name = ? AND record_id = ?",
                (content, *key),
            )
            execute("DELETE FROM kdb_search_fts WHERE entity_name = ? AND record_id = ?", key)
        search_id = found[0] if found else str(uuid.uuid4())
        if not found:
            execute(
                "INSERT INTO kdb_search (id, entity_name, record_id, content, embedding) VALUES (?, ?, ?, ?, '[1.0]')",
                (search_id, *key, content),
            )
        if fts:
            execute("INSERT INTO kdb_search_fts VALUES (?, ?, ?, ?)", (search_id, *key, content))
        execute("COMMIT")

    def delete(self, record_id: str, entity: str = "note") -> None:
        for table in ("kdb_search", "kdb_search_fts"):
            self.connection.execute(f"DELETE FROM {table} WHERE entity_name = ? AND record_id = ?", (entity, record_id))


class Index:
    """A store with what the parent and the workers do around it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = parse_address(f"sqlite:///{path}")
        self.store = SQLiteStore.open(self.address, must_exist=False)
        self.slab = Slab.local(SlabShape(slots=2, rows=64, dimensions=DIMENSIONS))
        self.random = np.random.default_rng(5)
        self.connection = sqlite3.connect(path, isolation_level=None)

    def close(self) -> None:
        self.store.close()
        self.connection.close()

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return self.connection.execute(query, values).fetchall()

    def begin(self, **changes: Any) -> RunSpec:
        options: dict[str, Any] = {"fingerprint": "f1", "model": "m", "dimensions": DIMENSIONS, "wait": 0.0}
        return self.store.begin_run(**(options | changes))

    def fill(
        self, slot: int, contents: dict[str, str] | Sequence[tuple[str, str]], seen: dict[str, Stored], entity: str
    ) -> FlushSlot:
        pairs = list(contents.items()) if isinstance(contents, dict) else list(contents)
        rows = [
            Row(Record(entity, key, text), key in seen, seen[key].row_version if key in seen else NO_VALUE)
            for key, text in pairs
        ]
        target = self.slab.slots[slot]
        target.put(1, rows, [NO_VALUE] * len(rows))
        vectors = self.random.standard_normal((len(rows), DIMENSIONS)).astype(np.float32)
        target.vectors[: len(rows)] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return FlushSlot(target, frozenset())

    def write(
        self,
        run: RunSpec,
        number: int,
        contents: dict[str, str] | Sequence[tuple[str, str]],
        *,
        seen: dict[str, Stored] | None = None,
        entity: str = "note",
        rejects: Sequence[Reject] = (),
        deletes: Sequence[tuple[str, str]] = (),
    ) -> FlushResult:
        """Flush records; without ``seen`` the index is looked up just before."""
        if seen is None:
            seen = self.store.lookup(entity, [key for key, _ in dict(contents).items()])
        return self.store.flush(run, number, [self.fill(0, contents, seen, entity)], rejects, deletes)

    def contents(self) -> dict[str, str]:
        return dict(self.rows("SELECT record_id, content FROM kdb_search"))

    def matches(self, word: str) -> list[str]:
        return [r for (r,) in self.rows("SELECT record_id FROM kdb_search_fts WHERE content MATCH ? ORDER BY 1", word)]

    def assert_in_step(self) -> None:
        """Every row has exactly one full-text row with the same id and text, and a true copy of our vector."""
        columns = "id, entity_name, record_id, content"
        assert self.rows(f"SELECT {columns} FROM kdb_search_fts ORDER BY 1") == self.rows(
            f"SELECT {columns} FROM kdb_search ORDER BY 1"
        )
        self.connection.execute("INSERT INTO kdb_search_fts(kdb_search_fts) VALUES('integrity-check')")
        copies = self.rows(
            "SELECT s.embedding, v.vector FROM kdb_search s LEFT JOIN kdb_fast_vectors v ON v.search_rowid = s.rowid "
            "AND v.search_id = s.id AND v.at = s.updated_at WHERE s.kdb_fast_at = s.updated_at AND s.embedding NOT NULL"
        )
        for embedding, vector in copies:
            assert json.loads(embedding) == pytest.approx(np.frombuffer(vector, "<f4").tolist(), abs=1e-8)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    result = Index(tmp_path / "index.db")
    result.store.prepare(DIMENSIONS)
    yield result
    result.close()


@pytest.fixture
def kameleon(index: Index) -> Iterator[KameleonDB]:
    result = KameleonDB(index.path)
    yield result
    result.connection.close()


def numbered(count: int, word: str = "text") -> dict[str, str]:
    return {f"r{i:03d}": f"{word} number{i}" for i in range(count)}


# -- rows --------------------------------------------------------------------------------------------------


def test_a_new_row_has_every_column_that_kameleondb_and_kdb_fast_read(index: Index) -> None:
    run = index.begin(model="m" * 150)
    slot = index.fill(0, {"a": "first words"}, {}, "note")
    slot.slot.source_at[0] = 1_700_000_000_123_456
    before = datetime.now(UTC)
    result = index.store.flush(run, 1, [slot], [], [])

    assert (result.rows, result.superseded, result.rejected, result.deleted) == (1, (), (), 0)
    ((search_id, embedding, model, dimensions, created, updated, at, by, fingerprint, source),) = index.rows(
        "SELECT id, embedding, model, dimensions, created_at, updated_at, kdb_fast_at, kdb_fast_run, "
        "kdb_fast_fingerprint, kdb_fast_source_at FROM kdb_search"
    )
    assert uuid.UUID(search_id).version == 7
    assert isinstance(embedding, str)
    assert json.loads(embedding) == pytest.approx(slot.slot.vectors[0].tolist(), abs=1e-8)
    assert (model, dimensions, by, fingerprint) == ("m" * 100, DIMENSIONS, run.number, "f1")
    assert created == updated == at
    moment = datetime.strptime(updated, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
    assert before <= moment <= datetime.now(UTC)
    assert source == "2023-11-14 22:13:20.123456"
    ((stored_at, vector),) = index.rows("SELECT at, vector FROM kdb_fast_vectors")
    assert stored_at == updated
    assert np.frombuffer(vector, "<f4").tolist() == slot.slot.vectors[0].tolist()
    assert index.matches("words") == ["a"]
    index.assert_in_step()


def test_several_slots_and_skipped_rows_are_written_in_one_flush(index: Index) -> None:
    run = index.begin()
    first = index.fill(0, numbered(40), {}, "note")._replace(skip=frozenset({0, 39}))
    second = index.fill(1, numbered(10, "other"), {}, "memo")
    assert index.store.flush(run, 1, [first, second], [], []).rows == 48
    assert (index.store.count(), index.store.count("note"), index.store.count("memo")) == (48, 38, 10)
    assert "r000" not in index.store.lookup("note", ["r000", "r001"])
    index.assert_in_step()


def test_lookup_gives_hash_and_fingerprint_of_stored_rows_only(index: Index) -> None:
    index.write(index.begin(), 1, numbered(60))
    found = index.store.lookup("note", [f"r{i:03d}" for i in range(1100)])
    assert len(found) == 60
    assert found["r007"].content_hash == content_hash("text number7")
    assert {row.fingerprint for row in found.values()} == {"f1"}
    assert all(row.row_version != NO_VALUE for row in found.values())
    assert index.store.lookup("memo", ["r007"]) == {}
    assert index.store.lookup("note", []) == {}


def test_a_row_changed_by_another_program_has_no_fingerprint_any_more(index: Index, kameleon: KameleonDB) -> None:
    index.write(index.begin(), 1, numbered(2))
    before = index.store.lookup("note", ["r000"])["r000"]
    kameleon.index("r000", "text number0")
    after = index.store.lookup("note", ["r000", "r001"])
    assert after["r000"].fingerprint is None
    assert after["r000"].content_hash == before.content_hash
    assert after["r000"].row_version != before.row_version
    assert after["r001"].fingerprint == "f1"


def test_text_that_is_not_valid_utf8_can_be_looked_up_and_replaced(index: Index, kameleon: KameleonDB) -> None:
    kameleon.connection.execute(
        "INSERT INTO kdb_search (id, entity_name, record_id, content) VALUES ('i', 'note', 'a', CAST(x'ff41' AS TEXT))"
    )
    assert index.store.lookup("note", ["a"])["a"].content_hash != content_hash("A")
    assert index.write(index.begin(), 1, {"a": "mended"}).rows == 1
    assert index.contents() == {"a": "mended"}
    index.assert_in_step()


def test_a_known_row_keeps_its_id_and_creation_time_and_gets_the_rest_anew(index: Index) -> None:
    index.write(index.begin(), 1, {"a": "old words"})
    ((old_id, created, old_vector),) = index.rows("SELECT id, created_at, embedding FROM kdb_search")
    with contextlib.closing(SQLiteStore.open(index.address)) as later:
        index.store.end_run(1, "done", {})
        run = later.begin_run(fingerprint="f2", model="m2", dimensions=DIMENSIONS, wait=0)
        seen = later.lookup("note", ["a"])
        assert later.flush(run, 1, [index.fill(0, {"a": "new words"}, seen, "note")], [], []).rows == 1
    ((search_id, content, created_after, vector, model, fingerprint),) = index.rows(
        "SELECT id, content, created_at, embedding, model, kdb_fast_fingerprint FROM kdb_search"
    )
    assert (search_id, content, created_after) == (old_id, "new words", created)
    assert (model, fingerprint) == ("m2", "f2")
    assert vector != old_vector
    assert index.matches("old") == []
    assert index.matches("new") == ["a"]
    index.assert_in_step()


def test_a_row_with_the_same_text_leaves_the_full_text_table_alone(index: Index) -> None:
    run = index.begin()
    index.write(run, 1, numbered(20))
    statements: list[str] = []
    index.store._connection.set_trace_callback(statements.append)
    assert index.write(run, 2, numbered(20)).rows == 20
    index.store._connection.set_trace_callback(None)
    assert any(s.startswith("UPDATE kdb_search SET") for s in statements)
    assert not [s for s in statements if "kdb_search_fts" in s and not s.startswith(("SELECT", "--"))]
    index.assert_in_step()


def test_the_later_of_two_rows_with_one_key_wins(index: Index) -> None:
    run = index.begin()
    assert index.write(run, 1, [("a", "one"), ("b", "two"), ("a", "three")]).rows == 3
    assert index.contents() == {"a": "three", "b": "two"}
    assert index.write(run, 2, {"a": "four"}, seen={}).rows == 1
    assert index.contents() == {"a": "four", "b": "two"}
    index.assert_in_step()


def test_a_vector_with_nan_is_rejected_and_the_others_are_stored(index: Index) -> None:
    run = index.begin()
    slot = index.fill(0, numbered(3), {}, "note")
    slot.slot.vectors[1, 0] = np.nan
    result = index.store.flush(run, 1, [slot], [], [])
    assert result.rows == 2
    assert [r[:3] for r in result.rejected] == [(0, 1, "not_finite")]
    assert sorted(index.contents()) == ["r000", "r002"]


def test_vectors_that_are_not_what_the_worker_wrote_are_never_stored(index: Index) -> None:
    run = index.begin()
    filled = index.fill(0, {"a": "one", "b": "two"}, {}, "note")
    written = filled._replace(crcs=((0, 2, filled.slot.checksum()),))
    filled.slot.vectors[1, 5] += 1
    with pytest.raises(RuntimeError, match="vectors 0:2 of slot 0 are not what the worker wrote"):
        index.store.flush(run, 1, [written], [], [])
    assert index.contents() == {}
    assert index.store.flush(run, 1, [filled._replace(crcs=((0, 2, filled.slot.checksum()),))], [], []).rows == 2


# -- one flush, once ---------------------------------------------------------------------------------------


def test_a_repeated_flush_changes_nothing_and_gives_the_first_result(index: Index, kameleon: KameleonDB) -> None:
    run = index.begin()
    index.connection.execute(
        "CREATE TRIGGER no BEFORE INSERT ON kdb_search WHEN NEW.record_id = 'r001' BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    kameleon.index("r002", "theirs")
    first = index.write(run, 1, numbered(5), seen={}, deletes=[("note", "r009")])
    assert (first.rows, first.superseded) == (3, ((0, 2),))
    assert len(first.rejected) == 1
    stamp = index.rows("SELECT max(updated_at) FROM kdb_search")
    assert index.write(run, 1, numbered(5), seen={}, deletes=[("note", "r009")]) == first
    assert index.rows("SELECT max(updated_at) FROM kdb_search") == stamp
    assert index.write(run, 2, {"z": "more"}).rows == 1


def test_a_run_that_was_taken_over_cannot_write_any_more(index: Index) -> None:
    old = index.begin()
    index.write(old, 1, {"a": "kept"})
    index.connection.execute("UPDATE kdb_fast_runs SET host = 'elsewhere', heartbeat_at = '2020-01-01 00:00:00.000'")
    new = index.begin()
    assert new.number > old.number
    assert index.rows("SELECT state FROM kdb_fast_runs WHERE run = ?", old.number) == [("abandoned",)]
    with pytest.raises(LockedError, match=f"Run {old.number} no longer holds"):
        index.write(old, 2, {"b": "lost"})
    index.store.end_run(old.number, "done", {})
    assert index.rows("SELECT state FROM kdb_fast_runs ORDER BY run") == [("abandoned",), ("running",)]
    assert index.contents() == {"a": "kept"}
    assert index.write(new, 1, {"b": "written"}).rows == 1


def test_rows_that_another_program_changed_since_the_lookup_are_theirs(index: Index, kameleon: KameleonDB) -> None:
    index.write(index.begin(), 1, numbered(4))
    index.store.end_run(1, "done", {})
    run = index.begin()
    seen = index.store.lookup("note", ["r000", "r001", "r002", "r003", "r004", "r005"])
    kameleon.index("r001", "theirs, changed")
    kameleon.index("r004", "theirs, new")
    kameleon.delete("r003")
    result = index.write(run, 1, numbered(6, "ours"), seen=seen)
    assert result.superseded == ((0, 1), (0, 4))
    assert result.rows == 4
    assert index.contents() == {
        "r000": "ours number0",
        "r001": "theirs, changed",
        "r002": "ours number2",
        "r003": "ours number3",
        "r004": "theirs, new",
        "r005": "ours number5",
    }
    index.assert_in_step()


def test_a_change_within_this_run_by_another_program_is_seen(index: Index, kameleon: KameleonDB) -> None:
    run = index.begin()
    index.write(run, 1, {"a": "ours"})
    kameleon.index("a", "theirs")
    assert index.write(run, 2, {"a": "ours again"}, seen={}).superseded == ((0, 0),)
    assert index.contents() == {"a": "theirs"}


def test_deleted_records_leave_all_three_tables(index: Index) -> None:
    run = index.begin()
    index.write(run, 1, numbered(10))
    result = index.write(run, 2, {"new": "more"}, deletes=[("note", "r003"), ("note", "r004"), ("memo", "r005")])
    assert (result.rows, result.deleted) == (1, 2)
    assert index.matches("number3") == []
    assert index.rows("SELECT count(*) FROM kdb_fast_vectors") == [(9,)]
    index.assert_in_step()


# -- rows that the database refuses ------------------------------------------------------------------------


def test_halving_finds_the_refused_rows_and_stores_all_others(index: Index) -> None:
    run = index.begin()
    index.write(run, 1, {"r010": "known before"})
    index.connection.execute(
        "CREATE TRIGGER no_new BEFORE INSERT ON kdb_search WHEN NEW.record_id IN ('r000', 'r033') "
        "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
    )
    index.connection.execute(
        "CREATE TRIGGER no_change BEFORE UPDATE ON kdb_search WHEN NEW.record_id = 'r010' "
        "BEGIN SELECT RAISE(ABORT, 'nor this'); END"
    )
    result = index.write(run, 2, numbered(64))
    assert result.rows == 61
    assert sorted(result.rejected) == [
        (0, 0, "database_refused", "not this one"),
        (0, 10, "database_refused", "nor this"),
        (0, 33, "database_refused", "not this one"),
    ]
    assert index.store.count() == 62
    assert index.contents()["r010"] == "known before"
    index.assert_in_step()
    reject = next(r for r in index.store.rejects("note") if r["record_id"] == "r033")
    assert reject["content_hash"] == content_hash("text number33").hex()
    assert (reject["reason"], reject["run"]) == ("database_refused", run.number)


def test_a_trigger_that_silently_drops_a_row_is_noticed(index: Index) -> None:
    index.connection.execute(
        "CREATE TRIGGER drop_it BEFORE INSERT ON kdb_search WHEN NEW.record_id = 'r005' BEGIN SELECT RAISE(IGNORE); END"
    )
    result = index.write(index.begin(), 1, numbered(12))
    assert result.rows == 11
    assert [(row, reason) for _, row, reason, _ in result.rejected] == [(5, "database_refused")]
    index.assert_in_step()


def test_a_constraint_gives_its_own_reason(tmp_path: Path) -> None:
    path = tmp_path / "strict.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(KAMELEON_TABLES.replace("content TEXT NOT NULL", "content TEXT CHECK(content <> 'x')"))
        connection.executescript("CREATE UNIQUE INDEX once ON kdb_search (content)")
    index = Index(path)
    index.store.prepare(DIMENSIONS)
    result = index.write(index.begin(), 1, {"a": "x", "b": "same", "c": "same", "d": "good"})
    assert [(row, reason) for _, row, reason, _ in result.rejected] == [(0, "check"), (2, "unique")]
    assert sorted(index.contents()) == ["b", "d"]
    index.close()


def test_a_trigger_that_rolls_everything_back_ends_the_flush_with_nothing_written(index: Index) -> None:
    run = index.begin()
    index.connection.execute(
        "CREATE TRIGGER all_back BEFORE INSERT ON kdb_search WHEN NEW.record_id = 'r002' "
        "BEGIN SELECT RAISE(ROLLBACK, 'away'); END"
    )
    with pytest.raises(DatabaseError, match="away"):
        index.write(run, 1, numbered(4))
    assert index.store.count() == 0
    index.connection.execute("DROP TRIGGER all_back")
    assert index.write(run, 1, numbered(4)).rows == 4
    index.assert_in_step()


# -- rejects -----------------------------------------------------------------------------------------------


def reject(record_id: str, position: int = 0) -> Reject:
    return Reject("note", record_id, "empty_text", "nothing there", content_hash(""), position)


def test_rejects_are_kept_with_printable_keys_and_newest_run_first(index: Index) -> None:
    run = index.begin()
    index.write(run, 1, {"a": "text"}, rejects=[reject("bad\x00id", 7), reject("x" * 300, 8)])
    index.store.end_run(run.number, "done", {"stored": 1})
    later = index.begin()
    index.write(later, 1, {"b": "text"}, rejects=[reject("later", 1)._replace(entity="memo")])
    found = list(index.store.rejects())
    assert [(r["entity"], r["record_id"][:9], r["position"]) for r in found] == [
        ("memo", "later", 1),
        ("note", "bad\\x00id", 7),
        ("note", "x" * 9, 8),
    ]
    assert found[0]["rejected_at"].tzinfo is UTC
    assert list(index.store.rejects("memo")) == found[:1]


def test_rejects_are_found_by_the_name_of_an_entity_that_no_table_can_hold(index: Index) -> None:
    run = index.begin()
    index.write(run, 1, {}, rejects=[reject(key)._replace(entity=name) for key in "ba" for name in ("n\0", "b", "a")])
    assert [(r["entity"], r["record_id"]) for r in index.store.rejects()] == [
        ("a", "a"), ("a", "b"), ("b", "a"), ("b", "b"), ("n\\x00", "a"), ("n\\x00", "b")
    ]  # fmt: skip
    assert [r["record_id"] for r in index.store.rejects("n\0")] == ["a", "b"]
    index.store.end_run(run.number, "done", {"input": "in"})
    assert index.store.clear_rejects([("n\0", "a")]) == 1
    assert index.store.forget_rejects_of_input("n\0", "in", run.number + 1) == 1
    assert index.store.forget_older_rejects(["b", "a", "n\0"], run.number + 1) == 4


def test_a_record_that_is_stored_by_a_later_run_is_no_longer_rejected(index: Index) -> None:
    run = index.begin()
    index.write(run, 1, {"z": "text"}, rejects=[reject("a"), reject("b")])
    index.write(run, 2, {"a": "mended in the same run"})
    assert [r["record_id"] for r in index.store.rejects()] == ["a", "b"]
    index.store.end_run(run.number, "done", {})
    index.write(index.begin(), 1, {"a": "mended"})
    assert [r["record_id"] for r in index.store.rejects()] == ["b"]


def test_rejects_are_cleared_by_key_or_all(index: Index) -> None:
    index.write(index.begin(), 1, {}, rejects=[reject("a"), reject("a", 2), reject("b\n"), reject("c")])
    assert index.store.clear_rejects([("note", "a"), ("note", "b\n"), ("memo", "c")]) == 3
    assert index.store.clear_rejects() == 1
    assert list(index.store.rejects()) == []


# -- the lock ----------------------------------------------------------------------------------------------


def test_a_living_run_keeps_others_out_and_is_named(index: Index) -> None:
    run = index.begin()
    with (
        contextlib.closing(SQLiteStore.open(index.address)) as second,
        pytest.raises(LockedError, match=f"Run {run.number} holds the index: process {os.getpid()}") as caught,
    ):
        second.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=0)
    assert "--wait" in caught.value.remedy
    index.store.end_run(run.number, "done", {"read": 3})
    assert index.rows("SELECT state, receipt, ended_at IS NOT NULL FROM kdb_fast_runs") == [("done", '{"read": 3}', 1)]
    assert index.begin().number > run.number


def test_waiting_ends_when_the_other_run_does(index: Index) -> None:
    run = index.begin()
    with contextlib.closing(SQLiteStore.open(index.address)) as second:
        waits: list[str] = []

        def on_wait(what: str) -> None:
            waits.append(what)
            index.store.end_run(run.number, "stopped", {})

        second.on_wait = on_wait
        assert second.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=60).number > run.number
    assert len(waits) == 1


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ("pid = {dead}", True),
        ("pid = {parent}, process_started = process_started - 86400", True),
        ("process_started = process_started - 86400", True),
        ("host = 'elsewhere'", False),
        ("host = 'elsewhere', heartbeat_at = datetime('now', '-31 seconds')", True),
        ("heartbeat_at = datetime('now', '-31 seconds')", False),
    ],
    ids=["dead", "other-process-same-pid", "restarted-with-my-pid", "other-host", "other-host-silent", "myself-silent"],
)
def test_only_a_dead_or_silent_run_is_taken_over(index: Index, change: str, taken: bool) -> None:
    old = index.begin()
    change = change.format(dead=dead_pid(), parent=os.getppid())
    index.connection.execute(f"UPDATE kdb_fast_runs SET {change}")
    if taken:
        assert index.begin().number > old.number
    else:
        with pytest.raises(LockedError):
            index.begin()


def test_a_heartbeat_neither_waits_for_a_writer_nor_fails(index: Index) -> None:
    run = index.begin()
    index.connection.execute("UPDATE kdb_fast_runs SET heartbeat_at = '2020-01-01 00:00:00.000'")
    index.connection.execute("BEGIN IMMEDIATE")
    index.store.heartbeat(run.number, "embed")
    index.connection.execute("ROLLBACK")
    assert index.rows("SELECT heartbeat_at FROM kdb_fast_runs") == [("2020-01-01 00:00:00.000",)]
    index.store.heartbeat(run.number, "embed")
    ((at, phase),) = index.rows("SELECT heartbeat_at, phase FROM kdb_fast_runs")
    assert at > "2026"
    assert phase == "embed"
    assert index.store._connection.execute("PRAGMA busy_timeout").fetchone() == (30_000,)


# -- infrastructure ----------------------------------------------------------------------------------------


def test_a_database_locked_for_too_long_is_a_database_error_and_nothing_is_written(index: Index) -> None:
    run = index.begin()
    index.store._connection.execute("PRAGMA busy_timeout = 10")
    index.connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="locked"):
        index.write(run, 1, {"a": "text"})
    index.connection.execute("ROLLBACK")
    assert index.write(run, 1, {"a": "text"}).rows == 1


def test_a_full_disk_takes_back_the_whole_flush_and_it_can_be_repeated(index: Index) -> None:
    run = index.begin()
    index.write(run, 1, {"a": "text"})
    (pages,) = index.store._connection.execute("PRAGMA page_count").fetchone()
    index.store._connection.execute(f"PRAGMA max_page_count = {pages + 3}")
    large = {key: text + " word" * 500 for key, text in numbered(60).items()}
    with pytest.raises(ResourceError, match="disk is full"):
        index.write(run, 2, large)
    assert not index.store._connection.in_transaction
    assert index.contents() == {"a": "text"}
    index.store._connection.execute("PRAGMA max_page_count = 1000000")
    assert index.write(run, 2, large).rows == 60
    index.assert_in_step()


def test_no_vector_index_is_dropped_built_or_missed(index: Index) -> None:
    assert index.store.drop_index().text == "none"
    outcome = index.store.finish_index(lambda doing: None)
    assert (outcome.text, outcome.warnings) == ("exact search on SQLite, no vector index", ())


# -- preparing ---------------------------------------------------------------------------------------------


def test_preparing_twice_changes_nothing(index: Index) -> None:
    before = index.rows("SELECT name, sql FROM sqlite_master ORDER BY name")
    index.store.prepare(DIMENSIONS)
    index.store.prepare(2 * DIMENSIONS)
    assert index.rows("SELECT name, sql FROM sqlite_master ORDER BY name") == before


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "wal"])
def test_the_journal_mode_stays_as_the_owner_has_it(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "index.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
    index = Index(path)
    index.store.prepare(DIMENSIONS)
    run = index.begin()
    assert index.write(run, 1, numbered(40)).rows == 40
    index.store.end_run(run.number, "done", {})
    # Of the modes, only that of a write-ahead log is kept in the file.
    assert index.rows("PRAGMA journal_mode") == [("wal" if mode == "wal" else "delete",)]
    index.close()
    assert [file.name for file in tmp_path.iterdir()] == ["index.db"]


def test_a_flush_waits_for_readers_of_a_file_without_a_write_ahead_log(index: Index) -> None:
    run = index.begin()
    index.write(run, 1, numbered(9))
    reader = sqlite3.connect(index.path, isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM kdb_search").fetchone() == (9,)
    ended = threading.Timer(0.5, lambda: reader.execute("COMMIT"))
    ended.start()
    assert index.write(run, 2, numbered(20)).rows == 20
    ended.join()
    reader.close()
    index.assert_in_step()


def test_a_table_that_was_moved_away_keeps_its_indexes_and_the_new_one_gets_its_own(index: Index) -> None:
    index.connection.execute("ALTER TABLE kdb_search RENAME TO kdb_search_old")
    for _ in range(2):
        index.store.prepare(DIMENSIONS)
        found = index.rows("SELECT tbl_name, name FROM sqlite_master WHERE name LIKE 'ix%' ORDER BY 1, 2")
        assert found == [
            ("kdb_search", "ix_kdb_search_entity1"), ("kdb_search", "ix_kdb_search_record1"),
            ("kdb_search_old", "ix_kdb_search_entity"), ("kdb_search_old", "ix_kdb_search_record"),
        ]  # fmt: skip


def test_a_table_made_by_kameleondb_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "made.db"
    kameleon = KameleonDB(path)
    kameleon.connection.executescript(KAMELEON_TABLES + KAMELEON_FTS)
    for i in range(6):
        kameleon.index(f"r{i:03d}", f"theirs number{i}")
    kameleon.index("r001", "theirs moved")  # its full-text row gets another rowid
    index = Index(path)
    index.store.prepare(DIMENSIONS)
    assert index.contents()["r001"] == "theirs moved"
    seen = index.store.lookup("note", list(numbered(8)))
    assert {row.fingerprint for row in seen.values()} == {None}
    run = index.begin()
    assert index.write(run, 1, numbered(8), seen=seen).rows == 8
    index.assert_in_step()
    assert index.matches("theirs") == []

    kameleon.index("r002", "theirs again")
    kameleon.index("r008", "theirs new")
    index.assert_in_step()
    assert index.write(run, 2, {**numbered(9), "r009": "one more"}).rows == 10
    index.assert_in_step()
    kameleon.delete("r004")
    assert index.write(run, 3, {}, deletes=[("note", "r002"), ("note", "r003"), ("note", "r004")]).deleted == 2
    index.assert_in_step()
    kameleon.connection.close()
    index.close()


def test_full_text_rows_are_found_though_every_rowid_differs(index: Index, kameleon: KameleonDB) -> None:
    kameleon.connection.execute("INSERT INTO kdb_search_fts(rowid, id) VALUES (3, 'in the way')")
    for i in range(30):
        kameleon.index(f"r{i:03d}", f"theirs number{i}")
    kameleon.connection.execute("DELETE FROM kdb_search_fts WHERE id = 'in the way'")
    run = index.begin()
    for number, word in enumerate(("one", "two"), 1):
        assert index.write(run, number, numbered(31, word)).rows == 31
        index.assert_in_step()
        kameleon.index("r005", "moved")
        kameleon.index("r006", "moved without its text", fts=False)
    assert index.write(run, 3, numbered(31, "three")).rows == 31
    index.assert_in_step()


def test_a_table_without_full_text_search_gets_it_with_all_its_rows(tmp_path: Path) -> None:
    kameleon = KameleonDB(tmp_path / "made.db")
    kameleon.connection.executescript(KAMELEON_TABLES)
    kameleon.connection.execute(
        "INSERT INTO kdb_search (id, entity_name, record_id, content) VALUES ('i','e','r','word')"
    )
    kameleon.connection.close()
    index = Index(tmp_path / "made.db")
    index.store.prepare(DIMENSIONS)
    assert index.matches("word") == ["r"]
    index.assert_in_step()
    index.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("CREATE TABLE kdb_search (id TEXT, entity_name TEXT)", "no column record_id, content, embedding"),
        ("CREATE VIEW kdb_search AS SELECT 1", "is a view"),
        (KAMELEON_TABLES.replace(",\n  UNIQUE(entity_name, record_id)", ""), "unique constraint"),
        (KAMELEON_TABLES.replace("record_id)\n);", "record_id)\n) WITHOUT ROWID;", 1), "row ids"),
        (KAMELEON_TABLES.replace("model TEXT", "model TEXT, owner TEXT NOT NULL"), "needs a value in owner"),
        (KAMELEON_TABLES + "CREATE TABLE kdb_search_fts (id, entity_name, record_id, content)", "full-text table"),
        (KAMELEON_TABLES + "CREATE VIRTUAL TABLE kdb_search_fts USING fts5(record_id, content)", "full-text table"),
        ("PRAGMA encoding = 'UTF-16'; CREATE TABLE t (a)", "UTF-16"),
    ],
    ids=["columns", "view", "unique", "rowid", "not-null", "no-fts", "other-fts", "encoding"],
)
def test_a_table_of_another_shape_is_refused_and_left_alone(tmp_path: Path, script: str, message: str) -> None:
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
        before = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        store = SQLiteStore.open(parse_address(f"sqlite:///{path}"))
        with contextlib.closing(store), pytest.raises(SchemaError, match=message):
            store.prepare(DIMENSIONS)
        assert connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall() == before


def test_a_file_that_cannot_be_written_is_refused(index: Index, tmp_path: Path) -> None:
    connection = sqlite3.connect(f"file:{index.path}?mode=ro", uri=True)
    with contextlib.closing(connection), pytest.raises(SchemaError, match="cannot be written"):
        SQLiteStore(connection).prepare(DIMENSIONS)
    with pytest.raises(DatabaseError, match="There is no SQLite file"):
        SQLiteStore.open(parse_address(f"sqlite:///{tmp_path / 'nowhere.db'}"))


def test_an_open_connection_in_memory_serves_and_stays_open() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        store = SQLiteStore(connection)
        store.prepare(DIMENSIONS)
        run = store.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=0)
        slab = Slab.local(SlabShape(slots=1, rows=4, dimensions=DIMENSIONS))
        slab.slots[0].put(1, [Row(Record("note", "a", "text"))], [NO_VALUE])
        slab.slots[0].vectors[:] = 0.25
        assert store.flush(run, 1, [FlushSlot(slab.slots[0], frozenset())], [], []).rows == 1
        store.heartbeat(run.number, "embed")
        store.end_run(run.number, "done", {})
        store.close()
        assert not connection.in_transaction
        assert connection.execute("SELECT record_id FROM kdb_search").fetchall() == [("a",)]


# -- the library's way -------------------------------------------------------------------------------------

LIBRARY = RunSpec(0, "f9", "m9", DIMENSIONS)


def put_all(store: SQLiteStore, slots: Sequence[FlushSlot], failure: type[Exception] | None = None) -> None:
    with store.unit():
        for slot in slots:
            store.put(LIBRARY, [slot], [])
        if failure is not None:
            raise failure


def test_put_writes_the_newest_text_whoever_wrote_the_row(index: Index, kameleon: KameleonDB) -> None:
    index.write(index.begin(), 1, numbered(4), rejects=[reject("r009"), reject("other")])
    kameleon.index("r001", "theirs")
    with index.store.unit():
        index.store.put(LIBRARY, [index.fill(0, {"r000": "newest", "r001": "newest", "r009": "new"}, {}, "note")], [])
        index.store.put(LIBRARY, [index.fill(0, {"r009": "newer"}, {}, "note")], [("note", "r002")])
    assert index.contents() == {"r000": "newest", "r001": "newest", "r003": "text number3", "r009": "newer"}
    assert index.rows("SELECT model, kdb_fast_run FROM kdb_search WHERE record_id = 'r001'") == [("m9", 0)]
    assert index.store.lookup("note", ["r000"])["r000"].fingerprint == "f9"
    assert [r["record_id"] for r in index.store.rejects()] == ["other"]
    index.assert_in_step()


def test_put_without_vectors_leaves_none_behind(index: Index) -> None:
    index.write(index.begin(), 1, numbered(2))
    with index.store.unit():
        slot = Slab.local(SlabShape(slots=1, rows=4, dimensions=1)).slots[0]
        slot.put(1, [Row(Record("note", key, "plain")) for key in ("r000", "new")], [NO_VALUE] * 2)
        index.store.put(LIBRARY, [FlushSlot(slot, frozenset())], [], vectors=False)
    assert (
        index.rows("SELECT embedding, model, dimensions FROM kdb_search WHERE content = 'plain'") == [(None,) * 3] * 2
    )
    assert index.rows("SELECT count(*) FROM kdb_fast_vectors") == [(1,)]
    assert index.matches("plain") == ["new", "r000"]
    assert index.store.lookup("note", ["r000"])["r000"].fingerprint is None
    index.assert_in_step()


def test_a_refused_row_takes_back_the_whole_unit_and_is_named(index: Index) -> None:
    index.connection.execute(
        "CREATE TRIGGER no BEFORE INSERT ON kdb_search WHEN NEW.record_id = 'r002' BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    slots = [index.fill(0, {"a": "first"}, {}, "note"), index.fill(1, numbered(4), {}, "note")]
    with pytest.raises(RecordError, match=r"'note'/'r002' was refused \(database_refused\): no"):
        put_all(index.store, slots)
    assert index.contents() == {}
    index.assert_in_step()


def test_a_unit_within_the_callers_transaction_is_committed_or_rolled_back_with_it(index: Index) -> None:
    with contextlib.closing(sqlite3.connect(index.path)) as connection:
        store = SQLiteStore(connection)
        for finish, expected in ((connection.rollback, {}), (connection.commit, {"a": "text"})):
            connection.execute("INSERT OR REPLACE INTO kdb_fast_state VALUES ('of', 'the caller')")
            assert connection.in_transaction
            put_all(store, [index.fill(0, {"a": "text"}, {}, "note")])
            with pytest.raises(KeyError):
                put_all(store, [index.fill(0, {"b": "text"}, {}, "note")], KeyError)
            assert index.contents() == {}
            finish()
            assert index.contents() == expected
    index.assert_in_step()


# -- records that are gone ---------------------------------------------------------------------------------


@pytest.fixture
def products(index: Index) -> Iterator[tuple[Any, list[str]]]:
    """A real KameleonDB in the same file, with eight products; yields it and their ids."""
    kameleondb = pytest.importorskip("kameleondb")
    with kameleondb.KameleonDB(f"sqlite:///{index.path}") as db:
        entity = db.create_entity("Product", [{"name": "title", "type": "string"}])
        yield db, entity.insert_many([{"title": f"thing {i}"} for i in range(8)])


def delete_two(db: Any, ids: list[str]) -> None:
    product = db.entity("Product")
    for record_id in ids[:2]:
        product.delete(record_id)


def materialize_and_delete_two(db: Any, ids: list[str]) -> None:
    assert db.materialize_entity("Product")["success"]
    with db._connection.engine.begin() as connection:
        for record_id in ids[:2]:
            connection.exec_driver_sql("UPDATE kdb_product SET is_deleted = 1 WHERE id = ?", (record_id,))


@pytest.mark.parametrize("remove", [delete_two, materialize_and_delete_two], ids=["shared", "dedicated"])
def test_rows_whose_record_is_deleted_are_removed(
    index: Index,
    products: tuple[Any, list[str]],
    remove: Callable[[Any, list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdb_fast.stores.sqlite.prune.PRUNE_KEYS", 3)
    db, ids = products
    run = index.begin()
    index.write(run, 1, dict.fromkeys(ids, "thing"), entity="Product")
    index.write(run, 2, {"gone": "no such record"}, entity="Product")
    index.write(run, 3, {"kept": "of another entity"})
    assert index.store.prune("note", live_rows) == 0
    remove(db, ids)
    assert index.store.prune("Product", live_rows) == 3
    assert index.store.prune("Product", live_rows) == 0
    assert sorted(index.contents()) == sorted([*ids[2:], "kept"])
    index.assert_in_step()


def test_full_text_rows_without_a_row_are_removed(index: Index, products: tuple[Any, list[str]]) -> None:
    _, ids = products
    index.write(index.begin(), 1, dict.fromkeys(ids, "thing"), entity="Product")
    index.connection.execute("DELETE FROM kdb_search WHERE record_id = ?", (ids[4],))
    index.connection.execute("DELETE FROM kdb_fast_vectors WHERE search_rowid = 5")
    assert len(index.matches("thing")) == 8
    assert index.store.prune("Product", live_rows) == 0
    assert len(index.matches("thing")) == 7
    index.assert_in_step()


def test_without_kameleondbs_tables_nothing_is_removed(index: Index) -> None:
    index.write(index.begin(), 1, numbered(3))
    assert index.store.prune("note", live_rows) == 0
    assert index.store.count() == 3
