"""An embedding process for tests: kdb-fast's own, but for the model. It is ready in a moment.

It lies in a module of its own, which the spawned process imports. Words in a text make it misbehave.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdb_fast.embedding.encoder import EncoderSpec, Tally
from kdb_fast.engine import worker
from kdb_fast.ipc.slab import SlabHandle

DEADLY = "deadly"
MORTAL = "mortal"
"""Ends the process as well, but once: if there is a file of this name in ``KDB_FAST_FAULT_DIR``, which it removes."""
GATED = "gated"
"""Is embedded only once there is a file "go" in ``KDB_FAST_FAULT_DIR``."""
SLOW = "slow"
SLOW_SECONDS = 1.0
EACH_SECONDS = "LC_STUB_SECONDS"
"""Environment variable: seconds that each text takes."""


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
        _note(texts)
        for i, text in enumerate(texts):
            time.sleep(float(os.environ.get(EACH_SECONDS, 0)))
            while GATED in text and not (_folder() / "go").exists():
                time.sleep(0.01)
            if DEADLY in text or (MORTAL in text and _first_death()):
                os.kill(os.getpid(), signal.SIGKILL)
            if SLOW in text:
                time.sleep(SLOW_SECONDS)
            out[i] = vector_of(text, self.dimensions)
        return Tally(len(texts), len(texts), 0)


def _folder() -> Path:
    return Path(os.environ.get("KDB_FAST_FAULT_DIR", os.devnull))


def _note(texts: Sequence[str]) -> None:
    """Write the last word of each text to the file "embedded", if there is one, after the process of the run."""
    with contextlib.suppress(OSError):
        file = os.open(_folder() / "embedded", os.O_WRONLY | os.O_APPEND)
        run = multiprocessing.parent_process()
        os.write(file, f"{run.pid if run else os.getpid()} {' '.join(text.split()[-1] for text in texts)}\n".encode())
        os.close(file)


def _first_death() -> bool:
    try:
        (_folder() / MORTAL).unlink()
    except OSError:
        return False
    return True


def run(connection: Connection, slab: SlabHandle, spec: EncoderSpec, cpu: int | None, stderr: Any) -> None:
    """Entry point of the process."""
    worker.Encoder = StubEncoder  # type: ignore[attr-defined, assignment]
    worker.run(connection, slab, spec, cpu, stderr)
