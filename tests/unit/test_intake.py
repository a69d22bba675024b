"""Records of a page go to the window, beside an equal text, to the rejects, or nowhere, as they are stored already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest

from kdb_fast.accounting import Counts, Fate
from kdb_fast.engine.sharding import WINDOW_ROWS
from kdb_fast.indexing import intake as module
from kdb_fast.indexing.flushing import FlushPlanner
from kdb_fast.indexing.intake import FIRST_WINDOW_ROWS, IN_FLIGHT_VERSION, TAKEN_ROWS, Intake, Page
from kdb_fast.indexing.key_ledger import KeyLedger
from kdb_fast.indexing.screening import Screen
from kdb_fast.indexing.text_reuse import TextReuse
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import SlabShape
from kdb_fast.records import Key, Record, content_hash
from kdb_fast.stores.base import Answer, Found, Store, Stored


class Index:
    """What the intake asks of a store."""

    def __init__(self, **rows: Stored) -> None:
        self.rows = rows
        self.lookups: list[list[str]] = []
        self.begin: Callable[[Found], Answer] | None = None
        """Makes an answer that is waited for."""

    def count(self) -> int:
        return len(self.rows)

    def is_empty(self) -> bool:
        return not self.rows

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        self.lookups.append([str(key[1]) for key in keys])
        return {key: self.rows[str(key[1])] for key in keys if key[1] in self.rows}

    def compare(self, records: Sequence[Record], hashes: Sequence[bytes], fingerprint: str) -> Found | Answer:
        found = Found(self.lookup([record.key for record in records]))
        return self.begin(found) if self.begin else found


class Parts:
    """An intake with what it works with."""

    def __init__(self, index: Index | None = None, *, unique_keys: bool = False, force: bool = False) -> None:
        self.index = index or Index()
        self.counts = Counts()
        self.ledger = KeyLedger(self.counts, unique_keys=unique_keys)
        self.reuse = TextReuse(3)
        self.flushes = FlushPlanner(self.counts, self.ledger)
        self.intake = Intake(
            cast(Store, self.index),
            Screen(),
            self.counts,
            self.ledger,
            self.reuse,
            self.flushes,
            fingerprint="ours",
            read_chars=100,
            force=force,
        )

    def take(self, *texts: tuple[str, str]) -> int:
        """Take in a page of (record id, text); how often control came back."""
        page = Page([Record(("E", record_id), text) for record_id, text in texts])
        return sum(1 for _ in self.intake.take_in(page))

    def take_out(self, *record_ids: str) -> None:
        """Take in a page of records without text."""
        for _ in self.intake.take_in(Page((), [("E", record_id) for record_id in record_ids])):
            pass

    def window(self) -> list[tuple[str, bool, int, int]]:
        """(record id, whether the index has a row, its version, sequence number) of each row in the window."""
        return [(str(row.record.key[1]), row.exists, row.row_version, number) for row, number, _ in self.intake.window]


def stored(text: str, fingerprint: str | None = "ours", version: int = 7) -> Stored:
    return Stored(content_hash(text), fingerprint, version)


def test_what_is_stored_already_is_unchanged_and_the_rest_is_to_be_embedded() -> None:
    index = Index(a=stored("one"), b=stored("old"), c=stored("three", "another model"), d=stored("four", None))
    parts = Parts(index)
    parts.take(("a", "one"), ("b", "two"), ("c", "three"), ("d", "four"), ("e", "five"), ("f", ""))
    assert parts.window() == [("b", True, 7, 2), ("c", True, 7, 3), ("d", True, 7, 4), ("e", False, NO_VALUE, 5)]
    assert (parts.counts.read, parts.counts.unchanged, parts.counts.rejected) == (6, 1, 1)
    assert parts.flushes.notices == 1
    assert parts.intake.rows_at_start == 4


def test_nothing_is_unchanged_where_all_is_to_be_embedded_again() -> None:
    parts = Parts(Index(a=stored("one")), force=True)
    parts.take(("a", "one"))
    assert parts.window() == [("a", True, 7, 1)]


def test_what_was_looked_up_is_not_believed_while_the_key_is_being_written() -> None:
    parts = Parts(Index(a=stored("one")))
    parts.ledger.writing([("E", "a")])
    parts.take(("a", "one"))
    assert [key for key, *_ in parts.window()] == ["a"]


def test_a_row_that_an_earlier_record_of_this_run_will_write_is_merged_with() -> None:
    parts = Parts()
    parts.take(("a", "one"), ("a", "two"))
    assert parts.window() == [("a", False, NO_VALUE, 1), ("a", True, IN_FLIGHT_VERSION, 2)]
    assert parts.ledger.has_repeated


def test_an_equal_text_waits_and_counts_as_a_row_of_the_window() -> None:
    parts = Parts()
    parts.take(("a", "same"), ("b", "same"))
    assert [key for key, *_ in parts.window()] == ["a"]
    assert parts.intake.waiting == 2


def test_an_emptied_record_outdates_what_was_read_before_it() -> None:
    parts = Parts()
    parts.take(("a", "one"))
    parts.take_out("a", "b")
    assert parts.ledger.is_outdated(("E", "a"), 1)
    assert parts.flushes.notices == 2
    parts.take(("a", "two"))
    assert parts.window()[-1][-1] == 4, "numbers go on"
    assert not parts.ledger.is_outdated(("E", "a"), 4)


def test_a_record_stored_already_stays_though_it_was_emptied_before() -> None:
    parts = Parts(Index(a=stored("one")))
    parts.take_out("a")
    parts.take(("a", "one"))
    assert parts.flushes.notices == 0


def test_control_comes_back_after_every_part_and_for_an_empty_page() -> None:
    page = [(str(n), f"text {n}") for n in range(2 * TAKEN_ROWS + 1)]
    assert Parts().take() == 1
    parts = Parts(Index(x=stored("x")))
    assert parts.take(*page) == 3
    assert [len(ids) for ids in parts.index.lookups] == [TAKEN_ROWS, TAKEN_ROWS, 1]


def test_unique_keys_are_looked_up_a_page_at_a_time_and_in_an_empty_index_not_at_all() -> None:
    page = [(str(n), f"text {n}") for n in range(2 * TAKEN_ROWS + 1)]
    parts = Parts(Index(x=stored("x")), unique_keys=True)
    assert parts.take(*page) == 3
    assert [len(ids) for ids in parts.index.lookups] == [len(page)]
    parts = Parts(unique_keys=True)
    parts.take(*page)
    assert parts.index.lookups == []


class Ahead:
    """What happens, in order, while three pages of one record are looked up, all of which are stored."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.events: list[str] = []
        self.parts = Parts(Index(**{str(n): stored(f"text {n}") for n in range(3)}), unique_keys=True)
        self.parts.index.begin = self.begin
        self.fails_at = fails_at

    def begin(self, found: Found) -> Answer:
        number = self.parts.index.lookups[-1][0]
        self.events.append(f"ask {number}")

        def answer() -> Found:
            self.events.append(f"answer {number}")
            return found

        return answer

    def read(self) -> Iterator[Page]:
        for n in range(3):
            if n == self.fails_at:
                raise OSError("broken")
            self.events.append(f"read {n}")
            yield Page([Record(("E", str(n)), f"text {n}")], [("E", f"emptied {n}")], passed_over=10)

    def go(self) -> str:
        with contextlib.closing(self.parts.intake.look_ahead(self.read())) as pages:
            for page in pages:
                self.events.append(f"take {page.items[0].key[1]!s}")
                assert sum(1 for _ in self.parts.intake.take_in(page)) == 1
        return ", ".join(self.events)


def test_a_page_is_read_while_the_one_before_it_is_looked_up() -> None:
    ahead = Ahead()
    assert ahead.go() == (
        "read 0, ask 0, read 1, answer 0, take 0, ask 1, read 2, answer 1, take 1, ask 2, answer 2, take 2"
    )
    assert (ahead.parts.counts.read, ahead.parts.counts.unchanged) == (33, 33)
    assert ahead.parts.flushes.notices == 3


def test_what_the_index_says_at_once_is_taken_in_at_once() -> None:
    ahead = Ahead()
    ahead.parts.index.begin = None
    assert ahead.go() == "read 0, take 0, read 1, take 1, read 2, take 2"
    assert ahead.parts.counts.unchanged == 33


def test_a_look_up_is_ended_where_the_next_page_cannot_be_read() -> None:
    ahead = Ahead(fails_at=2)
    with pytest.raises(OSError, match="broken"):
        ahead.go()
    assert ahead.events[-3:] == ["take 0", "ask 1", "answer 1"]
    assert ahead.parts.counts.read == 11


def test_nothing_is_on_its_way_where_a_page_cannot_be_taken_in() -> None:
    ahead = Ahead()
    with contextlib.closing(ahead.parts.intake.look_ahead(ahead.read())) as pages:
        next(pages)
    assert ahead.events == ["read 0", "ask 0", "read 1", "answer 0"]


def test_the_window_is_cut_by_length_and_may_keep_what_does_not_fill_a_shard() -> None:
    shape = SlabShape(4, 2, 3, 4096)
    for keep, expected, left in ((False, ["ccc bb", "a"], ""), (True, ["ccc bb"], "a")):
        parts = Parts()
        parts.take(("1", "a"), ("2", "bb"), ("3", "ccc"))
        shards = parts.intake.cut(shape, 1000, keep_part=keep)
        assert [" ".join(row.record.content for row, _, _ in shard) for shard in shards] == expected
        assert "".join(row.record.content for row, _, _ in parts.intake.window) == left


def test_a_shard_for_which_equal_texts_wait_is_not_kept() -> None:
    parts = Parts()
    parts.take(("1", "same"), ("2", "same"))
    assert len(parts.intake.cut(SlabShape(4, 2, 3, 4096), 1000, keep_part=True)) == 1


def test_windows_grow_to_their_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    goals = []
    for _ in range(5):
        goals.append(parts.intake._goal)
        parts.intake.widen()
    assert goals == [FIRST_WINDOW_ROWS, 2 * FIRST_WINDOW_ROWS, 4 * FIRST_WINDOW_ROWS, WINDOW_ROWS, WINDOW_ROWS]
    monkeypatch.setattr(module, "WINDOW_ROWS", 2)
    parts.intake.widen()
    parts.take(("1", "a"))
    assert not parts.intake.is_full
    parts.take(("2", "a"))
    assert parts.intake.is_full


def test_the_fates_of_what_is_taken_in_are_settled_by_others() -> None:
    parts = Parts()
    parts.take(("a", "one"))
    assert parts.counts.accounted == 0
    parts.ledger.settle([("E", "a")], Fate.STORED)
    assert parts.counts.accounted == parts.counts.read == 1
