"""PARENT: the writer process: asked, watched, replaced when it dies or hangs."""

from __future__ import annotations

import time
from typing import Any

from ..db.address import DatabaseAddress
from ..errors import ResourceError
from ..faults import fault
from ..ipc.messages import Busy, Finished, Flushed, IndexPrepared, Request
from ..ipc.slab import Slab
from ..stores.base import RunSpec
from . import writer
from .base import Event, Note, Writer
from .child_processes import Child, Children
from .shard_queue import POISON_TRIES

WRITER_SILENCE = 20.0
"""A busy writer says so every 2 s; silent for so long, it hangs."""


class WriterProcess(Writer):
    """A process that writes, started at once.

    What a dead writer had not answered is sent again to its successor. That is safe: the slots of a flush are the
    writer's until its answer, so they still hold the same rows, and the run's row in the database has the number of the
    last flush that was committed. A successor that finds this one's there answers with what was noted then.

    Raises:
        ResourceError: The system refuses another process, or the writer dies on the same work again and again.
        KdbFastError: What it could not go on for: the database, the lock.
    """

    def __init__(self, children: Children, slab: Slab, address: DatabaseAddress, run: RunSpec) -> None:
        self._children, self._slab, self._address, self._run = children, slab, address, run
        self._request: Request | None = None
        self._deaths = 0  # on this request
        self._child = self._start()

    def _start(self) -> Child:
        fault("supervisor.start_writer")
        return self._children.start(
            "writer", writer.run, lambda: (self._slab.handle(), self._address, self._run), credentials=True
        )

    def request(self, message: Request) -> None:
        assert self._request is None, "the writer is given one thing at a time"
        self._request = message
        self._deaths = 0
        self._child.since = time.monotonic()
        self._child.send(message)

    @property
    def idle(self) -> bool:
        return self._request is None

    def waitables(self) -> list[Any]:
        return self._child.waitables()

    def collect(self, ready: set[Any]) -> list[Event]:
        child, events = self._child, list[Event]()
        for message in child.receive(ready):
            if isinstance(message, (Flushed, IndexPrepared, Finished)) and self._request is not None:
                self._request = None
                events.append(message)
            elif isinstance(message, Busy):
                events.append(message)
        if child.ended:
            events.append(self._lost())
        elif note := self._children.check(child, owes=not self.idle, limit=WRITER_SILENCE):
            events.append(Note(note))
        return events

    def _lost(self) -> Note:
        """Reap it, start a successor and ask that for the same."""
        child = self._child
        death = self._children.reap(child)
        if self._request is not None or not child.ready:
            self._deaths += 1
        if self._deaths >= POISON_TRIES:
            raise ResourceError(
                f"The writer ended {self._deaths} times on the same work; the last one {death.how}.{death.stderr}",
                remedy="What was committed is safe; run the same command again.",
            )
        self._child = self._start()
        if self._request is not None:
            self._child.send(self._request)
        return Note(f"{child} {death.how}; replaced, its flush is repeated")
