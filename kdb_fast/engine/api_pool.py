"""A pool of threads that wait for a provider's API."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from typing import Any

from ..embedding.providers.base import EmbeddingProvider
from ..embedding.providers.encoder import ProviderEncoder
from ..embedding.providers.openai.inputs import MAX_REQUEST_TOKENS
from ..embedding.providers.texts import PACKED_BYTES_PER_TOKEN
from ..ipc.messages import Embed, Embedded
from ..ipc.row_block import ROW_NOT_ENCODABLE
from ..ipc.slab import Slab
from .base import Event, Pool, SlotFilled


class ApiPool(Pool):
    """Embeds through a provider with several requests in flight.

    A slot is one request of OpenAI's API, if its texts are not mostly beyond ASCII: it has as many rows and about as
    many bytes.

    Args:
        threads: Slots that are embedded at the same time.

    :meth:`embed` and :meth:`collect` raise what the provider cannot go on for: a refused key, an exhausted quota.
    """

    shard_chars = MAX_REQUEST_TOKENS * PACKED_BYTES_PER_TOKEN
    full_shards = True

    def __init__(self, slab: Slab, provider: EmbeddingProvider, *, threads: int) -> None:
        self.workers = threads
        self._slab = slab
        self._encoder = ProviderEncoder(provider)
        self._tested = False
        self._asked: queue.SimpleQueue[Embed | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[SlotFilled | BaseException] = queue.SimpleQueue()
        self._in_flight: set[int] = set()
        # A byte in this pipe wakes the parent: there is an answer.
        self._wake_end, self._waker_end = os.pipe()
        self._pipe_lock = threading.Lock()
        self._closed = False
        for number in range(threads):
            # Daemons: a request that waits for a rate limit must not hold up the end of the process.
            threading.Thread(target=self._serve, name=f"provider-{number + 1}", daemon=True).start()

    def embed(self, slot: int, lease: int, rows: int) -> None:
        if not self._tested:
            # Before the first request that is paid for; a run in which nothing changed sends none at all.
            self._encoder.self_test()
            self._tested = True
        self._in_flight.add(slot)
        self._asked.put(Embed(slot, lease, 0, rows))

    def wants_work(self) -> bool:
        return len(self._in_flight) < self.workers

    def cancel(self) -> set[int]:
        cancelled: set[int] = set()
        with contextlib.suppress(queue.Empty):
            while (order := self._asked.get_nowait()) is not None:
                cancelled.add(order.slot)
        self._in_flight -= cancelled
        return cancelled

    def waitables(self) -> list[Any]:
        return [self._wake_end]

    def collect(self, ready: set[Any]) -> list[Event]:
        if self._wake_end in ready:
            os.read(self._wake_end, 4096)
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            while True:
                answer = self._answers.get_nowait()
                if isinstance(answer, BaseException):
                    raise answer
                self._in_flight.discard(answer.slot)
                events.append(answer)
        return events

    def close(self) -> None:
        # A request in flight cannot be cut off; its answer is thrown away when it comes.
        self.cancel()
        for _ in range(self.workers):
            self._asked.put(None)
        with self._pipe_lock:
            if not self._closed:
                self._closed = True
                os.close(self._wake_end)
                os.close(self._waker_end)

    # -- in the threads --------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (order := self._asked.get()) is not None:
            try:
                self._answers.put(self._embed(order))
            except BaseException as error:
                self._answers.put(error)
            with self._pipe_lock:
                if not self._closed:
                    os.write(self._waker_end, b"\0")

    def _embed(self, order: Embed) -> SlotFilled:
        started = time.perf_counter()
        slot, rows = self._slab.slots[order.slot], order.stop
        tally, refused = self._encoder.encode_each(slot.contents(0, rows), slot.vectors[:rows])
        for row in refused:
            slot.refuse(row, ROW_NOT_ENCODABLE)
        slot.mark_unfit(0, rows)
        crc = slot.checksum(0, rows)
        seconds = time.perf_counter() - started
        tokens, padded, cut, lost = tally
        return SlotFilled.of([Embedded(order.slot, order.lease, 0, rows, tokens, padded, cut, seconds, crc, lost)])
