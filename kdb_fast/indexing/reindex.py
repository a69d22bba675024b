"""One run, from options to receipt: the main job, in reading order."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import replace

from .. import __version__
from ..accounting import Counts
from ..db.address import DatabaseAddress
from ..errors import KdbFastError, StoppedError, UnexpectedError, UsageError
from ..receipt import Phases, Receipt
from ..records import number_of
from ..resources import collecting_rarely, peak_rss_bytes
from ..settings import ReindexOptions
from ..sources.base import Input, Source
from ..stores import open_store
from ..stores.base import RunSpec, Store, TargetTable
from ..stores.past_runs import forget_older, forget_older_of_input, recent_fingerprints
from ..tables.index_policy import IndexPolicy
from ..tables.kdb_search import KDB_SEARCH
from ..tables.table_target import TableTarget
from .engine_factory import EngineFactory
from .heartbeat import Heartbeat
from .pipeline import Pipeline, StopRequested
from .progress import Progress, Silent
from .run_embedding import Embedding, Records, find_embedding
from .screening import Screen
from .signals import StopFlag, stopping_by_signal


def reindex(
    address: DatabaseAddress,
    records: Input,
    options: ReindexOptions,
    progress: Progress | None = None,
    embedding: Embedding | None = None,
    target: TargetTable = KDB_SEARCH,
    begun: Callable[[Embedding], None] = lambda embedding: None,
) -> Receipt:
    """Embed every record of a source that is new or has changed, and store it.

    Args:
        address: The database of the index; an embedded server must be running.
        records: What to read; opened once the database was found fit, and closed at the end.
        options: What was asked for.
        progress: Shows a person what happens meanwhile.
        embedding: What gives the vectors, in place of what the options name; it stays the caller's to close.
        target: What is brought up to date.
        begun: Called once nothing is in the way of the run, and it holds the lock.

    Returns:
        What the run has done.

    Raises:
        KdbFastError: One of its subclasses; ``receipt`` is set on it when the run had begun.
    """
    if (isinstance(target, TableTarget) and target.chunked) != bool(options.chunk):
        raise UsageError("Pieces of texts (--chunk) need a table of vectors with a row for each, and that needs them.")
    if options.cluster is not None:
        from ..engine.cluster.ray_cluster import check_installed

        check_installed()
    progress = progress or Silent()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stopping_by_signal())
        progress.step("opening the database")
        store = open_store(address, "parent", target=target)
        stack.callback(store.close)

        def wait_note(text: str) -> None:
            if stop.count:
                raise StoppedError("Stopped on request, before anything was done.", signum=stop.signum)
            progress.note(text)

        store.on_wait = wait_note
        source = records.open(address)
        stack.callback(source.close)
        # Every other connection of the run means the same tables, whatever its search path.
        address = replace(address, schema=store.target.schema)
        progress.step("loading the model")
        began = time.monotonic()
        if embedding is None:
            embedding = find_embedding(
                options, progress, Records(address, source, lambda: stop.count > 0, store.target.name)
            )
            stack.callback(embedding.close)
        else:
            embedding = embedding.with_prefix(options.document_prefix)
        if options.chunk:
            embedding = embedding.in_pieces(options.chunk, options.overlap)
            if embedding.split and embedding.fingerprint not in recent_fingerprints(address, store.target.name):
                # Sizes that leave no room for a text are refused before anything is written.
                embedding.split("")
        embedding = replace(embedding, seconds=time.monotonic() - began)
        notes = store.prepare(embedding.dimensions, options.wait)
        indexes = store.default_index
        if options.index is not None:
            indexes = IndexPolicy(options.index)
            notes += store.check_index(indexes)
        run = store.begin_run(
            fingerprint=embedding.fingerprint,
            model=embedding.name,
            dimensions=embedding.dimensions,
            wait=options.wait,
        )._replace(target=target, indexes=indexes)
        store.on_wait = progress.note
        return _Run(address, store, source, embedding, run, options, progress, stop, started, begun, notes).go()


class _Run:
    """The run once it holds the lock."""

    def __init__(
        self,
        address: DatabaseAddress,
        store: Store,
        source: Source,
        embedding: Embedding,
        run: RunSpec,
        options: ReindexOptions,
        progress: Progress,
        stop: StopFlag,
        started: float,
        begun: Callable[[Embedding], None],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.address, self.store, self.source, self.embedding, self.run = address, store, source, embedding, run
        self.options, self.progress, self.stop, self.started = options, progress, stop, started
        self.begun, self.notes = begun, notes
        self.engines = EngineFactory(address, store, run, embedding, options, progress, self._should_stop)
        self.heartbeat = Heartbeat(address, run)
        self.pipeline: Pipeline | None = None

    def go(self) -> Receipt:
        state = "failed"
        error: KdbFastError | None = None
        try:
            with self.heartbeat.beating(), collecting_rarely():
                self._work()
            state = "done"
        except StopRequested:
            state = "stopped"
            error = StoppedError("Stopped on request.", signum=self.stop.signum or signal.SIGINT)
        except Exception as caught:
            error = _as_ours(caught)
        except BaseException as caught:
            # Nothing is said but what stopped it; the receipt is for whoever turns that into an error.
            self.engines.close(kill=True)
            self.stop.receipt = self._receipt("stopped" if isinstance(caught, KeyboardInterrupt) else "failed")
            with contextlib.suppress(Exception):
                self.store.end_run(self.run.number, self.stop.receipt.state, self.stop.receipt.as_json())
            raise
        # After a stop all that was embedded is written; a worker in the middle of a shard is not waited for.
        self.engines.close(kill=state != "done")
        receipt = self._receipt(state)
        try:
            self.store.end_run(self.run.number, state, receipt.as_json())
        except Exception as caught:
            error = error or _as_ours(caught)
        if error is not None:
            error.receipt = receipt
            raise error
        if receipt.read != sum(receipt.fates.values()):
            raise KdbFastError(f"The records do not add up: {receipt}. This is a defect of kdb-fast.")
        return receipt

    def _should_stop(self) -> bool:
        return self.stop.count > 0

    def _work(self) -> None:
        options, source = self.options, self.source
        estimate = source.estimate()
        if options.limit is not None:
            estimate = min(options.limit, estimate) if estimate is not None else options.limit
        for effect in self.store.forecast(self.run, estimate):
            self.notes += (effect,)
            self.progress.note(effect)
        self.begun(self.embedding)
        self.progress.begin(estimate)
        self.pipeline = Pipeline(
            store=self.store,
            start_engine=self.engines.start,
            fingerprint=self.run.fingerprint,
            dimensions=self.embedding.dimensions,
            read_chars=self.embedding.read_chars,
            max_rejects=options.max_rejects,
            force=options.force,
            split=self.embedding.split,
            unique_keys=source.unique_keys,
            screen=Screen(
                self.store.encoding,
                None if self.store.encoding == "UTF8" else self.store.missing_characters,
                self.store.key,
            ),
            estimate=estimate,
            index_policy=self.run.indexes,
            progress=self.progress,
            should_stop=self._should_stop,
            on_phase=self.heartbeat.note,
        )
        if not options.force and (known := self.store.known_rows(self.run.fingerprint)) is not None:
            source.skip_unchanged(known)
        self.pipeline.run(
            source.pages(),
            source.take_empty,
            source.take_unchanged,
            source.read_again if source.reads_again and self.embedding.split is None else None,
        )
        self.pipeline.counts.empty = source.empty
        self.progress.step("finishing the index")
        self.pipeline.finish(source.entities if source.complete else (), live_rows=source.live_rows)
        if self.pipeline.counts.stored or self.pipeline.counts.reused:
            for warning in self.store.altered(self.run.number):
                self.pipeline.warnings.append(warning)
                self.progress.note(warning)
        if self.pipeline.counts.truncated and isinstance(self.run.target, TableTarget) and not options.chunk:
            self.pipeline.warnings.append(
                f"{number_of(self.pipeline.counts.truncated, 'record is', 'records are')} longer than the model "
                "reads. Cut into pieces, their texts are read whole: --chunk 200 --overlap 20."
            )
        if source.complete:
            # What this run has read and not rejected is no longer rejected: changed, gone, or without text.
            whole = [entity for entity in source.entities if entity not in self.pipeline.not_pruned]
            forget_older(self.address, whole, self.run.number, self.run.target)
        elif source.input and options.limit is None:
            entity = next(iter(source.entities), None)
            forget_older_of_input(self.address, entity, source.input, self.run.number, self.run.target)

    def _receipt(self, state: str) -> Receipt:
        pipeline, run, engine, plan = self.pipeline, self.run, self.engines.engine, self.engines.plan
        counts = pipeline.counts if pipeline else Counts()
        seconds = time.monotonic() - self.started
        peaks = engine.peak_rss_bytes() if engine else {}
        flush = pipeline.flushes.size.describe() if pipeline and pipeline.flushes.size else "nothing to flush"
        return Receipt(
            run=run.number,
            schema=self.address.schema,
            target=run.target.names,
            state=state,
            input=self.source.input,
            read=counts.read,
            stored=counts.stored,
            unchanged=counts.unchanged,
            reused=counts.reused,
            superseded=counts.superseded,
            rejected=counts.rejected,
            foreign=counts.foreign,
            empty=self.source.empty,
            deleted=counts.deleted,
            truncated=counts.truncated,
            lost_chars=counts.lost_chars,
            chunks=counts.chunks,
            tokens=counts.tokens,
            padded_tokens=counts.padded_tokens,
            seconds=round(seconds, 3),
            records_per_second=round(counts.written / seconds, 1) if seconds else 0.0,
            tokens_per_second=round(counts.tokens / seconds, 1) if seconds else 0.0,
            model=run.model,
            dimensions=run.dimensions,
            precision=self.embedding.spec.precision if self.embedding.spec else None,
            document_prefix=self.options.document_prefix,
            fidelity=self.embedding.fidelity,
            fingerprint=run.fingerprint,
            workers=engine.pool.workers if engine else 0,
            hosts=engine.pool.hosts if engine else (),
            plan=plan.describe() if plan else "in this process",
            flushes=counts.flushes,
            flush_size=flush,
            bytes_written=counts.bytes_written,
            index=pipeline.index.text if pipeline else "",
            phases=Phases(
                prepare=round(self.embedding.seconds, 3),
                start=round(self.engines.seconds, 3),
                embed=round(counts.embed_seconds, 3),
                write=round(counts.write_seconds, 3),
                index=round(counts.index_seconds, 3),
            ),
            peak_rss_bytes=peak_rss_bytes() + sum(peaks.values()),
            peak_rss_by_process={"parent": peak_rss_bytes(), **peaks},
            warnings=(*self.notes, *(pipeline.warnings if pipeline else []), *self.source.warnings()),
            input_changed=self.source.changed(),
            version=__version__,
        )


def _as_ours(error: Exception) -> KdbFastError:
    return error if isinstance(error, KdbFastError) else UnexpectedError(error)
