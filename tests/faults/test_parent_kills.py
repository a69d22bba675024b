"""The process that a user started is killed or told to stop, at any moment; the same command then does the rest."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import poison_worker
import psutil
import psycopg
import pytest
from commands import Command, FileJob, MakeJob
from oracle import is_alive
from servers import eventually, execute, index_rows, kept_rejects

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.indexing.signals import stopping_by_signal

FULL = os.environ.get("KDB_FAST_FAULT_LOOP") == "full"
KILLS = 25 if FULL else 4
"""Of each database."""

ORPHAN_SECONDS = 2.0
"""So long may a child outlive its parent."""

KILLED, REJECTS, LOCKED = -9, 3, 6
"""Exit codes."""

SLOWLY: dict[str, Any] = {poison_worker.EACH_SECONDS: "0.005"}
"""Environment of a run that can be interrupted."""


# -- killed ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600 if FULL else 120)
def test_killed_again_and_again_and_started_at_once(index: DatabaseAddress, make_job: MakeJob) -> None:
    total = 100 * (KILLS + 1)
    job = make_job(index, [f"a note that counts as {i}" for i in range(total)])
    embedded = job.commands.mark / "embedded"
    embedded.touch()
    chance = random.Random(index.dialect)
    lives: list[float] = []
    killed = 0

    def start() -> Command:
        return job.start("--workers", "2", **SLOWLY)

    command = start()
    for _ in range(KILLS):
        _sleep_some_of_a_run(chance, command, job)
        children = _children(command.pid)
        command.send(signal.SIGKILL)
        killed_at = time.monotonic()
        next_command = start()
        eventually(partial(_are_gone, children))
        lives.append(time.monotonic() - killed_at)
        killed += command.wait() == KILLED
        assert command.wait() in (KILLED, 0), command.err
        command = next_command
    assert command.wait() == 0, command.err
    assert killed > KILLS / 2
    if FULL:
        assert max(lives) < ORPHAN_SECONDS
    job.check(command.receipt)

    # Nothing that was committed has been embedded again.
    numbers = dict(execute(index, "SELECT pid, run FROM kdb_fast_runs"))
    written_by = {key[1]: row.run for key, row in index_rows(index).items()}
    times: Counter[str] = Counter()
    for line in embedded.read_text().splitlines():
        pid, *ids = line.split()
        times.update(ids)
        assert all(numbers[int(pid)] <= written_by[record_id] for record_id in ids)
    assert len(times) == total
    states = [state for (state,) in execute(index, "SELECT state FROM kdb_fast_runs ORDER BY run")]
    assert "abandoned" in states
    assert set(states) <= {"abandoned", "done"}
    print(
        f"{index.dialect}: {killed} kills, {len(set(written_by.values()))} runs committed, "
        f"{times.total() - total} of {total} embedded twice, longest life of an orphan {max(lives):.2f} s"
    )


def _sleep_some_of_a_run(chance: random.Random, command: Command, job: FileJob) -> None:
    """Until any moment from the start of a run to some time after its first transactions."""
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0.0, 0.4))
        return

    def has_committed() -> bool:
        with contextlib.suppress(psycopg.Error, sqlite3.Error):  # there may be no table yet
            statement = "SELECT count(*) FROM kdb_fast_runs WHERE pid = %s AND last_flush > 0"
            return execute(job.database, statement, command.pid) != [(0,)]
        return False

    eventually(lambda: command.poll() is not None or has_committed(), 60)
    time.sleep(chance.uniform(0.0, 0.2))


def _are_gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(is_alive(process) for process in processes)


def _children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def test_text_that_killed_a_small_run_is_found_by_the_next(index: DatabaseAddress, make_job: MakeJob) -> None:
    texts = ["harmless", "harmless too"]
    job = make_job(index, [*texts, f"a {poison_worker.DEADLY} one"])
    command = job.start()
    assert command.wait() == KILLED, command.out  # the run is small enough for one process
    again = job.start()
    assert again.wait() == REJECTS, again.err
    assert (again.receipt["stored"], again.receipt["rejected"]) == (2, 1)
    assert [row[1:3] for row in kept_rejects(index)] == [("2", "worker_died")]
    third = job.start()
    assert third.wait() == REJECTS, third.err
    assert (third.receipt["unchanged"], third.receipt["rejected"]) == (2, 1)
    job.write(texts)
    last = job.run()
    assert last["workers"] == 0
    execute(index, "DELETE FROM kdb_fast_rejects")
    job.check(last)


# -- told to stop ------------------------------------------------------------------------------------------


@pytest.mark.timeout(600 if FULL else 120)
def test_stopped_again_and_again(index: DatabaseAddress, make_job: MakeJob) -> None:
    total = 100 * (KILLS + 1)
    job = make_job(index, [f"a note that counts as {i}" for i in range(total)])
    chance = random.Random(index.dialect)
    stopped = 0
    for _ in range(KILLS):
        command = job.start("--workers", "2", **SLOWLY)
        _sleep_some_of_a_run(chance, command, job)
        command.send(signal.SIGTERM)
        assert command.wait() in (143, 0, -signal.SIGTERM), command.err
        if command.poll() == 143 and command.out:
            stopped += 1
            receipt = command.receipt
            if "run" in receipt:
                assert receipt["state"] == "stopped"
                written = "SELECT count(*) FROM kdb_search WHERE kdb_fast_run = %s"
                assert execute(index, written, receipt["run"]) == [(receipt["stored"],)]
    assert stopped > KILLS / 2
    job.check(job.run())


@contextlib.contextmanager
def nobody_can_write(address: DatabaseAddress) -> Iterator[None]:
    """Another program holds a lock that every flush waits for."""
    if address.dialect == "sqlite":
        with contextlib.closing(sqlite3.connect(address.conninfo, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    with psycopg.connect(address.conninfo) as connection:
        connection.execute("LOCK TABLE kdb_search IN EXCLUSIVE MODE")
        yield


@contextlib.contextmanager
def blocked(job: FileJob, options: list[str], seconds: dict[str, float]) -> Iterator[Command]:
    """A run that waits for another program with its first flush."""
    job.run()
    # All of them wait: a shard that was embedded before the lock is held would be flushed before.
    job.write([f"changed {i} and {poison_worker.GATED}" for i in range(40)])
    embedded = job.commands.mark / "embedded"
    embedded.touch()
    command = job.start(*options, seconds=seconds)
    eventually(lambda: poison_worker.GATED in embedded.read_text() or command.poll() is not None, 60)
    with nobody_can_write(job.database):
        (job.commands.mark / "go").touch()
        time.sleep(0.5)  # the flush follows in a moment
        yield command


WAYS = pytest.mark.parametrize("options", [["--workers", "2"], []], ids=["workers", "one process"])
FOREVER = 600.0


@WAYS
def test_second_signal_ends_a_run_that_waits_for_the_database(
    index: DatabaseAddress, make_job: MakeJob, options: list[str]
) -> None:
    job = make_job(index, [f"note {i}" for i in range(40)])
    with blocked(job, options, {"drain": FOREVER, "grace": FOREVER}) as command:
        for process in job.commands.processes():  # a terminal sends it to all of them
            process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert command.poll() is None
        command.send(signal.SIGINT)
        assert command.wait(20) == 130
        eventually(lambda: not job.commands.processes())
        assert "Stopped at once; the transaction in progress was rolled back." in command.err
        assert "Traceback" not in command.err
    rows = index_rows(index)
    assert not any("changed" in row.content for row in rows.values())
    job.check(job.run())


def test_signal_while_the_processes_start(sqlite_database: DatabaseAddress, make_job: MakeJob) -> None:
    job = make_job(sqlite_database, [f"note {i}" for i in range(40)])
    command = job.start("--workers", "2")
    eventually(lambda: len(_children(command.pid)) >= 3 or command.poll() is not None, 60)
    for process in job.commands.processes():  # a terminal sends it to all of them
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGINT)
    assert command.wait() == 130
    assert command.receipt["state"] == "stopped"
    assert "Traceback" not in command.err
    job.check(job.run())


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN])
def test_run_heeds_a_terminal_that_closes_unless_it_was_told_not_to(action: signal.Handlers) -> None:
    before = signal.signal(signal.SIGHUP, action)
    try:
        with stopping_by_signal() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
        assert flag.count == (action == signal.SIG_DFL)
        assert signal.getsignal(signal.SIGHUP) == action
    finally:
        signal.signal(signal.SIGHUP, before)


@WAYS
def test_one_signal_is_enough_for_a_run_that_waits_for_the_database(
    index: DatabaseAddress, make_job: MakeJob, options: list[str]
) -> None:
    job = make_job(index, [f"note {i}" for i in range(40)])
    with blocked(job, options, {"drain": 0.2, "grace": 1.0}) as command:
        command.send(signal.SIGTERM)
        assert command.wait(20) == 143
        eventually(lambda: not job.commands.processes())
        assert "Traceback" not in command.err
        if options and index.dialect == "postgresql":
            assert (command.receipt["state"], command.receipt["stored"]) == ("stopped", 0)
            assert "To carry on: kdb-fast reindex" in command.err
    job.check(job.run())


def test_signal_ends_a_run_whose_input_does_not_come(
    sqlite_database: DatabaseAddress, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(sqlite_database, ["a note"])
    job.run()
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    command = job.start("--from", str(tmp_path / "pipe"), seconds={"grace": 0.5})
    eventually(
        lambda: execute(sqlite_database, "SELECT count(*) FROM kdb_fast_runs WHERE pid = %s", command.pid) == [(1,)]
    )
    command.send(signal.SIGTERM)
    assert command.wait(20) == 143
    os.close(pipe)
    assert execute(sqlite_database, "SELECT state FROM kdb_fast_runs ORDER BY run") == [("done",), ("stopped",)]
    job.check(job.run())
