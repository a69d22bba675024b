"""Which engine a run gets: processes, threads that call a provider's API, or this process."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..db.address import DatabaseAddress
from ..embedding.encoder import EncoderSpec
from ..embedding.precision.expected import expected
from ..engine.base import Engine
from ..engine.plan import INLINE_ROWS, Plan, inline_shape, make_plan
from ..ipc.row_block import ROW_REASONS, ROW_WORKER_DIED
from ..ipc.slab import SlabShape
from ..settings import ReindexOptions, patience_seconds
from ..stores.base import RunSpec, Store
from .pipeline import StopRequested
from .progress import Progress
from .run_embedding import Embedding


class EngineFactory:
    """Starts the engine of one run once it is known that there is work for it.

    Attributes:
        plan: What was chosen; None where this process embeds, or nothing does.
        engine: What was started; None before.
        seconds: What the start took.
    """

    def __init__(
        self,
        address: DatabaseAddress,
        store: Store,
        run: RunSpec,
        embedding: Embedding,
        options: ReindexOptions,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        self._address, self._store, self._run = address, store, run
        self._embedding, self._options, self._progress = embedding, options, progress
        self._should_stop = should_stop
        self.plan: Plan | None = None
        self.engine: Engine | None = None
        self.seconds = 0.0

    def start(self, rows: int, more: bool) -> Engine:
        """Start the engine. Called once, when there is something to embed or to remove.

        Args:
            rows: Rows that wait.
            more: More may come: a small run that is all there is needs no processes.
        """
        from ..engine import start

        began = time.monotonic()
        options, embedding = self._options, self._embedding
        before = f"; {options.document_prefix!r} before each text" if options.document_prefix else ""
        if embedding.provider is not None:
            threads = options.workers or embedding.provider.concurrent_calls
            # A slot is a request.
            self.plan = make_plan(
                workers=threads, dimensions=embedding.dimensions, model_bytes=0, shard_rows=options.batch_size
            )
            self._progress.plan(f"{threads} requests in flight; {self.plan.shape.slots} slots{before}")
            self.engine = start.with_provider(
                self.plan.shape, embedding.provider, self._address, self._run, threads=threads
            )
            self.seconds = time.monotonic() - began
            return self.engine
        spec = embedding.spec
        assert spec is not None
        if options.cluster is not None and (rows or more):
            self.engine = self._on_cluster(options.cluster, spec, before)
            self.seconds = time.monotonic() - began
            return self.engine
        plan = make_plan(
            workers=options.workers,
            dimensions=embedding.dimensions,
            model_bytes=spec.model.memory_bytes,
            token_budget=spec.token_budget,
        )
        small = rows <= INLINE_ROWS and options.workers is None
        if not more and (not rows or (small and not self._may_be_deadly())):
            self.engine = start.in_this_process(inline_shape(embedding.dimensions), spec, self._store, self._run)
        else:
            if embedding.why:
                plan = plan.because(embedding.why)
            self.plan = plan.because(expected(spec.model.name))
            self._progress.plan(self.plan.describe() + before)
            self.engine = start.with_processes(
                plan.shape, spec, self._address, self._run, workers=plan.workers, cpus=plan.cpus
            )
        self.seconds = time.monotonic() - began
        return self.engine

    def _on_cluster(self, cluster: str, spec: EncoderSpec, before: str) -> Engine:
        """The CPUs of a cluster, of which the plan is made when it is known what it has."""
        from ..engine import start
        from ..engine.cluster.messages import ClusterSpec, Survey

        most = self._options.workers

        def shape(survey: Survey) -> SlabShape:
            plan = make_plan(
                workers=min(survey.cpus, most or survey.cpus),
                dimensions=self._embedding.dimensions,
                model_bytes=0,
                token_budget=spec.token_budget,
                why=survey.describe(),
                growth=1 if most else 2,
                elsewhere=True,
            )
            self.plan = plan.because(self._embedding.why) if self._embedding.why else plan
            self._progress.plan(self.plan.describe() + before)
            self._progress.step("starting the cluster's workers")
            return self.plan.shape

        def waiting() -> None:
            if self._should_stop():
                raise StopRequested

        self._progress.step(f"asking the cluster at {cluster}")
        return start.with_cluster(
            ClusterSpec(cluster, str(self._run.number), most, patience_seconds()),
            spec,
            self._address,
            self._run,
            shape=shape,
            on_hosts=self._progress.hosts,
            waiting=waiting,
        )

    def _may_be_deadly(self) -> bool:
        """Whether a text has ended its process in an earlier run, or may have: it must not end this one."""
        if self._store.after_a_crash(self._run.number):
            return True
        reason, _ = ROW_REASONS[ROW_WORKER_DIED]
        return any(reject.reason == reason for reject in self._store.rejects())

    def close(self, *, kill: bool) -> None:
        """End the engine, at once with ``kill``."""
        if self.engine is not None:
            self.engine.close(kill=kill)
