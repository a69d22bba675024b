"""What an answer of the embeddings API says: vectors, a problem, how long to wait. Pure functions."""

from __future__ import annotations

import base64
import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ....errors import ModelError
from ...encoder import Matrix


class Problem(NamedTuple):
    """An answer other than 200. ``code`` is safe to show; ``param`` and ``message`` may quote what was sent."""

    status: int
    code: str
    param: str
    message: str

    def __str__(self) -> str:
        return f"HTTP {self.status}{f' ({self.code})' if self.code else ''}"


class OddAnswerError(Exception):
    """A 200 whose content is damaged.

    Attributes:
        vectors: How many vectors it has; None where that cannot be told.
    """

    def __init__(self, message: str, vectors: int | None = None) -> None:
        super().__init__(message)
        self.vectors = vectors


def decode(content: bytes, count: int, dimensions: int | None, model: str) -> tuple[Matrix, int]:
    """The vectors of a 200 in the order of the inputs, and the tokens that the server counted (0: it did not).

    Args:
        content: The body: vectors as base64 of little-endian float32, or as lists of numbers.
        count: Number of inputs.
        dimensions: Expected length of a vector; None takes that of the first.
        model: Its name, for messages.

    Returns:
        float32, count × dimensions, possibly with values that are not finite; and the tokens.

    Raises:
        OddAnswerError: It is damaged, or has not one vector for each input.
        ModelError: The vectors have another length.
    """
    out: Matrix | None = None
    try:
        body = json.loads(content)
        items = body["data"]
        rows = [item.get("index", position) for position, item in enumerate(items)]
        if sorted(rows) != list(range(count)):
            raise OddAnswerError(f"{len(rows)} vectors for {count} texts, or not one for each", len(rows))
        for row, item in zip(rows, items, strict=True):
            vector = _vector(item["embedding"])
            dimensions = vector.size if dimensions is None else dimensions
            if vector.shape != (dimensions,):
                raise ModelError(
                    f"{model} gave a vector of {vector.size} numbers; expected {dimensions}.",
                    remedy=f"For a new index set dimensions={vector.size} (--dimensions {vector.size}); one that holds "
                    f"vectors of {dimensions} needs a model that can give {dimensions}.",
                )
            if out is None:
                out = np.empty((count, dimensions), np.float32)
            out[row] = vector
        tokens = (body.get("usage") or {}).get("total_tokens")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise OddAnswerError(f"an answer that is no list of embeddings ({type(error).__name__})") from None
    if out is None:
        raise OddAnswerError("an answer without a vector")
    return out, tokens if isinstance(tokens, int) and tokens > 0 else 0


def _vector(values: object) -> Matrix:
    if isinstance(values, str):
        return np.frombuffer(base64.b64decode(values, validate=True), "<f4").astype(np.float32)
    if not isinstance(values, list) or not values:
        raise TypeError
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is found by the check for that
        return np.asarray(values, np.float64).astype(np.float32)


def read_problem(status: int, content: bytes) -> Problem:
    """What an answer other than a list of embeddings says, in OpenAI's form, vLLM's, FastAPI's, a plain text or none.

    Ollama, llama.cpp and vLLM have OpenAI's ``{"error": {"message": …}}``, older vLLM and text-embeddings-inference the
    same without ``error``, LM Studio ``{"error": "…"}``.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = {}
    error: Any = body.get("error", body) if isinstance(body, dict) else {}
    if not isinstance(error, dict):
        error = {"message": error}
    codes = (error.get("code"), error.get("type"))
    code = next((value for value in codes if isinstance(value, str) and _CODE.fullmatch(value)), "")
    message = error.get("message") or error.get("detail") or ""
    return Problem(status, code, str(error.get("param") or ""), message if isinstance(message, str) else str(message))


_WINDOW = re.compile(
    r"context length (?:is|of) (\d+)|must have less than (\d+) tokens|current batch size: (\d+)|"
    r"context size \((\d+)|\"?n_ctx\"?: ?(\d+)|maximum (?:of )?(\d+) tokens"
)
_BATCH = re.compile(r"maximum (?:allowed )?batch size (?:of )?(\d+)|at most (\d+) inputs", re.IGNORECASE)
_LENGTH = re.compile(
    r"too (?:long|large|big|many tokens)|exceeds?\b.{0,40}\b(?:context|length|size|tokens|maximum)|"
    r"context.?(?:length|size)|must have less than \d+ tokens|maximum .{0,20}tokens",
    re.IGNORECASE,
)


def named_window(problem: Problem) -> int | None:
    """Tokens of an input that the server says it can read, if it says so."""
    return _first_number(_WINDOW.search(problem.message))


def named_batch(problem: Problem) -> int | None:
    """Inputs of a request that the server says it takes, if it says so."""
    return _first_number(_BATCH.search(problem.message))


def speaks_of_length(problem: Problem) -> bool:
    """Whether a text, or the whole request, is too long for the server."""
    return problem.status == 413 or bool(_LENGTH.search(f"{problem.code} {problem.message}".replace("_", " ")))


def _first_number(found: re.Match[str] | None) -> int | None:
    number = next((int(group) for group in found.groups() if group), 0) if found else 0
    return number or None


_CODE = re.compile(r"[A-Za-z_.-][A-Za-z0-9_.-]{0,63}")

_RATED = ("requests", "tokens")


def server_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, or None. Names in ``headers`` are in lower case.

    ``retry-after-ms`` comes first, then ``retry-after`` (seconds, or a date that is read against the server's own
    ``date``), then the time until a used-up limit is whole again (``x-ratelimit-reset-*``).
    """
    after = headers.get("retry-after")
    hints = [_scaled(headers.get("retry-after-ms"), 0.001), _scaled(after, 1.0), _until(after, headers.get("date"))]
    limits = [(headers.get(f"x-ratelimit-remaining-{k}"), headers.get(f"x-ratelimit-reset-{k}", "")) for k in _RATED]
    used_up = [reset for remaining, reset in limits if remaining == "0"] or [reset for _, reset in limits]
    hints.append(max(duration(reset) or 0.0 for reset in used_up))
    return next((hint for hint in hints if hint is not None and hint > 0), None)


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float | None:
    """Seconds of ``1s``, ``6m0s`` or ``12ms``; None for anything else."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _scaled(text: str | None, factor: float) -> float | None:
    try:
        value = float(text or "") * factor
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _until(text: str | None, now: str | None) -> float | None:
    try:
        start = email.utils.parsedate_to_datetime(now).timestamp() if now else time.time()
        return email.utils.parsedate_to_datetime(text or "").timestamp() - start
    except (ValueError, TypeError, OverflowError):
        return None
