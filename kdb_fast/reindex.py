"""One run, from options to receipt: the main job, in reading order."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__
from .database import DatabaseAddress
from .encoder import EncoderSpec
from .engine import Engine, InlineEngine
from .errors import KdbFastError, ModelError, StoppedError, UnexpectedError
from .models import resolve
from .origins import same_name
from .pipeline import Pipeline, Stop
from .plan import INLINE_ROWS, Plan, inline_shape, make_plan
from .progress import Progress, Silent
from .provider_base import EmbeddingProvider
from .query import forget_older, forget_older_of_input, index_model_of, recent_fingerprints
from .receipt import Counts, Fidelity, Phases, Receipt
from .resources import collecting_rarely, peak_rss_bytes
from .settings import DEFAULT_MODEL, ReindexOptions
from .slab import ROW_REASONS, ROW_WORKER_DIED
from .sources.base import Source
from .stores import open_store
from .stores.base import RunSpec, Store
from .stores.runs import HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from .precision import Choice

SAME_SIGNAL_SECONDS = 0.5
"""A signal that comes again so soon is the same one, delivered to the process and to its group."""

GRACE_SECONDS = 8.0
"""A run that has not ended so long after a signal is stopped at once: a container is killed after ten seconds.
What has been embedded is written in less, unless the database makes us wait; see ``pipeline.DRAIN_SECONDS``."""

INSIST_SECONDS = 1.0
"""From then on every wait that is left, in the clearing up too, ends after so long."""


def reindex(
    address: DatabaseAddress,
    open_source: Callable[[], Source],
    options: ReindexOptions,
    progress: Progress | None = None,
    embedding: Embedding | None = None,
) -> Receipt:
    """Embed every record of a source that is new or has changed, and store it.

    Args:
        address: The database of the index; an embedded server must be running.
        open_source: Opens the records to read; called once the database and model were found fit.
        options: What was asked for.
        progress: Shows a person what happens meanwhile.
        embedding: What gives the vectors, in place of what the options name; it stays the caller's to close.

    Returns:
        What the run has done.

    Raises:
        KdbFastError: One of its subclasses; ``receipt`` is set on it when the run had begun.
    """
    progress = progress or Silent()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stopping_by_signal())
        progress.step("opening the database")
        store = open_store(address, "parent")
        stack.callback(store.close)
        # Every other connection of the run means the same tables, whatever its search path.
        address = replace(address, schema=store.target.schema)

        def wait_note(text: str) -> None:
            if stop.count:
                raise StoppedError("Stopped on request, before anything was done.", signum=stop.signum)
            progress.note(text)

        store.on_wait = wait_note
        source = open_source()
        stack.callback(source.close)
        progress.step("loading the model")
        began = time.monotonic()
        if embedding is None:
            embedding = find_embedding(options, progress, _Records(address, source, lambda: stop.count > 0))
            stack.callback(embedding.close)
        embedding = replace(embedding, seconds=time.monotonic() - began)
        notes = store.prepare(embedding.dimensions)
        run = store.begin_run(
            fingerprint=embedding.fingerprint,
            model=embedding.name,
            dimensions=embedding.dimensions,
            wait=options.wait,
        )
        store.on_wait = progress.note
        return _Run(address, store, source, embedding, run, options, progress, stop, started, notes).go()


@dataclass(frozen=True)
class Embedding:
    """What gives the vectors of a run: a model on this machine (``spec``) or a provider's API (``provider``).

    ``read_chars`` are the characters of a text that count for the size of its shard.
    """

    name: str
    dimensions: int
    fingerprint: str
    read_chars: int
    spec: EncoderSpec | None = None
    provider: EmbeddingProvider | None = None
    fidelity: Fidelity | None = None
    why: str = ""
    """Why this precision, for the plan; '' for what was asked for without a comparison."""
    seconds: float = 0.0
    """What it took to find it: a download, or the preparation of a precision."""

    @classmethod
    def of_model(cls, spec: EncoderSpec) -> Embedding:
        """A model on this machine, in fp32."""
        return cls(spec.model.name, spec.model.dimensions, spec.model.fingerprint(), spec.read_chars, spec)

    @classmethod
    def of_provider(cls, provider: EmbeddingProvider) -> Embedding:
        """A provider that is called from this process."""
        fingerprint, name, dimensions = provider.maker()
        return cls(name, dimensions, fingerprint, provider.read_chars, provider=provider)

    def close(self) -> None:
        """Close the provider's connections."""
        if self.provider is not None:
            self.provider.close()


class _Records(NamedTuple):
    """What a precision is chosen for."""

    address: DatabaseAddress
    source: Source
    should_stop: Callable[[], bool]


def find_embedding(options: ReindexOptions, progress: Progress, records: _Records | None = None) -> Embedding:
    """The model or provider that the options name.

    Args:
        options: What was asked for.
        progress: Told of steps that take time.
        records: What a lower precision is calibrated on and compared with fp32 on; needed for one.

    Raises:
        ModelError: The model is not to be had, or unfit.
        UsageError: The provider lacks a key or a package.
    """
    if options.provider == "fastembed":
        model = resolve(options.model, options.model_path, report=progress.note)
        spec = EncoderSpec(model, options.batch_size)
        exact = Embedding.of_model(spec)
        if options.precision == "fp32":
            return exact
        assert records is not None
        choice = _choose_precision(options, spec, progress, records)
        return replace(
            exact, fingerprint=choice.fingerprint, spec=choice.spec, fidelity=choice.fidelity, why=choice.why
        )
    provider = _open_provider(options, records.address if records else None)
    try:
        return Embedding.of_provider(provider)
    except BaseException:
        provider.close()
        raise


def _open_provider(options: ReindexOptions, address: DatabaseAddress | None) -> EmbeddingProvider:
    """The API's provider, for vectors of the length that was asked for, that the index has or that the model gives."""
    from .errors import ProviderKeyError
    from .openai_provider import OPENAI_MODEL, OpenAIProvider

    name = options.model if options.model != DEFAULT_MODEL else OPENAI_MODEL
    is_new, made = index_model_of(address) if address else (False, None)
    length: dict[str, Any] = {}
    if options.dimensions is not None:
        length = {"dimensions": options.dimensions}
    elif made and made.dimensions and made.name and same_name(made.name, name):
        length = {"dimensions": made.dimensions}
    threads = options.workers or OpenAIProvider.concurrent_calls
    provider = OpenAIProvider(
        model=name, base_url=options.base_url, max_inputs=options.batch_size, concurrency=threads, **length
    )
    if is_new and not length and provider.is_elsewhere:
        try:
            provider.settle()
        except (ProviderKeyError, ModelError):
            pass  # the run says so, and keeps it
        except BaseException:
            provider.close()
            raise
    return provider


def _choose_precision(options: ReindexOptions, spec: EncoderSpec, progress: Progress, records: _Records) -> Choice:
    from .precision import PrecisionSelector

    progress.step("choosing the precision")
    selector = PrecisionSelector(
        spec,
        index=" ".join(filter(None, (records.address.display, records.address.schema))),
        history=recent_fingerprints(records.address),
        sample=records.source.sample,
        report=progress.note,
        should_stop=records.should_stop,
    )
    return selector.choose(options.precision, options.min_fidelity)


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
        notes: tuple[str, ...] = (),
    ) -> None:
        self.address, self.store, self.source, self.embedding, self.run = address, store, source, embedding, run
        self.options, self.progress, self.stop, self.started = options, progress, stop, started
        self.notes = notes
        self.plan: Plan | None = None
        self.engine: Engine | None = None
        self.start_seconds = 0.0
        self.phase = "start"
        self.pipeline: Pipeline | None = None

    def go(self) -> Receipt:
        state = "failed"
        error: KdbFastError | None = None
        try:
            with self._beating(), collecting_rarely():
                self._work()
            state = "done"
        except Stop:
            state = "stopped"
            error = StoppedError("Stopped on request.", signum=self.stop.signum or signal.SIGINT)
        except Exception as caught:
            error = _as_ours(caught)
        except BaseException as caught:
            # Nothing is said but what stopped it; the receipt is for whoever turns that into an error.
            self._close_engine(kill=True)
            self.stop.receipt = self._receipt("stopped" if isinstance(caught, KeyboardInterrupt) else "failed")
            with contextlib.suppress(Exception):
                self.store.end_run(self.run.number, self.stop.receipt.state, self.stop.receipt.as_json())
            raise
        # After a stop all that was embedded is written; a worker in the middle of a shard is not waited for.
        self._close_engine(kill=state != "done")
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

    def _work(self) -> None:
        options, source = self.options, self.source
        estimate = source.estimate()
        if options.limit is not None:
            estimate = min(options.limit, estimate) if estimate is not None else options.limit
        self.progress.begin(estimate)
        self.pipeline = Pipeline(
            store=self.store,
            start_engine=self._start_engine,
            fingerprint=self.run.fingerprint,
            dimensions=self.embedding.dimensions,
            read_chars=self.embedding.read_chars,
            max_rejects=options.max_rejects,
            force=options.force,
            unique_keys=source.unique_keys,
            encoding=self.store.encoding,
            missing_characters=None if self.store.encoding == "UTF8" else self.store.missing_characters,
            estimate=estimate,
            on_progress=self.progress.update,
            on_note=self.progress.note,
            should_stop=lambda: self.stop.count > 0,
            heartbeat=self._beat,
        )
        self.pipeline.run(source.pages(), source.take_empty)
        self.pipeline.counts.empty = source.empty
        self.progress.step("finishing the index")
        self.pipeline.finish(source.entities if source.complete else ())
        if self.pipeline.counts.stored or self.pipeline.counts.reused:
            for warning in self.store.altered(self.run.number):
                self.pipeline.warnings.append(warning)
                self.progress.note(warning)
        if source.complete:
            # What this run has read and not rejected is no longer rejected: changed, gone, or without text.
            whole = [entity for entity in source.entities if entity not in self.pipeline.not_pruned]
            forget_older(self.address, whole, self.run.number)
        elif source.input and options.limit is None:
            forget_older_of_input(self.address, source.entities[0], source.input, self.run.number)

    def _start_engine(self, rows: int, more: bool) -> Engine:
        began = time.monotonic()
        options, embedding = self.options, self.embedding
        if embedding.provider is not None:
            from .provider_engine import ProviderEngine

            threads = options.workers or embedding.provider.concurrent_calls
            # A slot is a request.
            self.plan = make_plan(
                workers=threads, dimensions=embedding.dimensions, model_bytes=0, shard_rows=options.batch_size
            )
            self.progress.plan(f"{threads} requests in flight; {self.plan.shape.slots} slots")
            self.engine = ProviderEngine(self.plan.shape, embedding.provider, self.address, self.run, threads=threads)
            self.start_seconds = time.monotonic() - began
            return self.engine
        spec = embedding.spec
        assert spec is not None
        plan = make_plan(
            workers=options.workers,
            dimensions=embedding.dimensions,
            model_bytes=spec.model.memory_bytes,
            token_budget=spec.token_budget,
        )
        small = rows <= INLINE_ROWS and options.workers is None
        if not more and (not rows or (small and not self._may_be_deadly())):
            self.engine = InlineEngine(inline_shape(embedding.dimensions), spec, self.store, self.run)
        else:
            from .supervisor import ProcessEngine

            if embedding.why:
                plan = plan.because(embedding.why)
            self.plan = plan
            self.progress.plan(plan.describe())
            self.engine = ProcessEngine(plan.shape, spec, self.address, self.run, workers=plan.workers, cpus=plan.cpus)
        self.start_seconds = time.monotonic() - began
        return self.engine

    def _may_be_deadly(self) -> bool:
        """Whether a text has ended its process in an earlier run, or may have: it must not end this one."""
        if self.store.after_a_crash(self.run.number):
            return True
        reason, _ = ROW_REASONS[ROW_WORKER_DIED]
        return any(reject["reason"] == reason for reject in self.store.rejects())

    def _beat(self, phase: str) -> None:
        self.phase = phase

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """Renew the lease of the run from a thread with a connection of its own: this one may wait for long, for
        standard input or for an index."""
        ended = threading.Event()

        def beat() -> None:
            store: Store | None = None
            while not ended.wait(HEARTBEAT_SECONDS):
                try:
                    store = store or open_store(self.address, "heartbeat")
                    store.heartbeat(self.run.number, self.phase)
                except Exception:  # whatever is wrong with the database, the writer will say
                    store = None
            if store is not None:
                store.close()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(5)

    def _close_engine(self, *, kill: bool) -> None:
        if self.engine is not None:
            self.engine.close(kill=kill)

    def _receipt(self, state: str) -> Receipt:
        pipeline, run = self.pipeline, self.run
        counts = pipeline.counts if pipeline else Counts()
        seconds = time.monotonic() - self.started
        peaks = self.engine.peak_rss_bytes() if self.engine else {}
        flush = pipeline.flush_size.describe() if pipeline and pipeline.flush_size else "nothing to flush"
        return Receipt(
            run=run.number,
            schema=self.address.schema,
            state=state,
            input=self.source.input,
            read=counts.read,
            stored=counts.stored,
            unchanged=counts.unchanged,
            reused=counts.reused,
            superseded=counts.superseded,
            rejected=counts.rejected,
            empty=self.source.empty,
            deleted=counts.deleted,
            truncated=counts.truncated,
            tokens=counts.tokens,
            padded_tokens=counts.padded_tokens,
            seconds=round(seconds, 3),
            records_per_second=round(counts.written / seconds, 1) if seconds else 0.0,
            tokens_per_second=round(counts.tokens / seconds, 1) if seconds else 0.0,
            model=run.model,
            dimensions=run.dimensions,
            precision=self.embedding.spec.precision if self.embedding.spec else None,
            fidelity=self.embedding.fidelity,
            fingerprint=run.fingerprint,
            workers=self.engine.workers if self.engine else 0,
            plan=self.plan.describe() if self.plan else "in this process",
            flushes=counts.flushes,
            flush_size=flush,
            bytes_written=counts.bytes_written,
            index=pipeline.index.text if pipeline else "",
            phases=Phases(
                prepare=round(self.embedding.seconds, 3),
                start=round(self.start_seconds, 3),
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


class StopFlag:
    """How often a stop was asked for, and by which signal; the receipt of a run that was ended at once."""

    def __init__(self) -> None:
        self.count = 0
        self.signum = 0
        self.receipt: Receipt | None = None


@contextlib.contextmanager
def stopping_by_signal() -> Iterator[StopFlag]:
    """Turn SIGINT, SIGTERM and SIGHUP into a flag; the second one, or GRACE_SECONDS, ends the block at once.

    Outside the main thread (a library caller) signals are left alone.

    Raises:
        StoppedError: The block was ended at once.
    """
    flag = StopFlag()

    last = 0.0

    def handler(signum: int, frame: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if flag.count and now - last < SAME_SIGNAL_SECONDS:
            return
        last = now
        flag.count += 1
        if flag.count == 1:
            flag.signum = signum
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS, INSIST_SECONDS)
        else:
            signal.setitimer(signal.ITIMER_REAL, INSIST_SECONDS, INSIST_SECONDS)
            raise KeyboardInterrupt

    def insist(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous: dict[int, Any] = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name)
            # Under nohup it is ignored, and must be.
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
        previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, insist)
    except ValueError:
        previous = {}
    try:
        yield flag
    except KeyboardInterrupt:
        stopped = StoppedError(
            "Stopped at once; the transaction in progress was rolled back.", signum=flag.signum or signal.SIGINT
        )
        stopped.receipt = flag.receipt
        raise stopped from None
    finally:
        if previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in previous.items():
            signal.signal(number, old)
