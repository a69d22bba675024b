"""SQLite: the row of a run, which is the lock (see :mod:`.runs`). SQLite's own lock lasts for a transaction only."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from typing import Any

from ...db.sqlite import moment, now
from ...db.sqlite_session import transaction
from ...tables.target import RUNS, Target
from ..base import FlushResult, RunSpec
from ..runs import (
    AFTER_A_CRASH,
    HEARTBEAT_AGE,
    LOOKED_AT,
    PHASE_CHARS,
    Holder,
    is_alive,
    taken_over,
    this_process,
    wait_for_lock,
)
from .check import columns

HEARTBEAT_PATIENCE_MS = 200
"""Milliseconds a heartbeat waits for a flush to end; the flush is a sign of life itself."""


RUNNING = (
    f"SELECT run, host, pid, process_started, started_at, {HEARTBEAT_AGE['sqlite']} "  # noqa: S608
    "FROM kdb_fast_runs WHERE state = 'running'"
)


def begin(
    connection: sqlite3.Connection,
    target: Target,
    *,
    fingerprint: str,
    model: str,
    dimensions: int,
    wait: float,
    on_wait: Callable[[str], None],
) -> RunSpec:
    """See :meth:`kdb_fast.stores.base.Store.begin_run`."""

    def attempt() -> RunSpec | Holder:
        with transaction(connection):
            holder = _holder(connection, target)
            if holder is not None:
                return holder
            return RunSpec(_start(connection, target, fingerprint, model, dimensions), fingerprint, model, dimensions)

    return wait_for_lock(attempt, wait, on_wait)


def _holder(connection: sqlite3.Connection, target: Target) -> Holder | None:
    """The living run that holds the lock; dead ones are marked as abandoned."""
    running = connection.execute(f"{RUNNING} AND target = ?", (target.name,)).fetchall()
    for run, host, pid, process_started, started_at, age in running:
        if is_alive(host, pid, process_started, age):
            return Holder(run, host, pid, moment(started_at), float(age))
        connection.execute("UPDATE kdb_fast_runs SET state = 'abandoned', ended_at = ? WHERE run = ?", (now(), run))
    return None


def living(connection: sqlite3.Connection, name: str | None = None) -> Holder | None:
    """A run that is going on, by whatever version of kdb-fast; None also where there is no table of runs of ours.

    Args:
        name: Only one on the target of this name.
    """
    if not columns(connection, RUNS).keys() >= LOOKED_AT:
        return None
    which, values = (" AND target = ?", (name,)) if name else ("", ())
    for run, host, pid, process_started, started_at, age in connection.execute(RUNNING + which, values).fetchall():
        if is_alive(host, pid, process_started, age):
            return Holder(run, host, pid, moment(started_at), float(age))
    return None


def _start(connection: sqlite3.Connection, target: Target, fingerprint: str, model: str, dimensions: int) -> int:
    number = connection.execute(
        "INSERT INTO kdb_fast_runs (target, state, fingerprint, model, dimensions, host, pid, process_started) "
        "VALUES (?, 'running', ?, ?, ?, ?, ?, ?)",
        (target.name, fingerprint, model, dimensions, *this_process()),
    ).lastrowid
    assert number is not None
    return number


def after_a_crash(connection: sqlite3.Connection, target: Target, run: int) -> bool:
    """See :meth:`kdb_fast.stores.base.Store.after_a_crash`."""
    statement = target.statement(AFTER_A_CRASH).decode().replace("%(run)s", ":run").replace("%(target)s", ":target")
    row = connection.execute(statement, {"run": run, "target": target.name}).fetchone()
    return bool(row[0])


def heartbeat(connection: sqlite3.Connection, run: int, phase: str) -> None:
    """A sign of life, unless another connection is writing just now."""
    with contextlib.suppress(sqlite3.OperationalError), transaction(connection, HEARTBEAT_PATIENCE_MS):
        connection.execute(
            "UPDATE kdb_fast_runs SET heartbeat_at = ?, phase = ? WHERE run = ? AND state = 'running'",
            (now(), phase[:PHASE_CHARS], run),
        )


def end(connection: sqlite3.Connection, run: int, state: str, receipt: dict[str, Any]) -> None:
    """See :meth:`kdb_fast.stores.base.Store.end_run`."""
    with transaction(connection):
        connection.execute(
            "UPDATE kdb_fast_runs SET state = ?, phase = 'end', ended_at = ?, receipt = ? "
            "WHERE run = ? AND state = 'running'",
            (state, now(), json.dumps(receipt), run),
        )


def fence(connection: sqlite3.Connection, run: int, number: int) -> FlushResult | None:
    """Within the flush's transaction: make sure the run still holds the lock.

    Returns:
        The result of flush ``number`` if it was committed before, else None.

    Raises:
        LockedError: Another run has taken over.
    """
    held = connection.execute(
        "UPDATE kdb_fast_runs SET heartbeat_at = ?, phase = 'write' WHERE run = ? AND state = 'running'",
        (now(), run),
    ).rowcount
    if held != 1:
        raise taken_over(run)
    last_flush, result = connection.execute(
        "SELECT last_flush, last_result FROM kdb_fast_runs WHERE run = ?", (run,)
    ).fetchone()
    return FlushResult.from_json(result) if last_flush >= number else None


def record_flush(connection: sqlite3.Connection, run: int, number: int, result: FlushResult) -> None:
    """Last statement of a flush. Its time counts as a sign of life: a flush may last longer than 30 s."""
    connection.execute(
        "UPDATE kdb_fast_runs SET last_flush = ?, last_result = ?, heartbeat_at = ? WHERE run = ?",
        (number, result.as_json(), now(), run),
    )
