"""What carries shards to vectors and flushes to the database: in processes, or in this one.

The pipeline gives work with :meth:`Engine.embed` and :meth:`Engine.request`, and takes what has happened with
:meth:`Engine.poll`. All engines run the same writer functions, and those with a model the same worker functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import NamedTuple

from ..embedding.encoder import Encoder, EncoderSpec
from ..ipc.messages import Embed, Embedded, Finish, Finished, Flush, Flushed, IndexPrepared, PrepareIndex
from ..ipc.slab import Slab, SlabShape
from ..stores.base import RunSpec, Store
from .sharding import SHARD_CHARS


class SlotFilled(NamedTuple):
    """All rows of a slot are embedded (or marked as unfit). ``crcs`` are (start, stop, crc of the vectors)."""

    slot: int
    lease: int
    tokens: int
    padded_tokens: int
    truncated: int
    seconds: float
    crcs: tuple[tuple[int, int, int], ...]


class Note(NamedTuple):
    """Something a person should know, such as a worker that died and was replaced."""

    text: str


Event = SlotFilled | Flushed | IndexPrepared | Finished | Note


class Engine(ABC):
    """Slots, work for them, and what came of it.

    Attributes:
        slab: The slots. Which of them are free is the pipeline's business alone.
        workers: Embedding processes (0 for the engine in this process).
        shard_chars: Most characters of a shard that are read.
        full_shards: Whether a shard that is not full waits for more rows, because a small one costs as much.
    """

    slab: Slab
    workers: int
    shard_chars = SHARD_CHARS
    full_shards = False

    @abstractmethod
    def embed(self, slot: int, lease: int, rows: int) -> None:
        """Embed all rows of a slot; a SlotFilled follows."""

    @abstractmethod
    def wants_work(self) -> bool:
        """Whether a worker would be idle soon without another shard."""

    @abstractmethod
    def request(self, message: Flush | PrepareIndex | Finish) -> None:
        """Ask the writer to flush or for something else; its answer follows. One at a time."""

    @property
    @abstractmethod
    def writer_idle(self) -> bool: ...

    @abstractmethod
    def poll(self, timeout: float) -> list[Event]:
        """What has happened, waiting at most ``timeout`` seconds for something."""

    @abstractmethod
    def cancel_embedding(self) -> set[int]:
        """Forget shards that no worker was given; returns the slots that will not be filled, nor written to."""

    @abstractmethod
    def close(self, *, kill: bool = False) -> None:
        """End the children (at once with ``kill``) and give the slab back."""

    def peak_rss_bytes(self) -> dict[str, int]:
        """Largest resident memory of each child so far, by name."""
        return {}


class InlineEngine(Engine):
    """Everything in this process: for runs too small to pay for processes. The vectors are the same."""

    workers = 0

    def __init__(self, shape: SlabShape, spec: EncoderSpec, store: Store, run: RunSpec, encoder: Encoder | None = None):
        self.slab = Slab.local(shape)
        self._spec, self._store, self._run = spec, store, run
        self._encoder = encoder
        self._work: deque[Embed] = deque()
        self._requests: deque[Flush | PrepareIndex | Finish] = deque()

    def embed(self, slot: int, lease: int, rows: int) -> None:
        self._work.append(Embed(slot, lease, 0, rows))

    def wants_work(self) -> bool:
        return not self._work

    def request(self, message: Flush | PrepareIndex | Finish) -> None:
        self._requests.append(message)

    @property
    def writer_idle(self) -> bool:
        return not self._requests

    def poll(self, timeout: float) -> list[Event]:
        from .worker import embed_rows
        from .writer import finish, flush

        if self._requests:
            message = self._requests[0]
            answer: Event
            if isinstance(message, Flush):
                answer = flush(self.slab, self._store, self._run, message)
            elif isinstance(message, PrepareIndex):
                answer = IndexPrepared(self._store.drop_index())
            else:
                answer = finish(self._store, message, lambda what: None)
            self._requests.popleft()
            return [answer]
        if self._work:
            order = self._work.popleft()
            if self._encoder is None:
                self._encoder = Encoder(self._spec)
                self._encoder.self_test()
            return [filled(embed_rows(self.slab.slots[order.slot], order, self._encoder))]
        return []

    def cancel_embedding(self) -> set[int]:
        slots = {order.slot for order in self._work}
        self._work.clear()
        return slots

    def close(self, *, kill: bool = False) -> None:
        self.slab.close()


def filled(*parts: Embedded) -> SlotFilled:
    """One SlotFilled from the answers for all parts of a slot."""
    return SlotFilled(
        parts[0].slot,
        parts[0].lease,
        sum(p.tokens for p in parts),
        sum(p.padded_tokens for p in parts),
        sum(p.truncated for p in parts),
        sum(p.seconds for p in parts),
        tuple((p.start, p.stop, p.crc) for p in parts if p.crc is not None),
    )
