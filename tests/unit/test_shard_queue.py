"""Who works on what, and what becomes of it when workers die: no processes needed."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdb_fast.engine.base import SlotFilled
from kdb_fast.engine.shard_queue import LEAST_DEATHS, POISON_TRIES, QUEUE_DEPTH, ShardQueue, Task
from kdb_fast.ipc.messages import Embedded
from kdb_fast.ipc.row_block import NO_VALUE, ROW_OK, ROW_WORKER_DIED
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record

ROWS = 8


class Workers:
    """Workers "a", "b", … on slots of ROWS rows, and what they have done."""

    def __init__(self, slots: int = 2, names: str = "ab") -> None:
        self.slab = Slab.local(SlabShape(slots, ROWS, 2, 4096))
        self.queue: ShardQueue[str] = ShardQueue(self.slab.slots)
        self.names = list(names)
        self.embedded: Counter[tuple[int, int]] = Counter()

    def add(self, slot: int, lease: int = 1, rows: int = ROWS) -> None:
        """A slot whose vectors are rubbish as yet."""
        texts = [Row(Record(("E", f"r{i}"), f"text {i}")) for i in range(rows)]
        self.slab.slots[slot].put(lease, texts, [NO_VALUE] * rows)
        self.slab.slots[slot].vectors[:] = np.nan
        self.queue.add(slot, lease, rows)

    def give_out(self, *names: str) -> list[tuple[str, int, int]]:
        return [(name, task.start, task.stop) for name, task in self.queue.give_out(names or self.names)]

    def answer(self, name: str) -> SlotFilled | None:
        """It finishes the first of its tasks."""
        task = self.queue.tasks_of(name)[0]
        self.slab.slots[task.slot].vectors[task.start : task.stop] = 1
        for row in range(task.start, task.stop):
            self.embedded[task.slot, row] += 1
        return self.queue.answered(name, answer_for(task))

    def die(self, name: str, *, ready: bool = True) -> tuple[bool, list[SlotFilled]]:
        """Whether its pool gives up, and which slots are filled now."""
        hopeless = self.queue.count_death(name, ready=ready, workers=len(self.names))
        return hopeless, self.queue.take_back(name, ready=ready)


def answer_for(task: Task, seconds: float = 0.5) -> Embedded:
    rows = task.rows
    return Embedded(task.slot, task.lease, task.start, task.stop, 3 * rows, 4 * rows, 1, seconds, 77)


def test_an_idle_worker_is_given_a_task_before_another_gets_its_second() -> None:
    workers = Workers(slots=5)
    for slot in range(5):
        workers.add(slot)
    assert [name for name, *_ in workers.give_out()] == ["a", "b", "a", "b"]
    assert [task.slot for task in workers.queue.tasks_of("a")] == [0, 2]
    assert workers.give_out() == []
    workers.answer("b")
    assert [name for name, *_ in workers.give_out()] == ["b"]
    assert [task.slot for task in workers.queue.tasks_of("b")] == [3, 4]


def test_only_workers_that_are_ready_are_given_something() -> None:
    workers = Workers()
    workers.add(0)
    assert workers.give_out("b") == [("b", 0, ROWS)]
    assert workers.queue.tasks_of("a") == ()


def test_work_is_wanted_until_every_worker_has_its_next_task() -> None:
    workers = Workers(slots=4)
    for slot in range(2 * QUEUE_DEPTH):
        assert workers.queue.wants_work(2)
        workers.add(slot)
    assert not workers.queue.wants_work(2)
    workers.give_out()
    assert not workers.queue.wants_work(2)
    workers.answer("a")
    assert workers.queue.wants_work(2)


def test_a_slot_is_filled_by_its_last_answer() -> None:
    workers = Workers()
    workers.add(0, lease=7)
    workers.give_out()
    assert workers.answer("a") == SlotFilled(0, 7, 24, 32, 1, 0.5, ((0, 8, 77),))


def test_answers_for_the_halves_of_a_slot_are_added_up() -> None:
    workers = Workers()
    workers.add(0, lease=7)
    for _ in range(2):
        workers.give_out("a")
        workers.die("a")
    assert workers.give_out() == [("a", 0, 4), ("b", 4, 8)]
    assert workers.answer("b") is None
    assert workers.answer("a") == SlotFilled(0, 7, 24, 32, 2, 1.0, ((4, 8, 77), (0, 4, 77)))


def test_an_answer_about_an_earlier_lease_changes_nothing() -> None:
    workers = Workers()
    workers.add(0, lease=7)
    workers.give_out()
    late = Embedded(0, 6, 0, ROWS, 1, 1, 0, 9.0, 1)
    assert workers.queue.answered("a", late) is None
    assert workers.queue.answered("b", late) is None
    assert len(workers.queue.tasks_of("a")) == 1
    assert workers.queue.slowest == 0.0
    assert workers.answer("a") is not None


# -- cancelling --------------------------------------------------------------------------------------------


def test_only_slots_that_no_worker_was_sent_are_cancelled() -> None:
    workers = Workers(slots=4, names="a")
    for slot in range(4):
        workers.add(slot)
    workers.give_out()
    assert workers.queue.cancel() == {2, 3}
    assert workers.queue.cancel() == set()
    assert [workers.answer("a"), workers.answer("a")] != [None, None]
    assert workers.give_out() == []


def test_a_slot_of_which_one_half_is_with_a_worker_is_not_cancelled() -> None:
    workers = Workers(names="a")
    workers.add(0)
    for _ in range(2):
        workers.give_out()
        workers.die("a")
    next(iter(workers.queue.give_out(["a"])))
    assert workers.queue.cancel() == set()
    assert workers.answer("a") is None
    workers.give_out()
    assert workers.answer("a") is not None


def test_a_cancelled_slot_can_be_added_again() -> None:
    workers = Workers()
    workers.add(0, lease=1)
    assert workers.queue.cancel() == {0}
    workers.add(0, lease=2)
    workers.give_out()
    filled = workers.answer("a")
    assert filled is not None
    assert filled.lease == 2


# -- deaths ------------------------------------------------------------------------------------------------


def test_what_a_dead_worker_held_waits_again_before_all_else() -> None:
    workers = Workers(slots=3, names="a")
    for slot in range(3):
        workers.add(slot)
    workers.give_out()
    assert workers.die("a") == (False, [])
    assert workers.queue.tasks_of("a") == ()
    tasks = [task for _, task in workers.queue.give_out(["b"])]
    assert {task.slot for task in tasks} == {0, 1}
    # Only the one that it worked on may be deadly.
    assert {task.slot: task.deaths for task in tasks} == {0: 1, 1: 0}


def test_a_worker_that_never_was_ready_has_begun_nothing() -> None:
    workers = Workers(names="a")
    workers.add(0)
    workers.give_out()
    workers.die("a", ready=False)
    [(_, task)] = workers.queue.give_out(["a"])
    assert task.deaths == 0


def test_a_deadly_text_is_found_by_halving_and_refused_and_all_others_are_embedded() -> None:
    workers = Workers(names="a")
    workers.add(0)
    filled: list[SlotFilled] = []
    died_of: list[tuple[int, int]] = []
    while not filled:
        workers.give_out()
        task = workers.queue.tasks_of("a")[0]
        if task.start <= 5 < task.stop:
            died_of.append((task.start, task.stop))
            _, filled = workers.die("a")
        elif done := workers.answer("a"):
            filled = [done]
    slot = workers.slab.slots[0]
    # A half counts one death of its whole.
    assert died_of == [(0, 8), (0, 8), (4, 8), (4, 6), (5, 6), (5, 6)]
    assert slot.code[:ROWS].tolist() == [ROW_OK] * 5 + [ROW_WORKER_DIED] + [ROW_OK] * 2
    assert not slot.vectors[5].any()
    assert workers.embedded == {(0, row): 1 for row in range(ROWS) if row != 5}
    (done,) = filled
    assert (5, 6, zlib.crc32(bytes(8))) in done.crcs


def test_a_death_by_chance_refuses_nothing() -> None:
    workers = Workers(names="a")
    workers.add(0, rows=1)
    for _ in range(POISON_TRIES - 1):
        workers.give_out()
        workers.die("a")
    workers.give_out()
    assert workers.answer("a") is not None
    assert workers.slab.slots[0].code[0] == ROW_OK


def test_deaths_in_a_row_are_those_of_workers_that_had_something_to_do() -> None:
    workers = Workers()
    workers.add(0)
    workers.give_out("a")
    workers.die("b")
    assert workers.queue.deaths_in_a_row == 0
    workers.die("a")
    workers.die("b", ready=False)
    assert workers.queue.deaths_in_a_row == 2
    workers.give_out("a")
    workers.answer("a")
    assert workers.queue.deaths_in_a_row == 0


@pytest.mark.parametrize(("names", "limit"), [("a", LEAST_DEATHS), ("abc", 9)])
def test_workers_that_cannot_start_are_given_up(names: str, limit: int) -> None:
    workers = Workers(names=names)
    workers.add(0)
    assert [workers.die("a", ready=False)[0] for _ in range(limit)] == [False] * (limit - 1) + [True]


def test_deaths_while_a_text_is_traced_are_expected() -> None:
    workers = Workers(names="a")
    workers.add(1)
    workers.give_out()
    workers.answer("a")
    workers.add(0)
    seen = []
    for _ in range(LEAST_DEATHS + 2):
        workers.give_out()
        seen.append(workers.die("a")[0])
    assert workers.queue.is_halving
    assert not any(seen)


def test_workers_that_no_longer_start_are_given_up_also_while_a_text_is_traced() -> None:
    workers = Workers(names="a")
    workers.add(1)
    workers.give_out()
    workers.answer("a")
    workers.add(0)
    for _ in range(2):
        workers.give_out()
        workers.die("a")
    assert workers.queue.is_halving
    seen = [workers.die("a", ready=False)[0] for _ in range(LEAST_DEATHS)]
    assert seen == [False] * (LEAST_DEATHS - 1) + [True]
    workers.queue.started()
    assert not workers.die("a", ready=False)[0]


@given(data=st.data())
def test_whatever_dies_every_row_is_answered_for_once(data: st.DataObject) -> None:
    """Workers die at any moment, some texts are deadly; each slot is filled once, and only the deadly are refused."""
    slots, names = 3, "abc"
    workers = Workers(slots, names)
    deadly = {(slot, row) for slot in range(slots) for row in data.draw(st.sets(st.integers(0, ROWS - 1), max_size=2))}
    chance = data.draw(st.integers(0, 12))
    for slot in range(slots):
        workers.add(slot, lease=slot + 1)
    filled: list[SlotFilled] = []
    for _ in range(500):
        workers.give_out()
        busy = [name for name in names if workers.queue.tasks_of(name)]
        rows = [
            (task.slot, row) for name in busy for task in workers.queue.tasks_of(name)
            for row in range(task.start, task.stop)
        ]  # fmt: skip
        assert len(rows) == len(set(rows)), "two workers write to the same row"
        if not busy:
            break
        name = data.draw(st.sampled_from(busy))
        task = workers.queue.tasks_of(name)[0]
        if any((task.slot, row) in deadly for row in range(task.start, task.stop)):
            filled += workers.die(name)[1]
        elif chance and task.rows > 1 and data.draw(st.booleans()):
            chance -= 1
            filled += workers.die(name)[1]
        elif done := workers.answer(name):
            filled.append(done)
    assert sorted((done.slot, done.lease) for done in filled) == [(slot, slot + 1) for slot in range(slots)]
    for done in filled:
        parts = sorted((start, stop) for start, stop, _ in done.crcs)
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == ROWS
    refused = {(s, r) for s in range(slots) for r in range(ROWS) if workers.slab.slots[s].code[r] == ROW_WORKER_DIED}
    assert refused == deadly
    assert all(times == 1 for times in workers.embedded.values())
    assert set(workers.embedded) == {(s, r) for s in range(slots) for r in range(ROWS)} - deadly
