"""Which hosts take part, which actors they have, and what becomes of these when they die, hang or go with their host.

Pure but for the clock: what really happens on the cluster comes in as events (:mod:`.base`), so all of it can be tried
without one. Which actor has which block: :mod:`.blocks`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from ... import errors
from ...errors import ClusterError, KdbFastError, ResourceError
from ...ipc.messages import Embed
from ...ipc.slab import Slab
from ...records import number_of
from ..plan import WORKER_BYTES
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
from .blocks import Blocks
from .host import Host, State
from .messages import SHOWN, ClusterSpec, News, Survey

START_SECONDS = 120.0
"""An actor that is not ready by then is given up: its host hangs, or another job has its CPU."""

AGAIN_SECONDS = 60.0
"""After so long a host is tried again that could not take part for a reason that may pass."""

RETRY_SECONDS = 5.0
"""After so long an actor is replaced that was lost with its host, or with the network."""

HEAD_SECONDS = 10.0
"""A head that has not said for so long which hosts there are is missed: it is asked every two seconds."""

LOOK_SECONDS = 1.0
"""How often hosts and actors are looked after; blocks are given out at every answer."""


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
        self._names: Counter[str] = Counter()
        self._numbers = 0
        self._blocks: Blocks | None = None  # before the slab is there
        self._notes: list[str] = []
        self._changed: dict[Host, None] = {}
        self._look_at = 0.0
        self._alone_since: float | None = None
        self._last_failure: KdbFastError | None = None
        self._seen = False
        self._seen_at = clock()
        self._head_missed = False

    # -- before the run --------------------------------------------------------------------------------

    @property
    def examined(self) -> bool:
        """Whether it is known of all hosts if they can take part."""
        return self._seen and all(host.state is not State.EXAMINED for host in self._hosts.values())

    @property
    def can_embed(self) -> bool:
        """Whether a host can take part."""
        return any(host.state in (State.FIT, State.READY) for host in self._hosts.values())

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
        self._blocks = Blocks(slab, self._cluster.embed)

    @property
    def blocks(self) -> Blocks:
        """The blocks, once the run has begun."""
        assert self._blocks is not None
        return self._blocks

    # -- what the parent wants -------------------------------------------------------------------------

    def embed(self, order: Embed) -> None:
        """All rows of a slot are to be embedded."""
        self.blocks.add(order)

    def news(self) -> News:
        """What has happened since this was asked last."""
        filled, self.blocks.filled = self.blocks.filled, []
        news = News(0, tuple(filled), tuple(self._notes), tuple(host.share() for host in self._changed))
        self._notes, self._changed = [], {}
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
                    self._ready(event.actor)
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
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look_after(now)
        self.blocks.give_out(now)

    def _look_after(self, now: float) -> None:
        if now - self._seen_at > HEAD_SECONDS and not self._head_missed:
            self._head_missed = True
            self._notes.append(f"the head of the cluster has not answered for {HEAD_SECONDS:.0f} s; waiting for it")
        for host in list(self._hosts.values()):
            for actor in list(host.actors):
                self._check(host, actor, now)
            if host.state is State.LEFT_OUT and now >= host.again_at:
                host.state, host.again_at = State.EXAMINED, float("inf")
                self._cluster.examine(host.node)
        self._start_actors(now)
        self.blocks.lend(now)
        self._wait_or_give_up(now)

    # -- hosts -----------------------------------------------------------------------------------------

    def _saw(self, nodes: tuple[Node, ...]) -> None:
        self._seen, self._seen_at = True, self._clock()
        if self._head_missed:
            self._head_missed = False
            self._notes.append("the head of the cluster answers again")
        there = {node.id for node in nodes}
        for node in nodes:
            known = self._hosts.get(node.id)
            # One that is back after the head had lost it begins anew.
            if node.cpus >= 1 and (known is None or known.state is State.GONE):
                self._hosts[node.id] = known or Host(self._named(node))
                self._hosts[node.id].state = State.EXAMINED
                self._hosts[node.id].joined_at = self._clock() if self._blocks is not None else None
                self._cluster.examine(node)
        for host in self._hosts.values():
            if host.node.id not in there and host.state is not State.GONE:
                blocks = sum(len(self.blocks.queue.tasks_of(actor)) for actor in host.actors)
                if host.actors:
                    again = f"; its {blocks} blocks are given out again" if blocks else ""
                    self._notes.append(f"{host.node.name} has left the cluster{again}")
                host.state, host.reason = State.GONE, "it has left the cluster"
                for actor in list(host.actors):
                    self._remove(host, actor, blameless=True)
                self._changed[host] = None

    def _named(self, node: Node) -> Node:
        """With a number behind its name where a host had that before: its raylet was started again, say."""
        self._names[node.name] += 1
        number = self._names[node.name]
        return node._replace(name=f"{node.name} #{number}") if number > 1 else node

    def _host_said(self, event: HostFit | HostUnfit | HostPrepared) -> None:
        host = self._hosts[event.node.id]
        if host.state is State.GONE:
            return
        if isinstance(event, HostFit):
            host.state = State.FIT
            host.most = min(host.node.cpus, max(1, int(event.memory * 0.7) // self._memory))
            self._cluster.prepare(host.node)
        elif isinstance(event, HostPrepared):
            host.state, host.spec = State.READY, event.spec
        else:
            self._leave_out(host, event.reason, again=event.again)
        self._look_at = 0.0
        self._changed[host] = None

    def _leave_out(self, host: Host, reason: str, *, again: bool) -> None:
        if self._blocks is not None and host.reason != reason:
            self._notes.append(f"{host.node.name} is left out: {reason}")
        host.state, host.reason = State.LEFT_OUT, reason
        host.again_at = self._clock() + AGAIN_SECONDS if again else float("inf")
        for actor in list(host.actors):
            self._remove(host, actor, blameless=True)
        self._changed[host] = None

    # -- actors ----------------------------------------------------------------------------------------

    def _living(self, actor: Actor) -> list[Actor]:
        return self._hosts[actor.node.id].actors

    def _start_actors(self, now: float) -> None:
        """One on each host in turn, until all CPUs or as many as the user allows have one."""
        actors = sum(len(host.actors) for host in self._hosts.values())
        for host in self._hosts.values():
            host.busy_until = [until for until in host.busy_until if until > now]
        while self._spec.workers is None or actors < self._spec.workers:
            free = [
                host
                for host in self._hosts.values()
                if host.state is State.READY and len(host.actors) + len(host.busy_until) < host.most
            ]
            if not free:
                return
            host = min(free, key=lambda host: len(host.actors))
            assert host.spec is not None
            self._numbers += 1
            actor = Actor(host.node, self._numbers, now)
            host.actors.append(actor)
            self._cluster.start(actor, host.spec)
            actors += 1

    def _ready(self, actor: Actor) -> None:
        host, now = self._hosts[actor.node.id], self._clock()
        actor.ready, actor.since = True, now
        self.blocks.ready(actor)
        self._changed[host] = None
        if host.joined_at is not None:
            cpus, seconds = number_of(host.most, "CPU"), now - host.joined_at
            self._notes.append(
                f"{host.node.name} takes part from now on, with {cpus}, {seconds:.0f} s after it was seen"
            )
            host.joined_at = None

    def _check(self, host: Host, actor: Actor, now: float) -> None:
        """One that hangs is killed and replaced; where none comes up, another job has the CPU, or the host hangs."""
        if not actor.ready:
            if now - actor.since > START_SECONDS:
                self._notes.append(f"no actor came up on a CPU of {host.node.name} within {START_SECONDS:.0f} s")
                host.busy_until.append(now + AGAIN_SECONDS)
                self._remove(host, actor, blameless=True)
        elif not self.blocks.queue.tasks_of(actor):
            actor.since = now
        elif now - actor.since > self.blocks.queue.hang_seconds:
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
        queue = self.blocks.queue
        if not blameless and queue.count_death(actor, ready=actor.ready, workers=actors):
            raise ResourceError(
                f"Embedding processes on the cluster died {queue.deaths_in_a_row} times in a row without "
                f"finishing anything; the last one, on {host.node.name}, {how}.",
                remedy="Look at the logs of its actors on that host, and at its memory; then run the same command "
                "again. What was committed is safe.",
            )
        if actor.ready or not blameless:
            what = "replaced, its blocks are given out again"
            self._notes.append(f"actor {actor.number} on {host.node.name} {how}; {what}")
        if blameless:
            # Whether its host is gone will be seen soon; until then no actor could start there.
            host.busy_until.append(self._clock() + RETRY_SECONDS)
        self._remove(host, actor, blameless=blameless)

    def _remove(self, host: Host, actor: Actor, *, blameless: bool) -> None:
        host.actors.remove(actor)
        self._look_at = 0.0
        self._cluster.kill(actor)
        self.blocks.take_back(actor, begun=actor.ready and not blameless)
        self._changed[host] = None

    def _answered(self, event: Answered) -> None:
        host = self._hosts[event.actor.node.id]
        if event.actor not in host.actors:
            return
        answer = event.embedded
        if self.blocks.answered(event, self._clock()):
            host.records += answer.stop - answer.start
            host.tokens += answer.tokens
            self._changed[host] = None

    def _wait_or_give_up(self, now: float) -> None:
        """Without a host the run waits, for one may come back or join."""
        hosts = self._hosts.values()
        there = any(h.actors or h.state in (State.EXAMINED, State.FIT) for h in hosts)
        if there or not self.blocks.queue.waits:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
            self._notes.append(f"no host of the cluster is left; waiting {self._spec.patience:.0f} s for one")
        elif now - self._alone_since > self._spec.patience:
            if self._last_failure is not None:
                raise self._last_failure
            raise no_host([(h.node.name, h.reason) for h in hosts if h.reason], self._spec.patience)


def no_host(left_out: Iterable[tuple[str, str]], seconds: float) -> ClusterError:
    """The error that says that the cluster had no host for the run for so long; each with its reason."""
    reasons = [f"{name}: {reason}" for name, reason in left_out][:SHOWN]
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return ClusterError(
        f"The cluster has had no host that can embed for {seconds:.0f} s{why}.",
        remedy="What was committed is safe; run the same command again when it has one.",
    )
