"""One transaction a batch: when it is begun, when it is begun again, and what is remembered for that."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdb_fast.errors import DatabaseError, RecordError
from kdb_fast.records import Record
from kdb_fast.search import transactions
from kdb_fast.search.batches import Delete, Operation, Put
from kdb_fast.search.transactions import OPERATION_BYTES, Queue, _Repeatable, write_at_once


class Conflict(Exception):
    sqlstate = "40P01"


class Disk(Exception):
    sqlstate = "53100"


class Attempts:
    """Transactions that fail as told; remembers what each was given."""

    def __init__(self, *failures: type[Exception]) -> None:
        self.failures = list(failures)
        self.given: list[list[Operation]] = []
        self.kept: list[object] = []
        self.vectors: Any = None

    @contextlib.contextmanager
    def begin(self) -> Iterator[Any]:
        self.vectors = object()
        yield self
        self.kept.append(self.vectors)

    def write(self, operations: Iterable[Operation]) -> None:
        self.given.append([])
        for operation in operations:
            self.given[-1].append(operation)
        if self.failures:
            self.kept.append(self.vectors)
            error = DatabaseError("It failed.")
            error.__cause__ = self.failures.pop(0)()
            raise error


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each wait, none of which is waited for."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def operations(count: int) -> list[Operation]:
    return [Put(Record(("E", f"r{n}"), f"text {n}")) if n % 5 else Delete(("E", f"r{n}")) for n in range(count)]


def test_nothing_is_begun_for_nothing() -> None:
    attempts = Attempts()
    write_at_once(attempts.begin, iter(()))
    Queue(attempts.begin).commit()
    assert attempts.given == attempts.kept == []


def test_operations_are_read_as_they_are_written() -> None:
    seen: list[int] = []
    attempts = Attempts()

    def given_one_by_one() -> Iterator[Operation]:
        for number, operation in enumerate(operations(5)):
            seen.append(len(attempts.given[-1]) if attempts.given else -1)
            assert number == 0 or seen[-1] >= number - 1
            yield operation

    write_at_once(attempts.begin, given_one_by_one())
    assert attempts.given == [operations(5)]


def test_after_a_conflict_all_is_written_again_after_a_growing_wait(slept: list[float]) -> None:
    attempts = Attempts(Conflict, Conflict, Conflict)
    write_at_once(attempts.begin, iter(operations(7)))
    assert attempts.given == [operations(7)] * 4
    assert len(set(map(id, attempts.kept))) == 1, "what the first attempt has embedded is handed on"
    assert len(slept) == 3
    for wait, most in zip(slept, transactions.WAITS, strict=False):
        assert most / 2 <= wait <= most


def test_conflicts_come_to_an_end(slept: list[float]) -> None:
    attempts = Attempts(*[Conflict] * 20)
    with pytest.raises(DatabaseError):
        write_at_once(attempts.begin, operations(3))
    assert len(attempts.given) == len(slept) + 1 == len(transactions.WAITS) + 1


def test_other_failures_are_not_tried_again(slept: list[float]) -> None:
    attempts = Attempts(Disk)
    with pytest.raises(DatabaseError):
        write_at_once(attempts.begin, operations(3))
    attempts = Attempts()

    def refused() -> Iterator[Operation]:
        yield from operations(2)
        raise RecordError("No.")

    with pytest.raises(RecordError):
        write_at_once(attempts.begin, refused())
    assert slept == []


def test_a_block_is_written_again_too_unless_a_part_was_written_early(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(Conflict)
    queue = Queue(attempts.begin)
    queue.add(operations(3))
    queue.commit()
    assert attempts.given == [operations(3)] * 2
    monkeypatch.setattr(transactions, "QUEUE_BYTES", 0)
    queue = Queue(Attempts(Conflict).begin)
    with pytest.raises(DatabaseError):
        queue.add(operations(1))


def test_what_does_not_fit_in_memory_is_written_once(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    monkeypatch.setattr(transactions, "QUEUE_BYTES", 3 * OPERATION_BYTES)
    attempts = Attempts(Conflict)
    with pytest.raises(DatabaseError):
        write_at_once(attempts.begin, iter(operations(10)))
    assert attempts.given == [operations(10)]
    assert slept == []


@given(st.integers(0, 30), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 40))
def test_a_stream_can_be_read_again_while_it_is_remembered(count: int, parts: list[int], room: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transactions, "QUEUE_BYTES", room * (OPERATION_BYTES + 10))
        made = operations(count)
        stream = _Repeatable(iter(made))
        assert stream.empty == (count == 0)
        for part in parts:
            assert list(islice(stream, part)) == made[:part]
            if not stream.whole:
                assert stream._read == [], "it is forgotten"
                return
        rest = list(stream)
        assert rest == made
        assert len(stream._read) <= room + 1
