"""Filled slots on their way to a flush: those of embedded texts, and those of texts whose vector was there."""

from __future__ import annotations

from ..accounting import Counts, Fate
from ..engine.base import SlotFilled
from ..faults import fault
from ..ipc.row_block import ROW_REASONS
from ..ipc.slab import Row
from ..records import Reject
from .flushing import FlushPlanner
from .key_ledger import KeyLedger
from .leases import SlotPool
from .text_reuse import TextReuse


class Filling:
    """Takes vectors as they come.

    Args:
        counts: Where embedded rows are counted.
        ledger: Told of rows that have their vector, and of those that get none.
        reuse: Told of the vectors, for equal texts.
        flushes: Given the slots, and what is rejected.
    """

    def __init__(self, counts: Counts, ledger: KeyLedger, reuse: TextReuse, flushes: FlushPlanner) -> None:
        self._counts, self._ledger, self._reuse, self._flushes = counts, ledger, reuse, flushes

    def embedded(self, event: SlotFilled, slots: SlotPool) -> None:
        """The texts of a slot have been embedded, or were found unfit."""
        fault("pipeline.embedded")
        lease = slots.of(event.slot, event.lease)
        lease.crcs = event.crcs
        self._flushes.filled(lease)
        counted = event.tokens, event.padded_tokens, event.truncated, event.lost_chars
        self._counts.embedded(*counted, event.seconds)
        slot = slots.slab.slots[event.slot]
        ledger, codes = self._ledger, slot.code[: len(lease.rows)]
        waited = self._reuse.filled(lease.hashes, slot.vectors[: len(lease.rows)], codes)
        for i in codes.nonzero()[0].tolist():
            lease.skip.add(i)
            self._reject(lease.rows[i], lease.hashes[i], int(codes[i]))
        if ledger.has_repeated:
            for i, (key, sequence) in enumerate(zip(lease.keys, lease.sequences, strict=True)):
                if i not in lease.skip:
                    ledger.has_vector(key, sequence)
        for numbered, code in waited:
            for row, sequence, digest in numbered:
                if code:
                    # What the model cannot embed for one it cannot embed for its equals.
                    self._reject(row, digest, code)
                else:
                    ledger.has_vector(row.record.key, sequence)

    def reuse(self, slots: SlotPool) -> None:
        """Fill a free slot with rows whose vector is there."""
        shape = slots.slab.shape
        lease = slots.lease(self._reuse.take(shape.rows, shape.blob_bytes), Fate.REUSED)
        vectors = slots.slab.slots[lease.slot].vectors
        for i, digest in enumerate(lease.hashes):
            vectors[i] = self._reuse.vector(digest)
        self._flushes.filled(lease)

    def _reject(self, row: Row, digest: bytes, code: int) -> None:
        """Its text cannot be embedded."""
        key, digest = self._ledger.reject_as(row.record.key, digest)
        self._flushes.reject(Reject(key, *ROW_REASONS[code], digest, row.record.position))
        self._ledger.settle([row.record.key], Fate.REJECTED)
