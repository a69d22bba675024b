"""Runs, and the lock that keeps two of them apart: what both databases have in common.

The lock is the row of the running run with its heartbeat, not a lock of a session or a transaction: that also works
through a transaction-mode pooler, and survives a lost connection. Every flush begins by updating that row, so a run
that was taken for dead and replaced cannot write any more (a fencing token).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple, TypeVar

from ..errors import LockedError
from ..records import local_time

T = TypeVar("T")

STALE_SECONDS = 30.0
"""A run whose heartbeat is older is dead: six beats were missed (see ``HEARTBEAT_SECONDS``)."""

HEARTBEAT_SECONDS = 5.0

POLL_SECONDS = 0.5
"""Between two looks at a run that is waited for."""

PHASE_CHARS = 64
"""Of a run's phase as it is kept."""

AFTER_A_CRASH = (
    "SELECT EXISTS (SELECT 1 FROM {kdb_fast_runs} WHERE target = %(target)s AND state = 'abandoned' AND run < %(run)s "
    "AND run > coalesce((SELECT max(run) FROM {kdb_fast_runs} WHERE target = %(target)s AND state = 'done'), 0))"
)

HEARTBEAT_AGE = {
    "postgresql": "extract(epoch FROM clock_timestamp() - heartbeat_at)::float8",
    "sqlite": "(julianday('now') - julianday(heartbeat_at)) * 86400.0",
}
"""Seconds since a run's last sign of life, by the clock of the database."""

LOOKED_AT = frozenset({"run", "state", "host", "pid", "started_at", "heartbeat_at", "process_started"})
"""Columns that every version's table of runs has, by which a living run is found."""


class Holder(NamedTuple):
    """Who holds the index: the run, its machine and process, since when, and when it last gave a sign."""

    run: int
    host: str
    pid: int
    since: datetime
    heartbeat_age: float


def wait_for_lock(attempt: Callable[[], T | Holder], wait: float, on_wait: Callable[[str], None]) -> T:
    """What ``attempt`` gives, as soon as no other run is in its way.

    Args:
        attempt: Begins a run, say, or tells who holds the index.
        wait: Seconds from now on.
        on_wait: Called with what is being waited for, before each pause.

    Raises:
        LockedError: Another run holds the index after ``wait`` seconds.
    """
    deadline = time.monotonic() + wait
    while True:
        held = attempt()
        if not isinstance(held, Holder):
            return held
        if time.monotonic() >= deadline:
            raise locked(held)
        on_wait(f"waiting for run {held.run} of process {held.pid} on {held.host}")
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def locked(holder: Holder) -> LockedError:
    """The error that names who holds the index and since when."""
    return LockedError(
        f"Run {holder.run} holds the index: process {holder.pid} on {holder.host}, since "
        f"{local_time(holder.since)}, "
        f"last sign of life {holder.heartbeat_age:.0f} s ago.",
        remedy="Wait for it with --wait SECONDS, or stop it; a dead run is taken over "
        f"{STALE_SECONDS:.0f} s after its last sign.",
    )


def taken_over(run: int) -> LockedError:
    """The error for a run that writes although another one has taken its place."""
    return LockedError(
        f"Run {run} no longer holds the index: another run took it over.",
        remedy="This one stopped long enough to be taken for dead; what it committed is kept.",
    )


def is_alive(host: str, pid: int, started: float, age: float) -> bool:
    """Whether a run that has recorded no end is going on, as far as that can be known.

    Args:
        started: When its process was created.
        age: Seconds since its last sign of life.
    """
    return gives_signs(host, pid, age) and not process_is_gone(host, pid, started)


def gives_signs(host: str, pid: int, age: float) -> bool:
    """Whether a run counts as alive, as long as its process is not known to have ended.

    Args:
        age: Seconds since its last sign of life.
    """
    this_process = host == socket.gethostname() and pid == os.getpid()
    # A heartbeat from the future is no better than one from the past: one of the clocks is wrong.
    return this_process or abs(age) < STALE_SECONDS


def process_is_gone(host: str, pid: int, started: float) -> bool:
    """Whether a process of this machine has ended; False where that cannot be known (another machine)."""
    import psutil

    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(pid)
        # Two seconds: the creation time is derived from the boot time, which may be rounded differently. A zombie
        # has ended; whoever started it has not asked for its exit code yet, and in a container may never do so.
        return bool(abs(process.create_time() - started) > 2.0 or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def this_process() -> tuple[str, int, float]:
    """Machine, number and time of creation of this process, as a run's row has them."""
    import psutil

    return socket.gethostname(), os.getpid(), float(psutil.Process().create_time())
