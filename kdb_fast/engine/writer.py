"""PROCESS ×1: the only one that writes rows of the index. One connection, one transaction a flush."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

from ..db.address import DatabaseAddress
from ..faults import fault
from ..ipc.child import enter_child, saying
from ..ipc.messages import (
    Answer,
    Busy,
    Failed,
    Finish,
    Finished,
    Flush,
    Flushed,
    IndexPrepared,
    PrepareIndex,
    Ready,
    Request,
    Stop,
    row_bits,
)
from ..ipc.slab import Slab, SlabHandle
from ..records import storable_key
from ..stores import open_store
from ..stores.base import FlushSlot, RunSpec, Store
from ..tables.hidden_rows import HiddenRowsError
from ..tables.index_policy import IndexAction, IndexOutcome

BEAT_SECONDS = 2.0
"""How often a busy writer says that it is alive."""

NAMES_SHOWN = 10
"""Entities that a note names."""


def run(connection: Connection, slab: SlabHandle, address: DatabaseAddress, spec: RunSpec, stderr: Any) -> None:
    """Entry point of the process."""
    started = time.monotonic()
    enter_child(stderr)
    sender = _Sender(connection)
    try:
        fault("writer.start")
        attached = slab.attach()
        store = open_store(address, "writer", target=spec.target, patient=True)
        store.on_wait = sender.say
        fault("writer.ready")
        sender.send(Ready(time.monotonic() - started))
        serve(connection, sender, attached, store, spec)
        store.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException as error:
        with contextlib.suppress(OSError):
            sender.send(Failed.of(error))
        os._exit(1)
    os._exit(0)


class _Sender:
    """The pipe to the parent, shared by the loop and the thread that says the process is alive."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._doing = ""

    def send(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)

    def say(self, doing: str) -> None:
        self._doing = doing

    def beating(self) -> AbstractContextManager[object]:
        """Send Busy every BEAT_SECONDS while the block runs."""
        self._doing = ""
        return saying(BEAT_SECONDS, lambda: self.send(Busy(self._doing)))


def serve(connection: Connection, sender: _Sender, slab: Slab, store: Store, spec: RunSpec) -> None:
    """Answer every request until Stop."""
    while True:
        message = connection.recv()
        if isinstance(message, Stop):
            return
        fault("writer.received")
        with sender.beating():
            done = answer(slab, store, spec, message, sender.say)
            if isinstance(message, Flush):
                fault("writer.flushed")
        sender.send(done)
        fault("writer.answered")


def answer(slab: Slab, store: Store, spec: RunSpec, message: Request, say: Callable[[str], None]) -> Answer:
    """Do what a message asks for. ``say`` is told what takes long."""
    if isinstance(message, Flush):
        return flush(slab, store, spec, message)
    if isinstance(message, PrepareIndex):
        return IndexPrepared(store.drop_index())
    return finish(store, spec, message, say)


def flush(slab: Slab, store: Store, spec: RunSpec, message: Flush) -> Flushed:
    """Write the slots of a Flush. The store checks the vectors against what the workers said they wrote."""
    started = time.perf_counter()
    slots = []
    for rows in message.slots:
        slot = slab.slots[rows.slot]
        if slot.lease != rows.lease:
            raise RuntimeError(f"slot {rows.slot} is of lease {slot.lease}, expected {rows.lease}")
        slots.append(FlushSlot(slot, frozenset(rows.skip), rows.crcs))
    result = store.flush(spec, message.number, slots, message.rejects, message.deletes)
    return Flushed(
        message.number,
        result.rows,
        result.bytes,
        result.deleted,
        time.perf_counter() - started,
        row_bits(result.superseded),
        row_bits((slot, row) for slot, row, _, _ in result.rejected),
    )


def finish(store: Store, spec: RunSpec, message: Finish, say: Callable[[str], None]) -> Finished:
    """Remove what has no record any more, then build what index is missing."""
    started = time.perf_counter()
    deleted = 0
    hidden: dict[str, list[str]] = {}
    for entity in message.prune:
        assert message.live_rows is not None
        say(f"removing deleted records{f' of {entity}' if entity else ''}")
        try:
            deleted += store.prune(entity, message.live_rows)
        except HiddenRowsError as error:
            hidden.setdefault(error.message, []).append(entity)
    warnings = tuple(
        f"Nothing was removed{_of(entities)}, since a record that is hidden must not look deleted: {why}."
        for why, entities in hidden.items()
    )
    kept = tuple(entity for entities in hidden.values() for entity in entities)
    outcome = store.finish_index(say, spec) if message.build_index else IndexOutcome(IndexAction.NOT_BUILT)
    return Finished(deleted, outcome, time.perf_counter() - started, warnings, kept)


def _of(entities: list[str]) -> str:
    """Of which entities; a table of any kind has none."""
    return f" from the index for {_names(entities)}" if any(entities) else ""


def _names(entities: list[str]) -> str:
    shown = ", ".join(storable_key(entity, 60) for entity in entities[:NAMES_SHOWN])
    return shown + (f" and {len(entities) - NAMES_SHOWN} more" if len(entities) > NAMES_SHOWN else "")
