"""What turns text into vectors: FastEmbed in this process, OpenAI's API, or an object of the user's own.

The interface is KameleonDB's, so a provider of either package works with both.
"""

from __future__ import annotations

from typing import Any

from ...errors import OptionError, UsageError
from .base import EmbeddingProvider
from .custom import as_provider
from .fastembed import FastEmbedProvider
from .openai.provider import OpenAIProvider


def get_provider(name_or_instance: object, **options: Any) -> EmbeddingProvider:
    """The provider of that name, built with ``options``; an instance is checked and given back.

    Raises:
        ValueError: The name is unknown (an :class:`OptionError`).
        ImportError: A package is missing (a :class:`MissingPackageError`); the message says how to install it.
        UsageError: The object is no provider, or options were given for one that is built already.
    """
    if name_or_instance == "fastembed":
        return FastEmbedProvider(**options)
    if name_or_instance == "openai":
        return OpenAIProvider(**options)
    if isinstance(name_or_instance, str):
        raise OptionError(
            f"There is no embedding provider {name_or_instance!r}; expected fastembed, openai or a provider object."
        )
    if options:
        raise UsageError(f"The provider is built already; {', '.join(sorted(options))} would have no effect.")
    return as_provider(name_or_instance)
