"""The lease of a run, renewed while the run goes on."""

from __future__ import annotations

import threading
from types import TracebackType

from ..db.address import DatabaseAddress
from ..stores import open_store
from ..stores.base import RunSpec, Store
from ..stores.runs import HEARTBEAT_SECONDS


class Heartbeat:
    """Renews the lease within its block, from a thread with a connection of its own: the run's own connection may wait
    for long, for standard input or for an index.

    Attributes:
        phase: What the run is doing, as the next heartbeat says it.
    """

    def __init__(self, address: DatabaseAddress, run: RunSpec) -> None:
        self.phase = "start"
        self._address, self._run = address, run
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def note(self, phase: str) -> None:
        """Set :attr:`phase`."""
        self.phase = phase

    def _beat(self) -> None:
        store: Store | None = None
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                store = store or open_store(self._address, "heartbeat", target=self._run.target)
                store.heartbeat(self._run.number, self.phase)
            except Exception:  # whatever is wrong with the database, the writer will say
                store = None
        if store is not None:
            store.close()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(5)
