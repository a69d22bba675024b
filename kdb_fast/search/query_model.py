"""The vector of a query: by the model that made the vectors of the index, since those of two cannot be compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KdbFastError, ModelError, SchemaError
from ..origins import IndexModel, Maker, Origin, QueryVector, same_name
from ..records import storable_key
from ..settings import DEFAULT_MODEL
from ..tables.kdb_search import KDB_SEARCH

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..embedding.models.files import Model

    Vector = npt.NDArray[np.float32]

PATIENCE: dict[str, Any] = {"timeout": 20.0, "max_retries": 2, "concurrency": 1}
"""Of a provider's API: somebody waits for the answer."""


def query_vectors(
    query: str,
    origins: Mapping[Origin, int],
    *,
    provider: str | None = None,
    model: str | None = None,
    model_path: Path | None = None,
    base_url: str | None = None,
    ahead: tuple[Vector, Maker] | None = None,
) -> tuple[list[QueryVector], Callable[[Origin], str]]:
    """The query's vector by each model that made rows of ``origins``, or by the one that is asked for.

    Args:
        origins: What made the vectors that are searched, with the number of rows.
        provider: ``fastembed`` or ``openai``; None for the one that serves the model.
        model: Name of the only model; None for all of the index.
        model_path: Directory of a FastEmbed model, instead of looking it up.
        base_url: Address of the openai provider's API; with it that is the provider where none is named.
        ahead: The query's vector by a FastEmbed model, made before it was known which are needed.

    Returns:
        The vectors, and a function that says why rows of an origin can be compared with none of them; '' if they can.

    Raises:
        KdbFastError: As :func:`embed_query`, if the model that is asked for, or every model of the index, is not to be
            had.
    """
    if not origins:
        return [], lambda origin: ""
    one = any((provider, model, model_path, base_url))
    # Those with a fingerprint first: it may tell the address that serves a name.
    order = sorted(origins, key=lambda origin: (origin.fingerprint is None, -origins[origin]))
    named = [origin for origin in order if origin.model]
    if one:
        if model:
            fit = [origin for origin in named if same_name(origin.model or "", model)]
        else:
            served = provider or ("openai" if base_url else "fastembed")
            fit = [origin for origin in named if _serves(served, IndexModel.of(origin), base_url)]
        named = (fit or named)[:1]
    vectors: list[QueryVector] = []
    makers: list[Maker] = []
    failed: dict[Origin, KdbFastError] = {}

    def known(origin: Origin) -> bool:
        """Whether a model of this name was found, be it of other files."""
        return any(m.dimensions == origin.dimensions and same_name(m.model, origin.model or "") for m in makers)

    if len({origin.model for origin in named}) > 1:
        failed = _not_to_be_had(named)
    for origin in named:
        if origin in failed or known(origin) or any(maker.has_made(origin) for maker in makers):
            continue
        about = IndexModel.of(origin)
        try:
            vector, maker = embed_query(
                query,
                about,
                provider=provider,
                model=model,
                model_path=model_path,
                base_url=base_url,
                ahead=ahead,
            )
        except KdbFastError as error:
            failed[origin] = error
            continue
        makers.append(maker)
        if any(maker.has_made(other) for other in origins):
            vectors.append(QueryVector(vector, maker))
    if failed and not makers:
        raise next(iter(failed.values()))

    def why(origin: Origin) -> str:
        if any(maker.has_made(origin) for maker in makers):
            return ""
        if origin.model is None:
            return (
                "nothing tells which. Index them again, or name it: "  # noqa: S608
                f"UPDATE {KDB_SEARCH.name} SET model = '…' WHERE model IS NULL."
            )
        if origin in failed:
            return str(failed[origin])
        if known(origin):
            return "of other files, or at another address, than are in use now. Index them again."
        return "another one was asked for."

    return vectors, why


def _not_to_be_had(origins: list[Origin]) -> dict[Origin, KdbFastError]:
    """Why FastEmbed models are not to be had. Asked before any is loaded: a process that embeds fetches none."""
    from ..embedding.models.lookup import resolve

    failed: dict[Origin, KdbFastError] = {}
    for origin in origins:
        if _serves("fastembed", IndexModel.of(origin)):
            try:
                resolve(origin.model or "", once=True)
            except KdbFastError as error:
                failed[origin] = error
    return failed


def embed_query(
    query: str,
    made: IndexModel | None,
    *,
    provider: str | None = None,
    model: str | None = None,
    model_path: Path | None = None,
    base_url: str | None = None,
    ahead: tuple[Vector, Maker] | None = None,
) -> tuple[Vector, Maker]:
    """The query's vector (float32, dimensions), always in fp32, and the model that made it.

    Args:
        made: What made the vectors that it is for.
        provider: ``fastembed`` or ``openai``; None for the one that serves the model.
        model: Name of the model; None for that of the index.
        model_path: Directory of a FastEmbed model, instead of looking it up.
        base_url: Address of the openai provider's API; with it that is the provider where none is named.
        ahead: As of :func:`query_vectors`.

    Raises:
        SchemaError: The vectors of the index are another model's.
        ModelError: The model is not to be had.
        UsageError: The provider lacks a key or a package.
        ProviderError: The provider's API does not answer.
    """
    provider, name = chosen(made, provider, model, model_path, base_url)
    if provider == "openai":
        return _by_openai(query, made, name, **({"base_url": base_url} if base_url else {}))
    if ahead is not None and same_name(ahead[1].model, name or DEFAULT_MODEL):
        _check(made, ahead[1].model, ahead[1].dimensions)
        return ahead
    from ..embedding.models.lookup import resolve

    try:
        found = resolve(name or DEFAULT_MODEL, model_path, once=True)
    except ModelError as error:
        if name and made and name == made.name:
            error.remedy += " If a server made this index's vectors, give its address: --base-url, or OPENAI_BASE_URL."
        raise
    _check(made, found.name, found.dimensions)
    return embedded(query, found)


def embedded(query: str, model: Model) -> tuple[Vector, Maker]:
    """The query's vector by a model that is verified."""
    from ..embedding.encoder import Encoder, EncoderSpec

    vector = Encoder(EncoderSpec(model, batch_size=1, once=True)).embed([query])[0]
    return vector, Maker(model.fingerprint(), model.name, model.dimensions)


def chosen(
    made: IndexModel | None, provider: str | None, model: str | None, model_path: Path | None, base_url: str | None
) -> tuple[str, str | None]:
    """Provider and name of the model, as :func:`embed_query` has them; None for the provider's default."""
    if provider is None:
        provider = "openai" if base_url or (model_path is None and is_openais(made, model)) else "fastembed"
    served = provider == "openai" and bool(base_url or os.environ.get("OPENAI_BASE_URL"))
    return provider, model or _name_of(made, provider, served)


def _by_openai(
    query: str, made: IndexModel | None, name: str | None, base_url: str | None = None
) -> tuple[Vector, Maker]:
    import numpy as np

    from ..embedding.providers.openai.provider import OPENAI_MODEL, OpenAIProvider

    length: dict[str, Any] = {"dimensions": made.dimensions} if made and made.dimensions else {}
    with OpenAIProvider(model=name or OPENAI_MODEL, base_url=base_url, **length, **PATIENCE) as provider:
        _check(made, provider.model_name, provider.dimensions)
        return np.asarray(provider.embed(query), np.float32), provider.maker()


def _serves(provider: str, made: IndexModel, base_url: str | None = None) -> bool:
    """Whether this provider is the one for a model of the index."""
    if base_url and made.name and made.dimensions:
        from ..embedding.providers.openai.provider import openai_fingerprint

        return made.fingerprint == openai_fingerprint(made.name, made.dimensions, base_url)
    return (provider == "openai") == is_openais(made, None)


def is_openais(made: IndexModel | None, model: str | None) -> bool:
    """Whether the model is OpenAI's by its name, or has been asked for at the address that is set now."""
    name = model or (made and made.name) or ""
    if name.startswith("text-embedding-"):
        return True
    address = os.environ.get("OPENAI_BASE_URL")
    if made is None or made.fingerprint is None or made.dimensions is None or not address or name != made.name:
        return False
    from ..embedding.providers.openai.provider import openai_fingerprint

    return made.fingerprint == openai_fingerprint(name, made.dimensions, address)


def _name_of(made: IndexModel | None, provider: str, served: bool) -> str | None:
    """The model of the index, if this provider may serve it; None for the provider's default.

    Args:
        served: The address of a server was given that may serve any model.
    """
    if made is None or made.name is None or same_name(made.name, DEFAULT_MODEL):
        return None
    return made.name if (provider == "openai") == (is_openais(made, None) or served) else None


def _check(made: IndexModel | None, name: str, dimensions: int) -> None:
    """Raises SchemaError if the vectors of the index cannot be compared with those of this model."""
    if made is None:
        return
    theirs = storable_key(made.name or "an unknown model")
    remedy = (
        "Leave out --model and --provider to search with the index's own model, or make the index anew with this one: "
        f"kdb-fast reindex {'--provider openai ' if is_openais(None, name) else ''}--model {storable_key(name)}"
    )
    if made.dimensions not in (None, dimensions):
        raise SchemaError(
            f"The index holds vectors of {made.dimensions} dimensions, made by {theirs}; {storable_key(name)} gives "
            f"{dimensions}.",
            remedy=remedy,
        )
    if made.name is not None and not same_name(made.name, name):
        raise SchemaError(
            f"The index holds vectors of the model {theirs}, not of {storable_key(name)}; they cannot be compared.",
            remedy=remedy,
        )
