"""Texts → requests that the embeddings API takes: checked, cut, within the limits. Pure functions."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from ..texts import PACKED_BYTES_PER_TOKEN, why_unfit

MAX_INPUTS = 2048
"""Most inputs of a request, from OpenAI's reference."""

MAX_REQUEST_TOKENS = 300_000
"""Most tokens of all inputs of a request, from OpenAI's reference."""

MAX_INPUT_TOKENS = 8191
"""Most tokens of an input. OpenAI's reference says 8,192, the page of the models 8,191."""

CUT_BYTES_PER_TOKEN = (4, 2, 1)
"""An input is cut to this many UTF-8 bytes a token of the window, to the next only if the API refused the one before:
English, then nearly anything, then whatever there is (a token of a byte-level vocabulary is never less than a byte).
Where a text is cut depends on that text alone, not on its neighbours or on what was sent before."""

LEAST_CUT_BYTES = 64
"""A text of which the server refuses so little is refused for another reason than its length."""


class Input(NamedTuple):
    """A text on its way into a request, and the row of its vector; ``cut`` if some of it was left out."""

    row: int
    text: str
    cut: bool = False


def why_refused(text: object) -> str | None:
    """:func:`~kdb_fast.embedding.providers.texts.why_unfit`, and what the API refuses for certain: an empty text."""
    return "it is empty, which the API refuses" if text == "" else why_unfit(text)


def pack(
    texts: Sequence[str],
    leave_out: Container[int],
    *,
    max_inputs: int = MAX_INPUTS,
    max_input_tokens: int = MAX_INPUT_TOKENS,
) -> Iterator[list[Input]]:
    """Requests within the limits of inputs and tokens, in order, without the rows in ``leave_out``."""
    request: list[Input] = []
    tokens = 0
    for row, text in enumerate(texts):
        if row in leave_out:
            continue
        kept = cut_bytes(text, CUT_BYTES_PER_TOKEN[0] * max_input_tokens)
        need = min(max_input_tokens, -(-len(kept.encode()) // PACKED_BYTES_PER_TOKEN))
        if request and (len(request) == max_inputs or tokens + need > MAX_REQUEST_TOKENS):
            yield request
            request, tokens = [], 0
        request.append(Input(row, kept, kept != text))
        tokens += need
    if request:
        yield request


def shorter(text: str, max_input_tokens: int, *, too_long: bool = False) -> str | None:
    """``text`` cut to the next length to try; None where its length cannot be what the API refuses.

    Args:
        too_long: The server says that it is the length, and its window is smaller than ``max_input_tokens``: after one
            byte a token come half of that, a quarter and so on.
    """
    size = len(text.encode())
    limits = [factor * max_input_tokens for factor in CUT_BYTES_PER_TOKEN]
    while too_long and limits[-1] // 2 >= LEAST_CUT_BYTES:
        limits.append(limits[-1] // 2)
    return next((cut_bytes(text, limit) for limit in limits if limit < size), "") or None


def cut_bytes(text: str, limit: int) -> str:
    """The start of ``text`` that has at most ``limit`` UTF-8 bytes, whole characters only."""
    if len(text) * 4 <= limit:
        return text
    raw = text[:limit].encode()
    return text if len(raw) <= limit and len(text) <= limit else raw[:limit].decode(errors="ignore")
