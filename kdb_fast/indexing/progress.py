"""Who is told what happens in a run; what shows it to a person is in :mod:`kdb_fast.cli.bars`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..accounting import Counts


class Progress(ABC):
    """Receives what happens in a run."""

    @abstractmethod
    def step(self, text: str) -> None:
        """Something that takes a moment begins."""

    @abstractmethod
    def doing(self, text: str) -> None:
        """What takes long, told every few seconds while it goes on, with how far it is; '' when it is over."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something a person should know."""

    @abstractmethod
    def plan(self, text: str) -> None:
        """How the run will be carried out."""

    @abstractmethod
    def begin(self, records: int | None) -> None:
        """Reading begins; ``records`` is about how many there are."""

    @abstractmethod
    def update(self, counts: Counts) -> None:
        """Called very often; must return quickly."""

    def hosts(self, text: str) -> None:  # noqa: B027 - for a run on a cluster
        """What of a cluster takes part now, such as ``2 hosts, 32 CPUs``."""

    def close(self) -> None:  # noqa: B027 - most have nothing to take away
        """Take the bar away."""


class Silent(Progress):
    """Shows nothing."""

    def step(self, text: str) -> None: ...
    def doing(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def plan(self, text: str) -> None: ...
    def begin(self, records: int | None) -> None: ...
    def update(self, counts: Counts) -> None: ...
