"""The store of a vector column or of a table of vectors within a run, for tests that flush by hand."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Key, Record
from kdb_fast.stores import open_store
from kdb_fast.stores.base import FlushResult, FlushSlot, RunSpec, Store, TargetTable

DIMENSIONS = 8

_numbers = itertools.count(10)


class Writer(NamedTuple):
    """A store in a run."""

    store: Store
    run: RunSpec

    def flush(self, *rows: tuple[Key, str], deletes: Sequence[Key] = (), number: int | None = None) -> FlushResult:
        shape = SlabShape(1, max(1, len(rows)), DIMENSIONS)
        slot = Slab.local(shape).slots[0]
        found = self.store.lookup([key for key, _ in rows])
        slot.put(1, [Row(Record(key, text), key in found) for key, text in rows], [NO_VALUE] * len(rows))
        for i, (_, text) in enumerate(rows):
            slot.vectors[i] = vector_of(text)
        number = next(_numbers) if number is None else number
        return self.store.flush(self.run, number, [FlushSlot(slot, frozenset())] if rows else [], [], deletes)

    def fingerprints(self, *keys: Key) -> list[str | None]:
        found = self.store.lookup(keys)
        return [found[key].fingerprint if key in found else "none" for key in keys]


def vector_of(text: str) -> Any:
    """A unit vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)
    return vector / np.linalg.norm(vector)


@contextlib.contextmanager
def begun(address: DatabaseAddress, target: TargetTable) -> Iterator[Writer]:
    """A store in a run."""
    with contextlib.closing(open_store(address, "test", target=target)) as store:
        store.prepare(DIMENSIONS)
        yield Writer(store, store.begin_run(fingerprint="f", model="m", dimensions=DIMENSIONS, wait=0))
