"""What lies in a model's directory: its files and their SHA-256. Knows nothing of caches or networks."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ModelError
from .catalogue import CatalogueEntry
from .onnx_files import external_files

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
"""Everything besides the model file that FastEmbed reads before it computes; each changes the token ids."""

PLAIN, DATA, TABLES = "_plain", "_data", "_tables"
"""Behind the name of a model file that :mod:`.minilm_graph` builds: the same model without tables, the large tensors of
both, and the tables."""

STATIC_MAX_TOKENS = 512
"""FastEmbed's fixed limit for its static models (``model.safetensors``), which have no tokenizer settings."""


@dataclass(frozen=True)
class Model:
    """A model on disk. Small and picklable: it is sent to the worker processes.

    Attributes:
        name: FastEmbed's name of the model, as its catalogue spells it.
        path: Directory that holds all files; what FastEmbed takes as ``specific_model_path``.
        model_file: The ONNX file (``model.safetensors`` for a static model), relative to ``path``.
        dimensions: Length of a vector.
        max_tokens: FastEmbed cuts a text after this many tokens, the special ones included.
        pooling: ``mean``, ``cls``, ``last``, or ``model`` where the graph itself returns one vector a text.
        normalised: Vectors are scaled to L2 norm 1.
        files: (path relative to ``path``, SHA-256 in hex) of every file that has a part in the result.
        source: (what, value) pairs that stand for the model file in the fingerprint. Filled for a graph that
            was built here from published weights: its bytes depend on the version of the ``onnx`` package,
            the vectors do not.
    """

    name: str
    path: Path
    model_file: str
    dimensions: int
    max_tokens: int
    pooling: str
    normalised: bool
    files: tuple[tuple[str, str], ...]
    source: tuple[tuple[str, str], ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Memory of a process that loads the model, about.

        The model file is read and then converted, so it counts twice; files beside it are mapped.
        """
        return sum((self.path / name).stat().st_size * (1 + (name == self.model_file)) for name, _ in self.files)

    def fingerprint(self) -> str:
        """16 hex digits that differ as soon as anything that has a part in the vectors differs.

        The directory has no part in it, so the same model has one fingerprint on all machines.
        """
        files = dict(self.files)
        if self.source:
            files = {name: digest for name, digest in files.items() if name in TOKENIZER_FILES}
        ingredients = {
            "name": self.name,
            "files": files,
            "source": dict(self.source),
            "pooling": self.pooling,
            "normalised": self.normalised,
            "max_tokens": self.max_tokens,
            "dimensions": self.dimensions,
            "precision": "fp32",
        }
        canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def plain(self) -> Model:
        """The same model without the tables of :mod:`.minilm_graph`: 90 MB instead of 232, vectors that differ by less
        than 1e-6, and the same fingerprint. Itself if it has none."""
        plain, left_out = self.model_file + PLAIN, (self.model_file, self.model_file + TABLES)
        if plain not in dict(self.files):
            return self
        return replace(self, model_file=plain, files=tuple(file for file in self.files if file[0] not in left_out))


def pull_remedy(name: str) -> str:
    return f"Run: kdb-fast models pull {name}"


HASHED_BYTES = 8 << 20
"""Read at a time. A thread asks for the interpreter after each read and each sum: with the 256 KiB that Python's
file_digest() takes, 232 MB beside imports in another thread took 300 ms instead of 110."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits. Raises OSError."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(HASHED_BYTES, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            digest.update(block[:read])
    return digest.hexdigest()


def verify(model: Model) -> None:
    """Compare every file with the sum that ``model`` carries; about 1 s for each GB, two files at a time.

    Raises:
        ModelError: A file is missing, cannot be read or has changed.
    """

    def sum_of(relative: str) -> str:
        try:
            return sha256_of(model.path / relative)
        except OSError as error:
            return f"no readable file ({error.strerror})"

    with ThreadPoolExecutor(2, "verify") as pool:
        sums = list(pool.map(sum_of, dict(model.files)))
    for (relative, expected), found in zip(model.files, sums, strict=True):
        if found != expected:
            raise ModelError(
                f"{relative} of the model {model.name} in {model.path} is damaged: "
                f"found SHA-256 {found}, expected {expected}.",
                remedy=pull_remedy(model.name),
            )


def inspect(entry: CatalogueEntry, path: Path, source: tuple[tuple[str, str], ...] = ()) -> Model:
    """Describe the model in the directory ``path``; reads every file once for its sum.

    Args:
        entry: What the catalogue says of it.
        path: Directory with its files.
        source: See :class:`Model`.

    Raises:
        ModelError: A file that FastEmbed needs is missing, or external data lies outside the directory.
    """
    needed = [entry.model_file, *entry.additional_files, *required_tokenizer_files(entry.model_file)]
    try:
        missing = [relative for relative in needed if not (path / relative).is_file()]
        if missing:
            raise ModelError(
                f"{path} is not a complete directory of the model {entry.name}: missing {', '.join(missing)}.",
                remedy=f"FastEmbed expects {', '.join(needed)} for this name. Is it another model's directory?",
            )
        present = [relative for relative in TOKENIZER_FILES if (path / relative).is_file()]
        data = [] if _is_static(entry.model_file) else external_files(path, entry.model_file)
        plain = [entry.model_file + PLAIN] if source and (path / (entry.model_file + PLAIN)).is_file() else []
        relatives = dict.fromkeys([entry.model_file, *plain, *entry.additional_files, *data, *present])
        files = tuple((relative, sha256_of(path / relative)) for relative in relatives)
    except OSError as error:
        raise ModelError(
            f"The model {entry.name} in {path} cannot be read: {error}.", remedy="Check the rights on its files."
        ) from None
    return Model(
        entry.name,
        path,
        entry.model_file,
        entry.dimensions,
        max_tokens(path, entry.model_file),
        entry.pooling,
        entry.normalised,
        files,
        source,
    )


def required_tokenizer_files(model_file: str) -> tuple[str, ...]:
    return ("tokenizer.json",) if _is_static(model_file) else ("tokenizer.json", "tokenizer_config.json")


def _is_static(model_file: str) -> bool:
    return model_file.endswith(".safetensors")


def max_tokens(path: Path, model_file: str) -> int:
    """Where FastEmbed cuts: the smaller of ``model_max_length`` and ``max_length`` in tokenizer_config.json.

    Raises:
        ModelError: The file cannot be read or names no usable limit (transformers writes 1e30 for "unknown").
    """
    if _is_static(model_file):
        return STATIC_MAX_TOKENS
    settings = read_json(path / "tokenizer_config.json")
    values = [settings.get("model_max_length"), settings.get("max_length")]
    limits = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 < v <= sys.maxsize]
    if not limits:
        raise ModelError(
            f"{path / 'tokenizer_config.json'} has model_max_length {values[0]!r} and max_length {values[1]!r}; "
            "expected a positive whole number in one of them.",
            remedy="Write the model's real limit into it.",
        )
    return min(limits)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises ModelError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", remedy="Fetch the model again.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


# --- whose directory it is ---


def check_private(directory: Path) -> None:
    """Refuse a directory in which somebody else could exchange a model. Root's directories are trusted.

    Raises:
        ModelError: It belongs to another user, or group or others may write to it.
        OSError: It cannot be looked at.
    """
    status = directory.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise ModelError(
            f"The model directory {directory} belongs to user {status.st_uid}; expected user {os.geteuid()} or root.",
            remedy="Set KDB_FAST_HOME to a directory of your own.",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelError(
            f"The model directory {directory} has mode {stat.S_IMODE(status.st_mode):o}, so others can change it; "
            "expected it to be writable by its owner alone.",
            remedy=f"Run: chmod go-w {directory}",
        )
