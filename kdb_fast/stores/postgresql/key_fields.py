"""Keys, which travel as text, as the binary values of their columns' types, for COPY straight into a table."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence

from . import pgcopy

Fields = Callable[[Sequence[bytes]], list[bytes]]
"""Values as text → fields of COPY, with their length. Raises NotInBinaryError where one is none of the type."""

UUID_DIGITS = 32


class NotInBinaryError(Exception):
    """A key that has no binary form: the server is to read it."""


def key_fields(type_name: str) -> Fields | None:
    """What makes the values of a type; None for a type whose text the server is to read.

    Args:
        type_name: As ``format_type()`` gives it, without a modifier.
    """
    return FIELDS.get(type_name)


def _integers(values: Sequence[bytes], layout: struct.Struct, size: int) -> list[bytes]:
    try:
        return [layout.pack(size, int(value)) for value in values]
    except (ValueError, struct.error):
        raise NotInBinaryError from None


def _uuids(values: Sequence[bytes]) -> list[bytes]:
    try:
        fields = [pgcopy.text_field(bytes.fromhex(value.decode().replace("-", ""))) for value in values]
    except ValueError:
        raise NotInBinaryError from None
    if any(len(field) != 4 + UUID_DIGITS // 2 for field in fields):
        raise NotInBinaryError
    return fields


FIELDS: dict[str, Fields] = {
    "smallint": functools.partial(_integers, layout=struct.Struct(">ih"), size=2),
    "integer": functools.partial(_integers, layout=struct.Struct(">ii"), size=4),
    "bigint": functools.partial(_integers, layout=struct.Struct(">iq"), size=8),
    "uuid": _uuids,
    "text": pgcopy.text_fields,
    "character varying": pgcopy.text_fields,
    "character": pgcopy.text_fields,
}
"""A text's binary form is the text. Others (dates, numbers with decimals, enumerations, domains) are rare as keys."""
