"""Keys, which travel as text, as the binary values of their columns' types, for COPY straight into a table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from . import pgcopy

MakeFields = Callable[[Sequence[bytes]], pgcopy.Fields]
"""Values as text → fields of COPY, with their length. Raises NotInBinaryError where one is none of the type."""

UUID_BYTES = 16


class NotInBinaryError(Exception):
    """A key that has no binary form: the server is to read it."""


def key_fields(type_name: str) -> MakeFields | None:
    """What makes the values of a type; None for a type whose text the server is to read.

    Args:
        type_name: As ``format_type()`` gives it, without a modifier.
    """
    return FIELDS.get(type_name)


def _integers(values: Sequence[bytes], size: int) -> pgcopy.Matrix:
    try:
        numbers = np.array([int(value) for value in values], dtype=np.int64)
    except (ValueError, OverflowError):
        raise NotInBinaryError from None
    if (numbers.astype(f"i{size}") != numbers).any():
        raise NotInBinaryError
    return pgcopy.number_fields(numbers, size)


def _uuids(values: Sequence[bytes]) -> pgcopy.Matrix:
    try:
        raw = [bytes.fromhex(value.decode().replace("-", "")) for value in values]
    except ValueError:
        raise NotInBinaryError from None
    if any(len(value) != UUID_BYTES for value in raw):
        raise NotInBinaryError
    return pgcopy.sized(np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(-1, UUID_BYTES))


FIELDS: dict[str, MakeFields] = {
    "smallint": functools.partial(_integers, size=2),
    "integer": functools.partial(_integers, size=4),
    "bigint": functools.partial(_integers, size=8),
    "uuid": _uuids,
    "text": pgcopy.text_fields,
    "character varying": pgcopy.text_fields,
    "character": pgcopy.text_fields,
}
"""A text's binary form is the text. Others (dates, numbers with decimals, enumerations, domains) are rare as keys."""
