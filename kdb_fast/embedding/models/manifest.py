"""The manifest that kdb-fast writes beside a model's files: what the model is, and the sum of each file."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

from ...errors import ModelError
from .files import Model, max_tokens, read_json, required_tokenizer_files
from .onnx_files import stays_inside

MANIFEST = "kdb_fast.json"
MANIFEST_FORMAT = 1


def write_manifest(model: Model, fastembed: str) -> None:
    """Write the manifest into the model's directory, whole or not at all.

    Args:
        fastembed: Version of FastEmbed whose catalogue gave pooling and dimensions.
    """
    content = {
        "format": MANIFEST_FORMAT,
        "name": model.name,
        "model_file": model.model_file,
        "dimensions": model.dimensions,
        "pooling": model.pooling,
        "normalised": model.normalised,
        "fastembed": fastembed,
        "source": dict(model.source),
        "files": dict(model.files),
    }
    handle, temporary = tempfile.mkstemp(dir=model.path, prefix=f".{MANIFEST}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, model.path / MANIFEST)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_manifest(path: Path) -> tuple[Model, str]:
    """The model that the manifest in ``path`` describes, and the FastEmbed version that it was written with.

    Raises:
        ModelError: The manifest is missing or is not one that this version of kdb-fast writes.
    """
    content = read_json(path / MANIFEST)
    remedy = "Fetch the model again with kdb-fast models pull, or remove the directory."
    if content.get("format") != MANIFEST_FORMAT:
        raise ModelError(
            f"{path / MANIFEST} has format {content.get('format')!r}; expected {MANIFEST_FORMAT}.", remedy=remedy
        )
    try:
        name, model_file, pooling = (str(content[key]) for key in ("name", "model_file", "pooling"))
        files = tuple((str(relative), str(digest)) for relative, digest in content["files"].items())
        source = tuple((str(what), str(value)) for what, value in content["source"].items())
        dimensions, normalised = int(content["dimensions"]), bool(content["normalised"])
        fastembed = str(content["fastembed"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path / MANIFEST} is damaged: {error!r}.", remedy=remedy) from None
    listed = {relative for relative, _ in files}
    required = {model_file, *required_tokenizer_files(model_file)}
    if not required <= listed or any(not stays_inside(relative) for relative in listed):
        raise ModelError(f"{path / MANIFEST} is damaged: it lists {sorted(listed)}.", remedy=remedy)
    limit = max_tokens(path, model_file)
    return Model(name, path, model_file, dimensions, limit, pooling, normalised, files, source), fastembed
