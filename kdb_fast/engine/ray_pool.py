"""PARENT: a pool of the CPUs of a Ray cluster, behind one child process that talks to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from ..embedding.encoder import EncoderSpec
from ..errors import ClusterError, ResourceError
from ..ipc.messages import Embed, Stop
from ..ipc.slab import Slab
from ..receipt import HostShare
from ..records import number_of
from .base import Event, Note, Pool
from .child_processes import CHECK_SECONDS, Child, Children
from .cluster import driver
from .cluster.fleet import no_host
from .cluster.messages import ClusterSpec, News, Survey
from .shard_queue import POISON_TRIES, QUEUE_DEPTH

SILENT_SECONDS = 30.0
"""The cluster process says something every second; silent for so long, it hangs."""

UNREAD_ORDERS = 200
"""Most orders in the pipe, of 100 bytes each: so that a process that does not read never blocks the parent."""

AGAIN_SECONDS = 2.0
"""Between two attempts to reach a cluster that was lost."""


class RayPool(Pool):
    """All blocks go through one child, :mod:`.cluster.driver`.

    What it had not answered when it died is sent again to its successor: it writes to a slot only until it has
    answered, or is dead.

    Args:
        spec: Which cluster.
        encoder: The model and how to run it.
        on_hosts: Called with what takes part, in words, whenever that changes.
        waiting: Called every second until the cluster has said what it has; what it raises ends the wait.

    Raises:
        ClusterError: There is no such cluster, or no host of it can embed.
        ResourceError: The system refuses another process, or actors die again and again.
        MissingPackageError: Ray is not installed.
    """

    def __init__(
        self,
        children: Children,
        spec: ClusterSpec,
        encoder: EncoderSpec,
        on_hosts: Callable[[str], None],
        waiting: Callable[[], None],
    ) -> None:
        self._children, self._spec, self._encoder, self._on_hosts = children, spec, encoder, on_hosts
        self._slab: Slab | None = None
        self._orders: dict[int, Embed] = {}
        self._unsent: dict[int, Embed] = {}
        self._shares: dict[str, HostShare] = {}
        self._before: dict[str, HostShare] = {}
        self._at_work = False  # a host was
        self._deaths = 0
        self._lost_at: float | None = None
        self._start_at = 0.0
        self._trouble = ""  # that a person knows of
        self._start()
        self.survey = self._first_survey(waiting)
        self.workers = min(self.survey.cpus, spec.workers or self.survey.cpus)

    def _start(self) -> None:
        self._sent = self._taken = 0
        self._surveyed = False
        self._child: Child | None = self._children.start(
            "cluster",
            driver.run,
            lambda: (self._spec, self._encoder),
            credentials=False,
            variables=driver.VARIABLES,
        )

    def _first_survey(self, waiting: Callable[[], None]) -> Survey:
        """What the cluster has; the child gives up by itself, or is found to hang."""
        child = self._child
        assert child is not None
        while True:
            waiting()
            ready = set(wait(child.waitables(), CHECK_SECONDS))
            for message in child.receive(ready):
                if isinstance(message, Survey):
                    self._surveyed = True
                    if not message.hosts:
                        raise no_host(message.left_out, self._spec.patience)
                    return message
            if child.ended or self._children.check(child, owes=True, limit=SILENT_SECONDS):
                death = self._children.reap(child)
                raise ClusterError(
                    f"The process that talks to the Ray cluster at {self._spec.address} {death.how}.{death.stderr}",
                    remedy="See whether `ray status` works there; then run the same command again.",
                )

    def use(self, slab: Slab) -> None:
        """Texts and vectors lie here."""
        self._slab = slab
        assert self._child is not None
        slab.send(self._child.connection, self._child.process.pid)

    def embed(self, slot: int, lease: int, rows: int) -> None:
        self._unsent[slot] = Embed(slot, lease, 0, rows)
        self._feed()

    def wants_work(self) -> bool:
        return len(self._orders) + len(self._unsent) < QUEUE_DEPTH * max(1, self.workers)

    def cancel(self) -> set[int]:
        cancelled, self._unsent = set(self._unsent), {}
        return cancelled

    def close(self) -> None:
        """Where Ray's client is killed, its actors live on for its grace: it is to say that it goes."""
        if self._child is not None and self._surveyed and self._spec.address.startswith("ray://"):
            self._child.send(Stop())
            self._child.process.join(driver.SHUTDOWN_SECONDS + 1.0)

    def waitables(self) -> list[Any]:
        return self._child.waitables() if self._child is not None else []

    def collect(self, ready: set[Any]) -> list[Event]:
        child = self._child
        if child is None:
            if time.monotonic() >= self._start_at:
                self._start()
            return []
        events: list[Event] = []
        for message in child.receive(ready):
            if isinstance(message, News):
                events += self._take(message)
            elif isinstance(message, Survey):
                assert self._slab is not None
                self._surveyed = True
                self.use(self._slab)
        if child.ended:
            events += self._lost(child)
        elif note := self._children.check(child, owes=True, limit=SILENT_SECONDS):
            events.append(Note(note))
        self._feed()
        return events

    def _take(self, news: News) -> list[Event]:
        self._taken = news.taken or self._taken
        events: list[Event] = [Note(text) for text in news.notes]
        for filled in news.filled:
            order = self._orders.get(filled.slot)
            if order is not None and order.lease == filled.lease:
                del self._orders[filled.slot]
                self._deaths, self._lost_at, self._trouble = 0, None, ""
                events.append(filled)
        if news.hosts:
            for share in news.hosts:
                self._shares[share.name] = share.after(self._before.get(share.name))
            self.hosts = tuple(self._shares.values())
            cpus = sum(share.cpus for share in self._shares.values())
            hosts = sum(share.cpus > 0 for share in self._shares.values())
            if cpus:
                self.workers = cpus
            if cpus or self._at_work:
                self._at_work = True
                self._on_hosts(counted(hosts, cpus))
        return events

    def _feed(self) -> None:
        while self._unsent and self._child is not None and self._surveyed and self._sent - self._taken < UNREAD_ORDERS:
            slot, order = next(iter(self._unsent.items()))
            del self._unsent[slot]
            self._orders[slot] = order
            self._sent += 1
            self._child.send(order)

    def _lost(self, child: Child) -> list[Event]:
        """Reap it; a successor is given what it had not answered. A cluster that is gone may come back."""
        now = time.monotonic()
        self._child = None
        self._before = {name: replace(share, cpus=0) for name, share in self._shares.items()}
        self._shares = dict(self._before)
        if self._at_work:
            self._on_hosts(counted(0, 0))
        self._unsent = {**self._orders, **self._unsent}
        self._orders = {}
        self._lost_at = self._lost_at or now
        self._start_at = now + AGAIN_SECONDS
        try:
            death = self._children.reap(child)
        except ClusterError as error:
            # One that had connected has waited for a host already.
            if self._surveyed or now - self._lost_at > self._spec.patience:
                raise
            known, self._trouble = self._trouble, error.message
            return [] if error.message == known else [Note(f"{error.message} Trying again.")]
        self._deaths += 1
        if self._deaths >= POISON_TRIES:
            raise ResourceError(
                f"The process that talks to the cluster ended {self._deaths} times without an answer; the last one "
                f"{death.how}.{death.stderr}",
                remedy="What was committed is safe; run the same command again.",
            )
        return [Note(f"{child} {death.how}; replaced, its blocks are given out again")]


def counted(hosts: int, cpus: int) -> str:
    """``2 hosts, 32 CPUs``."""
    return f"{number_of(hosts, 'host')}, {number_of(cpus, 'CPU')}"
