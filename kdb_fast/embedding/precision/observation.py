"""What calibration texts show of a model's activations, in one pass over them on all CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoder import Batch
from .onnx_graph import OnnxGraph
from .onnx_session import open_session
from .quantised_weights import Floats

ROWS = 512
"""Tokens of an activation that are kept, on which exponents are tried. 1,024 gave the same cosines."""


BLOCK_ROWS = 1024
"""Tokens whose second moments are taken at once, about: of 1,536 channels 34 ms, as for 512."""


class Observed:
    """Of one activation: extremes and second moments of its channels, and some of its tokens (float32, about ROWS)."""

    def __init__(self, channels: int) -> None:
        self.low, self.high = np.zeros((2, channels), np.float32)
        self.moments: Floats = np.zeros((channels, channels), np.float32)
        self.rows: Floats = np.zeros((0, channels), np.float32)
        self._waiting: list[Floats] = []

    def see(self, tokens: Floats, some: Floats) -> None:
        """Take note of tokens, of which some are kept. All are part of the moments after :meth:`sum_up`."""
        self._extend(tokens.min(axis=0), tokens.max(axis=0), some)
        self._waiting.append(tokens)
        if sum(map(len, self._waiting)) >= BLOCK_ROWS:
            self.sum_up()

    def sum_up(self) -> None:
        """Bring the moments up to date."""
        if self._waiting:
            tokens = np.concatenate(self._waiting)
            self.moments += tokens.T @ tokens
            self._waiting = []

    def add(self, other: Observed) -> None:
        """Take note of what another was shown."""
        self._extend(other.low, other.high, other.rows)
        self.moments += other.moments

    def _extend(self, low: Floats, high: Floats, rows: Floats) -> None:
        np.minimum(self.low, low, out=self.low)
        np.maximum(self.high, high, out=self.high)
        self.rows = np.concatenate([self.rows, rows])

    def select(self, index: npt.NDArray[np.intp]) -> None:
        """Let the channels be those of these numbers."""
        self.low, self.high, self.rows = self.low[index], self.high[index], self.rows[:, index]
        self.moments = self.moments[np.ix_(index, index)]


def observe(graph: OnnxGraph, channels: dict[str, int], batches: Sequence[Batch], threads: int) -> dict[str, Observed]:
    """Run the texts in fp32.

    Args:
        graph: The model.
        channels: Names of activations of shape [texts, tokens, channels], with their channels.
        batches: Texts as the model takes them.
        threads: Each runs a share of the texts, with statistics of its own.
    """
    session = open_session(graph.tapped(channels), 1, graph.directory, exact=True)
    # Counted through all texts: one of so many of each text would be its first token above all.
    every = max(1, count_tokens(batches) // ROWS)
    shares = [batches[start::threads] for start in range(min(threads, len(batches)))]
    with ThreadPoolExecutor(len(shares)) as pool:
        first, *others = pool.map(lambda share: _observe_share(session, channels, share, every), shares)
    for other in others:
        for name, found in other.items():
            first[name].add(found)
    return first


def count_tokens(batches: Sequence[Batch]) -> int:
    """Without padding."""
    return sum(int(mask.sum()) for _, mask in batches)


def _observe_share(session: Any, channels: dict[str, int], batches: Sequence[Batch], every: int) -> dict[str, Observed]:
    inputs = {node.name for node in session.get_inputs()}
    result = {name: Observed(count) for name, count in channels.items()}
    seen = 0
    for feed, mask in batches:
        outputs = session.run(list(channels), {name: feed[name] for name in inputs})
        real = mask != 0
        for observed, output in zip(result.values(), outputs, strict=True):
            tokens = output[real]
            observed.see(tokens, tokens[-seen % every :: every])
        seen += int(real.sum())
    for observed in result.values():
        observed.sum_up()
    return result
