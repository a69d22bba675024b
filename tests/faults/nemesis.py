"""What makes things go wrong in the soak."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import psutil
import psycopg
from oracle import is_alive
from proxy import HOLE, PASS, REFUSE, SLOW
from servers import eventually, execute

if TYPE_CHECKING:
    from soak import Soak


class Nemesis:
    """Makes things go wrong, one at a time."""

    def __init__(self, soak: Soak, chance: random.Random) -> None:
        self._soak, self._random, self._faults = soak, chance, soak.figures.faults

    def go(self) -> None:
        weights: dict[Callable[[], str | None], float] = {
            lambda: self._signal("worker", signal.SIGKILL): 30,
            lambda: self._signal("writer", signal.SIGKILL): 14,
            lambda: self._signal("worker", signal.SIGSTOP): 8,
            lambda: self._signal("writer", signal.SIGSTOP): 6,
            self._cut: 10,
            self._half_open: 3,
            self._strand: 3,
            lambda: self._mode(HOLE, "nothing passed on"): 3,
            lambda: self._mode(REFUSE, "connections refused"): 2,
            lambda: self._mode(SLOW, "slow network"): 2,
            lambda: self._restart("fast"): 1.5,
            lambda: self._restart("immediate"): 1.5,
            lambda: self._restart("kill"): 1,
            self._crash: 1,
            self._kill_parent: 4,
            lambda: self._end_parent(signal.SIGTERM): 1,
            lambda: self._end_parent(signal.SIGINT): 1,
        }
        while not self._soak.ending.wait(self._random.uniform(0.2, 3.0)):
            (act,) = self._random.choices(list(weights), list(weights.values()))
            done, deadline = None, time.monotonic() + 5
            while done is None and time.monotonic() < deadline and not self._soak.ending.wait(0.05):
                with contextlib.suppress(psutil.Error, ProcessLookupError, psycopg.Error):  # it ended by itself
                    done = act()
            if done is not None:
                add(self._faults, done)
                self._soak.say(done)

    def _children(self) -> dict[str, list[psutil.Process]]:
        """Workers and writer of the command that runs: only the writer is given the database's address."""
        command = self._soak.command
        found: dict[str, list[psutil.Process]] = {"worker": [], "writer": []}
        if command is not None:
            for child in psutil.Process(command.pid).children():
                with contextlib.suppress(psutil.Error):
                    if "spawn_main" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                        found["writer" if "KDB_FAST_DB" in child.environ() else "worker"].append(child)
        return found

    def _signal(self, kind: str, signum: signal.Signals) -> str | None:
        children = self._children()[kind]
        if not children:
            return None
        self._random.choice(children).send_signal(signum)
        return f"{kind} {'killed' if signum == signal.SIGKILL else 'stopped'}"

    def _cut(self) -> str | None:
        before = self._soak.proxy.cuts
        self._soak.proxy.cut()
        return "connections cut" if self._soak.proxy.cuts > before else None

    def _half_open(self) -> str | None:
        before = self._soak.proxy.cuts
        self._soak.proxy.half_open()
        return "connections half open" if self._soak.proxy.cuts > before else None

    def _strand(self) -> str | None:
        before = self._soak.proxy.cuts
        self._soak.proxy.strand()
        return "connections stranded" if self._soak.proxy.cuts > before else None

    @contextlib.contextmanager
    def _outage(self) -> Iterator[None]:
        self._soak.outage = True
        try:
            yield
        finally:
            self._soak.outage = False

    def _mode(self, mode: str, name: str) -> str:
        with self._outage():
            self._soak.proxy.mode = mode
            self._soak.ending.wait(self._random.uniform(1.0, 5.0))
            self._soak.proxy.mode = PASS
        return name

    def _restart(self, how: str) -> str:
        with self._outage():
            self._soak.server.restart(how)
        return {"fast": "server restarted", "immediate": "server stopped at once", "kill": "server killed"}[how]

    def _crash(self) -> str | None:
        with self._outage():
            self._soak.server.kill_session(self._soak.address, self._random.choice(("writer", "parent", "reader")))
            eventually(self._answers, 30)
        return "server process of a session killed"

    def _answers(self) -> bool:
        try:
            return execute(self._soak.address, "SELECT 1") == [(1,)]
        except psycopg.Error:
            return False

    def _kill_parent(self) -> str | None:
        """SIGKILL the command; its children must be gone soon."""
        soak, command = self._soak, self._soak.command
        if command is None:
            return None
        family = psutil.Process(command.pid).children(recursive=True)
        soak.killed = True
        command.send(signal.SIGKILL)
        began = time.monotonic()
        left = _still_alive(family, 1)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    # Stopped while its interpreter started, before the kernel knew that it shall end with its parent:
                    # its life counts from now on.
                    process.send_signal(signal.SIGCONT)
                    soak.figures.stopped_while_starting += 1
                    began = time.monotonic()
        left = _still_alive(left, 15)
        soak.figures.longest_orphan_seconds = max(
            soak.figures.longest_orphan_seconds, round(time.monotonic() - began, 2)
        )
        soak.figures.children_left += len(left)
        for process in left:
            soak.figures.unexpected.append(f"orphan, {process.status()}: {' '.join(process.cmdline())[:200]}")
            process.kill()
        return "parent killed"

    def _end_parent(self, signum: signal.Signals) -> str | None:
        command = self._soak.command
        # Before its handlers are there a signal just ends a process.
        running = "SELECT 1 FROM kdb_fast_runs WHERE state = 'running' AND pid = %s"
        if command is None or not execute(self._soak.address, running, command.pid):
            return None
        command.send(signum)
        return f"parent given {signum.name}"


def add(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _still_alive(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended after so long."""
    deadline = time.monotonic() + seconds
    while (left := [p for p in processes if is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left
