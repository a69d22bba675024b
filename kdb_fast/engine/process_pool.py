"""PARENT: a pool of worker processes: fed, watched, replaced when they die or hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..embedding.encoder import EncoderSpec
from ..errors import ResourceError
from ..faults import fault
from ..ipc.messages import Embed, Embedded, Ready
from ..ipc.slab import Slab
from ..records import number_of
from . import worker
from .base import Event, Note, Pool
from .child_processes import Child, Children
from .shard_queue import ShardQueue


class ProcessPool(Pool):
    """Worker processes, started at once; work may be given before they are ready.

    Raises:
        ResourceError: The system refuses another process, or the workers die again and again.
        KdbFastError: What a worker could not go on for, such as a model that cannot be loaded.
    """

    def __init__(
        self,
        children: Children,
        slab: Slab,
        spec: EncoderSpec,
        *,
        workers: int,
        cpus: list[int],
        worker_target: Callable[..., None] = worker.run,
    ) -> None:
        self.workers = workers
        self._children, self._slab, self._spec, self._target = children, slab, spec, worker_target
        self._queue: ShardQueue[Child] = ShardQueue(slab.slots)
        # Pinning helps only where each worker can have a CPU of its own.
        self._cpus: list[int | None] = list(cpus[:workers]) if len(cpus) >= workers else [None] * workers
        self._workers = [self._start(number) for number in range(workers)]

    def _start(self, number: int) -> Child:
        fault("supervisor.start_worker")
        cpu = self._cpus[number]
        return self._children.start(
            f"worker-{number + 1}", self._target, lambda: (self._slab.handle(), self._spec, cpu), credentials=False
        )

    def embed(self, slot: int, lease: int, rows: int) -> None:
        self._queue.add(slot, lease, rows)
        self._feed()

    def wants_work(self) -> bool:
        return self._queue.wants_work(len(self._workers))

    def cancel(self) -> set[int]:
        return self._queue.cancel()

    def waitables(self) -> list[Any]:
        return [waitable for child in self._workers for waitable in child.waitables()]

    def collect(self, ready: set[Any]) -> list[Event]:
        events: list[Event] = []
        for child in list(self._workers):
            for message in child.receive(ready):
                if isinstance(message, Embedded):
                    if filled := self._queue.answered(child, message):
                        events.append(filled)
                elif isinstance(message, Ready):
                    self._queue.started()
            limit = self._queue.hang_seconds
            if child.ended:
                events += self._lost(child)
            elif note := self._children.check(child, owes=bool(self._queue.tasks_of(child)), limit=limit):
                events.append(Note(note))
        self._feed()
        return events

    def _feed(self) -> None:
        for child, task in self._queue.give_out([child for child in self._workers if child.ready]):
            if self._queue.tasks_of(child)[0] is task:
                child.since = time.monotonic()
            child.send(Embed(task.slot, task.lease, task.start, task.stop))

    def _lost(self, child: Child) -> list[Event]:
        """Reap a worker, take its work back and start a successor."""
        death = self._children.reap(child)
        if self._queue.count_death(child, ready=child.ready, workers=len(self._workers)):
            raise ResourceError(
                f"Embedding processes died {self._queue.deaths_in_a_row} times in a row without finishing anything; "
                f"the last one {death.how}.{death.stderr}",
                remedy="Check the model with `kdb-fast models list` and the memory limit; then run the same command "
                "again. What was committed is safe.",
            )
        number = self._workers.index(child)
        if death.out_of_memory and len(self._workers) > 1:
            # The same number of workers would run out of memory again.
            del self._workers[number], self._cpus[number]
            self.workers = len(self._workers)
            what = f"going on with {number_of(self.workers, 'worker')}"
        else:
            self._workers[number] = self._start(number)
            what = "replaced, its shard is given out again"
        return [Note(f"{child} {death.how}; {what}"), *self._queue.take_back(child, ready=child.ready)]
