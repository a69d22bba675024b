"""A Ray cluster: the only module of the run's machine that calls Ray.

Ray's calls may block while a host or the head is away. So all but the sending of a block are made by threads, each with
a deadline, and their results, like those of Ray's own callbacks, are events in one queue. A descriptor that can be
waited for says that there are some.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...embedding.encoder import EncoderSpec
from ...errors import ClusterError, KdbFastError, MissingPackageError
from ...ipc.messages import Embed
from . import model_files, survey
from .actor import Answer, EmbeddingActor, means, parts
from .base import (
    Actor,
    ActorFailed,
    ActorLost,
    ActorReady,
    Answered,
    ClusterEvent,
    HostFit,
    HostPrepared,
    HostUnfit,
    Node,
    NodesSeen,
)
from .messages import ClusterSpec
from .model_files import Files

POLL_SECONDS = 2.0
"""How often the cluster is asked which hosts it has: one that joins is to be used within ten seconds."""

REACH_SECONDS = 10.0
"""A head that does not take a connection by then is not there."""

CLIENT_SECONDS = 150.0
"""So long the head is asked again for a server of Ray's client, which is up in 3 s, or is given up by the head at once
or, as was seen, after 40 or 60 s."""

NO_SERVER = ("Starting Ray client server failed", "Proxy failed to Connect to backend")
"""In what the head says then."""

EXAMINE_SECONDS = 30.0
"""A host that has not said what it has by then is asked again later: Ray starts an interpreter there first."""

SEND_SECONDS = 600.0
"""The model's files have to be on a host by then: 2 GB at 4 MB/s."""

PARTS_SECONDS = 10.0
"""The parts of an answer are there when the answer is; through Ray's client they are one call away."""

HOST_THREADS = 16
"""Hosts that are examined, or sent files, at the same time."""

ACTOR_THREADS = 8
"""Actors that are started or killed at the same time: a few milliseconds each."""

SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_DEDUP_LOGS": "0"}
"""Set before Ray is imported. The first: nothing is reported to Ray's makers. The second: `uv run` has a hook that
sends the working directory to the cluster."""


def import_ray() -> Any:
    """The package, with SETTINGS.

    Raises:
        MissingPackageError: It is not installed.
    """
    os.environ.update(SETTINGS)
    os.environ.pop("RAY_RUNTIME_ENV_HOOK", None)
    try:
        import ray
    except ImportError:
        raise not_installed() from None
    return ray


def check_installed() -> None:
    """Raises MissingPackageError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise not_installed()


def not_installed() -> MissingPackageError:
    """The error that says so."""
    return MissingPackageError(
        "--cluster needs the Python package ray, which is not installed.", remedy="Run: pip install 'kdb-fast[ray]'"
    )


def connect(spec: ClusterSpec) -> Any:
    """Become a driver of the cluster; returns the package ray.

    Raises:
        ClusterError: There is no such cluster, or it does not answer.
        MissingPackageError: Ray is not installed.
    """
    address = _meant(spec.address)
    if address.startswith("ray://") and _has_token():
        # Ray's client does not see by itself that it has one.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray = import_ray()
    try:
        if address != "auto":
            _reach(address)
        _init_again_and_again(ray, spec)
    except Exception as error:
        # Ray has a class of its own for nearly each reason, and its messages have several lines.
        said = " ".join(str(error).split())[:300].rstrip(".")
        # So it says also of a cluster that asks for another token.
        token = " If it asks for a token, set RAY_AUTH_TOKEN." if "Failed to connect" in said else ""
        raise ClusterError(
            f"No Ray cluster answers at {address}: {said or type(error).__name__}.",
            remedy="Start one (ray start --head), or give its address: --cluster ray://HOST:10001, or HOST:6379 on a "
            f"machine of the cluster.{token} "
            "What was committed is safe.",
        ) from None
    return ray


def _init_again_and_again(ray: Any, spec: ClusterSpec) -> None:
    """The head forks a server for each client while gRPC's threads run, and now and then it dies of that, or hangs."""
    deadline = time.monotonic() + CLIENT_SECONDS
    while True:
        try:
            return _init(ray, spec)
        except ConnectionError as error:
            if not any(words in str(error) for words in NO_SERVER) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def _init(ray: Any, spec: ClusterSpec) -> None:
    # Ray tells all hosts the working directory, to import from it.
    with contextlib.chdir("/"):
        ray.init(
            spec.address,
            namespace=f"kdb-fast {spec.name} {os.urandom(4).hex()}",
            log_to_driver=False,
            configure_logging=False,
            runtime_env={},
        )


def _has_token() -> bool:
    """Whether there is a token for clusters that ask for one, where Ray looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


def _meant(address: str) -> str:
    """The address that Ray takes for ``auto``, where it has one; that of a cluster that has died, too."""
    if address != "auto":
        return address
    noted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return os.environ.get("RAY_ADDRESS") or noted.read_text().strip() or address
    return address


def _reach(address: str) -> None:
    """See that somebody takes connections there: Ray itself tries for a minute and more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except ValueError:
        raise ConnectionError("expected auto, ray://HOST:10001 or HOST:6379") from None


class RayCluster:
    """See :class:`~.base.Cluster`.

    Args:
        ray: The package, connected.
        spec: The encoder, as it is here.
        name: Of the run, for the names of the actors.

    Attributes:
        wake_end: Can be read when there are events.
    """

    def __init__(self, ray: Any, spec: EncoderSpec, name: str) -> None:
        self._ray, self._spec, self._name = ray, spec, name
        self.wake_end, self._waker_end = os.pipe()
        os.set_blocking(self._waker_end, False)
        os.set_blocking(self.wake_end, False)
        self._events: queue.SimpleQueue[Callable[[], ClusterEvent]] = queue.SimpleQueue()
        self._handles: dict[Actor, Any] = {}  # None until Ray has given one
        self._handles_lock = threading.Lock()
        self._objects: dict[Files, tuple[dict[str, list[Any]], int]] = {}
        self._sending = threading.Lock()
        self._packages = survey.PACKAGES + (("openvino",) if spec.on_openvino else ())
        self._here = survey.versions(self._packages)
        self._files = model_files.files_of(spec)
        # Apart, so that hosts that do not answer hold up no actor.
        self._host_threads = ThreadPoolExecutor(HOST_THREADS, "hosts")
        self._actor_threads = ThreadPoolExecutor(ACTOR_THREADS, "actors")
        self._actor_class = ray.remote(EmbeddingActor)
        ray.cloudpickle.register_pickle_by_value(survey)
        threading.Thread(target=self._watch, name="nodes", daemon=True).start()

    @property
    def connected(self) -> bool:
        """False once Ray's client has given up the head; its driver would have ended this process."""
        return bool(self._ray.is_initialized())

    def events(self) -> Iterator[ClusterEvent]:
        """What has happened since this was asked last."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wake_end, 4096):
                pass
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._events.get_nowait()()

    def _tell(self, event: ClusterEvent) -> None:
        self._tell_later(lambda: event)

    def _tell_later(self, event: Callable[[], ClusterEvent]) -> None:
        """The event is made by whoever takes it: Ray's own threads must not ask it for objects."""
        self._events.put(event)
        with contextlib.suppress(BlockingIOError):
            os.write(self._waker_end, b"\0")

    # -- hosts -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # the head may be away for a while
                nodes = self._ray.nodes()
                self._tell(NodesSeen(tuple(_node(values) for values in nodes if values["Alive"])))
            time.sleep(POLL_SECONDS)

    def examine(self, node: Node) -> None:
        self._in_thread(self._examine, node)

    def _examine(self, node: Node) -> None:
        there = self._on(node, survey.versions, EXAMINE_SECONDS, self._packages)
        if reason := survey.difference(self._here, there):
            self._tell(HostUnfit(node, reason))
            return
        found = self._on(node, means, EXAMINE_SECONDS, self._spec)
        self._tell(HostUnfit(node, found.unfit) if found.unfit else HostFit(node, found.memory))

    def prepare(self, node: Node) -> None:
        self._in_thread(self._prepare, node)

    def _prepare(self, node: Node) -> None:
        directories = []
        for files, path in self._files:
            directory = self._on(node, model_files.find, SEND_SECONDS, files)
            if directory is None:
                with self._objects_of(files, path) as contents:
                    directory = self._on(node, store_objects, SEND_SECONDS, files, contents)
            directories.append(directory)
        self._tell(HostPrepared(node, model_files.placed(self._spec, directories)))

    @contextlib.contextmanager
    def _objects_of(self, files: Files, path: Path) -> Iterator[dict[str, list[Any]]]:
        """The contents of files as objects, the same ones for all hosts that need them at the same time."""
        with self._sending:
            contents, users = self._objects.get(files, ({}, 0))
            if not users:
                for name, _ in files.sums:
                    contents[name] = [self._ray.put(part) for part in model_files.chunks(path, name)]
            self._objects[files] = contents, users + 1
        try:
            yield contents
        finally:
            with self._sending:
                contents, users = self._objects.pop(files)
                if users > 1:
                    self._objects[files] = contents, users - 1

    def _in_thread(self, function: Callable[[Node], None], node: Node) -> None:
        def guarded() -> None:
            try:
                function(node)
            except Exception as error:
                cause = getattr(error, "cause", None)
                known = cause if isinstance(cause, (KdbFastError, OSError)) else None
                *_, last = "", *str(error).splitlines()
                said = str(known) if known else f"{type(error).__name__} {last}"
                self._tell(HostUnfit(node, " ".join(said.split())[:300], again=known is None))

        self._host_threads.submit(guarded)

    def _on(self, node: Node, function: Callable[..., Any], seconds: float, *arguments: Any) -> Any:
        """Call a function on a host, beside the actors there."""
        task = self._ray.remote(function).options(
            num_cpus=0, max_retries=0, scheduling_strategy=self._only(node), name=f"kdb-fast {function.__name__}"
        )
        return self._ray.get(task.remote(*arguments), timeout=seconds)

    def _only(self, node: Node) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node.id, soft=False)

    # -- actors ----------------------------------------------------------------------------------------

    def start(self, actor: Actor, spec: EncoderSpec) -> None:
        self._handles[actor] = None
        self._actor_threads.submit(self._start, actor, spec)

    def _start(self, actor: Actor, spec: EncoderSpec) -> None:
        try:
            handle = self._actor_class.options(
                name=f"kdb-fast {self._name} {actor.node.name} #{actor.number}",
                num_cpus=1,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=self._only(actor.node),
            ).remote(spec)
            with self._handles_lock:
                wanted = actor in self._handles
                if wanted:
                    self._handles[actor] = handle
            if not wanted:  # killed meanwhile
                self._ray.kill(handle, no_restart=True)
                return
            handle.ready.remote().future().add_done_callback(lambda future: self._started(actor, future))
        except Exception as error:
            self._tell(self._loss(actor, error))

    def _started(self, actor: Actor, future: Any) -> None:
        try:
            failed = future.result()
        except Exception as error:
            self._tell(self._loss(actor, error))
        else:
            self._tell(ActorFailed(actor, failed) if failed else ActorReady(actor))

    def embed(self, actor: Actor, order: Embed, texts: list[str]) -> None:
        try:
            method = self._handles[actor].embed
            refs = method.options(num_returns=parts(len(texts), self._spec.model.dimensions)).remote(order, texts)
            # All parts come with the answer.
            refs[0].future().add_done_callback(
                lambda future: self._tell_later(lambda: self._answered(actor, future, refs[1:]))
            )
        except Exception as error:
            self._tell(self._loss(actor, error))

    def _answered(self, actor: Actor, future: Any, refs: list[Any]) -> ClusterEvent:
        try:
            answer: Answer = future.result()
            if answer.failed is not None:
                return ActorFailed(actor, answer.failed)
            assert answer.embedded is not None
            vectors = tuple(self._ray.get(refs, timeout=PARTS_SECONDS))
            return Answered(actor, answer.embedded, answer.codes, vectors)
        except Exception as error:
            return self._loss(actor, error)

    def _loss(self, actor: Actor, error: Exception) -> ActorLost:
        exceptions = self._ray.exceptions
        died = isinstance(error, exceptions.ActorDiedError)
        with_host = died and "its node has died" in str(error)
        how = "went with its host" if with_host else "died" if died else f"was lost ({type(error).__name__})"
        return ActorLost(actor, how, blameless=with_host or not died)

    def kill(self, actor: Actor) -> None:
        with self._handles_lock:
            handle = self._handles.pop(actor, None)
        if handle is not None:
            self._actor_threads.submit(lambda: self._ray.kill(handle, no_restart=True))


def store_objects(files: Files, contents: dict[str, list[Any]]) -> str:
    """ON A HOST: :func:`~.model_files.store` of objects of Ray's."""
    import ray

    def read(refs: list[Any]) -> Iterator[bytes]:
        while refs:
            yield ray.get(refs.pop(0), timeout=EXAMINE_SECONDS)

    return model_files.store(files, {name: read(refs) for name, refs in contents.items()})


def _node(values: dict[str, Any]) -> Node:
    name = f"{values['NodeManagerHostname']} ({values['NodeManagerAddress']})"
    return Node(values["NodeID"], name, int(values["Resources"].get("CPU", 0)))
