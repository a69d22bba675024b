"""The lease of a run, renewed while the run goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..db.address import DatabaseAddress
from ..ipc.repeating import repeating
from ..stores import open_store
from ..stores.base import RunSpec, Store
from ..stores.runs import HEARTBEAT_SECONDS


class Heartbeat:
    """Renews the lease, with a connection of its own: the run's own connection may wait for long, for standard input or
    for an index.

    Attributes:
        phase: What the run is doing, as the next heartbeat says it.
    """

    def __init__(self, address: DatabaseAddress, run: RunSpec) -> None:
        self.phase = "start"
        self._address, self._run = address, run
        self._store: Store | None = None

    def note(self, phase: str) -> None:
        """Set :attr:`phase`."""
        self.phase = phase

    def beating(self) -> AbstractContextManager[object]:
        """Renew it in a thread while the block runs."""
        return repeating(self._beat, HEARTBEAT_SECONDS, "heartbeat", last=self._close, patience=5)

    def _beat(self) -> None:
        try:
            self._store = self._store or open_store(self._address, "heartbeat", target=self._run.target)
            self._store.heartbeat(self._run.number, self.phase)
        except Exception:  # whatever is wrong with the database, the writer will say
            self._store = None

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
