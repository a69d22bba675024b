"""An engine whose workers are threads that wait for a provider's API; the writer is a process as always."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from zlib import crc32

import numpy as np

from .database import DatabaseAddress
from .engine import Engine, Event, SlotFilled, filled
from .messages import Embedded, Finish, Flush, PrepareIndex
from .providers import EmbeddingProvider, ProviderEncoder
from .slab import ROW_NOT_ENCODABLE, ROW_NOT_FINITE, ROW_ZERO, SlabShape
from .stores.base import RunSpec
from .supervisor import ProcessEngine

POLL_SECONDS = 0.02
"""How soon an answer of the API is noticed: next to nothing beside a request's tenths of a second."""


class ProviderEngine(Engine):
    """Embeds through a provider with several requests in flight.

    Args:
        threads: Slots that are embedded at the same time.

    Raises:
        KdbFastError: What the provider cannot go on for: a refused key, an exhausted quota.
    """

    def __init__(
        self,
        shape: SlabShape,
        provider: EmbeddingProvider,
        address: DatabaseAddress,
        run: RunSpec,
        *,
        threads: int,
    ) -> None:
        self._encoder = ProviderEncoder(provider)
        self._encoder.self_test()
        self.workers = threads
        self._writer = ProcessEngine(shape, None, address, run, workers=0, cpus=[])
        self.slab = self._writer.slab
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="provider")
        self._futures: dict[Future[SlotFilled], int] = {}

    def embed(self, slot: int, generation: int, rows: int) -> None:
        self._futures[self._pool.submit(self._embed, slot, generation, rows)] = slot

    def _embed(self, number: int, generation: int, rows: int) -> SlotFilled:
        started = time.perf_counter()
        slot = self.slab.slots[number]
        vectors = slot.vectors[:rows]
        tally, refused = self._encoder.encode_each(slot.contents(0, rows), vectors)
        code = slot.code[:rows]
        code[~np.isfinite(vectors).all(axis=1)] = ROW_NOT_FINITE
        code[~vectors.any(axis=1)] = ROW_ZERO
        for row in refused:
            code[row] = ROW_NOT_ENCODABLE
        crc = crc32(vectors.data.cast("B"))
        seconds = time.perf_counter() - started
        return filled(Embedded(number, generation, 0, rows, *tally, seconds, crc))

    def wants_work(self) -> bool:
        return len(self._futures) < self.workers

    def flush(self, message: Flush) -> None:
        self._writer.flush(message)

    def request(self, message: PrepareIndex | Finish) -> None:
        self._writer.request(message)

    @property
    def writer_idle(self) -> bool:
        return self._writer.writer_idle

    def poll(self, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        while True:
            events = self._writer.poll(min(POLL_SECONDS, timeout))
            for future in [f for f in self._futures if f.done()]:
                del self._futures[future]
                events.append(future.result())
            if events or time.monotonic() >= deadline:
                return events

    def cancel_embedding(self) -> set[int]:
        cancelled = {f: slot for f, slot in self._futures.items() if f.cancel()}
        for future in cancelled:
            del self._futures[future]
        return set(cancelled.values())

    def close(self, *, kill: bool = False) -> None:
        # A request in flight cannot be cut off; its answer is thrown away when it comes.
        self._pool.shutdown(wait=not kill, cancel_futures=True)
        self._writer.close(kill=kill)

    def peak_rss_bytes(self) -> dict[str, int]:
        return self._writer.peak_rss_bytes()
