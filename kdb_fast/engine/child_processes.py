"""PARENT: the lives of worker and writer processes: started, watched, reaped and ended in one place.

Every child has a pipe of its own and shares no lock with any other, so a killed child can block nobody. A message to a
dead one is lost without an error: its end is noticed by pipe and sentinel, and whoever gave it work gives that again.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import errors
from ..errors import KdbFastError
from ..faults import fault
from ..ipc.messages import Failed, Ready, Stop
from ..ipc.spawning import describe_exit, spawn, tail
from ..resources import oom_kills, peak_rss_bytes

START_SECONDS = 120.0
"""A child that has not said Ready by then hangs: loading a large model from a cold disk takes a minute."""

STOPPED_SECONDS = 3.0
"""A child found in state "stopped" (SIGSTOP, a debugger) for so long is replaced."""

CHECK_SECONDS = 1.0
"""How often a child is checked."""

END_SECONDS = 5.0
"""Children that were told to end, and have not by then, are killed."""


class Death(NamedTuple):
    """How a child ended: in words, what it last wrote to stderr (or nothing), and whether memory had run out."""

    how: str
    stderr: str
    out_of_memory: bool


class Child:
    """One process and its pipe.

    Attributes:
        ready: It has said so.
        ended: It is dead, or cannot be heard any more; it is to be reaped.
        since: Since when it owes an answer: when it was started, given work, or answered last.
    """

    def __init__(self, name: str, target: Callable[..., None], arguments: Any, **environment: Any) -> None:
        self.name = name
        self.process, self.connection, self.stderr = spawn(name, target, arguments, **environment)
        self.ready = self.ended = False
        self.since = time.monotonic()
        self.stopped_since: float | None = None
        self.failed: Failed | None = None
        self._checked = 0.0

    def __str__(self) -> str:
        return f"{self.name} (process {self.process.pid})"

    def waitables(self) -> list[Any]:
        """Its pipe and its sentinel."""
        return [self.connection, self.process.sentinel]

    def send(self, message: Any) -> None:
        """Send a message, which nobody reads if the child is dead."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def receive(self, ready: set[Any]) -> list[Any]:
        """What it has sent, also before it died, if one of its waitables is in ``ready``."""
        messages: list[Any] = []
        if self.connection not in ready and self.process.sentinel not in ready:
            return messages
        self.ended = self.connection not in ready
        try:
            while self.connection.poll():
                messages.append(self.connection.recv())
        except (EOFError, OSError):
            self.ended = True
        for message in messages:
            self.since = time.monotonic()
            if isinstance(message, Ready):
                self.ready = True
            elif isinstance(message, Failed):
                self.failed = message
        return messages

    def is_stopped(self) -> bool:
        """Whether a signal or a debugger stopped it: then it hears nothing."""
        import psutil

        with contextlib.suppress(psutil.Error):
            state = psutil.Process(self.process.pid).status()
            return bool(state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
        return False

    def is_due(self) -> bool:
        """Whether it is time to check it; true once every CHECK_SECONDS."""
        now = time.monotonic()
        if now - self._checked < CHECK_SECONDS:
            return False
        self._checked = now
        return True

    def hangs(self, *, owes: bool, limit: float) -> bool:
        """Whether it owes an answer and has said nothing for ``limit`` seconds, or is stopped."""
        now = time.monotonic()
        if not owes and self.ready:
            self.since, self.stopped_since = now, None
            return False
        self.stopped_since = (self.stopped_since or now) if self.is_stopped() else None
        silent = now - self.since > (limit if self.ready else START_SECONDS)
        return silent or (self.stopped_since is not None and now - self.stopped_since > STOPPED_SECONDS)

    def release(self) -> None:
        """Close our ends; the process has ended."""
        with contextlib.suppress(OSError):
            self.connection.close()
            os.close(self.stderr)


class Children:
    """The processes of one engine.

    Attributes:
        peaks: Largest resident memory so far, by name.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._living: list[Child] = []
        self._oom_kills = oom_kills()
        _OPEN.add(self)

    def start(
        self,
        name: str,
        target: Callable[..., None],
        arguments: Callable[[], tuple[Any, ...]],
        *,
        credentials: bool,
        variables: tuple[str, ...] = (),
    ) -> Child:
        """Start one; see :func:`~kdb_fast.ipc.spawning.spawn`. It may be given work before it is ready.

        Raises:
            ResourceError: The system refuses another process.
        """
        child = Child(name, target, arguments, credentials=credentials, variables=variables)
        self._living.append(child)
        return child

    def check(self, child: Child, *, owes: bool, limit: float) -> str | None:
        """Look after a child from time to time; one that hangs is killed, and a person told so.

        Args:
            owes: It was given something to do.
            limit: Seconds without a word after which it hangs, once it is ready.
        """
        if not child.is_due():
            return None
        self._note_memory(child)
        if not child.hangs(owes=owes, limit=limit):
            return None
        child.process.kill()
        return f"{child} hangs; it is replaced"

    def reap(self, child: Child) -> Death:
        """Make sure that a child is dead. The memory it was given is touched by nobody once this returns.

        Raises:
            KdbFastError: What it could not go on for: model, database, lock. No successor could.
        """
        fault("supervisor.reap")
        child.process.kill()
        child.process.join(10)
        exit_code, stderr = child.process.exitcode, tail(child.stderr)
        child.release()
        self._living.remove(child)
        before, self._oom_kills = self._oom_kills, oom_kills()
        out_of_memory = exit_code == -signal.SIGKILL and self._oom_kills > before
        how = "was killed because memory ran out" if out_of_memory else describe_exit(exit_code)
        if child.failed is not None:
            how = f"ended with {child.failed.message}"
            known = getattr(errors, child.failed.kind, None)
            if isinstance(known, type) and issubclass(known, KdbFastError):
                raise known(child.failed.message, remedy=child.failed.remedy)
        return Death(how, stderr, out_of_memory)

    def close(self, *, kill: bool = False) -> None:
        """End all, at once with ``kill``."""
        for child in self._living:
            with contextlib.suppress(OSError, ValueError):
                self._note_memory(child)
                # A stopped child would not hear it.
                if kill or child.is_stopped():
                    child.process.kill()
                else:
                    child.connection.send(Stop())
        deadline = time.monotonic() + END_SECONDS
        for child in self._living:
            with contextlib.suppress(ValueError, AssertionError):
                child.process.join(max(0.1, deadline - time.monotonic()))
                if child.process.exitcode is None:
                    child.process.kill()
                    child.process.join(5)
            child.release()
        self._living = []
        _OPEN.discard(self)

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {child.name: int(child.process.pid) for child in self._living}

    def _note_memory(self, child: Child) -> None:
        self.peaks[child.name] = max(self.peaks.get(child.name, 0), peak_rss_bytes(child.process.pid))


_OPEN: weakref.WeakSet[Children] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing sends SIGTERM to what is left and waits for its end: our children do not heed that."""
    for children in list(_OPEN):
        children.close(kill=True)
