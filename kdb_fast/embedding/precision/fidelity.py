"""How close a lower precision comes to fp32 on a user's own records."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...receipt import NEIGHBOURS, Fidelity
from ..encoder import Encoder

Matrix = npt.NDArray[np.float32]

QUERIES = 200
"""Records used as queries, in fp32; each is looked up among all others of the sample."""


def measure(exact: Encoder, lower: Encoder, texts: Sequence[str]) -> Fidelity:
    """Embed ``texts`` with both encoders and compare. There must be more than 10, no two of them equal.

    Both take turns in eight parts, after one part to warm up, so that a machine that slows down meanwhile slows down
    both.
    """
    parts = [list(texts[i::8]) for i in range(min(8, len(texts)))]
    seconds = [0.0, 0.0]
    results: list[list[Matrix]] = [[], []]
    for encoder in (exact, lower):
        encoder.embed(parts[0])
    for part in parts:
        for which, encoder in enumerate((exact, lower)):
            started = time.process_time()
            results[which].append(encoder.embed(part))
            seconds[which] += time.process_time() - started
    first, second = unit(np.concatenate(results[0])), unit(np.concatenate(results[1]))
    cosines = np.einsum("ij,ij->i", first, second)
    return Fidelity(
        len(texts),
        float(cosines.mean()),
        float(cosines.min()),
        overlap(first[:QUERIES], first, second),
        seconds[0] / max(seconds[1], 1e-9),
    )


def overlap(queries: Matrix, first: Matrix, second: Matrix) -> float:
    """Mean share of each query's nearest rows of ``first`` that are nearest in ``second`` too.

    All float32 [rows, dimensions], unit rows; query i is row i, and is left out of its own neighbours.
    """
    k = min(NEIGHBOURS, len(first) - 1)
    own = np.arange(len(queries))
    sets = []
    for matrix in (first, second):
        scores = queries @ matrix.T
        scores[own, own] = -np.inf
        sets.append(np.argpartition(-scores, k - 1, axis=1)[:, :k])
    shared = [len(np.intersect1d(a, b)) for a, b in zip(*sets, strict=True)]
    return float(np.mean(shared)) / k


def unit(matrix: Matrix) -> Matrix:
    """Rows scaled to length 1."""
    result: Matrix = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    return result
