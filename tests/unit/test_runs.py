from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from kdb_fast.errors import LockedError
from kdb_fast.stores import runs
from kdb_fast.stores.base import FlushResult, RunSpec
from kdb_fast.stores.runs import STALE_SECONDS, Holder, gives_signs, wait_for_lock

HOLDER = Holder(7, "elsewhere", 12, datetime(2026, 1, 31, tzinfo=UTC), 3.0)
RUN = RunSpec(8, "print", "model", 3)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, on a clock that only they move."""
    made: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(made), sleep=made.append)
    monkeypatch.setattr(runs, "time", clock)
    return made


def answers(*given: RunSpec | Holder) -> Callable[[], RunSpec | Holder]:
    left = iter(given)
    return lambda: next(left)


def test_a_lock_is_waited_for_until_it_is_free(pauses: list[float]) -> None:
    waits: list[str] = []
    assert wait_for_lock(answers(HOLDER, HOLDER, RUN), 60.0, waits.append) == RUN
    assert waits == ["waiting for run 7 of process 12 on elsewhere"] * 2


def test_a_lock_is_waited_for_as_long_as_asked_for_and_asked_for_once_more_at_the_end(pauses: list[float]) -> None:
    with pytest.raises(LockedError, match="Run 7 holds the index: process 12 on elsewhere, since 2026-0"):
        wait_for_lock(answers(HOLDER, HOLDER, HOLDER, HOLDER, RUN), 1.25, lambda what: None)
    assert pauses == [0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("age", "alive"), [(0.0, True), (STALE_SECONDS - 1, True), (STALE_SECONDS, False), (-STALE_SECONDS, False)]
)
def test_a_run_lives_by_its_signs(age: float, alive: bool) -> None:
    assert gives_signs("elsewhere", os.getpid(), age) is alive
    assert gives_signs(socket.gethostname(), os.getpid(), age), "we are alive ourselves"


def test_the_result_of_a_flush_comes_back_as_it_was() -> None:
    result = FlushResult(3, 400, 1, ((0, 2), (1, 5)), ((0, 1, "unique", "said the database"),))
    assert FlushResult.from_json(result.as_json()) == result
