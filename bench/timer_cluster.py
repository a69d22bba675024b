"""A cluster whose encoders are timers; what Ray costs its driver is burnt as work. All else of a run is real.

It takes the place of :class:`kdb_fast.engine.cluster.ray_cluster.RayCluster` in the process that would drive Ray.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
import time
import zlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.engine.cluster import driver, ray_cluster
from kdb_fast.engine.cluster.actor import INLINED_BYTES, Texts
from kdb_fast.engine.cluster.base import (
    Actor,
    ActorReady,
    Answered,
    ClusterEvent,
    HostFit,
    HostPrepared,
    Node,
    NodesSeen,
)
from kdb_fast.engine.cluster.messages import ClusterSpec
from kdb_fast.engine.sharding import SHARD_ROWS
from kdb_fast.ipc.messages import Embed, Embedded

from . import vectors

HOST_CPUS = 16
"""Of a host."""

HOST_BYTES = 1 << 40
"""Of its memory: as much as its CPUs need."""

KINDS = 32
"""Different blocks of vectors that are handed out, of each number of rows."""

WORK = bytes(64 * 1024)
"""What is summed over to pass time on a core: 10 µs at a time, without the interpreter's lock."""


class Timers(NamedTuple):
    """What is stood for.

    Attributes:
        cpus: Encoders, one a CPU.
        row_seconds: What a row takes one of them.
        distance: Seconds from the driver to a host and back.
        block_seconds: Processor time that Ray takes of its driver for a block.
    """

    cpus: int
    row_seconds: float
    distance: float
    block_seconds: float


def run(timers: Timers, connection: Connection, spec: ClusterSpec, encoder: EncoderSpec, stderr: Any) -> None:
    """Entry point of the process, as :func:`kdb_fast.engine.cluster.driver.run`."""
    cluster = TimerCluster(timers, encoder)
    with (
        patch.object(ray_cluster, "connect", lambda spec: None),
        patch.object(ray_cluster, "RayCluster", lambda *_: cluster),
        patch.object(driver, "_shut_down", lambda ray: None),
    ):
        driver.run(connection, spec, encoder, stderr)


class TimerCluster:
    """See :class:`kdb_fast.engine.cluster.base.Cluster`."""

    connected = True

    def __init__(self, timers: Timers, spec: EncoderSpec) -> None:
        self._timers, self._spec = timers, spec
        self.wake_end, self._waker_end = os.pipe()
        for end in (self.wake_end, self._waker_end):
            os.set_blocking(end, False)
        nodes = -(-timers.cpus // HOST_CPUS)
        self._said: list[ClusterEvent] = [
            NodesSeen(
                tuple(Node(f"node-{n}", f"host-{n}", min(HOST_CPUS, timers.cpus - n * HOST_CPUS)) for n in range(nodes))
            )
        ]
        self._free_at: dict[Actor, float] = {}
        self._due: list[tuple[float, int, Actor, Embed]] = []  # a heap: when the answer for a block is here
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._blocks: dict[tuple[int, int], tuple[tuple[bytes, ...], int]] = {}
        self._wake()
        threading.Thread(target=self._tick, name="timer", daemon=True).start()

    # -- hosts and actors ------------------------------------------------------------------------------

    def examine(self, node: Node) -> None:
        self._say(HostFit(node, HOST_BYTES))

    def prepare(self, node: Node) -> None:
        self._say(HostPrepared(node, self._spec))

    def start(self, actor: Actor, spec: EncoderSpec) -> None:
        # Not all at once, or they would answer all at once for ever.
        share = actor.number / self._timers.cpus
        self._free_at[actor] = time.monotonic() + share * SHARD_ROWS * self._timers.row_seconds
        self._say(ActorReady(actor))

    def kill(self, actor: Actor) -> None:
        raise RuntimeError("nothing dies in a simulation")

    # -- blocks ----------------------------------------------------------------------------------------

    def embed(self, actor: Actor, order: Embed, texts: list[str]) -> None:
        begins = max(time.monotonic() + self._timers.distance / 2, self._free_at[actor])
        self._free_at[actor] = ends = begins + len(texts) * self._timers.row_seconds
        with self._changed:
            heapq.heappush(self._due, (ends + self._timers.distance / 2, next(self._numbers), actor, order))
            if self._due[0][2] is actor:
                self._changed.notify()

    def events(self) -> Iterator[ClusterEvent]:
        """What has happened since this was asked last."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wake_end, 4096):
                pass
        said, self._said = self._said, []
        yield from said
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            with self._changed:
                _, number, actor, order = heapq.heappop(self._due)
                self._changed.notify()
            _burn(self._timers.block_seconds)
            rows = order.stop - order.start
            parts, crc = self._block(rows, number % KINDS)
            seconds = rows * self._timers.row_seconds
            answer = Embedded(order.slot, order.lease, order.start, order.stop, rows, rows, 0, seconds, crc)
            yield Answered(actor, answer, bytes(rows), parts)

    def _block(self, rows: int, kind: int) -> tuple[tuple[bytes, ...], int]:
        """Vectors in parts, as an actor sends them, and their checksum."""
        if (rows, kind) not in self._blocks:
            dimensions = self._spec.model.dimensions
            block = Texts(Embed(0, 0, 0, rows), [""] * rows, dimensions)
            block.vectors[:] = vectors.from_hashes(np.arange(rows, dtype=np.uint32) * np.uint32(2_654_435_761 + kind))
            raw = block.vectors.tobytes()
            parts = tuple(raw[at : at + INLINED_BYTES] for at in range(0, len(raw), INLINED_BYTES))
            self._blocks[rows, kind] = parts, block.checksum()
        return self._blocks[rows, kind]

    # -- time ------------------------------------------------------------------------------------------

    def _say(self, event: ClusterEvent) -> None:
        self._said.append(event)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._waker_end, b"\0")

    def _tick(self) -> None:
        """Wakes the process when an answer is due."""
        while True:
            with self._changed:
                seconds = self._due[0][0] - time.monotonic() if self._due else None
                if seconds is None or seconds > 0:
                    self._changed.wait(seconds)
                    continue
            self._wake()
            # Taken by then, or it is busy anyway.
            time.sleep(0.001)


def _burn(seconds: float) -> None:
    """Keep a core busy for so long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        zlib.crc32(WORK)
