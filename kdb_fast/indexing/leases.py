"""The slots of the slab, as their owner sees them.

A slot is in exactly one place at a time::

    FREE ──lease──► being embedded ──filled──► waits for its flush ──sent──► being written ──COMMIT──► FREE

It is written to by the worker that it was given to, and read by the writer, so nothing else touches it in between;
each use has a number, by which an answer about an earlier use is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from ..accounting import Fate
from ..errors import KdbFastError
from ..ipc.row_block import NO_VALUE
from ..ipc.slab import Row, Slab
from ..records import Key

Numbered = tuple[Row, int, bytes]
"""A row, its number in the order of reading, and the SHA-256 of its text."""

ROW_OVERHEAD_BYTES = 100
"""Of a row in a flush, beside its text and vector: id, model, time stamps and lengths of COPY's fields."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class SlotLease:
    """One use of a slot.

    Attributes:
        slot: Its number.
        number: Of this use.
        fate: How its rows end if they are written.
        size: Bytes of its rows in a flush, about.
        crcs: (start, stop, CRC-32 of the vectors), as the worker gave them.
        skip: Numbers of the rows that are not to be written: their fate is settled already.
    """

    slot: int
    number: int
    rows: list[Row]
    sequences: list[int]
    hashes: list[bytes]
    fate: Fate
    size: int
    crcs: tuple[tuple[int, int, int], ...] = ()
    skip: set[int] = field(default_factory=set)

    @cached_property
    def keys(self) -> list[Key]:
        """Of the rows. Made when first asked for: where no key comes twice, nobody asks."""
        return [row.record.key for row in self.rows]


class SlotPool:
    """Which slots are free, and what is in the others."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self._free = deque(range(slab.shape.slots))
        self._leased: dict[int, SlotLease] = {}
        self._number = 0

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._free)

    @property
    def leased(self) -> int:
        """How many are not."""
        return len(self._leased)

    def lease(self, rows: Sequence[Numbered], fate: Fate) -> SlotLease:
        """Put rows into a free slot; there must be one, and they must fit it."""
        number = self._free.popleft()
        slot = self.slab.slots[number]
        self._number += 1
        only_rows = [row for row, _, _ in rows]
        hashes = [digest for _, _, digest in rows]
        slot.put(self._number, only_rows, [microseconds(row.record.source_at) for row in only_rows], hashes)
        lease = SlotLease(
            number,
            self._number,
            only_rows,
            [sequence for _, sequence, _ in rows],
            hashes,
            fate,
            slot.text_bytes + len(rows) * (4 * self.slab.shape.dimensions + ROW_OVERHEAD_BYTES),
        )
        self._leased[number] = lease
        return lease

    def of(self, slot: int, number: int) -> SlotLease:
        """The use of a slot that an answer is about.

        Raises:
            KdbFastError: The slot is in another use.
        """
        lease = self._leased[slot]
        if lease.number != number:
            raise KdbFastError(f"Slot {slot} was filled for another use; this is a defect of kdb-fast.")
        return lease

    def release(self, slot: int) -> None:
        """Its rows are committed, or will never be written: it is free."""
        self._leased.pop(slot, None)
        self.slab.slots[slot].trim()
        self._free.append(slot)


def microseconds(moment: datetime | None) -> int:
    """Microseconds since 1970 UTC, exactly; NO_VALUE for None."""
    if moment is None:
        return NO_VALUE
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    delta = moment - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
