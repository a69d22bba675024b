"""Vectors that cost next to nothing, for measurements in which the encoder has no part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from zlib import crc32

import numpy as np
import numpy.typing as npt

from .database import DIMENSIONS

Matrix = npt.NDArray[np.float32]

BASES = 1024
WEIGHTS = np.array([1.0, 0.6, 0.4], dtype=np.float32)
"""Each vector is a weighted mean of three of BASES random directions: neighbours share the first, and a search
index finds clusters in them as it does in vectors of text. (Wholly random vectors have no neighbours.)"""


@cache
def _bases() -> Matrix:
    bases = np.random.default_rng(7).standard_normal((BASES, DIMENSIONS)).astype(np.float32)
    return _unit(bases)


def from_hashes(hashes: npt.NDArray[np.uint32]) -> Matrix:
    """Unit vectors (float32, hashes × 384), nearly all distinct, the same for the same hash."""
    bases = _bases()
    parts = [bases[(hashes >> np.uint32(shift)) % BASES] for shift in (0, 10, 20)]
    return _unit(np.tensordot(WEIGHTS, np.stack(parts), 1))


def _unit(matrix: Matrix) -> Matrix:
    result: Matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32, copy=False)
    return result


def of_texts(texts: Sequence[str]) -> Matrix:
    """A vector for each text, from its checksum."""
    return from_hashes(np.fromiter((crc32(t.encode()) for t in texts), dtype=np.uint32, count=len(texts)))
