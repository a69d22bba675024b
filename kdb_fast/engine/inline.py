"""Pool and writer in this process: for runs too small to pay for processes."""

from __future__ import annotations

from collections import deque
from typing import Any

from ..embedding.encoder import Encoder, EncoderSpec
from ..ipc.messages import Embed, Request
from ..ipc.slab import Slab
from ..stores.base import RunSpec, Store
from .base import Event, Pool, SlotFilled, Writer
from .worker import embed_rows
from .writer import answer


class InlinePool(Pool):
    """Embeds one slot each time it is asked what has happened. The model is loaded before the first."""

    workers = 0

    def __init__(self, slab: Slab, spec: EncoderSpec) -> None:
        self._slab, self._spec = slab, spec
        self._encoder: Encoder | None = None
        self._work: deque[Embed] = deque()

    def embed(self, slot: int, lease: int, rows: int) -> None:
        self._work.append(Embed(slot, lease, 0, rows))

    def wants_work(self) -> bool:
        return not self._work

    def cancel(self) -> set[int]:
        slots = {order.slot for order in self._work}
        self._work.clear()
        return slots

    def waitables(self) -> list[Any]:
        return []

    def collect(self, ready: set[Any]) -> list[Event]:
        if not self._work:
            return []
        order = self._work.popleft()
        if self._encoder is None:
            self._encoder = Encoder(self._spec)
            self._encoder.self_test()
        return [SlotFilled.of([embed_rows(self._slab.slots[order.slot], order, self._encoder)])]


class InlineWriter(Writer):
    """Does what it was asked for when it is asked what has happened."""

    def __init__(self, slab: Slab, store: Store, run: RunSpec) -> None:
        self._slab, self._store, self._run = slab, store, run
        self._request: Request | None = None

    def request(self, message: Request) -> None:
        self._request = message

    @property
    def idle(self) -> bool:
        return self._request is None

    def waitables(self) -> list[Any]:
        return []

    def collect(self, ready: set[Any]) -> list[Event]:
        if self._request is None:
            return []
        done = answer(self._slab, self._store, self._run, self._request, lambda what: None)
        self._request = None
        return [done]
