"""An embedding process for tests: kdb-fast's own, but for the model. It is ready in a moment.

It lies in a module of its own, which the spawned process imports. Words in a text make it misbehave.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from kdb_fast import worker
from kdb_fast.encoder import EncoderSpec, Tally
from kdb_fast.slab import SlabHandle

DEADLY = "deadly"
SLOW = "slow"
SLOW_SECONDS = 1.0


def vector_of(text: str, dimensions: int = 384) -> npt.NDArray[np.float32]:
    """A unit vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32)
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


class StubEncoder:
    """Stands for a model. A text with the word "deadly" ends the process, as a fault in native code does."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.dimensions = spec.model.dimensions

    def self_test(self) -> None:
        pass

    def encode(self, texts: Sequence[str], out: npt.NDArray[np.float32]) -> Tally:
        for i, text in enumerate(texts):
            if DEADLY in text:
                os.kill(os.getpid(), signal.SIGKILL)
            if SLOW in text:
                time.sleep(SLOW_SECONDS)
            out[i] = vector_of(text, self.dimensions)
        return Tally(len(texts), len(texts), 0)


def run(connection: Connection, slab: SlabHandle, spec: EncoderSpec, cpu: int | None, stderr: Any) -> None:
    """Entry point of the process."""
    worker.Encoder = StubEncoder  # type: ignore[assignment, misc]
    worker.run(connection, slab, spec, cpu, stderr)
