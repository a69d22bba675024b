"""Rows → bytes of PostgreSQL's binary COPY format. Pure: no connection, no database.

Vectors are turned to network byte order in one NumPy operation for a whole slot; per row only ready
pieces are joined. Format: https://www.postgresql.org/docs/current/sql-copy.html (Binary Format), and
``vector_recv`` of pgvector for the vector type: int16 dimensions, int16 unused, float4 × dimensions.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..slab import NO_STAMP

SIGNATURE = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
TRAILER = struct.pack(">h", -1)
NULL = struct.pack(">i", -1)

_HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), dtype=np.uint16)
"""The two digits of each byte."""
_UUID_GROUPS = ((4, 0, 8), (13, 8, 4), (18, 12, 4), (23, 16, 4), (28, 20, 12))
"""Of a UUID's text after its 4 bytes of length: where a group of digits is put, the first digit, how many."""

EPOCH_SHIFT = 946_684_800_000_000
"""Microseconds from 1970-01-01 to 2000-01-01: PostgreSQL's binary timestamps count from 2000."""


def text_field(value: str | bytes) -> bytes:
    """A text or varchar value with its length."""
    raw = value.encode() if isinstance(value, str) else value
    return len(raw).to_bytes(4, "big") + raw


def int_field(value: int, size: int) -> bytes:
    """An int2 (``size`` 2), int4 (4) or int8 (8) value with its length."""
    return struct.pack(">i", size) + value.to_bytes(size, "big", signed=True)


def timestamp_field(microseconds: int) -> bytes:
    """A timestamptz from microseconds since 1970 UTC; NO_STAMP is NULL."""
    return NULL if microseconds == NO_STAMP else struct.pack(">iq", 8, microseconds - EPOCH_SHIFT)


def timestamp_fields(microseconds: npt.NDArray[np.int64]) -> list[bytes]:
    """:func:`timestamp_field` of each; consecutive equal values are packed once."""
    result: list[bytes] = []
    last, packed = None, b""
    for value in microseconds.tolist():
        if value != last:
            last, packed = value, timestamp_field(value)
        result.append(packed)
    return result


def vector_fields(vectors: npt.NDArray[np.float32]) -> list[memoryview]:
    """One pgvector value with its length for each row of a float32 matrix (rows × dimensions)."""
    n, d = vectors.shape
    width = 8 + 4 * d
    packed = np.empty((n, width), dtype=np.uint8)
    packed[:, :8] = np.frombuffer(struct.pack(">ihh", 4 + 4 * d, d, 0), dtype=np.uint8)
    packed[:, 8:].view(">f4")[...] = vectors
    view = packed.reshape(-1).data
    return [view[i * width : (i + 1) * width] for i in range(n)]


def uuid4_fields(n: int) -> list[bytes]:
    """``n`` random version-4 UUIDs as 36-character text values with their length."""
    raw = np.frombuffer(os.urandom(16 * n), dtype=np.uint8).reshape(n, 16).copy()
    raw[:, 6] = (raw[:, 6] & 0x0F) | 0x40
    raw[:, 8] = (raw[:, 8] & 0x3F) | 0x80
    digits = _HEX[raw].view(np.uint8)
    fields = np.full((n, 40), ord("-"), dtype=np.uint8)
    fields[:, :4] = np.frombuffer(struct.pack(">i", 36), dtype=np.uint8)
    for at, start, count in _UUID_GROUPS:
        fields[:, at : at + count] = digits[:, start : start + count]
    packed = fields.tobytes()
    return [packed[i : i + 40] for i in range(0, 40 * n, 40)]


def pack_rows(columns: int, parts: Sequence[Sequence[bytes | memoryview] | bytes], n: int) -> bytes:
    """Join ready fields to COPY rows.

    Args:
        columns: Fields of a row.
        parts: In column order; each a sequence with one piece a row, or bytes that are the same in every row.
            A piece may hold several fields.
        n: Number of rows.
    """
    head = struct.pack(">h", columns)
    lists = [[part] * n if isinstance(part, bytes) else part for part in parts]
    return b"".join([piece for row in zip([head] * n, *lists, strict=True) for piece in row])
