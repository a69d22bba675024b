"""What carries shards to vectors and flushes to the database: an engine is a slab, a pool and a writer.

The pipeline gives work with :meth:`Pool.embed` and :meth:`Writer.request`, and takes what has happened with
:meth:`Engine.poll`: one wait over all that both wait for. There are three pools, in this process, in processes, and in
threads that wait for a provider's API, and two writers, in this process and in one of its own. All run the same
functions (:mod:`.worker`, :mod:`.writer`), so that vectors and rows are the same.

Whose a slot is::

    pipeline ──embed()──► pool ──SlotFilled──► pipeline ──Flush──► writer ──Flushed──► pipeline

Between two of these arrows only the one who is named touches the slot's memory. A lease is over when the pipeline has
the slot back for good: after ``Flushed``, or from :meth:`Pool.cancel`, which gives only slots that no worker was sent.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from ..ipc.messages import Answer, Busy, Embedded, Request
from ..ipc.slab import Slab
from ..receipt import HostShare
from . import child_processes
from .child_processes import Children
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
    lost_chars: int = 0

    @classmethod
    def of(cls, parts: Sequence[Embedded]) -> SlotFilled:
        """From the answers for all parts of a slot."""
        return cls(
            parts[0].slot,
            parts[0].lease,
            sum(p.tokens for p in parts),
            sum(p.padded_tokens for p in parts),
            sum(p.truncated for p in parts),
            sum(p.seconds for p in parts),
            tuple((p.start, p.stop, p.crc) for p in parts),
            sum(p.lost_chars for p in parts),
        )


class Note(NamedTuple):
    """Something a person should know, such as a worker that died and was replaced."""

    text: str


Event = SlotFilled | Answer | Note | Busy


class Part(ABC):
    """A pool or a writer, as :func:`wait_for` sees it."""

    @abstractmethod
    def waitables(self) -> list[Any]:
        """What :func:`multiprocessing.connection.wait` is to wait for; nothing where :meth:`collect` does the work."""

    @abstractmethod
    def collect(self, ready: set[Any]) -> list[Event]:
        """What has happened. ``ready`` are those of all waitables that have something to tell, or none.

        Called at least every second, to look after those that tell nothing any more.
        """


class Pool(Part):
    """Embeds the rows of slots.

    Attributes:
        workers: How many slots are embedded at the same time; 0 in this process.
        shard_chars: Most characters of a shard that are read.
        hosts: What each host of a cluster has done.
        full_shards: Whether a shard that is not full waits for more rows, because a small one costs as much.
    """

    workers: int
    shard_chars = SHARD_CHARS
    full_shards = False
    hosts: tuple[HostShare, ...] = ()

    @abstractmethod
    def embed(self, slot: int, lease: int, rows: int) -> None:
        """Embed all rows of a slot; a SlotFilled follows. Until then the slot is the pool's."""

    @abstractmethod
    def wants_work(self) -> bool:
        """Whether a worker would be idle soon without another shard."""

    @abstractmethod
    def cancel(self) -> set[int]:
        """Forget slots that no worker was given; returns these: they will not be filled, nor written to."""

    def close(self) -> None:
        """Take no more work. Processes are ended by their :class:`~.child_processes.Children`."""


class Writer(Part):
    """Writes to the index, one thing at a time."""

    @abstractmethod
    def request(self, message: Request) -> None:
        """Ask it for something; its answer follows. Until then the slots of a flush are the writer's."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether it has answered everything."""


def wait_for(parts: Sequence[Part], timeout: float) -> list[Event]:
    """What has happened in these parts, waiting at most ``timeout`` seconds for something.

    Raises:
        KdbFastError: What a part cannot go on for.
    """
    deadline = time.monotonic() + timeout
    while True:
        objects = [waitable for part in parts for waitable in part.waitables()]
        seconds = min(max(0.0, deadline - time.monotonic()), child_processes.CHECK_SECONDS)
        ready = set(wait(objects, seconds)) if objects else set()
        events = [event for part in parts for event in part.collect(ready)]
        if events or not objects or time.monotonic() >= deadline:
            return events


class Engine:
    """One writer, one pool, and the slots that go through them.

    Attributes:
        slab: The slots. Which of them are free is the pipeline's business alone.
        pool: Makes vectors.
        writer: Writes them.
    """

    def __init__(self, slab: Slab, pool: Pool, writer: Writer, children: Children | None = None) -> None:
        self.slab, self.pool, self.writer = slab, pool, writer
        self._children = children or Children()

    def poll(self, timeout: float) -> list[Event]:
        """:func:`wait_for` both."""
        return wait_for((self.writer, self.pool), timeout)

    def close(self, *, kill: bool = False) -> None:
        """End the children (at once with ``kill``) and give the slab back."""
        self.pool.close()
        self._children.close(kill=kill)
        self.slab.close()

    def peak_rss_bytes(self) -> dict[str, int]:
        """Largest resident memory of each child so far, by name."""
        return dict(self._children.peaks)

    def pids(self) -> dict[str, int]:
        """Process ids of the children by name, for tests and measurements."""
        return self._children.pids()
