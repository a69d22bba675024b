"""ON A HOST ×N: embeds the texts that it is sent.

One model, one thread, one CPU, as :mod:`..worker`, whose functions these are; only its rows lie in memory of its own.
It knows nothing of a database, and it ends with the job of the cluster process, which also replaces it.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import numpy as np

from ...embedding.encoder import Encoder, EncoderSpec
from ...embedding.offline import import_for
from ...embedding.precision.support import missing_for
from ...ipc.messages import Embed, Embedded, Failed
from ...ipc.row_block import HASH_BYTES, ROW_OK, RowBlock
from ...resources import available_memory, collect_rarely, cpu_flags
from ..worker import embed_rows

INLINED_BYTES = 64 * 1024
"""Of a vector's bytes in one object. Ray sends objects below 100 KB with the answer; larger ones go through the host's
store, and cost the driver 1.3 ms a block instead of 0.65."""

Vectors = tuple[bytes, ...]


class Texts(RowBlock):
    """Rows that came over the network, and room for their vectors."""

    def __init__(self, order: Embed, texts: list[str], dimensions: int) -> None:
        self.number = order.slot
        self.code = np.full(len(texts), ROW_OK, dtype=np.uint8)
        self.vectors = np.zeros((len(texts), dimensions), dtype=np.float32)
        # What only the writer needs stays with the parent.
        self.exists = np.zeros(0, dtype=np.uint8)
        self.row_version = self.source_at = np.zeros(0, dtype=np.int64)
        self.hashes = np.zeros((0, HASH_BYTES), dtype=np.uint8)
        self._lease, self._texts = order.lease, texts

    @property
    def lease(self) -> int:
        return self._lease

    @property
    def rows(self) -> int:
        return len(self._texts)

    def contents(self, start: int, stop: int) -> list[str]:
        return self._texts[start:stop]

    def raw_rows(self) -> list[tuple[bytes, bytes]]:
        raise NotImplementedError("keys stay with the parent")


class Answer(NamedTuple):
    """What an actor says of an order: that it is done, with a code for each row, or that the actor cannot go on."""

    embedded: Embedded | None
    codes: bytes
    failed: Failed | None = None


class EmbeddingActor:
    """One encoder. No exception leaves it: Ray would log its text, which may quote a record.

    Args:
        spec: The encoder, with its files where this host has them.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        began = time.monotonic()
        collect_rarely()
        self._failed: Failed | None = None
        try:
            import_for(spec.model)
            self._encoder = Encoder(spec)
            self._encoder.self_test()
        except Exception as error:
            self._failed = Failed.of(error)
        self._dimensions = spec.model.dimensions
        self._seconds = time.monotonic() - began

    def ready(self) -> Failed | None:
        """None once it can embed, else why it never will."""
        return self._failed

    def embed(self, order: Embed, texts: list[str]) -> tuple[Answer | bytes, ...]:
        """Embed the texts of rows ``order.start`` to ``order.stop``.

        Returns:
            The answer, then the vectors, float32 row by row, in parts of INLINED_BYTES (:func:`parts`).
        """
        try:
            block = Texts(order, texts, self._dimensions)
            done = embed_rows(block, order._replace(start=0, stop=len(texts)), self._encoder)
            answer = Answer(done._replace(start=order.start, stop=order.stop), block.code.tobytes())
            raw = block.vectors.reshape(-1).data.cast("B")
        except Exception as error:
            answer = Answer(None, b"", Failed.of(error))
            raw = memoryview(bytes(4 * len(texts) * self._dimensions))
        return (answer, *(bytes(raw[at : at + INLINED_BYTES]) for at in range(0, len(raw), INLINED_BYTES)))


def parts(rows: int, dimensions: int) -> int:
    """How many objects :meth:`EmbeddingActor.embed` returns for so many rows."""
    return 1 + -(-4 * rows * dimensions // INLINED_BYTES)


class Means(NamedTuple):
    """What a host has to embed with: bytes of memory, and why its CPU cannot; '' if it can."""

    memory: int
    unfit: str
    pid: int


def means(spec: EncoderSpec) -> Means:
    """Of this host."""
    return Means(available_memory(), missing_for(spec, cpu_flags()), os.getpid())
