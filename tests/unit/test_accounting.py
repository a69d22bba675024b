"""Every record is counted under one fate."""

from __future__ import annotations

from kdb_fast.accounting import Counts, Fate


def test_every_fate_is_a_field_and_all_of_them_account_for_a_record() -> None:
    for fate in Fate:
        counts = Counts()
        counts.add(fate, 3)
        assert getattr(counts, fate.value) == counts.accounted == 3


def test_a_superseded_record_is_counted_once() -> None:
    counts = Counts(read=5, stored=3, reused=2)
    counts.supersede(Fate.REUSED)
    assert counts == Counts(read=5, stored=3, reused=1, superseded=1)
    assert counts.accounted == 5
    assert counts.written == 4


def test_what_embedding_took_is_added_up() -> None:
    counts = Counts()
    for _ in range(2):
        counts.embedded(10, 12, 1, 300, 0.5)
    assert counts == Counts(tokens=20, padded_tokens=24, truncated=2, lost_chars=600, embed_seconds=1.0)
