"""Slots on their way through the workers of a pool: who works on what, and what becomes of it when a worker dies.

Pure: no processes, no clock. A pool of any kind names its workers by whatever tells them apart.

A worker that dies leaves its tasks behind, and the text it died of may be among them. So a task that was begun counts
the deaths: after two it is halved, again and again, until the deadly text is alone. A half begins with one death of its
whole, and what has died alone after POISON_TRIES in all is refused: chance kills do not hit it each time. All others
are embedded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..ipc.messages import Embedded
from ..ipc.row_block import ROW_WORKER_DIED, RowBlock
from .base import SlotFilled

QUEUE_DEPTH = 2
"""Tasks a worker holds: the one it works on and the next, so that it never waits for the parent."""

POISON_TRIES = 3
"""Deaths on the same work after which it is given up: of a text that was alone, or of a writer's flush."""

LEAST_DEATHS = 5
"""So many deaths in a row are chance, whatever the number of workers; beyond three of each it is not."""

HANG_SECONDS = 60.0
"""A task without an answer for so long (or 30 times the slowest so far) belongs to a worker that hangs."""

Worker = TypeVar("Worker", bound=Hashable)


@dataclass(eq=False)
class Task:
    """Rows of a slot for one worker.

    Attributes:
        deaths: Workers that died while they worked on it.
        holders: Workers that have it: one, or two after :meth:`ShardQueue.lend`.
        done: It is answered for; a second holder's answer will be dropped.
        since: When it was given out, for a pool that lends.
    """

    slot: int
    lease: int
    start: int
    stop: int
    deaths: int = 0
    holders: int = 0
    done: bool = False
    since: float = 0.0

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


class ShardQueue(Generic[Worker]):
    """Which rows wait, and which are with which worker.

    Every row that was added and is not answered for is in exactly one task, and that task either waits or is with a
    worker. So no row is lost when workers die, and no two workers ever write to the same rows, provided that
    :meth:`take_back` is called for a worker only once it cannot write any more. Workers that write to memory of their
    own may also be lent what another has: the first answer counts.

    Args:
        blocks: What the numbers of slots stand for; texts that are given up are marked there.

    Attributes:
        deaths_in_a_row: Workers that died with something to do since the last one finished something.
        slowest: Most seconds that a task took.
    """

    def __init__(self, blocks: Sequence[RowBlock]) -> None:
        self.deaths_in_a_row = 0
        self.slowest = 0.0
        self._blocks = blocks
        self._starts_failed = 0  # of these, since a worker was last ready
        self._waiting: deque[Task] = deque()
        self._given: dict[Worker, deque[Task]] = {}
        # Of each slot: the answers so far, and the rows that are not answered for.
        self._parts: dict[int, list[Embedded]] = {}
        self._missing: dict[int, int] = {}

    def add(self, slot: int, lease: int, rows: int) -> None:
        """All rows of a slot are to be embedded. Until it is filled or cancelled, its memory is the workers'."""
        self._missing[slot] = rows
        self._parts[slot] = []
        self._waiting.append(Task(slot, lease, 0, rows))

    def tasks_of(self, worker: Worker) -> Sequence[Task]:
        """What a worker was given and has not answered; it works on the first."""
        return self._given.get(worker, ())

    def wants_work(self, workers: int) -> bool:
        """Whether so many workers would be idle soon."""
        return len(self._waiting) + sum(map(len, self._given.values())) < QUEUE_DEPTH * workers

    def give_out(self, ready: Sequence[Worker]) -> Iterator[tuple[Worker, Task]]:
        """Give waiting tasks to workers that have room, idle ones first."""
        for depth in range(1, QUEUE_DEPTH + 1):
            for worker in ready:
                if not self._waiting:
                    return
                tasks = self._given.setdefault(worker, deque())
                if len(tasks) < depth:
                    self._hand(worker, self._waiting.popleft())
                    yield worker, tasks[-1]

    def _hand(self, worker: Worker, task: Task) -> None:
        self._given.setdefault(worker, deque()).append(task)
        task.holders += 1

    def lend(self, worker: Worker, task: Task) -> None:
        """Give a worker what another one has and may not answer for long."""
        self._hand(worker, task)

    @property
    def hang_seconds(self) -> float:
        """After so long without an answer a worker hangs."""
        return max(HANG_SECONDS, 30 * self.slowest)

    @property
    def waits(self) -> bool:
        """Whether there is a task that no worker has."""
        return bool(self._waiting)

    def unanswered(self) -> Iterator[Task]:
        """Tasks that workers have and have not answered; one that was lent comes twice."""
        return (task for tasks in self._given.values() for task in tasks if not task.done)

    def task_of(self, worker: Worker, answer: Embedded) -> Task | None:
        """The task of a worker that an answer is about; None for a lease that is over."""
        asked = answer.lease, answer.start, answer.stop
        return next((task for task in self.tasks_of(worker) if (task.lease, task.start, task.stop) == asked), None)

    def answered(self, worker: Worker, answer: Embedded) -> SlotFilled | None:
        """A worker has finished a task. Returns the slot if that was its last part."""
        task = self.task_of(worker, answer)
        if task is None:
            return None
        self._given[worker].remove(task)
        task.holders -= 1
        self.deaths_in_a_row = 0
        if task.done:
            return None
        task.done = True
        self.slowest = max(self.slowest, answer.seconds)
        return self._complete(answer)

    def cancel(self) -> set[int]:
        """Forget the slots of which nothing is with a worker, and return them.

        What a worker was sent cannot be called back: it will write to these slots.
        """
        sent = {task.slot for tasks in self._given.values() for task in tasks}
        cancelled = {task.slot for task in self._waiting} - sent
        self._waiting = deque(task for task in self._waiting if task.slot in sent)
        for slot in cancelled:
            del self._missing[slot], self._parts[slot]
        return cancelled

    # -- deaths ----------------------------------------------------------------------------------------

    def started(self) -> None:
        """A worker is ready: starting them works."""
        self._starts_failed = 0

    def count_death(self, worker: Worker, *, ready: bool, workers: int) -> bool:
        """A worker died; whether to give up, because so many died in a row without finishing anything.

        Args:
            ready: It had said that it is; else it could not even start.
            workers: How many there are, with this one.
        """
        if self.tasks_of(worker) or not ready:
            self.deaths_in_a_row += 1
            self._starts_failed += not ready
        limit = max(LEAST_DEATHS, 3 * workers)
        return self.deaths_in_a_row >= limit and (self._starts_failed >= limit or not self.is_halving)

    @property
    def is_halving(self) -> bool:
        """Whether deaths are being traced to single texts: then they are expected, and bounded by the halving.

        Where nothing was embedded yet it is rather the model that ends every process.
        """
        has_embedded = self.slowest > 0.0
        tasks = [*self._waiting, *self.unanswered()]
        return any(t.deaths >= 2 or (t.deaths and (has_embedded or t.rows == 1)) for t in tasks)

    def take_back(self, worker: Worker, *, ready: bool) -> list[SlotFilled]:
        """A worker died and cannot write any more: what it had not answered waits again.

        Args:
            ready: It had begun with the first of its tasks.

        Returns:
            Slots that are filled now, because what was missing is a text that is given up.
        """
        filled = []
        for position, task in enumerate(self._given.pop(worker, ())):
            task.holders -= 1
            if task.done:
                continue
            if task.holders:
                task.deaths += ready and not position
            elif position or not ready:
                self._waiting.appendleft(task)
            elif done := self._after_a_death(task):
                filled.append(done)
        return filled

    def _after_a_death(self, task: Task) -> SlotFilled | None:
        task.deaths += 1
        if task.rows == 1 and task.deaths >= POISON_TRIES:
            block = self._blocks[task.slot]
            block.refuse(task.start, ROW_WORKER_DIED)
            crc = block.checksum(task.start, task.stop)
            return self._complete(Embedded(task.slot, task.lease, task.start, task.stop, 0, 0, 0, 0.0, crc))
        if task.rows > 1 and task.deaths >= 2:
            middle = (task.start + task.stop) // 2
            for start, stop in ((middle, task.stop), (task.start, middle)):
                self._waiting.appendleft(Task(task.slot, task.lease, start, stop, 1))
        else:
            self._waiting.appendleft(task)
        return None

    def _complete(self, answer: Embedded) -> SlotFilled | None:
        parts = self._parts[answer.slot]
        parts.append(answer)
        self._missing[answer.slot] -= answer.stop - answer.start
        if self._missing[answer.slot]:
            return None
        del self._missing[answer.slot], self._parts[answer.slot]
        return SlotFilled.of(parts)
