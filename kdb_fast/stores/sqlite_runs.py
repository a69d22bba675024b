"""SQLite: runs, and the lock that keeps two of them apart.

The lock is the row of the running run with its heartbeat, as on PostgreSQL: SQLite's own lock lasts for a
transaction only. Every flush begins by updating that row, so a run that was taken for dead and replaced
cannot write any more (a fencing token).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import LockedError
from ..records import Reject, storable_key
from ..target import Target
from .base import FlushResult, Holder, RunSpec
from .pg_runs import AFTER_A_CRASH, STALE_SECONDS, locked, own_process_started, process_is_gone
from .sqlite_base import moment, now, transaction

POLL_SECONDS = 0.5
"""Between two looks at a run that is waited for."""

HEARTBEAT_PATIENCE_MS = 200
"""Milliseconds a heartbeat waits for a flush to end; the flush is a sign of life itself."""


def begin(
    connection: sqlite3.Connection,
    *,
    fingerprint: str,
    model: str,
    dimensions: int,
    wait: float,
    on_wait: Callable[[str], None],
) -> RunSpec:
    """See :meth:`kdb_fast.stores.base.Store.begin_run`."""
    deadline = time.monotonic() + wait
    while True:
        with transaction(connection):
            holder = _holder(connection)
            if holder is None:
                number = _start(connection, fingerprint, model, dimensions)
                return RunSpec(number, fingerprint, model, dimensions)
        if time.monotonic() >= deadline:
            raise locked(holder)
        on_wait(f"waiting for run {holder.run} of process {holder.pid} on {holder.host}")
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def _holder(connection: sqlite3.Connection) -> Holder | None:
    """The living run that holds the lock; dead ones are marked as abandoned."""
    rows = connection.execute(
        "SELECT run, host, pid, process_started, started_at, (julianday('now') - julianday(heartbeat_at)) * 86400.0 "
        "FROM kdb_fast_runs WHERE state = 'running'"
    ).fetchall()
    for run, host, pid, process_started, started_at, age in rows:
        gone = process_is_gone(host, pid, process_started)
        this_process = host == socket.gethostname() and pid == os.getpid()
        # A heartbeat from the future is no better than one from the past: one of the clocks is wrong.
        if not gone and (this_process or abs(age) < STALE_SECONDS):
            return Holder(run, host, pid, moment(started_at), float(age))
        connection.execute("UPDATE kdb_fast_runs SET state = 'abandoned', ended_at = ? WHERE run = ?", (now(), run))
    return None


def _start(connection: sqlite3.Connection, fingerprint: str, model: str, dimensions: int) -> int:
    number = connection.execute(
        "INSERT INTO kdb_fast_runs (state, fingerprint, model, dimensions, host, pid, process_started) "
        "VALUES ('running', ?, ?, ?, ?, ?, ?)",
        (fingerprint, model, dimensions, socket.gethostname(), os.getpid(), own_process_started()),
    ).lastrowid
    assert number is not None
    return number


def after_a_crash(connection: sqlite3.Connection, run: int) -> bool:
    """See :meth:`kdb_fast.stores.base.Store.after_a_crash`."""
    statement = Target().statement(AFTER_A_CRASH).decode().replace("%(run)s", ":run")
    row = connection.execute(statement, {"run": run}).fetchone()
    return bool(row[0])


def heartbeat(connection: sqlite3.Connection, run: int, phase: str) -> None:
    """A sign of life, unless another connection is writing just now."""
    (patience,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute(f"PRAGMA busy_timeout = {HEARTBEAT_PATIENCE_MS}")
    try:
        with contextlib.suppress(sqlite3.OperationalError), transaction(connection):
            connection.execute(
                "UPDATE kdb_fast_runs SET heartbeat_at = ?, phase = ? WHERE run = ? AND state = 'running'",
                (now(), phase[:64], run),
            )
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(patience)}")


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
        raise LockedError(
            f"Run {run} no longer holds the index: another run took it over.",
            remedy="This one stopped long enough to be taken for dead; what it committed is kept.",
        )
    last_flush, result = connection.execute(
        "SELECT last_flush, last_result FROM kdb_fast_runs WHERE run = ?", (run,)
    ).fetchone()
    return _result_from_json(result) if last_flush >= number else None


def record_flush(connection: sqlite3.Connection, run: int, number: int, result: FlushResult) -> None:
    """Last statement of a flush. Its time counts as a sign of life: a flush may last longer than 30 s."""
    connection.execute(
        "UPDATE kdb_fast_runs SET last_flush = ?, last_result = ?, heartbeat_at = ? WHERE run = ?",
        (number, json.dumps(result), now(), run),
    )


def _result_from_json(text: str) -> FlushResult:
    rows, size, deleted, lost, rejected = json.loads(text)
    return FlushResult(
        rows, size, deleted, tuple((s, r) for s, r in lost), tuple((s, r, why, text) for s, r, why, text in rejected)
    )


def forget_rejects(connection: sqlite3.Connection, run: int, stored: Sequence[tuple[str, str]]) -> None:
    """A record that is stored now is no longer rejected; what this run itself rejected stays on record."""
    row = connection.execute("SELECT EXISTS (SELECT 1 FROM kdb_fast_rejects WHERE run <> ?)", (run,)).fetchone()
    if row[0]:
        connection.executemany(
            "DELETE FROM kdb_fast_rejects WHERE entity_name = ? AND record_id = ? AND run <> ?",
            [(storable_key(entity), storable_key(record_id), run) for entity, record_id in stored],
        )


def store_rejects(connection: sqlite3.Connection, run: int, rejects: Sequence[Reject]) -> None:
    """Keep rejected records, by key and hash of the text, with the reason."""
    connection.executemany(
        "INSERT OR REPLACE INTO kdb_fast_rejects (entity_name, record_id, content_hash, reason, detail, position, run) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                storable_key(r.entity),
                storable_key(r.record_id),
                r.content_hash,
                r.reason,
                storable_key(r.detail, 500),
                r.position,
                run,
            )
            for r in rejects
        ],
    )


def rejects(connection: sqlite3.Connection, entity: str | None) -> list[dict[str, Any]]:
    """See :meth:`kdb_fast.stores.base.Store.rejects`."""
    rows = connection.execute(
        "SELECT entity_name, record_id, reason, detail, position, run, rejected_at, content_hash FROM kdb_fast_rejects "
        "WHERE ?1 IS NULL OR entity_name = ?1 ORDER BY run DESC, position, entity_name, record_id",
        (entity,),
    )
    names = ("entity", "record_id", "reason", "detail", "position", "run", "rejected_at", "content_hash")
    return [dict(zip(names, (*row[:6], moment(row[6]), bytes(row[7]).hex()), strict=True)) for row in rows]


def clear_rejects(connection: sqlite3.Connection, keys: Sequence[tuple[str, str]] | None) -> int:
    """See :meth:`kdb_fast.stores.base.Store.clear_rejects`."""
    with transaction(connection):
        if keys is None:
            return connection.execute("DELETE FROM kdb_fast_rejects").rowcount
        return connection.executemany(
            "DELETE FROM kdb_fast_rejects WHERE entity_name = ? AND record_id = ?",
            [(storable_key(entity), storable_key(record_id)) for entity, record_id in keys],
        ).rowcount
