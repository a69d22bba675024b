"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere.

The time left is reckoned in tokens: with work sorted by length, rows lie about how much is left.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from ..accounting import Counts, clock
from ..indexing.progress import Progress, Silent
from ..records import storable_key

LINE_SECONDS = 5.0
"""Without a terminal a line is printed this often."""

SHOWN_CHARS = 2000
"""Characters of a note: an error of a library may be long."""

RATE_WINDOW = 15.0
"""Seconds over which the rate is taken: long enough to be calm, short enough to follow a change."""


class Estimate:
    """Records done, tokens a second and seconds left, from counts as they come."""

    def __init__(self, records: int | None) -> None:
        self.records = records
        self._points: list[tuple[float, int, int]] = []

    def take(self, counts: Counts, now: float) -> None:
        """Note the counts at a moment (monotonic seconds)."""
        self._points.append((now, counts.tokens, counts.accounted))
        while len(self._points) > 2 and now - self._points[0][0] > RATE_WINDOW:
            self._points.pop(0)

    def rates(self) -> tuple[float, float]:
        """(tokens, records) a second over the last RATE_WINDOW seconds."""
        if len(self._points) < 2:
            return 0.0, 0.0
        (t0, k0, r0), (t1, k1, r1) = self._points[0], self._points[-1]
        return ((k1 - k0) / (t1 - t0), (r1 - r0) / (t1 - t0)) if t1 > t0 else (0.0, 0.0)

    def seconds_left(self, counts: Counts) -> float | None:
        """Tokens left ÷ tokens a second. The tokens of a record not yet embedded are taken as the mean of those
        embedded, for the share of records that had to be embedded so far: a text seen before has its vector already."""
        tokens_rate, records_rate = self.rates()
        embedded = counts.stored
        if self.records is None or not counts.read:
            return None
        left = max(0, self.records - counts.accounted)
        if not embedded or not tokens_rate:
            return left / records_rate if records_rate else None
        share = (counts.read - counts.unchanged - counts.rejected) / counts.read * embedded / (embedded + counts.reused)
        return left * share * (counts.tokens / max(1, counts.stored)) / tokens_rate


class Lines(Progress):
    """Plain lines on a stream without a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._estimate = Estimate(None)
        self._last = 0.0
        self._sampled = 0.0
        self._hosts = ""
        self._doing = self._noted = ""

    def _print(self, text: str) -> None:
        print(storable_key(text, SHOWN_CHARS), file=self._stream, flush=True)

    def step(self, text: str) -> None:
        self._print(f"{text} …")

    def doing(self, text: str) -> None:
        changed, self._doing = text != self._doing, text
        if text and changed and time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._print(text)

    def note(self, text: str) -> None:
        if text != self._noted:  # each try of a wait says the same
            self._noted = text
            self._print(f"note: {text}")

    def plan(self, text: str) -> None:
        self._print(f"plan: {text}")

    def hosts(self, text: str) -> None:
        self._hosts = f" on {text}"

    def begin(self, records: int | None) -> None:
        self._estimate = Estimate(records)
        self._last = time.monotonic()

    def update(self, counts: Counts) -> None:
        now = time.monotonic()
        if now - self._sampled >= 1.0:
            self._sampled = now
            self._estimate.take(counts, now)
        if self._doing or now - self._last < LINE_SECONDS:
            return
        self._last = now
        tokens_rate, records_rate = self._estimate.rates()
        left = self._estimate.seconds_left(counts)
        total = f" of about {self._estimate.records:,}" if self._estimate.records is not None else ""
        self._print(
            f"{counts.accounted:,}{total} records, {records_rate:,.0f}/s, {tokens_rate:,.0f} tokens/s{self._hosts}"
            + (f", about {clock(left)} left" if left is not None else "")
        )


class Bar(Progress):
    """A bar on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True, highlight=False)
        self._rich = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console,
            transient=True,
            refresh_per_second=8,
        )
        self._task: Any = self._rich.add_task("starting", total=None, rate="", left="")
        self._estimate = Estimate(None)
        self._sampled = 0.0
        self._step, self._doing, self._noted = "starting", "", ""
        self._rich.start()

    def step(self, text: str) -> None:
        self._step = text
        self._describe()

    def doing(self, text: str) -> None:
        if text != self._doing:
            self._doing = text
            self._describe()

    def _describe(self) -> None:
        self._rich.update(self._task, description=storable_key(self._doing or self._step, SHOWN_CHARS))

    def note(self, text: str) -> None:
        if text != self._noted:
            self._noted = text
            self._rich.console.print(f"note: {storable_key(text, SHOWN_CHARS)}", style="yellow", markup=False)

    def plan(self, text: str) -> None:
        self._rich.console.print(f"plan: {storable_key(text, SHOWN_CHARS)}", style="dim", markup=False)

    def hosts(self, text: str) -> None:
        self._step = f"reindexing on {text}"
        self._describe()

    def begin(self, records: int | None) -> None:
        self._estimate = Estimate(records)
        self._step = "reindexing"
        self._rich.update(self._task, description=self._step, total=records)

    def update(self, counts: Counts) -> None:
        now = time.monotonic()
        if now - self._sampled < 0.25:
            return
        self._sampled = now
        self._estimate.take(counts, now)
        tokens_rate, records_rate = self._estimate.rates()
        left = self._estimate.seconds_left(counts)
        self._rich.update(
            self._task,
            completed=counts.accounted,
            rate=f"{records_rate:,.0f} records/s  {tokens_rate:,.0f} tokens/s" if tokens_rate else "",
            left=f"{clock(left)} left" if left is not None and not self._doing else "",
        )

    def close(self) -> None:
        self._rich.stop()


def choose(show: bool = True) -> Progress:
    """A bar if standard error is a terminal, else plain lines; nothing if ``show`` is false."""
    if not show:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
