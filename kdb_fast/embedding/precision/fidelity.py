"""How close a lower precision comes to fp32 on a user's own records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from ...receipt import NEIGHBOURS, Fidelity
from ..encoder import Encoder

Matrix = npt.NDArray[np.float32]

QUERIES = 200
"""Records used as queries, in fp32; each is looked up among all others of the sample."""


PART = 32
"""Records embedded by one call, of like length as a worker's are."""

TIMED = 8
"""Of so many parts one is timed: 64 contacts or 32 tickets, 0.3 to 0.5 s in fp32. ``auto`` only has to tell twice as
fast from no faster."""


def compare(exact: Encoder, make_lower: Callable[[], Encoder], texts: Sequence[str]) -> Fidelity:
    """Embed ``texts`` with two encoders and compare. There must be more than 10 texts, no two of them equal.

    Args:
        exact: In fp32.
        make_lower: Makes the other encoder; called while a thread embeds with ``exact``.
        texts: None of those that the other was calibrated on.
    """
    order = np.array(sorted(range(len(texts)), key=lambda i: len(texts[i])))
    parts = np.split(order, range(PART, len(order), PART))
    middle = len(parts) // 2 % TIMED
    timed = parts[middle::TIMED]
    others = [part for number, part in enumerate(parts) if number % TIMED != middle]
    first, second = np.empty((2, len(texts), exact.dimensions), np.float32)

    def embed(encoder: Encoder, part: npt.NDArray[np.intp], into: Matrix) -> float:
        started = time.process_time()
        into[part] = encoder.embed([texts[i] for i in part])
        return time.process_time() - started

    with ThreadPoolExecutor(1) as beside:
        ahead = [beside.submit(embed, exact, part, first) for part in others]
        try:
            lower = make_lower()
            for part in parts:
                embed(lower, part, second)
            for part, waiting in zip(others[::-1], ahead[::-1], strict=True):
                if waiting.cancel():  # it was not begun
                    embed(exact, part, first)
                else:
                    waiting.result()
        finally:
            beside.shutdown(cancel_futures=True)
    # In turn, so that a machine that slows down meanwhile slows down both. Nothing else runs in this process any more,
    # and what a kernel costs the first time is behind.
    seconds = np.sum([(embed(exact, part, first), embed(lower, part, second)) for part in timed], axis=0)
    first, second = unit(first), unit(second)
    cosines = np.einsum("ij,ij->i", first, second)
    return Fidelity(
        len(texts),
        float(cosines.mean()),
        float(cosines.min()),
        overlap(first[:QUERIES], first, second),
        float(seconds[0] / max(seconds[1], 1e-9)),
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
