"""PARENT: how a child process is started, and what is said of one that ended.

Always by spawn: a fork would take ONNX Runtime's sessions and database connections along.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from ..errors import ResourceError
from ..telemetry import VARIABLES
from .child import start

WORKER_ENVIRONMENT = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV",
                      "LD_LIBRARY_PATH", "LD_PRELOAD", "SYSTEMROOT", "KDB_FAST_HOME", "KDB_FAST_FAULT",
                      "KDB_FAST_FAULT_DIR", "COVERAGE_PROCESS_START", *VARIABLES)  # fmt: skip
"""What a worker sees of the environment, beside PYTHON… and LC_…: no credential of any kind."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Threads of NumPy's products; ONNX Runtime and OpenVINO are told theirs."""


def spawn(
    name: str,
    target: Callable[..., None],
    arguments: Callable[[], tuple[Any, ...]],
    *,
    credentials: bool,
    threads: int = 1,
    variables: tuple[str, ...] = (),
) -> tuple[Any, Connection, int]:
    """Start a process.

    Args:
        name: For messages and process lists.
        target: Called in the child with its end of a pipe, ``arguments()``, and a holder of its stderr (DupFd).
        arguments: Makes the arguments; called while the process is being spawned, as shared memory needs it.
        credentials: Whether the child sees this process's whole environment.
        threads: Threads that NumPy may use in a child without credentials.
        variables: What such a child sees of the environment beside WORKER_ENVIRONMENT.

    Returns:
        The process, our end of the pipe, and the descriptor of the file that takes its stderr; both are to be closed.

    Raises:
        ResourceError: The system refuses another process.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    stderr = _anonymous_file(name)
    process = context.Process(
        target=start,
        args=(_Packed(lambda: (target, theirs, *arguments(), reduction.DupFd(stderr))),),
        name=f"kdb-fast-{name}",
        daemon=True,
    )
    try:
        with _spawning(credentials, threads, variables):
            process.start()
    except OSError as error:
        ours.close()
        os.close(stderr)
        raise ResourceError(
            f"The process {name} could not be started: {error.strerror or error}.",
            remedy="Raise the limit of processes or open files (ulimit -u, ulimit -n), or use fewer --workers.",
        ) from None
    finally:
        # Our copy of the child's end must go: while it is open the child's death is no end of file.
        theirs.close()
    return process, ours, stderr


class _Packed:
    """A value that is made while the process is being spawned: only then does DupFd know where to pass a
    descriptor to. It arrives there as bytes, to be unpickled when the child is ready for it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __reduce__(self) -> Any:
        return bytes, (bytes(reduction.ForkingPickler.dumps(self._make())),)


@contextlib.contextmanager
def _spawning(credentials: bool, threads: int, variables: tuple[str, ...]) -> Iterator[None]:
    """The environment in which a child is started.

    * SIGINT and SIGHUP are blocked, and the child inherits that: a Ctrl-C while it imports prints no trace.
    * Workers get a short list of environment variables, none of which can hold a database credential.
    * ``__main__`` is hidden: our entry points need nothing from it, and importing a caller's script
      again in each child would run it again.
    """
    saved_environment = dict(os.environ)
    saved_main = sys.modules["__main__"]
    blocked = {signal.SIGINT, signal.SIGHUP} if hasattr(signal, "SIGHUP") else {signal.SIGINT}
    # The first start of a process would start this one too, which unblocks SIGINT when it is done.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        if not credentials:
            for name in saved_environment:
                if name not in (*WORKER_ENVIRONMENT, *variables) and not name.startswith(("PYTHON", "LC_")):
                    del os.environ[name]
            os.environ.update(dict.fromkeys(THREADS, str(threads)), TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
        sys.modules["__main__"] = types.ModuleType("__main__")
        yield
    finally:
        sys.modules["__main__"] = saved_main
        os.environ.clear()
        os.environ.update(saved_environment)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _anonymous_file(name: str) -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"kdb-fast-{name}-stderr", os.MFD_CLOEXEC)
    import tempfile

    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return fd


def tail(fd: int, limit: int = 2000) -> str:
    """The last of what a child wrote to stderr, for an error message."""
    size = os.fstat(fd).st_size
    raw = os.pread(fd, limit, max(0, size - limit)).decode("utf-8", "replace").strip()
    return f" It last wrote: {raw}" if raw else ""


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = " (shared memory ran out)" if name == "SIGBUS" else ""
            return f"died of {name}{hint}"
    return f"ended with exit code {code}"
