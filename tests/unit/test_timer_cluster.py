"""The cluster of timers that ``bench cluster`` measures with answers as a real one does."""

from __future__ import annotations

import zlib
from multiprocessing.connection import wait
from pathlib import Path

from bench.database import DIMENSIONS
from bench.timer_cluster import TimerCluster, Timers
from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.embedding.models.files import Model
from kdb_fast.engine.cluster.base import Actor, ActorReady, Answered, ClusterEvent, HostFit, HostPrepared, NodesSeen
from kdb_fast.ipc.messages import Embed

ENCODER = EncoderSpec(Model("stub", Path(), "stub.onnx", DIMENSIONS, 512, "mean", True, ()), 100)


def following(cluster: TimerCluster) -> list[ClusterEvent]:
    assert wait([cluster.wake_end], 20), "nothing happened"
    return list(cluster.events())


def test_hosts_of_sixteen_cpus_and_blocks_that_are_answered_once_with_their_checksum() -> None:
    cluster = TimerCluster(Timers(40, 1e-5, 0.002, 1e-4), ENCODER)
    (seen,) = following(cluster)
    assert isinstance(seen, NodesSeen)
    assert [node.cpus for node in seen.nodes] == [16, 16, 8]
    node = seen.nodes[0]
    cluster.examine(node)
    assert isinstance(following(cluster)[0], HostFit)
    cluster.prepare(node)
    assert isinstance(following(cluster)[0], HostPrepared)
    actors = [Actor(node, number, 0.0) for number in range(2)]
    for actor in actors:
        cluster.start(actor, ENCODER)
    assert [type(event) for event in following(cluster)] == [ActorReady, ActorReady]
    orders = [Embed(slot, slot + 7, 0, rows) for slot, rows in enumerate((128, 128, 3, 1))]
    for order in orders:
        cluster.embed(actors[order.slot % 2], order, ["text"] * order.stop)
    answered: list[Answered] = []
    while len(answered) < len(orders):
        answered += [event for event in following(cluster) if isinstance(event, Answered)]
    assert sorted(event.embedded[:4] for event in answered) == [tuple(order) for order in orders]
    for event in answered:
        vectors = b"".join(event.vectors)
        assert len(vectors) == 4 * DIMENSIONS * event.embedded.stop
        assert zlib.crc32(vectors) == event.embedded.crc
        assert event.codes == bytes(event.embedded.stop)
