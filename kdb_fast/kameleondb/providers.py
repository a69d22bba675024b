"""From a ``KameleonDB`` to its database's address and to what embeds for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..settings import DEFAULT_MODEL, ReindexOptions

if TYPE_CHECKING:
    from ..db.address import DatabaseAddress
    from ..embedding.providers.base import EmbeddingProvider
    from ..indexing.run_embedding import Embedding


def address_of(db: Any) -> DatabaseAddress | None:
    """The database of a ``KameleonDB``; None for SQLite in memory.

    Raises:
        UsageError: The address is none that kdb-fast can use.
    """
    from ..db.address import parse_address

    url = db._connection.engine.url
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        return None
    shown = url.set(drivername=url.get_backend_name()).render_as_string(hide_password=False)
    return parse_address(shown, "the address of KameleonDB")


def embedding_of(provider: EmbeddingProvider, batch_size: int) -> tuple[Embedding, ReindexOptions]:
    """How a run embeds with this provider: FastEmbed's in worker processes, others in this one.

    Raises:
        UsageError: ``batch_size`` is not one of the provider.
        ModelError: The model is not to be had.
    """
    from ..embedding.providers.custom import adapted
    from ..indexing.run_embedding import Embedding

    provider = adapted(provider)
    options = ReindexOptions(provider=provider.limits_of, batch_size=batch_size)
    spec = provider.worker_spec()
    if spec is None:
        return Embedding.of_provider(provider), options
    return Embedding.of_model(replace(spec, batch_size=batch_size)), options


def provider_for(provider: Any, db: Any, model: str | None = None, dimensions: int | None = None) -> EmbeddingProvider:
    """The provider to use for what was asked for: ours for the same model in place of KameleonDB's own for FastEmbed.

    Raises:
        UsageError: It is no provider, or an option makes no sense.
    """
    from ..embedding.providers.custom import as_provider
    from ..embedding.providers.factory import get_provider
    from ..embedding.providers.fastembed import FastEmbedProvider

    if isinstance(provider, str) and provider != "fastembed":
        length = {"dimensions": dimensions} if dimensions else {}
        return get_provider(provider, **({"model": model} if model else {}), **length)
    if provider is None or isinstance(provider, str):
        return FastEmbedProvider(model) if model else _of_index(db)
    theirs = type(provider)
    if theirs.__module__.startswith("kameleondb.") and theirs.__name__ == "FastEmbedProvider":
        return FastEmbedProvider(provider.model_name)
    return as_provider(provider)


def _of_index(db: Any) -> EmbeddingProvider:
    """The provider of the model that made the index; of the default one for a new index."""
    from ..embedding.providers.fastembed import FastEmbedProvider
    from ..embedding.providers.openai.provider import OpenAIProvider
    from ..origins import same_name
    from ..search.query_model import is_openais
    from ..stores.past_runs import index_model_of

    address = address_of(db)
    made = index_model_of(address)[1] if address is not None else None
    if made is None or not made.name or same_name(made.name, DEFAULT_MODEL):
        return FastEmbedProvider(DEFAULT_MODEL)
    if is_openais(made, None):
        return OpenAIProvider(made.name, made.dimensions or ...)
    return FastEmbedProvider(made.name)
