"""Two runs on the same index at once: one holds it, the other says who does or waits; no row is written twice."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from commands import Command, FileJob, MakeJob
from poison_worker import GATED
from pooler import pooler
from servers import eventually, execute

from kdb_fast.db.address import DatabaseAddress

FULL = os.environ.get("KDB_FAST_FAULT_LOOP") == "full"
PAIRS = {"postgresql": 40 if FULL else 4, "sqlite": 30 if FULL else 4, "pooler": 30 if FULL else 2}

LOCKED = 6
"""Exit code."""


def pair(job: FileJob, number: int, *, wait: bool) -> None:
    """Change the records, start two runs at once, and look at what both of them say."""
    texts = [f"note {i} as of {number}" for i in range(9)]
    job.write([*texts, f"{GATED} note as of {number}"])  # the one that holds the index ends only when it may
    go = job.commands.mark / "go"
    go.unlink(missing_ok=True)
    options = ["--wait", "60"] if wait else []
    both = [job.start(*options, *(["--workers", "1"] if number % 5 == 0 else [])) for _ in range(2)]
    if wait:
        eventually(lambda: any("waiting for run" in command.err for command in both), 60)
    else:
        eventually(lambda: any(command.poll() is not None for command in both), 60)
    second = next(command for command in both if ("waiting for run" in command.err or command.poll() is not None))
    (first,) = [command for command in both if command is not second]
    assert first.poll() is None
    (holder,) = execute(job.database, "SELECT run, pid, host FROM kdb_fast_runs WHERE state = 'running'")
    assert holder[1] == first.pid
    if not wait:
        assert second.poll() == LOCKED, second.err
        found = re.search(r"Run (\d+) holds the index: process (\d+) on (\S+), since \d{4}-\d\d-\d\d \d\d:", second.err)
        assert found, second.err
        assert found.groups() == (str(holder[0]), str(holder[1]), holder[2])
    go.touch()
    assert first.wait() == 0, first.err
    assert (first.receipt["stored"], first.receipt["unchanged"]) == (10, 0)
    if wait:
        assert second.wait() == 0, second.err
        assert (second.receipt["stored"], second.receipt["unchanged"]) == (0, 10)
        assert f"waiting for run {holder[0]} of process {holder[1]}" in second.err
    assert execute(job.database, "SELECT count(*) FROM kdb_search WHERE kdb_fast_run = %s", holder[0]) == [(10,)]


@pytest.mark.timeout(600 if FULL else 120)
def test_pairs_of_runs(index: DatabaseAddress, make_job: MakeJob) -> None:
    job = make_job(index, [])
    for number in range(PAIRS[index.dialect]):
        pair(job, number, wait=number % 2 == 1)
    job.check(job.run())


# -- through a pooler --------------------------------------------------------------------------------------


@pytest.fixture
def pooled(database: DatabaseAddress) -> Iterator[DatabaseAddress]:
    """The database through PgBouncer, which gives each transaction any of three sessions."""
    with pooler(database, "transaction", 3) as address:
        yield address


@pytest.mark.timeout(600 if FULL else 120)
def test_pairs_of_runs_through_a_transaction_mode_pooler(
    database: DatabaseAddress, pooled: DatabaseAddress, make_job: MakeJob
) -> None:
    job = make_job(pooled, [])
    for number in range(PAIRS["pooler"]):
        pair(job, number, wait=number % 2 == 1)
    receipt = job.run()
    # The pooler keeps its sessions with the server; in none of them is a transaction open.
    states = execute(database, "SELECT state FROM pg_stat_activity WHERE application_name LIKE 'kdb-fast/%'")
    assert {state for (state,) in states} == {"idle"}
    execute(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    job.database = database
    job.check(receipt)


# -- a run that is taken for dead --------------------------------------------------------------------------


def test_run_that_was_stopped_and_replaced_cannot_write_any_more(index: DatabaseAddress, make_job: MakeJob) -> None:
    job = make_job(index, [f"note {i}" for i in range(40)])
    stale = {"stale": 1.0}
    first = job.start("--workers", "1", seconds=stale, KDB_FAST_FAULT="pipeline.flush:2:hang")
    first.wait_until_stopped()
    (job.commands.mark / "fired").unlink()
    second = job.start("--wait", "60", seconds=stale)
    assert second.wait() == 0, second.err
    assert second.receipt["unchanged"] > 0
    first.send(signal.SIGCONT)
    assert first.wait() == LOCKED, first.err
    assert "no longer holds the index: another run took it over" in first.err
    states = execute(index, "SELECT state FROM kdb_fast_runs ORDER BY run")
    assert states == [("abandoned",), ("done",)]
    job.check(second.receipt)


def test_signal_ends_a_run_that_waits_for_another(index: DatabaseAddress, make_job: MakeJob) -> None:
    job = make_job(index, [f"{GATED} note"])
    first = job.start()
    eventually(lambda: _holds(job, first), 60)
    second = job.start("--wait", "600")
    eventually(lambda: "waiting for run" in second.err, 60)
    second.send(signal.SIGTERM)
    assert second.wait(20) == 143
    assert "Stopped on request, before anything was done." in second.err
    (job.commands.mark / "go").touch()
    assert first.wait() == 0, first.err
    job.check(first.receipt)


def _holds(job: FileJob, command: Command) -> Any:
    """Whether the index is held by this run; there may be no table yet."""
    with contextlib.suppress(Exception):
        return execute(job.database, "SELECT 1 FROM kdb_fast_runs WHERE pid = %s", command.pid)
    return []
