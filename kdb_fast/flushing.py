"""How much goes into one transaction: bytes, from the memory that is really there.

Starts small, so that the first rows are safe within seconds; doubles while flushes are quick; shrinks at
once when memory gets short or the database is slow. A fixed ceiling, set from the memory at the start, keeps a
lucky moment from allowing more than the machine can bear later.
"""

from __future__ import annotations

from collections.abc import Callable

from .resources import available_memory

FLOOR_BYTES = 512 * 1024
"""About 300 rows of 384 dimensions: below it the fixed cost of a transaction (3 ms) counts."""

CEILING_BYTES = 16 * 1024 * 1024
"""About 9,000 rows of 384 dimensions. Throughput is flat from 2 MB on, and what a crash can cost grows with it."""

MEMORY_SHARE = 32
"""The ceiling is at most available memory ÷ 32: the rows exist in the slab, as COPY data in the writer and in
libpq's buffers, and the database may be on the same machine."""

SLOW_SECONDS = 3.0
"""A flush that takes longer is halved: it holds locks and delays the answer to Ctrl-C."""

QUICK_SECONDS = 1.0

MAX_WAIT_SECONDS = 5.0
"""What is embedded is written after at most this long, also where a flush is not full."""


class FlushSize:
    """The target size of the next flush.

    Args:
        capacity: Bytes that the slab can hold for flushes.
        memory: Gives the bytes that can be allocated now.
    """

    def __init__(self, capacity: int, memory: Callable[[], int] = available_memory) -> None:
        self._memory = memory
        self.available_at_start = memory()
        by_memory = self.available_at_start // MEMORY_SHARE
        self.ceiling = max(FLOOR_BYTES, min(CEILING_BYTES, capacity, by_memory))
        self.limited_by = (
            "memory" if by_memory < min(CEILING_BYTES, capacity) else "slots" if capacity < CEILING_BYTES else "ceiling"
        )
        self.target = FLOOR_BYTES
        self.largest = 0
        self.smallest: int | None = None
        self.shrunk = 0

    def note(self, size: int, seconds: float) -> None:
        """Learn from a flush of ``size`` bytes that took ``seconds``."""
        self.largest = max(self.largest, size)
        self.smallest = size if self.smallest is None else min(self.smallest, size)
        if self._memory() < self.available_at_start // 4 or seconds > SLOW_SECONDS:
            self.shrunk += 1
            self.target = max(FLOOR_BYTES, self.target // 2)
        elif seconds < QUICK_SECONDS and size >= self.target // 2:
            self.target = min(self.ceiling, self.target * 2)

    def describe(self) -> str:
        """What it did, for the summary."""
        if not self.largest:
            return "nothing to flush"
        smallest = self.smallest or 0
        text = f"{smallest / 1e6:.1f} to {self.largest / 1e6:.1f} MB, at most {self.ceiling / 1e6:.1f} MB ("
        text += {
            "memory": f"available memory {self.available_at_start / 1e9:.1f} GB ÷ {MEMORY_SHARE}",
            "slots": "the slots of the slab",
            "ceiling": "the fixed ceiling",
        }[self.limited_by]
        return text + ")" + (f", shrunk {self.shrunk} times" if self.shrunk else "")
