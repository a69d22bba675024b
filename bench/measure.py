"""Numbers with their spread, and the memory of a tree of processes."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import psutil

from kdb_fast.ipc.repeating import repeating

SAMPLE_SECONDS = 0.5
"""Time between two samples of memory: reading it takes about 2 ms a process, so under 1 % of a core."""


class Spread(NamedTuple):
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 1, unit: str = "") -> str:
        """``12.3 (11.9–12.8)``; the range is left out where there was one run."""
        body = f"{self.median:,.{digits}f}"
        if self.low != self.high:
            body += f" ({self.low:,.{digits}f}–{self.high:,.{digits}f})"
        return f"{body}{unit}"


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest. Raises ValueError for no values."""
    every = list(values)
    if not every:
        raise ValueError("nothing was measured")
    return Spread(statistics.median(every), min(every), max(every))


def pairwise(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratios of what was measured next to each other: a machine that slows down hits both."""
    return spread(a / b for a, b in zip(numerators, denominators, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def pss_bytes(pid: int) -> int:
    """Proportional set size: private pages, and of shared ones this process's part. 0 for one that has ended."""
    with contextlib.suppress(psutil.Error, OSError):
        info = psutil.Process(pid).memory_full_info()
        return int(getattr(info, "pss", 0) or info.uss)
    return 0


def tree(pid: int) -> list[int]:
    """Process ids of a process and all its descendants."""
    with contextlib.suppress(psutil.Error):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


class Sampler:
    """Largest PSS of named processes, sampled by a thread.

    Attributes:
        peaks: Largest PSS of each name, in bytes.
        peak_sum: Largest sum over all processes at one moment, in bytes.
    """

    def __init__(self, pids: Callable[[], dict[str, int]], seconds: float = SAMPLE_SECONDS) -> None:
        self.peaks: dict[str, int] = {}
        self.peak_sum = 0
        self._pids, self._seconds = pids, seconds

    def take(self) -> None:
        """One sample of every process."""
        total = 0
        for name, pid in self._pids().items():
            size = pss_bytes(pid)
            self.peaks[name] = max(self.peaks.get(name, 0), size)
            total += size
        self.peak_sum = max(self.peak_sum, total)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sample until the block ends."""
        self.take()
        with repeating(self.take, self._seconds, "memory"):
            yield
