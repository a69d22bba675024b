"""kdb-fast's engine with a clock and a memory meter, and (on request) another worker or an added delay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from kdb_fast import supervisor
from kdb_fast.engine import Event
from kdb_fast.messages import Flushed

from .measure import Sampler


@dataclass
class Watch:
    """What was seen of one run.

    Attributes:
        pss: Largest proportional set size of each child by name, in bytes.
        ready_at: When all children had started (monotonic seconds).
        flushed_at: When the last flush was committed.
    """

    pss: dict[str, int] = field(default_factory=dict)
    ready_at: float | None = None
    flushed_at: float | None = None
    engine: Any = None

    @property
    def seconds_after_start(self) -> float:
        """From the moment all children were ready to the last COMMIT."""
        if self.ready_at is None or self.flushed_at is None:
            return 0.0
        return self.flushed_at - self.ready_at

    def worker_pss(self) -> int:
        """Largest PSS of any one worker, in bytes."""
        return max((size for name, size in self.pss.items() if name.startswith("worker")), default=0)


@contextlib.contextmanager
def watched(
    *, worker_target: Callable[..., None] | None = None, build_index: bool = True, delay: float = 0.0
) -> Iterator[Watch]:
    """Watch the runs of :func:`kdb_fast.reindex.reindex` within the block.

    Args:
        worker_target: Entry point of the worker processes instead of kdb-fast's own.
        build_index: False leaves out the building of the search indexes at the end.
        delay: Seconds to wait before each shard is given out: makes the engine slow on purpose.
    """
    watch = Watch()

    class WatchedEngine(supervisor.ProcessEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            if worker_target is not None:
                options["worker_target"] = worker_target
            super().__init__(*args, **options)
            watch.engine = self

        def embed(self, slot: int, generation: int, rows: int) -> None:
            time.sleep(delay)
            super().embed(slot, generation, rows)

        def poll(self, timeout: float) -> list[Event]:
            events = super().poll(timeout)
            if watch.ready_at is None and all(child.ready for child in self._children()):
                watch.ready_at = time.monotonic()
            if any(isinstance(event, Flushed) for event in events):
                watch.flushed_at = time.monotonic()
            return events

    def pids() -> dict[str, int]:
        with contextlib.suppress(AttributeError, RuntimeError):
            return dict(watch.engine.pids())
        return {}

    sampler = Sampler(pids)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(supervisor, "ProcessEngine", WatchedEngine))
        if not build_index:
            from kdb_fast.pipeline import Pipeline

            finish = Pipeline.finish
            stack.enter_context(patch.object(Pipeline, "finish", lambda self, prune: finish(self, prune, False)))
        stack.enter_context(sampler.running())
        yield watch
    watch.pss = sampler.peaks
