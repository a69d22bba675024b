"""When a load drops the search indexes, and how what became of them is told."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from kdb_fast.tables.index_policy import (
    DEFER_FLOOR,
    IndexAction,
    IndexDecision,
    IndexOutcome,
    IndexPolicy,
    IndexRecord,
    decide,
    should_defer,
)

KEPT = IndexOutcome(IndexAction.KEPT)
BUILT = IndexOutcome(IndexAction.BUILT, "ix_a, ix_b")
DROPPED = IndexOutcome(IndexAction.DROPPED)
FEW = IndexDecision(IndexAction.KEPT, 300, 5000)
MOST = IndexDecision(IndexAction.DEFERRED, 1000, 1000)


@pytest.mark.parametrize(
    ("to_write", "rows_after", "defer"),
    [
        (DEFER_FLOOR, DEFER_FLOOR, True),
        (DEFER_FLOOR - 1, DEFER_FLOOR - 1, False),
        (1000, 4000, True),
        (999, 4000, False),
        (0, 0, False),
        (30_000, 30_000, True),
        (10, 1_000_000, False),
    ],
)
def test_index_is_dropped_from_a_quarter_of_the_rows(to_write: int, rows_after: int, defer: bool) -> None:
    assert should_defer(to_write, rows_after) is defer


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # Nothing is known but what was read.
        ({"rows_in_index": 0, "estimate": None, "read": 500, "to_write": 500, "written": 0}, (True, 500, 500)),
        # What is left is like what was read.
        ({"rows_in_index": 0, "estimate": 1000, "read": 100, "to_write": 50, "written": 0}, (True, 500, 1000)),
        ({"rows_in_index": 4000, "estimate": 1000, "read": 100, "to_write": 50, "written": 0}, (False, 500, 4000)),
        # Dropping the index saves nothing for what is written already.
        ({"rows_in_index": 0, "estimate": 1000, "read": 900, "to_write": 900, "written": 850}, (False, 1000, 1000)),
        # More came than were expected.
        ({"rows_in_index": 0, "estimate": 10, "read": 700, "to_write": 700, "written": 0}, (True, 700, 700)),
        ({"rows_in_index": 9, "estimate": 0, "read": 0, "to_write": 0, "written": 0}, (False, 0, 9)),
    ],
)
def test_the_decision_counts_what_is_left_to_write(seen: dict[str, Any], expected: tuple[bool, int, int]) -> None:
    drop, to_write, rows_after = expected
    action = IndexAction.DEFERRED if drop else IndexAction.KEPT
    assert decide(**seen) == IndexDecision(action, to_write, rows_after)


def test_a_decision_names_its_reason() -> None:
    assert MOST.text == "deferred: about 1,000 of 1,000 rows change, a quarter or more"
    assert FEW.text == "kept: about 300 of 5,000 rows change, under a quarter"
    assert IndexDecision(IndexAction.KEPT, 50, 50).text == "kept: only about 50 rows change"


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (KEPT, "kept"),
        (IndexOutcome(IndexAction.KEPT, "it is used"), "kept: it is used"),
        (DROPPED, "dropped for the load"),
        (BUILT, "built ix_a, ix_b"),
        (IndexOutcome(IndexAction.BUILT, "ix_a", ("ix_b", "ix_c")), "built ix_a; not valid: ix_b, ix_c"),
        (IndexOutcome(IndexAction.BUILT, "", ("ix_b",)), "not valid: ix_b"),
        (IndexOutcome(IndexAction.NOT_BUILT), "not built"),
        (IndexOutcome(IndexAction.NOT_BUILT, "no right to"), "not built: no right to"),
        (IndexOutcome(IndexAction.NONE), "none"),
        (IndexOutcome(IndexAction.NONE, "exact search"), "exact search"),
    ],
)
def test_an_outcome_is_told_in_words_and_crosses_a_pipe(outcome: IndexOutcome, text: str) -> None:
    assert outcome.text == text
    assert pickle.loads(pickle.dumps(outcome)) == outcome


@pytest.mark.parametrize(
    ("decisions", "dropped", "finished", "text"),
    [
        ([], None, None, ""),
        ([], None, KEPT, "kept"),
        ([], None, BUILT, "built ix_a, ix_b"),
        ([FEW], None, None, FEW.text),
        ([FEW], None, KEPT, FEW.text),
        ([FEW], None, BUILT, "built ix_a, ix_b"),
        ([FEW, FEW, MOST], DROPPED, None, MOST.text),
        ([MOST], DROPPED, BUILT, f"{MOST.text}; built ix_a, ix_b"),
        # Another program has built them meanwhile.
        ([MOST], DROPPED, KEPT, MOST.text),
        ([MOST], IndexOutcome(IndexAction.KEPT, "it is used"), KEPT, "kept: it is used"),
        ([MOST], IndexOutcome(IndexAction.KEPT, "it is used"), BUILT, "kept: it is used; built ix_a, ix_b"),
        # The words of an outcome are not read: an index may have any name.
        ([MOST], DROPPED, IndexOutcome(IndexAction.BUILT, "ix_kept"), f"{MOST.text}; built ix_kept"),
    ],
)
def test_a_run_tells_what_it_decided_and_what_came_of_it(
    decisions: list[IndexDecision], dropped: IndexOutcome | None, finished: IndexOutcome | None, text: str
) -> None:
    record = IndexRecord()
    for decision in decisions:
        record.decided(decision)
    record.dropped, record.finished = dropped, finished
    assert record.text == text
    assert record.deferred is (MOST in decisions)


@pytest.mark.parametrize("policy", [IndexPolicy.KEEP, IndexPolicy.CONCURRENTLY, IndexPolicy.NONE])
def test_what_is_kept_in_any_case_is_told_with_what_it_has_cost(policy: IndexPolicy) -> None:
    record = IndexRecord()
    for read in (10, 100_000):
        record.decided(
            decide(rows_in_index=0, estimate=100_000, read=read, to_write=read, written=read - 10, policy=policy)
        )
    assert not record.deferred
    record.finished = IndexOutcome(IndexAction.KEPT)
    assert record.text == "kept: about 100,000 of 100,000 rows change"
    record.finished = IndexOutcome(IndexAction.KEPT, live=2)
    saving = "; dropped and built again (--index defer) they would have cost about 144 s less"
    assert record.text == f"kept: about 100,000 of 100,000 rows change{saving}"
    record.finished = IndexOutcome(IndexAction.BUILT, again="lists", live=2)
    assert record.text == f"kept: about 100,000 of 100,000 rows change{saving}; built again lists"


def test_nothing_is_said_of_a_saving_that_there_would_not_have_been() -> None:
    record = IndexRecord()
    record.decided(IndexDecision(IndexAction.KEPT, 20_000, 100_000, IndexPolicy.KEEP))
    record.finished = IndexOutcome(IndexAction.KEPT, live=1)
    assert record.text == "kept: about 20,000 of 100,000 rows change"


def test_the_first_reason_to_keep_the_index_stays() -> None:
    record = IndexRecord()
    record.decided(FEW)
    record.decided(IndexDecision(IndexAction.KEPT, 400, 5000))
    assert record.decision == FEW
