"""Vectors → JSON text, many at once.

KameleonDB keeps a vector on SQLite as JSON text. ``json.dumps`` formats 3,000 vectors of 384 numbers a
second; here each number is 12 bytes of fixed width, made of three 4-byte words that come from NumPy tables::

    , 0.12345678,-0.00000123
    └┬─┘└┬─┘└┬─┘
     │   │   └ last four digits
     │   └ first four digits
     └ separator, sign (a space is legal JSON white space), "0."
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SCALE = 100_000_000
"""Eight decimals: the rounding error of 5e-9 is a tenth of what float32 loses next to 1."""

BLOCK_NUMBERS = 16_384
"""Numbers formatted at a time: the temporary arrays, about 0.5 MB, stay in the level 2 cache."""


def _word(text: bytes) -> np.uint32:
    return np.uint32(np.frombuffer(text, dtype=np.uint32)[0])


_DIGITS = np.frombuffer("".join(f"{i:04d}" for i in range(10_000)).encode(), dtype=np.uint32)
_PLUS, _MINUS, _END = _word(b", 0."), _word(b",-0."), _word(b"]   ")
_OPEN = ord("[")


def json_vectors(matrix: npt.NDArray[np.float32]) -> list[str]:
    """One JSON array of numbers for each row of a float32 matrix (rows × dimensions).

    Rows whose numbers are all within -1 and 1 (exclusive) have eight decimals, so they are within 5.1e-9 of
    the vector. Any other row is written exactly, and much more slowly.

    Raises:
        ValueError: A number is NaN or infinite, which JSON cannot hold.
    """
    rows, dimensions = matrix.shape
    if dimensions == 0:
        return ["[]"] * rows
    result: list[str] = []
    step = max(1, BLOCK_NUMBERS // dimensions)
    for start in range(0, rows, step):
        result += _format_block(np.ascontiguousarray(matrix[start : start + step], dtype=np.float32))
    return result


def _format_block(block: npt.NDArray[np.float32]) -> list[str]:
    rows, dimensions = block.shape
    size = np.abs(block)
    largest = size.max(axis=1)
    # NaN fails this comparison too.
    if not (largest < 1).all():
        return _format_mixed(block, largest)
    scaled = np.multiply(size, SCALE, dtype=np.float64)
    scaled += 0.5
    units = scaled.astype(np.int32)
    high = units // 10_000
    units -= high * 10_000
    text = np.empty((rows, 3 * dimensions + 1), dtype=np.uint32)
    words = text[:, :-1].reshape(rows, dimensions, 3)
    sign = block.view(np.uint32) >> 31
    sign *= _PLUS ^ _MINUS
    np.bitwise_xor(sign, _PLUS, out=words[:, :, 0])
    # The numbers are in range; "clip" spares the look for those that are not, which costs as much as the rest of it.
    words[:, :, 1] = np.take(_DIGITS, high, mode="clip")
    words[:, :, 2] = np.take(_DIGITS, units, mode="clip")
    text[:, -1] = _END
    raw = text.view(np.uint8)
    raw[:, 0] = _OPEN
    width = raw.shape[1]
    data = raw.reshape(-1).data
    return [str(data[i * width : (i + 1) * width - 3], "ascii") for i in range(rows)]


def _format_mixed(block: npt.NDArray[np.float32], largest: npt.NDArray[np.float32]) -> list[str]:
    if not np.isfinite(largest).all():
        raise ValueError("a vector holds NaN or infinity, which JSON cannot hold")
    result = [""] * len(block)
    small = np.flatnonzero(largest < 1)
    if len(small):
        for i, text in zip(small.tolist(), _format_block(block[small]), strict=True):
            result[i] = text
    for i in np.flatnonzero(largest >= 1).tolist():
        result[i] = "[" + ", ".join(map(repr, block[i].tolist())) + "]"
    return result
