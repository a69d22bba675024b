"""Our own tables have a version: an index from before is carried along, one of a newer kdb-fast is refused."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import poison_worker
import psycopg
import pytest
from search_engines import sqlalchemy_url
from servers import execute, index_rows, kept_rejects

from kdb_fast import cli, faults
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.engine import inline
from kdb_fast.errors import LockedError, SchemaError
from kdb_fast.indexing import run_embedding
from kdb_fast.indexing.rejects import list_rejects
from kdb_fast.records import Reject
from kdb_fast.search.commands import run_status
from kdb_fast.stores import open_store
from kdb_fast.stores.base import RunSpec
from kdb_fast.stores.postgresql import index_tree, locks
from kdb_fast.stores.postgresql import session as pg_session
from kdb_fast.stores.postgresql.index_catalog import SearchIndex
from kdb_fast.stores.postgresql.index_store import PostgreSQLIndexStore
from kdb_fast.stores.postgresql.indexed import Indexed
from kdb_fast.stores.runs import this_process
from kdb_fast.tables import migrations
from kdb_fast.tables.migrations import MIGRATIONS
from kdb_fast.tables.target import Target

DATA = Path(__file__).parents[1] / "data"
DIMENSIONS = 8
MODEL = Model("stub", Path(), "stub.onnx", DIMENSIONS, 512, "mean", True, ())
"""That of the dumps."""

TEXTS = {str(i): f"copper kettle number {i}" for i in range(4)} | {"1": "silver spoon", "2": "tin cup"}
TEXTS |= {str(i): f"iron pan number {i}" for i in range(4, 20)}
UNFIT = [
    json.dumps({"id": "x" * 40, "text": "too long a key"}),
    json.dumps({"id": "y" * 250 + "1", "text": "a key that is cut"}),
    '{"id": 9, "text": ',
    json.dumps({"id": "nul", "text": "a\0b"}),
    json.dumps({"id": 'café "quoted" \\ back\n' + "z" * 30, "text": "a key that JSON escapes"}),
]
REASONS = ["id_too_long", "id_too_long", "id_too_long", "invalid_json", "nul_byte"]


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub for the model, in the runs of this process."""
    monkeypatch.setattr(run_embedding, "resolve", lambda *args, **options: MODEL)
    monkeypatch.setattr(inline, "Encoder", poison_worker.StubEncoder)


def load(index: DatabaseAddress) -> DatabaseAddress:
    """An index that was made before our tables had versions.

    Its runs: 1 is done, 2 was abandoned, 3 is done (since then there is a trigger, and a column for seals), 4 was
    killed: all its rows are committed, and on PostgreSQL the search indexes are dropped.
    """
    script = (DATA / f"before_versions.{index.dialect}.sql").read_text()
    if index.dialect == "postgresql":
        execute(index, script)
    else:
        with contextlib.closing(sqlite3.connect(index.conninfo)) as connection:
            connection.executescript(script)
    return index


@pytest.fixture
def old(index: DatabaseAddress) -> DatabaseAddress:
    return load(index)


Job = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(index: DatabaseAddress, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Job:
    """Runs a command on the index in this process; exit code, receipt and what it has said."""
    file = tmp_path / "notes.jsonl"
    lines = [json.dumps({"id": key, "text": text}) for key, text in TEXTS.items()]
    file.write_text("\n".join([*lines, *UNFIT]))

    def run() -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        command = ["reindex", "--db", sqlalchemy_url(index), "--from", str(file), "--entity", "Note", "--json"]
        code = cli.run([*command, "--max-rejects", "100", "--no-progress"])
        out, err = capfd.readouterr()
        return code, json.loads(out) if out else {}, err

    return run


def prepare(index: DatabaseAddress, wait: float = 0.0) -> None:
    with contextlib.closing(open_store(index, "test")) as store:
        store.prepare(DIMENSIONS, wait)


def versions(index: DatabaseAddress) -> list[int]:
    return [number for (number,) in execute(index, "SELECT number FROM kdb_fast_migrations ORDER BY number")]


ALL = [migration.number for migration in MIGRATIONS]


def states(index: DatabaseAddress) -> list[str]:
    return [state for (state,) in execute(index, "SELECT state FROM kdb_fast_runs ORDER BY run")]


def tables(index: DatabaseAddress) -> list[str]:
    query = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1"
    if index.dialect == "postgresql":
        query = "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
    return [name for (name,) in execute(index, query)]


def test_migrations_are_numbered_as_their_files() -> None:
    files = sorted(path.stem for path in Path(migrations.__file__).parent.glob("m*.py"))
    assert list(range(1, len(ALL) + 1)) == ALL
    assert files == [f"m{m.number:04}_{m.name.replace(' ', '_')}" for m in MIGRATIONS]


# -- an index from before ----------------------------------------------------------------------------------


def test_an_index_from_before_is_carried_along(old: DatabaseAddress, run: Job) -> None:
    before = index_rows(old)
    code, receipt, err = run()
    assert (code, receipt["stored"], receipt["reused"], receipt["unchanged"]) == (3, 0, 0, len(TEXTS)), err
    assert receipt["run"] == 5
    after = index_rows(old)
    assert after.keys() == before.keys()
    assert all(after[key].run == before[key].run for key in after)
    assert versions(old) == ALL
    assert states(old) == ["done", "abandoned", "done", "abandoned", "done"]
    assert sorted(row.reason for row in list_rejects(old) if row.run == 5) == REASONS
    # Their keys were cut or escaped: nothing says that they are those of run 5.
    assert [row.record_id[:4] for row in list_rejects(old) if row.run == 4] == ["yyyy", "café"]
    if old.dialect == "postgresql":
        assert receipt["index"].startswith("built ix_kdb_search_fts, ix_kdb_search_vector")
        assert execute(old, "SELECT * FROM kdb_fast_state") == []
    assert run()[1]["unchanged"] == len(TEXTS)


def test_an_index_from_before_is_read_as_it_is(old: DatabaseAddress, capfd: pytest.CaptureFixture[str]) -> None:
    before = tables(old)
    rows = list_rejects(old)
    assert sorted(row.reason for row in rows) == REASONS
    assert [row.record_id for row in rows if row.position == 21] == ["x" * 40]
    assert len(list_rejects(old, "Note")) == 5
    assert list_rejects(old, "Other") == []
    status = run_status(old)
    assert (status.indexed, status.stale, status.rejected) == (20, 0, 5)
    assert status.run is not None
    assert status.run.run == 4
    assert cli.run(["search", "spoon", "--mode", "keyword", "--json", "--db", sqlalchemy_url(old)]) == 0
    assert '"1"' in capfd.readouterr().out
    assert tables(old) == before


@pytest.mark.parametrize("point", ["store.migrate", "store.migrated"])
def test_killed_between_two_migrations_the_next_run_goes_on(old: DatabaseAddress, run: Job, point: str) -> None:
    for number in ALL:
        script = (
            "import sys; from test_migrations import prepare; from kdb_fast.db.address import DatabaseAddress; "
            "prepare(DatabaseAddress(*sys.argv[1:4]))"
        )
        arguments = [sys.executable, "-c", script, old.dialect, old.conninfo, old.display]
        environment = {"KDB_FAST_FAULT": f"{point}:1:kill", "PYTHONPATH": ":".join(sys.path)}
        assert subprocess.run(arguments, env=environment, timeout=60, check=False).returncode == -9
        applied = ALL[: number if point == "store.migrated" else 0]
        assert (versions(old) if "kdb_fast_migrations" in tables(old) else []) == applied
    assert run()[1]["unchanged"] == len(TEXTS)
    assert versions(old) == ALL


# -- refused ----------------------------------------------------------------------------------------------------


def test_an_index_of_a_newer_kdb_fast_is_refused_before_anything_is_written(old: DatabaseAddress, run: Job) -> None:
    prepare(old)
    execute(old, "INSERT INTO kdb_fast_migrations (number, name, kdb_fast) VALUES (999, 'of tomorrow', '7.8.9')")
    execute(old, "DROP TABLE kdb_search" + " CASCADE" * (old.dialect == "postgresql"))
    before = tables(old), states(old)
    code, _, err = run()
    assert code == 4
    assert "version 999, made by kdb-fast 7.8.9" in err
    assert f"which expects version {len(ALL)}" in err
    assert "Use kdb-fast 7.8.9 or newer" in err
    assert (tables(old), states(old)) == before


def test_a_table_of_another_program_with_the_name_of_the_list(index: DatabaseAddress) -> None:
    execute(index, "CREATE TABLE kdb_fast_migrations (number integer, kdb_fast text)")
    with pytest.raises(SchemaError, match="kdb_fast_migrations has no column name, applied_at") as caught:
        prepare(index)
    execute(index, caught.value.remedy.partition("? ")[2].partition(";")[0].replace("…", "theirs"))
    prepare(index)


def test_one_of_our_tables_that_is_gone_is_named(old: DatabaseAddress, run: Job) -> None:
    prepare(old)
    execute(old, "DROP TABLE kdb_fast_rejects")
    code, _, err = run()
    assert code == 4
    assert "kdb_fast_rejects is missing" in err
    remedy = err.partition("Or ")[2].partition(";")[0]
    names = remedy.removeprefix("DROP TABLE ").split(", ")
    for name in names:
        execute(old, f"DROP TABLE {name}")
    code, receipt, _ = run()
    assert (code, receipt["stored"], receipt["unchanged"]) == (3, 0, len(TEXTS))
    assert len(list_rejects(old)) == 5


# -- per target --------------------------------------------------------------------------------------------


def test_rejects_with_long_keys_are_two(index: DatabaseAddress) -> None:
    execute(index, "CREATE TABLE other (a integer)")
    keys = [("Note", "x" * 250 + str(number)) for number in range(2)]
    with contextlib.closing(open_store(index, "test")) as store:
        store.prepare(DIMENSIONS)
        run = store.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=0)
        store.flush(run, 1, [], [Reject(key, "id_too_long", "too long", b"same") for key in keys], [])
        assert len(list(store.rejects())) == 2
        assert store.clear_rejects([keys[0]]) == 1
        # What is kept of a key has an end, and the whole key tells it from others.
        longest = [("Note", "x" * 5_000 + str(number)) for number in range(2)]
        store.flush(run, 2, [], [Reject(key, "id_too_long", "too long", b"same") for key in longest], [])
        assert len(list(store.rejects("Note"))) == 3
        assert store.clear_rejects(longest) == 2
    assert [len(row[1]) for row in kept_rejects(index)] == [251]


def test_runs_rejects_and_state_of_two_targets_are_apart(index: DatabaseAddress) -> None:
    def begin(store: Any) -> RunSpec:
        spec: RunSpec = store.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=0)
        return spec

    execute(index, "CREATE TABLE a_table (a integer)")
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(contextlib.closing(open_store(index, "test"))) for _ in range(2))
        one.prepare(DIMENSIONS)
        _rename_target(other, "articles")
        first, second = begin(one), begin(other)
        with pytest.raises(LockedError):
            begin(other)
        for store, run in ((one, first), (other, second)):
            store.flush(run, 1, [], [Reject(("Note", str(run.number)), "bad", "bad")], [])
            assert [row.record_id for row in store.rejects("Note")] == [str(run.number)]
        # The database itself lets no target have two.
        again = "INSERT INTO kdb_fast_runs (target, state, fingerprint, model, dimensions, host, pid, process_started) "
        with pytest.raises((sqlite3.IntegrityError, psycopg.errors.UniqueViolation)):
            execute(index, again + "VALUES ('articles', 'running', 'f', 'm', 1, 'h', 1, 1)")
        execute(index, "UPDATE kdb_fast_runs SET state = 'abandoned' WHERE run = %s", second.number)
        one.end_run(first.number, "stopped", {})
        assert not one.after_a_crash(begin(one).number)
        assert other.after_a_crash(begin(other).number)
        assert one.forget_older_rejects(["Note"], 99) == 1
        assert other.clear_rejects(entity="Note") == 1


def _rename_target(store: Any, name: str) -> None:
    if isinstance(store, PostgreSQLIndexStore):
        store.session.rename_target(name)
    else:
        store._target = replace(store.target, kept_as=name)


def test_dropped_indexes_of_two_targets_are_apart(database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION vector")
    prepare(database)
    with psycopg.connect(database.conninfo) as connection, connection.cursor() as cursor:
        target = Target("public", "public")
        index = SearchIndex("public", "kdb_search", "mine", "USING gin (tsv)", False, False, True)
        index_tree.remember(cursor, target, [index])
        other = replace(target, kept_as="articles")
        assert index_tree.IndexTree.read(cursor, Indexed.of_search_table(other)).dropped == []
        index_tree.remember(cursor, other, [])
        assert [i.name for i in index_tree.IndexTree.read(cursor, Indexed.of_search_table(target)).dropped] == ["mine"]
        index_tree.forget(cursor, target)
        assert cursor.execute("SELECT key FROM kdb_fast_state").fetchall() == [("dropped_indexes/articles",)]


# -- who is in the way -------------------------------------------------------------------------------------


@contextlib.contextmanager
def going_on(index: DatabaseAddress) -> Iterator[None]:
    """Run 4 is this process's, of an earlier version, until the end."""
    host, pid, started = this_process()
    now = "now()" if index.dialect == "postgresql" else "strftime('%Y-%m-%d %H:%M:%f', 'now')"
    change = f"UPDATE kdb_fast_runs SET host = %s, pid = %s, process_started = %s, heartbeat_at = {now} WHERE run = 4"
    execute(index, change, host, pid, started)
    yield
    execute(index, "UPDATE kdb_fast_runs SET state = 'done' WHERE run = 4")


def test_tables_are_not_changed_under_a_living_run(old: DatabaseAddress, run: Job) -> None:
    with going_on(old):
        with pytest.raises(LockedError, match="Run 4 holds the index"):
            prepare(old)
        assert "kdb_fast_migrations" not in tables(old)
        code, _, _ = run()
        assert code == 6
        waiting = threading.Thread(target=prepare, args=(old, 30.0))
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive()
    waiting.join(30.0)
    assert not waiting.is_alive()
    assert versions(old) == ALL


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = pg_session.LIMITS.replace("'30s'", "'200ms'")
    monkeypatch.setattr(pg_session, "LIMITS", limits)


@pytest.mark.usefixtures("impatient")
def test_who_holds_the_lock_is_named(database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION vector")
    prepare(database)
    with contextlib.closing(psycopg.connect(database.conninfo, application_name="an editor")) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (locks.DDL_LOCK,))
        with pytest.raises(SchemaError) as caught:
            prepare(database)
        pid = other.info.backend_pid
        assert f"the server's process {pid} (role postgres, application an editor, in a tr" in caught.value.message
        assert "holds the lock for changes of kdb-fast's tables" in caught.value.message
        execute(database, caught.value.remedy.partition("end it: ")[2])
        prepare(database)


@pytest.mark.usefixtures("impatient")
def test_who_holds_a_table_is_named(database: DatabaseAddress) -> None:
    old = load(database)
    with contextlib.closing(psycopg.connect(old.conninfo)) as other:
        other.execute("LOCK kdb_fast_rejects IN ACCESS SHARE MODE")
        with pytest.raises(SchemaError, match=rf"process {other.info.backend_pid} .*holds public\.kdb_fast_rejects"):
            prepare(old)
        assert versions(old) == [1]
    prepare(old)
    assert versions(old) == ALL


def test_the_points_of_faults_are_those(old: DatabaseAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error between two migrations is passed on, and what was applied stays."""
    monkeypatch.setattr(faults, "_plan", ("store.migrated", 1, "raise"))
    monkeypatch.setattr(faults, "_hits", 0)
    with pytest.raises(RuntimeError, match=r"fault at store\.migrated"):
        prepare(old)
    assert versions(old) == ALL[:1]
