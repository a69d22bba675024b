"""The database goes away, refuses, hangs, fills up or is changed in the middle of runs.

Each time: the right exit code, a message that says what happened, what is safe and what to do, no password anywhere,
nothing half done; and then the same command completes.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import oracle as oracles
import poison_worker
import psycopg
import pytest
from commands import Command, Commands
from limited import needs_private_mounts
from proxy import CUT_AFTER, CUT_BEFORE, FORWARD, HOLE, PASS, REFUSE, Proxy, nth_request
from servers import Server, database_name, eventually, execute, records_of, role_name

from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.db.pg_connection import connect_postgresql, name_session
from kdb_fast.records import Record

PASSWORD = "hunter2%40@/ %SENTINEL"
ROWS = 60
RECORDS = records_of([f"text: number {i} {'word ' * (i % 7)}".strip() for i in range(ROWS)])

FIRST_WRITE = b"phase = 'write'"
"""In the first statement of each flush."""

OURS = "kdb_search, kdb_fast_runs, kdb_fast_rejects, kdb_fast_state, kdb_fast_migrations"


class Job:
    """One command on one database: a file of records, in shards of 8 rows and flushes of about 16.

    Attributes:
        url: What ``--db`` is.
        records: What the file holds.
    """

    def __init__(self, commands: Commands, address: DatabaseAddress, url: str, folder: Path) -> None:
        self.commands, self.address, self.url = commands, address, url
        self._file = folder / "notes.jsonl"
        self.records: list[Record] = []
        self.write(RECORDS)

    def write(self, records: Sequence[Record]) -> None:
        """Let the file hold these records."""
        self.records = list(records)
        lines = [{"id": r.key[1], "text": r.content.removeprefix("text: ")} for r in records]
        self._file.write_text("\n".join(json.dumps(line) for line in lines))

    @property
    def arguments(self) -> list[str]:
        return ["reindex", "--from", str(self._file), "--entity", "Note", "--json", "--no-progress"]

    def start(self, *options: str, **environment: str) -> Command:
        return self.commands.start(*self.arguments, *options, **{"KDB_FAST_DB": self.url, **environment})

    def run(self, *options: str, **environment: str) -> Command:
        """The command, ended; nothing that it printed holds any part of the password."""
        command = self.start(*options, **environment)
        command.wait()
        for secret in ("hunter2", "SENTINEL"):
            assert secret not in command.out + command.err
        return command

    def fails(self, code: int, *told: str, options: Sequence[str] = (), **environment: str) -> str:
        """The command ends with this code, and says all of these words, what is safe, and what to do."""
        command = self.run(*options, **environment)
        assert command.poll() == code, command.err
        for words in told:
            assert words in command.err
        error = command.receipt["error"]
        assert error["exit_code"] == code
        assert error["remedy"] or code == 2
        if "run" in command.receipt:
            assert "Safe in the database: " in command.err
            assert "To carry on: kdb-fast reindex" in command.err
        return command.err

    def completes(self, *options: str, **environment: str) -> dict[str, Any]:
        """The command ends well, and the index is right."""
        committed = self.committed()
        command = self.run(*options, **environment)
        assert command.poll() == 0, command.err
        assert command.receipt["unchanged"] == committed
        oracles.check(self.address, self.records, command.receipt, vector=poison_worker.vector_of)
        return command.receipt

    def committed(self) -> int:
        """Rows in the index now."""
        if self.address.dialect == "postgresql":
            if execute(self.address, "SELECT to_regclass('kdb_search')") == [(None,)]:
                return 0
        elif not Path(self.address.conninfo).exists():
            return 0
        return int(execute(self.address, "SELECT count(*) FROM kdb_search WHERE embedding IS NOT NULL")[0][0])


@pytest.fixture
def proxy(database: DatabaseAddress) -> Iterator[Proxy]:
    """Before the server, for a new database with pgvector."""
    execute(database, "CREATE EXTENSION vector")
    with Proxy(database) as proxy:
        yield proxy


@pytest.fixture
def job(commands: Commands, database: DatabaseAddress, proxy: Proxy, tmp_path: Path) -> Iterator[Job]:
    yield Job(commands, database, proxy.url(PASSWORD), tmp_path)
    assert commands.processes() == []


def once(pattern: bytes, act: Callable[[], object], n: int = 1) -> Callable[[bytes], str]:
    """For ``on_request``: call ``act`` before the n-th piece with this pattern is forwarded."""
    decide = nth_request(pattern, n, "act")

    def request(data: bytes) -> str:
        if decide(data) == "act":
            act()
        return FORWARD

    return request


def with_options(url: str, **settings: str) -> str:
    """The address with settings of the server for its sessions."""
    return f"{url}?options=" + quote(" ".join(f"-c {name}={value}" for name, value in settings.items()))


# -- lost connections --------------------------------------------------------------------------------------


def test_server_that_cannot_be_reached(job: Job, proxy: Proxy) -> None:
    proxy.mode = REFUSE
    job.fails(5, f"Cannot connect to postgresql://127.0.0.1:{proxy.port}/{database_name(job.address)}")
    proxy.mode = HOLE
    job.fails(5, "Cannot connect to", "timeout", PGCONNECT_TIMEOUT="1")
    proxy.mode = PASS
    job.completes()


@pytest.mark.parametrize("what", [CUT_BEFORE, CUT_AFTER])
def test_connection_lost_in_each_commit(job: Job, proxy: Proxy, what: str) -> None:
    for n in itertools.count(1):
        before = proxy.cuts
        decide = proxy.on_request = nth_request(b"COMMIT\0", n, what)
        receipt = job.completes()
        assert (receipt["stored"], receipt["superseded"]) == (ROWS, 0), (n, receipt)
        hits = decide.hits  # type: ignore[attr-defined]
        assert proxy.cuts - before == (n <= hits)
        if n > hits:
            break
        execute(job.address, f"DROP TABLE {OURS}")
    assert hits >= 8


@pytest.mark.parametrize(("pattern", "what", "n"), [(b"FROM STDIN", CUT_AFTER, 1), (b"PGCOPY", CUT_BEFORE, 3)])
def test_connection_lost_in_copy(job: Job, proxy: Proxy, pattern: bytes, what: str, n: int) -> None:
    proxy.on_request = nth_request(pattern, n, what)
    receipt = job.completes("--workers", "2")
    assert (receipt["stored"], proxy.cuts) == (ROWS, 1)


def test_connection_lost_in_copy_without_the_server_knowing(job: Job, proxy: Proxy) -> None:
    # Its session would keep its locks until the server's own keepalive, hours later.
    proxy.on_request = once(b"PGCOPY", proxy.half_open, n=2)
    assert job.completes("--workers", "2")["stored"] == ROWS
    assert proxy.cuts >= 2


def test_connection_that_passes_nothing_on_any_more(job: Job, proxy: Proxy) -> None:
    proxy.on_request = once(b"PGCOPY", proxy.strand, n=2)
    assert job.completes("--workers", "2", KDB_FAST_SILENCE="0.5")["stored"] == ROWS
    assert proxy.cuts >= 2


def test_network_that_passes_nothing_on_any_more(job: Job, proxy: Proxy) -> None:
    proxy.on_request = once(b"PGCOPY", lambda: setattr(proxy, "mode", HOLE), n=2)
    hurry = {"KDB_FAST_SILENCE": "0.5", "PGCONNECT_TIMEOUT": "1", "KDB_FAST_PATIENCE": "1"}
    job.fails(5, "Cannot connect to", options=["--workers", "2"], **hurry)
    proxy.mode = PASS
    assert 0 < job.completes()["unchanged"] < ROWS


def test_long_statement_is_waited_for(job: Job) -> None:
    # The server is asked whether it still works on it, again and again.
    execute(
        job.address,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(1.5); RETURN NULL; END $$",
    )
    job.completes()
    execute(
        job.address,
        "DELETE FROM kdb_search WHERE record_id = 'r7'; "
        "CREATE TRIGGER slow AFTER INSERT ON kdb_search FOR EACH STATEMENT EXECUTE FUNCTION slow()",
    )
    assert job.completes(KDB_FAST_SILENCE="0.3", KDB_FAST_PATIENCE="0.1")["stored"] == 1


def test_statement_of_a_session_that_nobody_knows_is_not_waited_for_for_ever(
    database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Behind a pooler the server does not know the session that libpq names.
    monkeypatch.setenv("KDB_FAST_SILENCE", "0.1")
    with connect_postgresql(database, role="test") as connection, connection.transaction():
        name_session(connection, 999_999_999)
        with pytest.raises(psycopg.OperationalError, match="no answer for"):
            connection.execute("SELECT pg_sleep(60)")


@pytest.mark.parametrize("name", ["KDB_FAST_SILENCE", "KDB_FAST_PATIENCE"])
def test_wrong_seconds_in_the_environment(job: Job, name: str) -> None:
    job.fails(2, f"{name} is '-1'; expected seconds, more than 0.", **{name: "-1"})


# -- the server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fast", "immediate", "kill"])
def test_server_restarted(postgres: Server, job: Job, proxy: Proxy, how: str) -> None:
    # The tests' server forgets the last transactions in a crash, for speed.
    execute(job.address, f"ALTER DATABASE {database_name(job.address)} SET synchronous_commit = on")
    restart = threading.Thread(target=postgres.restart, args=(how,))
    proxy.on_request = once(b"PGCOPY", restart.start, n=2)
    try:
        assert job.completes("--workers", "2")["stored"] == ROWS
    finally:
        restart.join(60)


def test_server_becomes_read_only(job: Job, proxy: Proxy) -> None:
    # As after a failover, where the old primary can still be reached.
    def read_only(value: str) -> None:
        execute(job.address, f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        execute(job.address, "SELECT pg_reload_conf()")
        eventually(lambda: execute(job.address, "SHOW default_transaction_read_only") == [(value,)])

    proxy.on_request = once(FIRST_WRITE, lambda: read_only("on"), n=2)
    try:
        job.fails(5, "The server became read-only", KDB_FAST_PATIENCE="1")
        job.fails(4, "The server is read-only")
    finally:
        read_only("off")
    assert 0 < job.completes()["unchanged"] < ROWS


@pytest.mark.parametrize(
    ("change", "undo", "told"),
    [
        (f"DROP TABLE {OURS}", "", "does not exist"),
        (
            "ALTER TABLE kdb_search RENAME COLUMN model TO other",
            "ALTER TABLE kdb_search RENAME COLUMN other TO model",
            'column "model"',
        ),
        (
            "ALTER TABLE kdb_search ALTER COLUMN embedding TYPE vector(3) USING NULL",
            "ALTER TABLE kdb_search ALTER COLUMN embedding TYPE vector(384) USING NULL",
            "holds vectors of 3 dimensions; the model gives 384",
        ),
    ],
)
def test_table_changed_in_the_middle(job: Job, proxy: Proxy, change: str, undo: str, told: str) -> None:
    proxy.on_request = once(FIRST_WRITE, lambda: execute(job.address, change), n=2)
    job.fails(4, told)
    if undo:
        assert execute(job.address, "SELECT count(*) FROM kdb_fast_rejects") == [(0,)]
        execute(job.address, undo)
    job.completes()


@pytest.fixture
def role(postgres: Server, job: Job, proxy: Proxy) -> str:
    """A new role by which the job connects. It may create tables and do all to its own; it is no superuser."""
    role = role_name(postgres.create_role(job.address, "CREATE ON SCHEMA public"))
    job.url = job.url.replace("postgres:", f"{role}:", 1)
    return role


def test_right_revoked_in_the_middle(job: Job, proxy: Proxy, role: str) -> None:
    def revoke() -> None:
        execute(job.address, "ALTER TABLE kdb_search OWNER TO postgres")

    proxy.on_request = once(FIRST_WRITE, revoke, n=2)
    job.fails(4, "permission denied")
    execute(job.address, f"ALTER TABLE kdb_search OWNER TO {role}")
    assert 0 < job.completes()["unchanged"] < ROWS


def test_too_many_connections(job: Job, role: str) -> None:
    execute(job.address, f"ALTER ROLE {role} CONNECTION LIMIT 1")
    job.fails(5, "too many connections for role", options=["--workers", "2"], KDB_FAST_PATIENCE="1")
    # One more comes free while the writer waits for it.
    command = job.start("--workers", "2")
    eventually(lambda: execute(job.address, "SELECT 1 FROM kdb_fast_runs WHERE state = 'running'"))
    execute(job.address, f"ALTER ROLE {role} CONNECTION LIMIT 4")
    assert command.wait() == 0, command.err
    assert job.completes()["unchanged"] == ROWS


# -- time-outs and locks -----------------------------------------------------------------------------------


def test_server_that_ends_idle_sessions(job: Job) -> None:
    if execute(job.address, "SELECT current_setting('server_version_num')::int") < [(140_000,)]:
        pytest.skip("PostgreSQL before 14 does not end idle sessions")
    job.url = with_options(job.url, idle_session_timeout="50ms", idle_in_transaction_session_timeout="50ms")
    job.write([*RECORDS[:20], Record(("Note", "slow"), f"text: {poison_worker.SLOW}"), *RECORDS[20:]])
    job.completes("--workers", "2")


def test_short_statement_timeout_is_met_by_smaller_statements(job: Job) -> None:
    job.completes()
    execute(
        job.address,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END $$; "
        "CREATE TRIGGER slow BEFORE INSERT ON kdb_search FOR EACH ROW EXECUTE FUNCTION slow(); "
        "DELETE FROM kdb_search",
    )
    # The rows of a flush would take 320 ms in one statement.
    job.url = with_options(job.url, statement_timeout="250ms")
    assert job.completes("--workers", "2")["stored"] == ROWS


def test_table_locked_by_another_session(job: Job, proxy: Proxy) -> None:
    with psycopg.connect(job.address.conninfo) as other:
        proxy.on_request = once(FIRST_WRITE, lambda: other.execute("LOCK TABLE kdb_search IN SHARE MODE"), n=2)
        job.fails(5, "A lock was not granted while writing", "pg_locks", LC_SECONDS=json.dumps({"lock": 0.2}))
    assert 0 < job.completes()["unchanged"] < ROWS


def test_deadlock_with_another_session(job: Job, proxy: Proxy) -> None:
    def blocked() -> list[tuple[Any, ...]]:
        return execute(job.address, "SELECT 1 FROM pg_locks WHERE relation = 'kdb_search'::regclass AND NOT granted")

    with psycopg.connect(job.address.conninfo) as other:

        def cross() -> None:
            # The flush holds the row of the run and waits for the table; we hold the table and ask for the row.
            eventually(blocked)
            other.execute("UPDATE kdb_fast_runs SET phase = phase")
            other.commit()

        def lock() -> None:
            other.execute("SET deadlock_timeout = '20s'")  # it is the flush that is chosen to fail
            other.execute("LOCK TABLE kdb_search IN SHARE MODE")
            crossing.start()

        crossing = threading.Thread(target=cross)
        proxy.on_request = once(FIRST_WRITE, lock, n=2)
        assert job.completes()["stored"] == ROWS
        crossing.join(30)
    eventually(lambda: execute(job.address, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
               > [(0,)])  # fmt: skip


def test_index_held_by_a_session_whose_client_is_gone(job: Job, proxy: Proxy) -> None:
    commands: list[Command] = []

    def die() -> None:
        proxy.half_open()
        commands[0].send(signal.SIGKILL)

    proxy.on_request = once(b"PGCOPY", die, n=2)
    commands.append(job.start())
    assert commands[0].wait() == -signal.SIGKILL
    told = job.fails(6, "the server has not noticed that the client is gone", LC_SECONDS=json.dumps({"lock": 0.2}))
    remedy = told.partition("End it in the database: ")[2].partition(";")[0]
    assert execute(job.address, remedy) == [(True,)]
    assert 0 < job.completes()["unchanged"] < ROWS


# -- the vector index --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [CUT_BEFORE, CUT_AFTER])
def test_connection_lost_while_the_index_is_built(job: Job, proxy: Proxy, what: str) -> None:
    job.completes()
    execute(job.address, "DELETE FROM kdb_search")
    proxy.on_request = nth_request(b'CREATE INDEX "ix_kdb_search_vector"', 1, what)
    receipt = job.completes("--workers", "2")
    assert receipt["index"].startswith("deferred")
    assert proxy.cuts == 1


def test_index_is_kept_where_it_cannot_be_dropped(job: Job) -> None:
    job.completes()
    execute(job.address, "DELETE FROM kdb_search")
    with psycopg.connect(job.address.conninfo) as other:
        other.execute("SELECT FROM kdb_search LIMIT 1")  # a transaction that somebody forgot
        assert job.run().receipt["index"] == (
            "kept: another session is using public.kdb_search, so the index could not be dropped"
        )
    assert job.completes()["unchanged"] == ROWS


def test_index_build_ended_by_the_administrator(job: Job, proxy: Proxy) -> None:
    job.completes()
    execute(job.address, "DELETE FROM kdb_search")
    statement = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE query LIKE 'CREATE INDEX \"ix_kdb_search_vector\"%' AND pid <> pg_backend_pid()"
    )
    with psycopg.connect(job.address.conninfo, autocommit=True) as other:

        def hold() -> None:
            # A row that is being written holds up the build.
            other.execute("BEGIN; DELETE FROM kdb_search WHERE false; LOCK TABLE kdb_search IN ROW EXCLUSIVE MODE")
            ending.start()

        def end() -> None:
            eventually(lambda: execute(job.address, statement))
            other.execute("ROLLBACK")

        ending = threading.Thread(target=end)
        proxy.on_request = once(b'CREATE INDEX "ix_kdb_search_vector"', hold)
        assert job.completes("--workers", "2")["stored"] == ROWS
        ending.join(30)


# -- SQLite ------------------------------------------------------------------------------------------------


@pytest.fixture
def file_job(commands: Commands, tmp_path: Path) -> Job:
    url = f"sqlite:///{tmp_path / 'index.db'}"
    return Job(commands, parse_address(url), url, tmp_path)


def test_file_locked_by_another_program(file_job: Job) -> None:
    file_job.write(RECORDS[:20])
    file_job.completes()
    file_job.write(RECORDS)
    other = sqlite3.connect(file_job.address.conninfo, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    file_job.fails(5, "kept the database locked", "End its transaction", LC_SECONDS=json.dumps({"busy": 0.2}))
    other.execute("ROLLBACK")
    other.close()
    assert file_job.completes()["unchanged"] == 20


# -- disks of the server that fill -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_disks() -> dict[str, Any]:
    """What ``small_disks.py`` found, on file systems of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a small disk that the server, another user's process, may write")
    needs_private_mounts()
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, str(Path(__file__).with_name("small_disks.py"))],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(p) for p in Path(__file__).parents[:2]])},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_tablespace_that_is_full(small_disks: dict[str, Any]) -> None:
    full = small_disks["full"]
    assert full["code"] == 7
    assert "PostgreSQL ran out of a resource while writing" in full["err"]
    assert "(53100)" in full["err"]
    assert "Free disk space" in full["err"]
    assert 0 < full["committed"] < ROWS
    assert (small_disks["freed"]["code"], small_disks["freed"]["unchanged"]) == (0, full["committed"])


def test_tablespace_of_a_column_that_is_full(small_disks: dict[str, Any]) -> None:
    full, freed = small_disks["column full"], small_disks["column freed"]
    assert full["code"] == 7, full["err"]
    assert "PostgreSQL ran out of a resource while writing" in full["err"]
    assert 0 < full["written"] < 1500
    assert (freed["code"], freed["written"], freed["unchanged"]) == (0, 1500, full["written"])


def test_shared_memory_of_the_server_is_too_small_for_the_index(small_disks: dict[str, Any]) -> None:
    found = small_disks["index"]
    assert found["code"] == 0
    assert "ran out of shared memory" in str(found["warnings"])
    assert "--shm-size" in str(found["warnings"])
    assert found["indexes"] == ["ix_kdb_search_fts", "ix_kdb_search_vector"]
