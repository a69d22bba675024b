"""Of the records of one key the newest that can be stored wins, in whatever order they come to their flush."""

from __future__ import annotations

import pytest

from kdb_fast.accounting import Counts, Fate
from kdb_fast.indexing import key_ledger
from kdb_fast.indexing.key_ledger import KeyLedger

A, B = ("E", "a"), ("E", "b")


def ledger_of(*keys: tuple[str, str], unique_keys: bool = False) -> KeyLedger:
    """A ledger with a record of each key on its way; a key given twice has two."""
    ledger = KeyLedger(Counts(), unique_keys=unique_keys)
    for key in keys:
        ledger.begin(key)
    return ledger


def assert_empty(ledger: KeyLedger) -> None:
    assert not ledger._in_flight
    assert not ledger._latest
    assert not ledger.has_repeated
    assert not ledger.has_outdated


def test_a_record_is_outdated_by_a_newer_one_of_its_key_that_has_a_vector() -> None:
    ledger = ledger_of(A, A, B)
    assert ledger.has_repeated
    assert not ledger.is_outdated(A, 1)
    ledger.has_vector(A, 2)
    ledger.has_vector(B, 3)
    assert ledger.is_outdated(A, 1)
    assert not ledger.is_outdated(A, 2)
    assert not ledger.is_outdated(B, 1), "the only one of its key"


def test_an_older_vector_that_comes_later_outdates_nothing() -> None:
    ledger = ledger_of(A, A)
    ledger.has_vector(A, 2)
    ledger.has_vector(A, 1)
    assert ledger.is_outdated(A, 1)
    assert not ledger.is_outdated(A, 2)


def test_a_key_is_remembered_while_a_record_of_it_is_on_its_way_and_no_longer() -> None:
    ledger = ledger_of(A, A)
    ledger.has_vector(A, 2)
    ledger.settle([A], Fate.STORED)
    assert A in ledger
    assert not ledger.has_repeated
    assert ledger.is_outdated(A, 1), "the older one has not come to its flush yet"
    ledger.settle([A], Fate.SUPERSEDED)
    assert A not in ledger
    assert_empty(ledger)


def test_a_record_that_cannot_be_embedded_outdates_nothing() -> None:
    ledger = ledger_of(A, A)
    ledger.settle([A], Fate.REJECTED)
    ledger.has_vector(A, 1)
    assert not ledger.is_outdated(A, 1)
    ledger.settle([A], Fate.STORED)
    assert_empty(ledger)
    assert (ledger._counts.stored, ledger._counts.rejected) == (1, 1)


def test_what_is_emptied_or_stored_already_outdates_all_that_is_on_its_way() -> None:
    ledger = ledger_of(A)
    ledger.outdate(A, 2)
    ledger.outdate(B, 3)
    assert ledger.is_outdated(A, 1)
    assert not ledger.is_outdated(B, 1), "nothing of it is on its way"
    ledger = ledger_of(A)
    ledger.unchanged(A, 2)
    assert ledger.is_outdated(A, 1)
    ledger.settle([A], Fate.SUPERSEDED)
    assert_empty(ledger)


def test_a_record_that_a_newer_one_replaced_counts_as_superseded() -> None:
    counts = Counts()
    ledger = KeyLedger(counts)
    for fate in (Fate.STORED, Fate.REUSED):
        ledger.begin(A)
        ledger.settle([A], fate)
    ledger.unchanged(A, 3)
    assert counts == Counts(unchanged=1, superseded=2)
    ledger.removed([A, B])
    assert counts == Counts(superseded=3)
    ledger.removed([A])
    assert counts.accounted == 3


def test_memory_for_counting_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_ledger, "SEEN_KEYS", 1)
    counts = Counts()
    ledger = KeyLedger(counts)
    for key in (A, B, A, B):
        ledger.unchanged(key, 1)
    assert len(ledger._seen) == 1
    assert counts == Counts(unchanged=3, superseded=1)


def test_keys_are_known_to_be_written_until_the_commit() -> None:
    ledger = ledger_of(A)
    ledger.writing([A])
    assert A in ledger.being_written
    assert B not in ledger.being_written
    ledger.written()
    assert A not in ledger.being_written


def test_unique_keys_are_counted_and_not_remembered() -> None:
    ledger = ledger_of(A, B, unique_keys=True)
    assert A not in ledger
    ledger.has_vector(A, 1)
    ledger.outdate(A, 2)
    ledger.settle([A], Fate.STORED)
    ledger.unchanged(B, 2)
    assert_empty(ledger)
    assert not ledger._seen
    assert ledger._counts == Counts(stored=1, unchanged=1)
