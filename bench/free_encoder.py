"""A worker process whose encoder costs nothing: what remains is the pipeline."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, cast
from zlib import crc32

import numpy as np

from kdb_fast.embedding.encoder import Encoder, EncoderSpec, Matrix, Tally
from kdb_fast.engine.worker import serve
from kdb_fast.ipc.child import enter_child
from kdb_fast.ipc.messages import Ready
from kdb_fast.ipc.slab import SlabHandle

from . import vectors

ROWS = 4096
"""Of the table: 6 MB, made before the worker says that it is ready."""


class FreeEncoder:
    """Takes the place of :class:`~kdb_fast.embedding.encoder.Encoder`; a text's checksum names its row in a table."""

    def __init__(self) -> None:
        self._table = vectors.from_hashes(np.arange(ROWS, dtype=np.uint32) * np.uint32(2_654_435_761))

    def encode(self, texts: Sequence[str], out: Matrix) -> Tally:
        rows = np.fromiter((crc32(text.encode()) % ROWS for text in texts), dtype=np.intp, count=len(texts))
        np.take(self._table, rows, axis=0, out=out)
        tokens = len(texts)
        return Tally(tokens, tokens, 0)


class DistinctEncoder:
    """Every text has a vector of its own, for a tenth of a millisecond: an index of vectors keeps equal ones once."""

    def encode(self, texts: Sequence[str], out: Matrix) -> Tally:
        out[:] = vectors.of_texts(texts)
        return Tally(len(texts), len(texts), 0)


def run(
    connection: Connection,
    slab: SlabHandle,
    spec: EncoderSpec,
    cpu: int | None,
    stderr: Any,
    encoder_class: type[FreeEncoder | DistinctEncoder] = FreeEncoder,
) -> None:
    """Entry point of the process, like :func:`kdb_fast.engine.worker.run`."""
    started = time.monotonic()
    enter_child(stderr)
    if cpu is not None and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu})
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        attached, encoder = slab.attach(), encoder_class()
        connection.send(Ready(time.monotonic() - started))
        serve(connection, attached, cast(Encoder, encoder))
    os._exit(0)
