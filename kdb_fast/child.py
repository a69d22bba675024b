"""What both kinds of child process do first: ignore Ctrl-C, die with the parent, keep stderr out of the way."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

ORPHANED = 3
"""Exit code of a child whose parent died."""


def start(target: Callable[..., None], connection: Any, arguments: tuple[Any, ...], stderr: Any) -> None:
    """Entry point of every child: call ``target(connection, *arguments, stderr)``."""
    target(connection, *arguments, stderr)


def enter_child(stderr: Any) -> None:
    """Set this process up as a child of a kdb-fast parent.

    * Ctrl-C reaches the whole foreground group, and a service manager's SIGTERM the whole control group; only
      the parent acts on them, and it ends its children by other means.
    * A thread waits for the parent's end and then ends this process, whatever it is doing.
    * stderr goes to an anonymous file the parent shows if this process dies; faulthandler writes there too.
    * No core dump: it would hold record texts and credentials.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if stderr is not None:
        fd = stderr.detach()
        os.dup2(fd, 2)
        os.close(fd)
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2, all_threads=True)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_watch_parent, name="watch-parent", daemon=True).start()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(ORPHANED)
