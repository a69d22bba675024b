"""Where files are on this machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .errors import RefusedError


def default_data_dir() -> Path:
    """The user's data directory of kdb-fast: ``KDB_FAST_HOME``, else ``$XDG_DATA_HOME/kdb-fast``.

    Raises:
        RefusedError: Neither these variables nor the system say where it is.
    """
    if home := os.environ.get("KDB_FAST_HOME"):
        return Path(home)
    if data := os.environ.get("XDG_DATA_HOME"):
        return Path(data) / "kdb-fast"
    try:
        return Path.home() / ".local" / "share" / "kdb-fast"
    except RuntimeError:  # a container that runs as a user without an entry in /etc/passwd
        raise RefusedError(
            "This user has no home directory: HOME is not set, and the system knows none.",
            remedy="Set KDB_FAST_HOME to a directory that this user may write: models and the embedded PostgreSQL are "
            "kept there.",
        ) from None


def absolute_path(path: str | Path) -> Path:
    """The path from the root; ``~`` is the user's home directory where there is one."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser().absolute()
    return Path(path).absolute()
