"""One parent and one writer before a cluster that timers stand for, what Ray costs the process that drives it, and a
real cluster of two hosts on this machine."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import wait
from typing import Any
from unittest.mock import patch

import psutil

from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.embedding.models.lookup import resolve
from kdb_fast.engine import start
from kdb_fast.engine.base import Engine, Event
from kdb_fast.engine.cluster import driver, ray_cluster
from kdb_fast.engine.cluster.actor import INLINED_BYTES, Answer
from kdb_fast.engine.cluster.base import Actor, ActorReady, Answered, ClusterEvent, NodesSeen
from kdb_fast.engine.process_pool import ProcessPool
from kdb_fast.engine.ray_pool import RayPool
from kdb_fast.errors import MissingPackageError
from kdb_fast.indexing.pipeline import Pipeline
from kdb_fast.indexing.reindex import reindex
from kdb_fast.ipc.messages import Embed, Embedded, Flushed
from kdb_fast.records import Record, Reject
from kdb_fast.settings import DEFAULT_BATCH_SIZE, DEFAULT_MODEL, ReindexOptions
from kdb_fast.sources.base import PAGE_ROWS

from .. import data, database, free_encoder, timer_cluster
from ..contender import Skip
from ..measure import Sampler
from ..source import ENTITY, ListSource
from ..timer_cluster import Timers

HOSTS = 2
"""Of the real cluster, with one CPU each."""

TEXT_CHARS = 200
"""Of a text that Ray's cost is measured with."""

LIST_EVERY = 50
"""COMMITs between two looks at which processes the server has."""


class RepeatedSource(ListSource):
    """So many records, of fewer texts, each made distinct by its number: equal ones would be embedded only once."""

    def __init__(self, texts: list[str], records: int) -> None:
        super().__init__(texts)
        self._records = records

    def estimate(self) -> int:
        return self._records

    def pages(self) -> Iterator[list[Record | Reject]]:
        texts = self._texts
        for first in range(0, self._records, PAGE_ROWS):
            numbers = range(first, min(first + PAGE_ROWS, self._records))
            yield [Record((ENTITY, str(i)), f"{texts[i % len(texts)]} | number: {i}") for i in numbers]


def simulated(params: dict[str, Any]) -> dict[str, Any]:
    """``records`` rows through the real parent, writer and database.

    With ``cpus``, timers embed them (:class:`bench.timer_cluster.Timers`, by its names); without, the free encoder of
    part ``engine`` does. Reported is what was so between two COMMITs, of the first ``settled`` rows and of all but the
    last ``held``, so that neither start nor end counts.
    """
    texts = list(data.read(params["data"]))
    records = params["records"]
    source = RepeatedSource(texts, records)
    marks = _Marks(params["conninfo"])
    options = ReindexOptions()
    with ExitStack() as stack:
        stack.enter_context(patch.object(start, "Engine", marks.engine_class()))
        stack.enter_context(patch.object(Pipeline, "finish", lambda *_, **__: None))
        if cpus := params.get("cpus"):
            timers = Timers(cpus, params["row_seconds"], params["distance"], params["block_seconds"])
            stack.enter_context(patch.object(driver, "run", partial(timer_cluster.run, timers)))
            options = ReindexOptions(cluster="timers:1", workers=cpus)
        else:
            pool = partial(ProcessPool, worker_target=free_encoder.run)
            stack.enter_context(patch.object(start, "ProcessPool", pool))
        sampler = Sampler(lambda: {"parent": os.getpid(), **marks.pids()})
        stack.enter_context(sampler.running())
        started = time.perf_counter()
        reindex(database.address_of(params["conninfo"]), source, options)
        seconds = time.perf_counter() - started
    database.verify(params["conninfo"], records, indexed=False)
    return {
        "seconds": seconds,
        "records": records,
        "slots": marks.engine.slab.shape.slots,
        "slab_bytes": marks.engine.slab.shape.slots * marks.engine.slab.shape.first_bytes,
        "pss_by_process": sampler.peaks,
        **marks.between(params["settled"], records - params["held"]),
    }


class _Marks:
    """Rows committed and processor seconds of each process, noted at COMMITs."""

    def __init__(self, conninfo: str, *, whole_tree: bool = False) -> None:
        self._whole_tree = whole_tree
        self.engine: Any = None
        self._server: dict[int, psutil.Process] = {}
        self._children: dict[str, psutil.Process] = {}
        self._postmaster = psutil.Process(_postmaster(conninfo))
        self._rows = 0
        self._noted: list[tuple[float, int, dict[str, float]]] = []
        self._ready_at: float | None = None

    def engine_class(self) -> type[Engine]:
        """An engine that notes what it does here."""
        marks = self

        class MarkedEngine(Engine):
            def __init__(self, *parts: Any) -> None:
                super().__init__(*parts)
                marks.engine = self

            def poll(self, timeout: float) -> list[Event]:
                events = super().poll(timeout)
                if marks._ready_at is None and _has_worker(self.pool):
                    marks._ready_at = time.monotonic()
                for event in events:
                    if isinstance(event, Flushed):
                        marks.note(event.rows)
                return events

        return MarkedEngine

    @property
    def seconds_after_start(self) -> float:
        """From the first worker that was ready to the last COMMIT."""
        assert self._ready_at is not None
        return self._noted[-1][0] - self._ready_at

    @property
    def last(self) -> dict[str, float]:
        """Processor seconds of each process at the last COMMIT."""
        return self._noted[-1][2]

    def pids(self) -> dict[str, int]:
        """Of the engine's processes, by name."""
        return self.engine.pids() if self.engine is not None else {}

    def note(self, rows: int) -> None:
        self._rows += rows
        seconds = {"parent": time.process_time(), "server": self.server_seconds()}
        if self._whole_tree:
            seconds |= _used()
        seconds["idle"] = psutil.cpu_times().idle
        for name, pid in self.pids().items():
            seconds[name] = _own_seconds(self._process(name, pid))
        self._noted.append((time.monotonic(), self._rows, seconds))

    def _process(self, name: str, pid: int) -> psutil.Process:
        if name not in self._children:
            self._children[name] = psutil.Process(pid)
        return self._children[name]

    def server_seconds(self) -> float:
        """Of its processes, and of those that have ended. To list them takes milliseconds: now and then."""
        if len(self._noted) % LIST_EVERY == 0:
            self._server = {p.pid: p for p in self._postmaster.children()}
        times = self._postmaster.cpu_times()
        used = times.user + times.system + times.children_user + times.children_system
        for process in self._server.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                used += _own_seconds(process)
        return float(used)

    def between(self, first: int, last: int) -> dict[str, Any]:
        """Rows a second and cores used from the first COMMIT of ``first`` rows to the last of fewer than ``last``."""
        inside = [mark for mark in self._noted if first <= mark[1] <= last]
        if len(inside) < 2:
            inside = self._noted[:1] + self._noted[-1:]
        (began, rows, used), (ended, more_rows, more_used) = inside[0], inside[-1]
        elapsed = max(ended - began, 1e-9)
        return {
            "measured_seconds": ended - began,
            "rows_per_second": (more_rows - rows) / elapsed,
            "cores": {name: (more_used[name] - used.get(name, 0.0)) / elapsed for name in more_used},
        }


def _has_worker(pool: Any) -> bool:
    """Whether a worker is ready."""
    if isinstance(pool, RayPool):
        return any(share.cpus for share in pool.hosts)
    return isinstance(pool, ProcessPool) and any(worker.ready for worker in pool._workers)


def _own_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _postmaster(conninfo: str) -> int:
    with database.connect(conninfo) as connection:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        return int(psutil.Process(row[0]).ppid())


def ray_cost(params: dict[str, Any]) -> dict[str, Any]:
    """What a block costs the process that drives Ray, with actors that compute nothing.

    Args:
        params: ``blocks``; ``block_rows``; ``actors``; ``depth``: blocks that each has in flight.
    """
    ray, spec = _ray(), EncoderSpec(resolve(DEFAULT_MODEL), DEFAULT_BATCH_SIZE)
    rows, dimensions = params["block_rows"], spec.model.dimensions

    class IdleActor:
        """Travels by value."""

        def __init__(self, spec: EncoderSpec) -> None:
            pass

        def ready(self) -> None:
            return None

        def embed(self, order: Embed, texts: list[str]) -> tuple[Answer | bytes, ...]:
            done = Embedded(order.slot, order.lease, order.start, order.stop, 0, 0, 0, 0.0, 0)
            size = 4 * len(texts) * dimensions
            sizes = [min(INLINED_BYTES, size - at) for at in range(0, size, INLINED_BYTES)]
            return (Answer(done, bytes(len(texts))), *(bytes(part) for part in sizes))

    ray.init("local", num_cpus=params["actors"], include_dashboard=False, log_to_driver=False, configure_logging=False)
    with patch.object(ray_cluster, "EmbeddingActor", IdleActor):
        cluster = ray_cluster.RayCluster(ray, spec, "bench")

    def events() -> Iterator[ClusterEvent]:
        while True:
            wait([cluster.wake_end], 1.0)
            yield from cluster.events()

    happening = events()
    node = next(event for event in happening if isinstance(event, NodesSeen)).nodes[0]
    actors = [Actor(node, number, 0.0) for number in range(params["actors"])]
    for actor in actors:
        cluster.start(actor, spec)
    for _ in actors:
        next(event for event in happening if isinstance(event, ActorReady))
    order, texts = Embed(0, 0, 0, rows), ["x" * TEXT_CHARS] * rows

    def through(blocks: int) -> None:
        given = done = 0
        for actor in actors * params["depth"]:
            cluster.embed(actor, order, texts)
            given += 1
        for event in happening:
            if not isinstance(event, Answered):
                continue
            done += 1
            if given < blocks:
                cluster.embed(event.actor, order, texts)
                given += 1
            elif done == given:
                return

    through(50)
    before, began = _used(), time.perf_counter()
    through(params["blocks"])
    seconds, after = time.perf_counter() - began, _used()
    ray.shutdown()
    return {
        "seconds": seconds,
        "records": params["blocks"] * rows,
        "blocks": params["blocks"],
        "block_seconds": {name: (after[name] - before.get(name, 0.0)) / params["blocks"] for name in after},
    }


def hosts(params: dict[str, Any]) -> dict[str, Any]:
    """``records`` rows by the real encoder on two CPUs: of two hosts of a cluster (``cluster``), or as processes.

    Both hosts are raylets on this machine with one CPU each; to start them is not timed.
    """
    texts = list(data.read(params["data"], params["records"]))
    marks = _Marks(params["conninfo"], whole_tree=True)
    with ExitStack() as stack:
        options = ReindexOptions(workers=HOSTS)
        if params.get("cluster"):
            options = ReindexOptions(cluster=stack.enter_context(_two_hosts()))
        stack.enter_context(patch.object(start, "Engine", marks.engine_class()))
        stack.enter_context(patch.object(Pipeline, "finish", lambda *_, **__: None))
        before, started = {**_used(), "server": marks.server_seconds()}, time.perf_counter()
        reindex(database.address_of(params["conninfo"]), ListSource(texts), options)
        seconds = time.perf_counter() - started
    database.verify(params["conninfo"], params["records"], indexed=False)
    return {
        "seconds": seconds,
        "records": params["records"],
        "seconds_after_start": marks.seconds_after_start,
        "used_seconds": {name: max(0.0, used - before.get(name, 0.0)) for name, used in marks.last.items()},
    }


def _ray() -> Any:
    try:
        return ray_cluster.import_ray()
    except MissingPackageError as error:
        raise Skip(f"{error.message} {error.remedy}") from None


@contextlib.contextmanager
def _two_hosts() -> Iterator[str]:
    """A Ray cluster of two raylets with one CPU each; its address."""
    _ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(HOSTS - 1):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def _used() -> dict[str, float]:
    """Processor seconds of this process and all that it started and are there, by name."""
    used = {"this process": time.process_time()}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = process.name()
            if name.startswith("ray::"):
                name = "actors" if name[5:].startswith(("Embedding", "IdleActor")) else "Ray's agents"
            elif any(
                "/ray/" in word and word.endswith(".py") for word in process.cmdline()[1:3]
            ):  # after Python's options
                name = "Ray's agents"
            used[name] = used.get(name, 0.0) + _own_seconds(process)
    return used
