"""Rows → bytes of PostgreSQL's binary COPY format. Pure: no connection, no database.

Vectors are turned to network byte order in one NumPy operation for a whole slot; per row only ready
pieces are joined. Format: https://www.postgresql.org/docs/current/sql-copy.html (Binary Format), and
``vector_recv`` of pgvector for the vector type: int16 dimensions, int16 unused, float4 × dimensions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ...ipc.row_block import NO_VALUE
from ..new_ids import ID_CHARS, new_ids

SIGNATURE = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
TRAILER = struct.pack(">h", -1)
NULL = struct.pack(">i", -1)

EPOCH_SHIFT = 946_684_800_000_000
"""Microseconds from 1970-01-01 to 2000-01-01: PostgreSQL's binary timestamps count from 2000."""


def text_field(value: str | bytes) -> bytes:
    """A text or varchar value with its length."""
    raw = value.encode() if isinstance(value, str) else value
    return len(raw).to_bytes(4, "big") + raw


def text_fields(values: Iterable[bytes]) -> list[bytes]:
    """:func:`text_field` of each."""
    size = int.to_bytes
    return [size(len(value), 4, "big") + value for value in values]


def int_field(value: int, size: int) -> bytes:
    """An int2 (``size`` 2), int4 (4) or int8 (8) value with its length."""
    return struct.pack(">i", size) + value.to_bytes(size, "big", signed=True)


MINUS_INFINITY = -(2**63)
"""``-infinity`` in PostgreSQL's binary form; ``infinity`` is the greatest int64."""


def row_version(sent: bytes | None) -> int:
    """Version of a row from what ``timestamptz_send`` gives of its time; NO_VALUE for NULL.

    Microseconds since 2000, exactly, of any year and of infinity: Python's own type ends with the year 9999.
    """
    if sent is None:
        return NO_VALUE
    value = int.from_bytes(sent, "big", signed=True)
    return value if value != MINUS_INFINITY else value + 1  # which is before the first year of any timestamp


def version_fields(versions: npt.NDArray[np.int64]) -> list[bytes]:
    """The timestamptz that each version of a row (:func:`row_version`) stands for; NO_VALUE is NULL."""
    first = MINUS_INFINITY + 1
    return [
        NULL if value == NO_VALUE else struct.pack(">iq", 8, value if value != first else MINUS_INFINITY)
        for value in versions.tolist()
    ]


def timestamp_field(microseconds: int) -> bytes:
    """A timestamptz from microseconds since 1970 UTC; NO_VALUE is NULL."""
    return NULL if microseconds == NO_VALUE else struct.pack(">iq", 8, microseconds - EPOCH_SHIFT)


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


def id_fields(n: int) -> list[bytes]:
    """``n`` new ids (:func:`~kdb_fast.stores.new_ids.new_ids`) as text values with their length."""
    fields = np.empty((n, 4 + ID_CHARS), dtype=np.uint8)
    fields[:, :4] = np.frombuffer(struct.pack(">i", ID_CHARS), dtype=np.uint8)
    fields[:, 4:] = new_ids(n)
    packed = fields.tobytes()
    return [packed[i : i + 4 + ID_CHARS] for i in range(0, len(packed), 4 + ID_CHARS)]


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
