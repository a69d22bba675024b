"""Named places where a test can make something go wrong.

``KDB_FAST_FAULT=point:n:action`` lets the n-th hit of a point in a process do one of

* ``kill``   end the process with SIGKILL
* ``raise``  raise RuntimeError
* ``hang``   stop the whole process with SIGSTOP: no thread of it runs
* ``enospc`` raise OSError(ENOSPC)

once over all processes of a run: the first to fire leaves a mark in ``KDB_FAST_FAULT_DIR``. Without the
variable a point costs one comparison.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

POINTS = (
    "source.page",
    "pipeline.classify",
    "pipeline.dispatch",
    "pipeline.embedded",
    "pipeline.flush",
    "pipeline.flushed",
    "pipeline.finish",
    "supervisor.start_worker",
    "supervisor.start_writer",
    "supervisor.reap",
    "worker.start",
    "worker.ready",
    "worker.received",
    "worker.encode",
    "worker.encoded",
    "worker.answered",
    "writer.start",
    "writer.ready",
    "writer.received",
    "writer.flushed",
    "writer.answered",
    "store.before_begin",
    "store.before_copy",
    "store.after_copy",
    "store.before_commit",
    "store.after_commit",
    "store.index_dropped",
    "store.index_build",
    "store.prune",
    "store.migrate",
    "store.migrated",
)

_plan: tuple[str, int, str] | None = None
_hits = 0


def load_plan(text: str | None) -> None:
    """Read ``point:n:action``; None or '' switches faults off. Raises ValueError for an unknown point."""
    global _plan, _hits
    _hits = 0
    if not text:
        _plan = None
        return
    point, n, action = text.split(":")
    if point not in POINTS or action not in ("kill", "raise", "hang", "enospc"):
        raise ValueError(f"KDB_FAST_FAULT is {text!r}; expected point:n:action")
    _plan = (point, int(n), action)


load_plan(os.environ.get("KDB_FAST_FAULT"))


def fault(point: str) -> None:
    """Do what the plan says for this point; nothing without a plan."""
    if _plan is None or _plan[0] != point:
        return
    global _hits
    _hits += 1
    if _hits == _plan[1] and _first_to_fire():
        _fire(_plan[2], point)


def _first_to_fire() -> bool:
    directory = os.environ.get("KDB_FAST_FAULT_DIR")
    if directory is None:
        return True
    try:
        os.close(os.open(Path(directory) / "fired", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _fire(action: str, point: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, f"fault at {point}")
    else:
        raise RuntimeError(f"fault at {point}")
