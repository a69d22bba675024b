"""Which records can be stored at all."""

from __future__ import annotations

from collections.abc import Iterable

from kdb_fast.indexing.screening import Screen
from kdb_fast.records import MAX_CONTENT_BYTES, Record, Reject, content_hash


def test_fit_records_are_numbered_in_the_order_of_reading_and_the_others_rejected() -> None:
    told = Reject(("E", "r2"), "broken_line", "not JSON", b"", 2)
    items: list[Record | Reject] = [
        Record(("E", "r1"), "one"),
        told,
        Record(("E", "r3"), ""),
        Record(("E", "r4"), "four"),
    ]
    fit, rejects = Screen().sort(items, 10)
    assert fit == [(items[0], content_hash("one"), 11), (items[3], content_hash("four"), 14)]
    assert rejects == [
        told,
        Reject(("E", "r3"), "empty_text", "the text is empty or only white space", content_hash("")),
    ]


def test_a_value_that_is_no_text_has_no_hash() -> None:
    _, rejects = Screen().sort([Record(("E", "r1"), 7)], 0)  # type: ignore[arg-type]
    assert [(r.reason, r.content_hash) for r in rejects] == [("wrong_type", b"")]


def test_a_long_text_is_cut_before_it_is_hashed() -> None:
    ((record, digest, _),), _ = Screen().sort([Record(("E", "r1"), "é" * MAX_CONTENT_BYTES)], 0)
    assert len(record.content.encode()) == MAX_CONTENT_BYTES
    assert digest == content_hash(record.content)


def test_characters_that_the_index_lacks_are_asked_for_once_a_page_and_named() -> None:
    asked: list[list[str]] = []

    def missing(values: Iterable[str]) -> frozenset[str]:
        asked.append(list(values))
        return frozenset("日")

    items = [Record(("E", "r1"), "fine"), Record(("E", "r2"), "日"), Record(("E", "r3"), None)]  # type: ignore[arg-type]
    fit, rejects = Screen("LATIN1", missing).sort(items, 0)
    assert asked == [["E", "r1", "fine", "E", "r2", "日", "E", "r3"]]
    assert [record.key[1] for record, _, _ in fit] == ["r1"]
    assert [(r.key[1], r.reason) for r in rejects] == [("r2", "bad_encoding"), ("r3", "wrong_type")]
    assert "LATIN1" in rejects[0].detail
