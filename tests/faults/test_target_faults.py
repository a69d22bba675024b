"""A run of a kept target, ``kdb-fast reindex articles``, meets a fault; then the same command does the rest.

A column of an application's table and a table of vectors beside it, on both databases. First a fault at every named
point: by default each point meets one kind, database and action in turn, with ``KDB_FAST_FAULT_LOOP=full`` all of them.
Then what happens to the table, its rows and its locks meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
from collections.abc import Iterator

import oracle as oracles
import poison_worker
import psycopg
import pytest
import target_oracle
from commands import Command, Commands
from servers import Server, eventually, execute
from target_job import HOLDER, KINDS, Jobs, TargetJob
from test_fault_loop import ACTIONS, DEFECT, FULL, KILLED, LOOPED, PARENT, POSTGRESQL_ONLY, RESOURCE

from kdb_fast.db.address import DatabaseAddress

REFUSED, DATABASE = 4, 5
"""Exit codes."""

Case = tuple[str, str, str, str, int]
"""Database, kind, point, action, the hit that it meets."""

SECOND = (("store.after_copy", "hang"), ("pipeline.flush", "kill"))
"""Also in a later part of what is written."""

ALL = [
    (dialect, kind, point, action, hit)
    for dialect in ("postgresql", "sqlite")
    for kind in KINDS
    for point in LOOPED
    for action in ACTIONS
    for hit in ((1, 2) if (point, action) in SECOND else (1,))
    if dialect == "postgresql" or point not in POSTGRESQL_ONLY
]


def in_turn() -> Iterator[Case]:
    for number, point in enumerate(LOOPED):
        dialect = "postgresql" if number % 2 or point in POSTGRESQL_ONLY else "sqlite"
        # By sevens, so that neighbouring points of one process do not all meet the same.
        yield dialect, KINDS[number // 2 % 2], point, ACTIONS[number * 7 // 4 % 4], 1
    for number, (point, action) in enumerate(SECOND):
        yield ("postgresql", "sqlite")[number], "column", point, action, 2


@pytest.fixture(scope="module")
def jobs(postgres: Server, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    found = Jobs(postgres, commands, tmp_path_factory.mktemp("jobs"))
    yield found
    found.close()


def expected_exit(point: str, action: str) -> int:
    """Of the run that meets the fault: a child's death is made good, the parent's ends the run."""
    if not point.startswith(PARENT):
        return 0
    return {"kill": KILLED, "hang": KILLED, "raise": DEFECT, "enospc": RESOURCE}[action]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("dialect", "kind", "point", "action", "hit"), ALL if FULL else list(in_turn()))
def test_fault_at_any_point(jobs: Jobs, dialect: str, kind: str, point: str, action: str, hit: int) -> None:
    job = jobs.of(dialect, kind)
    database, commands = jobs.copy(job), job.commands
    if point == "supervisor.reap":
        (commands.mark / poison_worker.MORTAL).touch()
    command = job.start(database, "--workers", "1", KDB_FAST_FAULT=f"{point}:{hit}:{action}")
    if action == "hang" and point.startswith(PARENT):
        command.wait_until_stopped()
        command.kill()
    code = command.wait()
    assert commands.fired(), f"the point {point} is not hit"
    assert code == expected_exit(point, action), command.err
    if code == 0:
        receipt = command.receipt
        assert receipt["stored"] + receipt["reused"] == job.to_write
    else:
        eventually(lambda: not commands.processes())
        eventually(lambda: not oracles.sessions(database))
        receipt = job.run(database)
    eventually(lambda: not commands.processes())
    job.check(database, receipt)


# -- what happens to the table meanwhile ---------------------------------------------------------------------

both = pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
kinds = pytest.mark.parametrize("kind", KINDS)


@contextlib.contextmanager
def before_the_first_flush(job: TargetJob, database: DatabaseAddress) -> Iterator[Command]:
    """A run that has read and embedded everything, and is stopped; then it goes on to its end."""
    command = job.start(database, "--workers", "1", KDB_FAST_FAULT="pipeline.flush:1:hang")
    command.wait_until_stopped()
    assert job.commands.fired(), command.err
    yield command
    command.send(signal.SIGCONT)
    command.wait()


CHANGES = {
    # What is done meanwhile, and what undoes it.
    "renamed": ("ALTER TABLE {holder} RENAME TO kept", "ALTER TABLE kept RENAME TO {holder}"),
    "column renamed": (
        "ALTER TABLE {holder} RENAME COLUMN embedding TO other",
        "ALTER TABLE {holder} RENAME COLUMN other TO embedding",
    ),
    "retyped": (
        "ALTER TABLE {holder} RENAME COLUMN embedding TO kept; ALTER TABLE {holder} ADD COLUMN embedding text",
        "ALTER TABLE {holder} DROP COLUMN embedding; ALTER TABLE {holder} RENAME COLUMN kept TO embedding",
    ),
}


@pytest.mark.parametrize(
    ("dialect", "kind", "change"),
    [
        ("postgresql", "column", "retyped"),
        ("postgresql", "table", "renamed"),
        ("sqlite", "column", "column renamed"),
    ],
)
def test_the_table_changes_during_a_run(jobs: Jobs, dialect: str, kind: str, change: str) -> None:
    job = jobs.of(dialect, kind)
    database = jobs.copy(job)
    do, undo = (part.format(holder=HOLDER[kind]) for part in CHANGES[change])
    with before_the_first_flush(job, database) as command:
        execute(database, do)
    assert command.wait() == REFUSED, command.err
    assert "changed" in command.err
    assert "during the run?" in command.err
    execute(database, undo)
    receipt = job.run(database)
    assert receipt["stored"] + receipt["reused"] == job.to_write
    job.check(database, receipt)


def test_the_table_that_is_read_is_dropped_during_a_run(jobs: Jobs) -> None:
    job = jobs.of("sqlite", "column")
    database = jobs.copy(job)
    with before_the_first_flush(job, database) as command:
        execute(database, "DROP TABLE articles")
    assert command.wait() == REFUSED, command.err
    again = job.start(database)
    assert again.wait() == REFUSED, again.err
    assert "There is no table articles" in again.err
    assert "sqlite_sequence" not in again.err, "no table of an application is proposed in its place"


def test_the_table_of_vectors_is_dropped_during_a_run_and_made_again(jobs: Jobs) -> None:
    job = jobs.of("postgresql", "table")
    database = jobs.copy(job)
    with before_the_first_flush(job, database) as command:
        execute(database, "DROP TABLE articles_vectors")
    assert command.wait() == REFUSED, command.err
    receipt = job.run(database)
    assert receipt["stored"] + receipt["reused"] == receipt["read"]
    target_oracle.check_rows(database, "articles", "table", poison_worker.vector_of)


def test_what_is_known_of_the_vectors_is_dropped_during_a_run(jobs: Jobs) -> None:
    """Then none of them is known to be ours: they are left alone until it is said that they may be overwritten."""
    job = jobs.of("postgresql", "column")
    database = jobs.copy(job)
    with before_the_first_flush(job, database) as command:
        execute(database, "DROP TABLE kdb_fast_articles_state")
    assert command.wait() == REFUSED, command.err
    receipt = job.run(database)
    assert receipt["foreign"] == receipt["unchanged"] == 9
    assert receipt["stored"] + receipt["reused"] == job.to_write - 3
    replaced = job.start(database, "--replace")
    assert replaced.wait() == 0, replaced.err
    # That of a row without a text is nobody's business but the application's.
    execute(database, "UPDATE articles SET embedding = NULL WHERE id = 5; UPDATE articles SET theirs = false")
    target_oracle.check_rows(database, "articles", "column", poison_worker.vector_of)


@kinds
@both
def test_rows_come_go_and_change_between_reading_and_writing(jobs: Jobs, dialect: str, kind: str) -> None:
    job = jobs.of(dialect, kind)
    database = jobs.copy(job)
    with before_the_first_flush(job, database) as command:
        execute(database, "DELETE FROM articles WHERE id IN (3, 7, 101, 102)")
        execute(database, "UPDATE articles SET body = 'changed meanwhile' WHERE id IN (4, 8, 103)")
        execute(database, "UPDATE articles SET body = NULL WHERE id IN (2, 9, 104)")
        job.add(database, 200, "new meanwhile")
    assert command.wait() == 0, command.err
    assert command.receipt["superseded"] == 3
    found = target_oracle.rows_of(database, "articles", kind)
    assert found.orphans == 0
    # A column is written where the text still is the one that was read, and such rows are read again by the same run; 8
    # was unchanged when it was read. A table beside holds what was read.
    late = {8, 200} if kind == "column" else {4, 8, 103, 200}
    assert {row.key for row in found.rows if row.wanted and not row.in_step} == late
    receipt = job.run(database)
    assert receipt["stored"] + receipt["reused"] == len(late)
    job.check(database, receipt)


@kinds
def test_an_application_holds_rows_for_long(jobs: Jobs, kind: str) -> None:
    job = jobs.of("postgresql", kind)
    database = jobs.copy(job)
    with psycopg.connect(database.conninfo) as other:
        other.execute("SELECT FROM articles WHERE id IN (2, 100, 101) FOR UPDATE")
        held = job.run(database)
        assert held["superseded"] == 3
        assert held["stored"] + held["reused"] == job.to_write - 3
    receipt = job.run(database)
    assert receipt["stored"] == 3
    job.check(database, receipt)


@pytest.mark.parametrize(("dialect", "kind"), [("postgresql", "column"), ("postgresql", "table"), ("sqlite", "column")])
def test_an_application_holds_all_of_it_for_long(jobs: Jobs, dialect: str, kind: str) -> None:
    job = jobs.of(dialect, kind)
    database = jobs.copy(job)
    command = job.start(
        database, KDB_FAST_FAULT="pipeline.flush:1:hang", LC_SECONDS=json.dumps({"busy": 0.3, "lock": 0.2})
    )
    command.wait_until_stopped()
    assert job.commands.fired(), command.err
    with holding(database, HOLDER[kind]):
        command.send(signal.SIGCONT)
        assert command.wait() == DATABASE, command.err
    told = "kept the database locked" if dialect == "sqlite" else "A lock was not granted"
    assert told in command.err
    receipt = job.run(database)
    assert receipt["stored"] + receipt["reused"] == job.to_write
    job.check(database, receipt)


@contextlib.contextmanager
def holding(database: DatabaseAddress, table: str) -> Iterator[None]:
    """An application keeps everybody else from writing."""
    if database.dialect == "sqlite":
        with contextlib.closing(sqlite3.connect(database.conninfo, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    with psycopg.connect(database.conninfo) as connection:
        connection.execute(f"LOCK TABLE {table} IN SHARE MODE".encode())
        yield


@pytest.mark.parametrize(("dialect", "kind"), [("postgresql", "column"), ("postgresql", "table"), ("sqlite", "table")])
def test_the_command_is_killed_while_its_writer_writes(jobs: Jobs, dialect: str, kind: str) -> None:
    """The writer is in the middle of its transaction, and stopped, so that it cannot end it."""
    job = jobs.of(dialect, kind)
    database = jobs.copy(job)
    command = job.start(database, "--workers", "1", KDB_FAST_FAULT="store.after_copy:1:hang")
    eventually(lambda: job.commands.fired() or command.poll() is not None)
    command.kill()
    eventually(lambda: not job.commands.processes())
    eventually(lambda: not oracles.sessions(database))
    receipt = job.run(database)
    assert receipt["stored"] + receipt["reused"] == job.to_write
    job.check(database, receipt)
