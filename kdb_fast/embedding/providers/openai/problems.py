"""What follows from a problem that the embeddings API names: another request, another try, or the end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ....errors import ModelError, ProviderError, ProviderKeyError
from .answers import Problem, speaks_of_length


class Asked(NamedTuple):
    """Of whom vectors are asked, for messages."""

    base_url: str
    model: str
    has_key: bool


class RefusedRequestError(Exception):
    """The server does not take this request."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


_NO_QUOTA = re.compile("insufficient_quota|billing")
# One request beyond the whole limit of a minute: no wait makes it fit.
_TOO_LARGE = re.compile("request too large", re.IGNORECASE)
_NO_EMBEDDINGS = re.compile(r"(?:does|do) not support embeddings?|start it with .?--embeddings", re.IGNORECASE)
_NAN = re.compile(r"unsupported value: \+?(?:NaN|[+-]?Inf)", re.IGNORECASE)
_LIST = re.compile(
    r"\b(?:list|array|llama_decode|batch|single string|must be a string|multiple inputs)\b", re.IGNORECASE
)


def raise_if_final(said: Problem, asked: Asked, inputs: int, quoted: str) -> None:
    """Raise for an answer that waiting does not change.

    Args:
        said: The answer.
        asked: Of whom, and for what.
        inputs: How many texts were sent.
        quoted: The end of the message.

    Raises:
        ProviderKeyError: The key is refused.
        ProviderError: There is no quota, or no such address.
        ModelError: There is no such model, or it gives no embeddings.
        RefusedRequestError: This request is refused; another one may not be.
    """
    if said.status == 401:
        what = "refuses the API key" if asked.has_key else "asks for an API key"
        raise ProviderKeyError(f"{asked.base_url} {what}: {said}.", remedy="Set OPENAI_API_KEY to a valid key.")
    if said.status == 403:
        raise ProviderKeyError(
            f"{asked.base_url} does not let this key use {asked.model}: {said}.",
            remedy="Check the key's project, its rights, and that the API serves your country.",
        )
    if said.status == 402 or (said.status == 429 and _NO_QUOTA.search(said.code)):
        raise ProviderError(
            f"The account at {asked.base_url} has no quota left: {said}.", remedy="Check its plan and billing."
        )
    if said.status == 404:
        raise ModelError(
            f"{asked.base_url} knows no embedding model {asked.model}: {said}{quoted}",
            remedy="Check the model's name, and that the base URL is right.",
        )
    if said.status == 501 or (said.status in (400, 500) and _NO_EMBEDDINGS.search(said.message)):
        raise ModelError(
            f"{asked.base_url} gives no embeddings for {asked.model}: {said}{quoted}",
            remedy="Choose an embedding model; start llama.cpp with --embeddings.",
        )
    too_large = said.status == 429 and inputs > 1 and _TOO_LARGE.search(said.message)
    # llama.cpp and Ollama answer 500 where a text is longer than they read, or its vector is not a number.
    of_text = said.status == 500 and (
        speaks_of_length(said) or _NAN.search(said.message) or (inputs > 1 and speaks_of_lists(said.message))
    )
    if said.status in (400, 413, 422) or too_large or of_text:
        raise RefusedRequestError(said)
    if said.status not in (408, 409, 429) and said.status < 500:
        raise ProviderError(f"{asked.base_url} answered {said}; expected 200.", remedy="Check the base URL.")


def speaks_of_lists(message: str) -> bool:
    """Whether several texts at once, or a list at all, may be what the server refuses."""
    return bool(_LIST.search(message))


_NO_DIMENSIONS = re.compile(
    r"not support\w* .{0,40}(?:dimensions|matryoshka)|dimensions.{0,60}not (?:supported|permitted|allowed)|"
    r"(?:unknown|unrecognized|unexpected|extra)\b.{0,60}\bdimensions",
    re.IGNORECASE,
)


def unknown_option(said: Problem, sent: Mapping[str, object]) -> str | None:
    """The optional field of ``sent`` that the server does not know, if that is what it says."""
    if said.status not in (400, 422):
        return None
    if "encoding_format" in sent and "encoding_format" in (said.param or said.message):
        return "encoding_format"
    if "dimensions" in sent and _NO_DIMENSIONS.search(said.message):
        return "dimensions"
    return None
