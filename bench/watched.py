"""kdb-fast's engine with a clock and a memory meter, and (on request) another worker or an added delay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

from kdb_fast.engine import start
from kdb_fast.engine.base import Engine, Event, SlotFilled
from kdb_fast.engine.process_pool import ProcessPool
from kdb_fast.engine.writer_process import WriterProcess
from kdb_fast.ipc.messages import Flushed

from .measure import Sampler


@dataclass
class Watch:
    """What was seen of one run.

    Attributes:
        pss: Largest proportional set size of each child by name, in bytes.
        ready_at: When the writer and a first worker had started, so that work could begin (monotonic seconds).
        flushed_at: When the last flush was committed.
    """

    pss: dict[str, int] = field(default_factory=dict)
    ready_at: float | None = None
    flushed_at: float | None = None
    engine: Any = None

    @property
    def seconds_after_start(self) -> float:
        """From ``ready_at`` to the last COMMIT."""
        if self.ready_at is None or self.flushed_at is None:
            return 0.0
        return self.flushed_at - self.ready_at

    def worker_pss(self) -> int:
        """Largest PSS of any one worker, in bytes."""
        return max((size for name, size in self.pss.items() if name.startswith("worker")), default=0)


@contextlib.contextmanager
def watched(
    *,
    worker_target: Callable[..., None] | None = None,
    build_index: bool = True,
    delay: float = 0.0,
    memory: bool = True,
) -> Iterator[Watch]:
    """Watch the runs of :func:`kdb_fast.indexing.reindex.reindex` within the block.

    Args:
        worker_target: Entry point of the worker processes instead of kdb-fast's own.
        build_index: False leaves out the building of the search indexes at the end.
        memory: False leaves out the memory meter, which takes a twentieth of a core from the parent.
        delay: Seconds to wait for each shard that was embedded: makes the engine slow on purpose.
    """
    watch = Watch()

    target: dict[str, Any] = {} if worker_target is None else {"worker_target": worker_target}

    class WatchedPool(ProcessPool):
        def collect(self, ready: set[Any]) -> list[Event]:
            events = super().collect(ready)
            # Noted as the message comes: poll() returns only when something is done.
            if watch.ready_at is None and watch.engine.is_ready():
                watch.ready_at = time.monotonic()
            return events

    class WatchedEngine(Engine):
        _owed = 0

        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            watch.engine = self

        def is_ready(self) -> bool:
            """Whether the writer and a first worker have started."""
            assert isinstance(self.pool, ProcessPool)
            assert isinstance(self.writer, WriterProcess)
            return self.writer._child.ready and any(worker.ready for worker in self.pool._workers)

        def poll(self, timeout: float) -> list[Event]:
            events = super().poll(timeout)
            if delay:
                self._owed += sum(isinstance(event, SlotFilled) for event in events)
                if watch.ready_at is not None:
                    time.sleep(delay * self._owed)
                    self._owed = 0
            if any(isinstance(event, Flushed) for event in events):
                watch.flushed_at = time.monotonic()
            return events

    def pids() -> dict[str, int]:
        with contextlib.suppress(AttributeError, RuntimeError):
            return dict(watch.engine.pids())
        return {}

    sampler = Sampler(pids)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(start, "Engine", WatchedEngine))
        stack.enter_context(patch.object(start, "ProcessPool", partial(WatchedPool, **target)))
        if not build_index:
            from kdb_fast.indexing.pipeline import Pipeline

            finish = Pipeline.finish
            stack.enter_context(
                patch.object(Pipeline, "finish", lambda self, prune, live_rows: finish(self, prune, False, live_rows))
            )
        if memory:
            stack.enter_context(sampler.running())
        yield watch
    watch.pss = sampler.peaks
