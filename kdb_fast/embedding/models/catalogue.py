"""FastEmbed's catalogue of models: what it says of each."""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple

from ...errors import ModelError


class CatalogueEntry(NamedTuple):
    """What FastEmbed says of a model.

    Attributes:
        name: As FastEmbed spells it.
        model_file: The file to load, relative to the model's directory.
        additional_files: Others that it needs, such as external data.
        dimensions: Length of a vector.
        pooling: As in :class:`~kdb_fast.embedding.models.files.Model`.
        normalised: Vectors have L2 norm 1.
        size_gb: Size of the download in gigabytes.
        description: One sentence.
        repository: The hub's name of its repository, or ''.
    """

    name: str
    model_file: str
    additional_files: tuple[str, ...]
    dimensions: int
    pooling: str
    normalised: bool
    size_gb: float
    description: str
    repository: str


_POOLING = {
    "OnnxTextEmbedding": ("cls", True),
    "CLIPOnnxEmbedding": ("model", False),
    "SiglipOnnxTextEmbedding": ("model", False),
    "PooledNormalizedEmbedding": ("mean", True),
    "PooledEmbedding": ("mean", False),
    "JinaEmbeddingV3": ("mean", True),
    "BuiltinSentenceEmbedding": ("model", False),
    "LastTokenNormalizedEmbedding": ("last", True),
    "StaticTextEmbedding": ("mean", True),
}
"""(pooling, normalised) of each of FastEmbed's classes. A class that is not listed goes by its own name."""


def catalogue() -> dict[str, CatalogueEntry]:
    """FastEmbed's text models by name in lower case. Imports FastEmbed, which takes up to a second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastembed import TextEmbedding
    entries: dict[str, CatalogueEntry] = {}
    for kind in TextEmbedding.EMBEDDINGS_REGISTRY:
        custom: dict[str, Any] = getattr(kind, "POSTPROCESSING_MAPPING", {})
        for model in kind._list_supported_models():
            pooling, normalised = _POOLING.get(kind.__name__, (kind.__name__, False))
            if config := custom.get(model.model):
                pooling = {"LAST_TOKEN": "last", "DISABLED": "model"}.get(config.pooling, config.pooling.lower())
                normalised = config.normalization
            entry = CatalogueEntry(
                name=model.model,
                model_file=model.model_file,
                additional_files=tuple(model.additional_files),
                dimensions=model.dim or 0,
                pooling=pooling,
                normalised=normalised,
                size_gb=model.size_in_GB,
                description=model.description,
                repository=model.sources.hf or "",
            )
            entries.setdefault(entry.name.lower(), entry)  # the first class that knows a name gets it
    return entries


def find_entry(name: str) -> CatalogueEntry:
    """The catalogue's entry of ``name``, in any case.

    Raises:
        ModelError: FastEmbed knows no such model; names that are close are in the remedy.
    """
    entries = catalogue()
    if entry := entries.get(name.lower()):
        return entry
    import difflib

    # Most people remember the part behind the slash.
    short = {key.rpartition("/")[2]: key for key in reversed(entries)}
    close = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.6)
    close += [short[key] for key in difflib.get_close_matches(name.lower().rpartition("/")[2], short, n=3, cutoff=0.6)]
    names = [entries[key].name for key in dict.fromkeys(close)][:3]
    guess = f"Did you mean {' or '.join(names)}? " if names else ""
    if os.environ.get("OPENAI_BASE_URL"):
        guess += "For a model of the server that OPENAI_BASE_URL names, add --provider openai. "
    raise ModelError(f"There is no model {name!r}.", remedy=f"{guess}All names: kdb-fast models list")
