"""PARENT: starts worker and writer processes, feeds them, watches them, replaces and stops them.

One wait over all pipes and process sentinels. Every child has a pipe of its own and shares no lock with
any other, so a killed child can block nobody. What a dead worker had not answered is given out again after
the process was reaped; what a dead writer had not answered is sent again to its successor, which sees in the
database whether it had been committed.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from .. import errors
from ..db.address import DatabaseAddress
from ..embedding.encoder import EncoderSpec
from ..errors import KdbFastError, ResourceError
from ..faults import fault
from ..ipc import messages
from ..ipc.messages import (
    Embed,
    Embedded,
    Failed,
    Finish,
    Finished,
    Flush,
    Flushed,
    IndexPrepared,
    PrepareIndex,
    Ready,
    Stop,
)
from ..ipc.row_block import ROW_WORKER_DIED
from ..ipc.slab import Slab, SlabShape
from ..ipc.spawning import describe_exit, spawn, tail
from ..resources import oom_kills, peak_rss_bytes
from ..stores.base import RunSpec
from . import worker, writer
from .base import Engine, Event, Note, filled

QUEUE_DEPTH = 2
"""Shards a worker holds: the one it works on and the next, so that it never waits for the parent."""

START_SECONDS = 120.0
"""A child that has not said Ready by then hangs: loading a large model from a cold disk takes a minute."""

HANG_SECONDS = 60.0
"""A shard without an answer for so long (or 30 times the slowest so far) belongs to a worker that hangs."""

STOPPED_SECONDS = 3.0
"""A child found in state "stopped" (SIGSTOP, a debugger) for so long is replaced."""

WRITER_SILENCE = 20.0
"""A busy writer says so every 2 s; silent for so long, it hangs."""

POISON_TRIES = 3
"""A text that was alone when its worker died so often is rejected: chance kills do not hit it each time."""

CHECK_SECONDS = 1.0


@dataclass
class _Task:
    """Rows of a slot for one worker; ``deaths`` counts workers that died while they worked on it."""

    slot: int
    lease: int
    start: int
    stop: int
    deaths: int = 0


@dataclass
class _Child:
    name: str
    process: Any
    connection: Connection
    stderr: int
    cpu: int | None = None
    ready: bool = False
    since: float = field(default_factory=time.monotonic)
    """Since when it owes an answer: when it was started, given work, or answered last."""
    stopped_since: float | None = None
    tasks: deque[_Task] = field(default_factory=deque)
    failed: Failed | None = None
    peak_rss: int = 0


class ProcessEngine(Engine):
    """Workers and writer as processes, started at once; work may be given before they are ready.

    Without an address there is no writer: the caller writes what is embedded itself.

    Raises:
        ResourceError: No shared memory, or the workers die again and again.
        KdbFastError: What a child could not go on for: model, database, lock.
    """

    def __init__(
        self,
        shape: SlabShape,
        spec: EncoderSpec | None,
        address: DatabaseAddress | None,
        run: RunSpec,
        *,
        workers: int,
        cpus: list[int],
        hang_seconds: float = HANG_SECONDS,
        worker_target: Callable[..., None] = worker.run,
    ) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.slab = Slab.create(shape)
        self.workers = workers
        self._spec, self._address, self._run = spec, address, run
        self._hang_seconds = hang_seconds
        self._worker_target = worker_target
        self._waiting: deque[_Task] = deque()
        self._parts: dict[int, list[Embedded]] = {}
        self._missing: dict[int, int] = {}
        self._events: list[Event] = []
        self._request: Flush | PrepareIndex | Finish | None = None
        self._request_deaths = 0
        self._deaths_in_a_row = 0
        self._starts_failed = 0  # of these, since a worker was last ready
        self._slowest = 0.0
        self._checked = 0.0
        self._peaks: dict[str, int] = {}
        self._oom_kills = oom_kills()
        self._workers: list[_Child] = []
        self._writer: _Child | None = None
        _OPEN.add(self)
        # Pinning helps only where each worker can have a CPU of its own.
        self._cpus: list[int | None] = list(cpus[:workers]) if len(cpus) >= workers else [None] * workers
        try:
            if address is not None:
                self._writer = self._start_writer()
            for number in range(workers):
                self._workers.append(self._start_worker(number))
        except BaseException:
            self.close(kill=True)
            raise

    # -- starting --------------------------------------------------------------------------------------

    def _start_worker(self, number: int) -> _Child:
        fault("supervisor.start_worker")
        cpu = self._cpus[number]
        return self._start(
            f"worker-{number + 1}",
            self._worker_target,
            lambda: (self.slab.handle(), self._spec, cpu),
            credentials=False,
        )

    def _start_writer(self) -> _Child:
        fault("supervisor.start_writer")
        return self._start(
            "writer", writer.run, lambda: (self.slab.handle(), self._address, self._run), credentials=True
        )

    def _start(
        self, name: str, target: Callable[..., None], arguments: Callable[[], tuple[Any, ...]], *, credentials: bool
    ) -> _Child:
        return _Child(name, *spawn(name, target, arguments, credentials=credentials))

    # -- the engine's face -----------------------------------------------------------------------------

    def embed(self, slot: int, lease: int, rows: int) -> None:
        self._missing[slot] = rows
        self._parts[slot] = []
        self._waiting.append(_Task(slot, lease, 0, rows))
        self._feed()

    def wants_work(self) -> bool:
        return len(self._waiting) + sum(len(w.tasks) for w in self._workers) < QUEUE_DEPTH * len(self._workers)

    def request(self, message: Flush | PrepareIndex | Finish) -> None:
        assert self._request is None, "the writer is given one thing at a time"
        self._request = message
        self._request_deaths = 0
        assert self._writer is not None
        self._writer.since = time.monotonic()
        self._send(self._writer, message)

    @property
    def writer_idle(self) -> bool:
        return self._request is None

    def cancel_embedding(self) -> set[int]:
        # What a worker was sent cannot be called back: it will write to these slots.
        sent = {task.slot for child in self._workers for task in child.tasks}
        cancelled = {task.slot for task in self._waiting} - sent
        self._waiting = deque(task for task in self._waiting if task.slot in sent)
        return cancelled

    def poll(self, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        while True:
            self._step(max(0.0, deadline - time.monotonic()))
            if self._events or time.monotonic() >= deadline:
                events, self._events = self._events, []
                return events

    # -- one turn of the loop --------------------------------------------------------------------------

    def _children(self) -> list[_Child]:
        return [*self._workers, *([self._writer] if self._writer else [])]

    def _step(self, timeout: float) -> None:
        children = self._children()
        objects: list[Any] = [c.connection for c in children] + [c.process.sentinel for c in children]
        ready = set(wait(objects, min(timeout, CHECK_SECONDS)))
        for child in children:
            if child.connection in ready:
                self._receive(child)
            elif child.process.sentinel in ready:
                self._receive(child)  # what it sent before it died
                self._lost(child)
        if time.monotonic() - self._checked >= CHECK_SECONDS:
            self._checked = time.monotonic()
            self._check_for_hangs()

    def _receive(self, child: _Child) -> None:
        try:
            while child.connection.poll():
                self._take(child, child.connection.recv())
        except (EOFError, OSError):
            self._lost(child)

    def _take(self, child: _Child, message: Any) -> None:
        child.since = time.monotonic()
        if isinstance(message, Embedded):
            self._embedded(child, message)
        elif isinstance(message, Ready):
            child.ready = True
            if child is not self._writer:
                self._starts_failed = 0
            self._feed()
        elif isinstance(message, (Flushed, IndexPrepared, Finished)):
            if self._request is not None:
                self._request = None
                self._events.append(message)
        elif isinstance(message, Failed):
            child.failed = message
        else:
            assert isinstance(message, messages.Busy)

    def _embedded(self, child: _Child, answer: Embedded) -> None:
        if not child.tasks or child.tasks[0].lease != answer.lease:
            return
        child.tasks.popleft()
        self._deaths_in_a_row = 0
        self._slowest = max(self._slowest, answer.seconds)
        self._complete(answer)
        self._feed()

    def _complete(self, answer: Embedded) -> None:
        slot = answer.slot
        self._parts[slot].append(answer)
        self._missing[slot] -= answer.stop - answer.start
        if self._missing[slot] == 0:
            del self._missing[slot]
            self._events.append(filled(*self._parts.pop(slot)))

    def _feed(self) -> None:
        for depth in range(1, QUEUE_DEPTH + 1):
            for child in self._workers:
                if self._waiting and child.ready and len(child.tasks) < depth:
                    task = self._waiting.popleft()
                    if not child.tasks:
                        child.since = time.monotonic()
                    child.tasks.append(task)
                    self._send(child, Embed(task.slot, task.lease, task.start, task.stop))

    def _send(self, child: _Child, message: Any) -> None:
        # A dead child is noticed by its sentinel, where its work is given to another.
        with contextlib.suppress(OSError):
            child.connection.send(message)

    # -- deaths ----------------------------------------------------------------------------------------

    def _check_for_hangs(self) -> None:
        now = time.monotonic()
        for child in self._children():
            child.peak_rss = max(child.peak_rss, peak_rss_bytes(child.process.pid))
            self._peaks[child.name] = max(self._peaks.get(child.name, 0), child.peak_rss)
            owes = bool(child.tasks) or not child.ready or (child is self._writer and self._request is not None)
            if not owes:
                child.since, child.stopped_since = now, None
                continue
            if not child.ready:
                limit = START_SECONDS
            elif child is self._writer:
                limit = WRITER_SILENCE
            else:
                limit = max(self._hang_seconds, 30 * self._slowest)
            stopped = _is_stopped(child.process.pid)
            child.stopped_since = (child.stopped_since or now) if stopped else None
            if now - child.since > limit or (child.stopped_since and now - child.stopped_since > STOPPED_SECONDS):
                self._events.append(Note(f"{child.name} (process {child.process.pid}) hangs; it is replaced"))
                child.process.kill()

    def _lost(self, child: _Child) -> None:
        """Reap a child and start its successor. Its slots are touched by nobody once this returns."""
        if child is not self._writer and child not in self._workers:
            return
        fault("supervisor.reap")
        child.process.kill()
        child.process.join(10)
        exit_code = child.process.exitcode
        how = describe_exit(exit_code)
        stderr = tail(child.stderr)
        child.connection.close()
        os.close(child.stderr)
        failed = child.failed
        out_of_memory = exit_code == -signal.SIGKILL and oom_kills() > self._oom_kills
        self._oom_kills = oom_kills()
        if out_of_memory:
            how = "was killed because memory ran out"
        if failed is not None:
            how = failed.message
            known = getattr(errors, failed.kind, None)
            if isinstance(known, type) and issubclass(known, KdbFastError):
                error = known(failed.message, remedy=failed.remedy)
                raise error
        if child is self._writer:
            self._writer_lost(child, how, stderr)
        else:
            self._worker_lost(child, how, stderr, out_of_memory)

    def _writer_lost(self, child: _Child, how: str, stderr: str) -> None:
        if self._request is not None or not child.ready:
            self._request_deaths += 1
        if self._request_deaths >= POISON_TRIES:
            raise ResourceError(
                f"The writer ended {self._request_deaths} times on the same work; the last one {how}.{stderr}",
                remedy="What was committed is safe; run the same command again.",
            )
        self._events.append(Note(f"writer (process {child.process.pid}) {how}; replaced, its flush is repeated"))
        self._writer = self._start_writer()
        if self._request is not None:
            self._send(self._writer, self._request)

    def _worker_lost(self, child: _Child, how: str, stderr: str, out_of_memory: bool) -> None:
        number = self._workers.index(child)
        if child.tasks or not child.ready:
            self._deaths_in_a_row += 1
            self._starts_failed += not child.ready
        limit = max(5, 3 * len(self._workers))
        if self._deaths_in_a_row >= limit and (self._starts_failed >= limit or not self._halving()):
            raise ResourceError(
                f"Embedding processes died {self._deaths_in_a_row} times in a row without finishing anything; "
                f"the last one {how}.{stderr}",
                remedy="Check the model with `kdb-fast models list` and the memory limit; then run the same command "
                "again. What was committed is safe.",
            )
        text = f"{child.name} (process {child.process.pid}) {how}; replaced, its shard is given out again"
        if out_of_memory and len(self._workers) > 1:
            # The same number of workers would run out of memory again.
            del self._workers[number], self._cpus[number]
            self.workers = len(self._workers)
            text = f"{child.name} (process {child.process.pid}) {how}; going on with {self.workers} workers"
        self._events.append(Note(text))
        for position, task in enumerate(child.tasks):
            self._give_out_again(task, begun=position == 0 and child.ready)
        child.tasks.clear()
        if child in self._workers:
            self._workers[number] = self._start_worker(number)
        self._feed()

    def _halving(self) -> bool:
        """Whether deaths are being traced to single texts: then they are expected, and bounded by the halving.

        Where nothing was embedded yet it is rather the model that ends every process.
        """
        has_embedded = self._slowest > 0.0
        tasks = [*self._waiting, *(t for w in self._workers for t in w.tasks)]
        return any(t.deaths >= 2 or (t.deaths and (has_embedded or t.stop - t.start == 1)) for t in tasks)

    def _give_out_again(self, task: _Task, *, begun: bool) -> None:
        if not begun:
            self._waiting.appendleft(task)
            return
        task.deaths += 1
        rows = task.stop - task.start
        if rows == 1 and task.deaths >= POISON_TRIES:
            slot = self.slab.slots[task.slot]
            slot.refuse(task.start, ROW_WORKER_DIED)
            crc = slot.checksum(task.start, task.stop)
            self._complete(Embedded(task.slot, task.lease, task.start, task.stop, 0, 0, 0, 0.0, crc))
        elif rows > 1 and task.deaths >= 2:
            middle = (task.start + task.stop) // 2
            for start, stop in ((middle, task.stop), (task.start, middle)):
                self._waiting.appendleft(_Task(task.slot, task.lease, start, stop, 1))
        else:
            self._waiting.appendleft(task)

    # -- ending ----------------------------------------------------------------------------------------

    def close(self, *, kill: bool = False) -> None:
        children = self._children()
        for child in children:
            with contextlib.suppress(OSError, ValueError):
                self._peaks[child.name] = max(self._peaks.get(child.name, 0), peak_rss_bytes(child.process.pid))
                # A stopped child would not hear it.
                if kill or _is_stopped(child.process.pid):
                    child.process.kill()
                else:
                    child.connection.send(Stop())
        deadline = time.monotonic() + 5.0
        for child in children:
            with contextlib.suppress(ValueError, AssertionError):
                child.process.join(max(0.1, deadline - time.monotonic()))
                if child.process.exitcode is None:
                    child.process.kill()
                    child.process.join(5)
            with contextlib.suppress(OSError):
                child.connection.close()
                os.close(child.stderr)
        self._workers, self._writer = [], None
        self.slab.close()

        _OPEN.discard(self)

    def peak_rss_bytes(self) -> dict[str, int]:
        return dict(self._peaks)

    def pids(self) -> dict[str, int]:
        """Process ids of the children by name, for tests and for `status`."""
        return {child.name: int(child.process.pid) for child in self._children()}


_OPEN: weakref.WeakSet[ProcessEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing sends SIGTERM to what is left and waits for its end: our children do not heed that."""
    for engine in list(_OPEN):
        engine.close(kill=True)


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    return False
