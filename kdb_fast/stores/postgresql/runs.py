"""PostgreSQL: the row of a run, which is the lock (see :mod:`.runs`)."""

from __future__ import annotations

import contextlib
import json
import uuid
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ...errors import DatabaseError, LockedError
from ...records import local_time
from ...tables.target import RUNS, Target
from ..base import FlushResult, RunSpec
from ..runs import (
    AFTER_A_CRASH,
    HEARTBEAT_AGE,
    LOOKED_AT,
    PHASE_CHARS,
    Holder,
    gives_signs,
    is_alive,
    process_is_gone,
    taken_over,
    this_process,
    wait_for_lock,
)
from . import locks
from .check import check_open, column_names
from .session import PgSession

if TYPE_CHECKING:
    import psycopg


END_SECONDS = 2.0
"""How long the end of a failed or stopped run is tried to be recorded."""


def begin(session: PgSession, *, fingerprint: str, model: str, dimensions: int, wait: float) -> RunSpec:
    """See :meth:`kdb_fast.stores.base.Store.begin_run`."""
    token = uuid.uuid4().hex

    def attempt() -> RunSpec | Holder:
        return session.retrying("taking the lock", lambda: _try_begin(session, fingerprint, model, dimensions, token))

    return wait_for_lock(attempt, wait, session.on_wait)


def _try_begin(session: PgSession, fingerprint: str, model: str, dimensions: int, token: str) -> RunSpec | Holder:
    """Take the lock, or tell who holds it.

    Args:
        token: In the row of the run until its first flush: a repetition after a lost connection finds its own row.
    """
    target = session.target
    with session.transaction() as cursor:
        locks.take(cursor)
        check_open(cursor, target)
        running = cursor.execute(
            target.statement(
                "SELECT run, host, pid, started_at, {age}, "
                "process_started, heartbeat_at, last_result FROM {kdb_fast_runs} "
                "WHERE target = %s AND state = 'running'",
                age=HEARTBEAT_AGE["postgresql"],
            ),
            (target.name,),
        ).fetchall()
        for run, host, pid, since, age, started, heartbeat_at, result in running:
            assert isinstance(since, datetime)
            if result == token:
                return RunSpec(int(run), fingerprint, model, dimensions)
            gone = process_is_gone(host, pid, started)
            alive = not gone and gives_signs(host, pid, age)
            if alive or not _abandon(cursor, target, run, heartbeat_at, gone):
                return Holder(run, host, pid, since, float(age))
        row = cursor.execute(
            target.statement(
                "INSERT INTO {kdb_fast_runs} (target, state, fingerprint, model, dimensions, host, pid, "
                "process_started, last_result) VALUES (%s, 'running', %s, %s, %s, %s, %s, %s, %s) RETURNING run"
            ),
            (target.name, fingerprint, model, dimensions, *this_process(), token),
        ).fetchone()
        assert row is not None
        return RunSpec(int(row[0]), fingerprint, model, dimensions)


def living(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, name: str | None = None) -> Holder | None:
    """A run that is going on, by whatever version of kdb-fast; None also where there is no table of runs of ours.

    Args:
        name: Only one on the target of this name.
    """
    if not column_names(cursor, target, RUNS) >= LOOKED_AT:
        return None
    running = cursor.execute(
        target.statement(
            "SELECT run, host, pid, started_at, {age}, "
            "process_started FROM {kdb_fast_runs} WHERE state = 'running' {which}",
            age=HEARTBEAT_AGE["postgresql"],
            which="AND target = %s" if name else "",
        ),
        (name,) if name else (),
    ).fetchall()
    for run, host, pid, since, age, started in running:
        if is_alive(host, pid, started, age):
            return Holder(run, host, pid, since, float(age))
    return None


def _abandon(
    cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, run: int, heartbeat_at: datetime, gone: bool
) -> bool:
    """Mark a dead run as abandoned; False if it has just given a sign of life after all.

    Args:
        gone: Its process has ended for certain. A network that held bytes back may still deliver what it sent.

    Raises:
        LockedError: Its row is locked by a session whose client is gone without the server knowing.
    """
    import psycopg

    try:
        with cursor.connection.transaction():
            cursor.execute(
                target.statement(
                    "UPDATE {kdb_fast_runs} SET state = 'abandoned', ended_at = now() "
                    "WHERE run = %s AND state = 'running' AND (heartbeat_at = %s OR %s)"
                ),
                (run, heartbeat_at, gone),
            )
            # Not whether we ended it: its own last words, that it has ended, may have come just now.
            statement = target.statement("SELECT FROM {kdb_fast_runs} WHERE run = %s AND state = 'running'")
            return cursor.execute(statement, (run,)).fetchone() is None
    except psycopg.errors.LockNotAvailable:
        row = cursor.execute(
            "SELECT pid, xact_start FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'kdb-fast/%%' AND pid <> pg_backend_pid() "
            "AND xact_start IS NOT NULL ORDER BY xact_start LIMIT 1"
        ).fetchone()
        who = f"the server's process {row[0]} (in a transaction since {local_time(row[1])})" if row else "a session"
        raise LockedError(
            f"Run {run} gives no sign of life, but {who} still holds its row: the server has not noticed that the "
            "client is gone.",
            remedy=(f"End it in the database: SELECT pg_terminate_backend({row[0]}); t" if row else "T")
            + "hen run the same command again.",
        ) from None


def after_a_crash(session: PgSession, run: int) -> bool:
    """See :meth:`kdb_fast.stores.base.Store.after_a_crash`."""
    values = {"run": run, "target": session.target.name}
    row = session.connection().execute(session.target.statement(AFTER_A_CRASH), values).fetchone()
    return bool(row and row[0])


def heartbeat(session: PgSession, run: int, phase: str) -> None:
    """A sign of life; a database that is away is the writer's business, not ours."""
    import psycopg

    with contextlib.suppress(psycopg.Error, DatabaseError), session.transaction() as cursor:
        cursor.execute("SET LOCAL lock_timeout = '200ms'; SET LOCAL statement_timeout = '2s'")
        cursor.execute(
            session.target.statement(
                "UPDATE {kdb_fast_runs} SET heartbeat_at = clock_timestamp(), phase = %s "
                "WHERE run = %s AND state = 'running'"
            ),
            (phase[:PHASE_CHARS], run),
        )


def end(session: PgSession, run: int, state: str, receipt: dict[str, Any]) -> None:
    """See :meth:`kdb_fast.stores.base.Store.end_run`."""

    def work() -> None:
        session.connection().execute(
            session.target.statement(
                "UPDATE {kdb_fast_runs} SET state = %s, phase = 'end', ended_at = now(), receipt = %s "
                "WHERE run = %s AND state = 'running'"
            ),
            (state, json.dumps(receipt), run),
        )

    # After a failure the database may be what is gone; then the next run finds out by itself that this one ended.
    session.retrying("recording the end of the run", work, seconds=None if state == "done" else END_SECONDS)


def fence(
    cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, run: int, number: int
) -> tuple[FlushResult | None, int]:
    """First statement of a flush: make sure that the run still holds the lock.

    Returns:
        The result of flush ``number`` if it was committed before, else None; and the transaction's time, in
        microseconds since 1970.

    Raises:
        LockedError: Another run has taken over.
    """
    row = cursor.execute(
        target.statement(
            "UPDATE {kdb_fast_runs} SET heartbeat_at = clock_timestamp(), phase = 'write' "
            "WHERE run = %s AND state = 'running' "
            "RETURNING last_flush, last_result, (extract(epoch FROM now()) * 1000000)::bigint"
        ),
        (run,),
    ).fetchone()
    if row is None:
        raise taken_over(run)
    return FlushResult.from_json(row[1]) if row[0] >= number else None, row[2]


def record_flush(
    cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, run: int, number: int, result: FlushResult
) -> None:
    """Last statement of a flush."""
    cursor.execute(
        target.statement("UPDATE {kdb_fast_runs} SET last_flush = %s, last_result = %s WHERE run = %s"),
        (number, result.as_json(), run),
    )
