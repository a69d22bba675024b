"""ON A HOST: the files of the model, sent once from the run's machine and verified by their SHA-256.

They are sent and not fetched: that needs no network beyond the cluster's own, works for models of a directory of the
user's and for prepared ones, and all hosts get the same bytes. A host that has them already, from an earlier run or
because the model was pulled there, is sent nothing. They are never removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ...embedding.encoder import EncoderSpec
from ...embedding.models.cache import directory_name, install, locked, model_cache_dir
from ...embedding.models.files import check_private, sha256_of
from ...embedding.precision.preparation import MANIFEST
from ...errors import ModelError

CHUNK_BYTES = 8 << 20
"""Of a file in one object: a host holds one at a time."""


@dataclass(frozen=True)
class Files:
    """A directory of files.

    Attributes:
        name: Of the model.
        sums: (path within the directory, SHA-256 in hex) of each.
    """

    name: str
    sums: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """16 hex digits that differ as soon as a file does."""
        return hashlib.sha256(json.dumps(self.sums).encode()).hexdigest()[:16]

    def are_in(self, directory: Path) -> bool:
        """Whether they all lie in a directory, undamaged."""
        try:
            check_private(directory)
            return all(sha256_of(directory / name) == expected for name, expected in self.sums)
        except (OSError, ModelError):
            return False


def files_of(spec: EncoderSpec) -> tuple[tuple[Files, Path], ...]:
    """What a host needs to build this encoder, and where it is here: the model, and what was prepared from it."""
    wanted = [(Files(spec.model.name, spec.model.files), spec.model.path)]
    if spec.prepared is not None:
        path = spec.prepared.parent
        sums = json.loads((path / MANIFEST).read_text())["files"]
        wanted.append((Files(path.name, tuple(sorted(sums.items()))), path))
    return tuple(wanted)


def placed(spec: EncoderSpec, directories: list[str]) -> EncoderSpec:
    """The same encoder with its files where a host has them, in the order of :func:`files_of`."""
    model = replace(spec.model, path=Path(directories[0]))
    if spec.prepared is None:
        return replace(spec, model=model)
    return replace(spec, model=model, prepared=Path(directories[1]) / spec.prepared.name)


def chunks(directory: Path, name: str) -> Iterator[bytes]:
    """A file, in parts that fit an object."""
    with (directory / name).open("rb") as file:
        while part := file.read(CHUNK_BYTES):
            yield part


def find(files: Files) -> str | None:
    """Where the files are on this host, verified; None where they are to be sent."""
    candidates = (model_cache_dir() / directory_name(files.name), _sent(files))
    return next((str(path) for path in candidates if files.are_in(path)), None)


def store(files: Files, contents: dict[str, Iterator[bytes]]) -> str:
    """Write the files on this host, all or none, and return the directory.

    Args:
        contents: Of each file, in parts.

    Raises:
        ModelError: What has come is not what was sent.
        OSError: They cannot be written.
    """
    target = _sent(files)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(target.parent / f".{target.name}.lock", files.name, lambda line: None):
        if files.are_in(target):
            return str(target)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            for name, _ in files.sums:
                path = work / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    file.writelines(contents[name])
            if not files.are_in(work):
                raise ModelError(f"The files of {files.name} have arrived damaged.")
            install(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return str(target)


def _sent(files: Files) -> Path:
    """Where they are kept when they were sent: per user, so that nobody else can exchange them."""
    root = model_cache_dir().parent / "cluster"
    return root / f"{directory_name(os.path.basename(files.name))}-{files.digest}"
