"""Rows → bytes of PostgreSQL's binary COPY format. Pure: no connection, no database.

Fields of one width are made for a whole slot at once, as the columns of a matrix of bytes; only where texts are among
the columns are rows joined one by one. Format: https://www.postgresql.org/docs/current/sql-copy.html (Binary Format),
and ``vector_recv`` of pgvector for the vector type: int16 dimensions, int16 unused, float4 × dimensions.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ...ipc.row_block import HASH_BYTES, NO_VALUE
from ..new_ids import new_ids

Matrix = npt.NDArray[np.uint8]
"""Fields of one width: a row of bytes for each row."""

Fields = bytes | Matrix | Sequence[bytes]
"""Ready fields of one column or of several: the same in every row, of one width, or a piece for each row."""

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


def timestamp_fields(microseconds: npt.NDArray[np.int64]) -> Fields:
    """:func:`timestamp_field` of each."""
    missing = microseconds == NO_VALUE
    if missing.all():
        return NULL
    fields = number_fields(microseconds - EPOCH_SHIFT, 8)
    if not missing.any():
        return fields
    return [NULL if no else field.tobytes() for no, field in zip(missing.tolist(), fields, strict=True)]


def number_fields(values: npt.NDArray[np.int64], size: int) -> Matrix:
    """:func:`int_field` of each; they must fit ``size`` bytes."""
    return sized(values.astype(f">i{size}").view(np.uint8).reshape(len(values), size))


def vector_fields(vectors: npt.NDArray[np.float32]) -> Matrix:
    """One pgvector value with its length for each row of a float32 matrix (rows × dimensions)."""
    n, d = vectors.shape
    packed = np.empty((n, 8 + 4 * d), dtype=np.uint8)
    packed[:, :8] = np.frombuffer(struct.pack(">ihh", 4 + 4 * d, d, 0), dtype=np.uint8)
    packed[:, 8:].view(">f4")[...] = vectors
    return packed


def vector_hashes(fields: Matrix) -> Matrix:
    """SHA-256 of each vector of :func:`vector_fields` as the server keeps and sends it (rows × 32)."""
    n, width = fields.shape
    raw, hashed = fields.reshape(-1).data, hashlib.sha256
    digests = [hashed(raw[start + 4 : start + width]).digest() for start in range(0, n * width, width)]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(n, HASH_BYTES)


def sized(values: Matrix) -> Matrix:
    """A field for each row of bytes: its length, and then itself."""
    n, width = values.shape
    fields = np.empty((n, 4 + width), dtype=np.uint8)
    fields[:, :4] = np.frombuffer(struct.pack(">i", width), dtype=np.uint8)
    fields[:, 4:] = values
    return fields


def id_fields(n: int) -> Matrix:
    """``n`` new ids (:func:`~kdb_fast.stores.new_ids.new_ids`) as text values with their length."""
    return sized(new_ids(n))


def pack_rows(columns: int, parts: Sequence[Fields], n: int) -> bytes | memoryview:
    """Put ready fields side by side to COPY rows.

    Args:
        columns: Fields of a row.
        parts: In column order.
        n: Number of rows.
    """
    blocks: list[Sequence[bytes | memoryview]] = []
    aligned: list[bytes | Matrix] = [struct.pack(">h", columns)]
    for part in parts:
        if isinstance(part, bytes | np.ndarray):
            aligned.append(part)
            continue
        if aligned:
            blocks.append(_pieces(_side_by_side(aligned, n)))
        blocks.append(part)
        aligned = []
    if not blocks:
        return _side_by_side(aligned, n).reshape(-1).data
    if aligned:
        blocks.append(_pieces(_side_by_side(aligned, n)))
    return b"".join([piece for row in zip(*blocks, strict=True) for piece in row])


def _side_by_side(parts: Sequence[bytes | Matrix], n: int) -> Matrix:
    same = [np.frombuffer(part, dtype=np.uint8) if isinstance(part, bytes) else part for part in parts]
    return np.concatenate([part if part.ndim > 1 else np.broadcast_to(part, (n, len(part))) for part in same], axis=1)


def _pieces(rows: Matrix) -> list[memoryview]:
    """The bytes of each row."""
    n, width = rows.shape
    raw = rows.reshape(-1).data
    return [raw[start : start + width] for start in range(0, n * width, width)]
