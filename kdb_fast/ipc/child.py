"""What both kinds of child process do first: die with the parent, ignore Ctrl-C, keep stderr out of the way.

Nothing heavy is imported here: from its first moments a child must notice that its parent is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ..resources import collect_rarely
from .repeating import repeating

ORPHANED = 3
"""Exit code of a child whose parent died."""


def start(packed: bytes) -> None:
    """Entry point of every child.

    Args:
        packed: A pickled tuple of a function and its arguments. To unpickle it is to import what it needs, which takes
            half a second and more; meanwhile a thread waits for the parent's end already, and then ends this process,
            whatever it is doing.
    """
    _die_with_parent()
    threading.Thread(target=_watch_parent, name="watch-parent", daemon=True).start()
    collect_rarely()
    target, *arguments = pickle.loads(packed)  # noqa: S301 - from our parent
    target(*arguments)


def saying(seconds: float, say: Callable[[], None], *, at_most: float = math.inf) -> AbstractContextManager[object]:
    """Have the parent told, every so many seconds while the block runs, that this process is alive.

    Args:
        say: Does so; called in a thread.
        at_most: Seconds after which nothing more is said: the block hangs.
    """
    end = time.monotonic() + at_most

    def beat() -> None:
        if time.monotonic() < end:
            with contextlib.suppress(OSError):  # the parent has ended
                say()

    return repeating(beat, seconds, "beat")


def enter_child(stderr: Any) -> None:
    """Set this process up as a child of a kdb-fast parent.

    * Ctrl-C reaches the whole foreground group, and a service manager's SIGTERM the whole control group; only
      the parent acts on them, and it ends its children by other means.
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


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends: a stopped process cannot watch for that. Linux only, and
    tied to the thread that started us; the thread that watches does the rest."""
    if sys.platform != "linux":
        return
    import ctypes

    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(ORPHANED)
