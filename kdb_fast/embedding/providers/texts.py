"""Texts before any model reads them: which cannot be embedded, and about how many tokens they have. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...errors import ProviderInputError

PACKED_BYTES_PER_TOKEN = 2
"""UTF-8 bytes a token, for packing requests. English has 4 to 5, other Latin scripts and source code about 3, Chinese
and Japanese 2 to 3, so requests of such texts are never too large. Hexadecimal noise or a rare script may have fewer:
that request is refused and goes in halves. The true bound, one byte a token, would make all requests half as large."""

TYPICAL_BYTES_PER_TOKEN = 4
"""For counting tokens where the server does not."""


def why_unfit(text: object) -> str | None:
    """Why no model can embed ``text``, or None: it is no string, or not valid Unicode."""
    if not isinstance(text, str):
        return f"it is {type(text).__name__}, expected a string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it holds a lone surrogate, which is not valid Unicode"
    return None


def unfit_rows(texts: Sequence[str], check: Callable[[object], str | None]) -> dict[int, str]:
    """The rows that cannot be embedded, with what ``check`` says of each."""
    return {row: reason for row, text in enumerate(texts) if (reason := check(text))}


def raise_unfit(texts: Sequence[str], check: Callable[[object], str | None]) -> None:
    """Raises ProviderInputError where there are :func:`unfit_rows`."""
    if refused := unfit_rows(texts, check):
        raise ProviderInputError.of(refused)


def typical_tokens(texts: Sequence[str]) -> int:
    """About how many tokens these texts have."""
    return sum(-(-len(text.encode()) // TYPICAL_BYTES_PER_TOKEN) for text in texts)
