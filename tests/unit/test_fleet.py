"""What the fleet decides when hosts, actors and blocks come and go; the cluster is a stub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.embedding.models.files import Model
from kdb_fast.engine.base import SlotFilled
from kdb_fast.engine.cluster import fleet as fleet_module
from kdb_fast.engine.cluster import survey
from kdb_fast.engine.cluster.base import (
    Actor,
    ActorFailed,
    ActorLost,
    ActorReady,
    Answered,
    HostFit,
    HostPrepared,
    HostUnfit,
    Node,
    NodesSeen,
)
from kdb_fast.engine.cluster.fleet import Fleet
from kdb_fast.engine.cluster.messages import ClusterSpec
from kdb_fast.errors import ClusterError, ModelError, ResourceError
from kdb_fast.ipc.messages import Embed, Embedded, Failed
from kdb_fast.ipc.row_block import NO_VALUE, ROW_WORKER_DIED
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.receipt import HostShare
from kdb_fast.records import Record

ENCODER = EncoderSpec(Model("stub", Path(), "stub.onnx", 2, 512, "mean", True, ()), 100)
A, B = Node("a", "a (10.0.0.1)", 1), Node("b", "b (10.0.0.2)", 1)
ROWS = 4


class Stub:
    """A cluster on which everything that is asked for is noted, a fleet on it, and a clock.

    Attributes:
        head: It says at every turn again which hosts there are.
    """

    def __init__(self, *nodes: Node, workers: int | None = None, memory: int = 64 << 30) -> None:
        self.now, self.head = 1000.0, True
        self.examined: list[Node] = []
        self.prepared: list[Node] = []
        self.started: list[Actor] = []
        self.killed: list[Actor] = []
        self.given: list[tuple[Actor, Embed]] = []
        self.notes: list[str] = []
        self.filled: list[SlotFilled] = []
        self.shares: dict[str, HostShare] = {}
        self.slab = Slab.local(SlabShape(8, ROWS, 2, 4096))
        spec = ClusterSpec("auto", "7", workers, 60.0)
        self.fleet = Fleet(self, spec, 0, clock=lambda: self.now)
        self.seen = NodesSeen(nodes)
        self.tell(self.seen)
        for node in nodes:
            self.join(node, memory)
        self.fleet.begin(self.slab)
        self.turn()
        for actor in list(self.started):
            self.tell(ActorReady(actor))

    def join(self, node: Node, memory: int = 64 << 30) -> None:
        self.tell(HostFit(node, memory), HostPrepared(node, ENCODER))

    # -- what the fleet asks for --

    def examine(self, node: Node) -> None:
        self.examined.append(node)

    def prepare(self, node: Node) -> None:
        self.prepared.append(node)

    def start(self, actor: Actor, spec: EncoderSpec) -> None:
        self.started.append(actor)

    def embed(self, actor: Actor, order: Embed, texts: list[str]) -> None:
        assert texts == [f"text {row}" for row in range(order.start, order.stop)]
        self.given.append((actor, order))

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)

    # -- what happens --

    def tell(self, *events: Any) -> None:
        self.seen = next((event for event in reversed(events) if isinstance(event, NodesSeen)), self.seen)
        self.fleet.happened(events)

    def turn(self, seconds: float = 0.0) -> list[tuple[int, int, int]]:
        """Time passes; what is given out then, as (number of the actor, slot, start)."""
        self.now += seconds
        if self.head:
            self.tell(self.seen)
        before = len(self.given)
        self.fleet.turn()
        news = self.fleet.news()
        self.notes += news.notes
        self.filled += news.filled
        self.shares.update({share.name: share for share in news.hosts})
        return [(actor.number, order.slot, order.start) for actor, order in self.given[before:]]

    def add(self, *slots: int, lease: int = 1) -> None:
        for slot in slots:
            rows = [Row(Record(("E", f"r{i}"), f"text {i}")) for i in range(ROWS)]
            self.slab.slots[slot].put(lease, rows, [NO_VALUE] * ROWS)
            self.fleet.embed(Embed(slot, lease, 0, ROWS))

    def answer(self, actor: Actor, order: Embed, value: float = 1.0) -> None:
        rows = order.stop - order.start
        done = Embedded(order.slot, order.lease, order.start, order.stop, 3 * rows, 4 * rows, 0, 0.5, 77)
        raw = np.full((rows, 2), value, dtype=np.float32).tobytes()
        self.tell(Answered(actor, done, bytes(rows), (raw[:5], raw[5:])))


def test_a_host_gets_actors_for_its_cpus_and_two_blocks_for_each() -> None:
    stub = Stub(Node("a", "a", 2), B)
    assert [actor.node.id for actor in stub.started] == ["a", "b", "a"]
    stub.add(*range(8))
    assert stub.turn() == [(1, 0, 0), (2, 1, 0), (3, 2, 0), (1, 3, 0), (2, 4, 0), (3, 5, 0)]
    stub.answer(*stub.given[0], value=3.0)
    assert stub.turn() == [(1, 6, 0)]
    assert [filled.slot for filled in stub.filled] == [0]
    assert (stub.slab.slots[0].vectors[:ROWS] == 3.0).all()
    assert stub.shares["a"] == HostShare("a", 2, ROWS, 3 * ROWS)


def test_workers_limits_the_actors_and_memory_those_of_a_host() -> None:
    assert len(Stub(Node("a", "a", 4), Node("b", "b", 4), workers=3).started) == 3
    assert len(Stub(Node("a", "a", 4), memory=1_100_000_000).started) == 2


def test_answers_may_come_in_another_order() -> None:
    stub = Stub(A)
    stub.add(0, 1)
    stub.turn()
    for actor, order in reversed(stub.given):
        stub.answer(actor, order)
    stub.turn()
    assert [filled.slot for filled in stub.filled] == [1, 0]


def test_the_blocks_of_a_host_that_leaves_are_given_out_again_and_blame_no_text() -> None:
    stub = Stub(A, B)
    stub.add(0, 1, 2, 3)
    stub.turn()
    lost = [(actor, order) for actor, order in stub.given if actor.node is A]
    for _ in range(5):  # more than the deaths after which a text is given up
        stub.tell(NodesSeen((B,)))
        assert stub.turn() == []
        stub.tell(NodesSeen((A._replace(id=f"a{len(stub.started)}"), B)))
        stub.join(stub.examined[-1])
        stub.turn()
        stub.tell(ActorReady(stub.started[-1]))
        assert sorted(slot for _, slot, _ in stub.turn()) == sorted(order.slot for _, order in lost)
        assert all(order.stop - order.start == ROWS for _, order in stub.given)
    stub.answer(*lost[0])  # of an actor that is gone
    stub.turn()
    assert stub.filled == []
    assert any("a (10.0.0.1) has left the cluster; its 2 blocks are given out again" in note for note in stub.notes)


def test_a_text_that_ends_its_actor_is_found_by_halving() -> None:
    stub = Stub(A)
    stub.add(0)
    seen = 0
    for _ in range(40):
        stub.turn()
        if stub.filled:
            break
        actor, order = stub.given[-1]
        waiting = [(a, o) for a, o in stub.given[seen:] if a is actor]
        seen = len(stub.given)
        for actor, order in waiting[:1]:
            if order.start <= 2 < order.stop:
                stub.tell(ActorLost(actor, "died", False))
                stub.turn()
                stub.tell(ActorReady(stub.started[-1]))
            else:
                stub.answer(actor, order)
                seen -= len(waiting) - 1
    assert stub.filled
    assert stub.slab.slots[0].code[:ROWS].tolist() == [0, 0, ROW_WORKER_DIED, 0]
    assert stub.shares[A.name].deaths >= 3


def test_the_last_block_of_a_slow_host_is_given_to_an_idle_one_and_the_first_answer_counts() -> None:
    stub = Stub(A, B)
    stub.add(0, 1)
    stub.turn()
    (slow, late), (quick, order) = stub.given
    stub.answer(quick, order)
    assert stub.turn(1.0) == [], "not slow yet"
    assert stub.turn(2.0) == [(quick.number, late.slot, 0)]
    assert stub.turn(9.0) == [], "two are enough"
    stub.answer(quick, late, value=5.0)
    stub.turn()
    assert [filled.slot for filled in stub.filled] == [order.slot, late.slot]
    stub.add(late.slot, lease=2)
    stub.answer(slow, late, value=9.0)
    stub.turn()
    assert len(stub.filled) == 2
    assert (stub.slab.slots[late.slot].vectors[:ROWS] == 5.0).all(), "the late answer is dropped"


def test_an_actor_that_hangs_is_killed_and_replaced() -> None:
    stub = Stub(A)
    stub.add(0)
    stub.turn()
    stub.turn(59.0)
    assert stub.killed == []
    stub.turn(2.0)
    stub.tell(ActorReady(stub.started[-1]))
    assert stub.turn() == [(2, 0, 0)]
    assert [actor.number for actor in stub.killed] == [1]


def test_a_host_that_joins_later_takes_part() -> None:
    stub = Stub(A)
    stub.tell(NodesSeen((A, B)))
    assert stub.examined[-1] is B
    stub.join(B)
    stub.turn()
    assert stub.started[-1].node is B
    assert stub.notes == []
    stub.now += 4.0
    stub.tell(ActorReady(stub.started[-1]))
    stub.turn()
    assert stub.notes == ["b (10.0.0.2) takes part from now on, with 1 CPU, 4 s after it was seen"]
    assert stub.shares[B.name].cpus == 1


def test_an_unfit_host_is_left_out_with_its_reason() -> None:
    stub = Stub(A)
    stub.tell(NodesSeen((A, B)), HostUnfit(B, "numpy 1, here 2"))
    stub.turn()
    assert stub.shares[B.name].left_out == "numpy 1, here 2"
    assert stub.fleet.survey().left_out == ((B.name, "numpy 1, here 2"),)


def test_an_actor_that_is_not_up_in_time_is_given_up_and_its_host_tried_again() -> None:
    stub = Stub(A)
    stub.tell(NodesSeen((A, B)))
    stub.join(B)
    stub.turn()
    stub.turn(fleet_module.START_SECONDS + 1)
    assert [actor.node for actor in stub.killed] == [B]
    stub.turn(fleet_module.AGAIN_SECONDS - 2)
    assert [actor.node for actor in stub.started] == [A, B]
    stub.turn(3)
    assert [actor.node for actor in stub.started] == [A, B, B]


def test_on_a_host_that_cannot_be_reached_actors_are_started_only_from_time_to_time() -> None:
    stub = Stub(A)
    for _ in range(50):
        stub.tell(ActorLost(stub.started[-1], "was lost", True))
        stub.turn(0.1)
    assert len(stub.started) == 1
    stub.turn(5.0)
    assert len(stub.started) == 2
    assert len(stub.notes) == 1


def test_without_a_host_the_run_waits_and_then_ends() -> None:
    stub = Stub(A)
    stub.add(0)
    stub.turn()
    stub.tell(NodesSeen(()))
    stub.turn(30.0)
    stub.turn(30.0)
    with pytest.raises(ClusterError, match=r"no host that can embed for 60 s \(a .*: it has left the cluster\)"):
        stub.turn(31.0)


def test_without_work_no_host_is_missed() -> None:
    stub = Stub(A)
    stub.tell(NodesSeen(()))
    stub.turn()
    stub.turn(1000.0)


def test_what_an_actor_cannot_go_on_for_leaves_its_host_out() -> None:
    stub = Stub(A)
    stub.add(0)
    stub.turn()
    stub.tell(ActorFailed(stub.started[0], Failed("ModelError", "It gives NaN.", "Choose another.")))
    stub.turn()
    with pytest.raises(ModelError, match="It gives NaN"):
        stub.turn(61.0)


def test_actors_that_die_again_and_again_end_the_run() -> None:
    stub = Stub(A)
    for _ in range(5):  # the first had nothing to do, so it does not count
        stub.tell(ActorLost(stub.started[-1], "died", False))
        stub.turn()
    with pytest.raises(ResourceError, match="died 5 times in a row"):
        stub.tell(ActorLost(stub.started[-1], "died", False))


def test_a_host_that_the_head_had_lost_begins_anew() -> None:
    stub = Stub(A)
    stub.tell(NodesSeen(()))
    stub.turn()
    stub.tell(NodesSeen((A,)))
    assert stub.examined == [A, A]
    stub.join(A)
    stub.turn()
    assert len(stub.started) == 2
    assert stub.shares[A.name].left_out == ""


HERE = {"Python": "3.12", "kdb-fast": "0.1.0", "numpy": "2.1"}


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (HERE, ""),
        (HERE | {"kdb-fast": ""}, "kdb-fast is not installed there (pip install 'kdb-fast[ray]==0.1.0')"),
        (HERE | {"numpy": ""}, "numpy is missing, here 2.1 (install the same versions)"),
        (
            HERE | {"Python": "3.11", "numpy": "1.26"},
            "Python 3.11, here 3.12, numpy 1.26, here 2.1 (install the same versions)",
        ),
    ],
)
def test_a_host_with_other_versions_is_told_what_differs(there: dict[str, str], reason: str) -> None:
    assert survey.difference(HERE, there) == reason


def test_a_head_that_does_not_answer_is_told_once() -> None:
    stub = Stub(A)
    stub.head = False
    stub.turn(fleet_module.HEAD_SECONDS + 1)
    stub.turn(fleet_module.HEAD_SECONDS + 1)
    assert stub.notes == ["the head of the cluster has not answered for 10 s; waiting for it"]
    stub.tell(NodesSeen((A,)))
    stub.turn()
    assert stub.notes[1:] == ["the head of the cluster answers again"]


def test_hosts_of_one_name_are_told_apart() -> None:
    """A raylet that is started again on its host, or several on one."""
    stub = Stub(A)
    again = A._replace(id="a2")
    stub.tell(NodesSeen((again,)))
    stub.join(again)
    stub.turn()
    assert stub.shares[A.name].left_out == "it has left the cluster"
    assert stub.shares[f"{A.name} #2"].left_out == ""
