"""Which host has which actors, which actor has which block, and what becomes of a block when one of them goes.

Pure but for the clock: what really happens on the cluster comes in as events (:mod:`.base`), so all of it can be tried
without one. The halving of deadly blocks, the counting of deaths and the depth of two blocks an actor are those of
:class:`~..shard_queue.ShardQueue`, as with processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from ... import errors
from ...embedding.encoder import EncoderSpec
from ...errors import ClusterError, KdbFastError, ResourceError
from ...ipc.messages import Embed, Embedded
from ...ipc.slab import Slab, Slot
from ...receipt import HostShare
from ..base import SlotFilled
from ..plan import WORKER_BYTES
from ..shard_queue import ShardQueue, Task
from .base import (
    Actor,
    ActorFailed,
    ActorReady,
    Answered,
    Cluster,
    ClusterEvent,
    HostFit,
    HostPrepared,
    HostUnfit,
    Node,
    NodesSeen,
)
from .messages import ClusterSpec, News, Survey

START_SECONDS = 120.0
"""An actor that is not ready by then is given up: its host hangs, or another job has its CPU."""

AGAIN_SECONDS = 60.0
"""After so long a host is tried again that could not take part for a reason that may pass."""

SLOW_TIMES = 4.0
"""A block that takes so many times as long as blocks do is given to an idle actor as well, when nothing waits."""

LEAST_SLOW_SECONDS = 2.0
"""Before that no block is slow."""


class State(Enum):
    """Of a host."""

    EXAMINED = "is being examined"
    FIT = "gets the model"
    READY = "embeds"
    LEFT_OUT = "is left out"
    GONE = "is gone"


@dataclass(eq=False)
class Host:
    """A host of the cluster, and what it has done."""

    node: Node
    state: State = State.EXAMINED
    reason: str = ""
    again_at: float = float("inf")
    most: int = 0
    """Actors that its CPUs and its memory allow."""
    spec: EncoderSpec | None = None
    actors: list[Actor] = field(default_factory=list)
    records: int = 0
    tokens: int = 0
    deaths: int = 0

    def share(self) -> HostShare:
        """For the parent and the receipt."""
        here = self.state in (State.FIT, State.READY)
        ready = sum(actor.ready for actor in self.actors)
        why = self.reason if self.state in (State.LEFT_OUT, State.GONE) else ""
        return HostShare(self.node.name, ready if here else 0, self.records, self.tokens, self.deaths, why)


class Fleet:
    """The hosts of one run and their work.

    Args:
        cluster: Does what is asked.
        spec: Which cluster, and how much of it.
        memory: Bytes that one actor needs.
    """

    def __init__(
        self,
        cluster: Cluster,
        spec: ClusterSpec,
        memory: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._spec, self._clock = cluster, spec, clock
        self._memory = WORKER_BYTES + memory
        self._hosts: dict[str, Host] = {}
        self._numbers = 0
        self._slots: list[Slot] = []
        self._queue: ShardQueue[Actor] | None = None
        self._usual = 0.0  # seconds that a block takes
        self._filled: list[SlotFilled] = []
        self._notes: list[str] = []
        self._changed: dict[Host, None] = {}
        self._alone_since: float | None = None
        self._last_failure: KdbFastError | None = None
        self._seen = False

    # -- before the run --------------------------------------------------------------------------------

    @property
    def examined(self) -> bool:
        """Whether it is known of all hosts if they can take part."""
        return self._seen and all(host.state is not State.EXAMINED for host in self._hosts.values())

    def survey(self) -> Survey:
        """What the run begins with."""
        here = [host for host in self._hosts.values() if host.state in (State.FIT, State.READY)]
        others = [host for host in self._hosts.values() if host not in here]
        late = "it did not say in time what it has"
        return Survey(
            tuple((host.node.name, host.most) for host in here),
            tuple((host.node.name, host.reason or late) for host in others),
        )

    def begin(self, slab: Slab) -> None:
        """Blocks may be given from now on."""
        self._slots = slab.slots
        self._queue = ShardQueue(slab.slots)

    @property
    def queue(self) -> ShardQueue[Actor]:
        """The blocks."""
        assert self._queue is not None
        return self._queue

    # -- what the parent wants -------------------------------------------------------------------------

    def embed(self, order: Embed) -> None:
        """All rows of a slot are to be embedded."""
        self.queue.add(order.slot, order.lease, order.stop)

    def news(self) -> News:
        """What has happened since this was asked last."""
        news = News(0, tuple(self._filled), tuple(self._notes), tuple(host.share() for host in self._changed))
        self._filled, self._notes, self._changed = [], [], {}
        return news

    # -- what happens on the cluster -------------------------------------------------------------------

    def happened(self, events: Iterable[ClusterEvent]) -> None:
        """Take events.

        Raises:
            KdbFastError: No host can go on, and none will.
        """
        for event in events:
            if isinstance(event, Answered):
                self._answered(event)
            elif isinstance(event, NodesSeen):
                self._saw(event.nodes)
            elif isinstance(event, (HostFit, HostUnfit, HostPrepared)):
                self._host_said(event)
            elif event.actor in self._living(event.actor):
                if isinstance(event, ActorReady):
                    event.actor.ready, event.actor.since = True, self._clock()
                    self._touch(event.actor)
                    if self._queue is not None:
                        self._queue.started()
                elif isinstance(event, ActorFailed):
                    self._failed(event)
                else:
                    self._lost(event.actor, event.how, blameless=event.blameless)

    def turn(self) -> None:
        """Look after all: give work, start actors, see who hangs.

        Raises:
            ClusterError: No host was there for as long as the run may wait.
            ResourceError: Actors die again and again.
        """
        now = self._clock()
        for host in list(self._hosts.values()):
            for actor in list(host.actors):
                self._check(host, actor, now)
            if host.state is State.LEFT_OUT and now >= host.again_at:
                host.state, host.again_at = State.EXAMINED, float("inf")
                self._cluster.examine(host.node)
        self._start_actors(now)
        if self._queue is not None:
            self._give_out(now)
            self._wait_or_give_up(now)

    # -- hosts -----------------------------------------------------------------------------------------

    def _saw(self, nodes: tuple[Node, ...]) -> None:
        self._seen = True
        there = {node.id for node in nodes}
        for node in nodes:
            if node.id not in self._hosts and node.cpus >= 1:
                self._hosts[node.id] = Host(node)
                self._cluster.examine(node)
        for host in self._hosts.values():
            if host.node.id not in there and host.state is not State.GONE:
                blocks = sum(len(self._queue.tasks_of(actor)) for actor in host.actors) if self._queue else 0
                if host.actors:
                    again = f"; its {blocks} blocks are given out again" if blocks else ""
                    self._notes.append(f"{host.node.name} has left the cluster{again}")
                host.state, host.reason = State.GONE, "it has left the cluster"
                for actor in list(host.actors):
                    self._remove(host, actor, blameless=True)
                self._changed[host] = None

    def _host_said(self, event: HostFit | HostUnfit | HostPrepared) -> None:
        host = self._hosts[event.node.id]
        if host.state is State.GONE:
            return
        if isinstance(event, HostFit):
            host.state = State.FIT
            host.most = min(host.node.cpus, max(1, int(event.memory * 0.7) // self._memory))
            self._cluster.prepare(host.node)
            if self._queue is not None:
                self._notes.append(f"{host.node.name} takes part from now on, with {host.most} CPUs")
        elif isinstance(event, HostPrepared):
            host.state, host.spec = State.READY, event.spec
        else:
            self._leave_out(host, event.reason, again=event.again)
        self._changed[host] = None

    def _leave_out(self, host: Host, reason: str, *, again: bool) -> None:
        if self._queue is not None and host.reason != reason:
            self._notes.append(f"{host.node.name} is left out: {reason}")
        host.state, host.reason = State.LEFT_OUT, reason
        host.again_at = self._clock() + AGAIN_SECONDS if again else float("inf")
        for actor in list(host.actors):
            self._remove(host, actor, blameless=True)
        self._changed[host] = None

    # -- actors ----------------------------------------------------------------------------------------

    def _living(self, actor: Actor) -> list[Actor]:
        return self._hosts[actor.node.id].actors

    def _touch(self, actor: Actor) -> None:
        self._changed[self._hosts[actor.node.id]] = None

    def _start_actors(self, now: float) -> None:
        """One on each host in turn, until all CPUs or as many as the user allows have one."""
        actors = sum(len(host.actors) for host in self._hosts.values())
        while self._spec.workers is None or actors < self._spec.workers:
            free = [h for h in self._hosts.values() if h.state is State.READY and len(h.actors) < h.most]
            if not free:
                return
            host = min(free, key=lambda host: len(host.actors))
            assert host.spec is not None
            self._numbers += 1
            actor = Actor(host.node, self._numbers, now)
            host.actors.append(actor)
            self._cluster.start(actor, host.spec)
            actors += 1

    def _check(self, host: Host, actor: Actor, now: float) -> None:
        """One that hangs is killed and replaced."""
        if not actor.ready:
            if now - actor.since > START_SECONDS:
                self._leave_out(host, f"an actor did not start within {START_SECONDS:.0f} s", again=True)
        elif self._queue is None or not self._queue.tasks_of(actor):
            actor.since = now
        elif now - actor.since > self._queue.hang_seconds:
            self._lost(actor, "hangs", blameless=False)

    def _failed(self, event: ActorFailed) -> None:
        """An actor says why it cannot go on: a host's fault if kdb-fast has a name for it, else as a death."""
        known = getattr(errors, event.failed.kind, None)
        if isinstance(known, type) and issubclass(known, KdbFastError):
            self._last_failure = known(event.failed.message, remedy=event.failed.remedy)
            self._leave_out(self._hosts[event.actor.node.id], event.failed.message, again=False)
        else:
            self._lost(event.actor, event.failed.message, blameless=False)

    def _lost(self, actor: Actor, how: str, *, blameless: bool) -> None:
        """An actor is gone: its blocks wait again, and a successor is started at the next turn."""
        host = self._hosts[actor.node.id]
        host.deaths += not blameless
        actors = sum(len(h.actors) for h in self._hosts.values())
        if not blameless and self._queue and self._queue.count_death(actor, ready=actor.ready, workers=actors):
            raise ResourceError(
                f"Embedding processes on the cluster died {self._queue.deaths_in_a_row} times in a row without "
                f"finishing anything; the last one, on {host.node.name}, {how}.",
                remedy="Look at the logs of its actors on that host, and at its memory; then run the same command "
                "again. What was committed is safe.",
            )
        self._notes.append(f"actor {actor.number} on {host.node.name} {how}; replaced, its blocks are given out again")
        self._remove(host, actor, blameless=blameless)

    def _remove(self, host: Host, actor: Actor, *, blameless: bool) -> None:
        host.actors.remove(actor)
        self._cluster.kill(actor)
        if self._queue is not None:
            self._filled += self._queue.take_back(actor, ready=actor.ready and not blameless)
        self._changed[host] = None

    # -- blocks ----------------------------------------------------------------------------------------

    def _ready(self) -> list[Actor]:
        return [actor for host in self._hosts.values() for actor in host.actors if actor.ready]

    def _give_out(self, now: float) -> None:
        ready = self._ready()
        for actor, task in self.queue.give_out(ready):
            task.since = now
            self._send(actor, task, now)
        if self.queue.waits:
            return
        # A slow host must not hold up the end.
        slow = max(LEAST_SLOW_SECONDS, SLOW_TIMES * self._usual)
        idle = [actor for actor in ready if not self.queue.tasks_of(actor)]
        for actor in idle:
            late = [task for task in self.queue.unanswered() if now - task.since > slow and task.holders == 1]
            if not late:
                return
            task = min(late, key=lambda task: task.since)
            self.queue.lend(actor, task)
            self._send(actor, task, now)

    def _send(self, actor: Actor, task: Task, now: float) -> None:
        if self.queue.tasks_of(actor)[0] is task:
            actor.since = now
        order = Embed(task.slot, task.lease, task.start, task.stop)
        self._cluster.embed(actor, order, self._slots[task.slot].contents(task.start, task.stop))

    def _answered(self, event: Answered) -> None:
        actor, answer = event.actor, event.embedded
        host = self._hosts[actor.node.id]
        if actor not in host.actors:
            return
        actor.since = self._clock()
        task = self.queue.task_of(actor, answer)
        if task is not None and not task.done:
            self._copy(answer, event)
            self._usual = answer.seconds if not self._usual else 0.9 * self._usual + 0.1 * answer.seconds
            host.records += answer.stop - answer.start
            host.tokens += answer.tokens
            self._changed[host] = None
        if filled := self.queue.answered(actor, answer):
            self._filled.append(filled)

    def _copy(self, answer: Embedded, event: Answered) -> None:
        """Into the slot, whose memory is ours until it is filled. The writer compares the checksum."""
        slot = self._slots[answer.slot]
        slot.code[answer.start : answer.stop] = np.frombuffer(event.codes, dtype=np.uint8)
        rows = slot.vectors[answer.start : answer.stop].reshape(-1).data.cast("B")
        at = 0
        for part in event.vectors:
            rows[at : at + len(part)] = part
            at += len(part)

    def _wait_or_give_up(self, now: float) -> None:
        """Without a host the run waits, for one may come back or join."""
        hosts = self._hosts.values()
        there = any(h.actors or h.state in (State.EXAMINED, State.FIT) for h in hosts)
        if there or not self.queue.waits:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
            self._notes.append(f"no host of the cluster is left; waiting {self._spec.patience:.0f} s for one")
        elif now - self._alone_since > self._spec.patience:
            if self._last_failure is not None:
                raise self._last_failure
            raise no_host(self._spec.patience, [f"{h.node.name}: {h.reason}" for h in hosts if h.reason])


def no_host(seconds: float, reasons: list[str]) -> ClusterError:
    """The error that says that the cluster has no host for the run."""
    why = f" ({'; '.join(reasons[:5])})" if reasons else ""
    return ClusterError(
        f"The cluster has had no host that can embed for {seconds:.0f} s{why}.",
        remedy="What was committed is safe; run the same command again when it has one.",
    )
