"""kdb-fast's own models: one directory for each, with plain files and a manifest.

A directory is filled under another name and renamed when all is complete and on disk, under a lock of its own, so any
number of processes may ask at once and a killed one leaves nothing half done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ...errors import ModelError
from ...paths import default_data_dir
from ...settings import DEFAULT_MODEL
from .catalogue import find_entry
from .files import Model, check_private, pull_remedy, verify
from .manifest import read_manifest, write_manifest


def model_cache_dir() -> Path:
    """Where kdb-fast keeps its models: ``models`` in :func:`~kdb_fast.paths.default_data_dir`."""
    return (default_data_dir() / "models").absolute()


def directory_name(name: str) -> str:
    """Name of the model's directory in the cache: ``BAAI/bge-small-en`` is in ``BAAI--bge-small-en``.

    Raises:
        ModelError: The name cannot be a directory's.
    """
    result = name.replace("/", "--")
    if not result or result.startswith(".") or "\x00" in result:
        raise ModelError(f"{name!r} is not a model's name; expected one such as {DEFAULT_MODEL}.")
    return result


def directories() -> list[Path]:
    """Directories of models in the cache; a name with a dot in front is unfinished work."""
    root = model_cache_dir()
    if not root.exists():
        return []
    check_private(root)
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def find(name: str) -> Path | None:
    """The directory of the model ``name``, in any case, if there is one."""
    wanted = directory_name(name).lower()
    return next((path for path in directories() if path.name.lower() == wanted), None)


def load(directory: Path, *, once: bool = False) -> Model:
    """The model in a directory of the cache, verified; ``once`` as in :func:`.lookup.resolve`."""
    check_private(directory)
    model, written_by = read_manifest(directory)
    if directory_name(model.name) != directory.name:
        raise ModelError(
            f"{directory} holds the model {model.name}; expected it to be named {directory_name(model.name)}.",
            remedy="Remove or rename the directory.",
        )
    model = model.plain() if once else model
    verify(model)
    return follow_catalogue(model, written_by)


def follow_catalogue(model: Model, written_by: str) -> Model:
    """Take over what another version of FastEmbed says of the model: versions have changed a model's pooling."""
    if model.source:
        return model  # built and loaded by ourselves
    from importlib.metadata import version  # here, where FastEmbed has most likely imported it already

    current = version("fastembed")
    if written_by == current:
        return model
    entry = find_entry(model.name)
    if entry.model_file != model.model_file:
        raise ModelError(
            f"FastEmbed {current} expects {entry.model_file} for {model.name}, found {model.model_file}.",
            remedy=pull_remedy(model.name),
        )
    model = replace(model, dimensions=entry.dimensions, pooling=entry.pooling, normalised=entry.normalised)
    with contextlib.suppress(OSError):  # a cache that may only be read is looked up each time
        write_manifest(model, current)
    return model


@contextlib.contextmanager
def locked(path: Path, name: str, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``. The kernel releases it with the process, however that ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"Waiting for another process that is fetching {name} …")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def install(work: Path, target: Path) -> None:
    """Put a complete directory in its place. Readers see the old one, none for an instant, or the new one."""
    for path in [*work.rglob("*"), work]:
        _sync(path)
    old = target.with_name(f".old-{target.name}-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(work, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
