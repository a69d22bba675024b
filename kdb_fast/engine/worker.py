"""PROCESS ×N: embeds the rows that the parent names, in the slab.

One FastEmbed model, one thread, one CPU; no database credential reaches it. It ends when told to, when its
pipe closes, or within a second of its parent's death.
"""

from __future__ import annotations

import contextlib
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from ..embedding.encoder import Encoder, EncoderSpec, Tally, is_memory_error, memory_ran_out
from ..embedding.offline import import_for
from ..errors import ModelError
from ..faults import fault
from ..ipc.child import enter_child
from ..ipc.messages import Embed, Embedded, Failed, Ready, Stop
from ..ipc.row_block import ROW_NOT_ENCODABLE, RowBlock
from ..ipc.slab import Slab, SlabHandle


def run(connection: Connection, slab: SlabHandle, spec: EncoderSpec, cpu: int | None, stderr: Any) -> None:
    """Entry point of the process.

    Args:
        connection: This worker's own pipe to the parent.
        slab: The shared memory.
        spec: The model and how to run it.
        cpu: CPU to stay on, or None.
        stderr: A file descriptor holder for what libraries print; shown only if the process dies.
    """
    started = time.monotonic()
    enter_child(stderr)
    if cpu is not None and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu})
    try:
        fault("worker.start")
        attached = slab.attach()
        import_for(spec.model)
        encoder = Encoder(spec)
        encoder.self_test()
        fault("worker.ready")
        connection.send(Ready(time.monotonic() - started))
        serve(connection, attached, encoder)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent closed the pipe: it has no more use for us
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(Failed.of(error))
        os._exit(1)
    # Skip the destructors of ONNX Runtime and the mapping: they have nothing to save and can only fail.
    os._exit(0)


def serve(connection: Connection, slab: Slab, encoder: Encoder) -> None:
    """Answer every Embed until Stop."""
    while True:
        message = connection.recv()
        if isinstance(message, Stop):
            return
        fault("worker.received")
        answer = embed_rows(slab.slots[message.slot], message, encoder)
        fault("worker.encoded")
        connection.send(answer)
        fault("worker.answered")


def embed_rows(block: RowBlock, order: Embed, encoder: Encoder) -> Embedded:
    """Embed rows ``order.start`` to ``order.stop`` of a block; rows that cannot be embedded get a code."""
    started = time.perf_counter()
    if block.lease != order.lease:
        raise RuntimeError(f"slot {block.number} is of lease {block.lease}, the order of {order.lease}")
    start, stop = order.start, order.stop
    fault("worker.encode")
    tally = _encode(block, start, stop, encoder)
    block.mark_unfit(start, stop)
    return Embedded(
        block.number,
        order.lease,
        start,
        stop,
        tally.tokens,
        tally.padded_tokens,
        tally.truncated,
        time.perf_counter() - started,
        block.checksum(start, stop),
        tally.lost_chars,
    )


def _encode(block: RowBlock, start: int, stop: int, encoder: Encoder) -> Tally:
    try:
        return encoder.encode(block.contents(start, stop), block.vectors[start:stop])
    except ModelError:
        raise
    except Exception as error:
        if is_memory_error(error):
            raise memory_ran_out() from error
        # One text makes the tokenizer or the model refuse the whole list: halve until it stands alone.
        if stop - start == 1:
            block.refuse(start, ROW_NOT_ENCODABLE)
            return Tally(0, 0, 0)
        middle = (start + stop) // 2
        left = _encode(block, start, middle, encoder)
        right = _encode(block, middle, stop, encoder)
        return Tally(*(a + b for a, b in zip(left, right, strict=True)))
