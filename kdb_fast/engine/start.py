"""Which pool and which writer make an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ..db.address import DatabaseAddress
from ..embedding.encoder import EncoderSpec
from ..embedding.providers.base import EmbeddingProvider
from ..ipc.slab import Slab, SlabShape
from ..stores.base import RunSpec, Store
from .base import Engine
from .child_processes import Children
from .cluster.messages import ClusterSpec, Survey
from .inline import InlinePool, InlineWriter
from .process_pool import ProcessPool
from .writer_process import WriterProcess


def with_processes(
    shape: SlabShape, spec: EncoderSpec, address: DatabaseAddress, run: RunSpec, *, workers: int, cpus: list[int]
) -> Engine:
    """Workers and writer as processes of their own.

    Args:
        cpus: Those that may be used.

    Raises:
        ResourceError: No shared memory, or no process, is to be had.
    """
    with _parts(shape) as (slab, children):
        writer = WriterProcess(children, slab, address, run)
        pool = ProcessPool(children, slab, spec, workers=workers, cpus=cpus)
        return Engine(slab, pool, writer, children)


def with_provider(
    shape: SlabShape, provider: EmbeddingProvider, address: DatabaseAddress, run: RunSpec, *, threads: int
) -> Engine:
    """Requests to a provider from ``threads`` threads; the writer is a process as always.

    Raises:
        ResourceError: No shared memory, or no process, is to be had.
    """
    from .api_pool import ApiPool

    with _parts(shape) as (slab, children):
        writer = WriterProcess(children, slab, address, run)
        return Engine(slab, ApiPool(slab, provider, threads=threads), writer, children)


def with_cluster(
    cluster: ClusterSpec,
    spec: EncoderSpec,
    address: DatabaseAddress,
    run: RunSpec,
    *,
    shape: Callable[[Survey], SlabShape],
    on_hosts: Callable[[str], None],
    waiting: Callable[[], None],
) -> Engine:
    """The CPUs of a Ray cluster; the writer is a process here as always.

    Args:
        shape: Chooses the slots once it is known what the cluster has.
        on_hosts: Called with what takes part, in words, whenever that changes.
        waiting: Called every second until the cluster has said what it has; what it raises ends the wait.

    Raises:
        ClusterError: There is no such cluster, or no host of it can embed.
        ResourceError: No shared memory, or no process, is to be had.
        MissingPackageError: Ray is not installed.
    """
    from .ray_pool import RayPool

    children = Children()
    try:
        pool = RayPool(children, cluster, spec, on_hosts, waiting)
        with _parts(shape(pool.survey), children) as (slab, _):
            writer = WriterProcess(children, slab, address, run)
            pool.use(slab)
            return Engine(slab, pool, writer, children)
    except BaseException:
        children.close(kill=True)
        raise


def in_this_process(shape: SlabShape, spec: EncoderSpec, store: Store, run: RunSpec) -> Engine:
    """Everything in this process."""
    slab = Slab.local(shape)
    return Engine(slab, InlinePool(slab, spec), InlineWriter(slab, store, run))


@contextlib.contextmanager
def workers_alone(
    shape: SlabShape, spec: EncoderSpec, *, workers: int, cpus: list[int]
) -> Iterator[tuple[Slab, ProcessPool]]:
    """A pool of processes whose caller writes what is embedded itself; they end with the block.

    Raises:
        ResourceError: No shared memory, or no process, is to be had.
    """
    with _parts(shape) as (slab, children):
        pool = ProcessPool(children, slab, spec, workers=workers, cpus=cpus)
    try:
        yield slab, pool
    finally:
        children.close()
        slab.close()


@contextlib.contextmanager
def _parts(shape: SlabShape, children: Children | None = None) -> Iterator[tuple[Slab, Children]]:
    """What processes need; given back if something of the block cannot be started."""
    slab, children = Slab.create(shape), children or Children()
    try:
        yield slab, children
    except BaseException:
        children.close(kill=True)
        slab.close()
        raise
