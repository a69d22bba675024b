"""An engine whose workers are threads that wait for a provider's API; the writer is a process as always."""

from __future__ import annotations

import contextlib
import queue
import threading
import time

from ..db.address import DatabaseAddress
from ..embedding.providers.base import EmbeddingProvider
from ..embedding.providers.encoder import ProviderEncoder
from ..embedding.providers.openai.inputs import MAX_REQUEST_TOKENS
from ..embedding.providers.texts import PACKED_BYTES_PER_TOKEN
from ..ipc.messages import Embedded, Finish, Flush, PrepareIndex
from ..ipc.row_block import ROW_NOT_ENCODABLE
from ..ipc.slab import SlabShape
from ..stores.base import RunSpec
from .base import Engine, Event, SlotFilled, filled
from .processes import ProcessEngine

POLL_SECONDS = 0.02
"""How soon an answer of the API is noticed: next to nothing beside a request's tenths of a second."""


class ProviderEngine(Engine):
    """Embeds through a provider with several requests in flight.

    A slot is one request of OpenAI's API, if its texts are not mostly beyond ASCII: it has as many rows and about as
    many bytes.

    Args:
        threads: Slots that are embedded at the same time.

    :meth:`embed` and :meth:`poll` raise what the provider cannot go on for: a refused key, an exhausted quota.
    """

    shard_chars = MAX_REQUEST_TOKENS * PACKED_BYTES_PER_TOKEN
    full_shards = True

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
        self._tested = False
        self.workers = threads
        self._writer = ProcessEngine(shape, None, address, run, workers=0, cpus=[])
        self.slab = self._writer.slab
        self._asked: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[SlotFilled | BaseException] = queue.SimpleQueue()
        self._in_flight: set[int] = set()
        for number in range(threads):
            # Daemons: a request that waits for a rate limit must not hold up the end of the process.
            threading.Thread(target=self._serve, name=f"provider-{number + 1}", daemon=True).start()

    def embed(self, slot: int, lease: int, rows: int) -> None:
        if not self._tested:
            # Before the first request that is paid for; a run in which nothing changed sends none at all.
            self._encoder.self_test()
            self._tested = True
        self._in_flight.add(slot)
        self._asked.put((slot, lease, rows))

    def _serve(self) -> None:
        while (task := self._asked.get()) is not None:
            try:
                self._answers.put(self._embed(*task))
            except BaseException as error:
                self._answers.put(error)

    def _embed(self, number: int, lease: int, rows: int) -> SlotFilled:
        started = time.perf_counter()
        slot = self.slab.slots[number]
        tally, refused = self._encoder.encode_each(slot.contents(0, rows), slot.vectors[:rows])
        for row in refused:
            slot.refuse(row, ROW_NOT_ENCODABLE)
        slot.mark_unfit(0, rows)
        crc = slot.checksum(0, rows)
        seconds = time.perf_counter() - started
        return filled(Embedded(number, lease, 0, rows, *tally, seconds, crc))

    def wants_work(self) -> bool:
        return len(self._in_flight) < self.workers

    def request(self, message: Flush | PrepareIndex | Finish) -> None:
        self._writer.request(message)

    @property
    def writer_idle(self) -> bool:
        return self._writer.writer_idle

    def poll(self, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        while True:
            events = self._writer.poll(min(POLL_SECONDS, timeout))
            with contextlib.suppress(queue.Empty):
                while True:
                    answer = self._answers.get_nowait()
                    if isinstance(answer, BaseException):
                        raise answer
                    self._in_flight.discard(answer.slot)
                    events.append(answer)
            if events or time.monotonic() >= deadline:
                return events

    def cancel_embedding(self) -> set[int]:
        cancelled: set[int] = set()
        with contextlib.suppress(queue.Empty):
            while (task := self._asked.get_nowait()) is not None:
                cancelled.add(task[0])
        self._in_flight -= cancelled
        return cancelled

    def close(self, *, kill: bool = False) -> None:
        # A request in flight cannot be cut off; its answer is thrown away when it comes.
        self.cancel_embedding()
        for _ in range(self.workers):
            self._asked.put(None)
        self._writer.close(kill=kill)

    def peak_rss_bytes(self) -> dict[str, int]:
        return self._writer.peak_rss_bytes()
