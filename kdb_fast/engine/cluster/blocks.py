"""The blocks of a run on a cluster: which actor has which, and how their vectors come into the slab.

Giving out, halving and the counting of deaths are those of :class:`~..shard_queue.ShardQueue`, as with processes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...ipc.messages import Embed
from ...ipc.slab import Slab
from ..base import SlotFilled
from ..shard_queue import QUEUE_DEPTH, ShardQueue, Task
from .base import Actor, Answered

SLOW_TIMES = 4.0
"""A block that takes so many times as long as blocks do is given to an idle actor as well, when nothing waits."""

LEAST_SLOW_SECONDS = 2.0
"""Before that no block is slow."""


class Blocks:
    """What waits, what is with an actor, and what is filled.

    Args:
        slab: The slots; those that were added are ours until they are filled.
        send: Called with an actor, an order and its texts.

    Attributes:
        queue: The tasks.
        filled: Slots since somebody took them from here.
    """

    def __init__(self, slab: Slab, send: Callable[[Actor, Embed, list[str]], None]) -> None:
        self.queue: ShardQueue[Actor] = ShardQueue(slab.slots)
        self.filled: list[SlotFilled] = []
        self._slots, self._send = slab.slots, send
        self._room: dict[Actor, None] = {}  # ready, and may be given a block
        self._usual = 0.0  # seconds that a block takes

    def add(self, order: Embed) -> None:
        """All rows of a slot are to be embedded."""
        self.queue.add(order.slot, order.lease, order.stop)

    def ready(self, actor: Actor) -> None:
        """An actor may be given blocks."""
        self._room[actor] = None
        self.queue.started()

    def take_back(self, actor: Actor, *, begun: bool) -> None:
        """An actor is gone. ``begun``: with its first block, so that a text of it may be the reason."""
        self._room.pop(actor, None)
        self.filled += self.queue.take_back(actor, ready=begun)

    def give_out(self, now: float) -> None:
        """Give what waits to actors that have room."""
        if not (self._room and self.queue.waits):
            return
        for actor, task in self.queue.give_out(list(self._room)):
            task.since = now
            self._give(actor, task, now)

    def lend(self, now: float) -> None:
        """A slow host must not hold up the end: what takes long is given to idle actors as well, the oldest first."""
        if self.queue.waits:
            return
        slow = max(LEAST_SLOW_SECONDS, SLOW_TIMES * self._usual)
        for actor in [actor for actor in self._room if not self.queue.tasks_of(actor)]:
            late = [task for task in self.queue.unanswered() if now - task.since > slow and task.holders == 1]
            if not late:
                return
            task = min(late, key=lambda task: task.since)
            self.queue.lend(actor, task)
            self._give(actor, task, now)

    def _give(self, actor: Actor, task: Task, now: float) -> None:
        tasks = self.queue.tasks_of(actor)
        if tasks[0] is task:
            actor.since = now
        if len(tasks) == QUEUE_DEPTH:
            del self._room[actor]
        order = Embed(task.slot, task.lease, task.start, task.stop)
        self._send(actor, order, self._slots[task.slot].contents(task.start, task.stop))

    def answered(self, event: Answered, now: float) -> bool:
        """Copy the vectors into their slot, unless another was first; returns whether this was."""
        actor, answer = event.actor, event.embedded
        actor.since = now
        self._room[actor] = None
        task = self.queue.task_of(actor, answer)
        first = task is not None and not task.done
        if first:
            self._copy(event)
            self._usual = answer.seconds if not self._usual else 0.9 * self._usual + 0.1 * answer.seconds
        if filled := self.queue.answered(actor, answer):
            self.filled.append(filled)
        return first

    def _copy(self, event: Answered) -> None:
        """The slot's memory is ours until it is filled. The writer compares the checksum."""
        slot, rows = self._slots[event.embedded.slot], slice(event.embedded.start, event.embedded.stop)
        slot.code[rows] = np.frombuffer(event.codes, dtype=np.uint8)
        memory, at = slot.vectors[rows].reshape(-1).data.cast("B"), 0
        for part in event.vectors:
            memory[at : at + len(part)] = part
            at += len(part)
