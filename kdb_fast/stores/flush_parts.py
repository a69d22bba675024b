"""How much of a flush goes into one transaction, where an application writes the same rows: it waits for no longer.

A flush whose outcome is not known is repeated from its start. Parts that were committed are then written once more,
with the same vectors, so that the repetition changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import FlushSlot

LOCK_SECONDS = 0.3
"""Longest time that rows are held locked."""

AIM_SECONDS = LOCK_SECONDS / 3
"""What the size of a part aims at, as no two parts take the same time: beside other work on two cores, 0.21 s at most
with this, and 0.37 s with half of the bound."""

FIRST_ROWS = 64
"""Rows of the first part: 0.2 s at 3 ms a row, which a large HNSW index takes that is not dropped."""

MOST_GROWTH = 4


class PartSize:
    """The number of rows of the next part, from the time that those before it took."""

    def __init__(self) -> None:
        self.rows = FIRST_ROWS

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a part of ``rows`` rows that were locked for ``seconds``."""
        if not rows:
            return
        fitting = max(1, int(rows * AIM_SECONDS / max(seconds, 1e-6)))
        if seconds > AIM_SECONDS:
            self.rows = min(self.rows, fitting)
        elif 2 * rows >= self.rows:
            # A part much smaller than asked for tells little of the time of a row.
            self.rows = max(self.rows, min(fitting, MOST_GROWTH * self.rows))


def first_part(slots: Sequence[FlushSlot], rows: int) -> tuple[list[FlushSlot], list[FlushSlot]]:
    """The first ``rows`` rows of the slots that are to be written, and the rest."""
    part: list[FlushSlot] = []
    for number, flush_slot in enumerate(slots):
        left = [row for row in range(flush_slot.slot.rows) if row not in flush_slot.skip]
        if len(left) <= rows:
            part.append(flush_slot)
            rows -= len(left)
            continue
        if rows:
            part.append(flush_slot._replace(skip=flush_slot.skip.union(left[rows:])))
            flush_slot = flush_slot._replace(skip=flush_slot.skip.union(left[:rows]))
        return part, [flush_slot, *slots[number + 1 :]]
    return part, []
