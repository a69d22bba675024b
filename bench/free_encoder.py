"""A worker process whose encoder costs nothing: what remains is the pipeline."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

from kdb_fast.child import enter_child
from kdb_fast.encoder import Encoder, EncoderSpec, Matrix, Tally
from kdb_fast.messages import Ready
from kdb_fast.slab import SlabHandle
from kdb_fast.worker import serve

from . import vectors


class FreeEncoder:
    """Takes the place of :class:`kdb_fast.encoder.Encoder`; a text's vector comes from its checksum."""

    def encode(self, texts: Sequence[str], out: Matrix) -> Tally:
        out[:] = vectors.of_texts(texts)
        tokens = len(texts)
        return Tally(tokens, tokens, 0)


def run(connection: Connection, slab: SlabHandle, spec: EncoderSpec, cpu: int | None, stderr: Any) -> None:
    """Entry point of the process, like :func:`kdb_fast.worker.run`."""
    started = time.monotonic()
    enter_child(stderr)
    if cpu is not None and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu})
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        attached = slab.attach()
        connection.send(Ready(time.monotonic() - started))
        serve(connection, attached, cast(Encoder, FreeEncoder()))
    os._exit(0)
