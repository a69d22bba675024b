from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast.accounting import Counts, clock
from kdb_fast.cli import bars
from kdb_fast.cli.bars import LINE_SECONDS, RATE_WINDOW, Bar, Estimate, Lines, choose
from kdb_fast.indexing.progress import Silent


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=fake.monotonic))
    return fake


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (9, "0:09"),
        (59.6, "1:00"),
        (75, "1:15"),
        (3599, "59:59"),
        (3599.6, "1:00:00"),
        (4000, "1:06:40"),
        (360_000, "100:00:00"),
    ],
)
def test_clock_writes_minutes_and_hours(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@settings(deadline=None)
@given(st.floats(0, 10**7))
def test_clock_loses_less_than_a_second(seconds: float) -> None:
    total = 0
    for part in clock(seconds).split(":"):
        total = 60 * total + int(part)
    assert abs(total - seconds) <= 0.5


def test_done_counts_every_way_a_record_can_end() -> None:
    counts = Counts(read=100, stored=1, unchanged=2, reused=4, superseded=8, rejected=16)
    assert counts.accounted == 31


def test_rates_need_two_moments() -> None:
    estimate = Estimate(100)
    assert estimate.rates() == (0.0, 0.0)
    estimate.take(Counts(stored=5, tokens=50), 1.0)
    assert estimate.rates() == (0.0, 0.0)
    estimate.take(Counts(stored=6, tokens=60), 1.0)
    assert estimate.rates() == (0.0, 0.0), "no time has passed"
    estimate.take(Counts(stored=25, tokens=250), 3.0)
    assert estimate.rates() == (100.0, 10.0)


def test_rates_follow_the_last_seconds_only() -> None:
    estimate = Estimate(None)
    for second in range(60):
        counts = Counts(stored=10 * min(second, 30), tokens=100 * min(second, 30))
        estimate.take(counts, float(second))
    assert estimate.rates() == (0.0, 0.0)
    assert len(estimate._points) <= RATE_WINDOW + 1, "memory does not grow with the run"


def test_time_left_is_reckoned_in_tokens() -> None:
    estimate = Estimate(1000)
    estimate.take(Counts(), 0.0)
    counts = Counts(read=500, stored=100, tokens=10_000)
    estimate.take(counts, 10.0)
    # 900 records of 100 tokens at 1,000 tokens/s.
    assert estimate.seconds_left(counts) == pytest.approx(90.0)


def test_time_left_expects_as_many_unchanged_records_as_so_far() -> None:
    estimate = Estimate(1000)
    estimate.take(Counts(), 0.0)
    counts = Counts(read=500, stored=100, unchanged=250, tokens=10_000)
    estimate.take(counts, 10.0)
    assert estimate.seconds_left(counts) == pytest.approx(650 * 0.5 * 100 / 1000)


def test_time_left_expects_as_many_equal_texts_as_so_far() -> None:
    estimate = Estimate(25_000)
    estimate.take(Counts(), 0.0)
    # All have been read; each third text was a new one of those that are done.
    counts = Counts(read=25_000, stored=1000, reused=2000, tokens=10_000)
    estimate.take(counts, 10.0)
    assert estimate.seconds_left(counts) == pytest.approx(22_000 / 3 * 10 / 1000)


def test_time_left_of_a_run_that_embeds_nothing_is_reckoned_in_records() -> None:
    estimate = Estimate(1000)
    estimate.take(Counts(), 0.0)
    counts = Counts(read=500, unchanged=500)
    estimate.take(counts, 10.0)
    assert estimate.seconds_left(counts) == pytest.approx(10.0)


def test_time_left_is_unknown_without_an_estimate_a_record_or_a_rate() -> None:
    counts = Counts(read=10, stored=10, tokens=100)
    assert Estimate(None).seconds_left(counts) is None
    assert Estimate(100).seconds_left(Counts()) is None
    assert Estimate(100).seconds_left(counts) is None


COUNTS = st.builds(
    Counts,
    read=st.integers(0, 1000),
    stored=st.integers(0, 1000),
    unchanged=st.integers(0, 1000),
    reused=st.integers(0, 1000),
    superseded=st.integers(0, 1000),
    rejected=st.integers(0, 1000),
    tokens=st.integers(0, 10**6),
)


@settings(deadline=None)
@given(st.one_of(st.none(), st.integers(0, 2000)), st.lists(st.tuples(COUNTS, st.floats(0, 100))))
def test_no_counts_make_the_estimate_fail(records: int | None, moments: list[tuple[Counts, float]]) -> None:
    estimate = Estimate(records)
    now = 0.0
    for counts, seconds in moments:
        now += seconds
        estimate.take(counts, now)
        left = estimate.seconds_left(counts)
        assert left is None or isinstance(clock(abs(left)), str)


def test_lines_are_plain_text_on_the_stream(time: Time) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.step("opening the database")
    lines.note("worker-1 was replaced")
    lines.plan("2 workers × 1 thread")
    assert stream.getvalue().splitlines() == [
        "opening the database …",
        "note: worker-1 was replaced",
        "plan: 2 workers × 1 thread",
    ]
    lines.close()


def test_lines_tell_how_far_the_run_is_every_few_seconds(time: Time) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.begin(30_000)
    for second in range(21):
        time.now = 1000.0 + second
        lines.update(Counts(read=4000, stored=100 * second, tokens=3000 * second))
    shown = stream.getvalue().splitlines()
    assert len(shown) == 20 // LINE_SECONDS
    assert shown[-1] == "2,000 of about 30,000 records, 100/s, 3,000 tokens/s, about 4:40 left"


def test_lines_tell_what_takes_long_every_few_seconds_and_no_counts_meanwhile(time: Time) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.begin(100)
    for second in range(11):
        time.now = 1000.0 + second
        lines.doing(f"building articles_idx: {10 * second}%" if second > 3 else "")
        lines.update(Counts(read=100, stored=100))
    lines.doing("")
    time.now += LINE_SECONDS
    lines.update(Counts(read=100, stored=100))
    assert stream.getvalue().splitlines() == [
        "building articles_idx: 50%",
        "building articles_idx: 100%",
        "100 of about 100 records, 0/s, 0 tokens/s",
    ]


def test_lines_without_an_estimate_leave_total_and_time_out(time: Time) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.begin(None)
    lines.update(Counts(read=50, stored=50, tokens=500))
    time.now += LINE_SECONDS
    lines.update(Counts(read=100, stored=100, tokens=1000))
    assert stream.getvalue() == "100 records, 10/s, 100 tokens/s\n"


def test_lines_say_nothing_in_a_short_run(time: Time) -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.begin(100)
    for _ in range(10):
        time.now += 0.4
        lines.update(Counts(read=100, stored=50, tokens=1000))
    assert stream.getvalue() == ""


def test_silent_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.begin(5)
    silent.step("a")
    silent.note("b")
    silent.plan("c")
    silent.update(Counts())
    silent.close()
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(choose(show=False), Silent)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(choose(), Lines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = choose()
    try:
        assert isinstance(bar, Bar)
    finally:
        bar.close()


def test_a_bar_takes_everything_and_notes_with_brackets_as_they_are(
    monkeypatch: pytest.MonkeyPatch, time: Time
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = Bar()
    try:
        bar.step("loading [red]the[/] model")
        bar.note("entity [b]x[/b] has no text")
        bar.plan("2 workers [/]")
        bar.begin(100)
        bar.doing("waiting [/] for the database")
        bar.doing("")
        for second in range(3):
            time.now += 1.0
            bar.update(Counts(read=50, stored=10 * second, tokens=100 * second))
        bar.begin(None)
        bar.update(Counts())
    finally:
        bar.close()
    shown = stream.getvalue()
    assert "note: entity [b]x[/b] has no text" in shown
    assert "plan: 2 workers [/]" in shown


def test_what_is_waited_for_is_said_once() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    for text in ("waiting for run 1", "waiting for run 1", "waiting for run 2", "waiting for run 1"):
        lines.note(text)
    assert stream.getvalue().count("note: waiting for run 1\n") == 2
