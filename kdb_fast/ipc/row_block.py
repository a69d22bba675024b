"""Rows with their vectors, as pipeline, pools and stores hand them on, wherever their memory lies."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

NO_VALUE = -(2**63)
"""In the place of a version that the index does not have, or of a moment that the source does not say."""

HASH_BYTES = 32
"""Of a SHA-256."""

ROW_OK = 0
ROW_REASONS = {
    1: ("not_finite", "the model gave a vector with NaN or infinity"),
    2: ("zero_vector", "the model gave a vector of zeros, which no cosine index can hold"),
    3: ("not_encodable", "the tokenizer or the model refused the text"),
    4: ("worker_died", "the text ended its embedding process each time it was tried"),
}
ROW_NOT_FINITE, ROW_ZERO, ROW_NOT_ENCODABLE, ROW_WORKER_DIED = 1, 2, 3, 4


class RowBlock(Protocol):
    """Some rows: the parent puts them in, one worker after the other gives them vectors, the store writes them.

    Whose turn it is says the owner of the block (:mod:`kdb_fast.indexing.leases`); nothing here locks. A slot of the
    slab is one kind, :class:`~kdb_fast.ipc.slab.Slot`; others inherit what is written out here. Arrays may be longer
    than there are rows.

    Attributes:
        number: By which messages and results name the block.
        code: 0 = the row is fit, else why it is not (ROW_REASONS); uint8.
        exists: 1 = the index has a row for this key, as far as the parent saw; uint8.
        row_version: That row's version as the parent saw it, or NO_VALUE; int64.
        source_at: Last change of the record at its source, in µs since 1970 UTC, or NO_VALUE; int64.
        hashes: SHA-256 of the content of each row; rows × HASH_BYTES, uint8.
        vectors: Rows × dimensions, float32.
    """

    number: int
    code: npt.NDArray[np.uint8]
    exists: npt.NDArray[np.uint8]
    row_version: npt.NDArray[np.int64]
    source_at: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint8]
    vectors: npt.NDArray[np.float32]

    @property
    def lease(self) -> int:
        """Number of this use of the block."""

    @property
    def rows(self) -> int:
        """How many."""

    def contents(self, start: int, stop: int) -> list[str]:
        """The texts of rows ``start`` to ``stop`` (exclusive)."""

    def raw_rows(self) -> list[tuple[bytes, bytes]]:
        """Key, as :func:`~kdb_fast.records.encode_key` gives it, and content (UTF-8) of every row."""

    def refuse(self, row: int, code: int) -> None:
        """The row gets no vector, for the reason of ``code``."""
        self.vectors[row] = 0
        self.code[row] = code

    def mark_unfit(self, start: int, stop: int) -> None:
        """Give a code to rows ``start`` to ``stop`` whose vector says nothing, unless they have one already."""
        vectors, code = self.vectors[start:stop], self.code[start:stop]
        unmarked = code == ROW_OK
        code[unmarked & ~np.isfinite(vectors).all(axis=1)] = ROW_NOT_FINITE
        code[unmarked & ~vectors.any(axis=1)] = ROW_ZERO

    def checksum(self, start: int = 0, stop: int | None = None) -> int:
        """CRC-32 of the vectors of rows ``start`` to ``stop``, or of all rows."""
        return zlib.crc32(self.vectors[start : self.rows if stop is None else stop].data.cast("B"))
